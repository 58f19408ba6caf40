"""Turn observations into figures, a table, a file and a drawing. Seconds are the engines', scaled back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from benchmarks.common.figures import percentile
from benchmarks.replay.drive import Run, Seen

WARM_UP = 200
"""Requests that the last column leaves out, in which a router learns."""

RECOVERY = 30
"""Requests to a restarted engine after which its ratio should be as before, to within `_LIKE_BEFORE`."""

_LIKE_BEFORE = 0.02
"""Difference of ratios that does not matter."""


class Figures(msgspec.Struct, frozen=True):
    """One row. `hit_share` is cached over prompt tokens as the engines counted them, `imbalance` the most computed
    tokens of one engine over the mean; `late_p99_seconds` how late the load was sent."""

    name: str
    requests: int
    errors: int
    hit_share: float
    mean_ttft_seconds: float
    p50_ttft_seconds: float
    p99_ttft_seconds: float
    warm_p99_ttft_seconds: float
    computed_tokens: int
    imbalance: float
    late_p99_seconds: float
    news_p50_seconds: float = math.nan
    news_p99_seconds: float = math.nan
    restart: Recovery | None = None


class Recovery(msgspec.Struct, frozen=True):
    """How right the predictions for the restarted engine were, beyond the prefix that all prompts share.

    A `kept` share is the part of the tokens predicted as cached there that were cached: before, of its first 30
    requests and of all after those. After `back_after` of its requests the next 30 kept the same share as before, to
    within 0.02; None if they never did. Hit shares leave out the common prefix, too; `others` are all other engines
    in the same spans. `wrong` are requests of which over half of the predicted tokens were not cached.
    """

    kept_before: float
    kept_first: float
    kept_later: float
    back_after: int | None
    hit_before: float
    hit_later: float
    others_before: float
    others_later: float
    wrong_before: int
    wrong_first: int
    wrong_later: int


def figures(name: str, run: Run, speed: float) -> Figures:
    """Return the row of one entrant."""
    good = [each for each in run.seen if not each.error]
    waits = sorted(each.ttft_seconds * speed for each in good)
    warm = sorted(each.ttft_seconds * speed for each in good if each.number >= WARM_UP)
    computed = [engine.prompt_tokens - engine.cached_tokens for engine in run.engines]
    prompt = sum(engine.prompt_tokens for engine in run.engines)
    lags = sorted(run.lags_seconds)
    return Figures(
        name,
        len(run.seen),
        len(run.seen) - len(good),
        1.0 - sum(computed) / max(prompt, 1),
        sum(waits) / max(len(waits), 1),
        percentile(waits, 0.5),
        percentile(waits, 0.99),
        percentile(warm, 0.99),
        sum(computed),
        max(computed) * len(computed) / max(sum(computed), 1),
        percentile(sorted(each.late_seconds for each in run.seen), 0.99) * speed,
        percentile(lags, 0.5) * speed,
        percentile(lags, 0.99) * speed,
        recovery(run),
    )


def recovery(run: Run) -> Recovery | None:
    """Return the figures of the first engine around its restart; None if the answering engine is not known."""
    half, restarted, shared = run.restarted_before, run.restarted, run.shared_tokens
    if half is None or not any(each.replica for each in run.seen):
        return None
    mine = [each for each in run.seen if each.replica == restarted and not each.error]
    rest = [each for each in run.seen if each.replica != restarted and not each.error]
    warm = len(run.seen) // 10
    before = [each for each in mine if warm <= each.number < half]
    after = [each for each in mine if each.number >= half]
    first, later = after[:RECOVERY], after[RECOVERY:]
    since = later[0].number if later else half
    kept = _kept(before, shared)
    starts = range(max(len(after) - RECOVERY, 0) + 1)
    back = (n for n in starts if _kept(after[n : n + RECOVERY], shared) >= kept - _LIKE_BEFORE)
    return Recovery(
        kept,
        _kept(first, shared),
        _kept(later, shared),
        next(back, None),
        _share(before, shared),
        _share(later, shared),
        _share([each for each in rest if warm <= each.number < half], shared),
        _share([each for each in rest if each.number >= since], shared),
        sum(map(_is_wrong, before)),
        sum(map(_is_wrong, first)),
        sum(map(_is_wrong, later)),
    )


def _is_wrong(each: Seen) -> bool:
    return each.predicted_tokens > 1_024 and each.cached_tokens < each.predicted_tokens / 2


def _kept(seen: Sequence[Seen], shared: int) -> float:
    """Return the share of the tokens predicted as cached that were cached; 1 if none were predicted."""
    predicted = sum(max(each.predicted_tokens - shared, 0) for each in seen)
    found = sum(max(min(each.cached_tokens, each.predicted_tokens) - shared, 0) for each in seen)
    return found / predicted if predicted else 1.0


def _share(seen: Sequence[Seen], shared: int) -> float:
    cached = sum(max(each.cached_tokens - shared, 0) for each in seen)
    return cached / max(sum(max(each.prompt_tokens - shared, 0) for each in seen), 1)


def table(title: str, rows: Sequence[Figures]) -> Table:
    """Return a table of all rows."""
    made = Table(title=title)
    headings = (
        "router",
        "hit %",
        "mean TTFT s",
        "p50",
        "p99",
        "p99 after 200",
        "computed Mtok",
        "imbalance",
        "errors",
    )
    restarted = any(row.restart for row in rows)
    for heading in (*headings, *(_RESTART_HEADINGS if restarted else ())):
        made.add_column(heading, justify="left" if heading == "router" else "right")
    for row in rows:
        made.add_row(
            row.name,
            f"{100 * row.hit_share:.1f}",
            f"{row.mean_ttft_seconds:.2f}",
            f"{row.p50_ttft_seconds:.2f}",
            f"{row.p99_ttft_seconds:.2f}",
            f"{row.warm_p99_ttft_seconds:.2f}",
            f"{row.computed_tokens / 1e6:.2f}",
            f"{row.imbalance:.2f}",
            str(row.errors),
            *(_restart_cells(row.restart) if restarted else ()),
        )
    return made


_RESTART_HEADINGS = ("kept before %", f"first {RECOVERY}", "later", "back after")


def _restart_cells(restart: Recovery | None) -> tuple[str, ...]:
    if restart is None:
        return ("",) * len(_RESTART_HEADINGS)
    shares = restart.kept_before, restart.kept_first, restart.kept_later
    back = "never" if restart.back_after is None else str(restart.back_after)
    return (*(f"{100 * share:.1f}" for share in shares), back)


def remarks(rows: Sequence[Figures]) -> list[str]:
    """Format figures that do not fit in the table: lateness and restarts."""
    said = [f"load sent late, p99 in engine seconds: {max((r.late_p99_seconds for r in rows), default=0.0):.3f}"]
    for row in rows:
        if not math.isnan(row.news_p50_seconds):
            said.append(
                f"{row.name}: age of other proxies' news when applied, in engine seconds: "
                f"p50 {row.news_p50_seconds:.3f}, p99 {row.news_p99_seconds:.3f}"
            )
        if row.restart is not None:
            r = row.restart
            said.append(
                f"{row.name}: restarted engine's wrong predictions {r.wrong_before} before, {r.wrong_first} of its "
                f"first {RECOVERY}, {r.wrong_later} later; hits beyond what all share {r.hit_before:.1%} before, "
                f"{r.hit_later:.1%} from its {RECOVERY + 1}st request on (the others {r.others_before:.1%} and "
                f"{r.others_later:.1%})"
            )
    return said


def store(file: Path, settings: dict[str, object], bound: float, rows: Sequence[Figures]) -> None:
    """Write everything as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "pooled_hit_share": bound, "rows": [msgspec.to_builtins(row) for row in rows]}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def draw(file: Path, title: str, bound: float, rows: Sequence[Figures]) -> None:
    """Draw mean and p99 TTFT as bars, and the hit ratio beside its bound, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    names = [row.name for row in rows]
    colours = ["#2b6cb0" if name.startswith("Cairn") else "#a0aec0" for name in names]
    figure, (mean, tail, hits) = pyplot.subplots(1, 3, figsize=(12, 0.5 * len(rows) + 1.6), sharey=True)
    for axes, heading, values in (
        (mean, "mean TTFT, s", [row.mean_ttft_seconds for row in rows]),
        (tail, "p99 TTFT, s", [row.p99_ttft_seconds for row in rows]),
        (hits, "hit, % of prompt tokens", [100 * row.hit_share for row in rows]),
    ):
        axes.bar_label(axes.barh(names, values, color=colours), fmt="%.2f", padding=2)
        axes.set_title(heading, fontsize=10)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    hits.axvline(100 * bound, linestyle="--", linewidth=1, color="#444444")
    mean.invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)

"""Turn answers into figures, tables, a file and a plot. Pure except for the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from benchmarks.common.figures import percentile
from benchmarks.load.asking import Answer


class Waits(msgspec.Struct, frozen=True):
    """Time to first token of some of the answers, in seconds; NaN if there are none."""

    requests: int
    mean_seconds: float
    p50_seconds: float
    p90_seconds: float
    p99_seconds: float


class Savings(msgspec.Struct, frozen=True):
    """An estimate. `prefill_seconds` are the cached tokens at the rate of the uncached responses as seen here (with
    their time in queues, so it is too high under load); `usd` is None if no prices were given."""

    cached_tokens: int
    prefill_seconds: float | None
    usd: float | None


class Summary(msgspec.Struct, frozen=True):
    """A whole run. `cached_share` refers to the prompt tokens of answers that reported cached tokens."""

    requests: int
    seconds: float
    errors: dict[str, int]
    all: Waits
    cached: Waits
    uncached: Waits
    prompt_tokens: int
    output_tokens: int
    cached_share: float | None
    savings: Savings


class Prices(msgspec.Struct, frozen=True):
    """US dollars per million input tokens, and per million that are read from a cache."""

    input: float
    cached_read: float


def summarize(answers: Sequence[Answer], seconds: float, prices: Prices | None) -> Summary:
    """Return the figures of a run that took `seconds`."""
    good = [answer for answer in answers if not answer.error]
    said = [answer for answer in good if answer.cached_tokens is not None]
    warm = [answer for answer in good if answer.is_warm]
    cold = [answer for answer in good if not answer.is_warm]
    cached = sum(answer.cached_tokens or 0 for answer in said)
    prompt = sum(answer.prompt_tokens for answer in said)
    return Summary(
        requests=len(answers),
        seconds=seconds,
        errors=dict(Counter(answer.error for answer in answers if answer.error).most_common(20)),
        all=_waits(good),
        cached=_waits(warm),
        uncached=_waits(cold),
        prompt_tokens=sum(answer.prompt_tokens for answer in good),
        output_tokens=sum(answer.output_tokens for answer in good),
        cached_share=cached / prompt if prompt else None,
        savings=Savings(
            cached,
            _prefill_seconds(cached, cold),
            None if prices is None else cached * (prices.input - prices.cached_read) / 1e6,
        ),
    )


def _waits(answers: Sequence[Answer]) -> Waits:
    ordered = sorted(answer.ttft_seconds for answer in answers)
    mean = sum(ordered) / len(ordered) if ordered else float("nan")
    return Waits(len(ordered), mean, *(percentile(ordered, share) for share in (0.5, 0.9, 0.99)))


def _prefill_seconds(cached_tokens: int, cold: Sequence[Answer]) -> float | None:
    computed = sum(answer.prompt_tokens - (answer.cached_tokens or 0) for answer in cold)
    waited = sum(answer.ttft_seconds for answer in cold)
    return cached_tokens * waited / computed if computed else None


def tables(summary: Summary) -> list[Table]:
    """Format the summary for a person."""
    waits = Table(title="time to first token, s")
    for heading in ("", "requests", "mean", "p50", "p90", "p99"):
        waits.add_column(heading, justify="right" if heading else "left")
    for name, row in (("all", summary.all), ("mostly cached", summary.cached), ("mostly uncached", summary.uncached)):
        figures = (row.mean_seconds, row.p50_seconds, row.p90_seconds, row.p99_seconds)
        waits.add_row(name, str(row.requests), *(f"{figure:.3f}" for figure in figures))
    rest = Table(title="tokens and savings", show_header=False)
    share, savings = summary.cached_share, summary.savings
    rest.add_row("requests, errors", f"{summary.requests:,}, {sum(summary.errors.values()):,}")
    rest.add_row("prompt tokens", f"{summary.prompt_tokens:,}")
    rest.add_row("cached share", "not reported" if share is None else f"{share:.1%}")
    if savings.prefill_seconds is not None:
        rest.add_row("prefill not done again (estimate)", f"{savings.prefill_seconds:,.1f} s")
    if savings.usd is not None:
        rest.add_row("input cost avoided (estimate)", f"${savings.usd:,.4f}")
    return [waits, rest]


def store(file: Path, settings: dict[str, object], summary: Summary, answers: Sequence[Answer]) -> None:
    """Write everything as JSON, including each answer."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "summary": msgspec.to_builtins(summary), "answers": msgspec.to_builtins(answers)}
    file.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def draw(file: Path, answers: Sequence[Answer]) -> None:
    """Plot the share of responses by the time to their first token, cached and uncached separately, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    good = [answer for answer in answers if not answer.error]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, colour, is_warm in (("mostly cached", "#2b6cb0", True), ("mostly uncached", "#c05621", False)):
        ordered = sorted(answer.ttft_seconds for answer in good if answer.is_warm is is_warm)
        if ordered:
            shares = [100 * (place + 1) / len(ordered) for place in range(len(ordered))]
            axes.step(ordered, shares, where="post", color=colour, label=f"{label} ({len(ordered)})")
    axes.set_xlabel("time to first token, s")
    axes.set_ylabel("% of answers")
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    if good:
        axes.legend(frameon=False)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
    pyplot.close(figure)

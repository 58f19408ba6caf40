"""Build the status page's state from the counters, the readiness and the workers' reports. Pure.

Every figure is a sum of series on the metrics page, or is read from the same source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from cache import UNLIMITED_TOKENS
from proxy.accounting.savings import SavingsLine, SavingsReport
from proxy.admin.status.state import (
    SINCE_START,
    TODAY,
    WEEK,
    Distribution,
    ErrorShown,
    Moment,
    RedisView,
    ReplicaRow,
    Saved,
    SharingView,
    ShownPrefix,
    State,
)
from proxy.control.error_rows import ErrorRow
from proxy.control.messages import ReplicaDown, StatusReport
from proxy.control.prefix_rows import Miss, MissRow, PrefixRow
from proxy.control.readiness import Readiness
from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import Labels, Observed, Spec
from proxy.model import CacheStatus, MissReason

PREFIXES_SHOWN = 20
MISSES_SHOWN = 20
ERRORS_SHOWN = 12
RATE_WINDOW_SECONDS = 10.0
_DAY_SECONDS = 86_400
_WAITING = (metrics.UPSTREAM_QUEUED, metrics.COLD_WAITING, metrics.WARM_WAITING)  # a request waits in one at a time
_SHOWN_CACHE = (CacheStatus.HIT, CacheStatus.PARTIAL, CacheStatus.MISS)


class Figures(Protocol):
    """The counters; `proxy.metrics.exposition.Exposition` in the product."""

    def value(self, spec: Spec, labels: Labels | None = None) -> float: ...
    def total(self, spec: Spec, label: int, value: str) -> float: ...
    def series(self, spec: Spec) -> Mapping[Labels, float]: ...
    def observed(self, spec: Spec) -> Mapping[Labels, Observed]: ...


def build(figures: Figures, readiness: Readiness, reports: Sequence[StatusReport], moment: Moment) -> State:
    """Build the page's state. `reports` are the last complete ones, one per worker."""
    prefix_reports = [report.prefixes for report in reports if report.prefixes is not None]
    return State(
        now_unix_seconds=moment.now_unix_seconds,
        started_unix_seconds=moment.started_unix_seconds,
        version=moment.version,
        status=readiness.status.value,
        reasons=list(readiness.reasons),
        notices=notices(figures),
        workers=readiness.workers,
        in_flight=readiness.in_flight,
        requests=int(figures.value(metrics.REQUESTS)),
        requests_per_second=moment.requests_per_second,
        waiting=sum(int(sum(figures.series(spec).values())) for spec in _WAITING),
        errors=_by_label(figures, metrics.ERRORS),
        recent_errors=recent_errors([report.errors for report in reports]),
        base_url=moment.base_url,
        example_model=moment.example_model,
        saved=saved(figures, moment),
        routing_gain_tokens=figures.value(metrics.ROUTING_GAIN),
        unpriced=_by_label(figures, metrics.UNPRICED),
        ttft_bounds=list(metrics.TTFT.buckets),
        ttft=distributions(figures),
        replicas=replicas(figures, readiness, reports),
        prefixes=prefixes([each.prefixes for each in prefix_reports]),
        misses=misses([each.misses for each in prefix_reports]),
        miss_reasons=miss_reasons(figures),
        redis=_redis(figures, readiness),
        sharing=_sharing(figures, reports),
        contexts=int(max(figures.series(metrics.CONTEXTS).values(), default=0)),
        contexts_bytes=int(max(figures.series(metrics.CONTEXTS_BYTES).values(), default=0)),
        stored=max([report.contexts for report in reports], key=len, default=[]),  # every worker sees the same
        sample=moment.sample,
    )


def saved(figures: Figures, moment: Moment) -> dict[str, Saved | None]:
    """Return the savings of the three periods; None for a period whose totals cannot be read.

    The totals in Redis are some seconds old. A period that includes the whole time since the start is therefore never
    shown with less than that.
    """
    since_start = Saved(
        usd=figures.value(metrics.SAVINGS) - figures.value(metrics.SURCHARGE),
        surcharge_usd=figures.value(metrics.SURCHARGE),
        uncached_cost_usd=figures.value(metrics.UNCACHED_COST),
        prefill_seconds=figures.value(metrics.PREFILL_SAVED),
        prompt_tokens=prompt_tokens(figures),
        cached_tokens=figures.total(metrics.TOKENS, 2, "input_cached"),
        unknown_tokens=figures.value(metrics.CACHED_UNKNOWN),
    )
    today = int(moment.now_unix_seconds // _DAY_SECONDS)
    found: dict[str, Saved | None] = {}
    for name, days in ((TODAY, 1), (WEEK, 7)):
        period = moment.periods.get(name)
        includes_start = moment.started_unix_seconds >= (today - days + 1) * _DAY_SECONDS
        is_behind = period is not None and period.prompt_tokens < since_start.prompt_tokens
        found[name] = since_start if includes_start and is_behind else period
    return found | {SINCE_START: since_start}


def periods(week: SavingsReport) -> dict[str, Saved]:
    """Return today's and the week's savings from the totals of seven days, by day. Days are in UTC."""
    today = next((_saved(line) for line in week.lines if line.name == week.until), Saved())
    return {TODAY: today, WEEK: _saved(week.total)}


def _saved(line: SavingsLine) -> Saved:
    return Saved(
        usd=float(line.net_usd),
        surcharge_usd=float(line.surcharge_usd),
        uncached_cost_usd=float(line.uncached_cost_usd),
        prefill_seconds=float(line.prefill_seconds_saved),
        prompt_tokens=line.prompt_tokens,
        cached_tokens=line.cached_tokens,
        unknown_tokens=line.unknown_tokens,
    )


def prompt_tokens(figures: Figures) -> float:
    """Return all prompt tokens that the upstreams reported, cached or not."""
    return sum(amount for labels, amount in figures.series(metrics.TOKENS).items() if labels[2] != "output")


def distributions(figures: Figures) -> list[Distribution]:
    """Return the times to the first token by predicted cache status; a status without any is omitted."""
    shown = []
    bounds = metrics.TTFT.buckets
    for cache in _SHOWN_CACHE:
        counts = [0] * (len(bounds) + 1)
        for labels, observed in figures.observed(metrics.TTFT).items():
            if labels[2] == cache:
                counts = [old + new for old, new in zip(counts, observed.counts, strict=True)]
        if any(counts):
            p50, p95 = quantile(0.5, bounds, counts), quantile(0.95, bounds, counts)
            shown.append(Distribution(cache.value, sum(counts), p50, p95, counts))
    return shown


def quantile(share: float, bounds: Sequence[float], counts: Sequence[int]) -> float | None:
    """Return the value below which `share` of the observations lie, as Prometheus's histogram_quantile does.

    None if nothing was observed; the last bound if the quantile lies beyond it.
    """
    rank = share * sum(counts)
    if not rank:
        return None
    below, start = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if below + count >= rank:
            return start + (bound - start) * (rank - below) / count
        below, start = below + count, bound
    return bounds[-1]


def replicas(figures: Figures, readiness: Readiness, reports: Sequence[StatusReport]) -> list[ReplicaRow]:
    """Return a row for each configured replica, in the order of the configuration."""
    budgets: dict[str, int] = {}
    for report in reports:
        for name, tokens in report.budgets.items():
            budgets[name] = max(budgets.get(name, 0), tokens)
    in_flight, queued = _by_label(figures, metrics.UPSTREAM_IN_FLIGHT), _by_label(figures, metrics.UPSTREAM_QUEUED)
    resident, breaker = _by_label(figures, metrics.INDEX_TOKENS), _by_label(figures, metrics.UPSTREAM_BREAKER)
    pending = _by_label(figures, metrics.UPSTREAM_PENDING)
    rate = figures.series(metrics.UPSTREAM_RATE)
    down = _down(reports)
    reported = _tokens_by_upstream(figures)
    predicted, unknown = (
        _by_upstream(figures, metrics.PREDICTED_CACHED),
        _by_upstream(figures, metrics.CACHED_UNKNOWN),
    )
    rows = []
    for name, is_up in readiness.upstreams.items():
        budget = budgets.get(name)
        prompt, cached = reported.get(name, (0.0, 0.0))
        rows.append(
            ReplicaRow(
                name=name,
                up=is_up,
                down_since_unix_seconds=None if is_up or name not in down else down[name].since_unix_seconds,
                why="" if is_up or name not in down else down[name].why,
                breaker=_level(breaker.get(name, 0)),
                in_flight=in_flight.get(name, 0),
                queued=queued.get(name, 0),
                pending_tokens=pending.get(name, 0),
                resident_tokens=resident.get(name, 0),
                budget_tokens=None if budget is None or budget >= UNLIMITED_TOKENS else budget,
                prompt_tokens=int(prompt),
                cached_tokens=int(cached),
                unknown_tokens=int(unknown.get(name, 0.0)),
                predicted_tokens=int(predicted.get(name, 0.0)),
                prefill_tokens_per_second=rate.get((name,), 0.0),
            )
        )
    return rows


def _down(reports: Sequence[StatusReport]) -> dict[str, ReplicaDown]:
    """Return the replicas that are down, each since it was first found so, with the newest reason."""
    down: dict[str, ReplicaDown] = {}
    for report in reports:
        for name, found in report.down.items():
            known = down.get(name)
            since = (
                found.since_unix_seconds if known is None else min(known.since_unix_seconds, found.since_unix_seconds)
            )
            is_newer = known is None or found.since_unix_seconds >= known.since_unix_seconds
            down[name] = ReplicaDown(since, found.why if known is None or is_newer else known.why)
    return down


def prefixes(of_workers: Iterable[Sequence[PrefixRow]]) -> list[ShownPrefix]:
    """Join the workers' rows of each prefix and return those that saved most, without their hashes."""
    joined: dict[int, PrefixRow] = {}
    for rows in of_workers:
        for row in rows:
            known = joined.get(row.key)
            joined[row.key] = row if known is None else join(known, row)
    best = sorted(joined.values(), key=lambda row: row.saved_tokens, reverse=True)[:PREFIXES_SHOWN]
    return [
        ShownPrefix(number, row.model, row.tokens, row.hits, row.saved_tokens, row.used_unix_seconds)
        for number, row in enumerate(best, start=1)
    ]


def join(one: PrefixRow, other: PrefixRow) -> PrefixRow:
    """Join two workers' rows of one prefix; its length is that of the row used last."""
    newer = one if one.used_unix_seconds >= other.used_unix_seconds else other
    hits, tokens = one.hits + other.hits, one.saved_tokens + other.saved_tokens
    return msgspec.structs.replace(newer, hits=hits, saved_tokens=tokens)


def misses(of_workers: Iterable[Sequence[MissRow]]) -> list[Miss]:
    """Return the newest misses of all workers, newest first."""
    rows = [row for rows in of_workers for row in rows]
    rows.sort(key=lambda row: row.unix_seconds, reverse=True)
    return [Miss(**msgspec.structs.asdict(row)) for row in rows[:MISSES_SHOWN]]


def miss_reasons(figures: Figures) -> dict[str, int]:
    """Return how often prompts were not fully cached, by reason; prompts too short to share do not count."""
    return {reason: n for reason, n in _by_label(figures, metrics.PREFIX_MISS).items() if reason != MissReason.SHORT}


def recent_errors(of_workers: Iterable[Sequence[ErrorRow]]) -> list[ErrorShown]:
    """Add the workers' rows up, and return the most frequent errors."""
    joined: dict[tuple[str, str, str], tuple[int, float]] = {}
    for rows in of_workers:
        for row in rows:
            key = (row.client, row.model, row.reason)
            count, last = joined.get(key, (0, 0.0))
            joined[key] = (count + row.count, max(last, row.last_unix_seconds))
    best = sorted(joined.items(), key=lambda item: (-item[1][0], -item[1][1]))[:ERRORS_SHOWN]
    return [ErrorShown(*key, count, last) for key, (count, last) in best]


def notices(figures: Figures) -> list[str]:
    """Return what needs attention although requests are served, one sentence each."""
    found = _scarce_caches(figures) + _mixed_templates(figures)
    if unpriced := int(figures.value(metrics.UNPRICED)):
        reasons = ", ".join(sorted(reason.replace("_", " ") for (reason,) in figures.series(metrics.UNPRICED)))
        found.append(
            f"{_count(unpriced, 'response')} without a price ({reasons}): their tokens are counted, their cost is not"
        )
    if figures.value(metrics.SURCHARGE) > figures.value(metrics.SAVINGS):
        found.append("cache writes have cost more than cached tokens have saved")
    if unknown := int(figures.value(metrics.CACHED_UNKNOWN)):
        found.append(
            f"{_count(unknown, 'prompt token')} of responses that did not report cached tokens: counted as not "
            "cached (vLLM reports them with --enable-prompt-tokens-details, SGLang with --enable-cache-report)"
        )
    if missing := int(figures.value(metrics.USAGE_MISSING)):
        found.append(f"{_count(missing, 'response')} ended without token counts: counted as no saving")
    if implausible := int(figures.value(metrics.CACHED_IMPLAUSIBLE)):
        found.append(
            f"{_count(implausible, 'response')} with implausible cached tokens, not counted as savings: a replica "
            "reports new prompts as wholly cached (as an engine that only decodes does), reports more cached tokens "
            "than the prompt has, or takes as long as without a cache"
        )
    if inconsistent := int(figures.value(metrics.USAGE_INCONSISTENT)):
        found.append(f"{_count(inconsistent, 'response')} with contradictory token counts: corrected")
    if restarts := int(figures.value(metrics.WORKER_RESTARTS)):
        found.append(f"{_count(restarts, 'worker restart')} after an unexpected end; see the log")
    if figures.value(metrics.RELOADS_FAILED) and not figures.series(metrics.RELOAD_SUCCEEDED).get((), 0):
        found.append("the last configuration reload failed: the old configuration is in use; see the log")
    return found


def _scarce_caches(figures: Figures) -> list[str]:
    """Return a sentence on each pool whose sessions need more cache than its replicas have."""
    waiting = int(sum(figures.series(metrics.COLD_WAITING).values()))
    warm = int(sum(figures.series(metrics.WARM_WAITING).values()))
    verb = "waits" if waiting == 1 else "wait"
    cached = f", {warm:,} for the one that holds what they continue" if warm else ""
    return [
        f"sessions need {need:.1f} x the cache of pool {pool}: {_count(waiting, 'prompt')} {verb} for a quiet replica"
        + cached
        for (pool,), need in sorted(figures.series(metrics.CACHE_NEED).items())
        if need > 1.0
    ]


def _mixed_templates(figures: Figures) -> list[str]:
    """Return a sentence on each pool whose engines render prompts differently."""
    return [
        f"engines of pool {pool} render prompts of {_count(int(models), 'model')} differently: only what all of them "
        "share is expected to be cached; see the log"
        for (pool,), models in sorted(figures.series(metrics.MIXED_TEMPLATES).items())
        if models
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _redis(figures: Figures, readiness: Readiness) -> RedisView:
    bounds = metrics.REDIS_DURATION.buckets
    counts = [0] * (len(bounds) + 1)
    for observed in figures.observed(metrics.REDIS_DURATION).values():
        counts = [old + new for old, new in zip(counts, observed.counts, strict=True)]
    return RedisView(
        state=readiness.redis or "unknown",
        breaker=_level(max(figures.series(metrics.REDIS_BREAKER).values(), default=0)),
        operations=sum(counts),
        errors=int(figures.value(metrics.REDIS_ERRORS)),
        p50_seconds=quantile(0.5, bounds, counts),
        p95_seconds=quantile(0.95, bounds, counts),
    )


def _sharing(figures: Figures, reports: Sequence[StatusReport]) -> SharingView:
    workers = [report.sharing for report in reports]
    states: dict[str, int] = {}
    for worker in workers:
        if worker.state:
            states[worker.state] = states.get(worker.state, 0) + 1
    return SharingView(
        states=states,
        others=max((worker.others for worker in workers), default=0),
        holds_lease=any(worker.holds_lease for worker in workers),
        lag_seconds=max(figures.series(metrics.JOURNAL_LAG).values(), default=0.0),
        written=sum(worker.written for worker in workers),
        read=sum(worker.read for worker in workers),
        rebuilds=sum(worker.rebuilds for worker in workers),
        dropped=_by_label(figures, metrics.JOURNAL_DROPPED),
    )


def _tokens_by_upstream(figures: Figures) -> dict[str, tuple[float, float]]:
    """Return the prompt tokens of each upstream, and how many of them were cached, in one pass over all series."""
    found: dict[str, tuple[float, float]] = {}
    for (_, name, kind), amount in figures.series(metrics.TOKENS).items():
        if kind != "output":
            prompt, cached = found.get(name, (0.0, 0.0))
            found[name] = prompt + amount, cached + (amount if kind == "input_cached" else 0.0)
    return found


def _by_upstream(figures: Figures, spec: Spec) -> dict[str, float]:
    """Return the sums of a metric whose labels are model and upstream by upstream."""
    found: dict[str, float] = {}
    for (_, name), amount in figures.series(spec).items():
        found[name] = found.get(name, 0.0) + amount
    return found


def _by_label(figures: Figures, spec: Spec) -> dict[str, int]:
    """Return the series of a metric with one label, as whole numbers."""
    return {labels[0]: int(value) for labels, value in figures.series(spec).items()}


def _level(value: float) -> str:
    return ("closed", "half open", "open")[int(value)]

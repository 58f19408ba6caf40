"""What the status page shows, as one JSON: built from counters, the judgement and what workers reported. Pure.

Every figure is a sum of series of /metrics, or stands beside one; none is counted twice. It must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from proxy.accounting.savings import SavingsLine, SavingsReport
from proxy.admin.status.history import Sample
from proxy.control.prefix_rows import Miss, MissRow, PrefixRow
from proxy.control.readiness import Readiness
from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import Labels, Observed, Spec
from proxy.model import CacheStatus

TODAY = "today"
WEEK = "7 days"
SINCE_START = "since start"
PREFIXES_SHOWN = 20
MISSES_SHOWN = 20
RATE_WINDOW_SECONDS = 10.0
BUDGET_UNKNOWN_TOKENS = 2**31  # the index's word for a capacity that nobody told and no answer has shown yet
_SHOWN_CACHE = (CacheStatus.HIT, CacheStatus.PARTIAL, CacheStatus.MISS)


class Figures(Protocol):
    """The counters: `proxy.metrics.definitions.Exposition`."""

    def value(self, spec: Spec, labels: Labels | None = None) -> float: ...
    def total(self, spec: Spec, label: int, value: str) -> float: ...
    def series(self, spec: Spec) -> Mapping[Labels, float]: ...
    def observed(self, spec: Spec) -> Mapping[Labels, Observed]: ...


class Saved(msgspec.Struct, frozen=True):
    """One period's saving. `usd` is less the surcharge, so it may be negative."""

    usd: float = 0.0
    surcharge_usd: float = 0.0
    uncached_cost_usd: float = 0.0
    prefill_seconds: float = 0.0
    prompt_tokens: float = 0
    cached_tokens: float = 0


class JournalView(msgspec.Struct, frozen=True):
    """How one worker's journal stands."""

    state: str = ""
    others: int = 0  # writers alive beside this one, in all proxies
    holds_lease: bool = False
    written: int = 0  # entries
    read: int = 0
    rebuilds: int = 0


class ContextView(msgspec.Struct, frozen=True):
    """One stored context as the page shows it: without name, id or whose it is. Worth is what its uses save."""

    model: str
    status: str
    tokens: int
    size_bytes: int
    pinned: bool
    worth_usd_per_hour: float
    expires_unix_seconds: float


class PageState(msgspec.Struct, frozen=True):
    """What a worker puts into its report for the page. A field that did not change is left out."""

    prefixes: list[PrefixRow] | None = None
    misses: list[MissRow] | None = None
    budgets: dict[str, int] = {}  # tokens that the index takes a replica to hold
    journal: JournalView = JournalView()
    contexts: list[ContextView] = []  # those worth most, of all tenants


class Distribution(msgspec.Struct, frozen=True):
    """Times to the first token of one cache status; `counts` has one more than the bounds."""

    cache: str
    count: int
    p50_seconds: float | None
    p95_seconds: float | None
    counts: list[int]


class ReplicaRow(msgspec.Struct, frozen=True):
    """One replica. Predicted and cached tokens are of the same answers, as far as these said what was cached."""

    name: str
    up: bool
    breaker: str
    in_flight: int
    queued: int
    pending_tokens: int  # uncached, of requests that it has not begun to answer
    resident_tokens: int
    budget_tokens: int | None
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int
    prefill_tokens_per_second: float


class ShownPrefix(msgspec.Struct, frozen=True):
    """One prefix; `number` is its place in the list and says nothing else."""

    number: int
    model: str
    tokens: int
    hits: int
    saved_tokens: int
    used_unix_seconds: float


class RedisView(msgspec.Struct, frozen=True):
    """Redis as the workers find it, and how long its operations take."""

    state: str
    breaker: str
    operations: int
    errors: int
    p50_seconds: float | None
    p95_seconds: float | None


class JournalShown(msgspec.Struct, frozen=True):
    """The shared index: the workers' journals added up."""

    states: dict[str, int]  # how many workers stand how
    others: int
    holds_lease: bool
    lag_seconds: float
    written: int
    read: int
    rebuilds: int
    dropped: dict[str, int]


class State(msgspec.Struct, frozen=True):
    """The whole page at one moment."""

    now_unix_seconds: float
    started_unix_seconds: float
    version: str
    standing: str
    reasons: list[str]
    notices: list[str]
    workers: int
    in_flight: int
    requests: int
    requests_per_second: float
    saved: dict[str, Saved | None]
    routing_gain_tokens: float
    unpriced: dict[str, int]
    ttft_bounds: list[float]
    ttft: list[Distribution]
    replicas: list[ReplicaRow]
    prefixes: list[ShownPrefix]
    misses: list[Miss]
    miss_reasons: dict[str, int]
    redis: RedisView
    journal: JournalShown
    contexts: int
    contexts_bytes: int
    stored: list[ContextView]
    sample: Sample | None


class Moment(msgspec.Struct, frozen=True):
    """What is not in the counters."""

    now_unix_seconds: float
    started_unix_seconds: float
    version: str
    requests_per_second: float = 0.0
    sample: Sample | None = None
    periods: Mapping[str, Saved] = {}  # those that outlive a restart, TODAY and WEEK, where they are known


def build(figures: Figures, readiness: Readiness, pages: Sequence[PageState], moment: Moment) -> State:
    """The page's state. `pages` are one a worker, each with all that it reported last."""
    return State(
        moment.now_unix_seconds,
        moment.started_unix_seconds,
        moment.version,
        readiness.standing.value,
        list(readiness.reasons),
        notices(figures),
        readiness.workers,
        readiness.in_flight,
        int(figures.value(metrics.REQUESTS)),
        moment.requests_per_second,
        saved(figures, moment.periods),
        figures.value(metrics.ROUTING_GAIN),
        _by_label(figures, metrics.UNPRICED),
        list(metrics.TTFT.buckets),
        distributions(figures),
        replicas(figures, readiness, pages),
        prefixes([page.prefixes or [] for page in pages]),
        misses([page.misses or [] for page in pages]),
        _by_label(figures, metrics.PREFIX_MISS),
        _redis(figures, readiness),
        _journal(figures, pages),
        int(max(figures.series(metrics.CONTEXTS).values(), default=0)),
        int(max(figures.series(metrics.CONTEXTS_BYTES).values(), default=0)),
        max([page.contexts for page in pages], key=len, default=[]),  # every worker sees the same
        moment.sample,
    )


def saved(figures: Figures, periods: Mapping[str, Saved]) -> dict[str, Saved | None]:
    """The three periods; None where the totals that outlive a restart are not known."""
    return {
        TODAY: periods.get(TODAY),
        WEEK: periods.get(WEEK),
        SINCE_START: Saved(
            figures.value(metrics.SAVINGS) - figures.value(metrics.SURCHARGE),
            figures.value(metrics.SURCHARGE),
            figures.value(metrics.UNCACHED_COST),
            figures.value(metrics.PREFILL_SAVED),
            prompt_tokens(figures),
            figures.total(metrics.TOKENS, 2, "input_cached"),
        ),
    }


def periods(week: SavingsReport) -> dict[str, Saved]:
    """What the totals of seven days, by day, say of the page's two longer periods. Days are UTC's."""
    today = next((_saved(line) for line in week.lines if line.name == week.until), Saved())
    return {TODAY: today, WEEK: _saved(week.total)}


def _saved(line: SavingsLine) -> Saved:
    return Saved(
        float(line.net_usd),
        float(line.surcharge_usd),
        float(line.uncached_cost_usd),
        float(line.prefill_seconds_saved),
        line.prompt_tokens,
        line.cached_tokens,
    )


def prompt_tokens(figures: Figures) -> float:
    """All prompt tokens that upstreams reported, cached or not."""
    return sum(amount for labels, amount in figures.series(metrics.TOKENS).items() if labels[2] != "output")


def distributions(figures: Figures) -> list[Distribution]:
    """Times to the first token by what was predicted of the cache; a status without any is left out."""
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
    """The value under which `share` of the observations lie, interpolated as Prometheus's histogram_quantile does.

    None where nothing was observed; the last bound where it lies beyond it.
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


def replicas(figures: Figures, readiness: Readiness, pages: Sequence[PageState]) -> list[ReplicaRow]:
    """A row for each replica of the configuration, in its order."""
    budgets: dict[str, int] = {}
    for page in pages:
        for name, tokens in page.budgets.items():
            budgets[name] = max(budgets.get(name, 0), tokens)
    in_flight, queued = _by_label(figures, metrics.UPSTREAM_IN_FLIGHT), _by_label(figures, metrics.UPSTREAM_QUEUED)
    resident, breaker = _by_label(figures, metrics.INDEX_TOKENS), _by_label(figures, metrics.UPSTREAM_BREAKER)
    pending = _by_label(figures, metrics.UPSTREAM_PENDING)
    rate = figures.series(metrics.UPSTREAM_RATE)
    rows = []
    for name, is_up in readiness.upstreams.items():
        budget = budgets.get(name)
        predicted = figures.total(metrics.PREDICTED_CACHED, 1, name)
        prompt, cached = _tokens_of(figures, name)
        rows.append(
            ReplicaRow(
                name,
                is_up,
                _level(breaker.get(name, 0)),
                in_flight.get(name, 0),
                queued.get(name, 0),
                pending.get(name, 0),
                resident.get(name, 0),
                None if budget is None or budget >= BUDGET_UNKNOWN_TOKENS else budget,
                int(prompt),
                int(cached),
                int(predicted),
                rate.get((name,), 0.0),
            )
        )
    return rows


def prefixes(of_workers: Iterable[Sequence[PrefixRow]]) -> list[ShownPrefix]:
    """The same prefix joined over workers, then those that save most, without what could name their text."""
    joined: dict[int, PrefixRow] = {}
    for rows in of_workers:
        for row in rows:
            have = joined.get(row.key)
            joined[row.key] = row if have is None else join(have, row)
    best = sorted(joined.values(), key=lambda row: row.saved_tokens, reverse=True)[:PREFIXES_SHOWN]
    return [
        ShownPrefix(number, row.model, row.tokens, row.hits, row.saved_tokens, row.used_unix_seconds)
        for number, row in enumerate(best, start=1)
    ]


def join(one: PrefixRow, other: PrefixRow) -> PrefixRow:
    """Two workers' rows of one prefix; its length as the fresher one knows it."""
    fresher = one if one.used_unix_seconds >= other.used_unix_seconds else other
    hits, tokens = one.hits + other.hits, one.saved_tokens + other.saved_tokens
    return msgspec.structs.replace(fresher, hits=hits, saved_tokens=tokens)


def misses(of_workers: Iterable[Sequence[MissRow]]) -> list[Miss]:
    """The newest first."""
    rows = [row for rows in of_workers for row in rows]
    rows.sort(key=lambda row: row.unix_seconds, reverse=True)
    return [Miss(**msgspec.structs.asdict(row)) for row in rows[:MISSES_SHOWN]]


def notices(figures: Figures) -> list[str]:
    """What should be looked at though requests are served; each as one sentence."""
    found = []
    if unpriced := int(figures.value(metrics.UNPRICED)):
        reasons = ", ".join(sorted(reason.replace("_", " ") for (reason,) in figures.series(metrics.UNPRICED)))
        found.append(f"{_count(unpriced, 'answer')} without a price ({reasons}): tokens count, money does not")
    if figures.value(metrics.SURCHARGE) > figures.value(metrics.SAVINGS):
        found.append("writing caches has cost more than reading them saved")
    if unknown := int(figures.value(metrics.CACHED_UNKNOWN)):
        found.append(
            f"{_count(unknown, 'prompt token')} of answers that did not say what was cached: counted as fresh"
        )
    if missing := int(figures.value(metrics.USAGE_MISSING)):
        found.append(f"{_count(missing, 'answer')} ended without usage: counted as no saving")
    if inconsistent := int(figures.value(metrics.USAGE_INCONSISTENT)):
        found.append(f"{_count(inconsistent, 'answer')} with usage that contradicts itself: clamped")
    if restarts := int(figures.value(metrics.WORKER_RESTARTS)):
        found.append(f"{_count(restarts, 'worker')} died and started again")
    if failed := int(figures.value(metrics.RELOADS_FAILED)):
        found.append(f"{_count(failed, 'reload')} failed: the old configuration is in force")
    return found


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _redis(figures: Figures, readiness: Readiness) -> RedisView:
    bounds = metrics.REDIS_DURATION.buckets
    counts = [0] * (len(bounds) + 1)
    for observed in figures.observed(metrics.REDIS_DURATION).values():
        counts = [old + new for old, new in zip(counts, observed.counts, strict=True)]
    return RedisView(
        readiness.redis or "unknown",
        _level(max(figures.series(metrics.REDIS_BREAKER).values(), default=0)),
        sum(counts),
        int(figures.value(metrics.REDIS_ERRORS)),
        quantile(0.5, bounds, counts),
        quantile(0.95, bounds, counts),
    )


def _journal(figures: Figures, pages: Sequence[PageState]) -> JournalShown:
    journals = [page.journal for page in pages]
    states: dict[str, int] = {}
    for journal in journals:
        if journal.state:
            states[journal.state] = states.get(journal.state, 0) + 1
    return JournalShown(
        states,
        max((journal.others for journal in journals), default=0),
        any(journal.holds_lease for journal in journals),
        max(figures.series(metrics.JOURNAL_LAG).values(), default=0.0),
        sum(journal.written for journal in journals),
        sum(journal.read for journal in journals),
        sum(journal.rebuilds for journal in journals),
        _by_label(figures, metrics.JOURNAL_DROPPED),
    )


def _tokens_of(figures: Figures, upstream: str) -> tuple[float, float]:
    """Prompt tokens and the cached ones among them."""
    prompt = cached = 0.0
    for (_, name, kind), amount in figures.series(metrics.TOKENS).items():
        if name == upstream and kind != "output":
            prompt += amount
            cached += amount if kind == "input_cached" else 0
    return prompt, cached


def _by_label(figures: Figures, spec: Spec) -> dict[str, int]:
    """The series of a metric with one label, as whole numbers."""
    return {labels[0]: int(value) for labels, value in figures.series(spec).items()}


def _level(value: float) -> str:
    return ("closed", "half open", "open")[int(value)]


def page_of(reported: Mapping[str, Any]) -> PageState:
    """What a worker put into `SavingsReport.page`.

    Raises:
        msgspec.ValidationError: it is not of that shape.
    """
    return msgspec.convert(reported, PageState)

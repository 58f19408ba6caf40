"""Count the outcomes of requests: requests, errors, times, tokens and money.

Tokens are counted as the upstream reported them. If an upstream omits the cached tokens, they are unknown until it
has reported some that are not zero (vLLM and SGLang omit zeros); from then on an omitted count is zero. This is
separate for each endpoint, and for streams: many engines report cached tokens in some of their dialects only.
Unknown tokens save nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

from cache import Sums, Totals
from proxy.accounting import pricing
from proxy.accounting.error_stats import ErrorStats, error_reason
from proxy.accounting.pricing import PRICE_SECONDS, Bill, PriceBook, Unpriced, moment_of
from proxy.fleet.pools import Pools
from proxy.metrics import definitions as metrics
from proxy.metrics.model_labels import ModelNames
from proxy.metrics.recorder import Recorder
from proxy.model import CacheStatus, Ending, Endpoint, MissReason, RouteReason
from proxy.records import Outcome, Usage

_STATUS_CLASSES = ("0xx", "1xx", "2xx", "3xx", "4xx", "5xx")
_OPERATIONS = {Endpoint.COMPLETIONS: "text_completion", Endpoint.EMBEDDINGS: "embeddings"}  # OpenTelemetry's names
_CHAT: Final = "chat"  # of all other endpoints that have tokens
_REFUSED: Final = Ending.REFUSED  # constants: members of an enum and their values are looked up in Python
_UNPRICED: Final = {reason: (reason.value,) for reason in Unpriced}  # the labels
_SECONDS_PER_DAY: Final = 86_400
_PICOS_PER_USD = Decimal(10**12)
_MICROS_PER_SECOND: Final = 1_000_000


class _Route:
    """The series of similar requests, which are looked up once and then only added to."""

    __slots__ = (
        "decisions",
        "duration",
        "gaps",
        "input",
        "misses",
        "output",
        "overhead",
        "per_token",
        "plain_ttft",
        "requests",
        "ttft",
    )

    def __init__(
        self,
        recorder: Recorder,
        endpoint: Endpoint,
        model: str,
        upstream: str,
        status_class: int,
        plan: tuple[CacheStatus, RouteReason, MissReason] | None,
        stream: bool,
    ) -> None:
        kind = endpoint.value
        cache = (plan[0] if plan else CacheStatus.BYPASS).value
        stream_label = "true" if stream else "false"
        requests = (kind, model, upstream, _STATUS_CLASSES[status_class], cache, stream_label)
        self.requests = recorder.counter(metrics.REQUESTS, requests)
        self.duration = recorder.histogram(metrics.DURATION, (kind, model, cache))
        self.overhead = recorder.histogram(metrics.OVERHEAD, (kind,))
        self.ttft = recorder.histogram(metrics.TTFT, (model, upstream, cache))
        self.gaps = recorder.histogram(metrics.INTER_TOKEN, (model, upstream))
        source = (_OPERATIONS.get(endpoint, _CHAT), model, upstream)
        self.plain_ttft = recorder.histogram(metrics.GEN_AI_TTFT, source)
        self.per_token = recorder.histogram(metrics.GEN_AI_PER_TOKEN, source)
        self.input = recorder.histogram(metrics.GEN_AI_USAGE, (*source, "input"))
        self.output = recorder.histogram(metrics.GEN_AI_USAGE, (*source, "output"))
        decided = plan is not None and endpoint.is_generation
        self.decisions = recorder.counter(metrics.ROUTE_DECISIONS, (plan[1].value,)) if plan and decided else None
        missed = plan is not None and decided and plan[2] is not MissReason.NONE
        self.misses = recorder.counter(metrics.PREFIX_MISS, (plan[2].value,)) if plan and missed else None


class _Source:
    """The series of one model at one upstream."""

    __slots__ = ("cached", "error", "fresh", "output", "predicted", "prefill_saved", "unknown", "written")

    def __init__(self, recorder: Recorder, model: str, upstream: str) -> None:
        labels = (model, upstream)
        self.fresh = recorder.counter(metrics.TOKENS, (*labels, "input_fresh"))
        self.cached = recorder.counter(metrics.TOKENS, (*labels, "input_cached"))
        self.written = recorder.counter(metrics.TOKENS, (*labels, "input_cache_write"))
        self.output = recorder.counter(metrics.TOKENS, (*labels, "output"))
        self.unknown = recorder.counter(metrics.CACHED_UNKNOWN, labels)
        self.predicted = recorder.counter(metrics.PREDICTED_CACHED, labels)
        self.error = recorder.histogram(metrics.PREDICTION_ERROR, labels)
        self.prefill_saved = recorder.counter(metrics.PREFILL_SAVED, labels)


class RequestCounters:
    """Counts in `recorder`, in `errors`, and in `totals` what outlives the process.

    `rate_of` returns a replica's measured prefill rate (tokens per second) by its number, or None. `unix_at` returns
    the Unix time of a moment of the monotonic clock: a request belongs to the day in which it ended, and is counted
    somewhat later.
    """

    def __init__(
        self,
        recorder: Recorder,
        totals: Totals,
        names: ModelNames,
        prices: PriceBook,
        pools: Pools,
        rate_of: Callable[[int], float | None],
        unix_at: Callable[[float], float],
        errors: ErrorStats,
    ) -> None:
        self._recorder = recorder
        self._totals = totals
        self._names = names
        self._prices = prices
        self._rate_of = rate_of
        self._unix_at = unix_at
        self._errors = errors
        self._shows_cached: set[tuple[int, Endpoint, bool]] = set()
        self._day = (-1, "")
        self._quarter = (-1, "")
        self._pools = pools
        # bounded, because the labels are
        self._routes: dict[tuple[object, ...], _Route] = {}
        self._sources: dict[tuple[str, str], _Source] = {}

    def known_usage(self, outcome: Outcome) -> Usage | None:
        """Return the outcome's usage; omitted cached tokens are zero if such responses have reported others."""
        usage, replica = outcome.usage, outcome.replica
        if usage is None or replica is None:
            return usage
        if usage.cached_tokens:
            self._shows_cached.add((replica.id, outcome.endpoint, outcome.stream))
        elif usage.cached_tokens is None and (replica.id, outcome.endpoint, outcome.stream) in self._shows_cached:
            return replace(usage, cached_tokens=0)
        return usage

    def count_implausible(self, outcome: Outcome) -> None:
        """Count a response whose cached tokens are ignored."""
        if outcome.replica is not None:
            self._recorder.inc(metrics.CACHED_IMPLAUSIBLE, (outcome.replica.name,))

    def count(self, outcome: Outcome, usage: Usage | None, predicted_tokens: int | None) -> None:
        """Count a finished request. `usage` is the result of `known_usage`."""
        model = self._names.label(outcome.model)
        upstream = outcome.replica.name if outcome.replica is not None else ""
        route = self._count_request(outcome, model, upstream)
        if outcome.replica is None:
            return
        ended = self._unix_at(outcome.times.ended_seconds)
        if usage is not None:
            row = self._totals.row(self._day_of(ended), model, upstream, outcome.tenant_name)
            row.answers += 1
            source = self._sources.get((model, upstream))
            if source is None:
                source = self._sources[model, upstream] = _Source(self._recorder, model, upstream)
            _count_answer(outcome, usage, route)
            self._count_tokens(usage, row, source, model, upstream)
            self._count_prediction(usage, predicted_tokens, source)
            self._count_money(outcome, usage, row, source, model, upstream, outcome.replica.id, ended)
        elif _should_have_usage(outcome):
            self._recorder.inc(metrics.USAGE_MISSING, (model, upstream))
            self._totals.row(self._day_of(ended), model, upstream, outcome.tenant_name).missing += 1

    def forget(self, replica: int, upstream: str) -> None:
        """Drop what is kept for a replica that is gone for good, whose number may be given to another."""
        self._shows_cached = {shown for shown in self._shows_cached if shown[0] != replica}
        self._sources = {key: source for key, source in self._sources.items() if key[1] != upstream}
        self._routes = {key: route for key, route in self._routes.items() if key[2] != upstream}

    def label(self, outcome: Outcome) -> str:
        """Return the model label under which a request is counted."""
        return self._names.label(outcome.model)

    def count_routing_gain(self, outcome: Outcome, tokens: int) -> None:
        """Count cached tokens that are due to routing."""
        if tokens and outcome.replica is not None:
            model = self._names.label(outcome.model)
            self._recorder.inc(metrics.ROUTING_GAIN, (model,), tokens)
            day = self._day_of(self._unix_at(outcome.times.ended_seconds))
            row = self._totals.row(day, model, outcome.replica.name, outcome.tenant_name)
            row.routing_gain_tokens += tokens

    def _count_request(self, outcome: Outcome, model: str, upstream: str) -> _Route:
        times, route = outcome.times, self._route(outcome, model, upstream)
        route.requests.value += 1
        route.duration.add(times.ended_seconds - times.received_seconds)
        if times.sent_seconds is not None:
            route.overhead.add(times.sent_seconds - times.read_seconds - times.waited_seconds)
        if times.first_token_seconds is not None:
            ttft_seconds = times.first_token_seconds - times.received_seconds
            route.ttft.add(ttft_seconds)
            route.plain_ttft.add(ttft_seconds)
            if outcome.inter_token_counts:
                route.gaps.add_counts(outcome.inter_token_counts, outcome.inter_token_seconds)
        if route.decisions is not None:
            route.decisions.value += 1
        if route.misses is not None:
            route.misses.value += 1
        if outcome.ending is _REFUSED:
            self._recorder.inc(metrics.REJECTED, (outcome.error_code or "other",))
        if (reason := error_reason(outcome)) is not None:
            self._recorder.inc(metrics.ERRORS, (reason,))
            self._errors.add(outcome, model, reason)
        return route

    def _route(self, outcome: Outcome, model: str, upstream: str) -> _Route:
        status_class = outcome.status // 100 if 0 < outcome.status < 600 else 0
        plan = outcome.plan
        decided = None if plan is None else (plan.cache, plan.reason, plan.miss)
        key = (outcome.endpoint, model, upstream, status_class, decided, outcome.stream)
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = _Route(
                self._recorder, outcome.endpoint, model, upstream, status_class, decided, outcome.stream
            )
        return route

    def _count_tokens(self, usage: Usage, row: Sums, source: _Source, model: str, upstream: str) -> None:
        written = usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
        cached = usage.cached_tokens or 0
        source.fresh.value += usage.prompt_tokens - cached - written
        source.cached.value += cached
        source.written.value += written
        source.output.value += usage.output_tokens
        if usage.cached_tokens is None:
            source.unknown.value += usage.prompt_tokens
            row.unknown_tokens += usage.prompt_tokens
        if usage.inconsistent:
            self._recorder.inc(metrics.USAGE_INCONSISTENT, (model, upstream))
        row.prompt_tokens += usage.prompt_tokens
        row.cached_tokens += cached
        row.written_tokens += written
        row.output_tokens += usage.output_tokens

    def _count_prediction(self, usage: Usage, predicted_tokens: int | None, source: _Source) -> None:
        if predicted_tokens is None or usage.cached_tokens is None:  # there is nothing to compare it with
            return
        expected_tokens = min(predicted_tokens, usage.prompt_tokens)
        source.predicted.value += expected_tokens
        source.error.add(usage.cached_tokens - expected_tokens)

    def _count_money(
        self,
        outcome: Outcome,
        usage: Usage,
        row: Sums,
        source: _Source,
        model: str,
        upstream: str,
        replica: int,
        ended_unix_seconds: float,
    ) -> None:
        recorder, rate = self._recorder, self._rate_of(replica)
        backend = self._pools.backends[replica]
        if usage.cached_tokens and rate and not backend.is_provider:
            spared_seconds = usage.cached_tokens / rate
            source.prefill_saved.value += spared_seconds
            row.prefill_micros += round(spared_seconds * _MICROS_PER_SECOND)
        moment = self._moment_of(ended_unix_seconds)
        card = self._prices.card(outcome.model or "", backend.url, moment, backend.name, usage.service_tier)
        bill = card if isinstance(card, Unpriced) else pricing.bill(usage, card, rate)
        if not isinstance(bill, Bill):
            recorder.inc(metrics.UNPRICED, _UNPRICED[bill])
            row.unpriced += 1
            return
        for spec, amount in (
            (metrics.COST, bill.cost),
            (metrics.UNCACHED_COST, bill.uncached_cost),
            (metrics.SAVINGS, bill.saving),
            (metrics.SURCHARGE, bill.surcharge),
        ):
            recorder.inc(spec, (model, upstream), float(amount))
        row.input_picos += _picos(bill.uncached_input)
        row.output_picos += _picos(bill.output)
        row.saving_picos += _picos(bill.saving)
        row.surcharge_picos += _picos(bill.surcharge)

    def _moment_of(self, unix_seconds: float) -> str:
        """Return the moment for which prices are looked up."""
        number = int(unix_seconds) // PRICE_SECONDS
        if number != self._quarter[0]:
            self._quarter = (number, moment_of(number * PRICE_SECONDS))
        return self._quarter[1]

    def _day_of(self, unix_seconds: float) -> str:
        day = int(unix_seconds) // _SECONDS_PER_DAY
        if day != self._day[0]:
            self._day = (day, datetime.fromtimestamp(day * _SECONDS_PER_DAY, UTC).date().isoformat())
        return self._day[1]


def _should_have_usage(outcome: Outcome) -> bool:
    """Return whether the response should report usage: it succeeded, and is not one that runs in the background."""
    succeeded = outcome.endpoint.is_generation and 200 <= outcome.status < 300
    return succeeded and outcome.ending is not Ending.UPSTREAM_ERROR and not outcome.is_background


def _count_answer(outcome: Outcome, usage: Usage, route: _Route) -> None:
    """Count one response as OpenTelemetry's conventions require."""
    route.input.add(usage.prompt_tokens)
    route.output.add(usage.output_tokens)
    if outcome.inter_token_counts and usage.output_tokens > 1:
        route.per_token.add(outcome.inter_token_seconds / (usage.output_tokens - 1))


def _picos(usd: Decimal) -> int:
    """Convert `usd` to the totals' unit; exact for prices of up to six decimals per million tokens."""
    return int(usd * _PICOS_PER_USD) if usd else 0

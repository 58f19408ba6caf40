"""Every metric of Cairn, in one place: its name, type, labels, buckets and meaning.

A worker counts in plain dictionaries (`proxy.metrics.recorder`), because a metric's update on the path of a request
must cost tenths of a microsecond, and hands what came since the last time to the supervisor several times a second.
There `Exposition` adds the workers up and writes the page of a scrape. So the figures survive a worker, no series
belongs to a dead one, and a scrape asks no worker anything. This replaces prometheus_client's multiprocess mode,
whose memory-mapped files cost 0.8 to 1.8 us an update and forbid a live gauge per worker; it still says in what form
a scraper wants its page, and in the tests what that page must be.

Label values come from closed enums and from names that the configuration or an upstream's model list made known.
The only importer of prometheus_client. It must not know requests, replicas or prices.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping

import msgspec
from prometheus_client.exposition import choose_encoder

from proxy.metrics.text_format import END, Family

PREFIX = "cairn_"
OTHER = "other"  # the label of a model that nobody configured or listed
MODEL_NAMES_AT_MOST = 64

# vLLM's own buckets, so that both can be laid over each other in one panel
_TTFT_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
_DURATION_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_OVERHEAD_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_INTER_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REDIS_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25)
_LAG_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
# OpenTelemetry's conventions for generative AI, as its collector writes their names for Prometheus; the time to the
# first token has vLLM's buckets, of which those are a part
# https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-metrics.md
_GEN_AI_LABELS = ("gen_ai_operation_name", "gen_ai_request_model", "server_address")
_USAGE_TOKENS = tuple(4**power for power in range(14))
_PER_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_ERROR_TOKENS = (-65536, -16384, -4096, -1024, -256, -64, 0, 64, 256, 1024, 4096, 16384, 65536)


class Kind(enum.Enum):
    """How values of a metric are joined over time and workers."""

    COUNTER = "counter"
    GAUGE_SUM = "gauge_sum"  # live workers add up
    GAUGE_MAX = "gauge_max"  # every worker sees the same thing; the worst or newest stands
    HISTOGRAM = "histogram"


class Spec(msgspec.Struct, frozen=True):
    """One metric. `name` is whole but for a counter's `_total`; `number` is its place in SPECS."""

    number: int
    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SPECS: list[Spec] = []


def _define(name: str, kind: Kind, text: str, labels: tuple[str, ...], buckets: tuple[float, ...] = ()) -> Spec:
    SPECS.append(Spec(len(SPECS), name, kind, text, labels, buckets))
    return SPECS[-1]


def _counter(name: str, text: str, *labels: str) -> Spec:
    return _define(PREFIX + name, Kind.COUNTER, text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Spec:
    return _define(PREFIX + name, Kind.HISTOGRAM, text, labels, buckets)


def _sum(name: str, text: str, *labels: str) -> Spec:
    return _define(PREFIX + name, Kind.GAUGE_SUM, text, labels)


def _max(name: str, text: str, *labels: str) -> Spec:
    return _define(PREFIX + name, Kind.GAUGE_MAX, text, labels)


def _gen_ai(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Spec:
    return _define(f"gen_ai_{name}", Kind.HISTOGRAM, text, (*_GEN_AI_LABELS, *labels), buckets)


REQUESTS = _counter(
    "requests", "Requests answered.", "endpoint", "model", "upstream", "status_class", "cache", "stream"
)
DURATION = _histogram(
    "request_duration_seconds", "From the first byte in to the last byte out.", _DURATION_SECONDS,
    "endpoint", "model", "cache",
)  # fmt: skip
OVERHEAD = _histogram(
    "overhead_seconds", "Time in Cairn: all of it less waiting for the upstream.", _OVERHEAD_SECONDS, "endpoint"
)
TTFT = _histogram(
    "time_to_first_token_seconds", "Until the first content, reasoning or tool call.", _TTFT_SECONDS,
    "model", "upstream", "cache",
)  # fmt: skip
INTER_TOKEN = _histogram(
    "inter_token_seconds", "Between streamed chunks after the first token.", _INTER_TOKEN_SECONDS, "model", "upstream"
)
TOKENS = _counter("tokens", "Tokens as the upstreams reported them.", "model", "upstream", "type")
CACHED_UNKNOWN = _counter(
    "cached_unknown_tokens", "Prompt tokens of answers that could not say what was cached; in input_fresh too.",
    "model", "upstream",
)  # fmt: skip
USAGE_MISSING = _counter("usage_missing", "Answers cut before their usage came.", "model", "upstream")
USAGE_INCONSISTENT = _counter("usage_inconsistent", "Usages that were clamped.", "model", "upstream")
ROUTING_GAIN = _counter(
    "routing_gain_tokens", "Cached tokens beyond what round robin over the same replicas would have had.", "model"
)
PREDICTED_CACHED = _counter(
    "predicted_cached_tokens", "Prompt tokens that the index expected to be cached.", "model", "upstream"
)
PREDICTION_ERROR = _histogram(
    "prediction_error_tokens", "Reported less predicted cached tokens.", _ERROR_TOKENS, "model", "upstream"
)
COST = _counter("cost_usd", "What the answers cost.", "model", "upstream")
UNCACHED_COST = _counter("uncached_cost_usd", "What they would have cost with nothing cached.", "model", "upstream")
SAVINGS = _counter("savings_usd", "Input cost avoided by cached tokens.", "model", "upstream")
SURCHARGE = _counter("cache_write_surcharge_usd", "What writing caches cost beyond plain input.", "model", "upstream")
PREFILL_SAVED = _counter(
    "prefill_seconds_saved", "Cached tokens over the replica's learned prefill rate.", "model", "upstream"
)
UNPRICED = _counter("unpriced_requests", "Answers with usage that no rate card prices.", "reason")
ROUTE_DECISIONS = _counter("route_decisions", "Why a replica was chosen.", "reason")
PREFIX_MISS = _counter("prefix_miss", "Why a prompt was not wholly found.", "reason")
INDEX_BLOCKS = _max("index_blocks", "Blocks that the index holds for a replica.", "upstream")
INDEX_BYTES = _sum("index_bytes", "Memory that the index takes, of all workers.")
INDEX_TOKENS = _max("index_tokens", "Tokens that the index holds for a replica.", "upstream")
INDEX_EVICTIONS = _counter("index_evictions", "Blocks evicted from a replica's budget.", "upstream")
CONTEXTS = _max("contexts", "Stored contexts.")
CONTEXTS_BYTES = _max("contexts_bytes", "Bytes of stored contexts.")
CONTEXTS_EVICTED = _counter("contexts_evictions", "Stored contexts dropped.", "reason")
CONTEXTS_DAMAGED = _counter("contexts_damaged", "Stored contexts found damaged when they were read.")
CONTEXT_USES = _counter("context_uses", "Requests that named a stored context.", "result")
CONTEXT_CACHED_TOKENS = _counter(
    "context_cached_tokens", "Cached tokens, as the upstreams reported them, of requests with a stored context."
)
REDIS_DURATION = _histogram("redis_duration_seconds", "Operations on Redis.", _REDIS_SECONDS, "op")
REDIS_ERRORS = _counter("redis_errors", "Failed operations on Redis.", "op", "kind")
REDIS_BREAKER = _max("redis_breaker_state", "0 closed, 1 half open, 2 open.")
JOURNAL_LAG = _max("journal_lag_seconds", "Age of the newest journal entry when it was applied.")
JOURNAL_DROPPED = _counter("journal_dropped", "Journal changes dropped, by reason.", "reason")
UPSTREAM_UP = _max("upstream_up", "1 while a replica takes requests.", "upstream")
UPSTREAM_IN_FLIGHT = _sum("upstream_in_flight", "Requests at a replica.", "upstream")
UPSTREAM_PENDING = _max("upstream_pending_tokens", "Uncached tokens that a replica has yet to prefill.", "upstream")
UPSTREAM_QUEUED = _sum("upstream_queued", "Requests that wait for a place at a replica.", "upstream")
UPSTREAM_BREAKER = _max("upstream_breaker_state", "0 closed, 1 half open, 2 open.", "upstream")
UPSTREAM_RATE = _max("upstream_prefill_tokens_per_second", "Prefill rate, measured or configured.", "upstream")
UPSTREAM_RETRIES = _counter("upstream_retries", "Requests tried again before their first byte.", "upstream", "reason")
STREAM_ABORTS = _counter("stream_aborts", "Streams that did not end as they should.", "side", "phase")
LOOP_LAG = _histogram("event_loop_lag_seconds", "How late the event loop ran a timer.", _LAG_SECONDS)
IN_FLIGHT = _sum("in_flight_requests", "Requests inside Cairn.")
REJECTED = _counter("rejected", "Requests refused by Cairn.", "reason")
LOG_DROPPED = _counter("log_lines_dropped", "Access lines dropped because the log could not keep up.")
WORKERS = _sum("workers", "Workers that are ready.")
WORKER_RESTARTS = _counter("worker_restarts", "Workers that died and were started again.")
RELOADS_FAILED = _counter("config_reload_failures", "Reloads that changed nothing because the file was bad.")
RELOADED_AT = _max("config_last_reload_success_timestamp_seconds", "When the configuration in force was read.")
BUILD = _max("build_info", "Always 1.", "version")
GEN_AI_TTFT = _gen_ai("server_time_to_first_token_seconds", "As cairn_time_to_first_token_seconds.", _TTFT_SECONDS)
GEN_AI_PER_TOKEN = _gen_ai(
    "server_time_per_output_token_seconds",
    "Of one answer: from its first token to its last, by those after the first.",
    _PER_TOKEN_SECONDS,
)  # fmt: skip
GEN_AI_USAGE = _gen_ai(
    "client_token_usage", "Tokens of one answer; cached ones are part of the input.", _USAGE_TOKENS,
    "gen_ai_token_type",
)  # fmt: skip

Labels = tuple[str, ...]

_ZERO: Mapping[Labels, float] = {(): 0.0}
_TYPES = {Kind.COUNTER: "counter", Kind.GAUGE_SUM: "gauge", Kind.GAUGE_MAX: "gauge", Kind.HISTOGRAM: "histogram"}


class Observed(msgspec.Struct, gc=False):
    """A histogram's growth: counts per bucket (one more than bounds) and the sum of the values."""

    counts: list[int]
    total: float = 0.0


class MetricsDelta(msgspec.Struct, gc=False):
    """What a worker counted since its last delta; gauges are whole. Rows are (number in SPECS, labels, value)."""

    counters: list[tuple[int, Labels, float]] = []
    histograms: list[tuple[int, Labels, list[int], float]] = []
    gauges: list[tuple[int, Labels, float]] = []


class Exposition:
    """All workers' figures added up; what a scrape sees. Lives in the supervisor."""

    def __init__(self) -> None:
        self._counters: list[dict[Labels, float]] = [{} for _ in SPECS]
        self._histograms: list[dict[Labels, Observed]] = [{} for _ in SPECS]
        self._gauges: dict[int, list[tuple[int, Labels, float]]] = {}
        self._families = [
            Family(spec.name, _TYPES[spec.kind], spec.help, spec.labels, spec.buckets) for spec in SPECS
        ]

    def apply(self, worker: int, delta: MetricsDelta) -> None:
        """Add what `worker` counted and take its gauges in place of its last ones."""
        for number, labels, value in delta.counters:
            series = self._counters[number]
            series[labels] = series.get(labels, 0) + value
        for number, labels, counts, total in delta.histograms:
            observed = self._histograms[number].setdefault(labels, Observed([0] * len(counts)))
            observed.counts = [old + new for old, new in zip(observed.counts, counts, strict=True)]
            observed.total += total
        self._gauges[worker] = delta.gauges

    def forget(self, worker: int) -> None:
        """Drop the gauges of a worker that is gone; what it counted stays."""
        self._gauges.pop(worker, None)

    def value(self, spec: Spec, labels: Labels | None = None) -> float:
        """The sum of a counter's series, or one of them; for the status page and tests."""
        series = self._counters[spec.number]
        return sum(series.values()) if labels is None else series.get(labels, 0)

    def labels(self, spec: Spec) -> list[Labels]:
        """The series of a counter that there are."""
        return list(self._counters[spec.number])

    def total(self, spec: Spec, label: int, value: str) -> float:
        """The sum of a counter's series whose label at place `label` has `value`."""
        return sum(amount for labels, amount in self._counters[spec.number].items() if labels[label] == value)

    def series(self, spec: Spec) -> Mapping[Labels, float]:
        """The series of a counter, or of a gauge with its workers joined."""
        if spec.kind is Kind.COUNTER:
            return self._counters[spec.number]
        series: dict[Labels, float] = {}
        for number, labels, value in _rows(self._gauges.values()):
            if number == spec.number:
                _join(spec, series, labels, value)
        return series

    def observed(self, spec: Spec) -> Mapping[Labels, Observed]:
        """The series of a histogram."""
        return self._histograms[spec.number]

    def render(self, accept: str) -> tuple[bytes, str]:
        """The page for a scrape that sent `accept`: (body, content type); OpenMetrics where it is asked for."""
        content_type = choose_encoder(accept)[1]
        openmetrics = content_type.startswith("application/openmetrics-text")
        return "".join(self._lines(openmetrics=openmetrics)).encode(), content_type

    def _lines(self, *, openmetrics: bool) -> Iterator[str]:
        gauges = self._joined_gauges()
        for spec, family in zip(SPECS, self._families, strict=True):
            yield family.describe(openmetrics=openmetrics)
            if spec.kind is Kind.HISTOGRAM:
                for labels, observed in self._histograms[spec.number].items():
                    yield from family.histogram(labels, observed.counts, observed.total)
            elif spec.kind is Kind.COUNTER:
                series = self._counters[spec.number]
                # one without labels is there from the start, so that a rate over its first increase is right
                yield from family.values(series if series or spec.labels else _ZERO)
            else:
                yield from family.values(gauges[spec.number])
        if openmetrics:
            yield END

    def _joined_gauges(self) -> list[dict[Labels, float]]:
        joined: list[dict[Labels, float]] = [{} for _ in SPECS]
        for number, labels, value in _rows(self._gauges.values()):
            _join(SPECS[number], joined[number], labels, value)
        return joined


def _join(spec: Spec, series: dict[Labels, float], labels: Labels, value: float) -> None:
    """Add one worker's value to a gauge's series."""
    if spec.kind is Kind.GAUGE_SUM:
        series[labels] = series.get(labels, 0) + value
    else:
        series[labels] = max(series.get(labels, value), value)


def _rows(workers: Iterable[list[tuple[int, Labels, float]]]) -> Iterator[tuple[int, Labels, float]]:
    for rows in workers:
        yield from rows

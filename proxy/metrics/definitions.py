"""Define every metric of Cairn: its name, type, labels, buckets and help text. Pure.

A worker counts in plain dictionaries (`proxy.metrics.recorder`), because updating a metric while a request is handled
must take tenths of a microsecond, and sends what it counted to the supervisor several times a second. There
`proxy.metrics.exposition` adds the workers up and writes the page for a scrape.

Label values come from closed enums and from names that the configuration or an upstream's model list provides, so
that no client can create a series.
"""

from __future__ import annotations

import enum

import msgspec

PREFIX = "cairn_"
GONE = "(gone)"  # in place of the names of replicas that are gone for good; not shown
OTHER = "other"  # label of a model that is neither configured nor listed by an upstream
MODEL_NAMES_AT_MOST = 64

# vLLM's own buckets, so that one panel can show both
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
# OpenTelemetry's conventions for generative AI, with the names that its collector writes for Prometheus. The time to
# the first token uses vLLM's buckets, which include those of the convention.
# https://github.com/open-telemetry/semantic-conventions-genai/blob/main/docs/gen-ai/gen-ai-metrics.md
_GEN_AI_LABELS = ("gen_ai_operation_name", "gen_ai_request_model", "server_address")
_USAGE_TOKENS = tuple(4**power for power in range(14))
_PER_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_ERROR_TOKENS = (-65536, -16384, -4096, -1024, -256, -64, 0, 64, 256, 1024, 4096, 16384, 65536)


class Kind(enum.Enum):
    """Ways of combining values of a metric over time and over workers."""

    COUNTER = "counter"
    GAUGE_SUM = "gauge_sum"  # the values of live workers add up
    GAUGE_MAX = "gauge_max"  # every worker sees the same thing; the largest value counts
    HISTOGRAM = "histogram"


Labels = tuple[str, ...]

_REPLICA_LABELS = ("upstream", "server_address")  # the second is OpenTelemetry's name
_MODEL_LABELS = ("model", "gen_ai_request_model")


class Spec(msgspec.Struct, frozen=True):
    """One metric. `name` is complete except for a counter's `_total`; `number` is the index into SPECS."""

    number: int
    name: str
    kind: Kind
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()

    @property
    def replica_at(self) -> int | None:
        """The position of the label that names a replica, None without one."""
        return next((at for at, label in enumerate(self.labels) if label in _REPLICA_LABELS), None)

    @property
    def model_at(self) -> int | None:
        """The position of the label that names a model, None without one."""
        return next((at for at, label in enumerate(self.labels) if label in _MODEL_LABELS), None)


SPECS: list[Spec] = []


class Observed(msgspec.Struct, gc=False):
    """Growth of a histogram: counts per bucket (one more than there are bounds) and the sum of the values."""

    counts: list[int]
    total: float = 0.0


class MetricsDelta(msgspec.Struct, gc=False):
    """Everything a worker counted since its last delta, and all its gauges.

    Rows are (number in SPECS, labels, value) or, for histograms, (number, labels, counts, sum).
    """

    counters: list[tuple[int, Labels, float]] = []
    histograms: list[tuple[int, Labels, list[int], float]] = []
    gauges: list[tuple[int, Labels, float]] = []
    forgotten: list[str] = []  # replicas that are gone for good


def _define(name: str, kind: Kind, text: str, labels: Labels, buckets: tuple[float, ...] = ()) -> Spec:
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


# fmt: off
REQUESTS = _counter(
    "requests", "Requests that ended, including refused ones.",
    "endpoint", "model", "upstream", "status_class", "cache", "stream",
)
DURATION = _histogram(
    "request_duration_seconds", "Time from the first byte of the request to the last byte of the response.",
    _DURATION_SECONDS, "endpoint", "model", "cache",
)
OVERHEAD = _histogram(
    "overhead_seconds", "Time spent in Cairn before the request is sent, without waiting in the queue.",
    _OVERHEAD_SECONDS, "endpoint",
)
TTFT = _histogram(
    "time_to_first_token_seconds",
    "Time from the first byte of the request to the first content, reasoning or tool call of the response.",
    _TTFT_SECONDS, "model", "upstream", "cache",
)
INTER_TOKEN = _histogram(
    "inter_token_seconds", "Time between streamed chunks after the first token.", _INTER_TOKEN_SECONDS,
    "model", "upstream",
)
TOKENS = _counter("tokens", "Tokens that the upstreams reported.", "model", "upstream", "type")
CACHED_UNKNOWN = _counter(
    "cached_unknown_tokens",
    "Prompt tokens of responses whose cached part is unknown: not reported or ignored. They are input_fresh too.",
    "model", "upstream",
)
USAGE_MISSING = _counter(
    "usage_missing", "Successful responses that ended without reporting their tokens.", "model", "upstream"
)
CACHED_IMPLAUSIBLE = _counter(
    "cached_implausible",
    "Responses whose cached tokens were ignored: impossible counts, entirely new prompts, or no time saved.",
    "upstream",
)
USAGE_INCONSISTENT = _counter(
    "usage_inconsistent", "Responses whose token counts contradicted each other and were corrected.",
    "model", "upstream",
)
ROUTING_GAIN = _counter(
    "routing_gain_tokens", "Cached tokens in excess of what round robin over the same replicas would have had.",
    "model",
)
PREDICTED_CACHED = _counter(
    "predicted_cached_tokens",
    "Prompt tokens that Cairn expected to be cached, of responses that reported how many were.",
    "model",
    "upstream",
)
PREDICTION_ERROR = _histogram(
    "prediction_error_tokens", "Reported minus predicted cached tokens of one response.", _ERROR_TOKENS,
    "model", "upstream",
)
COST = _counter("cost_usd", "Cost of the responses, in USD.", "model", "upstream")
UNCACHED_COST = _counter(
    "uncached_cost_usd", "Cost that the same responses would have had without caching, in USD.", "model", "upstream"
)
SAVINGS = _counter("savings_usd", "Input cost avoided because tokens were cached, in USD.", "model", "upstream")
SURCHARGE = _counter(
    "cache_write_surcharge_usd", "Cost of cache writes in excess of plain input, in USD.", "model", "upstream"
)
PREFILL_SAVED = _counter(
    "prefill_seconds_saved",
    "Prefill time avoided: cached tokens divided by the replica's prefill rate, configured or shown by streams.",
    "model", "upstream",
)
UNPRICED = _counter("unpriced_requests", "Responses with token counts for which no price is known.", "reason")
ROUTE_DECISIONS = _counter("route_decisions", "Routing decisions, by the reason for the chosen replica.", "reason")
PREFIX_MISS = _counter("prefix_miss", "Prompts of which a part was not expected to be cached, by reason.", "reason")
INDEX_BLOCKS = _max("index_blocks", "Prompt blocks that a replica is believed to hold.", "upstream")
INDEX_BYTES = _sum("index_bytes", "Memory used by the prefix index, over all workers.")
INDEX_TOKENS = _max("index_tokens", "Tokens that a replica is believed to hold.", "upstream")
INDEX_EVICTIONS = _counter(
    "index_evictions",
    "Prompt blocks dropped from the prefix index: for lack of room, or because a provider's time to live has passed.",
    "upstream",
)
CONTEXTS = _max("contexts", "Stored contexts.")
CONTEXTS_BYTES = _max("contexts_bytes", "Bytes of stored contexts in Redis.")
CONTEXT_MEMORY_BYTES = _sum(
    "context_memory_bytes", "Memory used by contents of stored contexts, over all workers."
)
CONTEXTS_EVICTED = _counter("contexts_evictions", "Stored contexts that were removed, by reason.", "reason")
CONTEXTS_DAMAGED = _counter("contexts_damaged", "Stored contexts whose content in Redis failed its checksum.")
CONTEXT_USES = _counter("context_uses", "Requests that named a stored context, by result.", "result")
CONTEXT_CACHED_TOKENS = _counter(
    "context_cached_tokens", "Cached tokens that upstreams reported for requests with a stored context."
)
REDIS_DURATION = _histogram("redis_duration_seconds", "Duration of Redis operations.", _REDIS_SECONDS, "op")
REDIS_ERRORS = _counter("redis_errors", "Redis operations that failed.", "op", "kind")
REDIS_BREAKER = _max(
    "redis_breaker_state", "Circuit breaker of Redis: 0 closed (in use), 1 half open (trying), 2 open (not used)."
)
TASK_FAILURES = _counter(
    "background_task_failures", "Background tasks that ended with an exception.", "task"
)
JOURNAL_LAG = _max(
    "journal_lag_seconds", "Age of the newest shared routing update when this proxy applied it."
)
JOURNAL_DROPPED = _counter("journal_dropped", "Shared routing updates that were discarded, by reason.", "reason")
REDIS_DROPPED = _counter(
    "redis_dropped",
    "Values that were discarded because they were damaged in Redis, or because too many waited for Redis, by kind.",
    "what",
)
UPSTREAM_UP = _max("upstream_up", "1 if the replica takes requests, else 0.", "upstream")
POOL_REPLICAS_UP = _max(
    "pool_replicas_up", "Replicas of a pool that take requests; optional pools may have none.", "pool", "optional"
)
UPSTREAM_IN_FLIGHT = _sum("upstream_in_flight", "Requests sent to a replica and not yet finished.", "upstream")
UPSTREAM_PENDING = _max(
    "upstream_pending_tokens", "Uncached prompt tokens that a replica has yet to process.", "upstream"
)
UPSTREAM_QUEUED = _sum("upstream_queued", "Requests waiting in Cairn for a free place at a replica.", "upstream")
COLD_WAITING = _sum(
    "cold_turns_waiting",
    "Prompts that wait in Cairn until a replica is quiet, by priority and configured client; others are `other`.",
    "priority", "client",
)
COLD_ADMITTED = _counter("cold_turns_admitted", "Prompts that were sent after such a wait.")
COLD_REFUSED = _counter("cold_turns_refused", "Prompts that were refused because such a wait would be too long.")
WARM_WAITING = _sum(
    "warm_turns_waiting",
    "Prompts that wait in Cairn for a busy replica that holds them, by priority and configured client; others are "
    "`other`.",
    "priority", "client",
)
THRASH_AVOIDED = _counter(
    "thrash_avoided_tokens",
    "Cached tokens that round robin would have computed again, while sessions needed more cache than there is.",
)
CACHE_NEED = _max("cache_need_ratio", "Memory that the active sessions need, divided by that of the caches.", "pool")
MIXED_TEMPLATES = _max(
    "mixed_template_models",
    "Models whose prompts the engines of a pool render differently, so that less of them is shared.",
    "pool",
)
UPSTREAM_BREAKER = _max(
    "upstream_breaker_state", "Circuit breaker of a replica: 0 closed (in use), 1 half open (trying), 2 open.",
    "upstream",
)
UPSTREAM_RATE = _max(
    "upstream_prefill_tokens_per_second", "Prefill rate of a replica, measured or configured.", "upstream"
)
UPSTREAM_RETRIES = _counter(
    "upstream_retries", "Requests sent again because a replica failed before the client got any of its response.",
    "upstream", "reason",
)
HIDDEN_ERRORS = _counter(
    "upstream_hidden_errors",
    "Responses with a successful status that were an error, an HTML page, empty, or a stream with an error.",
    "upstream", "kind",
)
STREAM_ABORTS = _counter("stream_aborts", "Responses that were cut off.", "side", "phase")
LOOP_LAG = _histogram("event_loop_lag_seconds", "Delay of a timer in a worker's event loop.", _LAG_SECONDS)
IN_FLIGHT = _sum("in_flight_requests", "Requests inside Cairn.")
CLIENT_CONNECTIONS = _sum("client_connections", "Open connections of clients.")
CLIENT_HEAD_BYTES = _sum("client_head_bytes", "Bytes of unfinished request heads, and of pipelined requests.")
CLIENT_BODY_BYTES = _sum("client_body_bytes", "Bytes of request bodies that have arrived and are held.")
CLIENT_REFUSED = _counter("client_refused", "Connections and requests refused at a limit of the port.", "limit")
CLIENT_ERRORS = _counter("client_errors", "Input from clients that was not valid HTTP or came too slowly.", "reason")
ERRORS = _counter(
    "request_errors", "Requests that failed or were refused, by reason; clients that left are not included.", "reason"
)
REJECTED = _counter("rejected", "Requests that Cairn refused, by reason.", "reason")
LOG_DROPPED = _counter("log_lines_dropped", "Access log lines lost because they could not be written fast enough.")
WORKERS = _sum("workers", "Worker processes that are ready.")
WORKER_RESTARTS = _counter("worker_restarts", "Worker processes that ended unexpectedly and were replaced.")
RELOADS_FAILED = _counter("config_reload_failures", "Configuration reloads that failed and changed nothing.")
RELOAD_SUCCEEDED = _max("config_last_reload_successful", "1 if the last configuration reload succeeded, else 0.")
RELOADED_AT = _max(
    "config_last_reload_success_timestamp_seconds", "Unix time at which the configuration in use was read."
)
BUILD = _max("build_info", "Always 1; the label is Cairn's version.", "version")
GEN_AI_TTFT = _gen_ai(
    "server_time_to_first_token_seconds", "The same as cairn_time_to_first_token_seconds.", _TTFT_SECONDS
)
GEN_AI_PER_TOKEN = _gen_ai(
    "server_time_per_output_token_seconds",
    "Mean time per output token after the first, of one response.",
    _PER_TOKEN_SECONDS,
)
GEN_AI_USAGE = _gen_ai(
    "client_token_usage", "Tokens of one response; cached ones are part of the input.", _USAGE_TOKENS,
    "gen_ai_token_type",
)
# fmt: on

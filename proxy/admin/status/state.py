"""The state of the status page at one moment. Data types only."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from proxy.admin.status.history import Sample
from proxy.control.messages import ContextReport
from proxy.control.prefix_rows import Miss

TODAY = "today"
WEEK = "7 days"
SINCE_START = "since start"


class Saved(msgspec.Struct, frozen=True):
    """The savings of one period. `usd` is the saving minus the surcharge, so it may be negative.

    `unknown_tokens` are those prompt tokens that the upstreams reported neither as cached nor as computed.
    """

    usd: float = 0.0
    surcharge_usd: float = 0.0
    uncached_cost_usd: float = 0.0
    prefill_seconds: float = 0.0
    prompt_tokens: float = 0
    cached_tokens: float = 0
    unknown_tokens: float = 0


class Distribution(msgspec.Struct, frozen=True):
    """Times to the first token of one cache status; there is one more count than there are bounds."""

    cache: str
    count: int
    p50_seconds: float | None
    p95_seconds: float | None
    counts: list[int]


class ReplicaRow(msgspec.Struct, frozen=True):
    """One replica."""

    name: str
    up: bool
    down_since_unix_seconds: float | None
    why: str
    breaker: str
    in_flight: int
    queued: int
    pending_tokens: int  # uncached prompt tokens of requests whose response has not begun
    resident_tokens: int
    budget_tokens: int | None
    prompt_tokens: int
    cached_tokens: int
    unknown_tokens: int  # prompt tokens that were reported neither as cached nor as computed
    predicted_tokens: int
    prefill_tokens_per_second: float


class ShownPrefix(msgspec.Struct, frozen=True):
    """One prefix; `number` is only its position in the list."""

    number: int
    model: str
    tokens: int
    hits: int
    saved_tokens: int
    used_unix_seconds: float


class ErrorShown(msgspec.Struct, frozen=True):
    """Errors of the last hour with the same client, model and reason."""

    client: str
    model: str
    reason: str
    count: int
    last_unix_seconds: float


class RedisView(msgspec.Struct, frozen=True):
    """The state of Redis as the workers see it, and the duration of its operations."""

    state: str
    breaker: str
    operations: int
    errors: int
    p50_seconds: float | None
    p95_seconds: float | None


class SharingView(msgspec.Struct, frozen=True):
    """The sharing of routing knowledge between proxies, over all workers."""

    states: dict[str, int]  # number of workers by state
    others: int
    holds_lease: bool
    lag_seconds: float
    written: int
    read: int
    rebuilds: int
    dropped: dict[str, int]


class State(msgspec.Struct, frozen=True):
    """Everything on the page at one moment."""

    now_unix_seconds: float
    started_unix_seconds: float
    version: str
    status: str
    reasons: list[str]
    notices: list[str]
    workers: int
    in_flight: int
    requests: int
    requests_per_second: float
    waiting: int
    errors: dict[str, int]  # since the start, by reason
    recent_errors: list[ErrorShown]  # of the last hour
    base_url: str
    example_model: str
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
    sharing: SharingView
    contexts: int
    contexts_bytes: int
    stored: list[ContextReport]
    sample: Sample | None


class Moment(msgspec.Struct, frozen=True):
    """Inputs that the counters do not contain: the time, and what the caller keeps."""

    now_unix_seconds: float
    started_unix_seconds: float
    version: str
    requests_per_second: float = 0.0
    sample: Sample | None = None
    base_url: str = ""
    example_model: str = "MODEL"
    periods: Mapping[str, Saved] = {}  # TODAY and WEEK, from the totals in Redis, if they are known

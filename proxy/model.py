"""What the phases of a request hand each other: frozen structs and closed enums, nothing that does I/O.

They are `msgspec.Struct` and not dataclasses: a frozen one of ten fields is made in a quarter of a microsecond
instead of 1.5, and several are made for every request.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import TypeAlias

import msgspec

Body: TypeAlias = bytes | bytearray
"""A request's body, which nobody writes to once it is read: a long one was filled in place."""


class Endpoint(enum.StrEnum):
    """What a path asks for; the value is the metric label."""

    CHAT = "chat_completions"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    MODELS = "models"
    CACHING = "caching"
    INFERENCE = "inference"  # another path that runs a model: images, speech, rerank, score, ...
    OTHER = "other"

    is_generation: bool
    """True if a prompt is prefilled, so that prefixes matter."""

    runs_model: bool
    """True if the request runs a model and creates nothing, so that it may be sent a second time."""

    def __init__(self, label: str) -> None:
        self.is_generation = label in ("chat_completions", "completions", "responses", "messages")
        self.runs_model = self.is_generation or label in ("embeddings", "inference")


class Access(enum.Enum):
    """Who may use a path at a replica whose key is not the client's own."""

    INFERENCE = "inference"  # every client, for the models it may use
    CREATE = "create"  # every client; what it creates is its own
    OBJECT = "object"  # the client that created the object
    LIST = "list"  # nobody: the list shows what all clients created
    ADMINISTRATION = "administration"  # nobody
    CONFIGURED = "configured"  # every client: the configuration allows the path


class CacheStatus(enum.StrEnum):
    """How much of the prompt the chosen replica was predicted to hold; in the metric label and `Cache-Status`."""

    HIT = "hit"  # all but the last block
    PARTIAL = "partial"
    MISS = "miss"
    BYPASS = "bypass"  # no prefix to speak of: not a generation, or under the size worth sharing


class MissReason(enum.StrEnum):
    """Why a prompt was not wholly found."""

    NONE = "none"
    COLD = "cold"  # no replica holds any of it
    CHANGED = "changed"  # a prefix is known, then it differs
    EVICTED = "evicted"
    ELSEWHERE = "elsewhere"  # another replica holds more, its queue cost more
    DOWN = "down"  # the holder is unreachable or draining
    SHORT = "short"  # under the size worth sharing


class RouteReason(enum.StrEnum):
    """Why this replica; in `x-cairn-reason`, the log and the metric."""

    WARM = "warm"  # it holds the longest prefix and costs least
    SPREAD = "spread"  # another holds more, but waiting there costs more than computing here
    COLD = "cold"  # none holds any: least cost, then rendezvous
    SHORT = "short"  # nothing worth sharing: least work
    PINNED = "pinned"  # the object it names lives there
    ONLY = "only"  # one replica to choose from
    RETRY = "retry"  # an earlier choice failed before its first byte


class Ending(enum.StrEnum):
    """How a request ended, on every path."""

    COMPLETE = "complete"
    UPSTREAM_STATUS = "upstream_status"  # answered with an error status, relayed
    CLIENT_LEFT = "client_left"
    UPSTREAM_FAILED = "upstream_failed"  # before the answer; the client got an error
    UPSTREAM_BROKE = "upstream_broke"  # inside the answer; the client saw it break
    TRUNCATED = "truncated"  # ended cleanly without the end that its format has
    REFUSED = "refused"  # by Cairn: bad request, limits, no replica
    INTERNAL = "internal"


class Tenant(msgspec.Struct, frozen=True, gc=False):
    """Who asks. `id` keys stored things and never leaves the process; `salt` goes first into every prefix chain.

    `name` is for the operator's totals: as configured, else the beginning of the keyed hash.
    """

    id: str
    salt: bytes = b""
    models: tuple[str, ...] = ("*",)
    name: str = ""
    is_listed: bool = False  # by the configuration; the key of any other tenant is checked by upstreams alone

    @property
    def is_limited(self) -> bool:
        """True if the client may use only some models."""
        return "*" not in self.models


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens of one response in normal form; cached and written tokens are part of `prompt_tokens`.

    `cached_tokens` is None if the upstream did not report them. `inconsistent` means that values were clamped.
    `prefill_seconds` is None except for engines that report it. `service_tier` is the tier that was used, if it has
    prices of its own (flex, priority, batch). If the response took several model calls, the counts are their sums and
    `longest_call_tokens` is the prompt of the longest.
    """

    prompt_tokens: int
    output_tokens: int = 0
    cached_tokens: int | None = None
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    inconsistent: bool = False
    prefill_seconds: float | None = None
    service_tier: str = ""
    longest_call_tokens: int = 0


class Media(msgspec.Struct, frozen=True, gc=False):
    """A picture, sound or file inside the prompt: hashed as bytes, counted in tokens by its kind."""

    kind: str  # "image", "audio", "file"
    size_bytes: int


class UsageRequest(enum.Enum):
    """What a body says about usage on its stream, hence which splice would ask for it."""

    ASKED = "asked"  # include_usage true: nothing to do, nothing withheld
    ABSENT = "absent"  # no stream_options: insert the member
    REPLACE = "replace"  # null, {} or include_usage false: replace the value at `stream_options_span`
    NOT_APPLICABLE = "not_applicable"  # no stream, or a dialect that always reports


class Prompt(msgspec.Struct, frozen=True):
    """A generation request as read: small values decoded, long content left as spans of the body.

    `chain_salt` are the raw bytes that precede the prompt in the key (model, adapter, template arguments).
    `spans` are zero-copy views in the order in which an engine renders them: tools, then each message (or the
    prompt, or instructions and input items). A boundary stands at the end of each.
    """

    body: Body
    model: str
    stream: bool
    chain_salt: tuple[bytes, ...]
    spans: tuple[memoryview | bytes, ...]
    size_bytes: int  # of all spans, and of the stored context that goes before them
    usage_request: UsageRequest = UsageRequest.NOT_APPLICABLE
    stream_options_span: tuple[int, int] = (0, 0)
    pinned_to: str | None = None  # previous_response_id, or the first file id
    media: tuple[Media, ...] = ()
    max_output_tokens: int | None = None
    may_name_context: bool = False  # a short message contains "cache", perhaps as its role
    referring: tuple[memoryview, ...] = ()  # members, beside messages and input, that may name stored objects
    has_hidden_parts: bool = False  # the upstream adds a stored prompt or search results
    skips_cache: bool = False  # the request asks for what only a prompt computed anew can give


class Call(msgspec.Struct, frozen=True):
    """An admitted request, free of the web framework. Header names are lower-case."""

    request_id: str
    tenant: Tenant
    endpoint: Endpoint
    method: str
    target: str  # path and query as the client sent them
    headers: tuple[tuple[bytes, bytes], ...]
    body: Body
    received_seconds: float  # monotonic: the head was here
    read_seconds: float  # the body was all here
    access: Access = Access.INFERENCE
    path_model: str | None = None  # the model that the path names
    object_id: str | None = None  # the object that the path names
    encoded_body: Body | None = None  # the body as it was sent, if that was compressed


class Edit(msgspec.Struct, frozen=True, gc=False):
    """Replace body[start:end] by `insert`: the only way in which a body is changed."""

    start: int
    end: int
    insert: bytes | memoryview


class ReplicaView(msgspec.Struct, frozen=True, gc=False):
    """A replica as the plan sees it: one frozen row of the fleet's snapshot.

    `pending_tokens` are uncached tokens charged and not yet released, here and at the other proxies, less what the
    running head must have done by now. `lateness_seconds` is how far its oldest unanswered request is past its
    predicted first token. `in_flight` leaves out what waits at the cold gate: it is not there yet. Not `available`
    means that the breaker is open or that it drains; one that drains still serves what is pinned to it.
    """

    id: int  # dense number within the process, the index's replica number
    name: str
    available: bool
    rate_tokens_per_second: float
    pending_tokens: float
    in_flight: int
    in_flight_limit: int | None
    lateness_seconds: float
    in_flight_seconds: float  # c of the cost rule: the price of one more in flight
    queued: int = 0
    draining: bool = False  # reachable, but to be given no new prefix
    retry_after_seconds: float = 0.0  # where unavailable: until it is tried again
    running_tokens: float = 0.0  # prompts of all that is in flight there, which its cache must hold


class Demand(msgspec.Struct, frozen=True, gc=False):
    """What the plan needs to know of a prompt.

    `prompt_tokens` is the prediction for the whole of it. `tie_hash` is the chained hash of the first block that no
    replica holds (or of the last block), so that proxies which know nothing of each other break ties alike.
    `last_block_bytes` is the size of the last block: all but that is a hit.
    """

    size_bytes: int
    prompt_tokens: float
    tie_hash: int = 0
    last_block_bytes: int = 0
    pinned_replica: int | None = None


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One replica with what this prompt would cost there."""

    replica: ReplicaView
    matched_bytes: int
    matched_tokens: float
    uncached_tokens: float
    cost_seconds: float


class Plan(msgspec.Struct, frozen=True):
    """Replicas in the order to try, cheapest first, with why, and what to change in the body."""

    candidates: tuple[Candidate, ...]
    reason: RouteReason
    miss: MissReason
    cache: CacheStatus
    prompt_tokens: float  # predicted
    edits: tuple[Edit, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """The first to try."""
        return self.candidates[0]


class Times(msgspec.Struct, frozen=True, gc=False):
    """Monotonic stamps of one request; None where it never came so far."""

    received_seconds: float
    read_seconds: float = 0.0  # the body was all here
    sent_seconds: float | None = None  # request written to the upstream that answered
    first_byte_seconds: float | None = None
    first_token_seconds: float | None = None
    ended_seconds: float = 0.0
    waited_seconds: float = 0.0  # in the queue and at the cold gate, part of the time before `sent_seconds`


class Outcome(msgspec.Struct, frozen=True):
    """What became of a request; exactly one on every path. The only thing that settlement sees."""

    call_id: str
    endpoint: Endpoint
    model: str | None
    stream: bool
    ending: Ending
    status: int
    times: Times
    replica: ReplicaView | None = None
    plan: Plan | None = None
    usage: Usage | None = None
    retries: int = 0
    response_bytes: int = 0
    request_bytes: int = 0
    tenant_id: str = ""
    tenant_name: str = ""
    error_code: str | None = None
    inter_token_counts: tuple[int, ...] = ()  # gaps after the first token, sorted into the metric's buckets
    inter_token_seconds: float = 0.0  # their sum


class AccessLine(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One request as it is written; what is unknown is left out. Times are seconds, `time` is when it ended.

    Enums stay enums: reading their `value` costs more than encoding them.
    """

    time: datetime
    request_id: str
    endpoint: Endpoint
    status: int
    ending: Ending
    duration: float
    model: str | None = None
    stream: bool = False
    replica: str | None = None
    cache: CacheStatus | None = None
    reason: RouteReason | None = None
    miss: MissReason | None = None
    error: str | None = None
    ttft: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    matched_bytes: int = 0
    predicted_tokens: int | None = None
    retries: int = 0
    request_bytes: int = 0
    answer_bytes: int = 0

"""Records that the phases of a request exchange. Pure.

They are dataclasses with their own constructors, and not structs: compiled code constructs its own classes and reads
their attributes without a look-up, of which a request needs hundreds. `Final` makes them read-only for the type
checker; a frozen dataclass would take twenty times as long to construct. None of them is part of a cycle, so they are
exempt from Python's garbage collector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mypy_extensions import mypyc_attr

from proxy.model import Access, Body, CacheStatus, Ending, Endpoint, MissReason, RouteReason, UsageRequest


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Tenant:
    """The tenant of a request. `id` is a keyed hash, the key of what it stores; it never leaves the process.

    `salt` is the first input of its prefix hashes. `name` is for the operator: as configured, else the beginning of
    the hash. `client` is the name of the configured client, empty if clients are not configured.
    """

    id: Final[str]
    salt: Final[bytes]
    models: Final[tuple[str, ...]]
    name: Final[str]
    is_listed: Final[bool]  # in the configuration; the keys of other tenants are checked by upstreams only
    client: Final[str]
    sees_all: Final[bool]  # it may see that prefixes are cached which other tenants sent
    weight: Final[float]  # of its share while requests of several tenants wait
    highest_priority: Final[int]  # best priority that it may ask for: 0 high, 1 normal, 2 low

    def __init__(  # noqa: PLR0913 - one for each field
        self,
        id: str,
        salt: bytes = b"",
        models: tuple[str, ...] = ("*",),
        name: str = "",
        is_listed: bool = False,
        client: str = "",
        sees_all: bool = True,
        weight: float = 1.0,
        highest_priority: int = 1,
    ) -> None:
        self.id = id
        self.salt = salt
        self.models = models
        self.name = name
        self.is_listed = is_listed
        self.client = client
        self.sees_all = sees_all
        self.weight = weight
        self.highest_priority = highest_priority

    @property
    def is_limited(self) -> bool:
        """True if the client may use only some models."""
        return "*" not in self.models


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class KindTokens:
    """Tokens of one kind that are not text, parts of a response's counts: of its prompt, of what was cached of that,
    and of its output."""

    prompt: Final[int]
    cached: Final[int]
    output: Final[int]

    def __init__(self, prompt: int, cached: int = 0, output: int = 0) -> None:
        self.prompt = prompt
        self.cached = cached
        self.output = output


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Usage:
    """Tokens of one response in normal form; cached and written tokens are part of `prompt_tokens`.

    `cached_tokens` is None if the upstream did not report them. `inconsistent` means that values were clamped.
    `prefill_seconds` is None except for engines that report it. `service_tier` is the tier that was used, if it has
    separate prices (flex, priority, batch). `audio` and `images` are None if there are no such tokens. If the
    response took several model calls, the counts are their sums and `longest_call_tokens` is the longest prompt.
    """

    prompt_tokens: Final[int]
    output_tokens: Final[int]
    cached_tokens: Final[int | None]
    cache_write_5m_tokens: Final[int]
    cache_write_1h_tokens: Final[int]
    reasoning_tokens: Final[int]
    inconsistent: Final[bool]
    prefill_seconds: Final[float | None]
    service_tier: Final[str]
    longest_call_tokens: Final[int]
    audio: Final[KindTokens | None]
    images: Final[KindTokens | None]

    def __init__(  # noqa: PLR0913 - one for each field
        self,
        prompt_tokens: int,
        output_tokens: int = 0,
        cached_tokens: int | None = None,
        cache_write_5m_tokens: int = 0,
        cache_write_1h_tokens: int = 0,
        reasoning_tokens: int = 0,
        inconsistent: bool = False,
        prefill_seconds: float | None = None,
        service_tier: str = "",
        longest_call_tokens: int = 0,
        audio: KindTokens | None = None,
        images: KindTokens | None = None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.cached_tokens = cached_tokens
        self.cache_write_5m_tokens = cache_write_5m_tokens
        self.cache_write_1h_tokens = cache_write_1h_tokens
        self.reasoning_tokens = reasoning_tokens
        self.inconsistent = inconsistent
        self.prefill_seconds = prefill_seconds
        self.service_tier = service_tier
        self.longest_call_tokens = longest_call_tokens
        self.audio = audio
        self.images = images


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Media:
    """An image, sound or file in the prompt: hashed as bytes, counted in tokens by its kind."""

    kind: Final[str]  # "image", "audio", "file"
    size_bytes: Final[int]
    start: Final[int]  # offset in the body; -1 if it is in a stored context

    def __init__(
        self,
        kind: str,
        size_bytes: int,
        start: int = -1,
    ) -> None:
        self.kind = kind
        self.size_bytes = size_bytes
        self.start = start


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Prompt:
    """A generation request as read: small values are decoded, long content stays a span of the body.

    `chain_salt` are the raw bytes that precede the prompt in the key (model, adapter, template arguments).
    `spans` are zero-copy views in the order in which an engine renders them: tools, then each message (or the
    prompt, or instructions and input items). Each of them ends with a boundary.
    """

    body: Final[Body]
    model: Final[str]
    stream: Final[bool]
    chain_salt: Final[tuple[bytes, ...]]
    spans: Final[tuple[memoryview | bytes, ...]]
    size_bytes: Final[int]  # of all spans and of the stored context before them
    usage_request: Final[UsageRequest]
    stream_options_span: Final[tuple[int, int]]
    pinned_to: Final[str | None]  # previous_response_id, or the first file id
    media: Final[tuple[Media, ...]]
    max_output_tokens: Final[int | None]
    may_name_context: Final[bool]  # a short message contains "cache", perhaps as its role
    referring: Final[tuple[memoryview, ...]]  # members besides messages and input that may name stored objects
    names: Final[tuple[tuple[str, str], ...]]  # what it continues and the container: (collection, id)
    is_stored: Final[bool]  # the upstream keeps the completion as an object
    has_effects: Final[bool]  # what happens beyond its answer must not happen twice
    has_hidden_parts: Final[bool]  # the upstream adds a stored prompt or search results
    skips_cache: Final[bool]  # the request needs a prompt that is computed anew
    cache_key: Final[bytes]  # `prompt_cache_key`, as raw JSON
    priority: Final[int | None]  # asked for in the body, see `proxy.wire.urgency`
    tool_spans: Final[int]  # number of `spans` that are tools; they come first
    system_spans: Final[int]  # number of spans after the tools that are the system prompt; -1: by the messages' roles
    is_anthropic: Final[bool]  # in the dialect of /v1/messages
    is_plain_text: Final[bool]  # all spans but tools are messages whose content is a string; False if not examined
    cache_marks: Final[int]  # most members `cache_control` that the body may have

    def __init__(  # noqa: PLR0913 - one for each field
        self,
        body: Body,
        model: str,
        stream: bool,
        chain_salt: tuple[bytes, ...],
        spans: tuple[memoryview | bytes, ...],
        size_bytes: int,
        usage_request: UsageRequest = UsageRequest.NOT_APPLICABLE,
        stream_options_span: tuple[int, int] = (0, 0),
        pinned_to: str | None = None,
        media: tuple[Media, ...] = (),
        max_output_tokens: int | None = None,
        may_name_context: bool = False,
        referring: tuple[memoryview, ...] = (),
        names: tuple[tuple[str, str], ...] = (),
        is_stored: bool = False,
        has_effects: bool = False,
        has_hidden_parts: bool = False,
        skips_cache: bool = False,
        cache_key: bytes = b"",
        priority: int | None = None,
        tool_spans: int = 0,
        system_spans: int = -1,
        is_anthropic: bool = False,
        is_plain_text: bool = False,
        cache_marks: int = 0,
    ) -> None:
        self.body = body
        self.model = model
        self.stream = stream
        self.chain_salt = chain_salt
        self.spans = spans
        self.size_bytes = size_bytes
        self.usage_request = usage_request
        self.stream_options_span = stream_options_span
        self.pinned_to = pinned_to
        self.media = media
        self.max_output_tokens = max_output_tokens
        self.may_name_context = may_name_context
        self.referring = referring
        self.names = names
        self.is_stored = is_stored
        self.has_effects = has_effects
        self.has_hidden_parts = has_hidden_parts
        self.skips_cache = skips_cache
        self.cache_key = cache_key
        self.priority = priority
        self.tool_spans = tool_spans
        self.system_spans = system_spans
        self.is_anthropic = is_anthropic
        self.is_plain_text = is_plain_text
        self.cache_marks = cache_marks


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Call:
    """An admitted request. Header names are lower-case. `peer` is the address from which the client connected."""

    request_id: Final[str]
    tenant: Final[Tenant]
    endpoint: Final[Endpoint]
    method: Final[str]
    target: Final[str]  # path and query as the client sent them
    headers: Final[tuple[tuple[bytes, bytes], ...]]
    body: Final[Body]
    received_seconds: Final[float]  # monotonic time at which the head had arrived
    read_seconds: Final[float]  # the whole body had arrived
    peer: Final[str]
    access: Final[Access]
    path_model: Final[str | None]  # the model that the path names
    object_id: Final[str | None]  # the object that the path names
    encoded_body: Final[Body | None]  # the body as it was sent, if that was compressed
    may_have_effects: Final[bool]  # its path is an engine's own, of which it is not known that it only computes

    def __init__(  # noqa: PLR0913 - one for each field
        self,
        request_id: str,
        tenant: Tenant,
        endpoint: Endpoint,
        method: str,
        target: str,
        headers: tuple[tuple[bytes, bytes], ...],
        body: Body,
        received_seconds: float,
        read_seconds: float,
        peer: str = "",
        access: Access = Access.INFERENCE,
        path_model: str | None = None,
        object_id: str | None = None,
        encoded_body: Body | None = None,
        may_have_effects: bool = False,
    ) -> None:
        self.request_id = request_id
        self.tenant = tenant
        self.endpoint = endpoint
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body
        self.received_seconds = received_seconds
        self.read_seconds = read_seconds
        self.peer = peer
        self.access = access
        self.path_model = path_model
        self.object_id = object_id
        self.encoded_body = encoded_body
        self.may_have_effects = may_have_effects


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class ReplicaView:
    """A replica as the plan sees it: one row of the fleet's snapshot.

    `pending_tokens` are the uncached tokens of requests here and at the other proxies that the replica has not
    processed yet, as far as can be estimated. `lateness_seconds` is how long its oldest unanswered request is overdue
    for its first token. `in_flight` excludes requests that wait for another one with the same prefix. A replica
    that is not `available` gets no request for now, and `unavailable_because` names the reason.
    """

    id: Final[int]  # dense number within the process, the index's replica number
    name: Final[str]
    available: Final[bool]
    rate_tokens_per_second: Final[float]
    pending_tokens: Final[float]
    in_flight: Final[int]
    in_flight_limit: Final[int | None]
    lateness_seconds: Final[float]
    in_flight_seconds: Final[float]  # `c` of the cost rule: the cost of one more request in flight
    queued: Final[int]
    retry_after_seconds: Final[float]  # if unavailable: the time until it is tried again
    unavailable_because: Final[str]
    running_tokens: Final[float]  # prompts of all requests in flight there, which its cache must hold
    is_far: Final[bool]  # known to be in another zone than this Cairn

    def __init__(  # noqa: PLR0913 - one for each field
        self,
        id: int,
        name: str,
        available: bool,
        rate_tokens_per_second: float,
        pending_tokens: float,
        in_flight: int,
        in_flight_limit: int | None,
        lateness_seconds: float,
        in_flight_seconds: float,
        queued: int = 0,
        retry_after_seconds: float = 0.0,
        unavailable_because: str = "",
        running_tokens: float = 0.0,
        is_far: bool = False,
    ) -> None:
        self.id = id
        self.name = name
        self.available = available
        self.rate_tokens_per_second = rate_tokens_per_second
        self.pending_tokens = pending_tokens
        self.in_flight = in_flight
        self.in_flight_limit = in_flight_limit
        self.lateness_seconds = lateness_seconds
        self.in_flight_seconds = in_flight_seconds
        self.queued = queued
        self.retry_after_seconds = retry_after_seconds
        self.unavailable_because = unavailable_because
        self.running_tokens = running_tokens
        self.is_far = is_far


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Demand:
    """Properties of a prompt that the plan depends on.

    `prompt_tokens` is predicted. `tie_hash` is the chained hash of the first block that no replica has (or of the
    last block), so that independent proxies break ties alike. A match of everything except the last block, of
    `last_block_bytes` bytes, counts as a hit.
    """

    size_bytes: Final[int]
    prompt_tokens: Final[float]
    tie_hash: Final[int]
    last_block_bytes: Final[int]
    pinned_replica: Final[int | None]
    prior_replica: Final[int | None]  # where the client's session was served last

    def __init__(
        self,
        size_bytes: int,
        prompt_tokens: float,
        tie_hash: int = 0,
        last_block_bytes: int = 0,
        pinned_replica: int | None = None,
        prior_replica: int | None = None,
    ) -> None:
        self.size_bytes = size_bytes
        self.prompt_tokens = prompt_tokens
        self.tie_hash = tie_hash
        self.last_block_bytes = last_block_bytes
        self.pinned_replica = pinned_replica
        self.prior_replica = prior_replica


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Candidate:
    """One replica, and what this prompt would cost there."""

    replica: Final[ReplicaView]
    matched_bytes: Final[int]
    matched_tokens: Final[float]
    uncached_tokens: Final[float]
    cost_seconds: Final[float]

    def __init__(
        self,
        replica: ReplicaView,
        matched_bytes: int,
        matched_tokens: float,
        uncached_tokens: float,
        cost_seconds: float,
    ) -> None:
        self.replica = replica
        self.matched_bytes = matched_bytes
        self.matched_tokens = matched_tokens
        self.uncached_tokens = uncached_tokens
        self.cost_seconds = cost_seconds


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Plan:
    """Replicas in the order in which to try them, cheapest first, and the reason for it."""

    candidates: Final[tuple[Candidate, ...]]
    reason: Final[RouteReason]
    miss: Final[MissReason]
    cache: Final[CacheStatus]
    prompt_tokens: Final[float]  # predicted

    def __init__(
        self,
        candidates: tuple[Candidate, ...],
        reason: RouteReason,
        miss: MissReason,
        cache: CacheStatus,
        prompt_tokens: float,
    ) -> None:
        self.candidates = candidates
        self.reason = reason
        self.miss = miss
        self.cache = cache
        self.prompt_tokens = prompt_tokens

    @property
    def chosen(self) -> Candidate:
        """The first replica to try."""
        return self.candidates[0]


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Times:
    """Monotonic times of one request; None for a step that it did not reach."""

    received_seconds: Final[float]
    read_seconds: Final[float]  # the whole body had arrived
    sent_seconds: Final[float | None]  # sent to the upstream that answered
    first_byte_seconds: Final[float | None]
    first_token_seconds: Final[float | None]
    ended_seconds: Final[float]
    waited_seconds: Final[float]  # in the queue and for a leader, before `sent_seconds`

    def __init__(
        self,
        received_seconds: float,
        read_seconds: float = 0.0,
        sent_seconds: float | None = None,
        first_byte_seconds: float | None = None,
        first_token_seconds: float | None = None,
        ended_seconds: float = 0.0,
        waited_seconds: float = 0.0,
    ) -> None:
        self.received_seconds = received_seconds
        self.read_seconds = read_seconds
        self.sent_seconds = sent_seconds
        self.first_byte_seconds = first_byte_seconds
        self.first_token_seconds = first_token_seconds
        self.ended_seconds = ended_seconds
        self.waited_seconds = waited_seconds


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Outcome:
    """The result of a request; every path produces exactly one."""

    call_id: Final[str]
    endpoint: Final[Endpoint]
    model: Final[str | None]
    stream: Final[bool]
    ending: Final[Ending]
    status: Final[int]
    times: Final[Times]
    replica: Final[ReplicaView | None]
    plan: Final[Plan | None]
    usage: Final[Usage | None]
    retries: Final[int]
    response_bytes: Final[int]
    request_bytes: Final[int]
    tenant_id: Final[str]
    tenant_name: Final[str]
    error_code: Final[str | None]
    inter_token_counts: Final[tuple[int, ...]]  # gaps after the first token, per bucket of the metric
    inter_token_seconds: Final[float]  # their sum
    tried: Final[tuple[str, ...]]  # replicas that failed before the last one, each with the reason: "name;503"
    head_sent_early: Final[bool]  # the client was sent 200 and comments before any replica had responded
    is_background: Final[bool]  # computed after this response, which therefore has no usage

    def __init__(  # noqa: PLR0913 - one for each field
        self,
        call_id: str,
        endpoint: Endpoint,
        model: str | None,
        stream: bool,
        ending: Ending,
        status: int,
        times: Times,
        replica: ReplicaView | None = None,
        plan: Plan | None = None,
        usage: Usage | None = None,
        retries: int = 0,
        response_bytes: int = 0,
        request_bytes: int = 0,
        tenant_id: str = "",
        tenant_name: str = "",
        error_code: str | None = None,
        inter_token_counts: tuple[int, ...] = (),
        inter_token_seconds: float = 0.0,
        tried: tuple[str, ...] = (),
        head_sent_early: bool = False,
        is_background: bool = False,
    ) -> None:
        self.call_id = call_id
        self.endpoint = endpoint
        self.model = model
        self.stream = stream
        self.ending = ending
        self.status = status
        self.times = times
        self.replica = replica
        self.plan = plan
        self.usage = usage
        self.retries = retries
        self.response_bytes = response_bytes
        self.request_bytes = request_bytes
        self.tenant_id = tenant_id
        self.tenant_name = tenant_name
        self.error_code = error_code
        self.inter_token_counts = inter_token_counts
        self.inter_token_seconds = inter_token_seconds
        self.tried = tried
        self.head_sent_early = head_sent_early
        self.is_background = is_background

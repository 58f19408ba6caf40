"""Data types that the phases of a request exchange: closed enums, and structs that are encoded or configured. Pure.

What phases read most often is in `proxy.records`.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import TypeAlias

import msgspec

Body: TypeAlias = bytes | bytearray
"""A request's body. It is never changed once it has been read; a long one was read in place, as a bytearray."""

ORDINARY_TIERS = frozenset({"", "default", "standard", "auto", "on_demand"})
"""Service tiers that have no prices of their own, by all their names in responses."""

OTHER_CLIENTS = "other"
"""Label of the clients that have none of their own. No client of the configuration has this name."""


class Endpoint(enum.StrEnum):
    """The kind of a request, from its path; the value is the metric label."""

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
    """True if the request runs a model. Its answer is all that it does, except where `Prompt.has_effects`."""

    def __init__(self, label: str) -> None:
        self.is_generation = label in ("chat_completions", "completions", "responses", "messages")
        self.runs_model = self.is_generation or label in ("embeddings", "inference")


class Access(enum.Enum):
    """Permission to use a path at a replica whose key is not the client's own."""

    INFERENCE = "inference"  # every client, for the models it may use
    CREATE = "create"  # every client; what it creates is its own
    OBJECT = "object"  # the client that created the object
    LIST = "list"  # no client: the list shows what all clients created
    ADMINISTRATION = "administration"  # no client
    CONFIGURED = "configured"  # every client: the configuration allows the path


class CacheStatus(enum.StrEnum):
    """Share of the prompt that the chosen replica was predicted to have cached; metric label and `Cache-Status`."""

    HIT = "hit"  # all except the last block
    PARTIAL = "partial"
    MISS = "miss"
    BYPASS = "bypass"  # prefixes do not matter: not a generation, or too short to share


class MissReason(enum.StrEnum):
    """Why a part of a prompt was not expected to be cached."""

    NONE = "none"  # what is not cached was never sent before
    COLD = "cold"  # no replica has any of it
    CHANGED = "changed"  # the beginning is known, then the prompt differs
    EVICTED = "evicted"
    ELSEWHERE = "elsewhere"  # another replica has more of it, but is busier
    DOWN = "down"  # the replica that has it is unavailable
    SHORT = "short"  # too short to share


class RouteReason(enum.StrEnum):
    """Why this replica was chosen; in `x-cairn-reason`, the log and the metric."""

    WARM = "warm"  # it has the longest prefix cached, and costs least
    SPREAD = "spread"  # another has more cached, but waiting there costs more than computing here
    COLD = "cold"  # no replica has any of it: least cost, then rendezvous hashing
    SHORT = "short"  # too short to share: the least loaded replica
    PINNED = "pinned"  # the object that the request names is there
    ONLY = "only"  # there is no other replica
    RETRY = "retry"  # another replica failed before the client got any of its response


class Ending(enum.StrEnum):
    """Endings of a request, one for every path."""

    COMPLETE = "complete"
    UPSTREAM_STATUS = "upstream_status"  # the upstream's error status was relayed
    CLIENT_LEFT = "client_left"
    UPSTREAM_FAILED = "upstream_failed"  # before the response; the client received an error
    UPSTREAM_BROKE = "upstream_broke"  # within the response; the client's response is cut off
    UPSTREAM_ERROR = "upstream_error"  # status 2xx, and an error, HTML or a stream with an error for a body
    TRUNCATED = "truncated"  # a stream without its final event
    REFUSED = "refused"  # by Cairn: bad request, limit, or no replica
    INTERNAL = "internal"


class UsageRequest(enum.Enum):
    """How the body asks for usage in a stream, which decides the edit that asks for it."""

    ASKED = "asked"  # include_usage is true: nothing to edit or to withhold
    ABSENT = "absent"  # no stream_options: insert the member
    REPLACE = "replace"  # null, {} or include_usage false: replace the value at `stream_options_span`
    NOT_APPLICABLE = "not_applicable"  # no stream, or a dialect that always reports


class ToolOrder(enum.StrEnum):
    """Position of the tools in a chat template."""

    TOOLS_FIRST = "tools_first"  # before the system message
    SYSTEM_FIRST = "system_first"  # after the system message
    TOOLS_LAST = "tools_last"  # before the last user message


class TemplateFacts(msgspec.Struct, frozen=True):
    """How an engine renders the prompts of one model, as far as the key of a prefix depends on it.

    `drops_reasoning`: reasoning before the last user message is left out. `drops_thoughts`: so is reasoning in the
    text of messages between `<think>` and `</think>`. `ignores_reasoning`: the field is left out everywhere.
    `moves_system`: system messages within the conversation are moved to its beginning. `dated`: the head contains
    today's date. `none_drops_tools`: `tool_choice` "none" leaves the tools out. `headless`: template arguments that
    change nothing before the last message. `late_arguments`: those that change what follows tools and system
    messages. `keeps_billing`: a client's billing block is rendered; `messages_drop_billing`: but not if it comes in
    Anthropic's dialect, which engines translate first.
    `joins_head`: prompts share nothing unless tools and system messages are equal, since engines of the pool put them
    in different orders. `splits_systems`: of several system messages at the beginning, only the first is rendered
    before the tools. `system_last`: the system message is rendered with the last user message.
    `rewrites_turns`: answers before the last user message are rendered otherwise than those after it, even without
    reasoning. `developer_in_place`: a message of a developer is not a system message. `root` is the model's own name
    if it is served by others.
    """

    order: ToolOrder = ToolOrder.TOOLS_FIRST
    drops_reasoning: bool = False
    drops_thoughts: bool = False
    ignores_reasoning: bool = False
    moves_system: bool = False
    dated: bool = False
    none_drops_tools: bool = True
    headless: frozenset[str] = frozenset()
    late_arguments: frozenset[str] = frozenset()
    keeps_billing: bool = False
    messages_drop_billing: bool = False
    joins_head: bool = False
    splits_systems: bool = False
    system_last: bool = False
    developer_in_place: bool = False
    rewrites_turns: bool = False
    root: str = ""


class Edit(msgspec.Struct, frozen=True, gc=False):
    """Replace body[start:end] by `insert`; a body is changed in no other way."""

    start: int
    end: int
    insert: bytes | memoryview


class AccessLine(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One line of the access log; unknown fields are omitted. `time` is the end of the request.

    `duration` and `ttft` are in seconds. `client` is the configured name, `peer` the address of the connection.
    With `head_sent_early` the client was sent status 200 first, and learned of an error `status` from an event.

    Enums stay enums, because reading their `value` costs more than encoding them.
    """

    time: datetime
    request_id: str
    method: str
    route: str
    endpoint: Endpoint
    status: int
    ending: Ending
    duration: float
    client: str | None = None
    peer: str | None = None
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
    tried: tuple[str, ...] = ()
    head_sent_early: bool = False

"""The configuration: one frozen tree of typed sections with defaults, limits and descriptions. Pure.

`proxy.config.load` fills it from files, flags and the environment, and checks what types cannot express. The text
under each field is its description in the configuration reference and in the JSON Schema
(`proxy.config.reference`). A field marked `LIVE` can be changed by a reload; every other one needs a restart.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Annotated, Any, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from proxy.model import ToolOrder

MIB = 1024 * 1024
FOLLOWED_SCHEME = "dns+http"
"""Scheme of a URL that stands for every address of its host name."""

LIVE = Meta(extra={"live": True})
"""Marks a field that a reload changes in a running Cairn."""

SIZE = Meta(extra={"size": True})
"""Marks a number of bytes, which may also be written as `32MB` or `32MiB`."""

_DEFAULT_PORTS = {"http": 80, "https": 443, FOLLOWED_SCHEME: 80}
_CREDENTIAL_IN_QUERY = re.compile(r"(?i)\b(password|token|key|secret)=[^&]*")

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0: any free port, for tests and demonstrations
Count = Annotated[int, Meta(ge=1)]
Bytes = Annotated[int, Meta(ge=1), SIZE]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Wait = Annotated[float, Meta(ge=0, le=86_400)]  # seconds; 0 is allowed
Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/\[\]-]*$",
        max_length=128,
        extra={"form": "letters, digits and . _ : / [ ] -, beginning with a letter or digit"},
    ),
]  # safe in a metric label and in a header
Sha256 = Annotated[
    str, Meta(pattern=r"^[0-9A-Fa-f]{64}$", extra={"form": "64 hexadecimal digits, from: printf %s KEY | sha256sum"})
]
PathPatterns = Annotated[tuple[Annotated[str, Meta(pattern=r"^/[!-~]*$", max_length=256)], ...], Meta(max_length=256)]
Patterns = tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...]


class Secret:
    """A text that `str`, `repr` and every encoder show as `***`; only `reveal` returns it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """Return the text itself."""
        return self._text

    def redacted(self) -> str:
        """Return what may be shown."""
        return "***"

    def __str__(self) -> str:
        return self.redacted()

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other.reveal() == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not pickled")


class SecretUrl(Secret):
    """A URL whose user, password and query may be secret, while its hosts may be shown."""

    __slots__ = ()

    def redacted(self) -> str:
        """Return the URL with `***` in place of what may be secret."""
        try:
            parts = urlsplit(self._text)
        except ValueError:
            return "***"
        netloc = parts.netloc.rpartition("@")
        shown = f"***@{netloc[2]}" if netloc[1] else netloc[2]
        query = _CREDENTIAL_IN_QUERY.sub(r"\1=***", parts.query)
        return f"{parts.scheme}://{shown}{parts.path}" + (f"?{query}" if query else "")


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=False):
    """A mapping of the configuration: frozen, and an unknown key in it is an error."""


class Level(enum.StrEnum):
    """Which messages the process log contains."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(enum.StrEnum):
    """The format of access lines."""

    JSON = "json"
    LOGFMT = "logfmt"


class PoolKind(enum.StrEnum):
    """The kind of upstream: engines keep prefixes while there is memory, providers for a fixed time."""

    ENGINE = "engine"
    PROVIDER = "provider"


class Auth(enum.StrEnum):
    """The header in which a replica's key is sent: `authorization: Bearer`, `x-api-key` or `api-key`."""

    BEARER = "bearer"
    X_API_KEY = "x-api-key"
    API_KEY = "api-key"


class Tenancy(enum.StrEnum):
    """True if clients may share cached prefixes; with `isolated` each client has its own."""

    SHARED = "shared"
    ISOLATED = "isolated"


class Disclosure(enum.StrEnum):
    """The tenants whose prompts response headers and /explain may describe."""

    OWN = "own"
    ALL = "all"


class RequestPriority(enum.StrEnum):
    """Priority of a request where requests wait; `high` goes first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class AdmissionMode(enum.StrEnum):
    """When prompts that are not in any cache wait for a quiet replica: `auto` while memory is short, or `never`."""

    AUTO = "auto"
    NEVER = "never"


class Server(Section, frozen=True):
    """The port for clients, and limits on what they may use. Limits on concurrent use apply to each worker."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    """Address to listen on."""

    port: Port = 8080
    """Port to listen on."""

    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    """Number of worker processes."""

    open: Annotated[bool, LIVE] = False
    """Allow anyone who reaches the port to use the replicas' keys although no clients are listed."""

    backlog: Count = 2048
    """Connections per worker that may wait to be accepted."""

    max_body_bytes: Bytes = 32 * MIB
    """Largest request body."""

    max_head_bytes: Bytes = 64 * 1024
    """Largest request head: request line and headers together."""

    max_header_bytes: Bytes = 32 * 1024
    """Longest single header line."""

    head_seconds: Seconds = 30
    """Time within which a client must send the whole head, from its first byte."""

    body_seconds: Seconds = 300
    """Time within which a client must send the whole body."""

    min_body_bytes_per_second: Annotated[int, Meta(ge=0), SIZE] = 500
    """Lowest rate at which a body may arrive after its first 10 seconds; 0 allows any rate."""

    keepalive_seconds: Seconds = 75
    """Time after which a connection without a complete request head is closed."""

    write_seconds: Seconds = 120
    """Time after which a connection is closed whose client reads nothing of its response."""

    max_in_flight_requests: Count = 4096
    """Requests that are handled at once; further ones are answered 503."""

    max_in_flight_bytes: Bytes = 512 * MIB
    """Bytes of request bodies held at once, counted as they arrive; further requests are answered 503."""

    max_in_flight_head_bytes: Bytes = 32 * MIB
    """Bytes of incomplete heads and of pipelined requests held at once."""

    max_connections: Count = 8192
    """Connections of clients per worker. Each needs a file descriptor, and so does its request to a replica."""

    max_connections_per_address: Count = 4096
    """Connections per IPv4 address or IPv6 /64 network, per worker."""

    drain_accept_seconds: Annotated[Wait, LIVE] = 2
    """After SIGTERM: time in which readiness fails but connections are accepted, so that load balancers notice."""

    drain_seconds: Annotated[Wait, LIVE] = 30
    """After that: time within which running requests may finish."""

    engine_paths: PathPatterns = ()
    """Paths outside /v1 that are passed on to engines and routed by the model in the body, as patterns with `*` and
    `?`: `/tokenize`, `/detokenize`, `/rerank`, `/score`, `/pooling`, `/apply-template`, `/openai/deployments/*`. A
    path under `/openai/deployments/` names its model itself. None by default."""

    allowed_paths: PathPatterns = ()
    """Paths under /v1, beyond inference, that clients may use at replicas whose key is not their own, as patterns
    with `*` and `?`: `/v1/fine_tuning/*`, `/v1/files`. By default clients run models and use the files, batches and
    responses that they created; lists of everybody's objects and administration are refused. A pattern that fits
    `/v1/files/ID` lets every client use every file."""

    cors_origins: Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(max_length=64)] = ()
    """Origins of web pages whose scripts may call the client port, such as `https://chat.example.com`, or `*` for
    any. None by default: browsers then keep pages of other origins away."""


class Admin(Section, frozen=True):
    """The port of health, readiness, metrics and the status page. Without a token it must listen on loopback."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    """Address to listen on."""

    port: Port = 8090
    """Port to listen on."""

    token: Annotated[Secret | None, LIVE] = None
    """Token that requests must send as `Authorization: Bearer TOKEN`."""

    token_env: Annotated[str | None, LIVE] = None
    """Environment variable that contains the token."""

    token_file: Annotated[str | None, LIVE] = None
    """File that contains the token, relative to the configuration file."""


class Redis(Section, frozen=True):
    """The shared store. Without a URL Cairn starts a private Valkey, whose files are in `folder`."""

    url: SecretUrl | None = None
    """`redis://`, `rediss://` or `unix://`; `redis+sentinel://` for Sentinel, `redis+cluster://` for Cluster."""

    url_env: str | None = None
    """Environment variable that contains the URL."""

    url_file: str | None = None
    """File that contains the URL, relative to the configuration file."""

    operation_seconds: Seconds = 0.05
    """Time after which an operation counts as failed."""

    folder: str | None = None
    """Folder of the private Valkey; by default in the user's data folder, one per port."""

    max_memory_bytes: Annotated[int, Meta(ge=16 * MIB), SIZE] = 256 * MIB
    """Memory limit of the private Valkey."""


class Replica(Section, frozen=True):
    """One endpoint of a pool.

    A `url` of `dns+http://name:port` stands for one endpoint at each address of the name.
    """

    url: str
    """Base URL, with or without `/v1`."""

    name: Name | None = None
    """Name in metrics, logs and the shared index; by default host and port."""

    key: Secret | None = None
    """API key to send to this replica in place of the client's."""

    key_env: str | None = None
    """Environment variable that contains the key."""

    key_file: str | None = None
    """File that contains the key, relative to the configuration file."""

    auth: Auth | None = None
    """Header that carries the key: `bearer`, `x-api-key` or `api-key`; by default what the host is known to want."""

    capacity_tokens: Count | None = None
    """Tokens that the engine's cache can hold; by default learned from the engine and its responses."""

    max_concurrent: Count | None = None
    """Requests that the replica handles at once; further ones wait in Cairn. By default what the engine reports."""

    prefill_tokens_per_second: Annotated[float, Meta(gt=0)] | None = None
    """Prefill rate; by default measured."""

    ranks: Annotated[int, Meta(ge=1, le=256)] = 1
    """Data-parallel ranks behind the URL, each with its own cache. Each is a replica `<name>/rank-<n>`, selected by
    the header `X-data-parallel-rank`. The other settings then apply to each rank."""

    @property
    def label(self) -> str:
        """The name, given or derived."""
        return self.name or derived_name(self.url)

    @property
    def is_followed(self) -> bool:
        """True if the URL stands for every address of its host name."""
        return self.url.startswith(f"{FOLLOWED_SCHEME}://")


class Template(Section, frozen=True):
    """How the engines of a pool render prompts. By default Cairn asks an engine, or goes by the model's name.

    Only the key by which prompts are found depends on it; requests are passed on as they are.
    """

    order: ToolOrder | None = None
    """Where the tools go: `tools_first`, `system_first` (after the system message) or `tools_last` (before the last
    user message)."""

    drops_reasoning: bool | None = None
    """Reasoning before the last user message is left out."""

    moves_system: bool | None = None
    """System messages from within the conversation are put at its head."""

    dated: bool | None = None
    """The prompt begins with today's date, so that it is a new one each day (in UTC)."""

    none_drops_tools: bool | None = None
    """`tool_choice: none` leaves the tools out of the prompt."""

    keeps_billing: bool | None = None
    """The text that begins with `x-anthropic-billing-header` is rendered; by default it counts as left out."""

    arguments_without_effect: tuple[Annotated[str, Meta(min_length=1, max_length=64)], ...] | None = None
    """Request fields such as `enable_thinking` that change nothing before the last message."""


class Pool(Section, frozen=True):
    """Replicas that serve the same models."""

    name: Name
    """Name of the pool."""

    replicas: Annotated[tuple[Replica, ...], Meta(min_length=1, max_length=1024)]
    """The endpoints."""

    models: Annotated[Patterns, Meta(min_length=1)] = ("*",)
    """Model names that the pool serves, as patterns with `*` and `?`. The first pool that matches is used."""

    kind: PoolKind = PoolKind.ENGINE
    """`engine` for engines, whose caches are limited by memory; `provider` for an API that caches by time."""

    default: bool = False
    """Send requests that name no model to this pool."""

    tenancy: Tenancy | None = None
    """Tenancy of this pool; by default the top-level setting."""

    cache_salt: bool = False
    """Send each tenant's salt in the field `cache_salt`, for engines that support it."""

    template: Template | None = None
    """How the engines render prompts, if neither asking them nor the model's name shows it. For engines only."""

    ttl_seconds: Seconds = 300
    """Time for which a provider keeps a prefix that nobody uses."""

    optional: bool = False
    """Report Cairn as ready while all replicas of this pool are down."""


class Client(Section, frozen=True):
    """A client that may use this Cairn, identified by the SHA-256 of its key."""

    name: Name
    """Name of the client, in logs and on the status page."""

    key_sha256: Sha256
    """SHA-256 of the client's key, in hexadecimal: `printf %s KEY | sha256sum`."""

    tenant: Name | None = None
    """Tenant to which the client belongs; by default its name."""

    models: Annotated[Patterns, Meta(min_length=1)] = ("*",)
    """Models that the client may use, as patterns with `*` and `?`."""

    weight: Annotated[float, Meta(ge=0.01, le=1000)] = 1.0
    """Share of its tenant where requests of several tenants wait: one of weight 2 gets twice the work of one of
    weight 1. Clients of one tenant should have the same weight."""

    highest_priority: RequestPriority = RequestPriority.NORMAL
    """Highest priority that the client may ask for, with `x-cairn-priority`, `priority` or `service_tier`."""


class Tenants(Section, frozen=True):
    """The secret with which tenants' names are hashed. Without one Redis stores one that all proxies share."""

    secret: Secret | None = None
    """The secret; any length."""

    secret_env: str | None = None
    """Environment variable that contains the secret."""

    secret_file: str | None = None
    """File that contains the secret, relative to the configuration file."""

    disclosure: Annotated[Disclosure, LIVE] = Disclosure.OWN
    """Tenants whose prompts `Cache-Status`, `x-cairn-matched-tokens`, `x-cairn-reason`, `Server-Timing` and /explain
    describe if `clients` belong to several tenants that share a pool: `own` only those of the asking tenant, without
    times; `all` everybody's. What others sent still shows in the time until a response comes, and in the cached
    tokens that the upstream reports."""


class Upstream(Section, frozen=True):
    """Connections to replicas: limits, retries and back-off."""

    connect_seconds: Seconds = 5
    """Time within which a connection must be made."""

    pool_seconds: Seconds = 10
    """Time to wait for a free connection if all are in use."""

    first_byte_seconds: Seconds = 600
    """Time to wait for the first byte of a response and for the first event of a stream. A long uncached prefill
    takes most of it."""

    idle_seconds: Seconds = 120
    """Longest silence within a response."""

    thinking_seconds: Seconds = 900
    """Longest time in a stream with nothing but comments, pings and keep-alives: models may think behind them."""

    comment_seconds: Wait = 15
    """Send a comment to the client of a stream whenever it has received nothing for this long; 0 for never."""

    keepalive_seconds: Wait = 15
    """Time for which an unused connection is kept; shorter than engines keep theirs."""

    max_connections: Count = 1024
    """Connections to one replica, per worker."""

    max_retries: Annotated[int, Meta(ge=0, le=10)] = 2
    """Further attempts at other replicas, while nothing of a response has reached the client."""

    retry_statuses: tuple[Annotated[int, Meta(ge=400, le=599)], ...] = (408, 429, 500, 502, 503, 504, 529)
    """Statuses upon which a request is tried at another replica."""

    backoff_seconds: Seconds = 0.5
    """Time for which a replica that failed is not used; each further failure doubles it."""

    backoff_max_seconds: Seconds = 30
    """Longest time for which a replica that failed is not used."""

    retry_after_max_seconds: Seconds = 60
    """Longest `Retry-After` of a replica that is honoured."""

    ca_file: str | None = None
    """File with certificate authorities that are trusted in addition to the system's."""


class Routing(Section, frozen=True):
    """Constants of the routing decision; see the design documentation."""

    min_shareable_bytes: Annotated[int, Meta(ge=0), SIZE] = 4096
    """Shorter prompts are sent to the least loaded replica, without regard to their prefix."""

    prefill_tokens_per_second: Annotated[float, Meta(gt=0)] = 4000
    """Prefill rate of a replica until its own is measured."""

    in_flight_seconds_least: Annotated[float, Meta(ge=0)] = 0.05
    """Lower bound of the cost of each request in flight at a replica after the first eight."""

    in_flight_seconds_most: Annotated[float, Meta(ge=0)] = 0.2
    """Upper bound of the cost of each request in flight at a replica after the first eight."""

    future_weight_per_second: Annotated[float, Meta(ge=0)] = 3.0
    """Additional weight of uncached tokens per second of work in the shortest queue."""

    session_headers: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")], ...], Meta(max_length=16)
    ] = (
        "x-claude-code-session-id",
        "session-id",
        "session_id",
        "x-session-affinity",
        "x-session-id",
    )
    """Headers by which clients name their session. With `prompt_cache_key` they break ties between replicas that hold
    equally much of a prompt; its content decides before them."""


class Contexts(Section, frozen=True):
    """Stored contexts. Sizes are compressed sizes in Redis unless stated otherwise."""

    max_context_bytes: Annotated[int, Meta(ge=1024, le=256 * MIB), SIZE] = 16 * MIB
    """Largest context: messages and tools as uploaded."""

    memory_bytes: Annotated[Bytes, LIVE] = 256 * MIB
    """Memory per worker for contents that are used often, uncompressed."""

    total_bytes: Annotated[Bytes, LIVE] = 128 * MIB
    """Budget of all tenants together."""

    tenant_bytes: Annotated[Bytes, LIVE] = 64 * MIB
    """Budget of one tenant."""

    pinned_bytes: Annotated[int, Meta(ge=0), SIZE, LIVE] = 32 * MIB
    """Budget of one tenant for pinned contexts, which are never discarded."""

    unlisted_pinned_bytes: Annotated[Annotated[int, Meta(ge=0)] | None, SIZE, LIVE] = None
    """Budget for pinned contexts of all clients that are not listed under `clients`, together; by default half of
    `total_bytes`."""

    unchecked_bytes: Annotated[Annotated[int, Meta(ge=0)] | None, SIZE, LIVE] = None
    """Budget of all clients whose keys are neither listed nor accepted by an upstream yet, together; by default a
    quarter of `total_bytes`. These clients cannot pin contexts."""

    max_contexts: Annotated[Count, LIVE] = 1000
    """Contexts of one tenant."""

    max_tags: Annotated[Count, LIVE] = 1000
    """Tags of one tenant."""

    default_ttl_seconds: Annotated[Seconds, LIVE] = 3600
    """Time for which a context is kept if its upload names none."""

    grace_seconds: Annotated[Wait, LIVE] = 86_400
    """Time after its end for which a context can be revived."""

    warm_replicas: Annotated[int, Meta(ge=0, le=64), LIVE] = 1
    """Engines that compute a new context at once; a provider never does."""

    warming_seconds: Annotated[Seconds, LIVE] = 900
    """Time after which a context that is still being warmed counts as abandoned."""


class Queueing(Section, frozen=True):
    """Requests for which a replica has no free place (`max_concurrent`), per worker."""

    deadline_seconds: Annotated[Seconds, LIVE] = 120
    """Longest time in the queue, then 503. After half of it a request goes before all others."""

    max_waiting: Annotated[Count, LIVE] = 1024
    """Requests that may wait; further ones are answered 429."""


class Admission(Section, frozen=True):
    """Prompts that no replica has in its cache, while the active sessions need more cache than there is: they wait
    until a replica is quiet, so that the prompts which are cached stay so."""

    enabled: Annotated[AdmissionMode, LIVE] = AdmissionMode.AUTO
    """`auto` lets them wait while memory is short; `never` sends them at once."""

    max_wait_seconds: Annotated[Seconds, LIVE] = 300
    """Longest expected wait for which a new session is accepted; others are answered 429 with a Retry-After."""

    max_waiting_bytes: Annotated[Bytes, LIVE] = 256 * MIB
    """Memory per worker for the bodies of waiting requests; further ones are answered 429."""

    quiet_seconds: Annotated[Seconds, LIVE] = 0.5
    """Uncached work up to which a replica counts as quiet."""

    rest_seconds: Annotated[Seconds, LIVE] = 60
    """Time after which a replica takes such a prompt although it is not quiet."""

    memory_seconds: Seconds = 120
    """Time over which it is judged whether memory is short."""


class Log(Section, frozen=True):
    """Access lines go to standard output, everything else to standard error."""

    level: Level = Level.INFO
    """Least severe level that is logged."""

    access: bool = True
    """Write one line per request."""

    format: LogFormat = LogFormat.JSON
    """Format of the access lines: JSON objects, or `name=value` pairs (logfmt)."""


class PriceTier(Section, frozen=True):
    """Prices of every token of a request whose prompt is longer than a limit. Fields are those of a price."""

    above_prompt_tokens: Count
    """Prompt length above which the tier applies."""

    input: Decimal
    """Price per million input tokens."""

    output: Decimal
    """Price per million output tokens."""

    cached_read: Decimal | None = None
    """Price per million cached input tokens; by default `input`."""

    cache_write_5m: Decimal | None = None
    """Price per million tokens written to a cache for five minutes; by default `input`."""

    cache_write_1h: Decimal | None = None
    """Price per million tokens written to a cache for an hour; by default `cache_write_5m`."""


class Price(Section, frozen=True):
    """A price and the requests to which it applies.

    Either a provider's price per million tokens, or an engine's price per hour of a GPU. The first price that matches
    a request is used; of those with the same patterns, the one with the latest `valid_from` that has passed.
    """

    model: Annotated[str, Meta(min_length=1, max_length=256)] = "*"
    """Pattern of model names."""

    upstream: Annotated[str, Meta(min_length=1, max_length=1024)] = "*"
    """Pattern of the replica's name or URL."""

    service_tier: Annotated[str, Meta(pattern=r"^[a-z0-9_-]+$", max_length=32)] | None = None
    """Service tier, as the response names it, to which the price applies: `flex`, `priority` or `batch`. A price
    without it applies to every tier without its own price."""

    valid_from: date | None = None
    """First day (UTC) on which the price applies."""

    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}$")] = "USD"
    """Currency of the amounts."""

    usd_per_unit: Decimal | None = None
    """Value in USD of one unit of another currency; without it the price is not used."""

    input: Decimal | None = None
    """Price per million input tokens."""

    output: Decimal | None = None
    """Price per million output tokens."""

    cached_read: Decimal | None = None
    """Price per million cached input tokens; by default `input`."""

    cache_write_5m: Decimal | None = None
    """Price per million tokens written to a cache for five minutes; by default `input`."""

    cache_write_1h: Decimal | None = None
    """Price per million tokens written to a cache for an hour; by default `cache_write_5m`."""

    tiers: Annotated[tuple[PriceTier, ...], Meta(max_length=16)] = ()
    """Prices for longer prompts, in ascending order."""

    usd_per_gpu_hour: Decimal | None = None
    """Price of one GPU for an hour, for an engine of your own."""

    gpus_per_replica: Decimal | None = None
    """GPUs of one replica; by default 1."""


class Config(Section, frozen=True):
    """The whole configuration."""

    server: Server = Server()
    """The port for clients."""

    admin: Admin = Admin()
    """The admin port."""

    redis: Redis = Redis()
    """The shared store."""

    pools: Annotated[tuple[Pool, ...], LIVE] = ()
    """Replicas, grouped by the models that they serve."""

    clients: Annotated[tuple[Client, ...], LIVE] = ()
    """Clients that may use this Cairn; if empty, anyone may."""

    tenancy: Annotated[Tenancy, LIVE] = Tenancy.SHARED
    """Tenancy of pools that do not set their own: `isolated` lets no client profit from another's prefixes."""

    tenants: Tenants = Tenants()
    """The secret of the tenants' hash."""

    upstream: Upstream = Upstream()
    """Connections to replicas."""

    routing: Routing = Routing()
    """The routing decision."""

    queue: Queueing = Queueing()
    """The queues before replicas."""

    admission: Admission = Admission()
    """Prompts that wait for a quiet replica while memory is short."""

    prices: Annotated[tuple[Price, ...], Meta(max_length=1024), LIVE] = ()
    """Prices, which are used before the built-in ones."""

    contexts: Contexts = Contexts()
    """Stored contexts."""

    log: Log = Log()
    """Logs."""

    @property
    def default_pool(self) -> Pool | None:
        """The pool for paths that name no model: the marked one, or the only one."""
        if len(self.pools) == 1:
            return self.pools[0]
        return next((pool for pool in self.pools if pool.default), None)

    @property
    def has_replica_keys(self) -> bool:
        """True if clients use a key that the configuration provides."""
        return any(replica.key is not None for pool in self.pools for replica in pool.replicas)


RETIRED: Mapping[tuple[str, str], str] = {
    (
        "server",
        "request_seconds",
    ): "it had no effect; upstream.first_byte_seconds and idle_seconds are the limits",
}
"""Former settings that a configuration may still contain: they are ignored with a warning that gives the reason."""


def has_mark(section: type[Section], field: str, mark: str) -> bool:
    """Return whether the type of `field` is marked, with "live" (`LIVE`) or "size" (`SIZE`)."""
    return mark in _marks(get_type_hints(section, include_extras=True)[field])


def _marks(annotation: Any) -> set[str]:
    """Return the names in the `extra` of an annotation, without looking into tuples or other sections."""
    marks: set[str] = set()
    for part in getattr(annotation, "__metadata__", ()):
        marks |= set(getattr(part, "extra", None) or ())
    return marks


def derived_name(url: str) -> str:
    """Return host and port of `url` (the port only if it is not the default) and the path without `/v1`.

    >>> [derived_name(u) for u in ("http://10.0.0.7:8000/v1", "https://api.openai.com/v1", "http://h:1/a/v1")]
    ['10.0.0.7:8000', 'api.openai.com', 'h:1/a']
    """
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/v1")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    shown = "" if parts.port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{parts.port}"
    return host + shown + path


def redact(thing: Any) -> Any:
    """Encode a secret as `***`: the hook of encoders whose output a person may see."""
    if isinstance(thing, Secret):
        return thing.redacted()
    raise NotImplementedError(f"no encoding for {type(thing).__name__}")


def reveal(thing: Any) -> Any:
    """Encode a secret as its text: the hook of the encoder that writes to a worker's private socket, and no other."""
    if isinstance(thing, Secret):
        return thing.reveal()
    raise NotImplementedError(f"no encoding for {type(thing).__name__}")


def make_secret(kind: type, value: Any) -> Any:
    """Decode a text to `Secret` or `SecretUrl`: the hook of decoders."""
    if not issubclass(kind, Secret):
        raise NotImplementedError(f"no decoding for {kind.__name__}")
    if not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)

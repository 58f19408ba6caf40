"""The shape of the configuration: one frozen tree of typed sections with their defaults, limits and meaning.

Pure: it must not know files, flags or the environment; `proxy.config.load` fills it and checks what types cannot say.
A secret is a type of its own that prints as `***` wherever it may end up.
"""

from __future__ import annotations

import enum
import re
from datetime import date
from decimal import Decimal
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

MIB = 1024 * 1024
FOLLOWED_SCHEME = "dns+http"
"""Of a URL that stands for all addresses of its name, whichever those are at the time."""

_DEFAULT_PORTS = {"http": 80, "https": 443, FOLLOWED_SCHEME: 80}
_VERSION_SEGMENT = re.compile(r"v\d+\w*")  # v1, v4, v1beta
_CREDENTIAL_IN_QUERY = re.compile(r"(?i)\b(password|token|key|secret)=[^&]*")

Port = Annotated[int, Meta(ge=0, le=65535)]  # 0: any free one, for tests and demonstrations
Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Wait = Annotated[float, Meta(ge=0, le=86_400)]  # seconds, and none is fine
Name = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/\[\]-]*$", max_length=128)
]  # safe in a label and a header
Sha256 = Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{64}$")]
PathPatterns = Annotated[tuple[Annotated[str, Meta(pattern=r"^/[!-~]*$", max_length=256)], ...], Meta(max_length=256)]
Patterns = tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...]


class Secret:
    """A text that is shown as `***` by `str`, `repr` and every encoder; `reveal` is the only way to it."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself, for the one place that needs it."""
        return self._text

    def redacted(self) -> str:
        """What may be shown."""
        return "***"

    def __str__(self) -> str:
        return self.redacted()

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not pickled")


class SecretUrl(Secret):
    """A URL whose user, password and query may be secret, while its hosts may be shown."""

    __slots__ = ()

    def redacted(self) -> str:
        """The URL with `***` in place of what may be secret."""
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
    """How much is logged beside the access lines."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class PoolKind(enum.StrEnum):
    """What stands behind a pool: engines hold prefixes by memory, providers by time."""

    ENGINE = "engine"
    PROVIDER = "provider"


class Tenancy(enum.StrEnum):
    """Whether clients may share a prefix: `isolated` salts every chain by who asks."""

    SHARED = "shared"
    ISOLATED = "isolated"


class Server(Section, frozen=True):
    """The port that clients use, and what one of them may take. Requests and bytes in flight are per worker."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Port = 8080
    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    open: bool = False  # anyone who reaches the port may use the replicas' keys
    backlog: Count = 2048  # connections that wait to be accepted, per worker
    max_body_bytes: Count = 32 * MIB
    max_head_bytes: Count = 64 * 1024  # request line and headers together
    max_header_bytes: Count = 32 * 1024  # one header line
    head_seconds: Seconds = 30  # to send the whole head, from its first byte on
    body_seconds: Seconds = 300  # to send its body
    min_body_bytes_per_second: Annotated[int, Meta(ge=0)] = 500  # after its first 10 seconds; 0: at any rate
    request_seconds: Seconds = 3600  # until its answer has ended
    keepalive_seconds: Seconds = 75  # a connection without a whole request's head
    write_seconds: Seconds = 120  # an answer of which the client takes nothing
    max_in_flight_requests: Count = 4096
    max_in_flight_bytes: Count = 512 * MIB  # of bodies, as far as they have arrived
    max_in_flight_head_bytes: Count = 32 * MIB  # of unfinished heads, and of requests sent ahead of their turn
    max_connections: Count = 8192  # of clients, per worker; each takes a descriptor, and so does its request upstream
    max_connections_per_address: Count = 4096  # of these, per IPv4 address or IPv6 network of 64 bits
    drain_accept_seconds: Wait = 2  # after SIGTERM: not ready, still accepting, until balancers have seen it
    drain_seconds: Wait = 30  # then: what runs may end
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
    """The port of health, readiness, metrics and explanations. Without a token it binds to loopback only."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Port = 8090
    token: Secret | None = None
    token_env: str | None = None
    token_file: str | None = None


class Redis(Section, frozen=True):
    """The store. Without a URL a private Valkey is started, whose files lie in `folder`."""

    url: SecretUrl | None = None  # redis, rediss, unix; Sentinel and Cluster by their own schemes
    url_env: str | None = None
    url_file: str | None = None
    operation_seconds: Seconds = 0.05  # an answer later than this counts as none
    folder: str | None = None  # by default in the user's own, one per port
    max_memory_bytes: Annotated[int, Meta(ge=16 * MIB)] = 256 * MIB  # of the embedded one


class Replica(Section, frozen=True):
    """One endpoint of a pool. `name` labels metrics and the shared index; by default host and port.

    A `url` of `dns+http://name:port` stands for an endpoint at each address of the name, labelled by that.
    """

    url: str
    name: Name | None = None
    key: Secret | None = None
    key_env: str | None = None
    key_file: str | None = None
    capacity_tokens: Count | None = None
    max_concurrent: Count | None = None
    prefill_tokens_per_second: Annotated[float, Meta(gt=0)] | None = None

    @property
    def label(self) -> str:
        """The name, given or derived."""
        return self.name or derived_name(self.url)

    @property
    def is_followed(self) -> bool:
        """True where the URL is a name whose addresses are the endpoints."""
        return self.url.startswith(f"{FOLLOWED_SCHEME}://")

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return urlsplit(self.url).scheme.removeprefix("dns+")

    @property
    def host(self) -> str:
        """The host without brackets."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """The port, given or the scheme's."""
        parts = urlsplit(self.url)
        return parts.port or _DEFAULT_PORTS[parts.scheme]

    @property
    def base_path(self) -> str:
        """What stands upstream in place of the client's `/v1`.

        That is the path of the URL, with `/v1` after it unless it names a version itself.

        >>> [Replica(u).base_path for u in ("http://h", "http://h/v1/", "http://h/api", "https://h/v1beta/openai")]
        ['/v1', '/v1', '/api/v1', '/v1beta/openai']
        """
        path = urlsplit(self.url).path.rstrip("/")
        versioned = any(_VERSION_SEGMENT.fullmatch(segment) for segment in path.split("/"))
        return path if versioned else path + "/v1"


class Pool(Section, frozen=True):
    """Replicas that serve one set of models."""

    name: Name
    replicas: Annotated[tuple[Replica, ...], Meta(min_length=1, max_length=1024)]
    models: Annotated[Patterns, Meta(min_length=1)] = ("*",)
    kind: PoolKind = PoolKind.ENGINE
    default: bool = False  # paths that name no model go here
    tenancy: Tenancy | None = None  # by default the configuration's
    cache_salt: bool = False  # the engine knows the field of that name
    ttl_seconds: Seconds = 300  # how long a provider keeps a prefix that nobody uses


class Client(Section, frozen=True):
    """Someone who may ask, by the SHA-256 of the key; `tenant` is the name unless given."""

    name: Name
    key_sha256: Sha256
    tenant: Name | None = None
    models: Annotated[Patterns, Meta(min_length=1)] = ("*",)


class Tenants(Section, frozen=True):
    """The secret of the hash that names tenants. Without one Redis keeps one that all proxies share."""

    secret: Secret | None = None
    secret_env: str | None = None
    secret_file: str | None = None


class Upstream(Section, frozen=True):
    """Patience with replicas."""

    connect_seconds: Seconds = 5
    pool_seconds: Seconds = 10  # for a free connection, where all are in use
    first_byte_seconds: Seconds = 600  # a long cold prefill comes before the first byte
    idle_seconds: Seconds = 120  # inside an answer; keep-alive comments are no progress
    keepalive_seconds: Wait = 15  # an unused connection is kept this long; engines close theirs soon
    max_connections: Count = 1024  # to one replica, per worker
    max_retries: Annotated[int, Meta(ge=0, le=10)] = 2  # of a generation of whose answer nothing came
    backoff_seconds: Seconds = 0.5  # the first pause of a replica that failed; each further one doubles it
    backoff_max_seconds: Seconds = 30
    retry_after_max_seconds: Seconds = 60  # a replica's own Retry-After is honoured up to this
    ca_file: str | None = None  # trusted beside the system's authorities


class Routing(Section, frozen=True):
    """Constants of the cost rule; see ARCHITECTURE.md."""

    min_shareable_bytes: Annotated[int, Meta(ge=0)] = 4096  # shorter prompts are sent to where least is to do
    prefill_tokens_per_second: Annotated[float, Meta(gt=0)] = 4000  # until a replica's own is learned
    in_flight_seconds_least: Annotated[float, Meta(ge=0)] = (
        0.05  # bounds of what a request in flight costs after eight
    )
    in_flight_seconds_most: Annotated[float, Meta(ge=0)] = 0.2
    future_weight_per_second: Annotated[float, Meta(ge=0)] = 3.0  # uncached work counts more, the longer all queues


class Contexts(Section, frozen=True):
    """Stored contexts. Bytes are those in Redis, compressed, but for the first two; quotas are of one tenant."""

    max_context_bytes: Annotated[int, Meta(ge=1024, le=256 * MIB)] = 16 * MIB  # messages and tools as uploaded
    memory_bytes: Count = 256 * MIB  # contents that a worker keeps at hand
    total_bytes: Count = 128 * MIB  # of all tenants
    tenant_bytes: Count = 64 * MIB
    pinned_bytes: Annotated[int, Meta(ge=0)] = 32 * MIB  # of contexts that are never discarded
    max_contexts: Count = 1000
    max_tags: Count = 1000
    default_ttl_seconds: Seconds = 3600
    grace_seconds: Wait = 86_400  # how long an expired one can be revived
    warm_replicas: Annotated[int, Meta(ge=0, le=64)] = 1  # engines that compute a new one at once; never a provider
    warming_seconds: Seconds = 900  # a context still pending after that was left in the middle


class Queueing(Section, frozen=True):
    """Requests for which a replica (`max_concurrent`, or what it says of itself) has no place, per worker."""

    deadline_seconds: Seconds = 120  # then 503; from half of it on a request goes before all others
    max_waiting: Count = 1024  # beyond that 429


class Log(Section, frozen=True):
    """What is written: access lines as JSON to standard output, the rest to standard error."""

    level: Level = Level.INFO
    access: bool = True


class PriceTier(Section, frozen=True):
    """What every token of a request costs whose prompt is longer; fields as of `Price`."""

    above_prompt_tokens: Count
    input: Decimal
    output: Decimal
    cached_read: Decimal | None = None
    cache_write_5m: Decimal | None = None
    cache_write_1h: Decimal | None = None


class Price(Section, frozen=True):
    """A rate card, and where it applies: globs over the model and over the replica's name or URL, from a day on.

    Either a provider's, in `currency` per million tokens (what is left out costs what `input` does), or an engine's,
    by the hour of one GPU. Of cards with the same globs the newest that has come stands, else the first in the file.
    """

    model: Annotated[str, Meta(min_length=1, max_length=256)] = "*"
    upstream: Annotated[str, Meta(min_length=1, max_length=1024)] = "*"
    valid_from: date | None = None
    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}$")] = "USD"
    usd_per_unit: Decimal | None = None  # of another currency; without it the card prices nothing, and says so
    input: Decimal | None = None
    output: Decimal | None = None
    cached_read: Decimal | None = None
    cache_write_5m: Decimal | None = None
    cache_write_1h: Decimal | None = None
    tiers: Annotated[tuple[PriceTier, ...], Meta(max_length=16)] = ()
    usd_per_gpu_hour: Decimal | None = None
    gpus_per_replica: Decimal | None = None  # by default one


class Config(Section, frozen=True):
    """The whole of it."""

    server: Server = Server()
    admin: Admin = Admin()
    redis: Redis = Redis()
    pools: tuple[Pool, ...] = ()
    clients: tuple[Client, ...] = ()
    tenancy: Tenancy = Tenancy.SHARED  # of pools that do not say
    tenants: Tenants = Tenants()
    upstream: Upstream = Upstream()
    routing: Routing = Routing()
    queue: Queueing = Queueing()
    prices: Annotated[tuple[Price, ...], Meta(max_length=1024)] = ()  # before the built-in data
    contexts: Contexts = Contexts()
    log: Log = Log()

    @property
    def default_pool(self) -> Pool | None:
        """Where paths go that name no model: the pool marked so, or the only one."""
        if len(self.pools) == 1:
            return self.pools[0]
        return next((pool for pool in self.pools if pool.default), None)

    @property
    def has_replica_keys(self) -> bool:
        """True where whoever is let in spends a key of ours."""
        return any(replica.key is not None for pool in self.pools for replica in pool.replicas)


def derived_name(url: str) -> str:
    """Host and port of `url` (the port only where it is not the scheme's own), and its path but for `/v1`.

    >>> [derived_name(u) for u in ("http://10.0.0.7:8000/v1", "https://api.openai.com/v1", "http://h:1/a/v1")]
    ['10.0.0.7:8000', 'api.openai.com', 'h:1/a']
    """
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/v1")
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    shown = "" if parts.port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{parts.port}"
    return host + shown + path


def redact(thing: Any) -> Any:
    """The hook of encoders whose output a person may see."""
    if isinstance(thing, Secret):
        return thing.redacted()
    raise NotImplementedError(f"no encoding for {type(thing).__name__}")


def reveal(thing: Any) -> Any:
    """The hook of the encoder that writes to a worker's private socket, and of no other."""
    if isinstance(thing, Secret):
        return thing.reveal()
    raise NotImplementedError(f"no encoding for {type(thing).__name__}")


def make_secret(kind: type, value: Any) -> Any:
    """The decoders' hook: text to `Secret` or `SecretUrl`."""
    if not issubclass(kind, Secret):
        raise NotImplementedError(f"no decoding for {kind.__name__}")
    if not isinstance(value, str):
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)

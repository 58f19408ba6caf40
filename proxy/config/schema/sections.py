"""All other sections: clients and tenants, connections, routing, queues, stored contexts and logs. Pure."""

from __future__ import annotations

import enum
from typing import Annotated

from msgspec import Meta

from proxy.config.schema.values import (
    LIVE,
    MIB,
    RATE_MOST,
    SIZE,
    WHOLE_MOST,
    Bytes,
    Count,
    Name,
    Patterns,
    Seconds,
    Secret,
    SecretUrl,
    Section,
    Sha256,
    Wait,
)


class Level(enum.StrEnum):
    """The lowest level of messages in the process log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(enum.StrEnum):
    """The format of access lines."""

    JSON = "json"
    LOGFMT = "logfmt"


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
    """Hold prompts that are in no cache until a replica is quiet: `auto` while memory is short, or `never`."""

    AUTO = "auto"
    NEVER = "never"


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

    max_memory_bytes: Annotated[int, Meta(ge=16 * MIB, le=WHOLE_MOST), SIZE] = 256 * MIB
    """Memory limit of the private Valkey."""


class Client(Section, frozen=True):
    """A client that may use this Cairn, identified by the SHA-256 of its key."""

    name: Name
    """Name of the client, in logs and on the status page."""

    key_sha256: Sha256
    """SHA-256 of the client's key, in hexadecimal: `printf %s KEY | sha256sum`."""

    tenant: Name | None = None
    """Tenant to which the client belongs; by default its name. Clients of one tenant share stored contexts, files,
    batches and responses."""

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

    check_seconds: Seconds = 5
    """Time within which a replica must answer a health check. One that leaves three in a row unanswered, and sends
    nothing else meanwhile, is frozen and gets no request until it answers one; if it has requests to work on, see
    `silence_seconds`.
    """

    silence_seconds: Seconds = 60
    """Longest silence of a replica that has requests to work on, beyond the time predicted for their prompts, before
    it counts as frozen. Raise it for an engine that answers nothing, not even health checks, while it computes for
    longer than this.
    """

    comment_seconds: Wait = 15
    """Send a comment to the client of a stream whenever it has received nothing for this long; 0 for never."""

    comment_before_head: bool = True
    """Also send these comments before a replica has responded: while the request waits in Cairn, or for the beginning
    of a response. The client then has status 200 already, so that it learns of a later error from an event of the
    stream and not from the status."""

    keepalive_seconds: Wait = 15
    """Time for which an unused connection is kept; shorter than engines keep theirs."""

    max_connections: Count = 1024
    """Connections to one replica, per worker."""

    max_retries: Annotated[int, Meta(ge=0, le=10)] = 2
    """Further attempts at other replicas, while nothing of a response has reached the client."""

    retry_statuses: tuple[Annotated[int, Meta(ge=400, le=599)], ...] = (
        *(408, 424, 429, 500, 502, 503, 504),  # 424 is TGI's, for an engine that fails
        *(520, 521, 522, 523, 524),  # of Cloudflare, for a host behind it that fails
        *(529, 530),
    )
    """Statuses on which a request is tried at another replica."""

    backoff_seconds: Seconds = 0.5
    """Time for which a replica that failed is not used; each further failure doubles it."""

    backoff_max_seconds: Seconds = 30
    """Longest time for which a replica that failed is not used."""

    retry_after_max_seconds: Seconds = 60
    """Longest `Retry-After` of a replica that is honoured."""

    ca_file: str | None = None
    """File with certificate authorities that are trusted in addition to the system's. It is read again when it
    changes."""


class Routing(Section, frozen=True):
    """Constants of the routing decision; see the design documentation."""

    min_shareable_bytes: Annotated[int, Meta(ge=0, le=WHOLE_MOST), SIZE] = 4096
    """Shorter prompts are sent to the least loaded replica, without regard to their prefix."""

    prefill_tokens_per_second: Annotated[float, Meta(gt=0, le=RATE_MOST)] = 4000
    """Prefill rate of a replica until its own is measured."""

    in_flight_seconds_least: Wait = 0.05
    """Lower bound of the cost of each request in flight at a replica after the first eight."""

    in_flight_seconds_most: Wait = 0.2
    """Upper bound of the cost of each request in flight at a replica after the first eight."""

    future_weight_per_second: Annotated[float, Meta(ge=0, le=RATE_MOST)] = 8.0
    """Additional weight of uncached tokens per second of work in the shortest queue."""

    index_bytes: Annotated[int, Meta(ge=MIB, le=WHOLE_MOST), SIZE] = 256 * MIB
    """Memory per worker for the prefix index. Beyond it, the least recently used prefixes are forgotten."""

    max_objects: Count = 65_536
    """Stored responses, files and other objects whose replica a worker remembers, at about 150 bytes each. A request
    for a forgotten one goes to the least loaded replica. If there is no room, the oldest of a client with more than
    an equal share is forgotten."""

    session_headers: Annotated[
        tuple[
            Annotated[
                str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$", extra={"form": "the name of a header, without a colon"})
            ],
            ...,
        ],
        Meta(max_length=16),
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

    pinned_bytes: Annotated[int, Meta(ge=0, le=WHOLE_MOST), SIZE, LIVE] = 32 * MIB
    """Budget of one tenant for pinned contexts, which are never discarded."""

    unlisted_pinned_bytes: Annotated[Annotated[int, Meta(ge=0, le=WHOLE_MOST)] | None, SIZE, LIVE] = None
    """Budget for pinned contexts of all clients that are not listed under `clients`, together; by default half of
    `total_bytes`."""

    unchecked_bytes: Annotated[Annotated[int, Meta(ge=0, le=WHOLE_MOST)] | None, SIZE, LIVE] = None
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
    until a replica is quiet, so that cached prompts stay cached."""

    enabled: Annotated[AdmissionMode, LIVE] = AdmissionMode.AUTO
    """`auto` lets them wait while memory is short; `never` sends them at once."""

    max_wait_seconds: Annotated[Seconds, LIVE] = 300
    """Longest expected wait for which a new session is accepted; others are answered 429 with a Retry-After."""

    max_waiting_bytes: Annotated[Bytes, LIVE] = 256 * MIB
    """Memory per worker for the bodies of waiting requests; further ones are answered 429."""

    quiet_seconds: Annotated[Seconds, LIVE] = 0.5
    """A replica with at most this much uncached work counts as quiet; for a cold turn, with two fifths of it."""

    rest_seconds: Annotated[Seconds, LIVE] = 60
    """Time after which a replica takes such a prompt even if it is not quiet. The waits that have no setting are in
    proportion to it."""

    memory_seconds: Seconds = 120
    """Time over which Cairn judges whether memory is short."""


class Log(Section, frozen=True):
    """Access lines go to standard output, everything else to standard error."""

    level: Level = Level.INFO
    """Least severe level that is logged."""

    access: bool = True
    """Write one line per request."""

    format: LogFormat = LogFormat.JSON
    """Format of the access lines: JSON objects, or `name=value` pairs (logfmt)."""


class Kubernetes(Section, frozen=True):
    """The API of Kubernetes, for replicas with a URL of `kubernetes+http://`. In a pod all of it has defaults; the
    service account must be allowed to list and watch `endpointslices`."""

    api_url: Annotated[str, Meta(min_length=1)] | None = None
    """URL of the API server; by default that of the cluster in which Cairn runs."""

    token_file: str | None = None
    """File with the token, which is read anew for each request, since Kubernetes replaces it; by default that of the
    pod's service account, if `api_url` is not set."""

    ca_file: str | None = None
    """File with the certificate authorities of the API server; by default the cluster's, if `api_url` is not set.
    It is read again when it changes."""

    namespace: Name | None = None
    """Namespace of URLs that name none; by default that of the pod."""

    zone: Name | None = None
    """Zone in which this Cairn runs, as in the label `topology.kubernetes.io/zone`. Of replicas that are
    equally good, one of this zone is chosen."""


class Telemetry(Section, frozen=True):
    """Traces by OpenTelemetry, which need the extra `otel`. Off unless an endpoint is set."""

    endpoint: Annotated[str, Meta(min_length=1)] | None = None
    """URL to which spans are sent by OTLP over HTTP, such as `http://collector:4318`; a URL without a path gets
    `/v1/traces`."""

    service_name: Name = "cairn"
    """Name of this Cairn in traces (`service.name`)."""

    sample_ratio: Annotated[float, Meta(ge=0, le=1)] = 1.0
    """Share of the requests that are traced, of those without a `traceparent`; otherwise its sampled flag decides."""

    token: Secret | None = None
    """Token that is sent to the collector as `Authorization: Bearer TOKEN`."""

    token_env: str | None = None
    """Environment variable that contains the token."""

    token_file: str | None = None
    """File that contains the token, relative to the configuration file."""

    ca_file: str | None = None
    """File with the certificate authorities that are trusted for the collector in place of the system's."""

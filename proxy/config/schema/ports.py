"""The sections `server` and `admin`: the two ports. Pure."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from proxy.config.schema.values import (
    LIVE,
    MIB,
    SIZE,
    WHOLE_MOST,
    Bytes,
    Count,
    PathPatterns,
    Port,
    Seconds,
    Secret,
    Section,
    Wait,
    WebOrigin,
)

BACKLOG_MOST = 2**31 - 1
"""The longest backlog that `listen` accepts."""


class Server(Section, frozen=True):
    """The port for clients, and limits on what they may use. Limits on concurrent use apply to each worker."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    """Address to listen on."""

    port: Port = 8080
    """Port to listen on."""

    workers: Annotated[int, Meta(ge=1, le=256)] = 1
    """Number of worker processes."""

    open: Annotated[bool, LIVE] = False
    """Allow anyone who reaches the port to use the replicas' keys although no clients are listed. Nobody checks
    clients' keys then: these clients can pin no context and share `contexts.unchecked_bytes`."""

    backlog: Annotated[int, Meta(ge=1, le=BACKLOG_MOST)] = 2048
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

    min_body_bytes_per_second: Annotated[int, Meta(ge=0, le=WHOLE_MOST), SIZE] = 500
    """Lowest rate at which a body may arrive after its first 10 seconds; 0 allows any rate."""

    keepalive_seconds: Seconds = 75
    """Time after which a connection without a complete request head is closed."""

    write_seconds: Seconds = 120
    """Time after which a connection is closed if its client reads nothing of the response."""

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
    path under `/openai/deployments/` names its model itself; paths there that run no model need `allowed_paths` too.
    What is sent to a path that is not known to only compute is not sent twice. None by default."""

    allowed_paths: PathPatterns = ()
    """Paths beyond inference that clients may use at replicas whose key is not their own, as patterns
    with `*` and `?`: `/v1/fine_tuning/*`, `/v1/files`. By default clients run models and use the files, batches and
    responses that their tenant created; lists of everybody's objects and administration are refused. A pattern that
    matches `/v1/files/ID` lets every client use every file; otherwise requests to the other paths may name only the
    client's own files. Not for clients that are limited to some `models`."""

    cors_origins: Annotated[tuple[WebOrigin, ...], Meta(max_length=64)] = ()
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

"""redis-py clients for each topology: one server, Sentinels, a Cluster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import redis.asyncio as redis
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff

from cache.errors import StoreUrlError
from cache.store.url import StoreUrl, Topology, parse

CONNECT_LIMIT_SECONDS = 1.0  # may include TLS, asking Sentinels, or learning a Cluster's slots
CONNECTIONS = 16  # of one worker; more than its concurrent operations under ordinary load
OWN_CONNECTIONS = 4  # outside the pool: the stream's reader, the subscriptions, and spares
RETRIES = 1  # a pooled connection may have died unnoticed; a second failure is left to the breaker
RETRY_BASE_SECONDS, RETRY_CAP_SECONDS = 0.002, 0.01  # short enough for the retry to fit within the operation's limit


_FILE_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_OPTIONS = frozenset({
    "client_name", "db", "health_check_interval", "password", "socket_keepalive", "ssl_ca_data", "ssl_ca_path",
    "ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers", "ssl_password", "username", *_FILE_OPTIONS,
})  # fmt: skip
"""Options that the URL may have."""

_REPLACED = frozenset({"max_connections", "protocol", "socket_connect_timeout", "socket_timeout"})
"""Options that the URL may have, but which Cairn sets itself."""

_FROM_URL = frozenset({"connection_class", "host", "path", "port"})
_CERTIFICATE_REQUIREMENTS = frozenset({"none", "optional", "required"})


@dataclass(frozen=True, slots=True)
class Clients:
    """`pooled` serves ordinary commands; `reader` serves blocking reads and subscriptions."""

    pooled: Any
    reader: Any
    sentinel: Any = None

    def all(self) -> set[Any]:
        """Return each client once, to close it."""
        return {self.pooled, self.reader, self.sentinel} - {None}


def check_url(text: str) -> None:
    """Raise StoreUrlError if clients cannot be made for a URL: it is malformed, or has options that mean nothing.

    Without this check the clients would fail when they are made or when they first connect.
    """
    url = parse(text)
    try:
        options = dict(parse_url(url.node_url))
    except ValueError as error:
        raise StoreUrlError(f"the URL of Redis cannot be read: {error}") from None
    given = options.keys() | url.sentinel_options.keys()
    if unknown := sorted(given - _OPTIONS - _REPLACED - _FROM_URL):
        known = ", ".join(sorted(_OPTIONS))
        raise StoreUrlError(f"the URL of Redis has an unknown option, {unknown[0]}; known are {known}")
    for source in (options, url.sentinel_options):
        if source.get("ssl_cert_reqs", "required") not in _CERTIFICATE_REQUIREMENTS:
            raise StoreUrlError("ssl_cert_reqs in the URL of Redis must be none, optional or required")
        for name in _FILE_OPTIONS:
            if name in source and not os.access(str(source[name]), os.R_OK):
                raise StoreUrlError(f"{name} in the URL of Redis names a file that cannot be read")


def make_clients(url: StoreUrl) -> Clients:
    """Return clients for `url`; they connect at their first use."""
    options = _without(dict(parse_url(url.node_url)), *_REPLACED)
    # The store limits each operation as a whole, so that a blocking read can have its own limit.
    options |= {
        "protocol": 2,
        "driver_info": None,
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_LIMIT_SECONDS,
        "retry": Retry(ExponentialBackoff(cap=RETRY_CAP_SECONDS, base=RETRY_BASE_SECONDS), RETRIES),
    }
    if url.topology is Topology.CLUSTER:
        client = _cluster(url, options)
        return Clients(client, client)  # a blocking read takes a connection of its node, which has enough
    if url.topology is Topology.SENTINEL:
        return _sentinel(url, options)
    return Clients(_single(options, CONNECTIONS), _single(options, OWN_CONNECTIONS))


def _single(options: dict[str, Any], connections: int) -> Any:
    return redis.Redis.from_pool(redis.ConnectionPool(max_connections=connections, **options))


def _cluster(url: StoreUrl, options: dict[str, Any]) -> Any:
    return redis.RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in url.nodes],
        ssl=url.node_url.startswith("rediss:"),
        max_connections=CONNECTIONS + OWN_CONNECTIONS,
        require_full_coverage=False,
        **_without(options, "connection_class", "host", "port", "db"),
    )


def _sentinel(url: StoreUrl, options: dict[str, Any]) -> Clients:
    kept = _without(options, "connection_class", "host", "port")
    tls = {"ssl": True} if url.node_url.startswith("rediss:") else {}
    certificates = {key: value for key, value in kept.items() if key.startswith("ssl_")}
    sentinel_options = {
        "socket_timeout": CONNECT_LIMIT_SECONDS / 2,
        "socket_connect_timeout": CONNECT_LIMIT_SECONDS / 2,
        "protocol": 2,
        "driver_info": None,
    }
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
        url.nodes, sentinel_kwargs=sentinel_options | tls | certificates | url.sentinel_options
    )
    return Clients(
        sentinel.master_for(url.master, max_connections=CONNECTIONS, **kept, **tls),
        sentinel.master_for(url.master, max_connections=OWN_CONNECTIONS, **kept, **tls),
        sentinel,
    )


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in names}

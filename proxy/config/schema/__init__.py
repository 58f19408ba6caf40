"""The configuration: one frozen tree of typed sections with defaults, limits and descriptions. Pure.

`proxy.config.load` fills it from files, flags and the environment, and checks what types cannot express. The text
under each field is its description in the configuration reference and in the JSON Schema
(`proxy.config.reference`). A field marked `LIVE` can be changed by a reload; every other one needs a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta

from proxy.config.schema.pools import (
    FOLLOWED_SCHEME,
    KUBERNETES_SCHEME,
    Auth,
    Pool,
    PoolKind,
    Replica,
    ServiceUrl,
    Template,
    Tenancy,
    derived_name,
    rank_name,
)
from proxy.config.schema.ports import Admin, Server
from proxy.config.schema.prices import Price, PriceTier
from proxy.config.schema.sections import (
    Admission,
    AdmissionMode,
    Client,
    Contexts,
    Disclosure,
    Kubernetes,
    Level,
    Log,
    LogFormat,
    Queueing,
    Redis,
    RequestPriority,
    Routing,
    Telemetry,
    Tenants,
    Upstream,
)
from proxy.config.schema.values import (
    LIVE,
    MIB,
    SIZE,
    Secret,
    SecretUrl,
    Section,
    has_mark,
    make_secret,
    redact,
    reveal,
    types_of,
)

__all__ = [
    "FOLLOWED_SCHEME",
    "KUBERNETES_SCHEME",
    "LIVE",
    "MIB",
    "RETIRED",
    "SIZE",
    "Admin",
    "Admission",
    "AdmissionMode",
    "Auth",
    "Client",
    "Config",
    "Contexts",
    "Disclosure",
    "Kubernetes",
    "Level",
    "Log",
    "LogFormat",
    "Pool",
    "PoolKind",
    "Price",
    "PriceTier",
    "Queueing",
    "Redis",
    "Replica",
    "RequestPriority",
    "Routing",
    "Secret",
    "SecretUrl",
    "Section",
    "Server",
    "ServiceUrl",
    "Telemetry",
    "Template",
    "Tenancy",
    "Tenants",
    "Upstream",
    "derived_name",
    "has_mark",
    "make_secret",
    "rank_name",
    "redact",
    "reveal",
    "types_of",
]


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

    kubernetes: Kubernetes = Kubernetes()
    """The API of Kubernetes."""

    telemetry: Telemetry = Telemetry()
    """Traces."""

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

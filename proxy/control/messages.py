"""Messages between the supervisor and a worker. Data types only.

The configuration travels in one of them, so that no secret appears in an argument list or an environment.
"""

from __future__ import annotations

import msgspec

from proxy.config.schema import Config
from proxy.control.error_rows import ErrorRow
from proxy.control.prefix_rows import PrefixReport
from proxy.metrics.definitions import MetricsDelta

REDIS_UP = "up"
"""`WorkerReport.redis` while Redis answers."""


# --- to a worker


class Configure(msgspec.Struct, frozen=True, tag="configure"):
    """The first message, and again after each reload: the configuration to use."""

    config: Config


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Stop accepting, finish the running requests within `seconds`, then exit."""

    seconds: float


class Explain(msgspec.Struct, frozen=True, tag="explain"):
    """Ask how a request would be routed.

    `credential` is the key of the client that would send it, or empty; `headers` are those about its urgency, with
    names in lower case.
    """

    id: int
    path: str
    body: bytes
    credential: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()


class NameModels(msgspec.Struct, frozen=True, tag="models"):
    """The models that all workers count under their own names; sent when one is added, and to a new worker."""

    models: tuple[str, ...]


# --- from a worker


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The worker's event loop runs. Sent twice a second, whatever else the worker does."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The worker accepts requests."""


class SharingReport(msgspec.Struct, frozen=True):
    """State of the exchange of routing knowledge between a worker and the other proxies."""

    state: str = ""
    others: int = 0  # other live workers, in all proxies
    holds_lease: bool = False
    written: int = 0  # entries
    read: int = 0
    rebuilds: int = 0


class ContextReport(msgspec.Struct, frozen=True):
    """One stored context for the status page: without its name, its id and its tenant."""

    model: str
    status: str
    tokens: int
    size_bytes: int
    pinned: bool
    worth_usd_per_hour: float  # saved by its uses
    expires_unix_seconds: float


class ReplicaDown(msgspec.Struct, frozen=True):
    """Since when a replica takes no requests, and why, in a few words."""

    since_unix_seconds: float
    why: str


class StatusReport(msgspec.Struct, frozen=True):
    """A worker's report for the status page, beside its counters.

    `prefixes` is None if nothing in it changed since the last report. `budgets` are the tokens that each replica is
    believed to be able to hold. `contexts` are those worth most, of all tenants. `errors` are those of the last hour.
    `down` has the replicas that take no requests, by name.
    """

    prefixes: PrefixReport | None = None
    budgets: dict[str, int] = {}
    sharing: SharingReport = SharingReport()
    contexts: list[ContextReport] = []
    errors: list[ErrorRow] = []
    down: dict[str, ReplicaDown] = {}


class PoolReport(msgspec.Struct, frozen=True):
    """Availability of a pool, and whether Cairn is ready without it."""

    up: bool
    optional: bool = False


class WorkerReport(msgspec.Struct, frozen=True, tag="report"):
    """Counts of a worker since its last report (four a second), and its current state.

    `redis` is `REDIS_UP`, another word for its state, or None while that is unknown. `upstreams` maps each replica to
    whether it takes requests; `pools` shows whether a replica of each pool does. `failing_tasks` names the background
    tasks that failed and wait for a restart.
    """

    counts: MetricsDelta
    in_flight: int = 0
    redis: str | None = None
    upstreams: dict[str, bool] = {}
    pools: dict[str, PoolReport] = {}
    failing_tasks: tuple[str, ...] = ()
    page: StatusReport = StatusReport()


class Explained(msgspec.Struct, frozen=True, tag="explained"):
    """The answer to an `Explain` with the same id: an HTTP status and a JSON text."""

    id: int
    status: int
    body: bytes


class ReloadRefused(msgspec.Struct, frozen=True, tag="refused"):
    """The worker cannot use a new configuration and keeps the old one."""

    why: str


class Announced(msgspec.Struct, frozen=True, tag="announced"):
    """A log line that several workers may send: what was found at a replica, or how it changed."""

    level: int
    text: str


ToWorker = Configure | Drain | Explain | NameModels
FromWorker = Heartbeat | Ready | WorkerReport | Explained | ReloadRefused | Announced

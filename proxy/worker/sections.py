"""The sections of a worker: the objects that `proxy.worker.composition` builds together. Data types only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache import (
    ContextStore,
    Journal,
    LoadBroadcast,
    PrefixIndex,
    Store,
    Totals,
)
from proxy.accounting.access_log import AccessLog
from proxy.accounting.error_stats import ErrorStats
from proxy.accounting.prefix_stats import PrefixStats
from proxy.accounting.pricing import PriceBook
from proxy.accounting.round_robin import RoundRobinBaseline
from proxy.clock import Clock
from proxy.contexts import StoredContexts
from proxy.contexts.api import ContextApi
from proxy.downstream.response import Downstream
from proxy.fleet import Fleet
from proxy.fleet.discovery import Discovery
from proxy.fleet.health import HealthChecker
from proxy.fleet.pools import Pools
from proxy.fleet.templates import Templates
from proxy.metrics.model_labels import ModelNames
from proxy.metrics.recorder import Recorder
from proxy.pipeline.admission import InFlightLimit
from proxy.pipeline.dispatch import Dispatcher
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.pipeline import Pipeline
from proxy.pipeline.routes import Routes
from proxy.pipeline.settlement import Settlement
from proxy.routing.cold_gate import ColdGate
from proxy.routing.fair_shares import TenantShares
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.queue_heads import QueueHeads
from proxy.routing.remote_prefills import RemotePrefills
from proxy.routing.token_estimate import TokenCounts
from proxy.tasks import Tasks
from proxy.upstream import UpstreamClient
from proxy.worker.http_server import HttpServer
from proxy.worker.live_config import LiveConfig
from proxy.worker.membership import DownReplicas
from proxy.worker.replica_queues import ReplicaQueues
from proxy.worker.reporting import Reporter

if TYPE_CHECKING:
    from proxy.telemetry.traces import Traces


@dataclass(frozen=True, slots=True)
class Basics:
    """Services that every other section uses. `loops` run beside requests and are closed before `tasks`."""

    clock: Clock
    recorder: Recorder
    tasks: Tasks
    loops: Tasks
    writer_id: str  # this worker's name among all workers of all proxies
    down_replicas: DownReplicas


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this worker, and the store through which it is shared."""

    store: Store
    index: PrefixIndex


@dataclass(frozen=True, slots=True)
class Replicas:
    """The replicas, how busy they are, and the connections to them."""

    fleet: Fleet
    discovery: Discovery
    client: UpstreamClient
    model_names: ModelNames
    templates: Templates

    @property
    def pools(self) -> Pools:
        """Finds the pool that serves a model."""
        return self.discovery.pools


@dataclass(frozen=True, slots=True)
class Sharing:
    """Exchange with the other workers of all proxies."""

    baseline: RoundRobinBaseline
    gate: PrefillGate
    remote_prefills: RemotePrefills
    journal: Journal
    load_broadcast: LoadBroadcast
    shares: TenantShares
    heads: QueueHeads
    cold_gate: ColdGate


@dataclass(frozen=True, slots=True)
class Accounting:
    """Accounting of finished requests."""

    token_counts: TokenCounts
    prices: PriceBook
    totals: Totals
    prefix_stats: PrefixStats
    error_stats: ErrorStats
    access_log: AccessLog | None
    settlement: Settlement


class OwnRequests:
    """Sends Cairn's own requests through the pipeline, which is built after the objects that need it."""

    def __init__(self) -> None:
        self.pipeline: Pipeline | None = None

    async def run(self, exchange: Exchange, client: Downstream) -> None:
        """Run a request of Cairn's own like that of a client."""
        assert self.pipeline is not None  # noqa: S101 - set when everything is built
        await self.pipeline.run(exchange, client)


@dataclass(frozen=True, slots=True)
class Contexts:
    """Stored contexts."""

    store: ContextStore
    api: ContextApi
    stored: StoredContexts
    own_requests: OwnRequests


@dataclass(frozen=True, slots=True)
class Requests:
    """The path of a request: the client port, the pipeline and the queues."""

    queues: ReplicaQueues
    dispatcher: Dispatcher
    routes: Routes
    pipeline: Pipeline
    in_flight_limit: InFlightLimit
    http_server: HttpServer
    traces: Traces | None


@dataclass(frozen=True, slots=True)
class Built:
    """The sections that are built before `Requests`."""

    basics: Basics
    memory: Memory
    replicas: Replicas
    sharing: Sharing
    accounting: Accounting
    contexts: Contexts


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of a worker."""

    built: Built
    requests: Requests
    health: HealthChecker
    reporter: Reporter
    live: LiveConfig

"""The composition root of a worker: builds every object once, starts and stops them in order. No logic.

Order at the start: store, index and journal (which waits until it knows what the others know), upstream side,
client port; at the end the reverse.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
import secrets
import socket
import ssl
from collections.abc import Callable, Sequence
from functools import partial

from cache import (
    CacheError,
    ContextLimits,
    ContextStore,
    ErrorKind,
    Journal,
    JournalState,
    Listeners,
    LoadBroadcast,
    PrefixIndex,
    Store,
    StoreState,
    Totals,
    open_store,
    shared_secret,
)
from proxy.accounting.access_log import AccessLog
from proxy.accounting.builtin_prices import BuiltinPrices
from proxy.accounting.counters import RequestCounters
from proxy.accounting.prefix_stats import PrefixStats
from proxy.accounting.pricing import PriceBook
from proxy.accounting.rate_cards import rules_of
from proxy.accounting.round_robin import RoundRobinBaseline
from proxy.clock import SystemClock
from proxy.config.schema import Config, Contexts
from proxy.contexts import StoredContexts
from proxy.contexts.api import ContextApi
from proxy.contexts.use import Use
from proxy.contexts.valuing import Valuing
from proxy.contexts.warming import Warming
from proxy.control.channel import WorkerControl
from proxy.downstream.response import Downstream
from proxy.fleet import Backoff, Fleet
from proxy.fleet.discovery import Discovery
from proxy.fleet.health import HealthChecker
from proxy.metrics import definitions as metrics
from proxy.metrics.model_labels import ModelNames
from proxy.metrics.recorder import Recorder
from proxy.pipeline.admission import Authenticator, InFlightLimit, KnownClient
from proxy.pipeline.attempt import Attempts
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.models_endpoint import ModelsEndpoint
from proxy.pipeline.pipeline import Pipeline
from proxy.pipeline.relay import Relay
from proxy.pipeline.settlement import Settlement
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.remote_prefills import RemotePrefills
from proxy.routing.replica_queue import QueueLimits, ReplicaQueue
from proxy.routing.token_estimate import TokenCounts
from proxy.tasks import Tasks
from proxy.upstream import Limits, Origin, UpstreamClient, default_ssl_context
from proxy.worker.explain import Explainer
from proxy.worker.http_server import HttpServer
from proxy.worker.maintenance import Maintenance
from proxy.worker.reporting import Reporter

log = logging.getLogger("cairn.app")

_ORIGIN_BITS = 24
_BLOCKING = frozenset({"XREAD"})  # waits for news by design, so its time tells nothing
_SECRET_SECONDS = 2.0


async def run_worker(config: Config, listening: Sequence[socket.socket], control: WorkerControl) -> None:
    """Serve on `listening` until the supervisor says that it is enough."""
    worker = await Worker.build(config, control)
    control.on_explain = lambda question: worker.explainer.explain(question, worker.front.authenticator)
    control.on_reload = worker.reconfigure
    try:
        await worker.start(listening)
        _calm_collector()
        await control.ready()
        finish_seconds = await control.drained()
        await worker.front.stop(finish_seconds)
    finally:
        await worker.close()


class Worker:
    """Everything that one worker is made of."""

    def __init__(self, config: Config, control: WorkerControl, builtin_prices: BuiltinPrices, secret: bytes) -> None:
        clock = self.clock = SystemClock()
        self.config = config
        self._secret = secret
        self.recorder = Recorder()
        self.tasks = Tasks(self._count_task_failure)
        self.loops = Tasks(self._count_task_failure)  # run beside requests; closed before what they use
        writer_id = self.writer_id = secrets.token_hex(8)

        rule = config.routing
        prices = rule.in_flight_seconds_least, rule.in_flight_seconds_most
        self.fleet = Fleet(random.random, _backoff(config), rule.prefill_tokens_per_second, prices)
        self.store = open_store(
            None if config.redis.url is None else config.redis.url.reveal(),
            clock=clock,
            tasks=self.tasks,
            limit_seconds=config.redis.operation_seconds,
            observe=self._observe_redis,
        )
        self.index = PrefixIndex(origin=secrets.randbits(_ORIGIN_BITS))
        self.members = Discovery(config, self.fleet, self.index, clock)
        self.pools = self.members.pools
        self.shadow = RoundRobinBaseline(self.pools)
        gate = PrefillGate()
        self.elsewhere = RemotePrefills(gate, self._wait_seconds)
        self.journal = Journal(
            self.index,
            self.store,
            writer_id,
            clock=clock,
            tasks=self.tasks,
            replicas=self.fleet,
            listeners=Listeners(placed=self.shadow.placed, prefills=self.elsewhere),
        )
        self.owners = self.journal.locations
        self.board = LoadBroadcast(
            self.store,
            writer_id,
            clock=clock,
            tasks=self.tasks,
            read=lambda: self.fleet.share(clock.monotonic()),
            absorb=lambda peer, rows: self.fleet.absorb(peer, rows, clock.monotonic()),
            forget=self.fleet.forget,
            alone=lambda: self.journal.others == 0,
        )

        limits = _limits(config)
        self.client = UpstreamClient(limits, clock, _trust(config))
        self.names = ModelNames(pattern for pool in config.pools for pattern in pool.models)
        self.tokens = TokenCounts()
        self.queues: dict[int, ReplicaQueue] = {}
        self._queues()
        attempts = Attempts(self.fleet, self.journal, gate, self.queues, self.board.changed, clock)
        self.prices = PriceBook(rules_of(config.prices), builtin_prices.card)
        self.totals = Totals(self.store, writer_id)
        accounts = RequestCounters(
            self.recorder, self.totals, self.names, self.prices, self.pools, self.fleet.measured_rate, clock.unix
        )
        self.access_log = AccessLog() if config.log.access else None
        sightings = PrefixStats(self.names.label, clock.unix)
        settlement = Settlement(
            self.journal, self.fleet, self.tokens, accounts, sightings, self.shadow, self.access_log, clock
        )
        relay = Relay(
            self.client,
            attempts,
            self.fleet,
            self.pools,
            self.journal,
            self.recorder,
            clock,
            max_retries=config.upstream.max_retries,
            idle_seconds=config.upstream.idle_seconds,
        )
        catalogue = ModelsEndpoint(self.client, self.pools, self.fleet, clock)
        self.contexts = ContextStore(
            self.store,
            _context_limits(config.contexts),
            clock=clock,
            tasks=self.tasks,
            evicted=lambda reason, number: self.recorder.inc(metrics.CONTEXTS_EVICTED, (reason,), number),
            damaged=lambda: self.recorder.inc(metrics.CONTEXTS_DAMAGED),
        )
        self.context_api = ContextApi(
            self.contexts,
            self.pools,
            self.tokens,
            Valuing(self.prices, self.pools, self.fleet.rate_of, clock),
            Warming(self._run_own, _new_id, clock),
            config.contexts,
            self.tasks,
        )
        stored = StoredContexts(self.contexts, self.context_api, Use(self.contexts), self.recorder)
        self.pipeline = Pipeline(
            self.pools,
            self.fleet,
            self.index,
            self.tokens,
            self.owners,
            relay,
            catalogue,
            settlement,
            stored,
            gate,
            clock,
            min_shareable_bytes=config.routing.min_shareable_bytes,
            weight_per_second=config.routing.future_weight_per_second,
        )
        self.room = InFlightLimit(config.server.max_in_flight_requests, config.server.max_in_flight_bytes)
        self.front = HttpServer(
            config.server,
            Authenticator(_clients(config), secret),
            self.room,
            self.pipeline,
            clock,
            _new_id,
            max_context_bytes=config.contexts.max_context_bytes,
        )
        self.prober = HealthChecker(
            self.client,
            self.pools,
            self.fleet,
            self.journal,
            self.names,
            self.loops,
            clock,
            limits,
            self._queues,
            relay.always_reports_usage,
        )
        self.reporter = Reporter(
            control,
            settlement,
            self.recorder,
            self.fleet,
            self.pools,
            self.index,
            self.journal,
            self.store,
            self.room,
            self.access_log,
            self.contexts,
            sightings,
            self.shadow,
            self.queues,
            clock,
        )
        self.members.changed = self._queues
        self.members.added = self._meet
        self.explainer = Explainer(self.pipeline, clock)
        self.upkeep = Maintenance(self.index, self.recorder, clock)

    @classmethod
    async def build(cls, config: Config, control: WorkerControl) -> Worker:
        """Make the parts; what takes long is done in a thread."""
        builtin_prices = await asyncio.to_thread(BuiltinPrices)
        configured = config.tenants.secret
        # without one, Redis's is taken up when it answers (`start`); until then a secret of this worker's own
        secret = secrets.token_bytes(32) if configured is None else configured.reveal().encode()
        return cls(config, control, builtin_prices, secret)

    async def start(self, listening: Sequence[socket.socket]) -> None:
        """Begin to serve."""
        await self.store.start()
        adopting = self.tasks.start(self._adopt_secret(self.store), "tenant secret")
        if self.store.state is StoreState.AVAILABLE:
            # a context stored under a secret of this worker's own would be lost to all others
            await asyncio.wait([adopting], timeout=_SECRET_SECONDS)
        self.shadow.follow(self.index.replicas())
        await self.journal.start()
        await self.board.start()
        await self.members.look()
        await self.prober.begin()
        await self.contexts.start()
        self.loops.start(self.members.run(), "membership")
        self.loops.start(self.prober.run(), "prober")
        self.loops.start(self.upkeep.run(), "upkeep")
        self.loops.start(self.reporter.run(), "reporter")
        self.loops.start(self.totals.run(), "totals")
        await self.front.start(listening)

    async def reconfigure(self, config: Config) -> None:
        """Take over what of a new configuration is live (`proxy.config.reload`); requests under way end where they
        are.

        Raises ConfigError, and changes nothing, where it asks for what only a restart can do.
        """
        self.config = config
        self.members.adopt(config)
        self.names.add(pattern for pool in config.pools for pattern in pool.models)
        self.prices.adopt(rules_of(config.prices))
        self.contexts.adopt(_context_limits(config.contexts))
        self.context_api.adopt(config.contexts)
        self.front.authenticator = Authenticator(_clients(config), self._secret)

    def _meet(self, number: int) -> None:
        """A replica is new: ask what it can hold before it is given much."""
        self.loops.start(self.prober.learn(number), "engine facts")

    def _queues(self) -> None:
        """A queue for every replica that has none yet, and the limits in force for all."""
        limits = QueueLimits(self.config.queue.deadline_seconds, self.config.queue.max_waiting)
        for number in self.pools.served:
            limit = self.fleet.limit_of(number)
            if number in self.queues:
                self.queues[number].set_limits(limits)
                self.queues[number].set_limit(limit)
            else:
                self.queues[number] = ReplicaQueue(limit, limits, self.clock, partial(self._places, number))

    def _wait_seconds(self, number: int, uncached_tokens: float) -> float:
        """How long a prefill that is sent now takes at a replica, with all that is before it."""
        return self.fleet.wait_seconds(number, uncached_tokens, self.clock.monotonic())

    def _places(self, number: int, waiting: int) -> int | None:
        """This process's part of a replica's limit; the others are the writers of the journal."""
        informed = self.journal.state is JournalState.LIVE
        return self.fleet.places(number, 1 + self.journal.others, waiting, own_name=self.writer_id, informed=informed)

    async def close(self) -> None:
        """Stop in the reverse order; what was counted is reported first."""
        await self.front.stop(0)
        await self.loops.close()
        self.reporter.report()
        await self.totals.flush()
        await self.contexts.close()
        await self.board.close()
        await self.journal.close()
        await self.client.close()
        await self.store.close()
        await self.tasks.close()
        if self.access_log is not None:
            self.access_log.close()

    async def _run_own(self, exchange: Exchange, client: Downstream) -> None:
        """A request of Cairn's own, by the way of all requests."""
        await self.pipeline.run(exchange, client)

    async def _adopt_secret(self, store: Store) -> None:
        """Name tenants as all other proxies do, as soon as Redis tells how."""
        while self.config.tenants.secret is None:
            await store.wait_available()
            try:
                secret = await shared_secret(store)
            except CacheError:
                await asyncio.sleep(1.0)
                continue
            self._secret = secret
            self.front.authenticator = Authenticator(_clients(self.config), secret)
            return

    def _count_task_failure(self, name: str) -> None:
        self.recorder.inc(metrics.TASK_FAILURES, (name,))

    def _observe_redis(self, operation: str, seconds: float, error: ErrorKind | None) -> None:
        if operation not in _BLOCKING:
            self.recorder.observe(metrics.REDIS_DURATION, (operation,), seconds)
        # a script that Redis does not know yet is sent whole: no failure
        if error is not None and error is not ErrorKind.NOSCRIPT:
            self.recorder.inc(metrics.REDIS_ERRORS, (operation, error.value))


def _calm_collector() -> None:
    """What was built for the start lives as long as the process: keep the garbage collector off it, and make it rare.

    A full collection over a large index is a pause of tens of milliseconds; the path itself makes hardly any cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _new_id() -> str:
    return f"{random.getrandbits(128):032x}"


def _backoff(config: Config) -> Backoff:
    return Backoff(
        first_seconds=config.upstream.backoff_seconds,
        most_seconds=config.upstream.backoff_max_seconds,
        most_retry_after_seconds=config.upstream.retry_after_max_seconds,
    )


def _context_limits(settings: Contexts) -> ContextLimits:
    return ContextLimits(
        settings.total_bytes,
        settings.tenant_bytes,
        settings.pinned_bytes,
        settings.max_contexts,
        settings.max_tags,
        settings.grace_seconds,
        settings.memory_bytes,
        settings.warming_seconds,
    )


def _limits(config: Config) -> Limits:
    upstream = config.upstream
    return Limits(
        connect_seconds=upstream.connect_seconds,
        first_byte_seconds=upstream.first_byte_seconds,
        idle_seconds=upstream.idle_seconds,
        pool_wait_seconds=upstream.pool_seconds,
        max_connections=upstream.max_connections,
        idle_expiry_seconds=upstream.keepalive_seconds,
    )


def _trust(config: Config) -> Callable[[Origin], ssl.SSLContext]:
    """The machine's authorities and, where one is named, those of a file."""

    def context(origin: Origin) -> ssl.SSLContext:
        trusted = default_ssl_context(origin)
        if config.upstream.ca_file is not None:
            trusted.load_verify_locations(config.upstream.ca_file)
        return trusted

    return context


def _clients(config: Config) -> list[KnownClient]:
    return [
        KnownClient(bytes.fromhex(client.key_sha256), client.tenant or client.name, client.models)
        for client in config.clients
    ]

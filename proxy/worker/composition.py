"""The composition root of a worker: build every object once, in sections.

A section is a function that takes earlier sections and returns its own objects in a frozen dataclass. Nothing here
makes decisions about requests.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cache import (
    UNLIMITED_TOKENS,
    ColdClaims,
    ContextStore,
    Fingerprint,
    Journal,
    Listeners,
    LoadBroadcast,
    PrefixIndex,
    Totals,
    open_store,
    usable_key,
)
from proxy.accounting.access_log import FORMATS, AccessLog
from proxy.accounting.builtin_prices import BuiltinPrices
from proxy.accounting.counters import RequestCounters
from proxy.accounting.error_stats import ErrorStats
from proxy.accounting.prefix_stats import PrefixStats
from proxy.accounting.pricing import PriceBook
from proxy.accounting.rate_cards import rules_of
from proxy.accounting.round_robin import INDEX_BYTES_PER_PLACE, PLACES_SEEN, RoundRobinBaseline
from proxy.clock import SystemClock
from proxy.config.schema import Config
from proxy.contexts import StoredContexts
from proxy.contexts.api import ContextApi
from proxy.contexts.use import Use
from proxy.contexts.valuing import Valuing
from proxy.contexts.warming import Warming
from proxy.control.channel import WorkerControl
from proxy.fleet import Fleet
from proxy.fleet.discovery import Discovery
from proxy.fleet.findings import EngineFindings
from proxy.fleet.health import HealthChecker
from proxy.fleet.kubernetes import LIST_LIMITS, KubernetesApi, KubernetesEndpoints
from proxy.fleet.templates import Templates
from proxy.metrics import definitions as metrics
from proxy.metrics.model_labels import ModelNames
from proxy.metrics.recorder import Recorder
from proxy.pipeline.admission import InFlightLimit
from proxy.pipeline.attempt import Attempts
from proxy.pipeline.cold_turns import ColdTurns
from proxy.pipeline.dispatch import Dispatcher
from proxy.pipeline.models_endpoint import ModelsEndpoint
from proxy.pipeline.objects import CreatedObjects
from proxy.pipeline.pipeline import Pipeline
from proxy.pipeline.planner import Planner, PlanningRules
from proxy.pipeline.reader import RequestReader
from proxy.pipeline.relay import Relay
from proxy.pipeline.response_relay import ResponseRelay
from proxy.pipeline.routes import Routes
from proxy.pipeline.settlement import Settlement
from proxy.routing.cold_gate import ColdGate
from proxy.routing.fair_shares import TenantShares
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.queue_heads import QueueHeads
from proxy.routing.remote_prefills import RemotePrefills
from proxy.routing.token_estimate import TokenCounts
from proxy.tasks import Tasks
from proxy.upstream import Authorities, Origin, UpstreamClient
from proxy.worker import from_config
from proxy.worker.figures import Figures, GateFigures, IndexFigures, OperationFigures, ReplicaFigures, StoreFigures
from proxy.worker.http_server import HttpServer
from proxy.worker.live_config import LiveConfig, LiveParts
from proxy.worker.membership import DownReplicas, Forgetting, TurningAway
from proxy.worker.port_settings import port_settings
from proxy.worker.replica_queues import ReplicaQueues
from proxy.worker.reporting import Reporter, StatusSource
from proxy.worker.sections import (
    Accounting,
    Basics,
    Built,
    Contexts,
    Memory,
    OwnRequests,
    Parts,
    Replicas,
    Requests,
    Sharing,
)

if TYPE_CHECKING:
    from proxy.telemetry.traces import Traces

_ORIGIN_BITS = 24


def _basics() -> Basics:
    recorder = Recorder()

    def count_failure(name: str) -> None:
        recorder.inc(metrics.TASK_FAILURES, (name,))

    clock = SystemClock()
    return Basics(
        clock=clock,
        down_replicas=DownReplicas(clock.unix),
        recorder=recorder,
        tasks=Tasks(count_failure),
        loops=Tasks(count_failure),
        writer_id=secrets.token_hex(8),
    )


def _memory(config: Config, basics: Basics) -> Memory:
    url = config.redis.url
    store = open_store(
        None if url is None else url.reveal(),
        clock=basics.clock,
        tasks=basics.tasks,
        limit_seconds=config.redis.operation_seconds,
        observe=OperationFigures(basics.recorder).observe,
    )
    index = PrefixIndex(origin=secrets.randbits(_ORIGIN_BITS), max_bytes=config.routing.index_bytes)
    return Memory(store, index)


def _replicas(config: Config, basics: Basics, memory: Memory) -> Replicas:
    rule = config.routing
    fleet = Fleet(
        random.random,
        from_config.breaker_settings(config.upstream),
        rule.prefill_tokens_per_second,
        (rule.in_flight_seconds_least, rule.in_flight_seconds_most),
        basics.down_replicas.replica_changed,
    )
    limits = from_config.upstream_limits(config.upstream)
    return Replicas(
        fleet=fleet,
        discovery=Discovery(config, fleet, memory.index, basics.clock, endpoints=_endpoints(config, basics)),
        client=UpstreamClient(limits, basics.clock, Authorities(basics.clock, config.upstream.ca_file).tls_context),
        model_names=ModelNames(from_config.model_names(config)),
        templates=Templates(config),
    )


def _endpoints(config: Config, basics: Basics) -> KubernetesEndpoints:
    settings = config.kubernetes
    authorities = Authorities(basics.clock, settings.ca_file, only_file=True)
    api = KubernetesApi(
        UpstreamClient(LIST_LIMITS, basics.clock, authorities.tls_context),
        None if settings.api_url is None else Origin.parse(settings.api_url),
        None if settings.token_file is None else Path(settings.token_file),
        settings.namespace or "",
    )
    return KubernetesEndpoints(api, basics.loops, random.random)


def _sharing(config: Config, basics: Basics, memory: Memory, replicas: Replicas) -> Sharing:
    clock, fleet = basics.clock, replicas.fleet
    most_places = min(PLACES_SEEN, config.routing.index_bytes // INDEX_BYTES_PER_PLACE)
    baseline = RoundRobinBaseline(replicas.pools, most_places)
    gate = PrefillGate()
    remote_prefills = RemotePrefills(
        gate, lambda number, uncached_tokens: fleet.wait_seconds(number, uncached_tokens, clock.monotonic())
    )

    def placed(placement: int, replica: int, fingerprint: Fingerprint, prompt_tokens: float) -> None:
        baseline.placed(placement, replica, fingerprint, prompt_tokens)
        backend = replicas.pools.backends.get(replica)
        if backend is not None and not backend.is_provider:
            cold_gate.placed_elsewhere(backend.pool, fingerprint.hashes, prompt_tokens)

    def answered(replica: int, fingerprint: Fingerprint) -> None:
        backend = replicas.pools.backends.get(replica)
        if backend is not None and not backend.is_provider:
            cold_gate.ended(backend.pool, fingerprint.hashes[-1], replica)

    journal = Journal(
        memory.index,
        memory.store,
        basics.writer_id,
        clock=clock,
        tasks=basics.tasks,
        replicas=fleet,
        listeners=Listeners(placed=placed, prefills=remote_prefills, answered=answered),
    )
    journal.locations.limit(config.routing.max_objects)
    shares = TenantShares()
    cold_gate = ColdGate(
        fleet,
        lambda number: _capacity_tokens(memory.index, number),
        shares,
        ColdClaims(
            memory.store,
            basics.writer_id,
            clock=clock,
            tasks=basics.tasks,
            gone=lambda: fleet.lost_peers(clock.monotonic()),
        ),
        lambda: journal.others,
        basics.tasks.start,
        clock,
        lambda: load_broadcast.changed(),  # noqa: PLW0108 - it is made below
    )
    heads = QueueHeads()
    load_broadcast = _load_broadcast(basics, memory, journal, fleet, shares, cold_gate, heads)
    return Sharing(
        baseline=baseline,
        gate=gate,
        remote_prefills=remote_prefills,
        journal=journal,
        load_broadcast=load_broadcast,
        shares=shares,
        heads=heads,
        cold_gate=cold_gate,
    )


def _load_broadcast(
    basics: Basics,
    memory: Memory,
    journal: Journal,
    fleet: Fleet,
    shares: TenantShares,
    cold_gate: ColdGate,
    heads: QueueHeads,
) -> LoadBroadcast:
    clock = basics.clock

    def absorb(peer: str, rows: Mapping[str, tuple[float, ...]]) -> None:
        now_seconds = clock.monotonic()
        fleet.absorb(peer, rows, now_seconds)
        shares.absorb(peer, rows, now_seconds)
        heads.absorb(peer, rows, now_seconds)
        cold_gate.absorb(rows)
        cold_gate.changed()

    def forget(peer: str) -> None:
        fleet.forget_peer(peer)
        shares.forget(peer)
        heads.forget(peer)

    return LoadBroadcast(
        memory.store,
        basics.writer_id,
        clock=clock,
        tasks=basics.tasks,
        read=lambda: {**fleet.share(clock.monotonic()), **shares.rows(), **cold_gate.rows(), **heads.own_rows()},
        absorb=absorb,
        forget=forget,
        others=lambda: journal.others,
    )


def _capacity_tokens(index: PrefixIndex, number: int) -> float | None:
    """Return the tokens that a replica's cache holds, or None if that is not known."""
    tokens = index.budget_tokens(number)
    return None if tokens >= UNLIMITED_TOKENS else float(tokens)


def _accounting(
    basics: Basics,
    memory: Memory,
    replicas: Replicas,
    sharing: Sharing,
    prices: PriceBook,
    access_log: AccessLog | None,
) -> Accounting:
    token_counts = TokenCounts()
    totals = Totals(memory.store, basics.writer_id)
    prefix_stats = PrefixStats(replicas.model_names.label, basics.clock.unix)
    error_stats = ErrorStats(basics.clock.unix)
    counters = RequestCounters(
        recorder=basics.recorder,
        totals=totals,
        names=replicas.model_names,
        prices=prices,
        pools=replicas.pools,
        rate_of=replicas.fleet.measured_rate,
        unix_at=lambda seconds: basics.clock.unix() - basics.clock.monotonic() + seconds,
        errors=error_stats,
    )
    settlement = Settlement(
        journal=sharing.journal,
        fleet=replicas.fleet,
        tokens=token_counts,
        accounts=counters,
        prefix_stats=prefix_stats,
        baseline=sharing.baseline,
        access_log=access_log,
        clock=basics.clock,
    )
    return Accounting(
        token_counts=token_counts,
        prices=prices,
        totals=totals,
        prefix_stats=prefix_stats,
        error_stats=error_stats,
        access_log=access_log,
        settlement=settlement,
    )


def _contexts(config: Config, basics: Basics, memory: Memory, replicas: Replicas, accounting: Accounting) -> Contexts:
    recorder = basics.recorder
    store = ContextStore(
        memory.store,
        from_config.context_limits(config.contexts),
        clock=basics.clock,
        tasks=basics.tasks,
        evicted=lambda reason, number: recorder.inc(metrics.CONTEXTS_EVICTED, (reason,), number),
        damaged=lambda: recorder.inc(metrics.CONTEXTS_DAMAGED),
    )
    own_requests = OwnRequests()
    api = ContextApi(
        store,
        replicas.pools,
        accounting.token_counts,
        Valuing(accounting.prices, replicas.pools, replicas.fleet.rate_of, basics.clock),
        Warming(own_requests.run, _new_id, basics.clock),
        config.contexts,
        basics.tasks,
    )
    return Contexts(store, api, StoredContexts(store, api, Use(store), recorder), own_requests)


def _dispatcher(
    config: Config, basics: Basics, replicas: Replicas, sharing: Sharing, queues: ReplicaQueues, planner: Planner
) -> Dispatcher:
    def changed() -> None:
        sharing.load_broadcast.changed()
        sharing.cold_gate.changed()
        queues.look()

    attempts = Attempts(
        fleet=replicas.fleet,
        placements=sharing.journal,
        gate=sharing.gate,
        queues=queues.by_replica,
        changed=changed,
        clock=basics.clock,
    )
    replicas.fleet.listen(TurningAway(replicas.fleet, attempts, sharing.cold_gate).replica_changed)
    return Dispatcher(
        replicas.client,
        attempts,
        planner,
        replicas.fleet,
        replicas.pools,
        basics.recorder,
        basics.clock,
        from_config.retry_policy(config.upstream),
    )


def _relay(config: Config, basics: Basics, replicas: Replicas, sharing: Sharing, dispatcher: Dispatcher) -> Relay:
    responses = ResponseRelay(
        CreatedObjects(sharing.journal),
        replicas.fleet,
        replicas.model_names,
        basics.recorder,
        basics.clock,
        from_config.stream_limits(config.upstream),
        from_config.silence_watch(config.upstream, basics.clock),
    )
    return Relay(dispatcher, responses, basics.recorder, basics.clock)


def _requests(config: Config, secret: bytes, built: Built, traces: Traces | None) -> Requests:
    basics, replicas, sharing = built.basics, built.replicas, built.sharing
    clock = basics.clock
    queues = ReplicaQueues(
        replicas.fleet,
        replicas.pools,
        sharing.journal,
        clock,
        writer_id=basics.writer_id,
        shares=sharing.shares,
        heads=sharing.heads,
        is_engine=lambda number: _capacity_tokens(built.memory.index, number) is not None,
    )
    sharing.cold_gate.limits = gate_limits = from_config.gate_limits(config.admission)
    sharing.heads.attend(queues.rows)
    queues.set_limits(from_config.queue_limits(config.queue), gate_limits.pace)
    planner = Planner(
        replicas.fleet,
        built.memory.index,
        built.accounting.token_counts,
        sharing.gate,
        replicas.templates,
        clock,
        PlanningRules(
            config.routing.min_shareable_bytes,
            config.routing.future_weight_per_second,
            config.routing.session_headers,
        ),
        replicas.pools,
    )
    dispatcher = _dispatcher(config, basics, replicas, sharing, queues, planner)
    relay = _relay(config, basics, replicas, sharing, dispatcher)
    locations, number_of = sharing.journal.locations, replicas.fleet.number_of
    lists = replicas.fleet.models.lists
    reader = RequestReader(replicas.pools, number_of, lists, locations, config.server.allowed_paths)
    models_endpoint = ModelsEndpoint(replicas.client, replicas.pools, replicas.fleet, clock)
    settlement, stored = built.accounting.settlement, built.contexts.stored
    cold_turns = ColdTurns(sharing.cold_gate, planner, sharing.shares, queues.by_replica, clock)
    make_pipeline = Pipeline if traces is None else traces.pipeline
    pipeline = make_pipeline(reader, planner, relay, models_endpoint, settlement, stored, cold_turns)
    routes = Routes(config.server.engine_paths, config.server.allowed_paths, config.admin.port)
    in_flight_limit = InFlightLimit(config.server.max_in_flight_requests)
    authenticator = from_config.authenticator(config, secret)
    sharing.shares.set_weights(authenticator.weights())
    http_server = HttpServer(
        port_settings(config),
        routes=routes,
        authenticator=authenticator,
        room=in_flight_limit,
        pipeline=pipeline,
        recorder=basics.recorder,
        clock=clock,
        new_id=_new_id,
    )
    return Requests(
        queues=queues,
        dispatcher=dispatcher,
        routes=routes,
        pipeline=pipeline,
        in_flight_limit=in_flight_limit,
        http_server=http_server,
        traces=traces,
    )


def _traces(config: Config, basics: Basics, replicas: Replicas) -> Traces | None:
    """Return the objects that make and send traces; None, with nothing imported, if tracing is off."""
    if config.telemetry.endpoint is None:
        return None
    from proxy.telemetry.traces import Traces

    def address_of(number: int) -> tuple[str, int] | None:
        endpoint = replicas.pools.backends.get(number)
        return None if endpoint is None else (endpoint.origin.host, endpoint.origin.port)

    return Traces(config.telemetry, basics.writer_id, basics.clock, address_of)


def _findings(built: Built, requests: Requests) -> EngineFindings:
    replicas = built.replicas
    return EngineFindings(
        replicas.fleet,
        built.sharing.journal,
        replicas.model_names,
        requests.queues,
        requests.dispatcher,
        replicas.discovery,
    )


def _health(config: Config, built: Built, findings: EngineFindings) -> HealthChecker:
    replicas = built.replicas
    return HealthChecker(
        client=replicas.client,
        pools=replicas.pools,
        fleet=replicas.fleet,
        findings=findings,
        tasks=built.basics.loops,
        clock=built.basics.clock,
        limits=from_config.health_check_limits(config.upstream),
        busy_seconds=config.upstream.silence_seconds,
    )


def _reporter(control: WorkerControl, built: Built, requests: Requests) -> Reporter:
    basics, memory, replicas, sharing = built.basics, built.memory, built.replicas, built.sharing
    recorder, journal, contexts = basics.recorder, sharing.journal, built.contexts.store
    queues = requests.queues.by_replica
    figures = Figures(
        replicas=ReplicaFigures(recorder, replicas.fleet, replicas.pools, queues, basics.clock, replicas.templates),
        gate=GateFigures(recorder, sharing.cold_gate, replicas.pools, sharing.baseline),
        index=IndexFigures(recorder, memory.index, journal, replicas.pools, sharing.baseline),
        store=StoreFigures(
            recorder,
            memory.store,
            journal,
            contexts,
            (contexts, sharing.load_broadcast, built.accounting.totals),
        ),
    )
    accounting = built.accounting
    status = StatusSource(
        prefixes=accounting.prefix_stats,
        errors=accounting.error_stats,
        down=basics.down_replicas,
        index=memory.index,
        journal=journal,
        pools=replicas.pools,
        contexts=contexts,
    )
    return Reporter(
        control,
        recorder,
        figures,
        status,
        settled=built.accounting.settlement,
        requests=requests.in_flight_limit,
        access_log=built.accounting.access_log,
        failing_tasks=lambda: basics.tasks.restarting | basics.loops.restarting,
    )


def _live_config(config: Config, secret: bytes, built: Built, requests: Requests) -> LiveConfig:
    parts = LiveParts(
        http_server=requests.http_server,
        discovery=built.replicas.discovery,
        templates=built.replicas.templates,
        queues=requests.queues,
        cold_gate=built.sharing.cold_gate,
        shares=built.sharing.shares,
        model_names=built.replicas.model_names,
        prices=built.accounting.prices,
        contexts=built.contexts.store,
        context_api=built.contexts.api,
    )
    return LiveConfig(config, secret, parts)


async def build(config: Config, control: WorkerControl, *, access_log_descriptor: int = 1) -> Parts:
    """Build all parts of a worker; slow steps run in a thread."""
    builtin_prices = await asyncio.to_thread(BuiltinPrices)
    configured = config.tenants.secret
    # if none is configured, the one in Redis replaces this one as soon as Redis answers (`proxy.worker.lifecycle`)
    secret = secrets.token_bytes(32) if configured is None else usable_key(configured.reveal().encode())
    basics = _basics()
    memory = _memory(config, basics)
    replicas = _replicas(config, basics, memory)
    sharing = _sharing(config, basics, memory, replicas)
    prices = PriceBook(rules_of(config.prices), builtin_prices.card)
    access_log = AccessLog(access_log_descriptor, FORMATS[config.log.format]) if config.log.access else None
    accounting = _accounting(basics, memory, replicas, sharing, prices, access_log)
    contexts = _contexts(config, basics, memory, replicas, accounting)
    built = Built(basics, memory, replicas, sharing, accounting, contexts)
    traces = await asyncio.to_thread(_traces, config, basics, replicas)
    requests = _requests(config, secret, built, traces)
    contexts.own_requests.pipeline = requests.pipeline
    findings = _findings(built, requests)
    health = _health(config, built, findings)
    forgetting = Forgetting(
        replicas.client,
        requests.dispatcher,
        findings,
        accounting.settlement,
        basics.recorder,
        sharing.cold_gate,
        replicas.pools,
    )
    for listener in (requests.queues, health, forgetting):
        replicas.discovery.subscribe(listener)
    return Parts(
        built=built,
        requests=requests,
        health=health,
        reporter=_reporter(control, built, requests),
        live=_live_config(config, secret, built, requests),
    )


def _new_id() -> str:
    return f"{random.getrandbits(128):032x}"

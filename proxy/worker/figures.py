"""Read the gauges and totals that other parts of a worker keep, and put them into its recorder before each report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Sized
from typing import Protocol

import msgspec

from cache import BreakerState as StoreBreakerState
from cache import ErrorKind, IndexStats, JournalState, JournalStats, ReplicaStats, StoreState
from proxy.accounting.round_robin import RoundRobinBaseline
from proxy.clock import Clock
from proxy.control.messages import REDIS_UP, PoolReport
from proxy.fleet import BreakerState
from proxy.fleet.pools import Pools
from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import Labels, Spec
from proxy.metrics.recorder import Recorder
from proxy.model import OTHER_CLIENTS
from proxy.records import ReplicaView
from proxy.routing.cold_gate import ColdGate
from proxy.routing.fair_shares import Priority

_BREAKER_LEVELS = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}
_BLOCKING = frozenset({"XREAD"})  # waits for new entries by design, so its duration means nothing
_STORE_LEVELS = {StoreBreakerState.CLOSED: 0, StoreBreakerState.HALF_OPEN: 1, StoreBreakerState.OPEN: 2}


class Replicas(Protocol):
    """The part of `proxy.fleet.Fleet` that is reported."""

    def snapshot(self, pool: str, now_seconds: float) -> Sequence[ReplicaView]: ...
    def breaker_state(self, number: int, now_seconds: float) -> BreakerState: ...
    def may_be_tried(self, number: int) -> bool: ...
    def own_in_flight(self, number: int) -> int: ...
    def measured_rate(self, number: int) -> float | None: ...


class Rendering(Protocol):
    """The part of `proxy.fleet.templates.Templates` that is reported."""

    def mixed_models(self, pool: str) -> int: ...


class Index(Protocol):
    """The part of `cache.PrefixIndex` that is reported."""

    def replicas(self) -> Mapping[int, ReplicaStats]: ...
    def stats(self) -> IndexStats: ...


class Journal(Protocol):
    """The part of `cache.Journal` that is reported."""

    @property
    def state(self) -> JournalState: ...
    @property
    def others(self) -> int: ...
    @property
    def holds_lease(self) -> bool: ...
    @property
    def stats(self) -> JournalStats: ...


class Store(Protocol):
    """The part of `cache.Store` that is reported."""

    @property
    def state(self) -> StoreState: ...
    @property
    def breaker_state(self) -> StoreBreakerState: ...
    @property
    def reason(self) -> str | None: ...


class StoredTotals(Protocol):
    """The part of `cache.ContextStore` that is reported as gauges."""

    @property
    def total_contexts(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...


class Dropping(Protocol):
    """An object that counts what it drops."""

    @property
    def dropped(self) -> Mapping[str, int]: ...


class Growth:
    """Counts the growth of totals that other objects keep."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._totals: dict[tuple[str, Labels], int] = {}

    def count(self, spec: Spec, labels: Labels, total: int, *, is_ours: bool = True) -> None:
        """Add the growth of `total` since the last call, unless another worker counts it (`is_ours` is False)."""
        before = self._totals.get((spec.name, labels), 0)
        if total > before:
            self._totals[spec.name, labels] = total
            if is_ours:
                self._recorder.inc(spec, labels, total - before)

    def keep_only(self, spec: Spec, labels: Collection[Labels]) -> None:
        """Forget the totals of the other series of `spec`, which begin at zero if they come back."""
        for gone in [key for key in self._totals if key[0] == spec.name and key[1] not in labels]:
            del self._totals[gone]


class ReplicaFigures:
    """The gauges of all replicas."""

    def __init__(
        self,
        recorder: Recorder,
        replicas: Replicas,
        pools: Pools,
        queues: Mapping[int, Sized],
        clock: Clock,
        rendering: Rendering,
    ) -> None:
        self._recorder = recorder
        self._rendering = rendering
        self._replicas = replicas
        self._pools = pools
        self._queues = queues
        self._clock = clock

    def update(self) -> tuple[dict[str, bool], dict[str, PoolReport]]:
        """Set the gauges. Return whether each replica takes requests, by name, and whether one of each pool does.

        A replica that cannot be reached is not up either while its next probe is due, although a request might try
        it then: readiness and the alerts of a dead replica would be interrupted by each probe.
        """
        now_seconds = self._clock.monotonic()
        by_pool = {pool.name: self._replicas.snapshot(pool.name, now_seconds) for pool in self._pools.all}
        views = [view for pool_views in by_pool.values() for view in pool_views]
        up = {view.name: view.available and self._replicas.may_be_tried(view.id) for view in views}
        pools = {
            pool.name: PoolReport(any(up[view.name] for view in by_pool[pool.name]), pool.optional)
            for pool in self._pools.all
        }
        self._recorder.replace_gauges(
            metrics.POOL_REPLICAS_UP,
            {
                (pool.name, "true" if pool.optional else "false"): float(sum(up[v.name] for v in by_pool[pool.name]))
                for pool in self._pools.all
            },
        )
        self._recorder.replace_gauges(
            metrics.MIXED_TEMPLATES,
            {
                (pool.name,): float(self._rendering.mixed_models(pool.name))
                for pool in self._pools.all
                if not pool.is_provider
            },
        )
        rates = {view.name: self._replicas.measured_rate(view.id) for view in views}
        gauges: tuple[tuple[Spec, dict[str, float]], ...] = (
            (metrics.UPSTREAM_UP, {name: float(is_up) for name, is_up in up.items()}),
            (
                metrics.UPSTREAM_BREAKER,
                {v.name: _BREAKER_LEVELS[self._replicas.breaker_state(v.id, now_seconds)] for v in views},
            ),
            (metrics.UPSTREAM_IN_FLIGHT, {view.name: self._replicas.own_in_flight(view.id) for view in views}),
            (metrics.UPSTREAM_QUEUED, {view.name: len(self._queues[view.id]) for view in views}),
            (metrics.UPSTREAM_PENDING, {view.name: view.pending_tokens for view in views}),
            (metrics.UPSTREAM_RATE, {name: rate for name, rate in rates.items() if rate is not None}),
        )
        for spec, values in gauges:
            self._recorder.replace_gauges(spec, {(name,): value for name, value in values.items()})
        return up, pools


MAX_CLIENTS_SHOWN = 32
"""Most configured clients whose waiting prompts have a separate label; the others are counted together."""


class GateFigures:
    """The gauges and totals of the prompts that wait until a replica is quiet."""

    def __init__(self, recorder: Recorder, gate: ColdGate, pools: Pools, baseline: RoundRobinBaseline) -> None:
        self._recorder = recorder
        self._gate = gate
        self._pools = pools
        self._baseline = baseline
        self._gained_tokens = 0
        self._shown: set[str] = set()
        self._growth = Growth(recorder)

    def update(self) -> None:
        """Set the gauges, and count what was sent and refused since the last call."""
        gate, recorder = self._gate, self._recorder
        recorder.replace_gauges(metrics.COLD_WAITING, self._waiting(gate.waiting_by_client()))
        recorder.replace_gauges(metrics.WARM_WAITING, self._waiting(gate.warm_waiting_by_client()))
        gained = self._baseline.gained_tokens - self._gained_tokens
        self._gained_tokens += gained
        if gained and gate.is_holding:
            recorder.inc(metrics.THRASH_AVOIDED, (), gained)
        self._growth.count(metrics.COLD_ADMITTED, (), gate.admitted)
        self._growth.count(metrics.COLD_REFUSED, (), gate.refused)
        needs = {pool.name: gate.need(pool.name) for pool in self._pools.all if not pool.is_provider}
        recorder.replace_gauges(
            metrics.CACHE_NEED, {(name,): need for name, need in needs.items() if need is not None}
        )

    def _waiting(self, counts: Mapping[tuple[Priority, str], int]) -> dict[Labels, float]:
        """Return the gauges of waiting prompts; those of unnamed clients are always present."""
        waiting: dict[Labels, float] = {(each.name.lower(), OTHER_CLIENTS): 0.0 for each in Priority}
        for (priority, client), count in counts.items():
            if client and len(self._shown) < MAX_CLIENTS_SHOWN:
                self._shown.add(client)
            labels = (priority.name.lower(), client if client in self._shown else OTHER_CLIENTS)
            waiting[labels] = waiting.get(labels, 0.0) + count
        return waiting


class IndexFigures:
    """The gauges of the prefix index, and the evictions that it counts.

    Also passes the index's budgets on to the round-robin baseline.
    """

    def __init__(
        self, recorder: Recorder, index: Index, journal: Journal, pools: Pools, baseline: RoundRobinBaseline
    ) -> None:
        self._recorder = recorder
        self._growth = Growth(recorder)
        self._index = index
        self._journal = journal
        self._pools = pools
        self._baseline = baseline

    def update(self) -> None:
        """Set the gauges and count new evictions."""
        blocks: dict[Labels, float] = {}
        tokens: dict[Labels, float] = {}
        # every worker has the whole index, so only one of them counts evictions
        is_ours = self._journal.holds_lease or self._journal.state is not JournalState.LIVE
        replicas = self._index.replicas()
        self._baseline.follow(replicas)
        for number, stats in replicas.items():
            if number not in self._pools.served:
                continue
            name = self._pools.backends[number].name
            blocks[name,], tokens[name,] = stats.blocks, stats.tokens
            self._growth.count(metrics.INDEX_EVICTIONS, (name,), stats.evicted_blocks, is_ours=is_ours)
        backends = self._pools.backends
        known = {(backends[number].name,) for number in replicas if number in backends}
        self._growth.keep_only(metrics.INDEX_EVICTIONS, known)
        self._recorder.replace_gauges(metrics.INDEX_BLOCKS, blocks)
        self._recorder.replace_gauges(metrics.INDEX_TOKENS, tokens)
        self._recorder.set(metrics.INDEX_BYTES, (), self._index.stats().size_bytes)


class StoreFigures:
    """The gauges of Redis and of stored contexts, and what was discarded on the way to and from Redis."""

    def __init__(
        self,
        recorder: Recorder,
        store: Store,
        journal: Journal,
        contexts: StoredTotals,
        dropping: Sequence[Dropping] = (),
    ) -> None:
        self._dropping = dropping
        self._recorder = recorder
        self._growth = Growth(recorder)
        self._store = store
        self._journal = journal
        self._contexts = contexts

    @property
    def redis(self) -> str:
        """The state of Redis as this worker sees it: `REDIS_UP`, or the problem and its reason."""
        state, reason = self._store.state, self._store.reason
        if state is StoreState.AVAILABLE:
            return REDIS_UP
        return state.value if reason is None else f"{state.value} ({reason})"

    def update(self) -> None:
        """Set the gauges and count newly discarded updates."""
        stats = self._journal.stats
        self._recorder.set(metrics.REDIS_BREAKER, (), _STORE_LEVELS[self._store.breaker_state])
        self._recorder.set(metrics.CONTEXTS, (), self._contexts.total_contexts)
        self._recorder.set(metrics.CONTEXTS_BYTES, (), self._contexts.total_bytes)
        self._recorder.set(metrics.CONTEXT_MEMORY_BYTES, (), self._contexts.memory_bytes)
        self._recorder.set(metrics.JOURNAL_LAG, (), stats.lag_seconds)
        for reason, total in (
            ("queue", stats.dropped_queued),
            ("corrupt", stats.dropped_corrupt),
            ("invalid", stats.dropped_invalid),
            ("unknown_replica", stats.dropped_unknown),
            ("orphan", stats.dropped_orphans),
        ):
            self._growth.count(metrics.JOURNAL_DROPPED, (reason,), total)
        for each in self._dropping:
            for what, total in each.dropped.items():
                self._growth.count(metrics.REDIS_DROPPED, (what,), total)


class OperationFigures:
    """Counts the operations on Redis as they end."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def observe(self, operation: str, seconds: float, error: ErrorKind | None) -> None:
        """Count one operation, its duration and its error."""
        if operation not in _BLOCKING:
            self._recorder.observe(metrics.REDIS_DURATION, (operation,), seconds)
        # NOSCRIPT is not a failure: the script is then sent in full
        if error is not None and error is not ErrorKind.NOSCRIPT:
            self._recorder.inc(metrics.REDIS_ERRORS, (operation, error.value))


class Figures(msgspec.Struct, frozen=True):
    """Everything that is read before a report."""

    replicas: ReplicaFigures
    gate: GateFigures
    index: IndexFigures
    store: StoreFigures

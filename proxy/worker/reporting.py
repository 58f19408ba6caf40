"""What a worker tells its supervisor several times a second: counts, gauges, how it sees Redis and the replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from cache import BreakerState as StoreBreakerState
from cache import ContextStore, Journal, JournalState, PrefixIndex, Store, StoreState
from proxy.accounting.access_log import AccessLog
from proxy.accounting.prefix_stats import PrefixStats
from proxy.accounting.round_robin import RoundRobinBaseline
from proxy.clock import Clock
from proxy.control.channel import REDIS_UP, WorkerControl, WorkerReport
from proxy.fleet import BreakerState, Fleet
from proxy.fleet.pools import Pools
from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import Labels, Spec
from proxy.metrics.recorder import Recorder
from proxy.pipeline.admission import InFlightLimit
from proxy.pipeline.settlement import Settlement
from proxy.routing.replica_queue import ReplicaQueue

REPORT_SECONDS = 0.25
"""At most this much of what was counted is lost with a worker that is killed."""

_BREAKER_LEVELS = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}
_STORE_LEVELS = {StoreBreakerState.CLOSED: 0, StoreBreakerState.HALF_OPEN: 1, StoreBreakerState.OPEN: 2}


class Reporter:
    """One per worker."""

    def __init__(
        self,
        control: WorkerControl,
        settlement: Settlement,
        recorder: Recorder,
        fleet: Fleet,
        pools: Pools,
        index: PrefixIndex,
        journal: Journal,
        store: Store,
        room: InFlightLimit,
        access_log: AccessLog | None,
        contexts: ContextStore,
        sightings: PrefixStats,
        shadow: RoundRobinBaseline,
        queues: Mapping[int, ReplicaQueue],
        clock: Clock,
    ) -> None:
        self._control = control
        self._settlement = settlement
        self._recorder = recorder
        self._fleet = fleet
        self._index = index
        self._journal = journal
        self._store = store
        self._room = room
        self._sightings = sightings
        self._shadow = shadow
        self._queues = queues
        self._clock = clock
        self._access_log = access_log
        self._contexts = contexts
        self._totals: dict[tuple[str, Labels], int] = {}
        self.pools = pools

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self.report()

    def report(self) -> None:
        """One report; where the supervisor does not read, the counts stay for the next."""
        self._settlement.count()
        up = self._set_replica_gauges()
        self._set_index_figures()
        self._set_store_figures()
        self._recorder.set(metrics.IN_FLIGHT, (), self._room.requests)
        counts = self._recorder.take()
        redis = REDIS_UP if self._store.state is StoreState.AVAILABLE else self._redis_outage()
        if self._control.report(WorkerReport(counts, self._room.requests, redis, up, self._page())):
            self._sightings.reported()
        else:
            self._recorder.put_back(counts)

    def _redis_outage(self) -> str:
        state, reason = self._store.state.value, self._store.reason
        return state if reason is None else f"{state} ({reason})"

    def _page(self) -> dict[str, Any]:
        """What the status page shows beside counters; `proxy.admin.status.state.Page` reads it."""
        journal, now = self._journal, self._contexts.now()
        return {
            **self._sightings.report(),
            "budgets": {
                backend.name: stats.budget_tokens
                for number, stats in self._index.replicas().items()
                if (backend := self.pools.backends.get(number)) is not None
            },
            "contexts": [
                {
                    "model": row.head.model,
                    "status": row.status(now).value,
                    "tokens": row.tokens,
                    "size_bytes": row.size_bytes,
                    "pinned": row.pinned,
                    "worth_usd_per_hour": row.saving_usd_per_hour,
                    "expires_unix_seconds": row.expires_unix_seconds,
                }
                for row in self._contexts.most_worth
            ],
            "journal": {
                "state": journal.state.value,
                "others": journal.others,
                "holds_lease": journal.holds_lease,
                "written": journal.stats.written_entries,
                "read": journal.stats.read_entries,
                "rebuilds": journal.stats.rebuilds,
            },
        }

    def _set_replica_gauges(self) -> dict[str, bool]:
        now_seconds = self._clock.monotonic()
        up: dict[str, bool] = {}
        breaker: dict[Labels, float] = {}
        in_flight: dict[Labels, float] = {}
        queued: dict[Labels, float] = {}
        pending: dict[Labels, float] = {}
        rate: dict[Labels, float] = {}
        for pool in self.pools.all:
            for view in self._fleet.snapshot(pool.name, now_seconds):
                up[view.name] = view.available
                breaker[view.name,] = _BREAKER_LEVELS[self._fleet.breaker_state(view.id, now_seconds)]
                in_flight[view.name,] = self._fleet.own_in_flight(view.id)
                queued[view.name,] = len(self._queues[view.id])
                pending[view.name,] = view.pending_tokens
                if (measured := self._fleet.measured_rate(view.id)) is not None:
                    rate[view.name,] = measured
        self._recorder.replace_gauges(metrics.UPSTREAM_UP, {(name,): float(is_up) for name, is_up in up.items()})
        self._recorder.replace_gauges(metrics.UPSTREAM_BREAKER, breaker)
        self._recorder.replace_gauges(metrics.UPSTREAM_IN_FLIGHT, in_flight)
        self._recorder.replace_gauges(metrics.UPSTREAM_QUEUED, queued)
        self._recorder.replace_gauges(metrics.UPSTREAM_PENDING, pending)
        self._recorder.replace_gauges(metrics.UPSTREAM_RATE, rate)
        return up

    def _set_index_figures(self) -> None:
        blocks: dict[Labels, float] = {}
        tokens: dict[Labels, float] = {}
        # every worker has the whole index, so one of them counts for all
        speaks = self._journal.holds_lease or self._journal.state is not JournalState.LIVE
        replicas = self._index.replicas()
        self._shadow.follow(replicas)
        for number, stats in replicas.items():
            if number not in self.pools.served:
                continue
            backend = self.pools.backends[number]
            blocks[backend.name,], tokens[backend.name,] = stats.blocks, stats.tokens
            self._count_growth(metrics.INDEX_EVICTIONS, (backend.name,), stats.evicted_blocks, counts=speaks)
        self._recorder.replace_gauges(metrics.INDEX_BLOCKS, blocks)
        self._recorder.replace_gauges(metrics.INDEX_TOKENS, tokens)
        self._recorder.set(metrics.INDEX_BYTES, (), self._index.stats().size_bytes)

    def _set_store_figures(self) -> None:
        stats = self._journal.stats
        self._recorder.set(metrics.REDIS_BREAKER, (), _STORE_LEVELS[self._store.breaker_state])
        self._recorder.set(metrics.CONTEXTS, (), self._contexts.total_contexts)
        self._recorder.set(metrics.CONTEXTS_BYTES, (), self._contexts.total_bytes)
        self._recorder.set(metrics.JOURNAL_LAG, (), stats.lag_seconds)
        for reason, total in (
            ("queue", stats.dropped_queued),
            ("corrupt", stats.dropped_corrupt),
            ("invalid", stats.dropped_invalid),
            ("unknown_replica", stats.dropped_unknown),
            ("orphan", stats.dropped_orphans),
        ):
            self._count_growth(metrics.JOURNAL_DROPPED, (reason,), total)
        if self._access_log is not None:
            self._count_growth(metrics.LOG_DROPPED, (), self._access_log.dropped)

    def _count_growth(self, spec: Spec, labels: Labels, total: int, *, counts: bool = True) -> None:
        """Count what a total that others keep has grown by since the last report, unless another worker `counts`."""
        before = self._totals.get((spec.name, labels), 0)
        if total > before:
            self._totals[spec.name, labels] = total
            if counts:
                self._recorder.inc(spec, labels, total - before)

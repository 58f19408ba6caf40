"""Keep one queue per replica, with the limits in force."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Final

from cache import Journal, JournalState
from proxy.clock import Clock
from proxy.fleet import Fleet
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.routing.fair_shares import TenantShares
from proxy.routing.queue_heads import Head, QueueHeads, row_of
from proxy.routing.replica_queue import QueueLimits, ReplicaQueue

SENT_AHEAD: Final = (1.0, 4)
SENT_AHEAD_CONTENDED: Final = (0.1, 1)
"""Seconds of prefill, and requests without a first token, that a replica is sent before others wait here; the
second pair holds while several tenants are active. Both are for all processes together, since as much from each would
make a long queue in the engine. A burst reaches them all before they hear of each other, so each sends no more than
its part of the first pair, and one request. An engine serves in order of arrival, so only the queue here
can keep an order, and a tenant that arrives while another floods the replicas waits for all requests already
sent. With smaller values an engine could run out of work. The seconds are for a pace of 1.
"""

_NO_HEADS: Final[Mapping[str, Head]] = MappingProxyType({})


class ReplicaQueues:
    """The queues of all replicas, by the fleet's numbers in `by_replica`.

    Args:
        fleet: knows the limits and the work of each replica.
        pools: names the replicas that are served.
        journal: counts the other workers.
        clock: monotonic time.
        writer_id: this worker's name.
        shares: the tenants' shares.
        heads: the first requests that wait in other processes.
        is_engine: returns True if a replica has reported the capacity of its cache. An engine computes one prompt
            after another, but the servers behind another address, such as a provider's, may compute many at a time.
    """

    def __init__(
        self,
        fleet: Fleet,
        pools: Pools,
        journal: Journal,
        clock: Clock,
        *,
        writer_id: str,
        shares: TenantShares,
        heads: QueueHeads,
        is_engine: Callable[[int], bool],
    ) -> None:
        self._heads = heads
        self._is_engine = is_engine
        self._shares = shares
        self._fleet = fleet
        self._pools = pools
        self._journal = journal
        self._clock = clock
        self._writer_id = writer_id
        self._limits = QueueLimits()
        self._pace = 1.0
        self.by_replica: dict[int, ReplicaQueue] = {}
        self._in_use: dict[ReplicaQueue, None] = {}  # those in which requests wait

    def set_limits(self, limits: QueueLimits, pace: float = 1.0) -> None:
        """Use `limits` in all queues, and send ahead by the pace of the cold gate (`cold_turn.GateLimits`)."""
        self._limits = limits
        self._pace = pace
        self.update()

    def replicas_changed(self, joined: Sequence[int]) -> None:  # noqa: ARG002 - `update` finds what is new
        """Make queues for new replicas."""
        self.update()

    def replica_forgotten(self, number: int, endpoint: ReplicaEndpoint) -> None:  # noqa: ARG002
        """Drop the queue of a replica that is gone for good."""
        self.by_replica.pop(number, None)

    def update(self) -> None:
        """Make a queue for every new replica, and take over the limits of concurrent work that the fleet knows."""
        for number in self._pools.served:
            limit = self._fleet.limit_of(number)
            queue = self.by_replica.get(number)
            if queue is None:
                self.by_replica[number] = ReplicaQueue(
                    limit,
                    self._limits,
                    self._clock,
                    partial(self._places, number),
                    shares=self._shares,
                    is_crowded=partial(self._is_crowded, number),
                    is_crowded_by_others=partial(self.is_crowded_by_others, number),
                    heads=partial(self._heads_at, number),
                    in_use=self._in_use,
                )
            else:
                queue.set_limits(self._limits)
                queue.set_limit(limit)

    def look(self) -> None:
        """Let waiting requests check whether there is room now, since work ended in some process."""
        if self._in_use:
            for queue in tuple(self._in_use):
                queue.look()

    def rows(self) -> dict[str, tuple[float, ...]]:
        """Return the first request that waits for each replica, for the other processes."""
        rows: dict[str, tuple[float, ...]] = {}
        if self._in_use:
            for number, queue in self.by_replica.items():
                if queue in self._in_use and (head := queue.head()) is not None:
                    name, row = row_of(self._fleet.name_of(number) or "", head)
                    rows[name] = row
        return rows

    def _heads_at(self, number: int) -> Mapping[str, Head]:
        if not len(self._heads):
            return _NO_HEADS  # nearly always, and this is asked for each request
        return self._heads.at(self._fleet.name_of(number) or "", self._clock.monotonic())

    def _is_crowded(self, number: int) -> bool:
        """Return True if a replica has enough work: more would wait there, in order of arrival."""
        fleet = self._fleet
        unanswered = fleet.unanswered(number)
        if unanswered < SENT_AHEAD_CONTENDED[1] or not self._keeps_order(number):
            return False
        now_seconds = self._clock.monotonic()
        if self._shares.is_contended(now_seconds):
            return fleet.sent_seconds(number, now_seconds) > SENT_AHEAD_CONTENDED[0] * self._pace
        processes = 1 + self._journal.others
        if unanswered < SENT_AHEAD[1] // processes:
            return False
        seconds = SENT_AHEAD[0] * self._pace
        return (
            fleet.sent_seconds(number, now_seconds) > seconds
            or fleet.own_sent_seconds(number, now_seconds) > seconds / processes
        )

    def is_crowded_by_others(self, number: int) -> bool:
        """Return True if a replica has enough work of all processes."""
        unanswered = self._fleet.least_unanswered(number)
        if unanswered < SENT_AHEAD_CONTENDED[1] or not self._keeps_order(number):
            return False
        now_seconds = self._clock.monotonic()
        seconds, requests = SENT_AHEAD_CONTENDED if self._shares.is_contended(now_seconds) else SENT_AHEAD
        return unanswered >= requests and self._fleet.sent_seconds(number, now_seconds) > seconds * self._pace

    def _keeps_order(self, number: int) -> bool:
        """Return True if a replica serves in order of arrival, so that more would wait there in that order."""
        return self._fleet.limit_of(number) is not None or self._is_engine(number)

    def _places(self, number: int, waiting: int, is_first: bool) -> int | None:
        """Return this worker's share of a replica's limit; the other shares belong to the journal's other writers."""
        others = self._journal.others
        is_informed = self._journal.state is JournalState.LIVE
        return self._fleet.places(
            number, 1 + others, waiting, own_name=self._writer_id, informed=is_informed, is_first=is_first
        )

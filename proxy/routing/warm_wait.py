"""Let warm turns wait before they are placed, so that they are judged again when their replica can compute them.

Under pressure a turn that is warm when it arrives may be evicted while it waits: the engine keeps only what runs.
Sent at once, it would be computed as a whole, before the cold turns that wait for a quiet replica, and evict others.
So it waits here, in one queue per replica with the order of `replica_queue`, until its replica has hardly anything
left to compute. Then it is looked up again: still warm it is sent at once, otherwise it waits as a cold turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from proxy.clock import Clock
from proxy.errors import Overloaded, RateLimited
from proxy.routing.fair_shares import Share, TenantShares
from proxy.routing.replica_queue import QueueLimits, ReplicaQueue

PATIENCE_SECONDS: Final = 120.0
"""After this time a turn is judged again even if its replica is busy."""

MAX_WAITING: Final = 1_024
"""Turns that wait for one replica; beyond that they are sent at once."""

_LIMITS: Final = QueueLimits(PATIENCE_SECONDS, MAX_WAITING)


class SentWork(Protocol):
    """The part of `proxy.fleet.Fleet` that shows whether a replica is busy."""

    def sent_seconds(self, number: int, now_seconds: float) -> float: ...


class WarmQueues:
    """The warm turns that wait in this worker.

    Args:
        work: shows the work that was sent to a replica.
        shares: the tenants' shares.
        quiet_seconds: returns the seconds of work up to which a replica takes a turn.
        clock: monotonic time.
    """

    def __init__(
        self, work: SentWork, shares: TenantShares, quiet_seconds: Callable[[], float], clock: Clock
    ) -> None:
        self._work = work
        self._shares = shares
        self._quiet_seconds = quiet_seconds
        self._clock = clock
        self._queues: dict[int, ReplicaQueue] = {}

    def waiting(self, replica: int) -> int:
        """Count the turns that wait for a replica."""
        queue = self._queues.get(replica)
        return 0 if queue is None else len(queue)

    def is_busy(self, replica: int) -> bool:
        """Return True if a replica has too much work for one more turn, or if others wait for it already."""
        return self.waiting(replica) > 0 or self._has_work(replica)

    def sent_seconds(self, replica: int, now_seconds: float) -> float:
        """Return the seconds of prefill that were sent to a replica and are not done."""
        return self._work.sent_seconds(replica, now_seconds)

    async def wait(
        self, replica: int, work_seconds: float, share: Share, deadline_seconds: float | None = None
    ) -> None:
        """Wait until a replica can compute a turn of `work_seconds`, or until the patience ends.

        Raises DeadlineUnreachable if `deadline_seconds`, on the monotonic clock, passes first.
        """
        queue = self._queues.get(replica)
        if queue is None:
            queue = self._queues[replica] = ReplicaQueue(
                None,
                _LIMITS,
                self._clock,
                _unlimited,  # so that it checks whether the replica has become quiet
                shares=self._shares,
                is_crowded=partial(self._has_work, replica),
            )
        try:
            await queue.acquire(work_seconds, share, deadline_seconds)
        except (Overloaded, RateLimited):
            return
        finally:
            if not len(queue):
                self._queues.pop(replica, None)

    def look(self) -> None:
        """Let turns go whose replica is quiet now, since work ended somewhere."""
        for queue in tuple(self._queues.values()):
            queue.look()

    def _has_work(self, replica: int) -> bool:
        return self._work.sent_seconds(replica, self._clock.monotonic()) > self._quiet_seconds()


def _unlimited(waiting: int) -> int | None:
    del waiting
    return None

"""Let warm turns wait before they are placed, so that they are judged again when their replica can compute them.

Under pressure a turn that is warm when it arrives may be evicted while it waits: the engine keeps only what runs.
Sent at once, it would be computed as a whole, before the cold turns that wait for a quiet replica, and evict others.
So it waits here, in one queue per replica with the order of `replica_queue`, until its replica has hardly anything
left to compute. Then it is looked up again: still warm it is sent at once, otherwise it waits as a cold turn.
If the replica is down or removed, or the gate is switched off, it is looked up again at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from proxy.clock import Clock
from proxy.errors import Overloaded, RateLimited
from proxy.routing.cold_turn import GateLimits
from proxy.routing.fair_shares import Priority, Share, TenantShares
from proxy.routing.replica_queue import QueueLimits, ReplicaQueue

PATIENCE_SECONDS: Final = 120.0
"""After this time a turn is judged again even if its replica is busy."""

AGEING: Final = 0.01
"""Seconds of work that one second of waiting is worth, a tenth of that in other queues: a prompt whose end was
evicted goes after those that are still held as a whole, so that these stay so. With 0.1, 5 % fewer turns are served.
After half of `PATIENCE_SECONDS` the order is that of arrival.
"""

MAX_WAITING: Final = 1_024
"""Turns that wait for one replica; beyond that they are sent at once."""


class SentWork(Protocol):
    """The part of `proxy.fleet.Fleet` that shows whether a replica is busy."""

    def sent_seconds(self, number: int, now_seconds: float) -> float: ...
    def is_used(self, number: int) -> bool: ...


class _Line:
    """The turns that wait for one replica, and those that were let go and whose tasks have not run yet."""

    __slots__ = ("queue", "turns", "work_seconds")

    def __init__(self, queue: ReplicaQueue) -> None:
        self.queue = queue
        self.turns = 0
        self.work_seconds = [0.0] * len(Priority)


class WarmQueues:
    """The warm turns that wait in this worker.

    Args:
        work: shows the work that was sent to a replica.
        shares: the tenants' shares.
        limits: returns the gate's limits in force.
        clock: monotonic time.
    """

    def __init__(self, work: SentWork, shares: TenantShares, limits: Callable[[], GateLimits], clock: Clock) -> None:
        self._work = work
        self._shares = shares
        self._limits = limits
        self._clock = clock
        self._lines: dict[int, _Line] = {}

    def waiting(self, replica: int) -> int:
        """Count the turns that wait for a replica, and those that were let go and are to be judged again."""
        line = self._lines.get(replica)
        return 0 if line is None else line.turns

    def is_busy(self, replica: int) -> bool:
        """Return True if a replica has too much work for one more turn, or if others wait for it already."""
        return self.waiting(replica) > 0 or self._has_work(replica)

    def sent_seconds(self, replica: int, now_seconds: float) -> float:
        """Return the seconds of prefill that were sent to a replica and are not done."""
        return self._work.sent_seconds(replica, now_seconds)

    def wait_seconds(self, replica: int, priority: Priority = Priority.NORMAL) -> float:
        """Estimate how long a turn would wait for a replica: until the work sent there and before it is done."""
        if not self.is_busy(replica):
            return 0.0
        line, sent = self._lines.get(replica), self.sent_seconds(replica, self._clock.monotonic())
        before = 0.0 if line is None else sum(line.work_seconds[: priority + 1])
        return max(sent + before - self._limits().quiet_seconds, 0.0)

    async def wait(
        self, replica: int, work_seconds: float, share: Share, deadline_seconds: float | None = None
    ) -> None:
        """Wait until a replica can compute a turn of `work_seconds`, or until the patience ends.

        Raises DeadlineUnreachable if `deadline_seconds`, on the monotonic clock, passes first.
        """
        line = self._lines.get(replica)
        if line is None:
            line = self._lines[replica] = _Line(self._make_queue(replica))
        line.turns += 1
        line.work_seconds[share.priority] += work_seconds
        try:
            await line.queue.acquire(work_seconds, share, deadline_seconds)
        except (Overloaded, RateLimited):
            return
        finally:
            line.turns -= 1
            line.work_seconds[share.priority] -= work_seconds
            if not line.turns:
                del self._lines[replica]

    def look(self) -> None:
        """Let turns go whose replica is quiet now, since work ended somewhere."""
        for line in tuple(self._lines.values()):
            line.queue.look()

    def _make_queue(self, replica: int) -> ReplicaQueue:
        return ReplicaQueue(
            None,
            QueueLimits(PATIENCE_SECONDS * self._limits().pace, MAX_WAITING),
            self._clock,
            _unlimited,  # so that it checks whether the replica has become quiet
            shares=self._shares,
            is_crowded=partial(self._has_work, replica),
            ageing=AGEING,
        )

    def _has_work(self, replica: int) -> bool:
        work, limits = self._work, self._limits()
        return (
            limits.enabled
            and work.is_used(replica)
            and work.sent_seconds(replica, self._clock.monotonic()) > limits.quiet_seconds
        )


def _unlimited(waiting: int, is_first: bool) -> int | None:
    del waiting, is_first
    return None

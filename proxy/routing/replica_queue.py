"""Where a request waits for a replica whose concurrent work is limited; the order is `proxy.routing.shortest_job`'s.

One `ReplicaQueue` a replica and process. It wakes by events only: the end of a request, a raised limit, a deadline.
It must not know what a request is beyond its seconds of work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from proxy.clock import Clock
from proxy.errors import CairnError, Overloaded, RateLimited
from proxy.routing.shortest_job import ShortestJobQueue

RECHECK_SECONDS: Final = 0.05
"""While requests wait, this often it is asked whether other processes leave places free."""

LOOKS_BEFORE_BORROWING: Final = 2
"""A burst reaches all processes together and their news is some 10 ms old, later where a loop is busy: so nobody
takes more than its share before it had the time to hear of the others."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """`deadline_seconds` a request waits at most; `most_waiting` requests wait at most."""

    deadline_seconds: float = 120.0
    most_waiting: int = 1_024


class Permit:
    """One request at its replica, from its turn on; `async with` or `done` gives the place to the next."""

    __slots__ = ("_queue",)

    def __init__(self, queue: ReplicaQueue) -> None:
        self._queue: ReplicaQueue | None = queue

    def done(self) -> None:
        """The request is over. May come twice."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue._ended()

    async def __aenter__(self) -> Permit:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.done()


class ReplicaQueue:
    """Lets at most `limit` requests be at a replica; without a limit it lets everything pass at once.

    `places`, where given, tells how many of them may be this process's now; it is told how many wait here.
    """

    def __init__(
        self,
        limit: int | None,
        limits: QueueLimits,
        clock: Clock,
        places: Callable[[int], int | None] | None = None,
    ) -> None:
        self._limit = limit
        self._limits = limits
        self._clock = clock
        self._places = places
        self._recheck_due = False
        self._looks = 0
        self._line: ShortestJobQueue[asyncio.Future[None]] = ShortestJobQueue(limits.deadline_seconds)
        self._running = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._line)

    @property
    def running(self) -> int:
        """Requests whose turn it is or was, and that have not ended."""
        return self._running

    def try_turn(self) -> Permit | None:
        """A turn at once, where nobody would have to wait: the common case, without an await."""
        if self._limit is None or (not len(self._line) and self._has_room()):
            self._running += 1
            return Permit(self)
        return None

    async def turn(self, work_seconds: float) -> Permit:
        """Wait for one's turn; `work_seconds` is uncached tokens over the replica's rate.

        Raises `RateLimited` where too many wait, `Overloaded` at the deadline, and what `fail` was given. A caller
        that is cancelled is gone from the line.
        """
        turn = self.try_turn()
        if turn is not None:
            return turn
        if len(self._line) >= self._limits.most_waiting:
            raise RateLimited(
                "Too many requests wait for a replica.", retry_after_seconds=self._retry_after_seconds()
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        place = self._line.join(future, work_seconds, self._clock.monotonic())
        alarm = loop.call_later(self._limits.deadline_seconds, self._too_late, future)
        self._look_again_soon()
        try:
            await future
        except BaseException:
            # the turn may have been given in the same moment in which the caller was cancelled
            if future.done() and not future.cancelled() and future.exception() is None:
                self._ended()
            raise
        finally:
            alarm.cancel()
            self._line.leave(place)
        return Permit(self)

    def set_limit(self, limit: int | None) -> None:
        """Another limit of the replica."""
        self._limit = limit
        self._wake()

    def adopt(self, limits: QueueLimits) -> None:
        """Other bounds, from the next request on."""
        self._limits = limits
        self._line.deadline_seconds = limits.deadline_seconds

    def fail(self, error: CairnError) -> None:
        """The replica is down: every waiting request gets `error` now, and may go elsewhere."""
        while (future := self._line.next(self._clock.monotonic())) is not None:
            if not future.done():
                future.set_exception(error)

    def _ended(self) -> None:
        self._running -= 1
        self._wake()

    def _has_room(self) -> bool:
        if self._limit is None:
            return True
        waiting = len(self._line) if self._looks >= LOOKS_BEFORE_BORROWING else 0
        places = self._limit if self._places is None else self._places(waiting)
        return places is None or self._running < places

    def _look_again_soon(self) -> None:
        if self._places is not None and not self._recheck_due:
            self._recheck_due = True
            asyncio.get_running_loop().call_later(RECHECK_SECONDS, self._look_again)

    def _look_again(self) -> None:
        self._recheck_due = False
        self._looks += 1
        self._wake()
        if len(self._line):
            self._look_again_soon()
        else:
            self._looks = 0

    def _wake(self) -> None:
        while len(self._line) and self._has_room():
            future = self._line.next(self._clock.monotonic())
            if future is not None and not future.done():
                self._running += 1
                future.set_result(None)

    def _too_late(self, future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_exception(
                Overloaded(
                    "The request waited too long for a replica.", retry_after_seconds=self._retry_after_seconds()
                )
            )

    def _retry_after_seconds(self) -> float:
        """A hint: a tenth of what waiting may take at all."""
        return max(1.0, self._limits.deadline_seconds / 10)

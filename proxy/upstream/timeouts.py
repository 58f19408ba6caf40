"""One timer for all connections of a client, so that requests and pieces of streams do not set their own.

Each connection has a deadline for what it waits for, and moves it by plain assignment. The timer fires at the
earliest deadline known when it was set, checks all connections, and is set again. Deadlines mostly move later, so the
timer is touched about once per shortest limit, and idle streams cost nothing.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final, Protocol

from proxy.clock import Clock
from proxy.timers import DeadlineTimer

_SLACK_SECONDS: Final = 0.01  # a timer that fires slightly early would only be set again


class Watched(Protocol):
    """Something that can miss a deadline."""

    deadline: float  # monotonic, math.inf while nothing is awaited

    def expire(self) -> None:
        """Handle a missed deadline."""
        ...

    def close(self) -> None:
        """Close, and end any exchange in progress."""
        ...


class Deadlines:
    """The timer and what it watches. `next_at` is when it fires next, math.inf while it is not set."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self.next_at = math.inf
        self._loop = loop
        self._clock = clock
        self._timer = DeadlineTimer(loop, self.ring)
        self._watched: set[Watched] = set()
        self._all_gone: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def add(self, watched: Watched) -> None:
        """Watch it from now on."""
        self._watched.add(watched)

    def discard(self, watched: Watched) -> None:
        """Stop watching it."""
        self._watched.discard(watched)
        if self._all_gone is not None and not self._watched and not self._all_gone.done():
            self._all_gone.set_result(None)

    def arm(self, deadline: float) -> None:
        """Fire at `deadline` at the latest."""
        if deadline >= self.next_at:
            return
        self.next_at = deadline
        self._timer.start(max(0.0, deadline - self._clock.monotonic()) + _SLACK_SECONDS)

    def ring(self) -> None:
        """Expire everything that is late and set the timer for the earliest of the rest."""
        self.stop()
        now = self._clock.monotonic()
        for watched in tuple(self._watched):
            if watched.deadline <= now:
                watched.expire()
        self.arm(min((watched.deadline for watched in self._watched), default=math.inf))

    def stop(self) -> None:
        """Do not fire until armed again."""
        self._timer.cancel()
        self.next_at = math.inf

    async def close(self) -> None:
        """Close everything that is watched and wait until all of it is closed."""
        self.stop()
        for watched in tuple(self._watched):
            watched.close()
        if self._watched:
            self._all_gone = self._loop.create_future()
            await self._all_gone

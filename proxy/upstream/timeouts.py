"""One timer for all connections of a client, so that no request and no piece of a stream sets one of its own.

Each connection carries the moment at which what it waits for is late, and moves it by plain assignment. The timer
rings at the earliest moment known when it was set, looks at all, and is set anew. Moments mostly move later, so the
timer is touched about once per shortest limit, and idle streams cost nothing.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final, Protocol

from proxy.clock import Clock

_SLACK_SECONDS: Final = 0.01  # a timer that rings a hair early would only be set again


class Watched(Protocol):
    """What can be late."""

    deadline: float  # monotonic, math.inf where nothing is awaited

    def expire(self) -> None:
        """The deadline has passed."""
        ...

    def close(self) -> None:
        """End, whatever is under way."""
        ...


class Deadlines:
    """The timer and those it watches. `next_at` is when it rings next, math.inf where it is not set."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self.next_at = math.inf
        self._loop = loop
        self._clock = clock
        self._timer: asyncio.TimerHandle | None = None
        self._watched: set[Watched] = set()
        self._all_gone: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def add(self, watched: Watched) -> None:
        """Look at it from now on."""
        self._watched.add(watched)

    def discard(self, watched: Watched) -> None:
        """Never look at it again."""
        self._watched.discard(watched)
        if self._all_gone is not None and not self._watched and not self._all_gone.done():
            self._all_gone.set_result(None)

    def arm(self, deadline: float) -> None:
        """Ring at `deadline` at the latest."""
        if deadline >= self.next_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self.next_at = deadline
        delay_seconds = max(0.0, deadline - self._clock.monotonic()) + _SLACK_SECONDS
        self._timer = self._loop.call_later(delay_seconds, self.ring)

    def ring(self) -> None:
        """Expire all that is late, and set the timer for the earliest of the rest."""
        self.stop()
        now = self._clock.monotonic()
        for watched in tuple(self._watched):
            if watched.deadline <= now:
                watched.expire()
        self.arm(min((watched.deadline for watched in self._watched), default=math.inf))

    def stop(self) -> None:
        """Ring no more until armed again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.next_at = math.inf

    async def close(self) -> None:
        """End all that is watched; return when nothing is any more."""
        self.stop()
        for watched in tuple(self._watched):
            watched.close()
        if self._watched:
            self._all_gone = self._loop.create_future()
            await self._all_gone

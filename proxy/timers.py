"""A timer for deadlines of what comes from sockets, which a pause of the process does not make unjust."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

_LATE_SECONDS: Final = 0.1  # more than a busy loop's timers are late by
_READ_SECONDS: Final = 0.01  # the loop polls its sockets at least once meanwhile


class DeadlineTimer:
    """Calls `ring` after a delay, once the event loop has read what had arrived by then.

    An event loop handles its timers before its sockets. After a pause of the process, or a slow callback, every
    deadline has passed, although what was awaited may have come in time and lie unread in a socket. A timer that is
    late is therefore put off once, for one turn of the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._due_seconds = 0.0

    def start(self, delay_seconds: float) -> None:
        """Ring after `delay_seconds` from now, and no longer when it was to ring before."""
        self.cancel()
        self._due_seconds = self._loop.time() + delay_seconds
        self._handle = self._loop.call_later(delay_seconds, self._due)

    def cancel(self) -> None:
        """Do not ring until started again."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _due(self) -> None:
        if self._loop.time() - self._due_seconds > _LATE_SECONDS:
            self._handle = self._loop.call_later(_READ_SECONDS, self._now)
        else:
            self._now()

    def _now(self) -> None:
        self._handle = None
        self._ring()

"""The connections of one origin: which is used next, who waits, and when a stream's connection is trusted again.

It decides and counts; it opens no socket. A slot is one connection, being opened or open; it is given back exactly
once, when the connection is closed or could not be opened.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Final

from proxy.errors import PoolTimeout
from proxy.upstream.connection import Connection
from proxy.upstream.origin import Limits

PROBATION_SECONDS = 0.1  # llama.cpp closes within a millisecond of a stream's end
TRUSTED_AFTER: Final = 3  # streams in a row whose connection outlived its probation


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """A pool at one moment; `opened`, `reused` and `retried` only ever grow."""

    open: int  # connections being opened or open: idle, on probation or in use
    idle: int
    in_use: int
    waiting: int
    opened: int
    reused: int
    retried: int


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request in line. Its future gets an idle connection, or None for leave to open one."""

    future: asyncio.Future[Connection | None]
    fresh: bool


class Pool:
    """The pool of one origin; last in, first out, so that the surplus of a burst grows old and expires."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        self._loop = loop
        self._limits = limits
        self._idle: list[Connection] = []
        self._probation: dict[Connection, asyncio.TimerHandle] = {}
        self._waiters: deque[_Waiter] = deque()
        self._open = 0
        self._streams_kept = 0
        self.opened = 0
        self.reused = 0
        self.retried = 0

    @property
    def counts(self) -> PoolCounts:
        """The pool at this moment."""
        aside = len(self._idle) + len(self._probation)
        waiting = len(self._waiters)
        return PoolCounts(self._open, aside, self._open - aside, waiting, self.opened, self.reused, self.retried)

    @property
    def keeps_streams(self) -> bool:
        """True where this upstream is known to leave a connection open after a streamed answer."""
        return self._streams_kept >= TRUSTED_AFTER

    def take(self) -> Connection | None:
        """The connection used last, if one is idle."""
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                self.reused += 1
                return connection
            connection.close()
        return None

    async def obtain(self, *, fresh: bool) -> Connection | None:
        """An idle connection, or None: then the caller holds a slot and opens one (or calls `vacate`).

        Waits where all slots are taken. Raises PoolTimeout where the line is too long or did not move in time.
        `fresh` refuses connections that have served before.
        """
        while True:
            if not fresh and (connection := self.take()) is not None:
                return connection
            if self._open >= self._limits.max_connections:
                self._make_room()
            if self._open < self._limits.max_connections:
                self._open += 1
                return None
            granted = await self._wait(fresh)
            if granted is None or granted.usable:
                return granted

    def vacate(self) -> None:
        """Give a slot back; whoever has waited longest gets it."""
        self._open -= 1
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.future.done():
                self._open += 1
                waiter.future.set_result(None)
                return

    def finished(self, connection: Connection, *, reusable: bool, was_stream: bool) -> None:
        """Put a connection whose answer is whole where it belongs."""
        if not reusable:
            connection.close()
        elif was_stream and not self.keeps_streams:
            self._put_on_probation(connection)
        else:
            self._put_back(connection)

    def left(self, connection: Connection) -> None:
        """A connection closed: forget it and free its slot."""
        timer = self._probation.pop(connection, None)
        if timer is not None:
            timer.cancel()
        elif connection in self._idle:
            self._idle.remove(connection)
        if connection.dropped_after_stream:
            self._streams_kept = 0
        self.vacate()

    def close(self) -> None:
        """Refuse all who wait."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.future.done():
                waiter.future.set_exception(PoolTimeout("the client is closing"))

    def _put_on_probation(self, connection: Connection) -> None:
        if self._waiters:
            connection.close()
            return
        connection.rest(self._limits.idle_expiry_seconds)
        self._probation[connection] = self._loop.call_later(PROBATION_SECONDS, self._passed, connection)

    def _passed(self, connection: Connection) -> None:
        """Still open: the upstream did not close it behind its stream."""
        del self._probation[connection]
        self._streams_kept += 1
        self._put_back(connection)

    def _put_back(self, connection: Connection) -> None:
        while self._waiters and self._waiters[0].future.done():
            self._waiters.popleft()
        if self._waiters and not self._waiters[0].fresh:
            self._waiters.popleft().future.set_result(connection)
        elif self._waiters or len(self._idle) >= self._limits.max_idle or not connection.usable:
            connection.close()
        else:
            connection.rest(self._limits.idle_expiry_seconds)
            self._idle.append(connection)

    def _make_room(self) -> None:
        """Close what nobody uses: the oldest on probation, else the oldest idle."""
        oldest = next(iter(self._probation), None) or (self._idle[0] if self._idle else None)
        if oldest is not None:
            oldest.close()

    async def _wait(self, fresh: bool) -> Connection | None:
        if len(self._waiters) >= self._limits.max_waiting:
            raise PoolTimeout("too many requests wait for a connection to the upstream")
        waiter = _Waiter(self._loop.create_future(), fresh)
        self._waiters.append(waiter)
        timer = self._loop.call_later(self._limits.pool_wait_seconds, _time_out, waiter.future)
        try:
            return await waiter.future
        except BaseException:
            self._give_back(waiter)
            raise
        finally:
            timer.cancel()

    def _give_back(self, waiter: _Waiter) -> None:
        """A waiter leaves: out of the line, or, where it was just granted something, pass that on."""
        future = waiter.future
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        elif future.done() and not future.cancelled() and future.exception() is None:
            granted = future.result()
            if granted is None:
                self.vacate()
            elif granted.usable:
                self._put_back(granted)


def _time_out(future: asyncio.Future[Connection | None]) -> None:
    if not future.done():
        future.set_exception(PoolTimeout("no connection to the upstream became free in time"))

"""The connections of one origin: which one is used next, which requests wait, and when one may be reused.

It decides and counts; it opens no socket. A slot represents one connection, being opened or open. It is given back
exactly once: when the connection is closed or could not be opened.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from proxy.errors import PoolTimeout
from proxy.upstream.connection import Connection
from proxy.upstream.origin import Limits

log = logging.getLogger("cairn.upstream")

PROBATION_SECONDS = 0.1  # llama.cpp closes within a millisecond of a stream's end
TRUSTED_AFTER: Final = 3  # streams in a row whose connection outlived its probation
DISTRUST_SECONDS: Final = 300.0  # connections are not reused for this long after bytes that no request asked for


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """A pool at one moment; `opened`, `reused` and `retried` are totals."""

    open: int  # connections being opened or open: idle, on probation or in use
    idle: int
    in_use: int
    waiting: int
    opened: int
    reused: int
    retried: int


@dataclass(slots=True, eq=False)
class _Waiter:
    """A waiting request. Its future yields an idle connection, or None: the request may then open one."""

    future: asyncio.Future[Connection | None]
    fresh: bool


class Pool:
    """The pool of one origin. Last in, first out, so that surplus connections of a burst expire.

    `name` is the origin's, for the log.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits, name: str) -> None:
        self._name = name
        self._loop = loop
        self._limits = limits
        self._idle: list[Connection] = []
        self._probation: dict[Connection, asyncio.TimerHandle] = {}
        self._connections: set[Connection] = set()
        self._received_seconds = 0.0  # on connections that are closed
        self._waiters: deque[_Waiter] = deque()
        self._open = 0
        self._streams_kept = 0
        self._distrusted_until_seconds = 0.0  # by the loop's clock
        self.emptied: Callable[[], None] | None = None  # called when no connection is left and nobody waits
        self.opened = 0
        self.reused = 0
        self.retried = 0

    @property
    def counts(self) -> PoolCounts:
        """The pool's figures."""
        aside = len(self._idle) + len(self._probation)
        waiting = len(self._waiters)
        return PoolCounts(
            open=self._open,
            idle=aside,
            in_use=self._open - aside,
            waiting=waiting,
            opened=self.opened,
            reused=self.reused,
            retried=self.retried,
        )

    @property
    def received_seconds(self) -> float:
        """When the last byte came on any connection, on the monotonic clock; 0 for never."""
        return max([self._received_seconds, *[connection.seen_seconds for connection in self._connections]])

    @property
    def keeps_streams(self) -> bool:
        """True if this upstream is known to keep a connection open after a streamed response."""
        return self._streams_kept >= TRUSTED_AFTER

    def take(self) -> Connection | None:
        """Take the idle connection that was used last, or None."""
        while self._idle:
            connection = self._idle.pop()
            if connection.untouched:
                self.reused += 1
                return connection
            connection.close()
        return None

    async def obtain(self, *, fresh: bool) -> Connection | None:
        """Return an idle connection, or None: the caller then holds a slot and opens one, or calls `vacate`.

        Wait while all slots are taken. `fresh` refuses connections that have served before. Raises PoolTimeout if
        too many wait or no slot became free in time.
        """
        while True:
            if not fresh:
                if (connection := self.take()) is not None:
                    return connection
            elif self._idle:  # otherwise each request that needs a new connection would leave one more
                self._idle[0].close()
            if self._open >= self._limits.max_connections:
                self._make_room()
            if self._open < self._limits.max_connections:
                self._open += 1
                return None
            granted = await self._wait(fresh)
            if granted is None or granted.untouched:
                return granted
            granted.close()

    def opened_one(self, connection: Connection) -> None:
        """Take a connection that was opened into a slot obtained before."""
        self.opened += 1
        self._connections.add(connection)

    def vacate(self) -> None:
        """Give a slot back; the request that has waited longest gets it."""
        self._open -= 1
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.future.done():
                self._open += 1
                waiter.future.set_result(None)
                return
        if not self._open and self.emptied is not None:
            self.emptied()

    def finished(self, connection: Connection, *, reusable: bool, was_stream: bool) -> None:
        """Keep, observe or close a connection whose response is complete."""
        if not reusable or self._distrusts:
            connection.close()
        elif was_stream and not self.keeps_streams:
            self._put_on_probation(connection)
        else:
            self._put_back(connection)

    def left(self, connection: Connection) -> None:
        """Forget a closed connection and free its slot."""
        self._connections.discard(connection)
        self._received_seconds = max(self._received_seconds, connection.seen_seconds)
        timer = self._probation.pop(connection, None)
        if timer is not None:
            timer.cancel()
        elif connection in self._idle:
            self._idle.remove(connection)
        if connection.dropped_after_stream:
            self._streams_kept = 0
        if connection.unsolicited:
            self._distrust()
        self.vacate()

    def close(self) -> None:
        """Refuse all waiting requests."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.future.done():
                waiter.future.set_exception(PoolTimeout("the client is closing"))

    def shut(self) -> None:
        """Close every connection that is not in use."""
        for connection in (*self._idle, *self._probation):
            connection.close()
        if not self._open and self.emptied is not None:  # no connection was open before
            self.emptied()

    @property
    def _distrusts(self) -> bool:
        return self._loop.time() < self._distrusted_until_seconds

    def _distrust(self) -> None:
        """Stop reusing connections: the upstream sent bytes that would reach the reader of another response."""
        if not self._distrusts:
            log.warning(
                "upstream %s sent bytes that no request asked for; its connections are not reused for %d s",
                self._name,
                DISTRUST_SECONDS,
            )
        self._distrusted_until_seconds = self._loop.time() + DISTRUST_SECONDS
        self.shut()

    def _put_on_probation(self, connection: Connection) -> None:
        if self._waiters:
            connection.close()
            return
        connection.rest(self._limits.idle_expiry_seconds)
        self._probation[connection] = self._loop.call_later(PROBATION_SECONDS, self._passed, connection)

    def _passed(self, connection: Connection) -> None:
        """End the probation of a connection that the upstream did not close after its stream."""
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
        """Close an unused connection: the oldest on probation, else the oldest idle one."""
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
        """Remove a cancelled waiter; if it had just been granted something, pass that on."""
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

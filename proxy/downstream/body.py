"""The body of a request: where its bytes go as they arrive, and how its reader waits for them.

A body of declared length, up to the limit of what is read, lands in its final buffer: the event loop reads straight
into `room`. Of any other, at most `AHEAD_BYTES` are kept until its reader decides whether to read it whole (`read`)
or piece by piece (`begin_stream`); the connection stops reading meanwhile.
"""

from __future__ import annotations

import asyncio
import enum
from copy import copy
from typing import Final, Protocol

from proxy.buffers import uninitialized_bytearray
from proxy.downstream.chunks import Buffer, ChunkDecoder
from proxy.downstream.errors import BadHttp, ProtocolError
from proxy.errors import CairnError, Overloaded, RequestTimeout, TooLarge

AHEAD_BYTES: Final = 128 * 1024
"""Bytes of a body that is streamed, or not asked for yet, at which the connection stops reading."""

TRUSTED_BYTES: Final = 2 * 1024 * 1024
"""Bytes by which a buffer may be larger than what has arrived, whatever length was declared."""

GRACE_SECONDS: Final = 10.0
"""Time in which a body may arrive at any rate, at its beginning."""

_UNLIMITED_BYTES: Final = 2**40


class Source(Protocol):
    """The connection as a body sees it."""

    def now(self) -> float:
        """Read the monotonic clock."""
        ...

    def pause_reading(self) -> None:
        """Stop reading from the client."""
        ...

    def resume_reading(self) -> None:
        """Read again."""
        ...

    def send_continue(self) -> None:
        """Write `100 Continue` if the client waits for it."""
        ...

    def body_awaited(self, due: float) -> None:
        """Call `body.look` at the time `due`, and again at each time that it returns, until `body_arrived`."""
        ...

    def body_arrived(self) -> None:
        """Stop calling `body.look`: nobody waits for the body any more."""
        ...

    def hold(self, nbytes: int, own: int) -> bool:
        """Take bytes from the budget of bodies; return False if it is exceeded. The body holds `own` already."""
        ...

    def release(self, nbytes: int) -> None:
        """Give bytes back to the budget of bodies."""
        ...

    def client_error(self, reason: BadHttp) -> None:
        """Count an error of the client."""
        ...


class Use(enum.Enum):
    """The way in which a body is read; unknown until its reader begins."""

    UNKNOWN = "unknown"
    READ = "read"
    STREAM = "stream"


_UNKNOWN, _READ, _STREAM = Use.UNKNOWN, Use.READ, Use.STREAM


class IncomingBody:
    """A body that has not arrived whole with its head.

    `length` is its declared length in bytes, None if it is chunked. `held_bytes` counts against the budget of bodies.
    """

    __slots__ = (
        "_decoder",
        "_error",
        "_filled",
        "_limit_seconds",
        "_rate",
        "_source",
        "_store",
        "_use",
        "_view",
        "_waited_seconds",
        "_waiter",
        "_waits_from",
        "held_bytes",
        "is_complete",
        "length",
        "received_bytes",
    )

    def __init__(self, source: Source, length: int | None, read_bytes_most: int, bytes_per_second: int) -> None:
        self.length = length
        self.received_bytes = 0
        self.held_bytes = 0
        self.is_complete = False
        self._source = source
        self._rate = bytes_per_second
        self._use = _UNKNOWN
        self._decoder: ChunkDecoder | None = None
        self._view: memoryview | None = None  # of `_store`, if bytes are read into it; `_filled` have arrived
        self._filled = 0
        if length is None:
            self._decoder = ChunkDecoder(_UNLIMITED_BYTES)
            self._store = bytearray()
        elif length <= read_bytes_most:
            self._store = uninitialized_bytearray(min(length, TRUSTED_BYTES))
            self._view = memoryview(self._store)
        else:
            self._store = bytearray()
        self._error: CairnError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._waits_from = 0.0
        self._waited_seconds = 0.0
        self._limit_seconds = 0.0

    # -- what the connection calls

    def room(self) -> memoryview | None:
        """Return the buffer for the next bytes; None if they must be parsed first."""
        view = self._view
        if view is None:
            return None
        if self._filled == len(view):
            self._grow()
            view = self._view
        return view[self._filled :]  # type: ignore[index]  # `_grow` has replaced the view

    def landed(self, nbytes: int) -> None:
        """Handle `nbytes` bytes that the event loop read into `room`."""
        self._filled += nbytes
        self._count(nbytes)
        if self.received_bytes == self.length:
            self._end()

    def take(self, data: Buffer, at: int, end: int) -> int:
        """Take the part of data[at:end] that belongs to the body; return the offset at which it ends."""
        if self._error is not None:
            return end
        length = self.length
        if length is None:
            return self._take_chunks(data, at, end)
        stop = min(end, at + length - self.received_bytes)
        if self._view is None:
            self._store += memoryview(data)[at:stop]
            self._count(stop - at)
            self._after_piece(self.received_bytes == length)
            return stop
        while at < stop:
            room = self.room()
            if room is None:
                return end  # the body has just failed
            nbytes = min(len(room), stop - at)
            room[:nbytes] = memoryview(data)[at : at + nbytes]
            at += nbytes
            self.landed(nbytes)
        return stop

    def look(self, now: float) -> float:
        """Fail if the body is late; return the time at which to look again."""
        due = self._due()
        if due <= now:
            self._source.client_error(BadHttp.BODY_LATE)
            self.fail(RequestTimeout("The body of the request did not arrive in time."))
        return due

    def fail(self, error: CairnError) -> None:
        """End the body with `error`, which is raised to its reader, now or later."""
        if self._error is None and not self.is_complete:
            self._error = error
            self._view = None  # further bytes are dropped
            self._store = bytearray()
            self._release()  # at once, so that if several bodies grow together, not all of them fail
            self._wake()

    # -- what its reader calls

    async def read(self, limit_bytes: int, limit_seconds: float) -> Buffer:
        """Return the whole body. Raises the errors of `read_body`."""
        if self._decoder is not None:
            self._decoder.limit_bytes = limit_bytes
            if self._decoder.announced_bytes > limit_bytes:
                raise too_large(limit_bytes)
        self._use = _READ
        self._limit_seconds = limit_seconds
        self._source.send_continue()
        self._source.resume_reading()
        while not self.is_complete:
            self._check(limit_bytes)
            await self._wait()
        self._check(limit_bytes)
        body, self._store = self._store, bytearray()
        return body

    def begin_stream(self, limit_seconds: float) -> None:
        """Begin to read the body piece by piece; each piece may take `limit_seconds`.

        A client that waits to be asked for it is asked by the first `next_piece`.
        """
        self._use = _STREAM
        self._limit_seconds = limit_seconds
        if self._view is not None:
            self._view = None
            self._store = self._store[: self._filled]
        if len(self._store) < AHEAD_BYTES:
            self._source.resume_reading()

    async def next_piece(self) -> bytes:
        """Return what has arrived since the last call; b"" at the end."""
        self._source.send_continue()
        while not self._store:
            if self._error is not None:
                raise copy(self._error)
            if self.is_complete:
                return b""
            await self._wait()
        piece = bytes(self._store)
        self._store = bytearray()
        self._release()
        self._source.resume_reading()
        return piece

    # -- inside

    def _take_chunks(self, data: Buffer, at: int, end: int) -> int:
        decoder, store = self._decoder, self._store
        assert decoder is not None  # noqa: S101 - a body without a length has one
        before = len(store)
        try:
            at = decoder.decode(data, at, end, store)
        except ProtocolError as error:
            self._source.client_error(error.reason)
            self.fail(copy(error))
            return end
        except TooLarge as error:
            self.fail(copy(error))
            return end
        self._count(len(store) - before)
        self._after_piece(decoder.is_done)
        return at

    def _after_piece(self, is_last: bool) -> None:
        if is_last:
            self._end()
        elif self._use is not _READ:
            if len(self._store) >= AHEAD_BYTES:
                self._source.pause_reading()
            self._wake()

    def _count(self, nbytes: int) -> None:
        self.received_bytes += nbytes
        has_room = self._source.hold(nbytes, self.held_bytes)
        self.held_bytes += nbytes
        if not has_room:
            self.fail(overloaded())

    def _check(self, limit_bytes: int) -> None:
        if self._error is not None:
            raise copy(self._error)
        if self.received_bytes > limit_bytes:
            raise too_large(limit_bytes)

    def _grow(self) -> None:
        """Make the buffer four times as large. All copying together amounts to at most a third of the body."""
        length = self.length or 0
        store = uninitialized_bytearray(min(length, 4 * self._filled))
        store[: self._filled] = self._store
        self._store = store
        self._view = memoryview(store)

    def _end(self) -> None:
        if self._error is None:
            self._view = None
            self.is_complete = True
            self._wake()

    def _release(self) -> None:
        held, self.held_bytes = self.held_bytes, 0
        self._source.release(held)

    def _due(self) -> float:
        """Return the time from which the body is late: by its limit (in all, or per piece), or by its least rate."""
        allowed = self._limit_seconds
        if self._rate:
            allowed = min(allowed, GRACE_SECONDS + self.received_bytes / self._rate - self._waited_seconds)
        return self._waits_from + allowed

    async def _wait(self) -> None:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        self._waits_from = self._source.now()
        self._source.body_awaited(self._due())
        try:
            await waiter
        finally:
            self._waiter = None
            self._waited_seconds += self._source.now() - self._waits_from
            self._source.body_arrived()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def overloaded() -> Overloaded:
    """Return the error for a body for which there is no room."""
    return Overloaded("Too many requests at once.", code="proxy_overloaded", retry_after_seconds=1.0)


def too_large(limit_bytes: int) -> TooLarge:
    """Return the error for a body over `limit_bytes` whose length was not declared."""
    return TooLarge(f"The body has more than {limit_bytes} bytes, the most that is read.")

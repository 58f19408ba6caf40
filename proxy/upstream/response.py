"""A response from an upstream as its reader sees it: the head, then the body in pieces as they arrive.

The connection fills it and may be back in its pool before the body is read: bytes that were not taken yet wait
here."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from copy import copy
from typing import Protocol

from proxy.errors import BadResponse, CairnError, ResetMidResponse

Sink = Callable[[bytes, bytes | None], bool]
"""Accepts a piece of a body and, if it came as exactly one chunk, that chunk with framing. Returns False to stop."""


class Source(Protocol):
    """The connection as its response sees it."""

    def taken(self) -> None:
        """Resume reading: everything buffered was taken."""
        ...

    def allow_silence(self, seconds: float) -> None:
        """Bound the silence between two reads of the body by `seconds`, starting now."""
        ...

    def close(self, error: CairnError | None = None) -> None:
        """Close the connection and fail the response under way with `error`."""
        ...


class Filter(Protocol):
    """Changes a body as it is taken: `proxy.wire.concealing.Concealer`."""

    def feed(self, piece: bytes, *, is_last: bool) -> bytes:
        """Return what takes the place of `piece`. Raises BadResponse."""
        ...


class Framing(enum.StrEnum):
    """Ways in which the end of a body is known."""

    NONE = "none"  # HEAD, 204, 304
    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


class UpstreamResponse:
    """One response. Its connection returns to the pool at the end of the body; call `abort` to end it earlier.

    Attributes:
        headers: lower-case names, in the order in which they came, duplicates kept.
        early: the response began before the request's body was sent.
        reused: the connection had served before.
        sent_seconds, first_byte_seconds, seen_seconds: monotonic times of the request, of the first byte of the final
            response, and of the last receive.
        chunks: pieces of the body that were not taken yet. The connection appends to it.
    """

    __slots__ = (
        "_complete",
        "_connection",
        "_error",
        "_filter",
        "_interrupt",
        "_loop",
        "_sink",
        "_waiter",
        "chunks",
        "content_length",
        "early",
        "first_byte_seconds",
        "framing",
        "headers",
        "is_event_stream",
        "reason",
        "reused",
        "seen_seconds",
        "sent_seconds",
        "status",
    )

    def __init__(
        self, loop: asyncio.AbstractEventLoop, connection: Source, sent_seconds: float, *, reused: bool
    ) -> None:
        self.status = 0
        self.reason = b""
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.content_length: int | None = None
        self.framing = Framing.NONE
        self.is_event_stream = False
        self.early = False
        self.reused = reused
        self.sent_seconds = sent_seconds
        self.first_byte_seconds = 0.0
        self.seen_seconds = 0.0
        self._loop = loop
        self._connection: Source | None = connection
        self.chunks: list[bytes] = []
        self._complete = False
        self._error: CairnError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._filter: Filter | None = None
        self._sink: Sink | None = None
        self._interrupt: Callable[[], object] | None = None

    @property
    def complete(self) -> bool:
        """True once the whole body has arrived, read or not."""
        return self._complete

    @property
    def is_json_until_close(self) -> bool:
        """True if it is JSON, not compressed, whose end only the end of the connection shows."""
        return (
            self.framing is Framing.CLOSE
            and b"json" in self.header(b"content-type").lower()
            and not self.header(b"content-encoding")
        )

    @property
    def buffered_bytes(self) -> int:
        """Size of what arrived of the body and was not taken yet."""
        return sum(map(len, self.chunks))

    def peek(self) -> bytes:
        """Return what has arrived of the body and was not taken yet, and leave it there."""
        chunks = self.chunks
        if len(chunks) > 1:
            chunks[:] = [b"".join(chunks)]
        return chunks[0] if chunks else b""

    async def arrived(self, seen_bytes: int, loop_seconds: float) -> bool:
        """Wait until more than `seen_bytes` are there to be taken, or the body is complete.

        Return False when the loop's clock reaches `loop_seconds` first. Raises the error that ended the exchange.
        Cancelling it closes the connection.
        """
        while self.buffered_bytes <= seen_bytes and not self._complete:
            if self._error is not None:
                raise copy(self._error)
            waiter = self._waiter = self._loop.create_future()
            timer = self._loop.call_at(loop_seconds, _wake, waiter)
            try:
                await waiter
            except BaseException:
                self.abort()
                raise
            finally:
                timer.cancel()
            if self._waiter is waiter:  # nothing has arrived: the timer woke it
                self._waiter = None
                return False
        return True

    async def fits(self, limit_bytes: int) -> bool:
        """Wait until the whole body has arrived, or more than `limit_bytes` of it; return whether it is complete.

        Nothing is taken. Raises the error that ended the exchange before. Cancelling it closes the connection.
        """
        while not self._complete:
            if self.buffered_bytes > limit_bytes:
                return False
            await self._arrival()
        return True

    async def begun(self) -> None:
        """Wait until something of the body is there to be taken, or the body is complete.

        Raises the error that ended the exchange before. Cancelling it closes the connection.
        """
        while not self.chunks and not self._complete:
            await self._arrival()

    async def _arrival(self) -> None:
        """Wait until more arrives; raise the error that ended the exchange. Cancelling it closes the connection."""
        if self._error is not None:
            raise copy(self._error)
        waiter = self._waiter = self._loop.create_future()
        try:
            await waiter
        except BaseException:
            self.abort()
            raise

    def body_now(self) -> bytes:
        """Take what has arrived of the body without waiting; once `complete`, the rest of it."""
        chunks = self.chunks
        if not chunks:
            return b""
        piece = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        if self._filter is not None:
            piece = self._filter.feed(piece, is_last=self._complete)
        if self._connection is not None:
            self._connection.taken()
        return piece

    async def next_chunk(self) -> bytes:
        """Take all that arrived since the last call, at least one byte; b"" at the end of the body.

        Raises ResetMidResponse, IdleTimeout or BadResponse once all that arrived before was taken. Cancelling it
        closes the connection.
        """
        while True:
            while not self.chunks:
                if self._complete:
                    return b"" if self._filter is None else self._filter.feed(b"", is_last=True)
                await self._arrival()
            piece = self.body_now()
            if piece:  # a filter may hold all of it back
                return piece

    async def pour(self, sink: Sink) -> bool:
        """Call `sink` with each piece in the event that brings it; return True at the end of the body.

        Return False as soon as `sink` does: nothing more is taken until the next call, and the connection stops
        reading. No task is woken per piece, which would be half the cost of relaying one. Raises the errors of
        `next_chunk` and of `sink`. Cancelling it closes the connection.
        """
        while not self.chunks or sink(self.body_now(), None):
            if self._complete:
                return True
            if self._error is not None:
                raise copy(self._error)
            waiter = self._waiter = self._loop.create_future()
            self._sink = sink
            try:
                await waiter
            except BaseException:
                self.abort()
                raise
            finally:
                enough, self._sink = self._sink is None, None
                del waiter  # it may hold an exception, which holds this frame
            if enough:
                break
        return False

    async def read(self, limit_bytes: int) -> bytes:
        """Return the whole rest of the body. Raises BadResponse, and closes, if it exceeds `limit_bytes`."""
        pieces: list[bytes] = []
        size = 0
        while piece := await self.next_chunk():
            pieces.append(piece)
            size += len(piece)
            if size > limit_bytes:
                self.abort()
                raise BadResponse(f"the upstream's response has more than {limit_bytes} bytes")
        return b"".join(pieces)

    def header(self, name: bytes) -> bytes:
        """Return the first value of a header by its lower-case name, b"" if there is none."""
        for key, value in self.headers:
            if key == name:
                return value
        return b""

    def amend(self, body: bytes) -> None:
        """Replace what has arrived of the body, and was not taken yet, by as many other bytes."""
        if self.chunks:
            self.chunks[:] = [body]

    def replace(self, headers: tuple[tuple[bytes, bytes], ...], body: Filter, length: int | None) -> None:
        """Replace the headers, and by `body` what is taken of the body from now on, with `length` bytes if known.

        Nothing may have been taken. `pour` passes no end that `body` holds back.
        """
        self.headers = headers
        self.content_length = length
        self._filter = body

    def abort(self) -> None:
        """Close the connection unless the body has ended."""
        if self._connection is not None:
            self._connection.close(ResetMidResponse("the response was abandoned"))

    def allow_silence(self, seconds: float) -> None:
        """Bound the silence between two reads of the rest of the body by `seconds`, starting now."""
        if self._connection is not None:
            self._connection.allow_silence(seconds)

    # -- called by the connection and the client only

    @property
    def pending(self) -> bool:
        """True while neither the head nor a failure has arrived."""
        return not self.status and self._error is None

    def change(self) -> asyncio.Future[None]:
        """Return a future that is done once anything arrives or the exchange fails: no coroutine is made for it."""
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def check(self) -> None:
        """Raise the error that ended the exchange, if one did."""
        if self._error is not None:
            raise copy(self._error)

    def interrupt_with(self, callback: Callable[[], object] | None) -> None:
        """Call `callback` once, as soon as the head has arrived or the exchange has failed."""
        self._interrupt = callback
        if not self.pending:
            self.wake()

    def ended(self) -> None:
        """Mark the body as complete and release the connection."""
        self._connection = None
        self._complete = True
        self.wake()

    def fail(self, error: CairnError) -> None:
        """End the exchange. Readers get copies of `error` once they have taken what arrived before.

        A raised error refers to the frames that it passed, and they refer to this response: keeping the raised one
        here would leave every failed exchange to the garbage collector.
        """
        self._connection = None
        self._error = error
        self.wake()

    def wake(self) -> None:
        """Wake a waiting reader after any change, so that it checks again."""
        waiter = self._waiter
        if waiter is not None and (self._sink is None or not self._poured(self._sink, waiter)):
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
        if self._interrupt is not None:
            callback, self._interrupt = self._interrupt, None
            callback()

    def relay_chunk(self, piece: bytes, framed: bytes) -> bool:
        """Hand a whole chunk to the waiting sink. Return False, having done nothing, if none waits."""
        sink, waiter = self._sink, self._waiter
        if sink is None or waiter is None or waiter.done():
            return False
        try:
            if sink(piece, framed):
                return True
            self._sink = None
            waiter.set_result(None)
        except Exception as error:  # noqa: BLE001 - raised again in the task that owns the sink
            waiter.set_exception(error)
        self._waiter = None
        return True

    def _poured(self, sink: Sink, waiter: asyncio.Future[None]) -> bool:
        """Feed the sink what has arrived. Return False if the pouring task must run: at the end or if full."""
        try:
            if self.chunks and not waiter.done() and not sink(self.body_now(), None):
                self._sink = None
                return False
        except Exception as error:  # noqa: BLE001 - raised again in the task that owns the sink
            waiter.set_exception(error)
            return False
        return not self._complete and self._error is None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

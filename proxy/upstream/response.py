"""An upstream's answer as the caller reads it: head, then the body in pieces as they come.

It is filled by the connection and outlives it: once the body is whole the connection is back in its pool, while what
was not read yet waits here.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING

from proxy.errors import BadResponse, CairnError, ResetMidResponse

if TYPE_CHECKING:
    from proxy.upstream.connection import Connection


Sink = Callable[[bytes, bytes | None], bool]
"""Takes a piece of a body and, where it came as one whole chunk, that chunk with its framing; False: enough."""


class Framing(enum.StrEnum):
    """How the end of an answer's body is known."""

    NONE = "none"  # HEAD, 204, 304
    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


class UpstreamResponse:
    """One answer. The connection goes back to its pool by itself at the end of the body; else call `abort`.

    `headers` have lower-case names, in the order in which they came, duplicates kept. `early` tells that the answer
    began before the request's body was sent. `reused` tells that the connection had served before. `seen_seconds` is
    when the last bytes of it came.
    """

    __slots__ = (
        "_chunks",
        "_complete",
        "_connection",
        "_error",
        "_interrupt",
        "_loop",
        "_sink",
        "_waiter",
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

    def __init__(self, loop: asyncio.AbstractEventLoop, connection: Connection, sent_seconds: float) -> None:
        self.status = 0
        self.reason = b""
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.content_length: int | None = None
        self.framing = Framing.NONE
        self.is_event_stream = False
        self.early = False
        self.reused = connection.served > 0
        self.sent_seconds = sent_seconds
        self.first_byte_seconds = 0.0
        self.seen_seconds = 0.0
        self._loop = loop
        self._connection: Connection | None = connection
        self._chunks: list[bytes] = []
        self._complete = False
        self._error: CairnError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._interrupt: Callable[[], object] | None = None

    @property
    def complete(self) -> bool:
        """True once the whole body has arrived, read or not."""
        return self._complete

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the body that arrived and were not taken yet."""
        return sum(map(len, self._chunks))

    def body_now(self) -> bytes:
        """What has arrived of the body and was not taken yet, without waiting; after `complete`, the rest of it."""
        chunks = self._chunks
        if not chunks:
            return b""
        piece = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        if self._connection is not None:
            self._connection.taken()
        return piece

    async def next_chunk(self) -> bytes:
        """All that has arrived since the last call, at least one byte; b"" at the end of the body.

        Raises ResetMidAnswer, IdleTimeout or BadAnswer once all that arrived before was taken. Cancelling it closes
        the connection.
        """
        while not self._chunks:
            if self._complete:
                return b""
            if self._error is not None:
                raise copy(self._error)
            waiter = self._waiter = self._loop.create_future()
            try:
                await waiter
            except BaseException:
                self.abort()
                raise
        return self.body_now()

    async def pour(self, sink: Sink) -> bool:
        """Give what arrives to `sink`, each piece at once, in the event that brings it; True at the body's end.

        False as soon as the sink has had enough and said so by False: then nothing is taken until the next call, and
        the connection stops reading. No task is woken for a piece, which is half the cost of relaying one. Raises
        what `next_chunk` does, and what the sink raises; cancelling it closes the connection.
        """
        while not self._chunks or sink(self.body_now(), None):
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
        """The whole rest of the body. Raises BadAnswer, and closes, where it has more than `limit_bytes`."""
        pieces: list[bytes] = []
        size = 0
        while piece := await self.next_chunk():
            pieces.append(piece)
            size += len(piece)
            if size > limit_bytes:
                self.abort()
                raise BadResponse(f"the upstream's answer has more than {limit_bytes} bytes")
        return b"".join(pieces)

    def header(self, name: bytes) -> bytes:
        """The first value of a header by its lower-case name, empty where there is none."""
        for key, value in self.headers:
            if key == name:
                return value
        return b""

    def put_back(self, body: bytes) -> None:
        """Undo a `read` of the whole body, for a caller that looked at it before passing it on."""
        if body:
            self._chunks.insert(0, body)

    def abort(self) -> None:
        """Close the connection if the body has not ended; nothing happens after the end."""
        if self._connection is not None:
            self._connection.close(ResetMidResponse("the answer was given up"))

    # What follows is for the connection and the client alone.

    @property
    def pending(self) -> bool:
        """True while neither the head nor a failure came."""
        return not self.status and self._error is None

    async def head_arrived(self) -> None:
        """Return when the final head is here; raise what ended the exchange before.

        The caller aborts when it is cancelled.
        """
        while self._error is None:
            if self.status:
                return
            waiter = self._waiter = self._loop.create_future()
            await waiter
        raise copy(self._error)

    def interrupt_with(self, callback: Callable[[], object] | None) -> None:
        """Call `callback` once, when the head comes or the exchange fails while nobody waits."""
        self._interrupt = callback
        if not self.pending:
            self.wake()

    def ended(self) -> None:
        """The body is whole; the connection is no longer ours."""
        self._connection = None
        self._complete = True
        self.wake()

    def fail(self, error: CairnError) -> None:
        """The exchange is over; copies of `error` are raised once what arrived before was taken.

        The one raised holds the frames that it passed, and they hold this answer: were it kept here, each broken
        exchange would wait for the garbage collector with all that hangs on it.
        """
        self._connection = None
        self._error = error
        self.wake()

    def wake(self) -> None:
        """Something changed: let whoever waits look again."""
        waiter = self._waiter
        if waiter is not None and (self._sink is None or not self._poured(self._sink, waiter)):
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)
        if self._interrupt is not None:
            callback, self._interrupt = self._interrupt, None
            callback()

    def relay_chunk(self, piece: bytes, framed: bytes) -> bool:
        """Give a whole chunk straight to the sink that waits; False, and nothing done, where none does."""
        sink, waiter = self._sink, self._waiter
        if sink is None or waiter is None or waiter.done():
            return False
        try:
            if sink(piece, framed):
                return True
            self._sink = None
            waiter.set_result(None)
        except Exception as error:  # noqa: BLE001 - it is raised again in the task whose sink this is
            waiter.set_exception(error)
        self._waiter = None
        return True

    def _poured(self, sink: Sink, waiter: asyncio.Future[None]) -> bool:
        """Pour what has arrived; False where the task that pours must look: at the end, or where the sink is full."""
        try:
            if self._chunks and not waiter.done() and not sink(self.body_now(), None):
                self._sink = None
                return False
        except Exception as error:  # noqa: BLE001 - it is raised again in the task whose sink this is
            waiter.set_exception(error)
            return False
        return not self._complete and self._error is None

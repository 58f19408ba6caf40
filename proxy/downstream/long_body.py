"""The rest of a long body, read from the socket straight to where it stays.

aiohttp hands a body out in pieces: what the socket gave is copied by its parser, and again where the pieces are
joined. For two megabytes these copies cost as much as everything else that is done with them. So once the head is
parsed and says how much follows, the connection is lent to a protocol that knows nothing but that number; it reads
not one byte further. Then the connection goes back to aiohttp with a new parser, since the old one still waits for
the body. Chunked bodies, whose framing a parser must judge, never come here.

It must not know limits, prompts or answers.
"""

from __future__ import annotations

import asyncio

from aiohttp import StreamReader

from proxy.buffers import uninitialized_bytearray
from proxy.downstream.body_ahead import BodyAhead
from proxy.errors import RequestTimeout

LONG_BYTES = 48 * 1024
"""From so much still to come on: lending the connection costs some 20 us, as much as copying this twice."""


def late(limit_seconds: float) -> RequestTimeout:
    """What a body that does not come in time is answered with."""
    return RequestTimeout(f"The body did not arrive within {limit_seconds:g} seconds.")


async def receive(content: StreamReader, handler: BodyAhead, length: int, limit_seconds: float) -> bytearray:
    """The body of `length` bytes of a request whose parser has seen its head, and perhaps a part of it.

    Raises RequestTimeout where it did not come within `limit_seconds`; the connection then closes behind the answer.
    When the client leaves meanwhile, aiohttp cancels the request's task, and so this; ConnectionResetError where it
    has left before.
    """
    body = uninitialized_bytearray(length)
    content.set_read_chunk_size(length)  # so that nothing stays behind in a parser that was paused
    ahead = handler.take_ahead()
    filled = len(ahead)
    body[:filled] = ahead
    while not content.at_eof() and (piece := content.read_nowait()):
        body[filled : filled + len(piece)] = piece
        filled += len(piece)
    if filled < length:
        transport = handler.transport
        if transport is None:
            raise ConnectionResetError("the client left inside its body")
        rest = _Rest(handler, transport, memoryview(body)[filled:])
        timer = asyncio.get_running_loop().call_later(limit_seconds, rest.give_up, limit_seconds)
        rest.begin()
        try:
            await rest.whole
        finally:
            timer.cancel()
            rest.end(content)
    return body


class _Rest(asyncio.BufferedProtocol):
    """Fills `room` from a connection that it has borrowed from `handler`."""

    def __init__(self, handler: BodyAhead, transport: asyncio.Transport, room: memoryview) -> None:
        self._handler = handler
        self._transport = transport
        self._room = room
        self._filled = 0
        self._lender: asyncio.BaseProtocol = handler
        self.whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        """Borrow the connection. Reading is stopped and begun again, or the loop would go on filling its buffer."""
        self._transport.pause_reading()
        self._lender = self._transport.get_protocol()
        self._transport.set_protocol(self)
        self._transport.resume_reading()

    def end(self, content: StreamReader) -> None:
        """Give it back. With an unfinished body it serves no other request: what still comes is dropped."""
        handler = self._handler
        if self._filled == len(self._room):
            handler.body_taken(content)
        else:
            content.feed_eof()
            handler.close()
        if handler.transport is None:
            return  # it closed
        self._transport.set_protocol(self._lender)
        if not self._transport.is_closing():
            self._transport.pause_reading()  # which it already is where the body is whole
            self._transport.resume_reading()

    def give_up(self, limit_seconds: float) -> None:
        """The time is over."""
        if not self.whole.done():
            self.whole.set_exception(late(limit_seconds))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._room[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._filled == len(self._room):
            self._transport.pause_reading()  # what follows is the next request's
            if not self.whole.done():
                self.whole.set_result(None)

    def eof_received(self) -> None:
        self._handler.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.connection_lost(exc)

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()

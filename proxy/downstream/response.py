"""The answer to a request, written straight to the transport.

Head and body are one write if both are known, and an upstream's headers are never turned into a mapping and back. The
connection decides whether it may be kept, and when the client has caught up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, Protocol

from proxy.downstream.request import IncomingRequest
from proxy.errors import REASON_PHRASES

Headers = Iterable[tuple[bytes, bytes]]

_JOIN_AT_MOST_BYTES: Final = 32 * 1024  # up to this size a copy is cheaper than a second buffer in the system call
_STREAM_LINE: Final = b"content-type: text/event-stream"
_BODYLESS_STATUS: Final = frozenset({204, 304})


class Downstream(Protocol):
    """An answer to a client, as the relay writes it: `send`, or `begin`, `write`..., then `end` or `break_off`."""

    @property
    def begun(self) -> bool:
        """True once a byte of the answer has been written, after which the request cannot be retried."""
        ...

    def send(self, status: int, reason: bytes, headers: Headers, body: bytes) -> None:
        """Write a whole answer."""
        ...

    def begin(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        """Write the head of an answer whose body follows; without `length`, chunked or until the connection ends."""
        ...

    async def write(self, piece: bytes | memoryview) -> None:
        """Write a piece of the body; wait while the client reads slower than the upstream sends."""
        ...

    def offer(self, piece: bytes, framed: bytes | None = None) -> bool:
        """Write a piece without waiting; return False if the client is behind: then await `drained` before the next.

        `framed` is the same piece as a chunk of HTTP/1.1, if the upstream sent it as one.
        """
        ...

    async def drained(self) -> None:
        """Wait until the client has read most of what was written."""
        ...

    def end(self) -> None:
        """Close the body's framing."""
        ...

    def write_last(self, piece: bytes) -> None:
        """Write a short piece without waiting, before `break_off`; nothing if an announced length has no room."""
        ...

    def break_off(self) -> None:
        """End the connection without the body's end, so that the client sees that the body is incomplete."""
        ...


class Sender(Protocol):
    """The connection as a response sees it."""

    is_behind: bool
    """True while the transport's write buffer is full."""

    def may_stay(self) -> bool:
        """Return True if the connection may serve another request after this one."""
        ...

    async def drained(self) -> None:
        """Wait until it is not behind. Raises ConnectionResetError."""
        ...


class ClientResponse:
    """`Downstream` on a client's connection.

    `looks_whole` is set if it was broken off and the orderly end of the connection would be the end of its body.

    If the client is gone or stopped reading, `write`, `offer` and `drained` raise ConnectionResetError; the other
    methods do nothing.
    """

    __slots__ = (
        "_ends_with_connection",
        "_has_body",
        "_is_chunked",
        "_remaining_bytes",
        "_request",
        "_sender",
        "_transport",
        "begun",
        "ended",
        "keep_alive",
        "looks_whole",
    )

    def __init__(self, request: IncomingRequest, sender: Sender, transport: asyncio.WriteTransport) -> None:
        self._request = request
        self._sender = sender
        self._transport = transport
        self.keep_alive = request.keep_alive
        self.begun = False
        self.ended = False
        self.looks_whole = False
        self._ends_with_connection = False
        self._is_chunked = False
        self._has_body = True
        self._remaining_bytes: int | None = None

    def send(self, status: int, reason: bytes, headers: Headers, body: bytes) -> None:
        head = self._begin(status, reason, headers, len(body))
        if self._transport.is_closing():
            pass  # the client left, and the task that answers it is about to be cancelled
        elif not self._has_body or not body:
            self._transport.write(head)
        elif len(body) <= _JOIN_AT_MOST_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))
        self._remaining_bytes = 0
        self.ended = True

    def begin(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        head = self._begin(status, reason, headers, length)
        if not self._transport.is_closing():
            self._transport.write(head)

    async def write(self, piece: bytes | bytearray | memoryview) -> None:
        if not self.offer(piece):
            await self.drained()

    def offer(self, piece: bytes | bytearray | memoryview, framed: bytes | None = None) -> bool:
        if not self._has_body or not piece:
            return True
        if self._transport.is_closing():
            raise ConnectionResetError("the client left")
        if framed is not None and self._is_chunked:
            self._transport.write(framed)
        elif self._is_chunked and len(piece) <= _JOIN_AT_MOST_BYTES:  # inlined `_put`, for pieces of a stream
            self._transport.write(b"".join((b"%x\r\n" % len(piece), piece, b"\r\n")))
        else:
            self._put(piece)
        return not self._sender.is_behind

    async def drained(self) -> None:
        await self._sender.drained()

    def write_last(self, piece: bytes) -> None:
        remaining_bytes = self._remaining_bytes
        if remaining_bytes is not None and len(piece) >= remaining_bytes:
            return  # the client would take it for the end of a whole body
        if self._has_body and not self._transport.is_closing():
            self._put(piece)

    def _put(self, piece: bytes | bytearray | memoryview) -> None:
        if self._is_chunked:
            self._transport.writelines((b"%x\r\n" % len(piece), piece, b"\r\n"))
        else:
            if self._remaining_bytes is not None:
                self._remaining_bytes -= len(piece)
            self._transport.write(piece)

    def end(self) -> None:
        self.ended = True
        if self._is_chunked and self._has_body:
            if not self._transport.is_closing():
                self._transport.write(b"0\r\n\r\n")
        elif self._remaining_bytes:
            self.break_off()  # shorter than announced: the client must see that

    def break_off(self) -> None:
        self.looks_whole = self._ends_with_connection
        self.keep_alive = self.ended = self._has_body = False  # the connection ends itself after the exchange

    def _begin(self, status: int, reason: bytes, headers: Headers, length: int | None) -> bytes:
        request = self._request
        lines = [b"HTTP/1.1 %d %b" % (status, reason)]
        lines += [b": ".join(header) for header in headers]  # takes a third of the time of formatting
        self._has_body = request.method != "HEAD" and status not in _BODYLESS_STATUS
        if length is not None:
            self._remaining_bytes = length if self._has_body else 0
            if status not in _BODYLESS_STATUS:
                lines.append(b"content-length: %d" % length)
        elif self._has_body:
            if request.is_http_1_0:
                self.keep_alive = False  # the end of the connection is the end of the body
                # a stream shows by its last event whether it is complete, and a reset could overtake that event
                self._ends_with_connection = not any(line.lower().startswith(_STREAM_LINE) for line in lines)
            else:
                self._is_chunked = True
                lines.append(b"transfer-encoding: chunked")
        if not self.keep_alive or not self._sender.may_stay():
            self.keep_alive = False
            lines.append(b"connection: close")
        elif request.is_http_1_0:
            lines.append(b"connection: keep-alive")
        lines.append(b"\r\n")
        self.begun = True
        return b"\r\n".join(lines)


def whole_response(status: int, headers: Headers, body: bytes) -> bytes:
    """Serialise an answer to input that is not a request; the connection closes after it."""
    lines = [b"HTTP/1.1 %d %b" % (status, REASON_PHRASES[status])]
    lines += [b": ".join(header) for header in headers]
    lines.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body))
    return b"\r\n".join(lines) + body

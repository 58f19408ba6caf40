"""The side towards the client, on aiohttp's low-level server: answers written straight.

The answer goes to the transport as bytes, head and body as one write where both are there, so that the headers of an
upstream are never turned into a mapping and back. What aiohttp's own response class does beyond that (cookies,
compression, ranges) a proxy must not do. It must not know replicas, prompts or JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator, Iterable
from typing import Protocol, cast

from aiohttp import HttpVersion11

from proxy.downstream.body import IncomingRequest

Headers = Iterable[tuple[bytes, bytes]]

_JOIN_AT_MOST_BYTES = 32 * 1024  # below this a copy is cheaper than a second buffer in the system call
_BODYLESS_STATUS = frozenset({204, 304})


class Downstream(Protocol):
    """An answer to a client, as the relay writes it: `send`, or `begin`, `write`..., then `end` or `break_off`."""

    @property
    def begun(self) -> bool:
        """True once a byte of the answer was written, after which nothing can be tried again."""
        ...

    def send(self, status: int, reason: bytes, headers: Headers, body: bytes) -> None:
        """Write a whole answer."""
        ...

    def begin(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        """Write the head of an answer whose body follows; `length` None means chunked or until the end."""
        ...

    async def write(self, piece: bytes | memoryview) -> None:
        """Write a piece of the body; waits while the client reads slower than the upstream sends."""
        ...

    def offer(self, piece: bytes, framed: bytes | None = None) -> bool:
        """Write a piece without waiting; False where the client is behind: then await `drained` before the next.
        `framed` is the same piece as a chunk of HTTP/1.1, where it came as one."""
        ...

    async def drained(self) -> None:
        """Wait until the client has read most of what was written."""
        ...

    def end(self) -> None:
        """Close the body's framing."""
        ...

    def write_last(self, piece: bytes) -> None:
        """Write a short piece without waiting, before `break_off`."""
        ...

    def break_off(self) -> None:
        """End the connection without the body's end, so that nobody takes it for whole."""
        ...


class _Nothing:
    """What aiohttp awaits where nothing is left to do: no coroutine is made for it."""

    def __await__(self) -> Generator[None, None, None]:
        return iter(())  # type: ignore[return-value]  # an iterator is all that `await` asks for


_NOTHING = _Nothing()


class ClientResponse:
    """`Downstream` on the transport of a request; also what the handler returns, of which aiohttp, where it and not
    `Session` runs the request, asks no more than `prepare`, `write_eof` and `keep_alive`.

    Raises ConnectionResetError from `write` and `offer` when the client is gone, and TimeoutError when it read
    nothing for `write_seconds`.
    """

    __slots__ = (
        "_begun",
        "_chunked_body",
        "_has_body",
        "_head",
        "_protocol",
        "_remaining_bytes",
        "_request",
        "_transport",
        "_write_seconds",
        "keep_alive",
    )

    def __init__(self, request: IncomingRequest, write_seconds: float) -> None:
        self._request = request
        self._protocol = request.protocol
        transport = self._protocol.transport
        if transport is None:
            raise ConnectionResetError("the client left")
        self._transport = cast("asyncio.WriteTransport", transport)
        self._write_seconds = write_seconds
        self.keep_alive = request.keep_alive
        self._chunked_body = False
        self._has_body = True
        self._remaining_bytes: int | None = None
        self._begun = False

    @property
    def begun(self) -> bool:
        return self._begun

    def send(self, status: int, reason: bytes, headers: Headers, body: bytes) -> None:
        self._begin(status, reason, headers, len(body))
        if not self._has_body or not body:
            self._transport.write(self._head)
        elif len(body) <= _JOIN_AT_MOST_BYTES:
            self._transport.write(self._head + body)
        else:
            self._transport.writelines((self._head, body))
        self._remaining_bytes = 0

    def begin(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        self._begin(status, reason, headers, length)
        self._transport.write(self._head)

    async def write(self, piece: bytes | bytearray | memoryview) -> None:
        if not self.offer(piece):
            await self.drained()

    def offer(self, piece: bytes | bytearray | memoryview, framed: bytes | None = None) -> bool:
        if not self._has_body or not piece:
            return True
        if self._transport.is_closing():
            raise ConnectionResetError("the client left")
        if framed is not None and self._chunked_body:
            self._transport.write(framed)
        elif self._chunked_body and len(piece) <= _JOIN_AT_MOST_BYTES:  # as `_put` does, for every piece of a stream
            self._transport.write(b"".join((b"%x\r\n" % len(piece), piece, b"\r\n")))
        else:
            self._put(piece)
        return not self._protocol.writing_paused

    async def drained(self) -> None:
        async with asyncio.timeout(self._write_seconds):
            await self._protocol._drain_helper()

    def write_last(self, piece: bytes) -> None:
        if self._has_body and not self._transport.is_closing():
            self._put(piece)

    def _put(self, piece: bytes | bytearray | memoryview) -> None:
        if self._chunked_body:
            self._transport.writelines((b"%x\r\n" % len(piece), piece, b"\r\n"))
        else:
            if self._remaining_bytes is not None:
                self._remaining_bytes -= len(piece)
            self._transport.write(piece)

    def end(self) -> None:
        if self._chunked_body and self._has_body:
            self._transport.write(b"0\r\n\r\n")
        elif self._remaining_bytes:
            self.break_off()  # shorter than announced: the client must see that

    def break_off(self) -> None:
        self.keep_alive = False
        self._transport.close()

    def prepare(self, request: IncomingRequest) -> Awaitable[None]:  # noqa: ARG002
        """aiohttp's hook before the body: the head was written already."""
        return _NOTHING

    def write_eof(self) -> Awaitable[None]:
        """aiohttp's hook after the handler: the end was written already."""
        return _NOTHING

    def _begin(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        request = self._request
        lines = [b"HTTP/1.1 %d %b" % (status, reason)]
        lines += [b": ".join(header) for header in headers]  # a third of what formatting costs
        self._has_body = request.method != "HEAD" and status not in _BODYLESS_STATUS
        if length is not None:
            self._remaining_bytes = length if self._has_body else 0
            if status not in _BODYLESS_STATUS:
                lines.append(b"content-length: %d" % length)
        elif self._has_body:
            if request.version >= HttpVersion11:
                self._chunked_body = True
                lines.append(b"transfer-encoding: chunked")
            else:
                self.keep_alive = False  # HTTP/1.0: the end of the connection is the end of the body
        if not self.keep_alive:
            lines.append(b"connection: close")
        elif request.version < HttpVersion11:
            lines.append(b"connection: keep-alive")
        lines.append(b"\r\n")
        self._head = b"\r\n".join(lines)
        self._begun = True

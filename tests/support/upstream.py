"""A raw upstream that plays a script: every byte, pause, reset and silence is written down in the test.

    async with ScriptedUpstream([Expect(), Send(b"HTTP/1.1 204 No Content\\r\\n\\r\\n"), Close()]) as upstream:
        ...
        assert upstream.requests[0].target == b"/v1/models"

Each play is for one connection, in the order in which they are accepted; the last one is played again for all that
follow. A step that fails (an unexpected end, say) is raised when the upstream is left.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

_READ_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it came: `raw` is every byte of it, framing included."""

    method: bytes
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    raw: bytes

    def header(self, name: bytes) -> bytes | None:
        """The first value of `name` (lower case), or None."""
        return next((value for key, value in self.headers if key.lower() == name), None)


class Peer:
    """The upstream's end of one connection, as the steps see it."""

    def __init__(
        self, upstream: ScriptedUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.upstream = upstream
        self.reader = reader
        self.writer = writer
        self.sent_bytes = 0
        self.left = asyncio.Event()  # the client's end is gone
        self.raw = bytearray()

    async def line(self) -> bytes:
        """One line of the request with its end."""
        line = await self.reader.readuntil(b"\n")
        self.raw += line
        return line

    async def exactly(self, count: int) -> bytes:
        """Exactly `count` bytes of the request."""
        piece = await self.reader.readexactly(count)
        self.raw += piece
        return piece

    async def until_left(self) -> None:
        """Return when the client has closed or reset; what it still sends is thrown away."""
        try:
            while await self.reader.read(_READ_BYTES):
                pass
        except ConnectionError:
            pass
        self.left.set()


class Step:
    """One step of a play."""

    async def play(self, peer: Peer) -> None:
        """Do it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Expect(Step):
    """Read one whole request and record it; with `head_only` leave its body unread."""

    head_only: bool = False

    async def play(self, peer: Peer) -> None:
        peer.raw.clear()
        method, target, _version = (await peer.line()).split()
        headers: list[tuple[bytes, bytes]] = []
        while line := (await peer.line()).rstrip(b"\r\n"):
            name, _, value = line.partition(b":")
            headers.append((name, value.strip()))
        fields = {name.lower(): value for name, value in headers}
        body = b"" if self.head_only else await self._body(peer, fields)
        peer.upstream.record(Received(method, target, tuple(headers), body, bytes(peer.raw)))

    async def _body(self, peer: Peer, fields: dict[bytes, bytes]) -> bytes:
        if fields.get(b"transfer-encoding") != b"chunked":
            return await peer.exactly(int(fields.get(b"content-length", b"0")))
        pieces: list[bytes] = []
        while size := int((await peer.line()).split(b";")[0], 16):
            pieces.append(await peer.exactly(size))
            await peer.line()
        await peer.line()
        return b"".join(pieces)


@dataclass(frozen=True, slots=True)
class Send(Step):
    """Write bytes and wait until the transport wants more."""

    data: bytes

    async def play(self, peer: Peer) -> None:
        peer.writer.write(self.data)
        peer.sent_bytes += len(self.data)
        await peer.writer.drain()


@dataclass(frozen=True, slots=True)
class Flood(Step):
    """Write `piece` this many times, as fast as the client takes it."""

    piece: bytes
    times: int

    async def play(self, peer: Peer) -> None:
        for _ in range(self.times):
            await Send(self.piece).play(peer)


@dataclass(frozen=True, slots=True)
class Pause(Step):
    """Go on when `event` is set by the test."""

    event: asyncio.Event

    async def play(self, peer: Peer) -> None:
        await self.event.wait()


@dataclass(frozen=True, slots=True)
class Mark(Step):
    """Set `event`, so that the test knows that the play is here."""

    event: asyncio.Event

    async def play(self, peer: Peer) -> None:
        self.event.set()


@dataclass(frozen=True, slots=True)
class Stall(Step):
    """Do nothing more until the client leaves."""

    async def play(self, peer: Peer) -> None:
        await peer.until_left()


@dataclass(frozen=True, slots=True)
class Close(Step):
    """End the connection in order (FIN)."""

    async def play(self, peer: Peer) -> None:
        peer.writer.close()


@dataclass(frozen=True, slots=True)
class Reset(Step):
    """End the connection with a reset (RST)."""

    async def play(self, peer: Peer) -> None:
        raw: socket.socket = peer.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.writer.transport.abort()


Play = Sequence[Step]


@dataclass
class ScriptedUpstream:
    """A server on loopback; use it as an asynchronous context.

    `plays` is one play, or a list of plays, one per connection. `requests` are all that were expected and read, in
    order; `peers` all connections ever accepted.
    """

    plays: Play | Sequence[Play]
    tls: ssl.SSLContext | None = None
    requests: list[Received] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)

    def __post_init__(self) -> None:
        steps = [step for step in self.plays if isinstance(step, Step)]
        plays: list[Play] = [play for play in self.plays if not isinstance(play, Step)]
        self._plays = plays or [steps]
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []
        self.port = 0

    @property
    def url(self) -> str:
        """The base URL, for `Origin.parse`."""
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/v1"

    @property
    def connections(self) -> int:
        """Connections accepted so far."""
        return len(self.peers)

    def record(self, request: Received) -> None:
        """A request was read whole."""
        self.requests.append(request)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in self.peers:
            peer.writer.transport.abort()
        if self._failures:
            raise self._failures[0]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(self, reader, writer)
        self.peers.append(peer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            for step in self._plays[min(len(self.peers), len(self._plays)) - 1]:
                await step.play(peer)
            if not writer.is_closing():
                await peer.until_left()
        except (ConnectionError, asyncio.IncompleteReadError):
            peer.left.set()  # the client left in the middle, which many plays are about
        except asyncio.CancelledError:
            pass  # the upstream is being left
        except (AssertionError, ValueError, LookupError) as error:
            self._failures.append(error)
        finally:
            self._tasks.discard(task)
            writer.transport.abort() if not writer.is_closing() else None


def answer(body: bytes = b"", *, status: bytes = b"200 OK", headers: Sequence[bytes] = ()) -> bytes:
    """An answer with Content-Length; `headers` are whole lines without their ends."""
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def chunked(*pieces: bytes, headers: Sequence[bytes] = (), end: bool = True) -> bytes:
    """A chunked answer, or, with `end` false, its beginning."""
    lines = [b"HTTP/1.1 200 OK", b"Transfer-Encoding: chunked", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + b"".join(map(chunk, pieces)) + (b"0\r\n\r\n" if end else b"")


def chunk(piece: bytes) -> bytes:
    """One piece in chunked framing."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


EVENT_STREAM = b"Content-Type: text/event-stream"

"""Long bodies over real sockets: read in place, and the connection given back as if aiohttp had read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop
from aiohttp import web

from proxy.downstream.body import IncomingRequest, read_body
from proxy.downstream.connection import SessionServer
from proxy.downstream.long_body import LONG_BYTES
from proxy.downstream.response import ClientResponse
from proxy.errors import RequestTimeout

BODY = bytes(range(256)) * (LONG_BYTES // 64)


def request(body: bytes = BODY) -> bytes:
    return b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body


class Server:
    """Reads bodies and answers with their digestible part; tells how each reading ended."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self.bodies: asyncio.Queue[object] = asyncio.Queue()
        self.entered = asyncio.Event()
        self.port = 0

    async def handle(self, asked: IncomingRequest) -> ClientResponse:
        answer = ClientResponse(asked, 10.0)
        self.entered.set()
        try:
            body = await read_body(asked, 2**24, self._limit_seconds)
        except RequestTimeout as error:
            self.bodies.put_nowait(error.status)
            answer.send(error.status, b"Late", [], b"")
        except asyncio.CancelledError:
            self.bodies.put_nowait("cancelled")
            raise
        else:
            self.bodies.put_nowait(bytes(body))
            answer.send(200, b"OK", [], b"%d" % len(body))
        return answer


@asynccontextmanager
async def serving(limit_seconds: float = 5.0) -> AsyncIterator[Server]:
    server = Server(limit_seconds)
    runner = web.ServerRunner(SessionServer(server.handle, auto_decompress=False))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    server.port = runner.addresses[0][1]
    try:
        async with asyncio.timeout(10):
            yield server
    finally:
        await runner.cleanup()


async def answers(reader: asyncio.StreamReader, count: int) -> list[tuple[bytes, bytes]]:
    """Status line and body of so many answers."""
    found = []
    for _ in range(count):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        found.append((head.partition(b"\r\n")[0], await reader.readexactly(length)))
    return found


async def check_one_connection(server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    ok = b"HTTP/1.1 200 OK"
    size = b"%d" % len(BODY)
    head, _, body = request().partition(b"\r\n\r\n")
    for pieces in (
        [request()],
        [head + b"\r\n\r\n", body],
        [head + b"\r\n\r\n" + body[:100], body[100:-1], body[-1:]],
    ):
        server.entered.clear()
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if len(pieces) > 1:
                await server.entered.wait()
        assert await answers(reader, 1) == [(ok, size)]
        assert await server.bodies.get() == BODY
    writer.write(request() + request(b"short") + request())
    assert await answers(reader, 3) == [(ok, size), (ok, b"5"), (ok, size)]
    assert [await server.bodies.get() for _ in range(3)] == [BODY, b"short", BODY]
    writer.close()


async def test_long_bodies_follow_each_other_on_one_connection_however_they_are_cut() -> None:
    """With the head, behind it, in pieces; short and long ones sent ahead of the answers."""
    async with serving() as server:
        await check_one_connection(server)


def test_it_is_the_same_on_the_loop_that_serves() -> None:
    """uvloop changes a connection's protocol by rules of its own."""

    async def main() -> None:
        async with serving() as server:
            await check_one_connection(server)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_a_long_body_that_does_not_come_is_a_408_and_ends_the_connection() -> None:
    """What still comes of it is never taken for another request."""
    async with serving(limit_seconds=0.05) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request()[: len(BODY) // 2])
        assert await server.bodies.get() == 408
        assert await answers(reader, 1) == [(b"HTTP/1.1 408 Late", b"")]
        assert await reader.read() == b""
        writer.close()


async def test_a_client_that_leaves_inside_a_long_body_ends_its_request() -> None:
    """The reading is cancelled as any other await of the request is."""
    async with serving() as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request()[: len(BODY) // 2])
        await server.entered.wait()
        writer.transport.abort()
        assert await server.bodies.get() == "cancelled"

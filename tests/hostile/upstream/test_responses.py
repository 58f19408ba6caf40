"""Hostile responses over raw sockets: what the client gets, and that no other reader gets any of their bytes."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.config.schema import Upstream
from tests.hostile.upstream.responses import CASES, OWN, POISON, Case, Result
from tests.support.cairn import config_for, running

CHAT = b'{"model":"test-model","messages":[{"role":"user","content":"hi"}]}'
WELL = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nwell"


class Hostile:
    """An upstream that sends one case in place of its first response, and well-formed ones for all other requests.

    The engine's own pages (GET) are 404, so that only the test's requests count.
    """

    def __init__(self, case: Case) -> None:
        self._case: Case | None = case
        self.answered = asyncio.Event()
        self.served = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if b"content-length: " in head:
                    await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                if head.startswith(b"GET "):
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                elif self._case is not None:
                    case, self._case = self._case, None
                    await self._send(case, writer)
                    if case.ends:
                        return
                else:
                    self.served += 1
                    writer.write(WELL)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # Cairn closed the connection, which many cases are about
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _send(self, case: Case, writer: asyncio.StreamWriter) -> None:
        for piece in case.pieces:
            if piece is None:
                await self.answered.wait()
            else:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)  # a segment of its own

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, limit=1 << 20)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def ask(port: int, method: str = "POST") -> tuple[int, bytes, bool]:
    """Status and body of one request on a connection of its own, and whether the body is complete by its framing."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"%b /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" % method.encode())
        writer.write(b"content-length: %d\r\n\r\n%b" % (len(CHAT), CHAT) if method == "POST" else b"\r\n")
        async with asyncio.timeout(10):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            status = int(head.split(b" ")[1])
            if method == "HEAD" or status in (204, 304):
                return status, b"", True
            if b"content-length: " in head:
                length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await _up_to(reader, length)
                return status, body, len(body) == length
            body = b""
            while line := await reader.readline():
                size = int(line, 16)
                piece = await _up_to(reader, size + 2)
                if size == 0 or len(piece) < size + 2:
                    return status, body + piece[:size], size == 0
                body += piece[:-2]
            return status, body, False
    finally:
        writer.close()


async def _up_to(reader: asyncio.StreamReader, count: int) -> bytes:
    try:
        return await reader.readexactly(count)
    except asyncio.IncompleteReadError as error:
        return error.partial
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("name", CASES)
async def test_a_hostile_response_reaches_its_own_reader_only(name: str) -> None:
    """The client gets what can be trusted of it; the next two get the responses that were made for them."""
    case = CASES[name]
    upstream = Hostile(case)
    async with upstream.running() as url:
        settings = Upstream(max_retries=0, first_byte_seconds=5, idle_seconds=5)
        async with running(config_for([url], upstream=settings)) as cairn:
            status, body, complete = await ask(cairn.port, case.method)
            upstream.answered.set()
            assert b"POISON" not in body
            if case.result is Result.WHOLE:
                assert (status, complete, body) == (case.status, True, case.body)
            elif case.result is Result.REFUSED or status != case.status:
                assert status == 502
            else:
                assert body.startswith(case.body)
                assert not complete
            for _ in range(2):
                assert await ask(cairn.port) == (200, b"well", True)
            assert upstream.served == 2


async def test_an_upstream_that_doubles_every_response_never_feeds_the_next_reader() -> None:
    """Fifty requests at once and in a row get their own: the second copy is never read as somebody's response."""
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET "):
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
                sent += 1
                writer.write(OWN)
                await writer.drain()
                writer.write(POISON)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with running(config_for([url], upstream=Upstream(max_connections=4))) as cairn:
            answers = [await ask(cairn.port) for _ in range(10)]
            answers += await asyncio.gather(*(ask(cairn.port) for _ in range(40)))
            assert set(answers) == {(200, b"own", True)}
            assert sent == 50


async def test_a_reset_in_place_of_a_response_is_a_502_and_the_next_request_is_served() -> None:
    """RST before the first byte, with no retry configured."""
    first = True

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal first
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET "):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif first:
            first = False
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
            return
        else:
            writer.write(WELL)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with running(config_for([url], upstream=Upstream(max_retries=0))) as cairn:
            assert (await ask(cairn.port))[0] == 502
            assert await ask(cairn.port) == (200, b"well", True)

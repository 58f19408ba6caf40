"""A real client port whose answers a test writes, and a client of raw bytes."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from proxy.clock import Clock, SystemClock
from proxy.downstream.errors import BadHttp, ClientLimit
from proxy.downstream.limits import Limits
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse, whole_response
from proxy.downstream.server import ClientServer
from proxy.errors import CairnError

Play = Callable[[IncomingRequest, ClientResponse], Awaitable[None]]


class Counts:
    """Counts what happens at a client port."""

    def __init__(self) -> None:
        self.errors: Counter[BadHttp] = Counter()
        self.refusals: Counter[ClientLimit] = Counter()
        self.gauges = (0, 0, 0)

    def client_error(self, reason: BadHttp) -> None:
        self.errors[reason] += 1

    def refused(self, limit: ClientLimit) -> None:
        self.refusals[limit] += 1

    def in_use(self, connections: int, head_bytes: int, body_bytes: int) -> None:
        self.gauges = (connections, head_bytes, body_bytes)


def plain_error(error: CairnError) -> bytes:
    """An error as the client port answers it without a request."""
    return whole_response(error.status, [], error.message.encode())


def client_server(
    play: Play, counts: Counts | None = None, clock: Clock | None = None, **limits: Any
) -> ClientServer:
    """A client port that answers by `play`."""
    return ClientServer(play, Limits(**limits), clock or SystemClock(), counts or Counts(), plain_error)


@asynccontextmanager
async def served_by(server: ClientServer) -> AsyncIterator[int]:
    """Run it on a free port of the loopback; yields the port."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    port: int = listening.getsockname()[1]
    await server.start([listening], 128)
    try:
        yield port
    finally:
        async with asyncio.timeout(20):
            await server.close()


@asynccontextmanager
async def serving(play: Play, **limits: Any) -> AsyncIterator[int]:
    """A client port whose every request is answered by `play`; yields its port."""
    async with served_by(client_server(play, **limits)) as port:
        yield port


async def talk(port: int, *pieces: bytes) -> bytes:
    """Send raw bytes; give what comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        async with asyncio.timeout(20):
            return await reader.read(-1)
    finally:
        writer.close()


GET = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

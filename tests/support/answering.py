"""A real server whose answers a test writes, and a client of raw bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

from aiohttp import web

from proxy.downstream.response import ClientResponse

Play = Callable[[web.BaseRequest, ClientResponse], Awaitable[None]]


@asynccontextmanager
async def serving(play: Play, write_seconds: float = 10.0) -> AsyncIterator[int]:
    """A server whose every request is answered by `play`; yields its port."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        answer = ClientResponse(request, write_seconds)
        await play(request, answer)
        return cast("web.StreamResponse", answer)  # as far as aiohttp's protocol asks

    runner = web.ServerRunner(web.Server(handle, handler_cancellation=True, auto_decompress=False))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def talk(port: int, *pieces: bytes, until_close: bool = True) -> bytes:
    """Send raw bytes; give what comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        async with asyncio.timeout(5):
            return await reader.read(-1)
    finally:
        writer.close()


GET = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"

"""A client of one kept connection, lean enough that ten thousand requests take seconds."""

from __future__ import annotations

import asyncio

import httptools


class LeanClient(asyncio.Protocol):
    """One connection at a time to a loopback port; made anew where it ended."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[tuple[int, bool]] | None = None

    async def post(self, path: str, headers: str, body: bytes, method: str = "POST") -> tuple[int, bool]:
        """Send and read to the end: the status, and whether the answer was whole. `headers` are whole lines."""
        if self._transport is None:
            await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", self._port)
        assert self._transport is not None
        self._answered = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        head = f"{method} {path} HTTP/1.1\r\nHost: h\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)
        return await self._answered

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
            self._transport = None
        self._end(whole=True)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._end(whole=False)

    def _end(self, *, whole: bool) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result((self._parser.get_status_code(), whole))

"""Serve the status page: its files, and the stream of states that keeps it live.

The admin port's guard decides who may see it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import web

from proxy.admin.answers import accepts_gzip
from proxy.admin.expect import meet_expectation
from proxy.admin.status import files
from proxy.admin.status.board import StatusBoard

EVENTS_PATH = "/events"
STREAMS_AT_MOST = 32  # open pages
LEAST_PAUSE_SECONDS = 0.25  # between two states
MOST_PAUSE_SECONDS = 1.0
TOTALS_SECONDS = 2.0  # how long the first state waits for the totals, which are read only for viewers
WRITE_SECONDS = 20.0  # a page that reads nothing for this long is taken to be closed
# plotly adds a style element, whose digest changes with its version, and sets style on its own elements. Nothing else
# can inject a style: the page shows the state as text and never as markup.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)


class StatusRoutes:
    """The routes of the status page. One per admin port.

    `is_allowed` returns whether a request may see the figures, which can change while its stream lasts.
    """

    def __init__(self, board: StatusBoard, is_allowed: Callable[[web.Request], bool]) -> None:
        self._board = board
        self._is_allowed = is_allowed
        self._files: dict[str, files.StaticFile] = {}
        self._loading = asyncio.Lock()
        self._closing = asyncio.Event()

    def add_to(self, app: web.Application) -> None:
        """Add the routes to the admin port."""
        for path in files.PATHS:
            app.router.add_get(path, self._file, expect_handler=meet_expectation)
        app.router.add_get(EVENTS_PATH, self._events, allow_head=False, expect_handler=meet_expectation)
        app.on_shutdown.append(self._close)

    async def _close(self, _: web.Application) -> None:
        self._closing.set()

    async def _file(self, request: web.Request) -> web.StreamResponse:
        file = await self._loaded(request.path)
        headers = {
            "Content-Security-Policy": POLICY,
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",  # cached, but revalidated each time, so that a new version shows at once
            "ETag": file.tag,
            "Vary": "Accept-Encoding",
        }
        if request.headers.get("If-None-Match") == file.tag:
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = file.content_type
        if not accepts_gzip(request):
            return web.Response(body=await asyncio.to_thread(lambda: file.plain), headers=headers)
        return web.Response(body=file.packed, headers=headers | {"Content-Encoding": "gzip"})

    async def _loaded(self, path: str) -> files.StaticFile:
        async with self._loading:
            file = self._files.get(path) or await asyncio.to_thread(files.load, path)
        if file is None:
            raise web.HTTPNotFound
        self._files[path] = file
        return file

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Send the history once, then the state every second and whenever a request ends."""
        if self._board.viewers >= STREAMS_AT_MOST:
            raise web.HTTPServiceUnavailable
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
            }
        )
        with self._board.viewing(), suppress(ConnectionResetError, TimeoutError):  # the page was closed
            await response.prepare(request)
            await _send(response, b"history", self._board.history_json())
            await _within(TOTALS_SECONDS, self._board.wait_for_totals())
            while not self._closing.is_set() and self._is_allowed(request):
                await _send(response, b"state", self._board.state_json())
                await self._pause()
        return response

    async def _pause(self) -> None:
        await self._closing_within(LEAST_PAUSE_SECONDS)
        await _within(MOST_PAUSE_SECONDS - LEAST_PAUSE_SECONDS, self._board.wait_for_change())

    async def _closing_within(self, seconds: float) -> None:
        await _within(seconds, self._closing.wait())


async def _within(seconds: float, waiting: Awaitable[object]) -> None:
    """Wait for something, but no longer than `seconds`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await waiting


async def _send(response: web.StreamResponse, event: bytes, content: bytes) -> None:
    async with asyncio.timeout(WRITE_SECONDS):
        await response.write(b"event: %b\ndata: %b\n\n" % (event, content))

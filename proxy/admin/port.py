"""The admin port: health, readiness, metrics, explanations and the status page, answered by the supervisor.

So a worker that stands still blocks no probe and no scrape. What it shows comes through `Overview`; it must not know
processes, sockets or how a figure came about.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import socket
from typing import Protocol

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.accounting.savings import By, SavingsReport, as_json
from proxy.accounting.totals_reader import Unreadable
from proxy.admin.status import PAGE_PATHS, StatusBoard, StatusRoutes
from proxy.config.checks import is_loopback
from proxy.config.schema import Config
from proxy.control.readiness import Readiness, ReadinessStatus

_GZIP_LEVEL = 1  # half of a page's 300 KB a scrape goes for a millisecond
_CLOSE_SECONDS = 1.0  # for answers under way at the end
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # probes have no token, and learn only a word

_encode = msgspec.json.encode


class Overview(Protocol):
    """What the admin port shows."""

    @property
    def config(self) -> Config:
        """The configuration in force."""
        ...

    @property
    def board(self) -> StatusBoard:
        """What the status page shows."""
        ...

    def readiness(self) -> Readiness:
        """Whether requests are welcome."""
        ...

    def scrape(self, accept: str) -> tuple[bytes, str]:
        """The metrics page for a scrape that accepts `accept`: body and content type."""
        ...

    async def savings(self, since: str, by: By) -> SavingsReport:
        """What was saved since a day. Raises ValueError where `since` is none, and Unreadable."""
        ...

    async def explain(self, path: str, body: bytes, credential: bytes) -> tuple[int, bytes]:
        """How `body`, sent to `path`, would be routed: status and JSON."""
        ...


class AdminPort:
    """The server of the admin port, on a socket that is listening already."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview
        self._scraping = asyncio.Lock()
        self._runner: web.AppRunner | None = None

    async def start(self, listening: socket.socket) -> None:
        """Answer on `listening` from now on."""
        app = web.Application(middlewares=[self._guard], client_max_size=self._overview.config.server.max_body_bytes)
        app.router.add_get("/healthz", self._health)
        app.router.add_get("/readyz", self._readiness)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/savings", self._savings)
        app.router.add_post("/explain", self._explain)
        StatusRoutes(self._overview.board).add_to(app)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_SECONDS)
        await self._runner.setup()
        await web.SockSite(self._runner, listening).start()

    async def close(self) -> None:
        """Stop answering."""
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not self._is_open(request.path) and (refusal := self._refusal(request)):
            status, why = refusal
            return _json(status, {"error": why})
        try:
            answer = await handler(request)
        except web.HTTPException as error:
            answer = _json(error.status, {"error": error.reason.lower()})
        if not answer.prepared:  # a stream has sent its own by now
            answer.headers["X-Content-Type-Options"] = "nosniff"
            answer.headers.setdefault("Cache-Control", "no-store")
        return answer

    def _is_open(self, path: str) -> bool:
        """The page's files hold no figures, and ask for the token themselves; without one they stay on loopback."""
        return path in _OPEN_PATHS or (path in PAGE_PATHS and self._overview.config.admin.token is not None)

    def _refusal(self, request: web.Request) -> tuple[int, str] | None:
        token = self._overview.config.admin.token
        if token is not None:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            right = _same(given.strip(), token.reveal()) and scheme.lower() == "bearer"
            return None if right else (401, "this needs the admin token as Authorization: Bearer TOKEN")
        # a name that a web page made point here (DNS rebinding) is not loopback's own
        if is_loopback(_host_of(request.headers.get("Host", ""))):
            return None
        return 403, "without admin.token this answers to localhost only"

    async def _health(self, _: web.Request) -> web.Response:
        return _json(200, {"status": "ok"})

    async def _readiness(self, request: web.Request) -> web.Response:
        found = self._overview.readiness()
        status = 503 if found.standing is ReadinessStatus.NOT_READY else 200
        if self._refusal(request):
            return _json(status, {"status": found.standing})
        detail = msgspec.structs.asdict(found)
        return _json(status, {"status": detail.pop("standing"), **detail})

    async def _metrics(self, request: web.Request) -> web.Response:
        async with self._scraping:
            body, content_type = self._overview.scrape(request.headers.get("Accept", ""))
            headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
            if "gzip" in request.headers.get("Accept-Encoding", ""):
                body = await asyncio.to_thread(gzip.compress, body, _GZIP_LEVEL)
                headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)

    async def _savings(self, request: web.Request) -> web.Response:
        try:
            by = By(request.query.get("by", By.DAY))
            made = await self._overview.savings(request.query.get("since", ""), by)
        except ValueError:
            return _json(400, {"error": "expected since=2026-11-23 or 7d, and by=day, model, upstream or tenant"})
        except Unreadable as error:
            return _json(503, {"error": str(error)})
        return web.Response(body=as_json(made), content_type="application/json")

    async def _explain(self, request: web.Request) -> web.Response:
        path = request.query.get("path", "/v1/chat/completions")
        credential = request.headers.get("X-Cairn-Client-Key", "").encode()
        status, body = await self._overview.explain(path, await request.read(), credential)
        return web.Response(status=status, body=body, content_type="application/json")


def _json(status: int, content: object) -> web.Response:
    return web.Response(status=status, body=_encode(content), content_type="application/json")


def _same(given: str, wanted: str) -> bool:
    """Compare in a time that tells neither where they differ nor how long the wanted one is."""
    return hmac.compare_digest(hashlib.sha256(given.encode()).digest(), hashlib.sha256(wanted.encode()).digest())


def _host_of(header: str) -> str:
    """The host in a `Host` header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]

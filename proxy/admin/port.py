"""The admin port: health, readiness, metrics, savings, routing explanations and the status page.

The supervisor answers it, so that a blocked worker blocks no probe and no scrape. Everything it shows comes from
`Overview`.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import socket
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.accounting.savings import By, SavingsReport, as_json
from proxy.accounting.totals_reader import Unreadable
from proxy.admin import openapi
from proxy.admin.answers import HEADERS, accepts_gzip, json_answer
from proxy.admin.expect import AnyTarget, meet_expectation
from proxy.admin.status import EVENTS_PATH, PAGE_PATHS, StatusBoard, StatusRoutes
from proxy.config.checks import host_of, is_loopback
from proxy.config.schema import Config
from proxy.control.readiness import Readiness, ReadinessStatus

_GZIP_LEVEL = 1  # halves the 300 KB of a metrics page in a millisecond
_CLOSE_SECONDS = 1.0  # for responses in progress at shutdown
_OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # probes send no token, and receive only the status

_UNCOMPRESSED = frozenset({"", "identity", "utf-8"})

_URGENCY = (("x-cairn-priority", b"x-cairn-priority"), ("x-request-deadline", b"x-request-deadline"))
"""Headers of a client that decide how a request waits, as strings and as bytes."""


class Overview(Protocol):
    """The source of everything that the admin port shows."""

    @property
    def config(self) -> Config:
        """The configuration in use."""
        ...

    @property
    def board(self) -> StatusBoard:
        """The state of the status page."""
        ...

    def readiness(self) -> Readiness:
        """Return whether requests are welcome."""
        ...

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics page for a scraper that sent `accept`: body and content type."""
        ...

    async def savings(self, since: str, by: By) -> SavingsReport:
        """Return the savings since a day. Raises ValueError if `since` is not a day, and Unreadable."""
        ...

    async def explain(
        self, path: str, body: bytes, credential: bytes, headers: tuple[tuple[bytes, bytes], ...]
    ) -> tuple[int, bytes]:
        """Return how `body`, sent to `path` with these headers about its urgency, would be routed: an HTTP status and
        JSON."""
        ...


class AdminPort:
    """The server of the admin port, on a socket that already listens."""

    def __init__(self, overview: Overview) -> None:
        self._overview = overview
        self._scraping = asyncio.Lock()
        self._documents: dict[str, bytes] = {}
        self._runner: web.AppRunner | None = None
        self._methods: dict[str, str] = {}  # by path, as the header `Allow` names them

    def application(self) -> web.Application:
        """Make the application with all routes."""
        app = web.Application(middlewares=[self._guard], client_max_size=self._overview.config.server.max_body_bytes)
        routes = app.router
        routes.add_get("/healthz", self._health, expect_handler=meet_expectation)
        routes.add_get("/readyz", self._readiness, expect_handler=meet_expectation)
        routes.add_get("/metrics", self._metrics, expect_handler=meet_expectation)
        routes.add_get("/savings", self._savings, expect_handler=meet_expectation)
        routes.add_post("/explain", self._explain, expect_handler=meet_expectation)
        for path in openapi.OPENAPI_PATHS:
            routes.add_get(path, self._openapi, expect_handler=meet_expectation)
        StatusRoutes(self._overview.board, lambda request: self._refusal(request) is None).add_to(app)
        for resource in routes.resources():
            self._methods[resource.canonical] = ", ".join(sorted([route.method for route in resource]))
        routes.register_resource(AnyTarget(self._nothing))
        return app

    async def start(self, listening: socket.socket) -> None:
        """Start to serve on `listening`."""
        app = self.application()
        # some hundred bytes can expand to gigabytes, and would as they arrive, whatever the path and the token
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_SECONDS, auto_decompress=False)
        await self._runner.setup()
        await web.SockSite(self._runner, listening).start()

    async def close(self) -> None:
        """Stop serving."""
        if self._runner is not None:
            await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if refusal := _cross_site(request) or (None if self._is_open(request.path) else self._refusal(request)):
            status, why = refusal
            return json_answer(status, {"error": why}, {"WWW-Authenticate": "Bearer"} if status == 401 else None)
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = json_answer(error.status, {"error": error.reason.lower()})
        if not response.prepared:  # a stream has already sent its headers
            for name, value in HEADERS.items():
                response.headers.setdefault(name, value)
        return response

    def _is_open(self, path: str) -> bool:
        """Return whether `path` needs no token. The page's files and the API's description contain no figures."""
        is_public = path in PAGE_PATHS or path in openapi.OPENAPI_PATHS
        return path in _OPEN_PATHS or (is_public and self._overview.config.admin.token is not None)

    def _refusal(self, request: web.Request) -> tuple[int, str] | None:
        token = self._overview.config.admin.token
        if token is not None:
            scheme, _, given = request.headers.get("Authorization", "").partition(" ")
            is_right = _same(given.strip(), token.reveal()) and scheme.lower() == "bearer"
            return None if is_right else (401, "send the admin token as Authorization: Bearer TOKEN")
        # refuses a host name that a web page made point here (DNS rebinding)
        if is_loopback(host_of(request.headers.get("Host", ""))):
            return None
        return 403, "without admin.token only requests to localhost are answered"

    async def _health(self, _: web.Request) -> web.Response:
        return json_answer(200, {"status": "ok"})

    async def _readiness(self, request: web.Request) -> web.Response:
        readiness = self._overview.readiness()
        http_status = 503 if readiness.status is ReadinessStatus.NOT_READY else 200
        if self._refusal(request):
            return json_answer(http_status, {"status": readiness.status})
        return json_answer(http_status, readiness.shown())

    async def _metrics(self, request: web.Request) -> web.Response:
        async with self._scraping:
            accept = _bytes(request.headers.get("Accept", "")).decode("ascii", "replace")  # a part of it is repeated
            body, content_type = await self._overview.scrape(accept)
            headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
            if accepts_gzip(request):
                body = await asyncio.to_thread(gzip.compress, body, _GZIP_LEVEL)
                headers["Content-Encoding"] = "gzip"
        return web.Response(body=body, headers=headers)

    async def _savings(self, request: web.Request) -> web.Response:
        try:
            by = By(request.query.get("by", By.DAY))
            report = await self._overview.savings(request.query.get("since", ""), by)
        except ValueError:
            return json_answer(
                400, {"error": "expected since=2026-11-23 or 7d, and by=day, model, upstream or tenant"}
            )
        except Unreadable as error:
            return json_answer(503, {"error": str(error)})
        return web.Response(body=as_json(report), content_type="application/json")

    async def _explain(self, request: web.Request) -> web.Response:
        path = request.query.get("path", "/v1/chat/completions")
        if not path.isascii() or not path.isprintable():
            return json_answer(400, {"error": "expected path=/v1/..., in ASCII"})
        if request.headers.get("Content-Encoding", "identity").lower() not in _UNCOMPRESSED:
            return json_answer(415, {"error": "send the body uncompressed"})
        credential = _bytes(request.headers.get("X-Cairn-Client-Key", ""))
        urgency = tuple([(name, _bytes(request.headers[key])) for key, name in _URGENCY if key in request.headers])
        try:
            async with asyncio.timeout(self._overview.config.server.body_seconds):  # aiohttp has no limit of its own
                sent = await request.read()
        except TimeoutError:
            late = json_answer(408, {"error": "the body did not come in time"})
            late.force_close()
            return late
        status, body = await self._overview.explain(path, sent, credential, urgency)
        return web.Response(status=status, body=body, content_type="application/json")

    async def _nothing(self, request: web.Request) -> web.Response:
        """Refuse any other path or method."""
        if (methods := self._methods.get(request.path)) is not None:
            return json_answer(405, {"error": "method not allowed"}, {"Allow": methods})
        return json_answer(404, {"error": "not found"})

    async def _openapi(self, request: web.Request) -> web.Response:
        body = self._documents.get(request.path)
        if body is None:
            body = self._documents[request.path] = await asyncio.to_thread(openapi.encoded, request.path)
        return web.Response(body=body, content_type="application/json")


def _same(given: str, wanted: str) -> bool:
    """Compare in constant time; neither the place of a difference nor the length of `wanted` can be measured."""
    return hmac.compare_digest(hashlib.sha256(_bytes(given)).digest(), hashlib.sha256(_bytes(wanted)).digest())


def _bytes(header: str) -> bytes:
    """Return the bytes that were sent; aiohttp decodes bytes that are not UTF-8 to surrogates."""
    return header.encode("utf-8", "surrogateescape")


def _cross_site(request: web.Request) -> tuple[int, str] | None:
    """Refuse what a page of another site makes a browser send, except for following a link."""
    site = request.headers.get("Sec-Fetch-Site", "none")
    origins = request.headers.getall("Origin", ())
    is_foreign = site not in ("none", "same-origin") or not all(_is_own_origin(each, request) for each in origins)
    follows_link = (
        request.method in ("GET", "HEAD")
        and request.headers.get("Sec-Fetch-Mode") == "navigate"
        and request.headers.get("Sec-Fetch-Dest") == "document"
        and request.path != EVENTS_PATH
    )
    return (403, "requests from other sites are refused") if is_foreign and not follows_link else None


def _is_own_origin(origin: str, request: web.Request) -> bool:
    """Return whether `origin` has the host and port of the request; its scheme may be that of a proxy in front."""
    return origin.partition("://")[2].lower() == request.headers.get("Host", "").lower()

"""HTTP in, `Call` out; the pipeline's answer goes out through `ClientResponse`.

One of the three places that catch every exception: whatever is not foreseen becomes a 500 and a logged defect, and
the next request is served. It must not know prompts, replicas or prefixes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Final

from aiohttp import web

from proxy.clock import Clock
from proxy.config.schema import Server
from proxy.downstream.body import IncomingRequest, read_body, stream_body
from proxy.downstream.connection import SessionServer
from proxy.downstream.response import ClientResponse, Downstream
from proxy.errors import REASON_PHRASES, CairnError, InternalError
from proxy.model import Body, Call, Endpoint, Tenant
from proxy.pipeline.admission import Authenticator, InFlightLimit, credentials_of
from proxy.pipeline.cors import Cors
from proxy.pipeline.pipeline import Pipeline
from proxy.pipeline.relay import Upload
from proxy.pipeline.routes import Route, Routes, is_liveness
from proxy.wire.decode import decode_request, request_encoding
from proxy.wire.errors import error_response
from proxy.wire.headers import kept_request_id, lower_names

log = logging.getLogger("cairn.server")

_NOBODY = Tenant("")
_UNKNOWN = Route(Endpoint.OTHER, "/")
_MAX_HEADERS: Final = 256
_UNDECLARED_BYTES = 1024 * 1024
"""What a body of unknown length counts as, against the bound on bytes in flight."""

_AROUND_CONTEXT_BYTES = 128 * 1024
"""Beside messages and tools: names, descriptions, metadata and white space of a context's upload."""

_DECODED_INLINE_BYTES: Final = 4096
"""A compressed body up to this size is decoded at once, a longer one in a thread: it may expand a thousandfold."""


class HttpServer:
    """The client port of one worker. `new_id` makes request ids, unlike any other's."""

    def __init__(
        self,
        settings: Server,
        routes: Routes,
        authenticator: Authenticator,
        room: InFlightLimit,
        pipeline: Pipeline,
        clock: Clock,
        new_id: Callable[[], str],
        *,
        max_context_bytes: int,
    ) -> None:
        self._settings = settings
        self._routes = routes
        self._cors = Cors(settings.cors_origins)
        self._room = room
        self._pipeline = pipeline
        self._clock = clock
        self._new_id = new_id
        self._max_upload_bytes = min(settings.max_body_bytes, max_context_bytes + _AROUND_CONTEXT_BYTES)
        self._server: web.Server | None = None
        self._runner: web.ServerRunner | None = None
        self.authenticator = authenticator

    async def start(self, listening: Sequence[socket.socket]) -> None:
        """Serve on sockets that listen already."""
        settings = self._settings
        self._server = SessionServer(
            self.handle,
            keepalive_timeout=settings.keepalive_seconds,
            max_line_size=settings.max_header_bytes,
            max_field_size=settings.max_header_bytes,
            max_headers=_MAX_HEADERS,
            auto_decompress=False,
            lingering_time=2.0,
        )
        self._runner = web.ServerRunner(self._server)
        await self._runner.setup()
        for end in listening:
            await web.SockSite(self._runner, end, backlog=settings.backlog).start()

    async def stop(self, finish_seconds: float) -> None:
        """Accept no more, let what runs finish for `finish_seconds`, then end it."""
        if self._runner is None or self._server is None:
            return
        for site in tuple(self._runner.sites):
            await site.stop()
        self._server.pre_shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(finish_seconds):
                await self._room.empty.wait()
        await self._server.shutdown(0.1)
        await self._runner.cleanup()

    async def handle(self, request: IncomingRequest) -> ClientResponse:
        """One request, from its head to the last byte of its answer."""
        received_seconds = self._clock.monotonic()
        client = ClientResponse(request, self._settings.write_seconds)
        headers = lower_names(request.raw_headers)
        if (granted := self._cors.preflight(request.method, headers)) is not None:
            client.send(204, REASON_PHRASES[204], granted, b"")
            return client
        downstream = self._cors.response(client, headers)
        if is_liveness(request.method, request.raw_path.partition("?")[0]):
            downstream.send(200, REASON_PHRASES[200], ((b"content-type", b"text/plain"),), b"ok\n")
            return client
        request_id = kept_request_id(headers) or self._new_id()
        route = _UNKNOWN
        announced_bytes = request.content_length
        held_bytes = 0
        entered = False
        try:
            route = self._routes.route(request.method, request.raw_path)
            tenant = self.authenticator.tenant_of_any(credentials_of(headers))
            reads = route.must_read(tenant)
            held_bytes = 0 if not reads else _UNDECLARED_BYTES if announced_bytes is None else announced_bytes
            self._room.enter(held_bytes)
            entered = True
            body, encoded = await self._body(request, headers, route.endpoint) if reads else (b"", None)
            call = self._call(request, request_id, tenant, route, headers, body, received_seconds, encoded)
            await self._pipeline.handle(call, downstream, None if reads else self._upload(request))
        except CairnError as error:
            self._refuse(request, request_id, route, headers, received_seconds, error, downstream)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:  # the handler of last resort
            log.exception("request %s failed inside Cairn", request_id)
            self._tell(
                InternalError("Something went wrong inside the proxy."), route.endpoint, request_id, downstream
            )
        finally:
            if entered:
                self._room.leave(held_bytes)
        return client

    async def _body(
        self, request: IncomingRequest, headers: Sequence[tuple[bytes, bytes]], endpoint: Endpoint
    ) -> tuple[Body, Body | None]:
        """The whole body, decoded; and as it was sent, if that was compressed."""
        encoding = request_encoding(headers)
        limit = self._max_upload_bytes if endpoint is Endpoint.CACHING else self._settings.max_body_bytes
        body = await read_body(request, limit, self._settings.body_seconds)
        if not encoding:
            return body, None
        if len(body) <= _DECODED_INLINE_BYTES:
            return decode_request(body, encoding, limit), body
        return await asyncio.to_thread(decode_request, body, encoding, limit), body

    def _upload(self, request: IncomingRequest) -> Upload | None:
        if not request.body_exists:
            return None
        return Upload(stream_body(request, self._settings.body_seconds), request.content_length)

    def _call(
        self,
        request: IncomingRequest,
        request_id: str,
        tenant: Tenant,
        route: Route,
        headers: tuple[tuple[bytes, bytes], ...],
        body: Body,
        received_seconds: float,
        encoded_body: Body | None = None,
    ) -> Call:
        return Call(
            request_id=request_id,
            tenant=tenant,
            endpoint=route.endpoint,
            method=request.method,
            target=route.target,
            headers=headers,
            body=body,
            received_seconds=received_seconds,
            read_seconds=self._clock.monotonic(),
            deadline_seconds=received_seconds + self._settings.request_seconds,
            access=route.access,
            path_model=route.model,
            object_id=route.object_id,
            encoded_body=encoded_body,
        )

    def _refuse(
        self,
        request: IncomingRequest,
        request_id: str,
        route: Route,
        headers: tuple[tuple[bytes, bytes], ...],
        received_seconds: float,
        error: CairnError,
        client: Downstream,
    ) -> None:
        call = self._call(request, request_id, _NOBODY, route, headers, b"", received_seconds)
        self._pipeline.turn_away(call, error, client)

    def _tell(self, error: CairnError, endpoint: Endpoint, request_id: str, client: Downstream) -> None:
        if client.begun:
            client.break_off()
            return
        answer = error_response(error, endpoint, request_id=request_id)
        client.send(answer.status, REASON_PHRASES[answer.status], answer.headers, answer.body)

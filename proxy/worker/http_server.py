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
from http import HTTPStatus
from typing import Final

from aiohttp import web

from proxy.clock import Clock
from proxy.config.schema import Server
from proxy.downstream.body import IncomingRequest, read_body, stream_body
from proxy.downstream.connection import SessionServer
from proxy.downstream.response import ClientResponse
from proxy.errors import BadRequest, CairnError, InternalError
from proxy.model import Body, Call, Endpoint, Tenant
from proxy.pipeline.admission import Authenticator, InFlightLimit, credential_of, endpoint_of
from proxy.pipeline.pipeline import Pipeline
from proxy.pipeline.relay import Upload
from proxy.wire.errors import error_response
from proxy.wire.headers import kept_request_id, lower_names

log = logging.getLogger("cairn.server")

_NOBODY = Tenant("")
_NOT_READ = frozenset({Endpoint.OTHER, Endpoint.MODELS})
_MAX_HEADERS: Final = 256
_UNDECLARED_BYTES = 1024 * 1024
"""What a body of unknown length counts as, against the bound on bytes in flight."""

_AROUND_CONTEXT_BYTES = 128 * 1024
"""Beside messages and tools: names, descriptions, metadata and white space of a context's upload."""

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class HttpServer:
    """The client port of one worker. `new_id` makes request ids, unlike any other's."""

    def __init__(
        self,
        settings: Server,
        authenticator: Authenticator,
        room: InFlightLimit,
        pipeline: Pipeline,
        clock: Clock,
        new_id: Callable[[], str],
        *,
        max_context_bytes: int,
    ) -> None:
        self._settings = settings
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
        request_id = kept_request_id(headers) or self._new_id()
        endpoint = Endpoint.OTHER
        announced_bytes = request.content_length
        held_bytes = 0
        entered = False
        try:
            endpoint = endpoint_of(request.method, request.raw_path.partition("?")[0])
            tenant = self.authenticator.tenant_of(credential_of(headers))
            passes = endpoint in _NOT_READ
            held_bytes = 0 if passes else _UNDECLARED_BYTES if announced_bytes is None else announced_bytes
            self._room.enter(held_bytes)
            entered = True
            body: Body = b"" if passes else await self._body(request, headers, endpoint)
            call = self._call(request, request_id, tenant, endpoint, headers, body, received_seconds)
            await self._pipeline.handle(call, client, self._upload(request) if passes else None)
        except CairnError as error:
            self._refuse(request, request_id, endpoint, headers, received_seconds, error, client)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:  # the handler of last resort
            log.exception("request %s failed inside Cairn", request_id)
            self._tell(InternalError("Something went wrong inside the proxy."), endpoint, request_id, client)
        finally:
            if entered:
                self._room.leave(held_bytes)
        return client

    async def _body(
        self, request: IncomingRequest, headers: Sequence[tuple[bytes, bytes]], endpoint: Endpoint
    ) -> Body:
        for name, value in headers:
            if name == b"content-encoding" and value.lower() != b"identity":
                raise BadRequest("A compressed body is not read.", code="unsupported_content_encoding")
        limit = self._max_upload_bytes if endpoint is Endpoint.CACHING else self._settings.max_body_bytes
        return await read_body(request, limit, self._settings.body_seconds)

    def _upload(self, request: IncomingRequest) -> Upload | None:
        if not request.body_exists:
            return None
        return Upload(stream_body(request, self._settings.body_seconds), request.content_length)

    def _call(
        self,
        request: IncomingRequest,
        request_id: str,
        tenant: Tenant,
        endpoint: Endpoint,
        headers: tuple[tuple[bytes, bytes], ...],
        body: Body,
        received_seconds: float,
    ) -> Call:
        return Call(
            request_id,
            tenant,
            endpoint,
            request.method,
            request.raw_path,
            headers,
            body,
            received_seconds,
            self._clock.monotonic(),
            received_seconds + self._settings.request_seconds,
        )

    def _refuse(
        self,
        request: IncomingRequest,
        request_id: str,
        endpoint: Endpoint,
        headers: tuple[tuple[bytes, bytes], ...],
        received_seconds: float,
        error: CairnError,
        client: ClientResponse,
    ) -> None:
        call = self._call(request, request_id, _NOBODY, endpoint, headers, b"", received_seconds)
        self._pipeline.turn_away(call, error, client)

    def _tell(self, error: CairnError, endpoint: Endpoint, request_id: str, client: ClientResponse) -> None:
        if client.begun:
            client.break_off()
            return
        answer = error_response(error, endpoint, request_id=request_id)
        client.send(answer.status, _REASONS[answer.status], answer.headers, answer.body)

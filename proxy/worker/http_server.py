"""Turn a request into a `Call`, and answer it through the pipeline.

This is one of the few places that catch every exception: an unforeseen one becomes a 500 and a logged defect, and the
next request is served.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from proxy.clock import Clock
from proxy.downstream.body import overloaded
from proxy.downstream.body_reader import body_at_hand, read_body, stream_body
from proxy.downstream.connection import Connection
from proxy.downstream.errors import BadHttp, ClientLimit
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse, Downstream, whole_response
from proxy.downstream.server import ClientServer
from proxy.errors import REASON_PHRASES, CairnError, InternalError, TooLarge, UpgradeRefused
from proxy.metrics import definitions as metrics
from proxy.metrics.recorder import Recorder
from proxy.model import Body, Endpoint
from proxy.pipeline.admission import Authenticator, InFlightLimit
from proxy.pipeline.cors import Cors
from proxy.pipeline.dispatch import Upload
from proxy.pipeline.routes import Route, Routes, is_liveness
from proxy.records import Call, Tenant
from proxy.wire.decode import decode_request, request_encoding
from proxy.wire.errors import error_response
from proxy.wire.headers import kept_request_id
from proxy.wire.paths import split_target
from proxy.worker.port_settings import PortSettings

log = logging.getLogger("cairn.server")

_NOBODY = Tenant("")
_UNKNOWN = Route(Endpoint.OTHER, "unknown")
"""A path that is not served or cannot be read. It does not repeat the client's text, so that lines can be grouped."""

_CACHING: Final = Endpoint.CACHING  # a constant: the member of an enum is looked up in Python
_WEBSOCKET_PATHS: Final = ("/responses", "/realtime")  # parts of them

_DECODED_INLINE_BYTES: Final = 4096
"""A compressed body up to this size is decoded at once, a longer one in a thread: it may expand a thousandfold."""


Headers = tuple[tuple[bytes, bytes], ...]


class RequestPipeline(Protocol):
    """The pipeline as the server sees it."""

    def handle(self, call: Call, client: Downstream, upload: Upload | None = None) -> Awaitable[None]:
        """Answer an admitted call when the result is awaited."""
        ...

    def turn_away(self, call: Call, error: CairnError, client: Downstream) -> None:
        """Answer a call that was not admitted."""
        ...


class HttpServer:
    """The client port of one worker. `new_id` makes unique request ids.

    Create it inside the event loop.
    """

    def __init__(
        self,
        settings: PortSettings,
        routes: Routes,
        authenticator: Authenticator,
        room: InFlightLimit,
        pipeline: RequestPipeline,
        recorder: Recorder,
        clock: Clock,
        new_id: Callable[[], str],
    ) -> None:
        self._settings = settings.server
        self._max_upload_bytes = settings.max_upload_bytes
        self._routes = routes
        self._cors = Cors(settings.server.cors_origins)
        self._room = room
        self._pipeline = pipeline
        self._clock = clock
        self._new_id = new_id
        self.authenticator = authenticator
        self.clients = ClientServer(self.handle, settings.limits, clock, Meter(recorder), _plain_error)

    async def start(self, listening: Sequence[socket.socket]) -> None:
        """Serve on sockets that listen already."""
        await self.clients.start(listening, self._settings.backlog)

    async def stop(self, finish_seconds: float) -> None:
        """Accept no more, let running requests finish within `finish_seconds`, then end them."""
        if finish_seconds:
            await self.clients.drain(finish_seconds)
        await self.clients.close()

    def connect(self) -> Connection:
        """Make the protocol of a connection that does not come from a listening socket."""
        return self.clients.connect()

    def adopt(self, connection: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere."""
        self.clients.adopt(connection)

    async def handle(self, request: IncomingRequest, client: ClientResponse) -> None:
        """Answer one request, from its head to the last byte of its answer."""
        received_seconds = self._clock.monotonic()
        headers = tuple(request.headers)
        if (granted := self._cors.preflight(request.method, headers)) is not None:
            client.send(204, REASON_PHRASES[204], granted, b"")
            return
        downstream = self._cors.response(client, headers)
        path = request.target.partition("?")[0]
        if is_liveness(request.method, path):
            downstream.send(200, REASON_PHRASES[200], ((b"content-type", b"text/plain"),), b"ok\n")
            return
        request_id = kept_request_id(headers) or self._new_id()
        route = _UNKNOWN
        entered = False
        decoded_bytes = 0
        try:
            if request.upgrade and (websocket := _websocket_route(request)) is not None:
                route = websocket
                raise UpgradeRefused("This proxy does not speak WebSocket; send the request over HTTP.")
            route = self._routes.route(request.method, request.target)
            tenant = self.authenticator.admit(request.method, headers, request.target)
            self._room.enter()
            entered = True
            reads = route.reads_body
            encoded: Body | None = None
            body = self._body_at_hand(request, headers, route.endpoint) if reads else b""
            if body is None:
                body, encoded = await self._body(request, headers, route.endpoint)
            if encoded is not None:
                decoded_bytes = len(body)
                self._hold(decoded_bytes, len(encoded))
            call = self._call(request, request_id, tenant, route, headers, body, received_seconds, encoded)
            await (self._pipeline.handle(call, downstream) if reads else self._pass(request, call, downstream))
        except CairnError as error:
            call = self._call(request, request_id, _NOBODY, route, headers, b"", received_seconds)
            self._pipeline.turn_away(call, error, downstream)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:  # the handler of last resort
            log.exception("request %s failed inside Cairn", request_id)
            self._report_defect(route.endpoint, request_id, downstream)
        finally:
            self.clients.bodies.give(decoded_bytes)
            if entered:
                self._room.leave()

    def _body_at_hand(self, request: IncomingRequest, headers: Headers, endpoint: Endpoint) -> Body | None:
        """Return the body of nearly all short requests: it came with its head and is not compressed. Else None."""
        if request.body is not None or request_encoding(headers):
            return None
        return body_at_hand(request, self._body_bytes_most(endpoint))

    def _body_bytes_most(self, endpoint: Endpoint) -> int:
        return self._max_upload_bytes if endpoint is _CACHING else self._settings.max_body_bytes

    async def _body(self, request: IncomingRequest, headers: Headers, endpoint: Endpoint) -> tuple[Body, Body | None]:
        """Return the whole body, decoded, and the body as sent if it was compressed."""
        encoding = request_encoding(headers)
        limit = self._body_bytes_most(endpoint)
        self._check_declared(request, limit)
        body = await read_body(request, limit, self._settings.body_seconds)
        if not encoding:
            return body, None
        if len(body) <= _DECODED_INLINE_BYTES:
            return decode_request(body, encoding, limit), body
        return await asyncio.to_thread(decode_request, body, encoding, limit), body

    def _hold(self, nbytes: int, own: int) -> None:
        """Count `nbytes` of bodies in flight, `own` of which are counted already. Raises Overloaded."""
        if not self.clients.bodies.take(nbytes, own):
            self.clients.refused(ClientLimit.BODY_BYTES)
            raise overloaded()

    def _check_declared(self, request: IncomingRequest, limit_bytes: int) -> None:
        """Refuse a body that is too large, or for which there is no room now, before the client sends it."""
        declared_bytes = request.content_length
        if declared_bytes is None or request.body is None:
            return
        if declared_bytes > limit_bytes:  # checked before the room: a later retry would not help
            raise TooLarge(f"The body has {declared_bytes} bytes; at most {limit_bytes} are read.")
        held_bytes = request.body.held_bytes
        if not self.clients.bodies.fits(declared_bytes - held_bytes, held_bytes):
            self.clients.refused(ClientLimit.BODY_BYTES)
            raise overloaded()

    async def _pass(self, request: IncomingRequest, call: Call, downstream: Downstream) -> None:
        """Answer a call whose body passes while it comes."""
        room = UploadRoom(self._hold, self.clients.bodies.give)
        upload: Upload | None = None
        if request.has_body:
            upload = Upload(stream_body(request, self._settings.body_seconds), request.content_length, room)
        try:
            await self._pipeline.handle(call, downstream, upload)
        finally:
            room.hold(0)

    def _call(
        self,
        request: IncomingRequest,
        request_id: str,
        tenant: Tenant,
        route: Route,
        headers: Headers,
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
            access=route.access,
            path_model=route.model,
            object_id=route.object_id,
            encoded_body=encoded_body,
            peer=request.peer,
            may_have_effects=route.may_have_effects,
        )

    def _report_defect(self, endpoint: Endpoint, request_id: str, client: Downstream) -> None:
        if client.begun:
            client.break_off()
            return
        error = InternalError("Something went wrong inside Cairn.")
        response = error_response(error, endpoint, request_id=request_id)
        client.send(response.status, REASON_PHRASES[response.status], response.headers, response.body)


class UploadRoom:
    """Counts the bytes that are held of one body that passes, besides those on their way.

    Args:
        take: counts some bytes more, the second argument being those that are counted already. Raises Overloaded.
        give: gives bytes back.
    """

    def __init__(self, take: Callable[[int, int], None], give: Callable[[int], None]) -> None:
        self._take = take
        self._give = give
        self._held_bytes = 0

    def hold(self, nbytes: int) -> None:
        """Count `nbytes` in place of what was counted before. Raises Overloaded if there is no room for more."""
        own, self._held_bytes = self._held_bytes, nbytes
        if nbytes > own:
            self._take(nbytes - own, own)
        elif nbytes < own:
            self._give(own - nbytes)


class Meter:
    """Counts what happens at the client port."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def client_error(self, reason: BadHttp) -> None:
        self._recorder.inc(metrics.CLIENT_ERRORS, (reason.value,))

    def refused(self, limit: ClientLimit) -> None:
        self._recorder.inc(metrics.CLIENT_REFUSED, (limit.value,))

    def in_use(self, connections: int, head_bytes: int, body_bytes: int) -> None:
        self._recorder.set(metrics.CLIENT_CONNECTIONS, (), connections)
        self._recorder.set(metrics.CLIENT_HEAD_BYTES, (), head_bytes)
        self._recorder.set(metrics.CLIENT_BODY_BYTES, (), body_bytes)


def _websocket_route(request: IncomingRequest) -> Route | None:
    """Return the route of a request for a WebSocket where clients try one first; None for any other upgrade.

    Raises BadRequest for an ambiguous path.
    """
    if b"websocket" not in [protocol.strip() for protocol in request.upgrade.split(b",")]:
        return None
    path = split_target(request.target)[0]
    name = next((name for name in _WEBSOCKET_PATHS if name in path), None)
    return None if name is None else Route(Endpoint.OTHER, f"/v1{name}")


def _plain_error(error: CairnError) -> bytes:
    response = error_response(error, Endpoint.OTHER)
    return whole_response(response.status, response.headers, response.body)

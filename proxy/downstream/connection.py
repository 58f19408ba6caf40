"""A client's connection: an asyncio protocol that reads requests and has them answered, one at a time.

| state | waits for | the client's bytes go to | its deadline |
|---|---|---|---|
| IDLE | a first byte of a head | - | keep-alive; while draining, a second |
| HEAD | the rest of the head | the parser | the whole head |
| EXCHANGE | the handler, which may await body or client | the body, then `_ahead` | body or write |
| LINGER | the client to close | nowhere | lingering |
| CLOSED | - | - | - |

IDLE goes to HEAD or EXCHANGE as bytes arrive, HEAD to EXCHANGE, EXCHANGE to IDLE; each of them to LINGER if the
connection must end and the client may still be sending (closing at once would reset the connection, and the answer
could be lost on its way), and to CLOSED when the transport is gone, which cancels the handler.

Pipelined requests wait as unparsed bytes, up to a bound; beyond it the connection stops reading. They are parsed in
their turn, so that they are answered in order, and only if the request before leaves the connection open. Between two
of them other connections have a turn, and the next one begins only after the client has read most of the answers
before it. A request to upgrade is handled like any other. A client that closes its sending side is taken to be gone,
as most servers do.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Protocol

from httptools import HttpRequestParser

from proxy.downstream.body import IncomingBody, overloaded
from proxy.downstream.chunks import Buffer
from proxy.downstream.errors import BadHttp, ClientLimit, ClientStalled, ProtocolError
from proxy.downstream.limits import ByteBudget, Limits
from proxy.downstream.partial_head import END_OF_HEAD, PartialHead
from proxy.downstream.request import HeadReader, IncomingRequest, feed_head, head_too_large
from proxy.downstream.response import ClientResponse
from proxy.errors import CairnError, Overloaded, RequestTimeout

Handle = Callable[[IncomingRequest, ClientResponse], Awaitable[None]]
"""Answers a request; raises only CancelledError and ConnectionError."""

ROOM_BYTES: Final = 72 * 1024
"""Size of one read, into a buffer that all connections share: a body of 64 KB arrives with its head."""

AHEAD_BYTES: Final = 64 * 1024
"""Bytes of pipelined requests that are kept until their turn."""

NEVER: Final = math.inf

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time

_IDLE: Final = 0
_HEAD: Final = 1
_EXCHANGE: Final = 2
_LINGER: Final = 3
_CLOSED: Final = 4
_CR: Final = 13
_LF: Final = 10


class Server(Protocol):
    """State that all connections of a worker share."""

    limits: Limits
    handle: Handle
    heads: ByteBudget
    bodies: ByteBudget
    is_draining: bool
    is_closed: bool
    room: bytearray
    now: Callable[[], float]

    def opened(self, connection: Connection, address: str) -> ClientLimit | None:
        """Register a connection; return the limit that it exceeds, if any."""
        ...

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        ...

    def start_serving(self, connection: Connection) -> asyncio.Task[None]:
        """Run `connection.serve()` as a task."""
        ...

    def client_error(self, reason: BadHttp) -> None:
        """Count an error of a client."""
        ...

    def refused(self, limit: ClientLimit) -> None:
        """Count a refusal because of a limit."""
        ...

    def error_response(self, error: CairnError) -> bytes:
        """Serialise the answer to input that is not a request."""
        ...


class Connection(asyncio.BufferedProtocol):
    """One connection. `deadline` is the moment from which `expire` is to be called."""

    def __init__(self, server: Server) -> None:
        self.deadline = NEVER
        self.is_behind = False
        self.address = ""
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._state = _IDLE
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._request: IncomingRequest | None = None
        self._body: IncomingBody | None = None  # of `_request`, until it has arrived
        self._awaited_body: IncomingBody | None = None
        self._reads_body = False  # the present read goes straight into the body's buffer
        self._head: HeadReader | None = None  # filled by `_parser`; both are replaced after a body that bypassed it
        self._parser: HttpRequestParser | None = None
        self._partial_head: PartialHead | None = None  # while a head is incomplete
        self._ahead = bytearray()
        self._is_last = False  # the present request is the connection's last
        self._body_bytes = 0  # taken from the budget of bodies, besides what `_body` holds
        self._is_paused = False
        self._pauses_a_turn = False  # and for no other reason
        self._next_waiter: asyncio.Future[None] | None = None
        self._drain_waiter: asyncio.Future[None] | None = None
        self._unsent_bytes = 0  # when the write deadline was last checked

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's transport is an asyncio.Transport
        peer = transport.get_extra_info("peername")
        self.address = peer[0] if isinstance(peer, tuple) else ""
        exceeded = self._server.opened(self, self.address)
        if self._server.is_closed:
            self._transport.abort()  # type: ignore[union-attr]
            return
        if exceeded is not None:
            self._server.refused(exceeded)
            self._transport.write(self._server.error_response(overloaded()))  # type: ignore[union-attr]
            self._shut()
            return
        self._rest()

    def get_buffer(self, sizehint: int) -> bytearray | memoryview:  # noqa: ARG002
        body = self._body
        if body is not None:
            room = body.room()
            if room is not None:
                self._reads_body = True
                return room
        self._reads_body = False
        return self._server.room

    def buffer_updated(self, nbytes: int) -> None:
        if not self._reads_body:
            self._feed(self._server.room, 0, nbytes)
            if self._body is not None and self._body.length is None and not self._is_paused:
                self._pause_a_turn()
        elif self._body is not None:
            self._body.landed(nbytes)
            if self._body.is_complete:
                self._body = None

    def eof_received(self) -> None:
        """Let the transport close: a client that sends no more is taken to be gone."""

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._state = _CLOSED
        self.deadline = NEVER
        self._give_head_bytes()
        self._drop_ahead()
        self._server.closed(self)
        self._transport = None
        if self._request is not None and self._task is not None:
            self._task.cancel()
        else:
            self._wake()

    def pause_writing(self) -> None:
        self.is_behind = True

    def resume_writing(self) -> None:
        self.is_behind = False
        if self._drain_waiter is not None and not self._drain_waiter.done():
            self._drain_waiter.set_result(None)

    # -- reading

    def _feed(self, data: Buffer, at: int, end: int) -> None:
        """Handle the bytes data[at:end]."""
        while at < end:
            state = self._state
            if state == _EXCHANGE:
                body = self._body
                if body is None:
                    self._keep_ahead(data, at, end)
                    return
                at = body.take(data, at, end)
                if body.is_complete:
                    self._body = None
            elif state < _EXCHANGE:
                try:
                    at = self._take_head(data, at, end)
                except ProtocolError as error:
                    self.client_error(error.reason)
                    self._refuse(error)
                except Overloaded as error:
                    self._refuse(error)
            else:
                return

    def _take_head(self, data: Buffer, at: int, end: int) -> int:
        """Take a head, or the next part of one; return the offset at which it ends. Raises ProtocolError."""
        if self._state == _HEAD:
            return self._take_rest_of_head(data, at, end)
        while at < end and (data[at] == _CR or data[at] == _LF):
            at += 1  # skip empty lines before a request line (RFC 9112, section 2.2)
        stop = data.find(END_OF_HEAD, at, end)
        if stop < 0:
            if at < end:
                self._begin_partial_head(data, at, end)
            return end
        stop += len(END_OF_HEAD)
        line = bytes(data[at : data.find(b"\r\n", at, stop)])
        if stop - at > self._limits.head_bytes:
            raise head_too_large(line, self._limits.header_line_bytes)
        parser = self._parser or self._new_parser()
        feed_head(parser, memoryview(data)[at:stop])
        return self._begin(parser, line, data, stop, end)

    def _new_parser(self) -> HttpRequestParser:
        self._head = HeadReader()
        parser = self._parser = HttpRequestParser(self._head)
        return parser

    def _begin_partial_head(self, data: Buffer, at: int, end: int) -> None:
        """Keep the first part of a head. The parser refuses at once what cannot become a head."""
        limits = self._limits
        self._state = _HEAD
        self.deadline = self._server.now() + min(limits.head_seconds, limits.keepalive_seconds)
        self._partial_head = PartialHead()
        self._feed_head(self._parser or self._new_parser(), self._partial_head, bytes(data[at:end]))

    def _take_rest_of_head(self, data: Buffer, at: int, end: int) -> int:
        """Take the next part of a head, whose end may be split over two reads; return the offset at which it ends."""
        parser, partial = self._parser, self._partial_head
        assert parser is not None  # noqa: S101 - it has seen the first part
        assert partial is not None  # noqa: S101 - which was noted
        stop = partial.end_in(data, at, end)
        if stop < 0:
            self._feed_head(parser, partial, bytes(data[at:end]))
            return end
        self._feed_head(parser, partial, bytes(data[at:stop]))
        self._give_head_bytes()
        return self._begin(parser, partial.line, data, stop, end)

    def _feed_head(self, parser: HttpRequestParser, partial: PartialHead, piece: bytes) -> None:
        """Feed a part of an incomplete head to the parser, and count it. Raises ProtocolError and Overloaded."""
        partial.add(piece)
        if not self._server.heads.take(len(piece)):
            self._server.refused(ClientLimit.HEAD_BYTES)
            raise overloaded()
        if partial.nbytes > self._limits.head_bytes:
            raise head_too_large(partial.line, self._limits.header_line_bytes)
        feed_head(parser, piece)

    def _begin(self, parser: HttpRequestParser, line: bytes, data: Buffer, at: int, end: int) -> int:
        """Begin the exchange of a request whose body begins at data[at]; return the offset at which its body ends."""
        limits, head = self._limits, self._head
        assert head is not None  # noqa: S101 - the parser fills it
        request = head.take(parser.get_method(), line, limits.header_line_bytes)
        request.peer = self.address
        self._state = _EXCHANGE
        self.deadline = NEVER
        length = request.content_length
        if length and end - at >= length:
            body = memoryview(data)[at : at + length]
            request.whole_body = bytes(body)
            at += length
            self._body_bytes = length
            if not self._server.bodies.take(length):
                self._server.refused(ClientLimit.BODY_BYTES)
                request.refusal = overloaded()
            if not request.is_parser_spent:
                parser.feed_data(body)  # only so that the parser is ready for the next head
        elif length or request.is_chunked:
            request.body = self._body = IncomingBody(self, length, limits.body_bytes, limits.body_bytes_per_second)
            self._parser = None
        if request.is_parser_spent:
            self._parser = None
        self._request = request
        if self._next_waiter is not None:
            if not self._next_waiter.done():
                self._next_waiter.set_result(None)
        elif self._task is None:
            self._task = self._server.start_serving(self)
        return at

    def _keep_ahead(self, data: Buffer, at: int, end: int) -> None:
        """Keep pipelined requests; stop reading once there are `AHEAD_BYTES` of them.

        If the budget has no room for them, the present answer is the connection's last.
        """
        if self._is_last:
            return
        nbytes = end - at
        self._ahead += memoryview(data)[at:end]
        if not self._server.heads.take(nbytes):
            self._server.refused(ClientLimit.HEAD_BYTES)
            self._drop_ahead()
            self._is_last = True
        elif len(self._ahead) >= AHEAD_BYTES:
            self.pause_reading()

    def _drop_ahead(self) -> None:
        self._server.heads.give(len(self._ahead))
        self._ahead = bytearray()

    def _give_head_bytes(self) -> None:
        if self._partial_head is not None:
            self._server.heads.give(self._partial_head.nbytes)
            self._partial_head = None

    # -- answering

    async def serve(self) -> None:
        """Answer requests in order until the connection ends."""
        handle = self._server.handle
        request: IncomingRequest | None
        response: ClientResponse | None
        try:
            while self._state < _LINGER:
                request = self._request
                if request is None:
                    waiter = self._next_waiter = self._loop.create_future()
                    await waiter
                    self._next_waiter = None
                    continue
                if self.is_behind:
                    await self.drained()  # of a client that does not read, only one answer is buffered
                transport = self._transport
                assert transport is not None  # noqa: S101 - the state is CLOSED once it is gone
                response = ClientResponse(request, self, transport)
                await handle(request, response)
                self._finish(response, asked_to_close=not request.keep_alive)
                request = response = None  # otherwise an idle connection would keep its last body
                if self._request is not None:
                    await asyncio.sleep(0)  # a pipelined request: other connections have their turn before it
        except ConnectionError:
            self.abort()
        except BaseException:
            self.abort()
            raise
        finally:
            self._release_body()
            self._task = self._next_waiter = None

    def _finish(self, response: ClientResponse, *, asked_to_close: bool) -> None:
        """Go on to the next request after an answer, or end the connection.

        If the client asked for the end, the connection is closed at once, unless it sent something after its request.
        """
        is_whole = self._body is None
        self._release_body()
        if self._state != _EXCHANGE:
            return
        if response.looks_whole:
            self._reset()
        elif response.ended and response.keep_alive and is_whole and not self._is_last:
            self._state = _IDLE
            self._rest()
            if self._is_paused:
                self.resume_reading()
            if self._ahead:
                ahead = bytes(self._ahead)
                self._drop_ahead()
                self._feed(ahead, 0, len(ahead))
        elif asked_to_close and is_whole and not self._ahead:
            self._shut()
        else:
            self._linger()

    def _release_body(self) -> None:
        """Give back the bytes that the present request holds."""
        request, self._request = self._request, None
        self._body = None
        nbytes, self._body_bytes = self._body_bytes, 0
        if request is not None and request.body is not None:
            nbytes += request.body.held_bytes
            request.body.held_bytes = 0
        if nbytes:
            self._server.bodies.give(nbytes)

    # -- ending

    def drain(self) -> None:
        """End the connection after the present request; an idle one after one more request, or a second."""
        if self._state == _IDLE:
            self._rest()

    def expire(self, now: float) -> None:
        """Act on a deadline that has passed."""
        self.deadline = NEVER
        if self._state == _EXCHANGE:
            self._expire_exchange(now)
        elif self._state == _HEAD:
            self.client_error(BadHttp.HEAD_LATE)
            self._refuse(RequestTimeout("The head of the request did not arrive in time."))
        elif self._still_sending(now):
            return
        elif self._state == _IDLE:
            self._shut()
            self._wake()
        else:
            self.abort()

    def _expire_exchange(self, now: float) -> None:
        if self._awaited_body is not None:
            self.deadline = self._awaited_body.look(now)
            return
        waiter = self._drain_waiter  # done if the client caught up in this turn of the loop
        if waiter is not None and not waiter.done() and not self._still_sending(now):
            self.client_error(BadHttp.READ_LATE)
            waiter.set_exception(ClientStalled("the client stopped reading"))
            self.abort()

    def _still_sending(self, now: float) -> bool:
        """Return True if the client has read something since the last call, and so gets more time for the rest."""
        transport = self._transport
        unsent_bytes = 0 if transport is None else transport.get_write_buffer_size()
        progressed = 0 < unsent_bytes < self._unsent_bytes or (unsent_bytes > 0 == self._unsent_bytes)
        self._unsent_bytes = unsent_bytes
        if progressed:
            self.deadline = now + self._limits.write_seconds
        return progressed

    def abort(self) -> None:
        """Close at once, even during an exchange."""
        if self._transport is not None:
            self._transport.abort()

    def _refuse(self, error: CairnError) -> None:
        """Answer input that is not a request, or for which there is no room, and end the connection."""
        self._give_head_bytes()
        self._drop_ahead()
        transport = self._transport
        if transport is not None and not transport.is_closing():
            transport.write(self._server.error_response(error))
        self._linger()
        self._wake()

    def _linger(self) -> None:
        """Send no more, and discard what the client sends for a while."""
        self._state = _LINGER
        self._drop_ahead()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self.deadline = self._server.now() + self._limits.linger_seconds
        self._unsent_bytes = 0
        try:
            transport.write_eof()
        except OSError:  # asyncio's own loop shuts the socket down here, and the client may have just reset it
            transport.abort()
            return
        self.resume_reading()

    def _shut(self) -> None:
        """Close once everything written has been sent."""
        self._state = _LINGER
        self.deadline = self._server.now() + self._limits.linger_seconds
        self._unsent_bytes = 0
        if self._transport is not None:
            self._transport.close()

    def _reset(self) -> None:
        """End the connection in a way that no client takes for the orderly end of a body."""
        self._state = _LINGER
        transport = self._transport
        if transport is None:
            return
        end = transport.get_extra_info("socket")
        if end is not None:
            with suppress(OSError):  # the client may have just reset it
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        transport.abort()

    def _rest(self) -> None:
        """Wait for the next request."""
        limits = self._limits
        seconds = limits.drain_idle_seconds if self._server.is_draining else limits.keepalive_seconds
        self.deadline = self._server.now() + seconds
        self._unsent_bytes = 0

    def _wake(self) -> None:
        """Wake `serve`, so that it sees that the connection ends."""
        if self._next_waiter is not None and not self._next_waiter.done():
            self._next_waiter.set_result(None)

    # -- called by the response

    def may_stay(self) -> bool:
        """Return True if another request may follow: this one has arrived whole and the worker is not draining."""
        return self._body is None and not self._is_last and not self._server.is_draining

    async def drained(self) -> None:
        """Wait until the client has read most of what was written. Raises ConnectionResetError."""
        if self._transport is None:
            raise ConnectionResetError("the client left")
        if not self.is_behind:
            return
        waiter = self._drain_waiter = self._loop.create_future()
        self._unsent_bytes = self._transport.get_write_buffer_size()
        self.deadline = self._server.now() + self._limits.write_seconds
        try:
            await waiter
        finally:
            self._drain_waiter = None
            self.deadline = NEVER

    # -- called by the body

    def now(self) -> float:
        """Read the monotonic clock."""
        return self._server.now()

    def _pause_a_turn(self) -> None:
        """Let other connections have a turn before the next part of a chunked body is read.

        The loop would read up to 32 parts in a row, and one of chunks of a byte each takes milliseconds to decode.
        """
        self.pause_reading()
        self._pauses_a_turn = True
        self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        if self._pauses_a_turn:
            self.resume_reading()

    def pause_reading(self) -> None:
        """Stop reading from the client."""
        self._pauses_a_turn = False
        if not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read again."""
        if self._is_paused and self._transport is not None and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    def send_continue(self) -> None:
        """Write `100 Continue` if the client waits for it before it sends its body."""
        request, body, transport = self._request, self._body, self._transport
        if request is None or body is None or transport is None or not request.expects_continue:
            return
        request.expects_continue = False
        if not body.received_bytes:
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def body_awaited(self, due: float) -> None:
        """Look at the body at `due`."""
        self._awaited_body = self._body
        if self._state == _EXCHANGE:
            self.deadline = due

    def body_arrived(self) -> None:
        """Stop looking at the body: nobody waits for it any more."""
        self._awaited_body = None
        if self._state == _EXCHANGE:
            self.deadline = NEVER

    def hold(self, nbytes: int, own: int) -> bool:
        """Take `nbytes` from the budget of bodies; return False if it is exceeded. The body holds `own` already."""
        if self._server.bodies.take(nbytes, own):
            return True
        self._server.refused(ClientLimit.BODY_BYTES)
        return False

    def release(self, nbytes: int) -> None:
        """Give bytes back to the budget of bodies."""
        self._server.bodies.give(nbytes)

    def client_error(self, reason: BadHttp) -> None:
        """Count an error of the client."""
        self._server.client_error(reason)

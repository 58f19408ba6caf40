"""One HTTP/1.1 connection to an upstream: parser callbacks, framing, back-pressure, and an error for each way to end.

It serves one exchange at a time. Its owner (the pool) is called when an exchange is over (`finished`) and when the
connection is closed (`left`).

    state   what is awaited          event                                   next    effect
    ------  -----------------------  --------------------------------------  ------  ------------------------------
    IDLE    nothing                  begin()                                 HEAD    first-byte limit starts
                                     any byte                                CLOSED  unsolicited: the pool is warned
                                     deadline, end of stream                 CLOSED
    HEAD    the final head           1xx                                     HEAD    counted, at most 64 of them
                                     final head                              BODY    wakes the reader
                                     final head of a response without body   DONE
                                     invalid or oversized head               CLOSED  BadResponse
                                     end of stream, reset                    CLOSED  ResetBeforeResponse, BadResponse
                                     deadline                                CLOSED  FirstByteTimeout
    BODY    the rest of the body     bytes                                   BODY    idle limit starts over
                                     last byte of the body                   DONE
                                     end of stream, body ends with it        CLOSED  response is complete
                                     end of stream, reset otherwise          CLOSED  ResetMidResponse
                                     deadline                                CLOSED  IdleTimeout
    DONE    the parser returns       nothing follows, may be reused          IDLE    finished(reusable=True)
                                     bytes follow, or may not be reused      CLOSED  finished(reusable=False)

`close` leads from every state to CLOSED.
"""

from __future__ import annotations

import asyncio
import enum
import math
import select
from collections.abc import Sequence
from typing import Final, Protocol

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from proxy.clock import Clock
from proxy.errors import (
    BadResponse,
    CairnError,
    FirstByteTimeout,
    IdleTimeout,
    ResetBeforeResponse,
    ResetMidResponse,
)
from proxy.upstream.origin import Limits
from proxy.upstream.response import Framing, UpstreamResponse
from proxy.upstream.timeouts import Deadlines

NEVER = math.inf
_HEX: Final = b"0123456789abcdefABCDEF"
_SMALL_SIZES: Final = {b"%x" % size: size for size in range(1, 2048)}  # nearly all chunks of streams are that small
_SIZE_DIGITS_MOST: Final = 8  # longer chunk sizes are left to the parser
_JOIN_BYTES: Final = 65_536  # up to this size one copy is cheaper than a second buffer in the system call
_PLAIN_BYTES: Final = 65_536  # above this size a new parser costs less than a second copy of the body
_TURN_BYTES: Final = 16_384
"""Bytes after which other connections have a turn: a longer read is parsed in parts, and the loop would read up to 32
times in a row. To read chunks or events of a few bytes each takes milliseconds. A stream that keeps its own pace has
far shorter reads."""

_SOON_SECONDS: Final = 1.0  # an upstream that closes this soon after a stream closes because of the stream
_MOST_INTERIM: Final = 64  # 1xx responses before the final one; a server that reports progress sends a few
_FRAMING_FIELDS: Final = frozenset({b"content-length", b"transfer-encoding"})
_IDLE_NOTICES: Final = (b"HTTP/1.1 408", b"HTTP/1.0 408")  # some servers announce that they close an idle connection


class State(enum.Enum):
    """State of a connection; see the table above."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    DONE = "done"  # the response is complete, but the parser has not returned from its last bytes
    CLOSED = "closed"


_HEAD, _BODY, _DONE, _IDLE, _CLOSED = State.HEAD, State.BODY, State.DONE, State.IDLE, State.CLOSED


class Owner(Protocol):
    """The pool as a connection sees it."""

    def finished(self, connection: Connection, *, reusable: bool, was_stream: bool) -> None:
        """Take back a connection whose response is complete; `reusable` if it may serve another request."""
        ...

    def left(self, connection: Connection) -> None:
        """Forget a connection that was closed by either side. Called exactly once."""
        ...


class Connection(asyncio.Protocol):
    """An HTTP/1.1 connection, client side.

    Attributes:
        deadline: time at which what it waits for is late, on the monotonic clock.
        served: complete responses so far.
        seen_seconds: when bytes last came, on the monotonic clock; 0 for never.
        dropped_after_stream: the upstream closed it directly after a streamed response.
        unsolicited: bytes came beyond the end of a response, or while no request was waiting for one. Their meaning
            and recipient are unknown, so the connection is closed and its pool stops reusing connections for a while.
            A body in the response to a HEAD does not count: its meaning is known, and any client can ask for it.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Clock, deadlines: Deadlines, owner: Owner, limits: Limits
    ) -> None:
        self.state = State.IDLE
        self.deadline = NEVER
        self.served = 0
        self.seen_seconds = 0.0
        self.dropped_after_stream = False
        self.unsolicited = False
        self._last_was_stream = False
        self._rested_at = 0.0
        self._loop = loop
        self._now = clock.monotonic
        self._deadlines = deadlines
        self._owner = owner
        self._max_head_bytes = limits.max_head_bytes
        self._buffer_bytes = limits.buffer_bytes
        self._idle_seconds = limits.idle_seconds
        self._transport: asyncio.Transport | None = None
        self._readable: select.poll | None = None
        self._parser: HttpResponseParser | None = None
        self._response: UpstreamResponse | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._interim = False
        self._interims = 0
        self._bad: str | None = None
        self._extra = False
        self._keep_alive = False
        self._head_only = False
        self._uploading = False
        self._quiet_bytes = 0  # parsed since the last byte of a body: heads, trailers, chunk extensions
        self._buffered_bytes = 0
        self._reading_paused = False
        self._pauses_a_turn = False  # and for no other reason
        self._turn_is_due = False  # `_end_turn` is going to be called
        self._unparsed: memoryview | None = None  # the rest of a long read; meanwhile reading is paused
        self._writing_paused = False
        self._plain_bytes = 0  # missing bytes of the body, which bypass the parser
        self._in_chunk = False
        self._between_chunks = False  # the last byte parsed ended a chunk or the head
        self._drain_waiter: asyncio.Future[None] | None = None

    # -- called by the client and the pool

    def begin(self, limits: Limits, *, head_only: bool) -> UpstreamResponse:
        """Start an exchange. Bytes received from now on belong to the returned response."""
        now = self._now()
        response = UpstreamResponse(self._loop, self, now, reused=self.served > 0)
        if self._parser is None:
            self._parser = HttpResponseParser(self)
        self._response = response
        self.state = _HEAD
        self._head_only = head_only
        self._idle_seconds = limits.idle_seconds
        self._quiet_bytes = 0
        self._interims = 0
        self._buffered_bytes = 0
        self._plain_bytes = 0
        self._in_chunk = self._between_chunks = False
        self._watch(now + limits.first_byte_seconds)
        return response

    def send(self, head: bytes, body: bytes | Sequence[bytes | bytearray | memoryview]) -> None:
        """Write a whole request. The transport buffers what the socket does not take at once."""
        transport = self._transport
        if transport is None:
            return
        if isinstance(body, bytes):
            if len(body) <= _JOIN_BYTES:
                transport.write(head + body if body else head)
            else:
                transport.writelines((head, body))
        else:
            transport.writelines((head, *body))

    def upload(self, *, unfinished: bool) -> None:
        """Note whether the request's body is still being sent piece by piece."""
        self._uploading = unfinished

    async def write(self, pieces: Sequence[bytes], stall_seconds: float) -> None:
        """Write a part of a request's body and wait until the transport accepts more.

        If the upstream takes nothing for `stall_seconds`, the exchange fails, which interrupts the sender.
        """
        if self._transport is None:
            return
        self._transport.writelines(pieces)
        if self._writing_paused:
            self._watch(self._now() + stall_seconds)
            self._drain_waiter = self._loop.create_future()
            try:
                await self._drain_waiter
            finally:
                self._drain_waiter = None

    def wait_for_response(self, seconds: float) -> None:
        """Expect the first byte of the response within `seconds` from now; math.inf for no limit."""
        if self.state is _HEAD:
            self._watch(self._now() + seconds)

    def allow_silence(self, seconds: float) -> None:
        """Bound the silence between two reads of this response's body by `seconds`, starting now."""
        self._idle_seconds = seconds
        if self.state is _BODY and not self._reading_paused:
            self._watch(self._now() + seconds)

    def taken(self) -> None:
        """Resume reading: the reader has taken everything that was buffered."""
        self._buffered_bytes = 0
        if self._reading_paused:
            self._resume_reading()
            self._watch(self._now() + self._idle_seconds)

    def rest(self, expiry_seconds: float) -> None:
        """Close after `expiry_seconds` unless another exchange begins before."""
        self._rested_at = self.seen_seconds
        self._watch(self.seen_seconds + expiry_seconds)

    @property
    def usable(self) -> bool:
        """True if a request may be sent on it, as far as the events handled so far show."""
        return self.state is _IDLE and self._transport is not None and not self._transport.is_closing()

    @property
    def untouched(self) -> bool:
        """True if it is usable and neither bytes nor an end wait unread in its socket.

        Bytes that arrived before a request was written would otherwise be read as the response to it.
        """
        return self.usable and (self._readable is None or not self._readable.poll(0))

    def close(self, error: CairnError | None = None) -> None:
        """Close at once and fail the response under way with `error`. Later calls do nothing."""
        if self.state is _CLOSED:
            return
        self.state = _CLOSED
        self.deadline = NEVER
        self._unparsed = None
        response, self._response = self._response, None
        if self._transport is not None:
            self._transport.abort()
        self._owner.left(self)
        if response is not None:
            response.fail(error or ResetMidResponse("the connection was closed from this side"))

    def discard(self) -> None:
        """Drop the socket of a connection that was never handed out; the caller gives its slot back.

        It is not watched any longer: if opening it was cancelled, uvloop closes the socket without `connection_lost`.
        """
        self.state = _CLOSED
        if self._transport is not None:
            self._transport.abort()
        self._deadlines.discard(self)

    def expire(self) -> None:
        """Handle a missed deadline: fail the response under way, or close an idle connection."""
        if self.state is _HEAD:
            self.close(FirstByteTimeout("the upstream did not begin its response in time"))
        elif self.state is _BODY:
            self.close(IdleTimeout("the upstream sent nothing for too long inside its response"))
        else:
            self.close()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's transport is an asyncio.Transport
        self._deadlines.add(self)
        sock = transport.get_extra_info("socket")
        if sock is not None and hasattr(select, "poll"):
            self._readable = select.poll()
            self._readable.register(sock.fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            self.unsolicited = self.state is _IDLE and not data.startswith(_IDLE_NOTICES)
            self.close()
            return
        self.seen_seconds = response.seen_seconds = self._now()
        if self._plain_bytes:
            self._take_plain(response, data)
            if not response.is_event_stream:
                return  # nothing looks at its bytes
        elif not (self._between_chunks and self._relay_chunk(response, data)):
            if len(data) <= _TURN_BYTES and self._unparsed is None:
                self._parse(response, data)
            else:
                self._unparsed = memoryview(data if self._unparsed is None else bytes(self._unparsed) + data)
                self._parse_part(response)
        if len(data) >= _TURN_BYTES and (self.state is _BODY or self._unparsed is not None):
            self._pause_a_turn()

    def eof_received(self) -> None:
        self._over(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over(exc)
        self._deadlines.discard(self)
        self._transport = None
        self._readable = None
        self._parser = None  # breaks a reference cycle: its callbacks are methods of this object

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._drain_waiter is not None and not self._drain_waiter.done():
            self._drain_waiter.set_result(None)

    # -- parser callbacks, called inside feed_data

    def on_message_begin(self) -> None:
        response = self._response
        if self.state is _HEAD and response is not None:
            self._headers = []
            self._reason = b""
            response.first_byte_seconds = self.seen_seconds
        else:
            self._extra = True

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.state is _HEAD:
            self._headers.append((name.lower(), value.strip(b" \t")))
        elif self.state is _BODY and name.lower() in _FRAMING_FIELDS:
            self._extra = True  # the last chunk was seen, so the meaning of further bytes is unknown

    def on_headers_complete(self) -> None:
        response, parser = self._response, self._parser
        if self.state is not _HEAD or response is None or parser is None:
            return
        status = parser.get_status_code()
        if status < 200:
            response.first_byte_seconds = 0.0  # it is the final response's, which may come in the same read
            self._interim = True
            self._interims += 1
            if self._interims > _MOST_INTERIM:
                self._bad = "the upstream sent too many interim responses"
            if status < 100 or status == 101:
                self._bad = "the upstream switched protocols unasked"
            return
        self._keep_alive = parser.should_keep_alive()
        self._read_head(response, status)

    def on_body(self, piece: bytes) -> None:
        response = self._response
        if self.state is not _BODY or response is None:
            self._extra = True
            return
        self._quiet_bytes = 0
        self._buffered_bytes += len(piece)
        response.chunks.append(piece)

    def on_chunk_header(self) -> None:
        self._in_chunk = True

    def on_chunk_complete(self) -> None:
        self._in_chunk = False

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif self.state is _BODY:
            self.state = _DONE

    # -- decisions

    def _read_head(self, response: UpstreamResponse, status: int) -> None:
        """Copy status and headers to the response and decide how its body ends (RFC 9112, section 6.3)."""
        length: int | None = None
        chunked = False
        for name, value in self._headers:
            if name == b"content-length":
                length = int(value) if value.isdigit() else None
            elif name == b"transfer-encoding":
                chunked = True
                if value.lower() != b"chunked":
                    self._bad = "the upstream's response has a transfer encoding that was not asked for"
            elif name == b"content-type":
                response.is_event_stream = value.lower().startswith(b"text/event-stream")
        if self._quiet_bytes > self._max_head_bytes and self._head_bytes() > self._max_head_bytes:
            self._bad = "the upstream's response has too large a head"
        if chunked and length is not None:
            self._bad = "the upstream's response has both a content-length and a transfer-encoding"
        if self._bad is not None:
            return
        response.status = status
        response.reason = self._reason
        response.headers = tuple(self._headers)
        response.content_length = length
        response.early = self._uploading or (self._transport is not None and self._unsent())
        self.state = _BODY
        self._settle_framing(response, status, chunked, length)

    def _settle_framing(self, response: UpstreamResponse, status: int, chunked: bool, length: int | None) -> None:
        if self._head_only:
            self.state = _DONE  # the parser would wait for a body that the response to a HEAD does not have
            self._keep_alive = False  # if a body follows all the same, the next response would begin with it
        elif status in (204, 304):
            self._keep_alive = self._keep_alive and not (chunked or length)  # for the same reason
        elif chunked:
            response.framing = Framing.CHUNKED
        elif length is not None:
            response.framing = Framing.LENGTH
        else:
            response.framing = Framing.CLOSE
        self._quiet_bytes = 0

    def _parse(self, response: UpstreamResponse, data: bytes) -> None:
        before = self.state
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)  # type: ignore[union-attr]  # present while a response is awaited
        except (HttpParserError, HttpParserUpgrade):
            self._bad = self._bad or "the upstream's response is not valid HTTP/1.1"
        if self.state is _DONE:
            self._extra = self._extra or self._bad is not None or self._unparsed is not None
            self._unparsed = None
            self._finish(response)
        elif self._bad is not None:
            self.close(self._bad_response(self._bad))
        elif self._quiet_bytes > self._max_head_bytes:
            self.close(self._bad_response("the upstream's response has too large a head, trailer or chunk extension"))
        elif self.state is _BODY:
            if before is _HEAD and response.framing is Framing.LENGTH:
                self._skip_parser(response)
            self._more(response)
            self._between_chunks = (
                response.framing is Framing.CHUNKED
                and not self._in_chunk
                and self._unparsed is None
                and data.endswith(b"\r\n")
            )

    def _parse_part(self, response: UpstreamResponse) -> None:
        """Parse the next part of a long read; all the rest, if it bypasses the parser."""
        rest = self._unparsed
        if rest is None:
            return
        self._unparsed = rest[_TURN_BYTES:] if len(rest) > _TURN_BYTES else None
        self._parse(response, bytes(rest[:_TURN_BYTES]))
        rest = self._unparsed
        if rest is not None and self._plain_bytes:
            self._unparsed = None
            self._take_plain(response, bytes(rest))

    def _skip_parser(self, response: UpstreamResponse) -> None:
        """Let the rest of a long body of known length bypass the parser, which would copy it a second time.

        The parser has then not seen the end of the body and is replaced for the next exchange.
        """
        left = (response.content_length or 0) - self._buffered_bytes
        if left >= _PLAIN_BYTES:
            self._plain_bytes = left
            self._parser = None

    def _relay_chunk(self, response: UpstreamResponse, data: bytes) -> bool:
        """Hand a read that is exactly one chunk to a waiting reader, framing included; return False for any other.

        The parser is between two chunks and need not see it. The last chunk (size 0) is always left to the parser.
        """
        digits = data.find(b"\r\n", 0, _SIZE_DIGITS_MOST + 2)
        if digits < 1:
            return False
        written = data[:digits]
        size = _SMALL_SIZES.get(written, 0)
        if not size:
            if written.strip(_HEX):
                return False
            size = int(written, 16)
        begin = digits + 2
        end = begin + size
        if end == begin or len(data) != end + 2 or not data.endswith(b"\r\n"):
            return False
        if not response.relay_chunk(data[begin:end], data):
            return False
        if self.state is _BODY:
            self._quiet_bytes = 0
            self._watch(self.seen_seconds + self._idle_seconds)
        return True

    def _take_plain(self, response: UpstreamResponse, data: bytes) -> None:
        left = self._plain_bytes
        self._extra = len(data) > left
        piece = data[:left] if self._extra else data
        self._plain_bytes = left - len(piece)
        self._buffered_bytes += len(piece)
        response.chunks.append(piece)
        if self._plain_bytes:
            self._more(response)
        else:
            self._finish(response)

    def _more(self, response: UpstreamResponse) -> None:
        """Handle a part of the body before its end."""
        self.deadline = deadline = self.seen_seconds + self._idle_seconds
        if deadline < self._deadlines.next_at:
            self._deadlines.arm(deadline)
        response.wake()  # before the check below: if the reader takes everything now, no pause is needed
        if self._buffered_bytes > self._buffer_bytes and self.state is not _CLOSED:
            self._pause_reading()

    def _finish(self, response: UpstreamResponse) -> None:
        """Detach from a complete response, and close if the connection cannot serve another."""
        self.unsolicited = self._extra and not self._head_only  # such a connection serves no other request anyway
        reusable = self._keep_alive and not (self._extra or self._bad or response.early)
        self._response = None
        self.served += 1
        self._last_was_stream = response.is_event_stream
        if reusable:
            self.state = _IDLE
            if self._reading_paused:
                self._resume_reading()  # otherwise the end of the connection would not be noticed
        response.ended()
        self._owner.finished(self, reusable=reusable, was_stream=response.is_event_stream)

    def _over(self, exc: Exception | None) -> None:
        """Handle the end of the connection in any state; `exc` is None for an orderly end."""
        while self._unparsed is not None and self._response is not None:
            self._parse_part(self._response)
        response = self._response
        self.dropped_after_stream = self._last_was_stream and self._now() - self._rested_at < _SOON_SECONDS
        if response is None:
            self.close()
        elif self.state is _HEAD and response.first_byte_seconds:
            self.close(BadResponse("the upstream closed inside the head of its response"))
        elif self.state is _HEAD:
            reused = self.served > 0 and not self._quiet_bytes
            self.close(ResetBeforeResponse("the upstream closed before its response began", reused=reused))
        elif exc is None and response.framing is Framing.CLOSE:
            self._keep_alive = False
            self._finish(response)
        else:
            self.close(ResetMidResponse("the upstream closed inside its response"))

    def _bad_response(self, message: str) -> BadResponse:
        error = BadResponse(message)
        error.before_response = self.state is _HEAD
        return error

    def _head_bytes(self) -> int:
        """Return the size of the head, if it came in one read with a large part of its body."""
        return len(self._reason) + sum(len(name) + len(value) + len(b": \r\n") for name, value in self._headers)

    def _unsent(self) -> bool:
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def _watch(self, deadline: float) -> None:
        self.deadline = deadline
        if deadline < self._deadlines.next_at:
            self._deadlines.arm(deadline)

    def _pause_reading(self) -> None:
        """Stop reading while the reader is slow. No limit runs meanwhile: the upstream is not at fault."""
        self.deadline = NEVER
        self._pauses_a_turn = False
        if not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def _pause_a_turn(self) -> None:
        """Stop reading until other connections have had their turn."""
        if not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()
            self._wait_a_turn()

    def _wait_a_turn(self) -> None:
        """Go on with the rest of a long read, or else with reading, after other connections have had their turn."""
        self._pauses_a_turn = True
        if not self._turn_is_due:
            self._turn_is_due = True
            self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._turn_is_due = False
        if not self._pauses_a_turn:
            return
        if self._unparsed is None or self._response is None:
            self._resume_reading()
            return
        self._parse_part(self._response)
        if self._pauses_a_turn and self._response is not None:
            self._wait_a_turn()

    def _resume_reading(self) -> None:
        if self._unparsed is not None:
            self._wait_a_turn()
            return
        self._reading_paused = self._pauses_a_turn = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

"""One connection to an upstream: the parser's callbacks, framing, back-pressure and how each end is named.

It serves one exchange at a time and knows nothing of pools but that an owner is told when an exchange is over
(`finished`) and when the connection is gone (`left`).
"""

from __future__ import annotations

import asyncio
import enum
import math
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
_SIZE_DIGITS_MOST: Final = 8  # of a chunk relayed as it came
_JOIN_BYTES: Final = 65_536  # up to here one copy is cheaper than a second buffer in the kernel call
_PLAIN_BYTES: Final = 65_536  # above this a new parser costs less than a second copy of the body
_SOON_SECONDS: Final = 1.0  # an upstream that closes so soon after a stream closes because of it


class State(enum.Enum):
    """What a connection is doing."""

    IDLE = "idle"  # nothing is expected: any byte is one too many
    HEAD = "head"
    BODY = "body"
    DONE = "done"  # the answer is whole, its last bytes are still being parsed
    CLOSED = "closed"


_HEAD, _BODY, _DONE, _IDLE, _CLOSED = State.HEAD, State.BODY, State.DONE, State.IDLE, State.CLOSED


class Owner(Protocol):
    """The pool as a connection sees it."""

    def finished(self, connection: Connection, *, reusable: bool, was_stream: bool) -> None:
        """An answer is whole; `reusable` tells that the connection may serve another request."""
        ...

    def left(self, connection: Connection) -> None:
        """The connection is closed, by either side; told exactly once."""
        ...


class Connection(asyncio.Protocol):
    """An HTTP/1.1 connection as a client; `deadline` is when what it waits for is late.

    `served` counts its whole answers; `dropped_after_stream` tells that the upstream closed it right behind a stream.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Clock, deadlines: Deadlines, owner: Owner, limits: Limits
    ) -> None:
        self.state = State.IDLE
        self.deadline = NEVER
        self.served = 0
        self.dropped_after_stream = False
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
        self._parser: HttpResponseParser | None = None
        self._response: UpstreamResponse | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._interim = False
        self._bad: str | None = None
        self._extra = False
        self._keep_alive = False
        self._head_only = False
        self._uploading = False
        self._quiet_bytes = 0  # fed since the last byte of a body: heads, trailers, chunk extensions
        self._buffered_bytes = 0
        self._reading_paused = False
        self._writing_paused = False
        self._plain_bytes = 0  # still to come of a body that the parser is spared
        self._in_chunk = False
        self._between_chunks = False  # the parser has seen a chunk's end, or the head's, and not a byte after it
        self._seen_at = 0.0  # when something was last received
        self._drain_waiter: asyncio.Future[None] | None = None

    # -- what the client and the pool call

    def begin(self, limits: Limits, *, head_only: bool) -> UpstreamResponse:
        """Start an exchange: from now on bytes that come belong to the answer returned here."""
        now = self._now()
        response = UpstreamResponse(self._loop, self, now)
        if self._parser is None:
            self._parser = HttpResponseParser(self)
        self._response = response
        self.state = _HEAD
        self._head_only = head_only
        self._idle_seconds = limits.idle_seconds
        self._quiet_bytes = 0
        self._buffered_bytes = 0
        self._plain_bytes = 0
        self._in_chunk = self._between_chunks = False
        self._watch(now + limits.first_byte_seconds)
        return response

    def send(self, head: bytes, body: bytes | Sequence[bytes | bytearray | memoryview]) -> None:
        """Write a request whose body is at hand; the transport keeps what the socket does not take."""
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
        """Tell that the request's body is still being sent piece by piece, or that it now is whole."""
        self._uploading = unfinished

    async def write(self, pieces: Sequence[bytes], stall_seconds: float) -> None:
        """Write a part of a request's body and wait until the transport wants more.

        An upstream that takes nothing for `stall_seconds` fails the exchange, which interrupts whoever sends.
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
        """Move the limit for the first byte of the answer: `seconds` from now, math.inf for none."""
        if self.state is _HEAD:
            self._watch(self._now() + seconds)

    def taken(self) -> None:
        """The reader has taken all that was buffered."""
        self._buffered_bytes = 0
        if self._reading_paused:
            self._resume_reading()
            self._watch(self._now() + self._idle_seconds)

    def rest(self, expiry_seconds: float) -> None:
        """Nothing is expected any more; close after `expiry_seconds` unless another exchange begins."""
        self._rested_at = self._seen_at
        self._watch(self._seen_at + expiry_seconds)

    @property
    def usable(self) -> bool:
        """True where a request may be sent on it."""
        return self.state is _IDLE and self._transport is not None and not self._transport.is_closing()

    def close(self, error: CairnError | None = None) -> None:
        """Close at once and fail with `error` what is under way; nothing happens the second time."""
        if self.state is _CLOSED:
            return
        self.state = _CLOSED
        self.deadline = NEVER
        response, self._response = self._response, None
        if self._transport is not None:
            self._transport.abort()
        self._owner.left(self)
        if response is not None:
            response.fail(error or ResetMidResponse("the connection was closed from this side"))

    def forsake(self) -> None:
        """Drop the socket of a connection that nobody was handed: its slot is the opener's to give back."""
        self.state = _CLOSED
        if self._transport is not None:
            self._transport.abort()

    def expire(self) -> None:
        """The deadline has passed: fail what waits, or close what idled."""
        if self.state is _HEAD:
            self.close(FirstByteTimeout("the upstream did not begin its answer in time"))
        elif self.state is _BODY:
            self.close(IdleTimeout("the upstream's answer stood still for too long"))
        else:
            self.close()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream's transport is an asyncio.Transport
        self._deadlines.add(self)

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:
            self.close()  # nobody asked
            return
        self._seen_at = response.seen_seconds = self._now()
        if self._plain_bytes:
            self._take_plain(response, data)
        elif not (self._between_chunks and self._relay_chunk(response, data)):
            self._parse(response, data)

    def eof_received(self) -> None:
        self._over(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over(exc)
        self._deadlines.discard(self)
        self._transport = None
        self._parser = None  # its callbacks are our methods: a cycle

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._drain_waiter is not None and not self._drain_waiter.done():
            self._drain_waiter.set_result(None)

    # -- the parser's callbacks, called within feed_data

    def on_message_begin(self) -> None:
        if self.state is _HEAD:
            self._headers = []
            self._reason = b""
        else:
            self._extra = True

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.state is _HEAD:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        response, parser = self._response, self._parser
        if self.state is not _HEAD or response is None or parser is None:
            return
        status = parser.get_status_code()
        if status < 200:
            self._interim = True
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
        response._chunks.append(piece)

    def on_chunk_header(self) -> None:
        self._in_chunk = True

    def on_chunk_complete(self) -> None:
        self._in_chunk = False

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            if self._response is not None:
                self._response.first_byte_seconds = 0.0
        elif self.state is _BODY:
            self.state = _DONE

    # -- decisions

    def _read_head(self, response: UpstreamResponse, status: int) -> None:
        """Take over status and headers; decide how the body ends (RFC 9112, section 6.3)."""
        length: int | None = None
        chunked = False
        for name, value in self._headers:
            if name == b"content-length":
                length = int(value) if value.isdigit() else None
            elif name == b"transfer-encoding":
                chunked = True
                if value.lower() != b"chunked":
                    self._bad = "the upstream's answer has a transfer encoding that was not asked for"
            elif name == b"content-type":
                response.is_event_stream = value.lower().startswith(b"text/event-stream")
        if self._quiet_bytes > self._max_head_bytes and self._head_bytes() > self._max_head_bytes:
            self._bad = "the upstream's answer has too large a head"
        if chunked and length is not None:
            self._bad = "the upstream's answer has both a content-length and a transfer-encoding"
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
            self.state = _DONE  # the parser would now wait for the body that a HEAD never has
        elif status in (204, 304):
            pass
        elif chunked:
            response.framing = Framing.CHUNKED
        elif length is not None:
            response.framing = Framing.LENGTH
        else:
            response.framing = Framing.CLOSE
        self._quiet_bytes = 0

    def _parse(self, response: UpstreamResponse, data: bytes) -> None:
        if not response.first_byte_seconds:
            response.first_byte_seconds = self._seen_at
        before = self.state
        self._quiet_bytes += len(data)
        try:
            self._parser.feed_data(data)  # type: ignore[union-attr]  # there is one as long as an answer is awaited
        except (HttpParserError, HttpParserUpgrade):
            self._bad = self._bad or "the upstream's answer is not valid HTTP/1.1"
        if self.state is _DONE:
            self._finish(response)
        elif self._bad is not None:
            self.close(self._bad_response(self._bad))
        elif self._quiet_bytes > self._max_head_bytes:
            self.close(self._bad_response("the upstream's answer has too large a head, trailer or chunk extension"))
        elif self.state is _BODY:
            if before is _HEAD and response.framing is Framing.LENGTH:
                self._skip_parser(response)
            self._more(response)
            self._between_chunks = (
                response.framing is Framing.CHUNKED and not self._in_chunk and data.endswith(b"\r\n")
            )

    def _skip_parser(self, response: UpstreamResponse) -> None:
        """The long rest of a body of known length needs no parser: it is kept as it was read, not copied again.

        The parser, which will not have seen it, is not used any more.
        """
        left = (response.content_length or 0) - self._buffered_bytes
        if left >= _PLAIN_BYTES:
            self._plain_bytes = left
            self._parser = None

    def _relay_chunk(self, response: UpstreamResponse, data: bytes) -> bool:
        """Where a read is one whole chunk and somebody waits for it, hand it on with its framing; else False.

        The parser stands between two chunks and need not see it. Every other shape, the last chunk among them, is
        the parser's to judge.
        """
        digits = data.find(b"\r\n", 0, _SIZE_DIGITS_MOST + 2)
        if digits < 1 or data[:digits].strip(_HEX):
            return False
        begin = digits + 2
        end = begin + int(data[:digits], 16)
        if end == begin or len(data) != end + 2 or not data.endswith(b"\r\n"):
            return False
        if not response.relay_chunk(data[begin:end], data):
            return False
        if self.state is _BODY:
            self._quiet_bytes = 0
            self._watch(self._seen_at + self._idle_seconds)
        return True

    def _take_plain(self, response: UpstreamResponse, data: bytes) -> None:
        left = self._plain_bytes
        self._extra = len(data) > left
        piece = data[:left] if self._extra else data
        self._plain_bytes = left - len(piece)
        self._buffered_bytes += len(piece)
        response._chunks.append(piece)
        if self._plain_bytes:
            self._more(response)
        else:
            self._finish(response)

    def _more(self, response: UpstreamResponse) -> None:
        """A part of the body came and it goes on."""
        self.deadline = deadline = self._seen_at + self._idle_seconds
        if deadline < self._deadlines.next_at:
            self._deadlines.arm(deadline)
        response.wake()  # first, since a reader that takes what came at once spares a pause and a resume
        if self._buffered_bytes > self._buffer_bytes and self.state is not _CLOSED:
            self._pause_reading()

    def _finish(self, response: UpstreamResponse) -> None:
        """The answer is whole: let go of it, and of the connection where it cannot serve again."""
        reusable = self._keep_alive and not (self._extra or self._bad or response.early)
        self._response = None
        self.served += 1
        self._last_was_stream = response.is_event_stream
        if reusable:
            self.state = _IDLE
            if self._head_only:
                self._parser = None
            if self._reading_paused:
                self._resume_reading()  # or its end would go unseen
        response.ended()
        self._owner.finished(self, reusable=reusable, was_stream=response.is_event_stream)

    def _over(self, exc: Exception | None) -> None:
        """The upstream has closed, in whatever state that finds us."""
        response = self._response
        self.dropped_after_stream = self._last_was_stream and self._now() - self._rested_at < _SOON_SECONDS
        if response is None:
            self.close()
        elif self.state is _HEAD and response.first_byte_seconds:
            self.close(BadResponse("the upstream closed inside the head of its answer"))
        elif self.state is _HEAD:
            reused = self.served > 0 and not self._quiet_bytes
            self.close(ResetBeforeResponse("the upstream closed before it answered", reused=reused))
        elif exc is None and response.framing is Framing.CLOSE:
            self._keep_alive = False
            self._finish(response)
        else:
            self.close(ResetMidResponse("the upstream closed inside its answer"))

    def _bad_response(self, message: str) -> BadResponse:
        error = BadResponse(message)
        error.before_response = self.state is _HEAD
        return error

    def _head_bytes(self) -> int:
        """For a head that came in one read with much of its body."""
        return sum(len(name) + len(value) + len(b": \r\n") for name, value in self._headers)

    def _unsent(self) -> bool:
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def _watch(self, deadline: float) -> None:
        self.deadline = deadline
        if deadline < self._deadlines.next_at:
            self._deadlines.arm(deadline)

    def _pause_reading(self) -> None:
        """The reader is slow, which is not the upstream's fault: no limit runs meanwhile."""
        self.deadline = NEVER
        if not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        self._reading_paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

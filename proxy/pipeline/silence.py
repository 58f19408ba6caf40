"""Send a comment to the client of a stream whenever it has received nothing for a while.

Clients and the proxies between them give up on a silent connection. Before a replica has responded no head of a
response was sent, so the head of a stream is sent first, with status 200. From then on an error can reach the client
only as an event of the stream, but other replicas can still be tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from proxy.clock import Clock
from proxy.downstream.response import Downstream

COMMENT: Final = b": waiting for the upstream\n\n"
CHECKS: Final = 15  # per `comment_seconds`; a comment may be early by one interval, but never late

_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")
_HEAD: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect comments until its buffer is full
)


class SilentStream(Protocol):
    """A stream into which comments may be written."""

    given_seconds: float
    """Time at which the client last received something, on the monotonic clock."""

    def fill(self) -> None:
        """Write a comment to the client, if one may be written now."""
        ...


class WaitingClient:
    """The client of a stream until a response begins. `head_sent` is true once the head of a stream was sent.

    `headers` are those that are known before any response: the request's id, and what was done with a stored context.
    """

    __slots__ = ("_downstream", "_headers", "given_seconds", "head_sent")

    def __init__(
        self, downstream: Downstream, headers: tuple[tuple[bytes, bytes], ...], since_seconds: float
    ) -> None:
        self._downstream = downstream
        self._headers = headers
        self.given_seconds = since_seconds
        self.head_sent = False

    def fill(self) -> None:
        """Write a comment, and before the first one the head of a stream."""
        if not self.head_sent:
            self.head_sent = True
            self._downstream.begin(200, b"OK", (*_HEAD, *self._headers), None)
        self._downstream.write_last(COMMENT)

    def end_with(self, events: bytes) -> None:
        """Write the last events of a stream whose head was sent, and end it."""
        self._downstream.write_last(events)
        self._downstream.end()


class PassedStream:
    """A stream of events that is passed on unread; call `passed` with each piece."""

    __slots__ = ("_downstream", "_end", "given_seconds")

    def __init__(self, downstream: Downstream, since_seconds: float) -> None:
        self._downstream = downstream
        self._end = b""  # the last bytes that were passed on
        self.given_seconds = since_seconds

    def passed(self, piece: bytes, now_seconds: float) -> None:
        """Note a piece that was sent to the client."""
        self._end = (self._end + piece[-4:])[-4:]
        self.given_seconds = now_seconds

    def fill(self) -> None:
        """Write a comment, unless an event is incomplete."""
        if not self._end or self._end.endswith(_EVENT_ENDS):
            self._downstream.write_last(COMMENT)


class SilenceWatch:
    """Watches all streams of a worker with one timer.

    Args:
        comment_seconds: the longest silence; 0 for no comments.
        before_head: send comments before a response has begun, too.
        clock: the monotonic clock of `given_seconds`.
        call_later: runs a callback after a delay in seconds; by default the event loop's.
    """

    def __init__(
        self,
        comment_seconds: float,
        clock: Clock,
        *,
        before_head: bool = True,
        call_later: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        self.is_on = comment_seconds > 0
        self.fills_before_head = before_head and self.is_on
        self._interval_seconds = comment_seconds / CHECKS
        self._due_seconds = comment_seconds - self._interval_seconds
        self._now = clock.monotonic
        self._call_later = call_later
        self._streams: set[SilentStream] = set()
        self._is_timing = False

    def enter(self, stream: SilentStream) -> None:
        """Watch `stream` until `leave`."""
        self._streams.add(stream)
        if not self._is_timing:
            self._start()

    def leave(self, stream: SilentStream) -> None:
        """Stop watching `stream`. Does nothing if it is not watched."""
        self._streams.discard(stream)

    def _start(self) -> None:
        self._is_timing = True
        call_later = self._call_later or asyncio.get_running_loop().call_later
        call_later(self._interval_seconds, self._check)

    def _check(self) -> None:
        self._is_timing = False
        now_seconds = self._now()
        for stream in tuple(self._streams):
            if now_seconds - stream.given_seconds >= self._due_seconds:
                stream.given_seconds = now_seconds
                stream.fill()
        if self._streams:
            self._start()

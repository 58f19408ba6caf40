"""Observe a stream of server-sent events (first token, usage, end, error), and withhold one chunk on request.

Pure and incremental: it takes the upstream's bytes and returns the client's. After the first token nothing is parsed
while the stream runs. Its last kilobytes are kept, and parsed when their content is asked for. Only if a usage chunk
must be withheld is every chunk examined, and a split event is then held until the rest arrives.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from proxy.model import Endpoint
from proxy.records import Usage
from proxy.wire.events import NOTHING, read_event
from proxy.wire.schemas import EventRead
from proxy.wire.usage import merge, normal, tail_usage

EVENT_BYTES_MOST = 1024 * 1024  # of an event that is held until it is complete; a longer one is passed on unread
TAIL_BYTES = 16 * 1024  # kept of a running stream: its last events, or the end of a very long one
_TAIL_TRIMMED_AT_BYTES = TAIL_BYTES + 4 * 1024  # trimming at every chunk would cost 4 % of each
_LAST_EVENTS: Final = 64  # read at the end: [DONE], usage, finish, and pings between them
_USAGE_KEY: Final = b'"usage"'
_USAGE_BYTES_MOST: Final = 4096  # of a usage object, with its key

# Two line ends. The groups are atomic, otherwise CR LF would count as two.
_EVENT_END = re.compile(rb"(?>\r\n|\r|\n)(?>\r\n|\r|\n)")
_LINE_ENDS = re.compile(rb"[\r\n]*")
_FIELD_LINE = re.compile(rb"[\r\n][^:\r\n]")  # a line that is neither a comment nor blank, with the end before it
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_TYPED_EVENTS: Final = (Endpoint.RESPONSES, Endpoint.INFERENCE)
_COLON: Final = 58
_CR: Final = 13
_LF: Final = 10
_PING: Final = b"event: ping"  # Anthropic's keep-alive
_PING_START: Final = 101  # its first letter
_PING_BYTES_MOST: Final = 256
_PING_LINES_MOST: Final = 3

_OPENING_EVENTS_MOST: Final = 2000
"""Events in which a first token is looked for, so that a stream of tiny events takes no time from other requests. An
honest stream has a few, and a ping every second or so."""


@dataclass(frozen=True, slots=True)
class StreamRead:
    """The facts that a stream has reported so far.

    `finished` means that the end of its format was seen, not the last byte.
    """

    usage: Usage | None
    finished: bool
    error_seen: bool
    model: str | None  # of the Responses API only


class StreamTap:
    """Observes one stream. Call `feed` with every chunk and send what it returns; at the end, what `close` returns.

    With `withhold_usage` (the usage was not asked for by the client) the chunk without choices is withheld.
    `first_token_seen` becomes true at the first content, reasoning or tool call. `progress` is true if the last chunk
    contained more than keep-alives. `usage`, `finished` and `error_seen` are computed on access, in 5 us after a
    change.
    """

    __slots__ = (
        "_buffer",
        "_drop_line_feed",
        "_dropped_end",
        "_has_cr",
        "_head",
        "_in_comment",
        "_is_past_opening",
        "_opening_events",
        "_passed_usage",
        "_result",
        "_searched",
        "_skipped",
        "_skipping",
        "_tail",
        "_tail_bytes",
        "_tail_cut",
        "_withhold",
        "endpoint",
        "first_token_seen",
        "progress",
    )

    def __init__(self, endpoint: Endpoint, *, withhold_usage: bool = False) -> None:
        self.endpoint = endpoint
        self.first_token_seen = False
        self.progress = True
        self._withhold = withhold_usage
        self._tail: deque[bytes] = deque()  # the last chunks, as received
        self._tail_bytes = 0
        self._tail_cut = False  # there was something before the tail
        self._dropped_end = b""  # the last bytes before the tail, in which a key may begin
        self._passed_usage: Any = None  # the last usage object before the tail
        self._buffer = bytearray()  # an event not yet complete
        self._searched = 0  # bytes of the buffer that were searched for the event's end
        self._has_cr = False  # the stream uses CR somewhere, so that line ends need a closer look
        self._skipping = False  # inside an event that is too long to read
        self._skipped = False  # such an event, or too many, came before the first token
        self._drop_line_feed: bool | None = None  # a CR ended an event: whether to drop a LF that belongs to it
        self._head = _Digest()  # of the events up to the first token
        self._in_comment = False
        self._opening_events = 0
        self._is_past_opening = False  # the first token was seen, or is no longer looked for
        self._result: StreamRead | None = None

    def feed(self, chunk: bytes) -> bytes:
        """Take a chunk and return the client's part of it: the same object if nothing is withheld."""
        if not chunk:
            return chunk
        self._result = None
        first = chunk[0]
        is_aside = first in (_COLON, _CR, _LF)
        if self._in_comment or is_aside or (first == _PING_START and chunk.startswith(_PING)):
            self._weigh(chunk)
        else:
            self.progress = True
        self._tail.append(chunk)
        self._tail_bytes += len(chunk)
        if self._tail_bytes > _TAIL_TRIMMED_AT_BYTES:
            self._trim_tail()
        if self._is_past_opening:
            if not self._withhold:
                return chunk
            if (
                not self._buffer
                and self._drop_line_feed is None
                and not self._skipping
                and chunk.find(b"[]") < 0  # `in` takes four times as long
                and chunk.endswith(b"\n\n")
            ):
                return chunk
        return self._scan(chunk)

    def close(self) -> bytes:
        """End the stream and return held bytes that belong to the client, usually none."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        if not rest or not self._withhold:
            return b""
        if self._skipping or not read_event(rest, self.endpoint).extra:
            return rest
        return b""

    @property
    def usage(self) -> Usage | None:
        """The tokens reported last, counted once however often they were reported."""
        return self.result().usage

    @property
    def finished(self) -> bool:
        """True after a finish reason, [DONE], or the end of the response or message."""
        return self.result().finished

    @property
    def error_seen(self) -> bool:
        """True if the stream contained an error event."""
        return self.result().error_seen

    @property
    def mid_event(self) -> bool:
        """True if the bytes sent to the client end inside an event."""
        if self._withhold and not self._skipping:
            return False
        end = b"".join(list(self._tail)[-4:])[-4:]
        return bool(end) and not end.endswith((b"\n\n", b"\r\r", b"\n\r", b"\r\n\r\n", b"\n\r\n", b"\r\n\r"))

    def result(self) -> StreamRead:
        """Return everything that the stream has reported so far."""
        if self._result is None:
            digest = self._digest()
            tier = digest.service_tier
            usage = normal(digest.usage, digest.timings, endpoint=self.endpoint, service_tier=tier)
            self._result = StreamRead(usage, digest.finished, digest.error, digest.model)
        return self._result

    def _trim_tail(self) -> None:
        """Keep the last TAIL_BYTES, in whole chunks if they are small, and the last usage object before them."""
        tail = self._tail
        dropped: list[bytes] = []
        while len(tail) > 1 and self._tail_bytes - len(tail[0]) >= TAIL_BYTES:
            self._tail_bytes -= len(tail[0])
            dropped.append(tail.popleft())
        if len(tail) == 1 and len(tail[0]) > 2 * TAIL_BYTES:
            dropped.append(tail[0][:-TAIL_BYTES])
            tail[0] = tail[0][-TAIL_BYTES:]
            self._tail_bytes = TAIL_BYTES
        if dropped:
            self._tail_cut = True
            self._keep_usage(b"".join((self._dropped_end, *dropped)))

    def _keep_usage(self, dropped: bytes) -> None:
        """Remember the usage object in bytes that leave the tail; it may end in the tail, or its key begin here."""
        if dropped.find(_USAGE_KEY) >= 0:
            following = b"".join(list(self._tail))[:_USAGE_BYTES_MOST]
            self._passed_usage = tail_usage(dropped + following) or self._passed_usage
        self._dropped_end = dropped[1 - len(_USAGE_KEY) :]

    def _weigh(self, chunk: bytes) -> None:
        """Set `progress`, for a chunk that may consist of comments, blank lines or pings only."""
        at_line_start = not self._tail or self._tail[-1][-1] in (_CR, _LF)
        if not self._in_comment and not at_line_start:
            self.progress = True
            return
        if not self._in_comment and chunk.startswith(_PING):
            self.progress = len(chunk) > _PING_BYTES_MOST or len(chunk.splitlines()) > _PING_LINES_MOST
        else:
            begins_field = not self._in_comment and chunk[0] not in (_COLON, _CR, _LF)
            self.progress = begins_field or _FIELD_LINE.search(chunk) is not None
        last_line = max(chunk.rfind(b"\n"), chunk.rfind(b"\r")) + 1
        self._in_comment = chunk.startswith(b":", last_line) or (self._in_comment and not last_line)

    def _scan(self, chunk: bytes) -> bytes:
        """Cut the complete part into events, read those that matter, and return the client's part of them."""
        out: list[bytes] = []
        fresh = self._without_owed_line_feed(chunk, out)
        self._buffer += fresh
        self._has_cr = self._has_cr or _CR in fresh
        start = self._pass_ordinary(self._blank_lines(0, out), out)
        while (end := self._event_end()) > 0:
            self._take(bytes(self._buffer[start:end]), out, last=end == len(self._buffer))
            start = self._pass_ordinary(self._blank_lines(end, out), out)
            if self._is_past_opening and not self._withhold:
                self._buffer.clear()
                return chunk
        del self._buffer[:start]
        self._searched = max(0, len(self._buffer) - 3)
        if len(self._buffer) > EVENT_BYTES_MOST:
            self._give_up(out)
        return b"".join(out) if self._withhold else chunk

    def _pass_ordinary(self, start: int, out: list[bytes]) -> int:
        """Pass the complete events before the next one to withhold on at once; return the offset where they end.

        One by one, tiny events would take 0.2 s for a read of the event loop.
        """
        if not self._is_past_opening or self._skipping or self._has_cr:
            return start
        end = self._buffer.rfind(b"\n\n", start) + 2
        found = _NO_CHOICES.search(self._buffer, start, max(start, end))
        if found is not None:
            end = self._buffer.rfind(b"\n\n", start, found.start()) + 2
        if end <= start + 1:
            return start
        out.append(bytes(self._buffer[start:end]))
        return self._blank_lines(end, out)

    def _without_owed_line_feed(self, chunk: bytes, out: list[bytes]) -> bytes:
        """Return `chunk` without the LF that belongs to the event before, if that ended in a CR."""
        drop, self._drop_line_feed = self._drop_line_feed, None
        if drop is None or chunk[0] != _LF:
            return chunk
        if not drop:
            out.append(b"\n")
        return chunk[1:]

    def _blank_lines(self, start: int, out: list[bytes]) -> int:
        """Pass the line ends before an event on at once; return the offset at which the event begins."""
        match = _LINE_ENDS.match(self._buffer, start)
        end = match.end() if match else start
        if end > start:
            out.append(bytes(self._buffer[start:end]))
        self._searched = max(end, self._searched)
        return end

    def _event_end(self) -> int:
        """Return the offset after the next event in the buffer, or 0."""
        if self._has_cr:
            match = _EVENT_END.search(self._buffer, self._searched)
            return match.end() if match else 0
        found = self._buffer.find(b"\n\n", self._searched)
        return 0 if found < 0 else found + 2

    def _take(self, event: bytes, out: list[bytes], *, last: bool) -> None:
        """Read one complete event and pass it on, unless it is to be withheld."""
        read = NOTHING
        if self._skipping:
            self._skipping = False
        elif not self._is_past_opening or _NO_CHOICES.search(event):
            read = read_event(event, self.endpoint)
        if not self._is_past_opening:
            self._note_opening(read)
        dropped = self._withhold and read.extra
        if not dropped:
            out.append(event)
        if last and event[-1] == _CR:
            self._drop_line_feed = dropped

    def _note_opening(self, read: EventRead) -> None:
        """Note an event that came before the first token, or brings it."""
        self._head.add(read)
        self._opening_events += 1
        if read.token:
            self.first_token_seen = self._is_past_opening = True
        elif self._opening_events == _OPENING_EVENTS_MOST:
            self._skipped = self._is_past_opening = True

    def _give_up(self, out: list[bytes]) -> None:
        """Pass on an event that is too long to hold, except for its last bytes, in which its end may begin."""
        out.append(bytes(self._buffer[:-3]))
        del self._buffer[:-3]
        self._searched = 0
        self._skipping = True
        self._skipped = self._skipped or not self._is_past_opening

    def _digest(self) -> _Digest:
        """Combine the events up to the first token, the usage before the tail, and the last events of the tail."""
        digest = self._head.copy()
        if not self.first_token_seen and not self._skipped:
            digest.add(read_event(bytes(self._buffer), self.endpoint))
            return digest
        if self._passed_usage is not None:
            digest.add(EventRead(usage=self._passed_usage))
        tail = b"".join(self._tail)
        if _CR in tail:
            tail = tail.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        reads = self._last_reads(tail)
        if not sum([bool(read.usage) for read in reads]):  # some report it before their last tokens
            digest.add(EventRead(usage=tail_usage(tail)))
        for read in reads:
            digest.add(read)
        return digest

    def _last_reads(self, tail: bytes) -> list[EventRead]:
        """Read the events from the last one with a token to the end of the tail, in their order."""
        events = tail.split(b"\n\n")
        reads: list[EventRead] = []
        for index in range(len(events) - 1, -1, -1):
            event = events[index]
            if index == 0 and self._tail_cut:
                reads.append(self._of_fragment(event))
                break
            if event.startswith(b":") and event.find(b"\n") < 0:
                continue  # there may be hundreds of comments
            read = read_event(event, self.endpoint)
            reads.append(read)
            if (read.token and not read.finished) or len(reads) == _LAST_EVENTS:
                break
        reads.reverse()
        return reads

    def _of_fragment(self, fragment: bytes) -> EventRead:
        """Read the end of an event longer than the tail. In streams with typed events only the last one has usage."""
        usage = tail_usage(fragment)
        has_usage = usage is not None or self._passed_usage is not None
        return EventRead(usage=usage, finished=has_usage and self.endpoint in _TYPED_EVENTS)


class _Digest:
    """The facts that the events of a stream reported together."""

    __slots__ = ("error", "finished", "model", "service_tier", "timings", "usage")

    def __init__(self) -> None:
        self.usage: Any = None
        self.timings: Any = None
        self.service_tier: Any = None
        self.model: str | None = None
        self.finished = False
        self.error = False

    def add(self, read: EventRead) -> None:
        self.usage = merge(self.usage, read.usage)
        self.timings = merge(self.timings, read.timings)
        self.finished = self.finished or read.finished
        self.error = self.error or read.error
        if read.service_tier is not None:
            self.service_tier = read.service_tier
        if isinstance(read.model, str):
            self.model = read.model

    def copy(self) -> _Digest:
        other = _Digest()
        other.usage, other.timings, other.service_tier = self.usage, self.timings, self.service_tier
        other.finished, other.error, other.model = self.finished, self.error, self.model
        return other

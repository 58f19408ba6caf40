"""One connection, fed by hand: every framing cut at every byte, back-pressure, and how each end is named."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import BadResponse, CairnError, FirstByteTimeout, IdleTimeout, ResetBeforeResponse, ResetMidResponse
from proxy.upstream import Framing, Limits, UpstreamResponse
from proxy.upstream.connection import Connection
from proxy.upstream.timeouts import Deadlines
from tests.proxy.upstream.conftest import spawn, turns
from tests.support.clock import FakeClock
from tests.support.upstream import answer, chunked

LIMITS = Limits(first_byte_seconds=10, idle_seconds=5, max_head_bytes=2_000, buffer_bytes=1_000)


class FakeTransport(asyncio.Transport):
    """Keeps what was written and what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False
        self.paused = False
        self.unsent_bytes = 0

    def write(self, data: Any) -> None:
        self.written += data

    def writelines(self, list_of_data: Any) -> None:
        self.written += b"".join(list_of_data)

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        assert not self.aborted, "uvloop's transport fails then"
        self.paused = False

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes


@dataclass
class Wire:
    """A connection with a fake transport, clock and owner; it is its own owner and records what that is told."""

    clock: FakeClock = field(default_factory=FakeClock)
    finished_as: list[tuple[bool, bool]] = field(default_factory=list)
    left_times: int = 0
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        loop = asyncio.new_event_loop()
        loop.close()  # timers are never set: the deadlines are rung by hand
        self.loop = loop
        self.deadlines = Deadlines(loop, self.clock)
        self.deadlines.next_at = 0.0
        self.transport = FakeTransport()
        self.connection = Connection(loop, self.clock, self.deadlines, self, self.limits)
        self.connection.connection_made(self.transport)

    def finished(self, connection: Connection, *, reusable: bool, was_stream: bool) -> None:
        self.finished_as.append((reusable, was_stream))
        if not reusable:
            connection.close()

    def left(self, connection: Connection) -> None:
        self.left_times += 1

    def begin(self, head_only: bool = False) -> UpstreamResponse:
        return self.connection.begin(LIMITS, head_only=head_only)

    def feed(self, *pieces: bytes) -> None:
        for piece in pieces:
            if not self.transport.aborted:
                self.connection.data_received(piece)

    def end(self, exc: Exception | None = None) -> None:
        if exc is None:
            self.connection.eof_received()
        self.connection.connection_lost(exc)

    def paused(self) -> bool:
        return self.transport.paused

    def ring(self) -> None:
        """Look at the deadlines, without a timer."""
        if self.connection.deadline <= self.clock.monotonic():
            self.connection.expire()


def failed(answered: UpstreamResponse) -> bool:
    return answered._error is not None  # noqa: SLF001 - internal state that no public name shows


def error_of(answered: UpstreamResponse) -> CairnError:
    error = answered._error  # noqa: SLF001 - internal state that no public name shows
    assert error is not None
    return error


OK = b"HTTP/1.1 200 OK\r\n"

# name: (bytes, HEAD?, framing, status, body, reusable)
WHOLE: dict[str, tuple[bytes, bool, Framing, int, bytes, bool]] = {
    "length": (answer(b"hello", headers=[b"X-A: 1"]), False, Framing.LENGTH, 200, b"hello", True),
    "length zero": (answer(b""), False, Framing.LENGTH, 200, b"", True),
    "error status": (answer(b"no", status=b"503 Out"), False, Framing.LENGTH, 503, b"no", True),
    "chunked": (chunked(b"hel", b"lo"), False, Framing.CHUNKED, 200, b"hello", True),
    "chunked with extension and trailers": (
        OK + b"Transfer-Encoding: Chunked\r\n\r\n3;a=b\r\nhel\r\n2;c\r\nlo\r\n0;z\r\nX-T: 1\r\nX-U: 2\r\n\r\n",
        False,
        Framing.CHUNKED,
        200,
        b"hello",
        True,
    ),
    "204": (b"HTTP/1.1 204 No Content\r\nx: y\r\n\r\n", False, Framing.NONE, 204, b"", True),
    "304 with length": (b"HTTP/1.1 304 N\r\nContent-Length: 5\r\n\r\n", False, Framing.NONE, 304, b"", False),
    "HEAD with length": (OK + b"Content-Length: 5\r\n\r\n", True, Framing.NONE, 200, b"", False),
    "HEAD chunked": (OK + b"Transfer-Encoding: chunked\r\n\r\n", True, Framing.NONE, 200, b"", False),
    "100 first": (b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b"hello"), False, Framing.LENGTH, 200, b"hello", True),
    "103 and 102 first": (
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 P\r\n\r\n" + chunked(b"hello"),
        False,
        Framing.CHUNKED,
        200,
        b"hello",
        True,
    ),
    "says close": (answer(b"hello", headers=[b"Connection: close"]), False, Framing.LENGTH, 200, b"hello", False),
    "1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", False, Framing.LENGTH, 200, b"hello", False),
    "1.0 keeps": (
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
        False,
        Framing.LENGTH,
        200,
        b"hello",
        True,
    ),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 1\r\n\r\nx", False, Framing.LENGTH, 200, b"x", True),
    "an event stream": (chunked(b"data: 1\n\n", headers=[b"Content-Type: text/event-stream"]), False,
        Framing.CHUNKED, 200, b"data: 1\n\n", True),
}  # fmt: skip


def check_whole(wire: Wire, answered: UpstreamResponse, name: str) -> None:
    _, _, framing, status, body, reusable = WHOLE[name]
    assert (answered.status, answered.framing, answered.complete) == (status, framing, True)
    assert answered.body_now() == body
    assert wire.finished_as == [(reusable, name == "an event stream")]
    assert wire.transport.aborted is not reusable
    assert all(key == key.lower() for key, _ in answered.headers)
    assert not any(key in (b"x-t", b"link") for key, _ in answered.headers)


@pytest.mark.parametrize("name", WHOLE)
def test_every_framing_is_read_alike_when_cut_in_two_at_any_byte_or_at_every_byte(name: str) -> None:
    raw, head_only = WHOLE[name][:2]
    ways = [[raw[:cut], raw[cut:]] for cut in range(1, len(raw))] + [[raw], [raw[i : i + 1] for i in range(len(raw))]]
    for pieces in ways:
        wire = Wire()
        answered = wire.begin(head_only)
        wire.feed(*pieces)
        check_whole(wire, answered, name)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([name for name in WHOLE if WHOLE[name][5]]), min_size=2, max_size=4),
    st.lists(st.integers(1, 40), min_size=1),
)
def test_answers_one_after_the_other_on_a_connection_never_run_together(names: list[str], sizes: list[int]) -> None:
    """The connection's state starts anew with each exchange, whatever came before and however it was cut."""
    wire = Wire()
    for name in names:
        raw, head_only = WHOLE[name][:2]
        wire.finished_as.clear()
        answered = wire.begin(head_only)
        position = 0
        for number in range(len(raw)):
            size = sizes[number % len(sizes)]
            wire.feed(*([raw[position : position + size]] if position < len(raw) else []))
            position += size
        check_whole(wire, answered, name)


LONG = bytes(range(256)) * 1_000


@pytest.mark.parametrize("extra", [b"", b"x"])
@pytest.mark.parametrize("size", [1_000, 65_535, 65_536, 100_000, 1_000_000])
def test_a_long_body_of_known_length_is_whole_and_leaves_the_connection_in_step(size: int, extra: bytes) -> None:
    """The parser is spared most of it, and the next answer is read from its first byte again."""
    raw = answer(LONG) + extra
    wire = Wire()
    for _ in range(1 if extra else 3):
        answered = wire.begin()
        wire.feed(*[raw[i : i + size] for i in range(0, len(raw), size)])
        assert (answered.complete, answered.body_now() == LONG) == (True, True)
    assert wire.transport.aborted is bool(extra)
    if not extra:
        answered = wire.begin()
        wire.feed(*[bytes([byte]) for byte in chunked(b"next")])
        assert answered.body_now() == b"next"


def test_the_rest_of_a_long_body_of_known_length_is_not_copied() -> None:
    """A reader gets the bytes objects that the event loop read; a short one goes through the parser, which copies."""
    for size, copied in ((200_000, False), (20_000, True)):
        wire = Wire()
        answered = wire.begin()
        head, _, body = answer(b"y" * size).partition(b"\r\n\r\n")
        wire.feed(head + b"\r\n\r\n" + body[:100])
        piece = body[100:10_100]
        wire.feed(piece)
        assert (answered.chunks[-1] is not piece) is copied


@pytest.mark.parametrize("kept", [1_000, 150_000, len(LONG) - 1])
def test_a_long_body_that_ends_too_early_is_broken(kept: int) -> None:
    wire = Wire()
    answered = wire.begin()
    raw = answer(LONG)
    wire.feed(raw[:500], raw[500 : len(raw) - len(LONG) + kept])
    wire.end()
    assert len(answered.body_now()) == kept
    assert isinstance(error_of(answered), ResetMidResponse)


def test_a_close_delimited_body_ends_cleanly_with_the_connection_at_any_cut() -> None:
    raw = OK + b"Content-Type: text/plain\r\n\r\nhello"
    for cut in range(1, len(raw)):
        wire = Wire()
        answered = wire.begin()
        wire.feed(raw[:cut], raw[cut:])
        assert not answered.complete
        wire.end()
        assert (answered.framing, answered.complete, answered.body_now()) == (Framing.CLOSE, True, b"hello")
        assert wire.finished_as == [(False, False)]
        assert wire.left_times == 1


def test_a_close_delimited_body_that_is_reset_is_broken_and_not_ended() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(OK + b"\r\nhel")
    wire.end(ConnectionResetError())
    assert not answered.complete
    assert isinstance(error_of(answered), ResetMidResponse)


@pytest.mark.parametrize("name", ["length", "chunked", "chunked with extension and trailers"])
def test_an_end_at_any_byte_before_the_last_is_told_from_a_whole_answer(name: str) -> None:
    """Before a byte: reset before the answer. Inside the head: a bad answer. Inside the body: broken off."""
    raw = WHOLE[name][0]
    head_bytes = raw.index(b"\r\n\r\n") + 4
    for cut in range(len(raw)):
        wire = Wire()
        answered = wire.begin()
        wire.feed(*([raw[:cut]] if cut else []))
        wire.end()
        expected = ResetBeforeResponse if not cut else BadResponse if cut < head_bytes else ResetMidResponse
        assert type(error_of(answered)) is expected, cut
        assert error_of(answered).before_response is (cut < head_bytes)  # type: ignore[attr-defined]
        assert (answered.complete, wire.left_times) == (False, 1)


@pytest.mark.parametrize("interim", [b"", b"HTTP/1.1 100 Continue\r\n\r\n"])
def test_reused_is_said_only_where_the_connection_had_served_and_nothing_at_all_came(interim: bytes) -> None:
    for served in (0, 1):
        wire = Wire()
        for _ in range(served):
            wire.begin()
            wire.feed(answer(b"x"))
        answered = wire.begin()
        assert answered.reused is bool(served)
        wire.feed(*([interim] if interim else []))
        wire.end()
        error = error_of(answered)
        assert isinstance(error, ResetBeforeResponse)
        assert error.reused is (bool(served) and not interim)


BAD: dict[str, bytes] = {
    "not http": b"SSH-2.0-OpenSSH\r\n\r\n",
    "both length and chunked": OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "both, the other way": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a signed length": OK + b"Content-Length: +5\r\n\r\nhello",
    "a length list": OK + b"Content-Length: 5, 5\r\n\r\nhello",
    "a huge length": OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\nhello",
    "another encoding": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked in two fields": OK + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "obs-fold": OK + b"X: a\r\n b\r\nContent-Length: 1\r\n\r\nx",
    "a space before the colon": OK + b"X : a\r\nContent-Length: 1\r\n\r\nx",
    "NUL in a value": OK + b"X: a\0b\r\nContent-Length: 1\r\n\r\nx",
    "101": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "101 without more": b"HTTP/1.1 101 Switching\r\n\r\n",
    "status 99": b"HTTP/1.1 099 Odd\r\nContent-Length: 0\r\n\r\n",
    "a large head": OK + b"X: " + b"a" * 3_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "many small headers": OK + b"X: a\r\n" * 700 + b"Content-Length: 0\r\n\r\n",
    "interim answers without end": b"HTTP/1.1 102 Processing\r\n\r\n" * 200,
}


INVALID = "the upstream's response is not valid HTTP/1.1"
TOO_LARGE = "the upstream's response has too large a head, trailer or chunk extension"
REASONS = {
    "chunked in two fields": "the upstream's response has a transfer encoding that was not asked for",
    "another encoding": "the upstream's response has a transfer encoding that was not asked for",
    "101": "the upstream switched protocols unasked",
    "101 without more": "the upstream switched protocols unasked",
    "status 99": "the upstream switched protocols unasked",
    "a large head": TOO_LARGE,
    "many small headers": TOO_LARGE,
    "interim answers without end": "the upstream sent too many interim responses",
}


@pytest.mark.parametrize("name", BAD)
def test_the_error_for_an_answer_that_cannot_be_trusted_says_what_is_wrong_with_it(name: str) -> None:
    """It is what an operator finds in the log and a client in the body of the 502."""
    wire = Wire()
    answered = wire.begin()
    wire.feed(*[BAD[name][i : i + 1] for i in range(len(BAD[name]))])
    assert error_of(answered).message == REASONS.get(name, INVALID)


def test_a_head_too_large_is_refused_too_when_it_comes_in_one_read_with_its_body() -> None:
    """The body's bytes do not count: a short head before a long body is let through."""
    for size, refused in ((1_900, False), (3_000, True)):
        wire = Wire()
        answered = wire.begin()
        wire.feed(answer(b"y" * 5_000, headers=[b"X: " + b"x" * size]))
        assert failed(answered) is refused
        if refused:
            assert error_of(answered).message == "the upstream's response has too large a head"


@pytest.mark.parametrize(("over_bytes", "refused"), [(0, False), (1, True)])
def test_a_head_in_one_read_with_its_body_may_have_as_many_bytes_as_the_limit_says(
    over_bytes: int, refused: bool
) -> None:
    """Its reason and its header lines count."""
    others_bytes = len(b"OK" + b"Content-Length: 5000\r\n" + b"X: \r\n")
    wire = Wire()
    answered = wire.begin()
    value = b"x" * (LIMITS.max_head_bytes - others_bytes + over_bytes)
    wire.feed(answer(b"y" * 5_000, headers=[b"X: " + value]))
    assert failed(answered) is refused


def test_the_error_for_each_end_says_where_it_came() -> None:
    before, head, body = OK[:0], OK, answer(b"hello")[:-1]
    expected = {
        before: "the upstream closed before its response began",
        head: "the upstream closed inside the head of its response",
        body: "the upstream closed inside its response",
    }
    for sent, message in expected.items():
        wire = Wire()
        answered = wire.begin()
        wire.feed(*([sent] if sent else []))
        wire.end()
        assert error_of(answered).message == message
    for sent, message in (
        (before, "the upstream did not begin its response in time"),
        (body, "the upstream sent nothing for too long inside its response"),
    ):
        wire = Wire()
        answered = wire.begin()
        wire.feed(*([sent] if sent else []))
        wire.clock.advance(11)
        wire.ring()
        assert error_of(answered).message == message
    for is_reader, message in (
        (True, "the response was abandoned"),
        (False, "the connection was closed from this side"),
    ):
        wire = Wire()
        answered = wire.begin()
        if is_reader:
            answered.abort()
        else:
            wire.connection.close()
        assert error_of(answered).message == message


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("size", [1, 100_000])
def test_an_answer_that_cannot_be_trusted_is_refused_and_its_connection_dropped(name: str, size: int) -> None:
    raw = BAD[name]
    wire = Wire()
    answered = wire.begin()
    wire.feed(*[raw[i : i + size] for i in range(0, len(raw), size)])
    assert isinstance(error_of(answered), BadResponse)
    assert error_of(answered).before_response is True  # type: ignore[attr-defined]
    assert answered.status == 0
    assert (wire.transport.aborted, wire.left_times) == (True, 1)


@pytest.mark.parametrize(
    "body", [b"zz\r\nhello", b"5\r\nhelloX", b"-5\r\nhello", b"ffffffffffffffffff\r\n", b"5 \r\nhello\r\n"]
)
def test_bad_chunk_framing_breaks_the_body_and_says_that_the_answer_had_begun(body: bytes) -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(chunked(b"first", end=False), body)
    assert answered.body_now().startswith(b"first")
    assert isinstance(error_of(answered), BadResponse)
    assert error_of(answered).before_response is False  # type: ignore[attr-defined]
    assert wire.transport.aborted


@pytest.mark.parametrize("endless", [b"5;" + b"x" * 3_000, b"0\r\nX: " + b"x" * 3_000, b"0\r\n" + b"X: y\r\n" * 700])
def test_a_chunk_extension_or_trailer_without_end_is_refused(endless: bytes) -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(chunked(b"first", end=False), *[endless[i : i + 100] for i in range(0, len(endless), 100)])
    assert isinstance(error_of(answered), BadResponse)


@pytest.mark.parametrize("field", [b"Transfer-Encoding: chunked", b"transfer-encoding:\tgzip"])
def test_a_transfer_encoding_in_a_trailer_leaves_the_answer_whole_and_costs_the_connection(field: bytes) -> None:
    """Other fields there are harmless; what an upstream means by this one is unknown."""
    for trailer, reusable in ((b"X-Checksum: 3", True), (field, False)):
        wire = Wire()
        answered = wire.begin()
        wire.feed(chunked(b"hello", end=False), b"0\r\n" + trailer + b"\r\n\r\n")
        assert (answered.complete, answered.body_now()) == (True, b"hello")
        assert wire.finished_as == [(reusable, False)]


@pytest.mark.parametrize("extra", [b"hello", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"\0"])
@pytest.mark.parametrize("raw", [answer(b"x"), chunked(b"x"), b"HTTP/1.1 204 N\r\n\r\n"])
def test_bytes_beyond_an_answers_end_leave_it_whole_and_cost_the_connection(raw: bytes, extra: bytes) -> None:
    for pieces in ([raw + extra], [raw, extra]):
        wire = Wire()
        answered = wire.begin()
        wire.feed(*pieces)
        assert answered.complete
        assert (wire.transport.aborted, wire.left_times) == (True, 1)


def test_a_body_behind_a_head_answer_costs_the_connection() -> None:
    wire = Wire()
    answered = wire.begin(head_only=True)
    wire.feed(answer(b"hello"))
    assert (answered.complete, answered.body_now(), wire.transport.aborted) == (True, b"", True)


def test_a_byte_that_nobody_asked_for_closes_an_idle_connection() -> None:
    wire = Wire()
    wire.feed(b"\n")
    assert (wire.transport.aborted, wire.left_times) == (True, 1)


def test_an_answer_before_the_body_was_sent_is_delivered_and_not_reused() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.transport.unsent_bytes = 1
    wire.feed(answer(b"too large", status=b"413 Too Large"))
    assert (answered.status, answered.early, answered.body_now()) == (413, True, b"too large")
    assert wire.finished_as == [(False, False)]


def test_reading_stops_over_the_buffers_bound_and_goes_on_when_it_was_taken() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(answer(b"x" * 5_000)[:1_000])
    assert not wire.paused()
    wire.feed(b"x" * 500)
    assert wire.paused()
    assert len(answered.body_now()) > 1_000
    assert not wire.paused()
    wire.feed(b"x" * 1_000)
    assert not wire.paused(), "what was taken counts no more"
    wire.feed(b"x")
    assert wire.paused()


@pytest.mark.parametrize(("head_only", "unsolicited"), [(True, False), (False, True)])
def test_a_body_in_the_response_to_a_head_closes_this_connection_only(head_only: bool, unsolicited: bool) -> None:
    """A client that sends HEAD could otherwise turn off the reuse of the upstream's other connections."""
    wire = Wire()
    answered = wire.begin(head_only=head_only)
    wire.feed(answer(b"") + b"body")
    assert (answered.complete, wire.finished_as) == (True, [(False, False)])
    assert wire.transport.aborted
    assert wire.connection.unsolicited is unsolicited


TINY = b"1\r\nx\r\n" * 4_000
EVENTS = b"content-type: text/event-stream\r\n"


@pytest.mark.parametrize(
    ("head", "piece", "has_turn"),
    [
        (b"transfer-encoding: chunked\r\n", TINY, True),
        (EVENTS + b"transfer-encoding: chunked\r\n", TINY, True),
        (EVENTS + b"content-length: 1000000\r\n", TINY, True),
        (EVENTS, TINY, True),
        (b"transfer-encoding: chunked\r\n", TINY[:6_000], False),
        (b"content-length: 1000000\r\n", TINY, False),
    ],
)
def test_other_connections_have_a_turn_after_a_long_read_that_takes_time(
    head: bytes, piece: bytes, has_turn: bool
) -> None:
    """The loop would read up to 32 times in a row; plain bytes of a known length take no time."""
    wire = Wire(limits=Limits(buffer_bytes=1_000_000))
    soon: list[Any] = []
    wire.loop.call_soon = soon.append  # type: ignore[assignment]
    answered = wire.begin()
    wire.feed(OK + head + b"\r\n")
    for _ in range(3):
        wire.feed(piece)
        assert (wire.paused(), len(soon)) == (has_turn, has_turn)
        answered.body_now()
        while soon:
            soon.pop()()
        assert not wire.paused()


def test_a_turn_does_not_end_the_wait_for_a_slow_reader() -> None:
    """Its buffer is full, whether that is noticed before or in the turn."""
    wire = Wire(limits=Limits(buffer_bytes=30_000))
    soon: list[Any] = []
    wire.loop.call_soon = soon.append  # type: ignore[assignment]
    wire.begin()
    wire.feed(OK + b"transfer-encoding: chunked\r\n\r\n", b"4e20\r\n" + b"x" * 20_000 + b"\r\n")
    assert len(soon) == 1
    wire.feed(b"4e20\r\n" + b"x" * 20_000 + b"\r\n")  # the loop had read it already
    soon.pop()()
    assert wire.paused()
    assert not soon


def test_a_connection_that_ends_in_a_turn_is_not_touched_again() -> None:
    """The turn ends after it."""
    wire = Wire(limits=Limits(buffer_bytes=1_000_000))
    soon: list[Any] = []
    wire.loop.call_soon = soon.append  # type: ignore[assignment]
    answered = wire.begin()
    wire.feed(OK + b"transfer-encoding: chunked\r\n\r\n", TINY)
    wire.connection.close()
    soon.pop()()
    assert failed(answered)
    wire.end()


PART_BYTES = 16_384  # of a long read, parsed at once


@dataclass
class Turns:
    """Callbacks that wait for the next turn of the loop of `wire`."""

    wire: Wire
    soon: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wire.loop.call_soon = self.soon.append  # type: ignore[assignment]

    def pass_one(self) -> None:
        """Let everything run that waits now."""
        ready = self.soon[:]
        self.soon.clear()
        for callback in ready:
            callback()


def test_a_long_read_is_parsed_in_parts_between_which_other_connections_have_a_turn() -> None:
    """To parse 256 KB of chunks of one byte each takes 0.2 s. Nothing more is read before all of them."""
    wire = Wire(limits=Limits(buffer_bytes=1_000_000))
    turns_of = Turns(wire)
    answered = wire.begin()
    wire.feed(OK + b"transfer-encoding: chunked\r\n\r\n", TINY * 10 + b"0\r\n\r\n")
    got = [answered.body_now()]
    while turns_of.soon:
        assert wire.paused()
        assert len(turns_of.soon) == 1
        turns_of.pass_one()
        got.append(answered.body_now())
    assert max(map(len, got)) <= PART_BYTES // len(b"1\r\nx\r\n") + 1
    assert len(got) == -(-len(TINY * 10) // PART_BYTES)
    assert (b"".join(got), answered.complete, wire.paused()) == (b"x" * 40_000, True, False)
    assert wire.finished_as == [(True, False)]


@pytest.mark.parametrize("into_part", [0, 1, 700])
def test_bytes_beyond_an_end_cost_the_connection_although_they_are_in_the_next_part_of_a_read(into_part: int) -> None:
    """The end of the response is the end of one part, or near it."""
    wire = Wire(limits=Limits(buffer_bytes=1_000_000))
    answered = wire.begin()
    head = OK + b"content-length: %d\r\n\r\n"
    body = b"x" * (PART_BYTES - into_part - len(head % 10_000))
    wire.feed(head % len(body) + body + answer(b"poison") * 400)
    assert (answered.body_now(), answered.complete) == (body, True)
    assert wire.finished_as == [(False, False)]
    assert wire.transport.aborted


@pytest.mark.parametrize("framing", [b"", b"transfer-encoding: chunked\r\n"])
def test_the_parts_of_a_long_read_that_wait_for_their_turn_come_before_the_end_of_the_connection(
    framing: bytes,
) -> None:
    """A body that ends with the connection would otherwise be cut short."""
    wire = Wire(limits=Limits(buffer_bytes=1_000_000))
    Turns(wire)
    answered = wire.begin()
    wire.feed(OK + framing + b"\r\n" + (TINY * 5 + b"0\r\n\r\n" if framing else b"x" * 20_000))
    wire.end()
    assert (answered.body_now(), answered.complete) == (b"x" * 20_000, True)


def test_a_slow_reader_stops_the_parts_of_a_long_read_until_it_has_taken_what_came_before() -> None:
    """They go on one in each turn, in order, and with what the loop had read already behind them."""
    wire = Wire(limits=Limits(buffer_bytes=2_000))
    turns_of = Turns(wire)
    answered = wire.begin()
    wire.feed(OK + b"transfer-encoding: chunked\r\n\r\n")
    wire.feed(b"1\r\na\r\n" * 6_000, b"1\r\nb\r\n" * 6_000 + b"0\r\n\r\n")
    got = b""
    for _ in range(40):
        if not turns_of.soon:
            assert wire.paused()
            assert answered.buffered_bytes > 2_000
            got += answered.body_now()
        turns_of.pass_one()
        if answered.complete:
            break
    assert (got + answered.body_now(), answered.complete) == (b"a" * 6_000 + b"b" * 6_000, True)
    assert not wire.paused()


def test_the_rest_of_a_long_read_that_bypasses_the_parser_waits_for_no_turn() -> None:
    """It costs no time, since nothing looks at its bytes."""
    wire = Wire(limits=Limits(buffer_bytes=1_000_000))
    turns_of = Turns(wire)
    answered = wire.begin()
    body = b"x" * 200_000
    wire.feed(answer(body))
    assert (answered.body_now(), answered.complete, turns_of.soon) == (body, True, [])
    assert wire.finished_as == [(True, False)]


@pytest.mark.parametrize("head_only", [True, False])
def test_a_connection_that_is_closed_in_a_turn_parses_no_more_parts(head_only: bool) -> None:
    """Neither when the turn comes nor when its transport is gone."""
    wire = Wire(limits=Limits(buffer_bytes=1_000_000))
    turns_of = Turns(wire)
    answered = wire.begin(head_only=head_only)
    wire.feed(OK + b"transfer-encoding: chunked\r\n\r\n" + TINY * 3)
    wire.connection.close()
    arrived = answered.buffered_bytes
    turns_of.pass_one()
    wire.end()
    assert (answered.buffered_bytes, turns_of.soon) == (arrived, [])


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60_000), min_size=1, max_size=8),
    takes=st.lists(st.booleans(), min_size=1, max_size=8),
    chunk=st.sampled_from([1, 700, 30_000]),
)
def test_a_body_is_whole_however_it_is_read_and_taken(sizes: list[int], takes: list[bool], chunk: int) -> None:
    """In reads of any length, with a reader that takes what came sooner or later."""
    body = bytes(range(256)) * 250
    raw = chunked(*[body[at : at + chunk] for at in range(0, len(body), chunk)])
    wire = Wire(limits=Limits(buffer_bytes=20_000))
    turns_of = Turns(wire)
    answered = wire.begin()
    got, at, step = b"", 0, 0
    while not answered.complete:
        if at < len(raw) and not wire.paused():
            end = at + sizes[step % len(sizes)]
            wire.feed(raw[at:end])
            at = end
        turns_of.pass_one()
        if takes[step % len(takes)] or not turns_of.soon:
            got += answered.body_now()
        step += 1
    assert (got + answered.body_now(), wire.finished_as) == (body, [(True, False)])


def test_a_body_just_too_long_for_the_parser_is_whole_when_it_is_taken_as_it_comes() -> None:
    """What was taken is not still to come."""
    body = b"x" * 70_000
    raw = answer(body)
    wire = Wire()
    answered = wire.begin()
    got = b""
    for begin, end in pairwise([0, *range(10_000, len(raw), 1_000), len(raw)]):
        wire.feed(raw[begin:end])
        got += answered.body_now()
    assert (got == body, answered.complete, wire.finished_as) == (True, True, [(True, False)])


def test_a_paused_reader_is_not_the_upstreams_lateness_but_a_silent_upstream_is() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(chunked(b"x" * 1_500, end=False))
    wire.clock.advance(1_000)
    wire.ring()
    assert not failed(answered)
    answered.body_now()
    wire.clock.advance(4.9)
    wire.ring()
    assert not failed(answered)
    wire.clock.advance(0.2)
    wire.ring()
    assert isinstance(error_of(answered), IdleTimeout)


def test_an_answer_that_ended_while_reading_was_paused_is_read_on_so_that_the_end_is_seen() -> None:
    wire = Wire()
    wire.begin()
    raw = answer(b"x" * 1_500)
    wire.feed(raw[:-10])
    assert wire.paused()
    wire.feed(raw[-10:])  # what the loop had read already
    assert not wire.paused()
    assert wire.finished_as == [(True, False)]


def test_a_head_that_trickles_is_late_by_the_first_byte_limit() -> None:
    wire = Wire()
    answered = wire.begin()
    for byte in OK:
        wire.clock.advance(1)
        wire.ring()
        wire.feed(bytes([byte]))
    assert isinstance(error_of(answered), FirstByteTimeout)


def test_each_piece_of_a_body_moves_the_idle_limit() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(chunked(end=False))
    for _ in range(20):
        wire.clock.advance(4.9)
        wire.ring()
        wire.feed(b"1\r\nx\r\n")
    assert answered.body_now() == b"x" * 20
    wire.clock.advance(5.1)
    wire.ring()
    assert isinstance(error_of(answered), IdleTimeout)


def test_the_limit_of_silence_can_be_moved_for_one_response() -> None:
    """A longer one holds from now on, and the next response has the usual one again."""
    wire = Wire()
    answered = wire.begin()
    wire.feed(chunked(end=False))
    answered.allow_silence(100.0)
    wire.clock.advance(99.0)
    wire.ring()
    assert not failed(answered)
    wire.feed(b"1\r\nx\r\n")
    wire.clock.advance(99.0)
    wire.ring()
    assert not failed(answered)
    wire.feed(b"0\r\n\r\n")
    following = wire.begin()
    wire.feed(chunked(end=False))
    wire.clock.advance(5.1)
    wire.ring()
    assert isinstance(error_of(following), IdleTimeout)


def test_what_arrived_can_be_looked_at_and_stays() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(chunked(b"hel", b"lo", end=False))
    assert (answered.peek(), answered.peek(), answered.buffered_bytes) == (b"hello", b"hello", 5)
    assert answered.body_now() == b"hello"
    assert answered.peek() == b""


def test_the_stamps_are_of_the_request_and_of_the_first_byte_of_the_final_answer() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.clock.advance(1)
    wire.feed(b"HTTP/1.1 100 Continue\r\n\r\n")
    wire.clock.advance(1)
    wire.feed(answer(b"x")[:5])
    wire.clock.advance(1)
    wire.feed(answer(b"x")[5:])
    assert answered.first_byte_seconds - answered.sent_seconds == 2


@pytest.mark.parametrize("kind", ["length", "chunked", "close"])
def test_an_answer_in_the_same_read_as_an_interim_one_has_its_own_first_byte(kind: str) -> None:
    """The limits of a stream are counted from it."""
    raw = {"length": answer(b"x"), "chunked": chunked(b"x", end=False), "close": OK + b"\r\n"}[kind]
    wire = Wire()
    answered = wire.begin()
    wire.clock.advance(1)
    wire.feed(b"HTTP/1.1 100 Continue\r\n\r\n")
    wire.clock.advance(1)
    wire.feed(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + raw)
    assert answered.status == 200
    assert answered.first_byte_seconds - answered.sent_seconds == 2


@pytest.mark.parametrize("size", [10, 70_000])
def test_a_request_is_written_whole_small_or_large_or_in_buffers(size: int) -> None:
    body = b"y" * size
    for form in (body, [body[:5], memoryview(body)[5:]]):
        wire = Wire()
        wire.begin()
        wire.connection.send(b"head", form)  # type: ignore[arg-type]
        assert wire.transport.written == b"head" + body


async def test_what_is_sent_on_a_lost_connection_goes_nowhere() -> None:
    """Its reader learns of the loss; the sender need not look first."""
    wire = Wire()
    answered = wire.begin()
    wire.end()
    wire.connection.send(b"head", b"body")
    await wire.connection.write((b"piece",), 1.0)
    assert wire.transport.written == b""
    assert isinstance(error_of(answered), ResetBeforeResponse)


def test_a_transport_that_takes_more_again_with_nobody_waiting_changes_nothing() -> None:
    """It filled up in the last piece of a request."""
    wire = Wire()
    answered = wire.begin()
    wire.connection.send(b"head", b"body")
    wire.connection.pause_writing()
    wire.connection.resume_writing()
    wire.feed(answer(b"x"))
    assert answered.body_now() == b"x"
    assert wire.finished_as == [(True, False)]


async def test_a_piece_of_a_request_waits_while_the_transport_is_full() -> None:
    """And the next one does not, once it takes more again."""
    wire = Wire()
    wire.connection = Connection(asyncio.get_running_loop(), wire.clock, wire.deadlines, wire, LIMITS)
    wire.connection.connection_made(wire.transport)
    answered = wire.begin()
    wire.connection.pause_writing()
    writing = spawn(wire.connection.write((b"one",), 3.0))
    await turns()
    assert (writing.done(), wire.transport.written) == (False, b"one")
    wire.connection.resume_writing()
    wire.connection.resume_writing()
    await writing
    wire.connection.resume_writing()
    await wire.connection.write((b"two",), 3.0)
    assert wire.transport.written == b"onetwo"
    wire.clock.advance(3.0)
    wire.ring()
    assert isinstance(error_of(answered), FirstByteTimeout), (
        "the limit of the write runs on until the next one is set"
    )


def test_a_silence_allowed_while_reading_is_paused_counts_from_when_it_goes_on() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(chunked(b"x" * 1_500, end=False))
    assert wire.paused()
    answered.allow_silence(20.0)
    wire.clock.advance(1_000)
    wire.ring()
    assert not failed(answered)
    answered.body_now()
    wire.clock.advance(19.9)
    wire.ring()
    assert not failed(answered)
    wire.clock.advance(0.2)
    wire.ring()
    assert isinstance(error_of(answered), IdleTimeout)


def test_a_silence_allowed_before_the_head_leaves_the_limit_of_the_head() -> None:
    wire = Wire()
    answered = wire.begin()
    answered.allow_silence(1.0)
    wire.clock.advance(9.9)
    wire.ring()
    assert not failed(answered)
    wire.clock.advance(0.2)
    wire.ring()
    assert isinstance(error_of(answered), FirstByteTimeout)


def test_what_had_arrived_can_be_taken_while_the_transport_is_already_closing() -> None:
    wire = Wire()
    answered = wire.begin()
    wire.feed(chunked(b"x" * 1_500, end=False))
    wire.transport.aborted = True
    assert answered.body_now() == b"x" * 1_500


def test_a_connection_that_was_never_opened_gives_its_slot_back_once() -> None:
    wire = Wire()
    connection = Connection(wire.loop, wire.clock, wire.deadlines, wire, LIMITS)
    assert not connection.usable
    connection.close()
    connection.close()
    assert wire.left_times == 1


async def test_a_sink_that_gives_a_response_up_at_a_whole_chunk_leaves_no_limit_behind() -> None:
    """Nothing that the client does in its sink brings a closed connection back to life."""
    wire = Wire()
    wire.connection = Connection(asyncio.get_running_loop(), wire.clock, wire.deadlines, wire, LIMITS)
    wire.connection.connection_made(wire.transport)
    answered = wire.begin()
    wire.feed(chunked(end=False))

    def sink(piece: bytes, framed: bytes | None) -> bool:
        answered.abort()
        return True

    pouring = spawn(answered.pour(sink))
    await turns()
    wire.feed(b"1\r\nx\r\n")
    assert (wire.transport.aborted, wire.left_times, wire.connection.deadline) == (True, 1, math.inf)
    with pytest.raises(ResetMidResponse):
        await pouring


async def test_each_whole_chunk_that_goes_straight_to_a_sink_moves_the_idle_limit() -> None:
    """As one that the parser reads."""
    wire = Wire()
    wire.connection = Connection(asyncio.get_running_loop(), wire.clock, wire.deadlines, wire, LIMITS)
    wire.connection.connection_made(wire.transport)
    answered = wire.begin()
    wire.feed(chunked(end=False))
    pouring = spawn(answered.pour(lambda piece, framed: True))
    await turns()
    for _ in range(3):
        wire.clock.advance(LIMITS.idle_seconds - 1)
        wire.feed(b"1\r\nx\r\n")
        assert wire.connection.deadline == wire.clock.monotonic() + LIMITS.idle_seconds
    wire.feed(b"0\r\n\r\n")
    await pouring


def test_interim_answers_are_counted_anew_for_each_response() -> None:
    """Sixty-four are let through each time."""
    wire = Wire()
    for _ in range(2):
        answered = wire.begin()
        wire.feed(b"HTTP/1.1 102 Processing\r\n\r\n" * 64, answer(b"x"))
        assert answered.body_now() == b"x"
    refused = wire.begin()
    wire.feed(b"HTTP/1.1 102 Processing\r\n\r\n" * 65)
    assert isinstance(error_of(refused), BadResponse)

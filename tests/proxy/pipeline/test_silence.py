"""Comments into silent streams: when they are due, where they may be written, and what comes before the first."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxy.pipeline.silence import COMMENT, PassedStream, SilenceWatch, WaitingClient
from tests.proxy.pipeline.test_cors import Kept
from tests.support.clock import FakeClock


class Stream:
    """A stream that counts its comments."""

    def __init__(self, given_seconds: float) -> None:
        self.given_seconds = given_seconds
        self.comments = 0

    def fill(self) -> None:
        self.comments += 1


class Watch:
    """A watch with a timer that the test lets run."""

    def __init__(self, comment_seconds: float = 15.0) -> None:
        self.clock = FakeClock()
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.watch = SilenceWatch(comment_seconds, self.clock, call_later=self._later)

    def _later(self, seconds: float, call: Callable[[], None]) -> object:
        self.timers.append((seconds, call))
        return None

    def ring(self) -> None:
        [(seconds, call)] = self.timers
        self.timers.clear()
        self.clock.advance(seconds)
        call()


def test_a_comment_is_due_one_interval_before_the_longest_silence() -> None:
    """Fifteen checks in each; what was given meanwhile counts anew."""
    watch = Watch(15.0)
    silent, busy = Stream(1_000.0), Stream(1_000.0)
    watch.watch.enter(silent)
    watch.watch.enter(busy)
    assert [seconds for seconds, _ in watch.timers] == [1.0]
    for _ in range(13):
        watch.ring()
    assert (silent.comments, busy.comments) == (0, 0)
    busy.given_seconds = watch.clock.monotonic()
    watch.ring()
    assert (silent.comments, busy.comments) == (1, 0)
    assert silent.given_seconds == watch.clock.monotonic() == 1_014.0
    for _ in range(13):
        watch.ring()
    assert (silent.comments, busy.comments) == (1, 1)


def test_the_timer_ends_with_the_last_stream_and_begins_with_the_next() -> None:
    """There is one, however many are watched; leaving twice changes nothing."""
    watch = Watch()
    first, second = Stream(1_000.0), Stream(1_000.0)
    watch.watch.enter(first)
    watch.watch.enter(second)
    watch.watch.leave(first)
    watch.watch.leave(first)
    watch.ring()
    assert len(watch.timers) == 1
    watch.watch.leave(second)
    watch.ring()
    assert watch.timers == []
    watch.watch.enter(first)
    assert len(watch.timers) == 1


@pytest.mark.parametrize(
    ("seconds", "before", "is_on", "fills_before_head"),
    [(0.0, True, False, False), (15.0, False, True, False), (15.0, True, True, True), (0.5, True, True, True)],
)
def test_no_comments_are_sent_if_they_are_off_nor_before_a_head_if_the_operator_says_so(
    seconds: float, before: bool, is_on: bool, fills_before_head: bool
) -> None:
    watch = SilenceWatch(seconds, FakeClock(), before_head=before)
    assert (watch.is_on, watch.fills_before_head) == (is_on, fills_before_head)
    assert SilenceWatch(seconds, FakeClock()).fills_before_head is is_on


def test_before_the_first_comment_comes_the_head_of_a_stream() -> None:
    """Once; proxies on the way are told not to hold comments back."""
    kept = Kept()
    client = WaitingClient(kept, ((b"x-request-id", b"r"),), 5.0)
    assert (client.given_seconds, client.head_sent) == (5.0, False)
    client.fill()
    client.fill()
    client.end_with(b"data: {}\n\n")
    head = (
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
        (b"x-request-id", b"r"),
    )
    assert kept.calls == [
        ("begin", 200, b"OK", head, None),
        ("write_last", COMMENT),
        ("write_last", COMMENT),
        ("write_last", b"data: {}\n\n"),
        ("end",),
    ]
    assert client.head_sent


@pytest.mark.parametrize(
    ("pieces", "may_fill"),
    [
        ((), True),
        ((b"data: 1\n\n",), True),
        ((b"data: 1\r\n\r\n",), True),
        ((b"data: 1\r\r",), True),
        ((b"data: 1\n", b"\n"), True),
        ((b"data: 1\r", b"\n", b"\r", b"\n"), True),
        ((b"data: 1\n",), False),
        ((b"data: 1\r\n",), False),
        ((b"data: 1\n\nd",), False),
        ((b"\n\n", b"x"), False),
    ],
)
def test_a_comment_comes_only_between_events(pieces: tuple[bytes, ...], may_fill: bool) -> None:
    """However the end of an event is cut."""
    kept = Kept()
    stream = PassedStream(kept, 5.0)
    for number, piece in enumerate(pieces):
        stream.passed(piece, 10.0 + number)
    assert stream.given_seconds == (9.0 + len(pieces) if pieces else 5.0)
    stream.fill()
    assert kept.calls == ([("write_last", COMMENT)] if may_fill else [])

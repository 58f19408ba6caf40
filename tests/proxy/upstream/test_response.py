"""A response as its reader sees it, filled by hand: waiting for part of its body, and sinks that fail or are full."""

from __future__ import annotations

import asyncio

import pytest

from proxy.errors import CairnError, IdleTimeout, ResetMidResponse
from proxy.upstream import UpstreamResponse
from tests.proxy.upstream.conftest import spawn, turns


class Source:
    """The connection behind a response; it records what is asked of it."""

    def __init__(self) -> None:
        self.taken_times = 0
        self.silences: list[float] = []
        self.closed_with: list[CairnError | None] = []

    def taken(self) -> None:
        self.taken_times += 1

    def allow_silence(self, seconds: float) -> None:
        self.silences.append(seconds)

    def close(self, error: CairnError | None = None) -> None:
        self.closed_with.append(error)


class Filled:
    """A response whose body the test brings."""

    def __init__(self) -> None:
        self.source = Source()
        self.loop = asyncio.get_running_loop()
        self.response = UpstreamResponse(self.loop, self.source, 1.0, reused=False)

    def bring(self, *pieces: bytes) -> None:
        self.response.chunks.extend(pieces)
        self.response.wake()

    def late(self) -> float:
        """A moment of the loop's clock that this test does not reach."""
        return self.loop.time() + 1_000.0


# -- waiting for a part of the body, with nothing taken


async def test_more_has_arrived_only_with_more_than_was_seen() -> None:
    """Bytes that have arrived already are not waited for, and none are taken."""
    body = Filled()
    body.bring(b"ab")
    assert await body.response.arrived(1, body.late()) is True
    waiting = spawn(body.response.arrived(2, body.late()))
    await turns()
    body.response.wake()  # a change that brought nothing
    await turns()
    assert not waiting.done()
    body.bring(b"c")
    assert await waiting is True
    assert (body.response.peek(), body.source.taken_times) == (b"abc", 0)


async def test_the_end_of_the_body_ends_the_wait_for_more_of_it() -> None:
    body = Filled()
    waiting = spawn(body.response.arrived(0, body.late()))
    await turns()
    body.response.ended()
    assert await waiting is True


async def test_waiting_for_more_of_a_body_ends_at_its_time() -> None:
    """The response goes on, and its next piece is waited for as before."""
    body = Filled()
    assert await body.response.arrived(0, body.loop.time()) is False
    assert body.source.closed_with == []
    waiting = spawn(body.response.arrived(0, body.late()))
    await turns()
    body.bring(b"x")
    assert await waiting is True


async def test_a_piece_that_comes_in_the_moment_of_the_deadline_has_arrived() -> None:
    """The timer then finds the wait over."""
    body = Filled()
    due = body.loop.time() + 0.002
    waiting = spawn(body.response.arrived(0, due))
    await turns(2)
    while body.loop.time() < due:
        pass  # the timer becomes due while the loop is busy
    body.loop.call_soon(body.bring, b"x")  # runs before it, in the same turn
    assert await waiting is True
    assert body.response.body_now() == b"x"


@pytest.mark.parametrize("how", ["a piece", "the end"])
async def test_a_body_has_begun_with_its_first_piece_or_its_end(how: str) -> None:
    body = Filled()
    waiting = spawn(body.response.begun())
    await turns()
    assert not waiting.done()
    if how == "a piece":
        body.bring(b"x")
    else:
        body.response.ended()
    await waiting
    await body.response.begun()
    assert (body.response.peek(), body.source.taken_times) == (b"x" if how == "a piece" else b"", 0)


async def test_a_body_fits_if_it_ends_within_the_limit() -> None:
    """With exactly as many bytes it does; nothing is taken."""
    body = Filled()
    waiting = spawn(body.response.fits(4))
    await turns()
    body.bring(b"ab")
    body.bring(b"cd")
    await turns()
    assert not waiting.done()
    body.response.ended()
    assert await waiting is True
    assert body.response.body_now() == b"abcd"


async def test_a_body_with_a_byte_over_the_limit_does_not_fit() -> None:
    """It is not waited for to its end, and the response goes on."""
    body = Filled()
    waiting = spawn(body.response.fits(4))
    await turns()
    body.bring(b"abcde")
    assert await waiting is False
    assert (body.response.peek(), body.source.closed_with) == (b"abcde", [])


@pytest.mark.parametrize("wait", ["arrived", "begun", "fits", "next_chunk", "pour"])
async def test_whoever_waits_for_a_body_learns_how_it_was_broken_off(wait: str) -> None:
    """At once, and again whenever it is asked."""
    body = Filled()
    response, got = body.response, []

    def begin() -> asyncio.Task[object]:
        calls = {
            "arrived": lambda: response.arrived(0, body.late()),
            "begun": response.begun,
            "fits": lambda: response.fits(9),
            "next_chunk": response.next_chunk,
            "pour": lambda: response.pour(lambda piece, _: not got.append(piece)),  # type: ignore[func-returns-value]
        }
        return spawn(calls[wait]())

    waiting = begin()
    await turns()
    response.fail(IdleTimeout("silent"))
    for task in (waiting, begin()):
        with pytest.raises(IdleTimeout, match="silent"):
            await task
    assert got == []


@pytest.mark.parametrize("wait", ["arrived", "begun", "fits"])
async def test_who_leaves_while_a_part_of_the_body_is_awaited_closes_the_connection(wait: str) -> None:
    body = Filled()
    response = body.response
    waits = {
        "arrived": lambda: response.arrived(0, body.late()),
        "begun": response.begun,
        "fits": lambda: response.fits(9),
    }
    waiting = spawn(waits[wait]())
    await turns()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    [error] = body.source.closed_with
    assert isinstance(error, ResetMidResponse)
    assert error.message == "the response was abandoned"


# -- a sink


async def test_a_sink_that_has_enough_gets_no_more_until_it_is_poured_again() -> None:
    """Each way in which a piece reaches it: what had arrived, what arrives, and a whole chunk with its framing."""
    body = Filled()
    response = body.response
    got: list[tuple[bytes, bytes | None]] = []

    def sink(piece: bytes, framed: bytes | None) -> bool:
        got.append((piece, framed))
        return False

    body.bring(b"a")
    assert await response.pour(sink) is False
    pouring = spawn(response.pour(sink))
    await turns()
    body.bring(b"b")
    body.bring(b"c")
    assert await pouring is False
    assert await response.pour(sink) is False
    pouring = spawn(response.pour(sink))
    await turns()
    assert response.relay_chunk(b"d", b"1\r\nd\r\n") is True
    assert response.relay_chunk(b"e", b"1\r\ne\r\n") is False, "nobody waits for it: the parser reads it"
    assert await pouring is False
    assert got == [(b"a", None), (b"b", None), (b"c", None), (b"d", b"1\r\nd\r\n")]


@pytest.mark.parametrize("whole", [False, True])
async def test_what_a_sink_raises_at_a_piece_ends_the_pouring_and_closes(whole: bool) -> None:
    def sink(piece: bytes, framed: bytes | None) -> bool:
        raise ConnectionResetError("the client left")

    body = Filled()
    pouring = spawn(body.response.pour(sink))
    await turns()
    if whole:
        assert body.response.relay_chunk(b"d", b"1\r\nd\r\n") is True
    else:
        body.bring(b"d")
    with pytest.raises(ConnectionResetError):
        await pouring
    [error] = body.source.closed_with
    assert isinstance(error, ResetMidResponse)
    assert error.message == "the response was abandoned"


async def test_pieces_that_come_while_a_cancelled_sink_is_ending_do_not_reach_it() -> None:
    """The task that poured is cancelled and has not run since."""
    body = Filled()
    got: list[bytes] = []
    pouring = spawn(body.response.pour(lambda piece, _: not got.append(piece)))  # type: ignore[func-returns-value]
    await turns()
    pouring.cancel()
    assert body.response.relay_chunk(b"d", b"1\r\nd\r\n") is False
    body.bring(b"d")
    with pytest.raises(asyncio.CancelledError):
        await pouring
    assert got == []


# -- the head, and what is asked of a response that has ended


class Late:
    """A filter that passes each piece with the next one."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, piece: bytes, *, is_last: bool) -> bytes:
        passed, self._held = self._held, piece
        if is_last:
            passed, self._held = passed + self._held, b""
        return passed


async def test_what_takes_the_place_of_a_body_ends_with_it() -> None:
    """A piece of which nothing may pass yet does not look like the end, and what was held back comes at the end."""
    for last in ((), (b"c",)):
        body = Filled()
        body.response.replace(((b"x", b"y"),), Late(), 3)
        assert (body.response.headers, body.response.content_length) == (((b"x", b"y"),), 3)
        body.bring(b"a")
        taken = spawn(body.response.next_chunk())
        await turns()
        assert not taken.done()
        body.bring(b"b")
        assert await taken == b"a"
        body.bring(*last)
        body.response.ended()
        rest = b"b" + b"".join(last)
        assert [await body.response.next_chunk() for _ in range(2)] == [rest, b""]


async def test_a_header_is_found_by_its_name_and_the_first_of_two_counts() -> None:
    response = Filled().response
    response.headers = ((b"a", b"1"), (b"b", b"2"), (b"b", b"3"))
    assert (response.header(b"b"), response.header(b"c")) == (b"2", b"")


async def test_an_ended_response_asks_nothing_more_of_its_connection() -> None:
    """The connection may serve another one by then."""
    body = Filled()
    body.response.allow_silence(3.0)
    body.bring(b"rest")
    body.response.ended()
    body.response.allow_silence(9.0)
    body.response.abort()
    assert await body.response.read(4) == b"rest"
    assert (body.source.silences, body.source.closed_with, body.source.taken_times) == ([3.0], [], 0)


async def test_an_interrupt_comes_once_at_the_head_or_the_failure_also_if_that_was_before() -> None:
    calls: list[str] = []
    head, failed, before = Filled().response, Filled().response, Filled().response
    head.interrupt_with(lambda: calls.append("head"))
    failed.interrupt_with(lambda: calls.append("failed"))
    assert (calls, head.pending) == ([], True)
    head.status = 200
    head.wake()
    head.wake()
    failed.fail(IdleTimeout("silent"))
    before.status = 200
    before.interrupt_with(lambda: calls.append("before"))
    assert calls == ["head", "failed", "before"]
    assert [head.pending, failed.pending] == [False, False]

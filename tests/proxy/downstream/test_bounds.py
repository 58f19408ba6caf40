"""Each bound of the client port belongs to what is allowed: of heads, headers, bodies, budgets and requests ahead."""

from __future__ import annotations

from collections import Counter

import pytest

from proxy.downstream.body import AHEAD_BYTES as BODY_AHEAD_BYTES
from proxy.downstream.body_reader import read_body, stream_body
from proxy.downstream.connection import AHEAD_BYTES
from proxy.downstream.errors import BadHttp, ClientLimit, ProtocolError
from proxy.downstream.limits import ByteBudget, Limits, connections_within
from proxy.downstream.partial_head import PartialHead
from proxy.downstream.request import HEADERS_MOST, IncomingRequest
from proxy.downstream.response import ClientResponse
from proxy.errors import RequestTimeout
from tests.proxy.downstream.test_deadlines import Port

LINE = b"GET / HTTP/1.1"
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
HOST = (b"host", b"x")


async def greet(asked: IncomingRequest, answer: ClientResponse) -> None:
    answer.send(200, b"OK", [], b"hello")


def padded(nbytes: int) -> bytes:
    """A request whose head has as many bytes."""
    head = b"GET / HTTP/1.1\r\nhost: x\r\nx: %b\r\n\r\n"
    return head % (b"a" * (nbytes - len(head) + 2))


@pytest.mark.parametrize("before", [b"", b"\r\n\r\n", GET])
@pytest.mark.parametrize(("nbytes", "status"), [(1_000, b"200"), (1_001, b"431")])
async def test_a_head_may_have_as_many_bytes_as_the_limit_says(before: bytes, nbytes: int, status: bytes) -> None:
    """It does not matter what came before it in the same read."""
    port = Port(greet, head_bytes=1_000)
    await port.send(before + padded(nbytes))
    assert port.line.written.rpartition(b"HTTP/1.1 ")[2].startswith(status)
    await port.end()


@pytest.mark.parametrize(("nbytes", "status"), [(1_000, b"200"), (1_001, b"431")])
async def test_a_head_that_comes_in_parts_has_the_same_bound(nbytes: int, status: bytes) -> None:
    port = Port(greet, head_bytes=1_000)
    head = padded(nbytes)
    await port.send(head[:500])
    await port.send(head[500:])
    assert port.line.written.startswith(b"HTTP/1.1 " + status)
    await port.end()


@pytest.mark.parametrize(("headers", "is_refused"), [(HEADERS_MOST, False), (HEADERS_MOST + 1, True)])
def test_a_head_may_have_so_many_headers(headers: int, is_refused: bool) -> None:
    fields = [HOST, *[(b"x", b"y")] * (headers - 1)]
    if is_refused:
        with pytest.raises(ProtocolError) as refusal:
            IncomingRequest(b"GET", b"/", fields, LINE, 100)
        assert (refusal.value.reason, refusal.value.status) == (BadHttp.HEAD_SIZE, 431)
    else:
        assert len(IncomingRequest(b"GET", b"/", fields, LINE, 100).headers) == headers


def test_a_header_may_be_as_long_as_the_limit_says() -> None:
    """Its name and value together."""
    assert IncomingRequest(b"GET", b"/", [HOST, (b"abc", b"d" * 97)], LINE, 100).headers[1][0] == b"abc"
    with pytest.raises(ProtocolError):
        IncomingRequest(b"GET", b"/", [HOST, (b"abc", b"d" * 98)], LINE, 100)


def test_a_length_of_no_bytes_announces_no_body() -> None:
    """Nothing is expected for it either."""
    asked = IncomingRequest(b"GET", b"/", [HOST, (b"content-length", b"0"), (b"expect", b"100-continue")], LINE, 99)
    assert (asked.content_length, asked.has_body, asked.expects_continue) == (0, False, False)


def test_a_budget_may_be_used_up_and_only_one_holder_alone_may_exceed_it() -> None:
    """So that a body that is larger than all of it is served, if no other is."""
    budget = ByteBudget(100)
    assert budget.take(100)
    assert not budget.take(1)
    budget.give(101)
    assert budget.take(101)
    assert not budget.take(1)
    assert budget.take(1, own=102)
    assert not budget.take(1, own=102)
    assert budget.used == 104


def test_what_fits_a_budget_is_what_it_has_left_or_anything_if_nobody_else_uses_it() -> None:
    """The question takes nothing."""
    budget = ByteBudget(100)
    assert budget.fits(1_000)
    budget.take(60)
    assert [budget.fits(nbytes) for nbytes in (40, 41)] == [True, False]
    assert [budget.fits(41, own) for own in (59, 60)] == [False, True]
    assert budget.used == 60


def test_each_connection_takes_two_descriptors_and_some_are_kept() -> None:
    assert [connections_within(10, descriptors) for descriptors in (128 + 20, 128 + 19, 128 + 2, 0)] == [10, 9, 1, 1]
    assert [connections_within(10, descriptors) for descriptors in (-1, 10**9)] == [10, 10]


def test_the_default_limits_are_safe_ones() -> None:
    """They are those of the configuration; a test that makes a port without one relies on them."""
    limits = Limits()
    assert (limits.head_bytes, limits.header_line_bytes, limits.body_bytes) == (2**16, 2**15, 2**25)
    assert limits.head_bytes_in_flight < limits.body_bytes_in_flight


async def test_requests_ahead_stop_the_reading_once_so_many_bytes_of_them_are_kept() -> None:
    """One byte fewer does not."""
    for nbytes, is_paused in ((AHEAD_BYTES - 1, False), (AHEAD_BYTES, True)):
        gates: list[str] = []

        async def wait(asked: IncomingRequest, answer: ClientResponse, gates: list[str] = gates) -> None:
            gates.append(asked.target)
            await answer.drained()

        port = Port(wait)
        port.connection.pause_writing()
        await port.send(GET)
        port.connection._feed(b"x" * nbytes, 0, nbytes)  # noqa: SLF001 - as reads of another size would
        assert port.line.paused is is_paused
        assert port.server.heads.used == nbytes
        await port.end()


@pytest.mark.parametrize(("nbytes", "is_paused"), [(BODY_AHEAD_BYTES - 1, False), (BODY_AHEAD_BYTES, True)])
async def test_a_streamed_body_stops_the_reading_once_so_many_bytes_of_it_wait(nbytes: int, is_paused: bool) -> None:
    """Until its reader takes them; a body that is not asked for yet does so too."""
    got: list[bytes] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        port.connection.pause_writing()
        await answer.drained()
        got.extend([piece async for piece in stream_body(asked, 9.0)])
        answer.send(200, b"OK", [], b"")

    port = Port(play, body_bytes=1_000)
    await port.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (nbytes + 1))
    port.connection._feed(b"x" * nbytes, 0, nbytes)  # noqa: SLF001 - as reads of another size would
    assert port.line.paused is is_paused
    assert port.server.bodies.used == nbytes
    port.connection.resume_writing()
    await port.settle()
    assert (port.line.paused, port.server.bodies.used) == (False, 0)
    await port.send(b"y")
    assert list(map(len, got)) == [nbytes, 1]
    await port.end()


async def test_an_answer_without_a_body_takes_every_piece_and_is_never_behind() -> None:
    """To a HEAD, and with a status that has none; an empty piece is none either."""
    taken: list[bool] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        port.connection.pause_writing()
        answer.begin(200 if asked.method == "HEAD" else 204, b"OK", [], None)
        taken.append(answer.offer(b"abc"))
        answer.end()

    for method in (b"HEAD", b"GET"):
        port = Port(play)
        await port.send(GET.replace(b"GET", method))
        assert port.line.written.endswith(b"\r\n\r\n")
        await port.end()
    assert taken == [True, True]


async def test_an_empty_piece_ends_no_chunked_answer() -> None:
    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None)
        assert answer.offer(b"")
        answer.write_last(b"abc")
        answer.end()

    port = Port(play)
    await port.send(GET)
    assert port.line.written.endswith(b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    await port.end()


@pytest.mark.parametrize(("nbytes", "refused"), [(8, 0), (9, 1)])
async def test_unfinished_heads_may_have_as_many_bytes_in_all_as_the_limit_says(nbytes: int, refused: int) -> None:
    """A refusal is counted by its limit, and is no error of the client."""
    port = Port(greet, head_bytes_in_flight=10)
    port.server.heads.take(2)
    await port.send(b"GET /abcde"[:nbytes])
    assert port.counts.refusals == Counter({ClientLimit.HEAD_BYTES: refused} if refused else {})
    assert port.counts.errors == {}
    assert port.line.written.startswith(b"HTTP/1.1 503 ") is bool(refused)
    port.server.heads.give(2)
    await port.end()


@pytest.mark.parametrize("cut", range(1, 6))
def test_the_request_line_of_a_head_in_parts_is_known_without_its_end(cut: int) -> None:
    """Also if its end is cut, and whatever follows it."""
    text = b"GET \r\nhost: x\r\n\r\n"
    head = PartialHead()
    assert head.end_in(text, 0, cut) == -1
    head.add(text[:cut])
    assert head.end_in(text, cut, len(text)) == len(text)
    head.add(text[cut:])
    assert (head.line, head.nbytes) == (b"GET ", len(text))


async def test_the_end_of_an_answer_that_was_sent_whole_changes_nothing() -> None:
    """The next request is served."""

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.send(200, b"OK", [], b"hello")
        answer.end()

    port = Port(play)
    await port.send(GET)
    await port.send(GET)
    assert port.line.written.count(b"hello") == 2
    assert port.line.ends == []
    await port.end()


@pytest.mark.parametrize(("seconds", "is_late"), [(9.99, False), (10.0, True)])
async def test_a_body_is_late_from_the_moment_of_its_limit(seconds: float, is_late: bool) -> None:
    """Of its limit in all, or of its least rate if that ends before."""

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        try:
            await read_body(asked, 1_000, 10.0)
        except RequestTimeout:
            answer.send(408, b"Late", [], b"")

    for limits in ({"body_bytes_per_second": 0}, {"body_bytes_per_second": 1_000}):
        port = Port(play, **limits)
        await port.send(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
        await port.after(seconds)
        assert port.line.written.startswith(b"HTTP/1.1 408 ") is is_late
        await port.end()

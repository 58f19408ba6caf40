"""The client before a scripted upstream: keep-alive and its races, bodies both ways, limits, TLS and names."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
import trustme

from proxy.errors import (
    BadResponse,
    ConnectFailed,
    ConnectTimeout,
    FirstByteTimeout,
    IdleTimeout,
    ResetBeforeResponse,
    ResetMidResponse,
    TlsFailed,
)
from proxy.upstream import Framing, Limits, Origin, PoolCounts, pool
from proxy.upstream import connect as connecting
from tests.conftest import IS_COMPILED
from tests.proxy.upstream.conftest import MakeClient, counts, fetch, origin_of, spawn, turns, until
from tests.support.clock import FakeClock
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.upstream import (
    EVENT_STREAM,
    Close,
    Expect,
    Flood,
    Mark,
    Pause,
    Play,
    Reset,
    ScriptedUpstream,
    Send,
    Stall,
    Step,
    answer,
    chunk,
    chunked,
)

SERVE_ONE: Play = [Expect(), Send(answer(b"hello"))]
SERVE_TWO: Play = [*SERVE_ONE, *SERVE_ONE]


async def pieces_of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


async def test_a_request_arrives_as_it_was_given_and_its_answer_comes_back_whole(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        answered = await client.request(origin_of(upstream), b"POST", b"/v1/x?y=1", [(b"a", b"b")], b"body")
        assert (answered.status, answered.reason, answered.content_length) == (200, b"OK", 5)
        assert answered.complete
        assert answered.body_now() == b"hello"
        assert await answered.next_chunk() == b""
        host = b"127.0.0.1:%d" % upstream.port
        head = b"POST /v1/x?y=1 HTTP/1.1\r\nhost: %b\r\na: b\r\ncontent-length: 4\r\n\r\n" % host
        assert upstream.requests[0].raw == head + b"body"


async def test_nothing_is_sent_where_the_head_could_be_read_as_another(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        with pytest.raises(ValueError):
            await client.request(origin_of(upstream), b"GET", b"/", [(b"a", b"b\r\nc: d")])
        assert upstream.connections == 0


# -- keep-alive


async def test_a_connection_serves_one_request_after_the_other(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([*SERVE_TWO, *SERVE_ONE]) as upstream:
        for _ in range(3):
            assert await fetch(client, upstream) == b"hello"
        assert upstream.connections == 1
        assert counts(client, upstream) == PoolCounts(1, 1, 0, 0, opened=1, reused=2, retried=0)


async def test_the_connection_used_last_is_used_next(make_client: MakeClient) -> None:
    client = make_client()
    gates = [asyncio.Event(), asyncio.Event()]
    plays: list[Play] = [[Expect(), Pause(gate), Send(answer()), *SERVE_ONE] for gate in gates]
    async with ScriptedUpstream(plays) as upstream:
        first = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        second = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 2)
        for gate, request in zip(reversed(gates), (second, first), strict=True):
            gate.set()
            await request
        await fetch(client, upstream, b"third")
        assert upstream.peers[0].raw.endswith(b"third")


@pytest.mark.parametrize("end", [Close(), Reset()])
async def test_a_pooled_connection_that_dies_under_a_request_is_named_and_the_caller_decides(
    make_client: MakeClient, end: Step
) -> None:
    client = make_client()
    async with ScriptedUpstream([[*SERVE_ONE, Expect(), end], SERVE_ONE]) as upstream:
        await fetch(client, upstream)
        with pytest.raises(ResetBeforeResponse) as caught:
            await fetch(client, upstream)
        assert caught.value.reused
        assert counts(client, upstream).open == 0
        assert await fetch(client, upstream) == b"hello"


@pytest.mark.parametrize("end", [Close(), Reset()])
@pytest.mark.parametrize("body", [b"again", [b"ag", b"ain"]])
async def test_with_leave_to_retry_it_is_sent_once_more_on_a_fresh_connection(
    make_client: MakeClient, end: Step, body: Any
) -> None:
    client = make_client()
    async with ScriptedUpstream([[*SERVE_ONE, Expect(), end], SERVE_ONE]) as upstream:
        await fetch(client, upstream)
        assert await fetch(client, upstream, body, repeatable=True) == b"hello"
        assert [request.body for request in upstream.requests[1:]] == [b"again", b"again"]
        assert counts(client, upstream).retried == 1


async def test_what_must_not_be_sent_twice_is_sent_on_a_new_connection(make_client: MakeClient) -> None:
    """The upstream may just be closing a pooled one, of which one is given up instead."""
    client = make_client()
    async with ScriptedUpstream([[*SERVE_ONE, Expect(), Close()], SERVE_ONE]) as upstream:
        await fetch(client, upstream)
        assert await fetch(client, upstream, repeatable=False) == b"hello"
        assert counts(client, upstream).open == 1


async def test_what_happens_to_connections_is_counted_each_time(make_client: MakeClient) -> None:
    client = make_client()
    dying: Play = [*SERVE_ONE, Expect(), Close()]
    async with ScriptedUpstream([dying, dying, SERVE_ONE]) as upstream:
        for _ in range(3):
            await fetch(client, upstream, repeatable=True)
        found = counts(client, upstream)
        assert (found.opened, found.reused, found.retried) == (3, 2, 2)
        assert (found.open, found.idle, found.in_use, found.waiting) == (1, 1, 0, 0)


async def test_a_retry_avoids_all_pooled_connections_and_happens_once(make_client: MakeClient) -> None:
    client = make_client()
    gate = asyncio.Event()
    dying: Play = [Expect(), Pause(gate), Send(answer()), Expect(), Close()]
    async with ScriptedUpstream([dying, dying, [Expect(), Close()]]) as upstream:
        both = asyncio.gather(fetch(client, upstream), fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 2)
        gate.set()
        await both
        with pytest.raises(ResetBeforeResponse) as caught:
            await fetch(client, upstream, repeatable=True)
        assert not caught.value.reused
        assert upstream.connections == 3
        assert len(upstream.requests) == 4


async def test_a_fresh_connection_that_dies_is_not_retried_here(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([[Expect(), Close()], SERVE_ONE]) as upstream:
        with pytest.raises(ResetBeforeResponse):
            await fetch(client, upstream, repeatable=True)
        assert len(upstream.requests) == 1


async def test_nothing_is_retried_once_a_byte_of_an_answer_came(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([[*SERVE_ONE, Expect(), Send(b"H"), Close()], SERVE_ONE]) as upstream:
        await fetch(client, upstream)
        with pytest.raises(BadResponse):
            await fetch(client, upstream, repeatable=True)
        assert len(upstream.requests) == 2


async def test_a_connection_that_the_upstream_closed_while_idle_is_forgotten(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([[*SERVE_ONE, Close()], SERVE_ONE]) as upstream:
        await fetch(client, upstream)
        await until(lambda: counts(client, upstream).open == 0)
        assert await fetch(client, upstream) == b"hello"


async def test_it_is_known_when_the_last_byte_came_from_an_upstream(make_client: MakeClient) -> None:
    """On a connection in use, on an idle one, and after the connection was closed."""
    clock = FakeClock()
    client = make_client(clock)
    play: Play = [Expect(), Send(answer(b"hello")), Expect(), Send(answer(b"hello")[:-2]), Stall()]
    async with ScriptedUpstream([play]) as upstream:
        assert client.received_seconds(origin_of(upstream)) == 0.0
        await fetch(client, upstream)
        clock.advance(5.0)
        assert client.received_seconds(origin_of(upstream)) == clock.monotonic() - 5.0
        response = await client.request(origin_of(upstream), b"GET", b"/")
        clock.advance(5.0)
        assert client.received_seconds(origin_of(upstream)) == clock.monotonic() - 5.0
        response.abort()
        await until(lambda: counts(client, upstream).open == 0)
        assert client.received_seconds(origin_of(upstream)) == clock.monotonic() - 5.0


async def test_an_idle_connection_is_closed_when_it_expires(make_client: MakeClient) -> None:
    clock = FakeClock()
    client = make_client(clock, idle_expiry_seconds=4)
    async with ScriptedUpstream(SERVE_TWO) as upstream:
        await fetch(client, upstream)
        clock.advance(3.9)
        client._deadlines.ring()  # noqa: SLF001 - internal state that no public name shows
        assert counts(client, upstream).idle == 1
        clock.advance(0.2)
        client._deadlines.ring()  # noqa: SLF001 - internal state that no public name shows
        assert counts(client, upstream).open == 0
        await upstream.peers[0].left.wait()


@pytest.mark.parametrize(
    "raw", [answer(b"x", headers=[b"Connection: close"]), b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx"]
)
async def test_a_connection_that_is_not_to_be_kept_is_closed_after_its_answer(
    make_client: MakeClient, raw: bytes
) -> None:
    client = make_client()
    async with ScriptedUpstream([Expect(), Send(raw)]) as upstream:
        assert await fetch(client, upstream) == b"x"
        assert counts(client, upstream).open == 0
        await upstream.peers[0].left.wait()


async def test_a_close_delimited_answer_ends_with_its_connection(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([Expect(), Send(b"HTTP/1.1 200 OK\r\n\r\nhello"), Close()]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        assert answered.framing is Framing.CLOSE
        assert await answered.read(10) == b"hello"
        assert counts(client, upstream).open == 0


async def test_head_204_and_304_leave_the_connection_in_step(make_client: MakeClient) -> None:
    client = make_client()
    """A connection is kept after a 204, and closed after a head that announces a body which must not follow."""
    no_content: Play = [Expect(), Send(b"HTTP/1.1 204 N\r\n\r\n")]
    after_head: Play = [Expect(), Send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")]
    not_modified: Play = [Expect(), Send(b"HTTP/1.1 304 N\r\nContent-Length: 9\r\n\r\n")]
    async with ScriptedUpstream([after_head, [*no_content, *not_modified], SERVE_ONE]) as upstream:
        for method, status in ((b"HEAD", 200), (b"GET", 204), (b"GET", 304)):
            answered = await client.request(origin_of(upstream), method, b"/")
            assert (answered.status, answered.complete, await answered.read(9)) == (status, True, b"")
        assert await fetch(client, upstream) == b"hello"
        assert upstream.connections == 3


# -- streams


async def test_the_habit_of_closing_after_each_stream_costs_no_request(make_client: MakeClient) -> None:
    """As llama.cpp does it, sixty in a row, without any retry."""
    client = make_client()
    body = b'{"model": "m", "stream": true, "messages": [{"role": "user", "content": "hi"}]}'
    async with OpenAIUpstream(closes_streams=True) as upstream:
        origin = Origin.parse(upstream.url)
        for _ in range(60):
            answered = await client.request(origin, b"POST", b"/v1/chat/completions", [], body)
            assert answered.is_event_stream
            assert (await answered.read(1 << 20)).endswith(b"data: [DONE]\n\n")
        await until(lambda: client.counts()[origin].open == 0)
        assert len(upstream.requests) == 60


async def test_a_streams_connection_is_reused_after_probation_and_at_once_when_trusted(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client()
    stream: Play = [Expect(), Send(chunked(b"data: 1\n\n", headers=[EVENT_STREAM]))]
    async with ScriptedUpstream([step for _ in range(9) for step in stream]) as upstream:
        await fetch(client, upstream)
        await fetch(client, upstream)
        assert upstream.connections == 2, "on probation it is not reused"
        monkeypatch.setattr(pool, "PROBATION_SECONDS", 0)
        for _ in range(pool.TRUSTED_AFTER):
            await fetch(client, upstream)
            await turns()
        opened = upstream.connections
        monkeypatch.setattr(pool, "PROBATION_SECONDS", 1_000)
        await fetch(client, upstream)
        await fetch(client, upstream)
        assert upstream.connections == opened


async def test_trust_is_lost_when_an_upstream_closes_behind_a_stream(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PROBATION_SECONDS", 0)
    client = make_client(FakeClock())  # for which the upstream closes at once, however long the machine pauses
    close = asyncio.Event()
    stream: Play = [Expect(), Send(chunked(b"data: 1\n\n", headers=[EVENT_STREAM]))]
    first: Play = [step for _ in range(pool.TRUSTED_AFTER + 1) for step in stream]
    async with ScriptedUpstream([[*first, Pause(close), Close()], stream]) as upstream:
        for _ in range(pool.TRUSTED_AFTER + 1):
            await fetch(client, upstream)
            await turns()
        monkeypatch.setattr(pool, "PROBATION_SECONDS", 1_000)
        close.set()
        await until(lambda: counts(client, upstream).open == 0)
        await fetch(client, upstream)
        await fetch(client, upstream)
        assert upstream.connections == 3, "each on a connection of its own again"


async def test_pieces_are_handed_on_as_they_come(make_client: MakeClient) -> None:
    client = make_client()
    gates = [asyncio.Event() for _ in range(3)]
    play: list[Step] = [Expect(), Send(chunked(b"0", end=False))]
    for number, gate in enumerate(gates, 1):
        play += [Pause(gate), Send(chunk(b"%d" % number))]
    async with ScriptedUpstream([*play, Send(b"0\r\n\r\n")]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        assert await answered.next_chunk() == b"0"
        for number, gate in enumerate(gates, 1):
            gate.set()
            assert await answered.next_chunk() == b"%d" % number
        assert await answered.next_chunk() == b""


async def test_a_sink_gets_each_piece_without_a_task_being_woken(make_client: MakeClient) -> None:
    client = make_client()
    gates = [asyncio.Event() for _ in range(3)]
    play: list[Step] = [Expect(), Send(chunked(b"0", end=False))]
    for number, gate in enumerate(gates, 1):
        play += [Pause(gate), Send(chunk(b"%d" % number))]
    async with ScriptedUpstream([*play, Send(b"0\r\n\r\n")]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        got: list[bytes] = []
        tasks: set[object] = set()

        def sink(piece: bytes, _: bytes | None) -> bool:
            got.append(piece)
            tasks.add(asyncio.current_task())
            return True

        pouring = spawn(answered.pour(sink))
        await until(lambda: bool(got))
        for number, gate in enumerate(gates, 1):
            gate.set()
            await until(lambda wanted=number: len(got) == wanted + 1)  # type: ignore[misc]
        assert await pouring is True
        assert b"".join(got) == b"0123"
        assert None in tasks, "in the event that brings it"
        assert counts(client, upstream).idle == 1


def unchunked(wire: bytes) -> bytes:
    """The body of whole chunks."""
    body = b""
    while wire:
        size, _, rest = wire.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        body, wire = body + rest[:length], rest[length + 2 :]
    return body


RELAYED = (
    pytest.param([b"3\r\nabc\r\n"], [b"3\r\nabc\r\n"], id="a whole chunk"),
    pytest.param([b"00A\r\n0123456789\r\n"], [b"00A\r\n0123456789\r\n"], id="its digits as they are"),
    pytest.param([b"900\r\n%b\r\n" % (b"x" * 0x900)], [b"900\r\n%b\r\n" % (b"x" * 0x900)], id="a large one"),
    pytest.param([b"3\r\nabc\r\n3\r\ndef\r\n"], [None], id="two at once"),
    pytest.param([b"3\r\nab", b"c\r\n", b"1\r\nd\r\n"], [None, None, b"1\r\nd\r\n"], id="one cut, then a whole"),
    pytest.param([b"1", b"5\r\n" + b"x" * 21 + b"\r\n"], [None], id="cut within its size"),
    pytest.param([b"2", b"5\r\nhello\r\n", b"y" * 30 + b"\r\n"], [None], id="cut so that it looks whole"),
    pytest.param([b"3;a=b\r\nabc\r\n"], [None], id="an extension"),
    pytest.param([b"3\r\nabc", b"\r\n", b"1\r\nd\r\n"], [None, b"1\r\nd\r\n"], id="its end later"),
)


@pytest.mark.parametrize(("reads", "framed"), RELAYED)
async def test_a_chunk_is_offered_as_it_came_only_where_it_is_whole(
    make_client: MakeClient, reads: list[bytes], framed: list[bytes | None]
) -> None:
    """All else goes through the parser, and what is offered is what the piece was framed in."""
    client = make_client()
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    gates = [asyncio.Event() for _ in range(len(reads) + 1)]
    play: list[Step] = [Expect(), Send(head)]
    for gate, read in zip(gates, [*reads, b"0\r\n\r\n"], strict=True):
        play += [Pause(gate), Send(read)]
    async with ScriptedUpstream(play) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        got: list[tuple[bytes, bytes | None]] = []
        pouring = spawn(answered.pour(lambda piece, whole: not got.append((piece, whole))))  # type: ignore[func-returns-value]
        for gate in gates:
            await turns(3)
            gate.set()
        assert await pouring is True
        assert [whole for _, whole in got if whole] == [whole for whole in framed if whole]
        assert b"".join(piece for piece, _ in got) == unchunked(b"".join(reads))
        assert all(unchunked(whole) == piece for piece, whole in got if whole)
        assert counts(client, upstream).idle == 1, "and the connection may serve again"


@pytest.mark.parametrize("size", [b"0x3", b"+3", b" 3", b"3_", b"-3", b""])
async def test_a_chunk_whose_size_is_no_number_is_a_bad_answer(make_client: MakeClient, size: bytes) -> None:
    """This holds also at a place where a whole chunk could be."""
    client = make_client()
    gate = asyncio.Event()
    play: Play = [Expect(), Send(chunked(b"a", end=False)), Pause(gate), Send(size + b"\r\nabc\r\n"), Stall()]
    async with ScriptedUpstream(play) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        pouring = spawn(answered.pour(lambda *_: True))
        await turns()
        gate.set()
        with pytest.raises(BadResponse):
            await pouring


async def test_a_sink_that_has_enough_stops_the_upstream_until_it_is_poured_again(make_client: MakeClient) -> None:
    client = make_client(buffer_bytes=65_536)
    piece, times = b"x" * 65_536, 400
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(piece) * times)
    async with ScriptedUpstream([Expect(), Send(head), Flood(piece, times), Stall()]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        taken: list[int] = []

        def sink(piece: bytes, _: bytes | None) -> bool:
            taken.append(len(piece))
            return len(taken) % 3 > 0

        while not await answered.pour(sink):
            await turns(30)
            assert answered.buffered_bytes <= 65_536 + 262_144
            assert upstream.peers[0].sent_bytes - sum(taken) < 12_000_000, "what is held, and the kernel's buffers"
        assert sum(taken) == len(piece) * times


async def test_what_a_sink_raises_comes_out_of_pouring_and_closes(make_client: MakeClient) -> None:
    client = make_client()
    gate = asyncio.Event()
    play: Play = [Expect(), Send(chunked(b"a", end=False)), Pause(gate), Send(chunk(b"b")), Stall()]
    async with ScriptedUpstream(play) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")

        def sink(piece: bytes, _: bytes | None) -> bool:
            if piece == b"b":
                raise ConnectionResetError("the client left")
            return True

        pouring = spawn(answered.pour(sink))
        await turns()
        gate.set()
        with pytest.raises(ConnectionResetError):
            await pouring
        await upstream.peers[0].left.wait()
        assert counts(client, upstream).open == 0


@pytest.mark.parametrize("end", [Close(), Reset()])
async def test_a_break_while_pouring_comes_after_what_had_arrived(make_client: MakeClient, end: Step) -> None:
    client = make_client()
    async with ScriptedUpstream([Expect(), Send(chunked(b"part", end=False)), end]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        got: list[bytes] = []
        with pytest.raises(ResetMidResponse):
            await answered.pour(lambda piece, _: not got.append(piece))  # type: ignore[func-returns-value]
        assert got in ([b"part"], []), "a reset may overtake what it follows"


async def test_cancelling_a_pour_closes_the_connection(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([Expect(), Send(chunked(b"a", end=False)), Stall()]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        pouring = spawn(answered.pour(lambda *_: True))
        await turns()
        pouring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pouring
        await upstream.peers[0].left.wait()


async def test_a_slow_reader_bounds_what_is_held_and_stops_the_upstream(make_client: MakeClient) -> None:
    client = make_client(buffer_bytes=65_536)
    piece, times = b"x" * 65_536, 400
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(piece) * times)
    async with ScriptedUpstream([Expect(), Send(head), Flood(piece, times), Stall()]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        read_bytes = 0
        while read_bytes < len(piece) * times:
            await turns(30)
            assert answered.buffered_bytes <= 65_536 + 262_144
            assert upstream.peers[0].sent_bytes - read_bytes < 12_000_000, "what is held, and the kernel's buffers"
            read_bytes += len(await answered.next_chunk())
        assert await answered.next_chunk() == b""


async def test_read_refuses_more_than_its_limit_and_closes(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([Expect(), Send(chunked(b"x" * 100, end=False)), Stall()]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        with pytest.raises(BadResponse, match=r"^the upstream's response has more than 99 bytes$"):
            await answered.read(99)
        assert counts(client, upstream).open == 0
        await upstream.peers[0].left.wait()


@pytest.mark.parametrize("end", [Close(), Reset()])
async def test_a_break_inside_the_body_comes_after_what_had_arrived(make_client: MakeClient, end: Step) -> None:
    client = make_client()
    gate = asyncio.Event()
    async with ScriptedUpstream([Expect(), Send(chunked(b"part", end=False)), Pause(gate), end]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        await until(lambda: answered.buffered_bytes == 4)
        gate.set()
        await until(lambda: counts(client, upstream).open == 0)
        assert await answered.next_chunk() == b"part"
        for _ in range(2):
            with pytest.raises(ResetMidResponse):
                await answered.next_chunk()


# -- bodies


@pytest.mark.parametrize("length", [None, 9])
async def test_a_body_in_pieces_is_sent_as_declared_or_chunked(make_client: MakeClient, length: int | None) -> None:
    client = make_client()
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        body = pieces_of(b"one", b"", b"two", b"end")
        assert await fetch(client, upstream, body, length=length) == b"hello"
        request = upstream.requests[0]
        assert request.body == b"onetwoend"
        assert request.header(b"content-length") == (b"9" if length else None)
        assert request.header(b"transfer-encoding") == (None if length else b"chunked")
        assert counts(client, upstream).idle == 1


@pytest.mark.parametrize(("pieces", "how"), [([b"too", b"short"], "shorter"), ([b"much too", b" long"], "longer")])
async def test_a_body_that_is_not_as_long_as_declared_is_never_completed(
    make_client: MakeClient, pieces: Sequence[bytes], how: str
) -> None:
    client = make_client()
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        with pytest.raises(ValueError, match=f"^the request's body is {how} than declared$"):
            await fetch(client, upstream, pieces_of(*pieces), length=9)
        assert counts(client, upstream).open == 0
        await upstream.peers[0].left.wait()
        assert upstream.requests == []


async def test_what_breaks_a_body_off_reaches_the_caller_and_closes(make_client: MakeClient) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"part"
        raise TimeoutError("the client's own")

    client = make_client()
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        with pytest.raises(TimeoutError, match="own"):
            await fetch(client, upstream, broken())
        assert counts(client, upstream).open == 0


async def test_a_body_that_cannot_be_sent_twice_is_not_risked_on_a_pooled_connection(make_client: MakeClient) -> None:
    client = make_client(max_connections=1, idle_expiry_seconds=1_000, pool_wait_seconds=1)
    async with ScriptedUpstream([SERVE_TWO, SERVE_ONE]) as upstream:
        await fetch(client, upstream)
        await fetch(client, upstream, pieces_of(b"x"))
        assert upstream.connections == 2
        assert counts(client, upstream).open == 1


async def test_an_upstream_that_does_not_read_stops_the_body(make_client: MakeClient) -> None:
    client = make_client()
    produced = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal produced
        for _ in range(800):
            produced += 1
            yield b"x" * 65_536

    gate = asyncio.Event()
    async with ScriptedUpstream([Pause(gate), *SERVE_ONE]) as upstream:
        request = spawn(fetch(client, upstream, body(), length=800 * 65_536))
        seen = -1
        while seen != produced or not produced:
            seen = produced
            await turns(500)
        assert produced < 400
        gate.set()
        assert await request == b"hello"
        assert len(upstream.requests[0].body) == 800 * 65_536


async def test_an_answer_that_comes_while_the_body_is_awaited_is_delivered_at_once(make_client: MakeClient) -> None:
    client = make_client()
    never = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await never.wait()

    play = [Expect(head_only=True), Send(answer(b"too large", status=b"413 Too Large"))]
    async with ScriptedUpstream(play) as upstream:
        answered = await client.request(origin_of(upstream), b"POST", b"/", [], body(), length=1_000)
        assert (answered.status, answered.early, await answered.read(99)) == (413, True, b"too large")
        assert counts(client, upstream).open == 0
        await upstream.peers[0].left.wait()


async def test_an_answer_in_the_turn_in_which_the_next_piece_comes_ends_the_upload(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The piece is not sent, and no further one is asked for."""
    loop = asyncio.get_running_loop()
    create = loop.create_connection
    opened: list[asyncio.Protocol] = []
    produced: list[bytes] = []

    async def recorded(*arguments: Any, **named: Any) -> Any:
        transport, protocol = await create(*arguments, **named)
        opened.append(protocol)
        return transport, protocol

    async def body() -> AsyncIterator[bytes]:
        for piece in (b"first", b"second", b"third"):
            if piece == b"second":
                opened[0].data_received(answer(b"too large", status=b"413 Too Large"))
            produced.append(piece)
            yield piece

    monkeypatch.setattr(loop, "create_connection", recorded)
    client = make_client()
    async with ScriptedUpstream([Stall()]) as upstream:
        answered = await client.request(origin_of(upstream), b"POST", b"/", [], body())
        assert (answered.status, answered.early, answered.body_now()) == (413, True, b"too large")
        assert produced == [b"first", b"second"]
        await upstream.peers[0].left.wait()


async def test_an_early_answer_to_a_large_body_is_delivered_and_the_connection_closed(
    make_client: MakeClient,
) -> None:
    client = make_client()
    play = [Expect(head_only=True), Send(answer(b"too large", status=b"413 Too Large")), Pause(asyncio.Event())]
    async with ScriptedUpstream(play) as upstream:
        answered = await client.request(origin_of(upstream), b"POST", b"/", [], b"x" * 30_000_000)
        assert (answered.status, answered.early, await answered.read(99)) == (413, True, b"too large")
        assert counts(client, upstream).open == 0


async def test_a_connection_lost_while_the_body_is_awaited_is_told_at_once(make_client: MakeClient) -> None:
    client = make_client()
    never = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await never.wait()

    async with ScriptedUpstream([Expect(head_only=True), Reset()]) as upstream:
        with pytest.raises(ResetBeforeResponse) as caught:
            await fetch(client, upstream, body())
        assert not caught.value.reused


# -- limits


async def test_no_answer_within_the_limit_fails_the_request_and_closes(make_client: MakeClient) -> None:
    clock = FakeClock()
    client = make_client(clock, first_byte_seconds=30)
    async with ScriptedUpstream([Expect(), Stall()]) as upstream:
        request = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        clock.advance(31)
        client._deadlines.ring()  # noqa: SLF001 - internal state that no public name shows
        with pytest.raises(FirstByteTimeout):
            await request
        await upstream.peers[0].left.wait()
        assert counts(client, upstream).open == 0


async def test_a_body_that_stands_still_fails_and_closes(make_client: MakeClient) -> None:
    clock = FakeClock()
    client = make_client(clock, idle_seconds=30)
    async with ScriptedUpstream([Expect(), Send(chunked(b"part", end=False)), Stall()]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        assert await answered.next_chunk() == b"part"
        reading = spawn(answered.next_chunk())
        await turns()
        clock.advance(31)
        client._deadlines.ring()  # noqa: SLF001 - internal state that no public name shows
        with pytest.raises(IdleTimeout):
            await reading
        await upstream.peers[0].left.wait()
        assert counts(client, upstream).open == 0


async def test_an_upstream_that_takes_no_body_for_too_long_fails(make_client: MakeClient) -> None:
    clock = FakeClock()
    client = make_client(clock, first_byte_seconds=30)
    produced = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal produced
        while True:
            produced += 1
            yield b"x" * 65_536

    async with ScriptedUpstream([Pause(asyncio.Event())]) as upstream:
        request = spawn(fetch(client, upstream, body()))
        seen = -1
        while seen != produced or not produced:
            seen = produced
            await turns(500)
        clock.advance(31)
        client._deadlines.ring()  # noqa: SLF001 - internal state that no public name shows
        with pytest.raises(FirstByteTimeout):
            await request
        assert counts(client, upstream).open == 0


async def test_a_client_that_is_slow_to_send_is_not_the_upstreams_lateness(make_client: MakeClient) -> None:
    clock = FakeClock()
    client = make_client(clock, first_byte_seconds=30)
    gate = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        await gate.wait()

    async with ScriptedUpstream(SERVE_ONE) as upstream:
        request = spawn(fetch(client, upstream, body()))
        await until(lambda: upstream.connections == 1)
        await turns()
        clock.advance(1_000)
        client._deadlines.ring()  # noqa: SLF001 - internal state that no public name shows
        gate.set()
        assert await request == b"hello"


async def test_the_clients_own_timer_sees_to_the_limits(make_client: MakeClient) -> None:
    client = make_client(first_byte_seconds=0.03)
    async with ScriptedUpstream([Expect(), Stall()]) as upstream:
        for _ in range(2):
            with pytest.raises(FirstByteTimeout):
                await fetch(client, upstream)


async def test_each_request_has_limits_of_its_own_whichever_comes_first(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([Expect(), Stall()]) as upstream:
        async with asyncio.timeout(20):
            limits = [Limits(first_byte_seconds=seconds) for seconds in (0.02, 0.06, 0.04)]
            late = [fetch(client, upstream, limits=each) for each in limits]
            errors = await asyncio.gather(*late, return_exceptions=True)
        assert [type(error) for error in errors] == [FirstByteTimeout] * 3


async def test_an_upload_that_ended_and_is_not_answered_is_late_by_the_same_limit(make_client: MakeClient) -> None:
    clock = FakeClock()
    client = make_client(clock, first_byte_seconds=30)
    async with ScriptedUpstream([Expect(), Stall()]) as upstream:
        request = spawn(fetch(client, upstream, pieces_of(b"whole")))
        await until(lambda: len(upstream.requests) == 1)
        clock.advance(31)
        client._deadlines.ring()  # noqa: SLF001 - internal state that no public name shows
        async with asyncio.timeout(20):
            with pytest.raises(FirstByteTimeout):
                await request


# -- opening


async def test_a_connection_that_opened_just_as_it_was_given_up_is_closed(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[asyncio.Transport] = []
    loop = asyncio.get_running_loop()
    create = loop.create_connection

    async def given_up(*arguments: Any, **named: Any) -> Any:
        transport, _ = await create(*arguments, **named)
        opened.append(transport)
        raise asyncio.CancelledError

    monkeypatch.setattr(loop, "create_connection", given_up)
    client = make_client()
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        with pytest.raises(asyncio.CancelledError):
            await fetch(client, upstream)
        assert opened[0].is_closing()
        assert counts(client, upstream).open == 0


async def test_a_refused_connection_is_named_and_its_slot_is_free_again(make_client: MakeClient) -> None:
    client = make_client(max_connections=1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        origin = Origin.parse(f"http://127.0.0.1:{closed.getsockname()[1]}")
        for _ in range(3):
            with pytest.raises(ConnectFailed, match=r"^the upstream cannot be reached$"):
                await client.request(origin, b"GET", b"/")
    assert client.counts()[origin].open == 0


async def test_a_name_that_does_not_resolve_is_named(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    client = make_client()
    with pytest.raises(ConnectFailed, match=r"^the upstream's name is not a valid host name$"):
        await client.request(Origin.parse(f"http://{'a' * 70}.invalid"), b"GET", b"/")
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    with pytest.raises(ConnectFailed, match=r"^the upstream's name does not resolve$"):
        await client.request(Origin.parse("http://replica.invalid"), b"GET", b"/")


def names(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Let every name have these addresses; return the names that are looked up from now on."""
    asked: list[str] = []
    in_truth = asyncio.get_running_loop().getaddrinfo

    async def resolve(name: str, port: int, *more: Any, **named: Any) -> Any:
        if name in addresses:  # uvloop asks again when it connects a socket
            return await in_truth(name, port, *more, **named)
        asked.append(name)
        rest = (socket.SOCK_STREAM, 6, "")
        return [
            (socket.AF_INET6, *rest, (each, port, 0, 0)) if ":" in each else (socket.AF_INET, *rest, (each, port))
            for each in addresses
        ]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    return asked


def connecting_by(
    monkeypatch: pytest.MonkeyPatch, connect: Callable[[str, Callable[[], Awaitable[None]]], Awaitable[None]]
) -> None:
    """Let sockets be connected by `connect`, which gets the address and what connects in truth."""
    loop = asyncio.get_running_loop()
    in_truth = loop.sock_connect

    async def instead(each: socket.socket, address: Any) -> None:
        await connect(address[0], lambda: in_truth(each, address))

    monkeypatch.setattr(loop, "sock_connect", instead)


async def test_an_address_that_refuses_is_followed_by_the_next(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upstream is told the name and not the address."""
    client = make_client()
    names(monkeypatch, "::1", "127.0.0.1")
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        answered = await client.request(Origin.parse(f"http://replica:{upstream.port}"), b"GET", b"/")
        assert answered.status == 200
        assert upstream.requests[0].header(b"host") == b"replica:%d" % upstream.port


async def test_the_addresses_of_the_two_families_are_tried_alternately_and_each_once(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica whose IPv6 does not work costs one attempt, not one for each of its addresses."""
    tried: list[str] = []

    async def refuse(address: str, _: object) -> None:
        tried.append(address)
        raise ConnectionRefusedError

    client = make_client()
    names(monkeypatch, "::1", "::2", "::3", "127.0.0.1", "127.0.0.1")
    connecting_by(monkeypatch, refuse)
    with pytest.raises(ConnectFailed, match=r"^the upstream cannot be reached$"):
        await client.request(Origin.parse("http://replica"), b"GET", b"/")
    assert tried == ["::1", "127.0.0.1", "::2", "::3"]


async def test_an_address_that_is_silent_holds_up_no_connection(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is tried beside it, and it is given up when that one accepts."""
    given_up = asyncio.Event()

    async def connect(address: str, in_truth: Callable[[], Awaitable[None]]) -> None:
        if address == "127.0.0.1":
            return await in_truth()
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    client = make_client(connect_seconds=600.0)
    names(monkeypatch, "127.0.0.9", "127.0.0.8", "127.0.0.1", "127.0.0.7")
    connecting_by(monkeypatch, connect)
    monkeypatch.setattr(connecting, "NEXT_ADDRESS_SECONDS", 0.01)
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        origin = Origin.parse(f"http://replica:{upstream.port}")
        assert (await client.request(origin, b"GET", b"/")).status == 200
        assert given_up.is_set()
        assert client.counts()[origin].open == 1


async def test_a_request_that_is_cancelled_while_addresses_are_tried_leaves_nothing_open(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a socket nor a place among the connections."""
    tried, given_up = list[str](), list[str]()

    async def hang(address: str, _: object) -> None:
        tried.append(address)
        try:
            await asyncio.Event().wait()
        finally:
            given_up.append(address)

    client = make_client()
    names(monkeypatch, "127.0.0.9", "127.0.0.8")
    connecting_by(monkeypatch, hang)
    monkeypatch.setattr(connecting, "NEXT_ADDRESS_SECONDS", 0.01)
    origin = Origin.parse("http://replica")
    request = spawn(client.request(origin, b"GET", b"/"))
    await until(lambda: len(tried) == 2)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert sorted(given_up) == ["127.0.0.8", "127.0.0.9"]
    assert client.counts()[origin].open == 0


async def test_an_error_of_the_loop_while_addresses_are_tried_is_one_of_the_upstream(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop raises RuntimeError for a descriptor that is in use; a request must not fail by it with 500."""

    async def refuse(*_: object) -> None:
        raise RuntimeError("File descriptor 9 is used by transport")

    client = make_client()
    names(monkeypatch, "127.0.0.9", "127.0.0.8")
    connecting_by(monkeypatch, refuse)
    with pytest.raises(ConnectFailed):
        await client.request(Origin.parse("http://replica"), b"GET", b"/")


async def test_a_certificate_that_is_not_trusted_is_asked_of_no_other_address(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch, authority: trustme.CA
) -> None:
    """It is the same at all of them."""
    tried: list[str] = []

    async def connect(address: str, in_truth: Callable[[], Awaitable[None]]) -> None:
        tried.append(address)
        await in_truth()

    client = make_client()
    names(monkeypatch, "127.0.0.1", "127.0.0.9")
    connecting_by(monkeypatch, connect)
    async with ScriptedUpstream([Stall()], tls=server_context(authority, "127.0.0.1")) as upstream:
        with pytest.raises(TlsFailed):
            await client.request(Origin.parse(f"https://replica:{upstream.port}"), b"GET", b"/")
    assert tried == ["127.0.0.1"]


async def test_connections_that_are_opened_at_once_share_one_look_up(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the request that began it is cancelled; a later connection asks again."""
    loop, answer, asked = asyncio.get_running_loop(), asyncio.Event(), list[str]()

    async def resolve(name: str, *_: Any, **__: Any) -> Any:
        asked.append(name)
        await answer.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    client = make_client()
    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    async with ScriptedUpstream([SERVE_ONE] * 9) as upstream:
        origin = Origin.parse(f"http://replica:{upstream.port}")
        first, *others = [spawn(client.request(origin, b"GET", b"/")) for _ in range(9)]
        await turns()
        first.cancel()
        answer.set()
        assert [each.status for each in await asyncio.gather(*others)] == [200] * 8
        assert asked == ["replica"]
        await client.request(origin, b"POST", b"/", body=pieces_of(b"x"))
        assert asked == ["replica"] * 2


async def test_a_look_up_that_takes_long_is_not_waited_for_by_others(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packet with its question may be lost."""
    loop, asked = asyncio.get_running_loop(), list[str]()

    async def resolve(name: str, *_: Any, **__: Any) -> Any:
        asked.append(name)
        if len(asked) == 1:
            await asyncio.Event().wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    client = make_client()
    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    monkeypatch.setattr(connecting, "SHARED_SECONDS", -1.0)
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        origin = Origin.parse(f"http://replica:{upstream.port}")
        first = spawn(client.request(origin, b"GET", b"/"))
        await turns()
        assert (await client.request(origin, b"GET", b"/")).status == 200
        await client.close()
        with pytest.raises(ConnectFailed):
            await first


async def test_a_look_up_that_fails_fails_each_connection_that_waits_for_it(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with an error of its own."""

    async def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    client = make_client()
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", unknown)
    origin = Origin.parse("http://replica.invalid")
    errors = await asyncio.gather(*[client.request(origin, b"GET", b"/") for _ in range(3)], return_exceptions=True)
    assert [str(error) for error in errors] == ["the upstream's name does not resolve"] * 3
    assert len({error.__cause__ for error in errors if isinstance(error, ConnectFailed)}) == 3


async def test_a_name_without_an_address_cannot_be_reached(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none(*_: Any, **__: Any) -> Any:
        return []

    client = make_client()
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", none)
    origin = Origin.parse("http://replica")
    with pytest.raises(ConnectFailed, match="cannot be reached"):
        await client.request(origin, b"GET", b"/")
    assert client.counts()[origin].open == 0


async def test_a_connection_that_closed_as_it_opened_cannot_carry_a_request(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the upstream resets it before the waiting request runs."""
    loop = asyncio.get_running_loop()
    create = loop.create_connection

    async def lost(*arguments: Any, **named: Any) -> Any:
        transport, protocol = await create(*arguments, **named)
        protocol.connection_lost(ConnectionResetError())
        transport.abort()
        return transport, protocol

    client = make_client()
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "create_connection", lost)
            with pytest.raises(ConnectFailed, match=r"^the connection to the upstream closed as it opened$"):
                await fetch(client, upstream)
        assert counts(client, upstream).open == 0
        assert upstream.requests == []


async def test_a_client_that_closes_while_a_connection_is_opened_sends_nothing_on_it(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves no connection behind, and later requests are a mistake of the caller."""
    loop = asyncio.get_running_loop()
    create = loop.create_connection
    gate = asyncio.Event()

    async def slow(*arguments: Any, **named: Any) -> Any:
        await gate.wait()
        return await create(*arguments, **named)

    monkeypatch.setattr(loop, "create_connection", slow)
    client = make_client()
    async with ScriptedUpstream(SERVE_ONE) as upstream:
        request = spawn(fetch(client, upstream))
        await turns()
        await client.close()
        gate.set()
        with pytest.raises(ConnectFailed):
            await request
        assert (counts(client, upstream).open, upstream.requests) == (0, [])
        with pytest.raises(RuntimeError, match=r"^the upstream client is closed$"):
            await fetch(client, upstream)


async def test_a_name_server_or_handshake_that_hangs_is_within_the_limit_for_connecting(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    client = make_client(connect_seconds=0.03)
    async with ScriptedUpstream([Stall()]) as upstream:
        silent = Origin.parse(f"https://127.0.0.1:{upstream.port}")
        with pytest.raises(ConnectTimeout):
            await client.request(silent, b"GET", b"/")
        assert client.counts()[silent].open == 0
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hang)
    with pytest.raises(ConnectTimeout):
        await client.request(Origin.parse("http://replica"), b"GET", b"/")


# -- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


async def test_tls_with_a_trusted_certificate_works_and_is_kept_alive(
    make_client: MakeClient, authority: trustme.CA
) -> None:
    client = make_client(tls=trusting(authority))
    async with ScriptedUpstream(SERVE_TWO, tls=server_context(authority, "127.0.0.1")) as upstream:
        for _ in range(2):
            assert await fetch(client, upstream, b"x" * 300_000) == b"hello"
        assert upstream.connections == 1


async def test_tls_of_an_unknown_authority_or_another_name_is_refused(
    make_client: MakeClient, authority: trustme.CA
) -> None:
    for client, name, why in (
        (make_client(), "127.0.0.1", "local issuer certificate"),
        (make_client(tls=trusting(authority)), "other.example", "IP address mismatch"),
    ):
        async with ScriptedUpstream(SERVE_ONE, tls=server_context(authority, name)) as upstream:
            with pytest.raises(TlsFailed, match=why):
                await fetch(client, upstream)
            assert counts(client, upstream).open == 0
            assert upstream.requests == []


async def test_tls_towards_a_plain_upstream_is_refused(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([Send(b"HTTP/1.1 400 Bad\r\n\r\n"), Stall()]) as upstream:
        with pytest.raises(TlsFailed, match=r"to the upstream: [A-Z_]+$"):
            await client.request(Origin.parse(f"https://127.0.0.1:{upstream.port}"), b"GET", b"/")


# -- the end


async def test_closing_the_client_ends_all_that_is_under_way(make_client: MakeClient) -> None:
    client = make_client(max_connections=2)
    here = asyncio.Event()
    plays: list[Play] = [[Expect(), Send(chunked(b"x", end=False)), Stall()], [Expect(), Mark(here), Stall()]]
    async with ScriptedUpstream(plays) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        tasks = [spawn(fetch(client, upstream)) for _ in range(2)]
        await here.wait()
        assert counts(client, upstream).waiting == 1
        await client.close()
        assert counts(client, upstream).open == 0
        assert all(isinstance(error, Exception) for error in await asyncio.gather(*tasks, return_exceptions=True))
        assert await answered.next_chunk() == b"x"
        with pytest.raises(ResetMidResponse):
            await answered.next_chunk()
        with pytest.raises(RuntimeError):
            await fetch(client, upstream)
        for peer in upstream.peers:
            await peer.left.wait()


# -- bytes that nobody asked for

POISON = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nPOISONED"


async def test_bytes_that_wait_unread_on_a_pooled_connection_are_no_response_to_the_next_request(
    make_client: MakeClient,
) -> None:
    """They arrived before the request was written, and the loop has not read them yet."""
    client = make_client()
    async with ScriptedUpstream([SERVE_ONE, SERVE_ONE]) as upstream:
        assert await fetch(client, upstream) == b"hello"
        upstream.peers[0].writer.write(POISON)  # in the socket at once; no turn of the loop until the next request
        assert await fetch(client, upstream) == b"hello"
        assert upstream.connections == 2


@pytest.mark.skipif(IS_COMPILED, reason="a method of a compiled class cannot be replaced")
async def test_an_upstream_that_sent_too_much_is_not_trusted_with_a_second_request_on_a_connection(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    """For a while; the log says so once."""
    client = make_client()
    twice: Play = [Expect(), Send(answer(b"hello") + POISON)]
    async with ScriptedUpstream([twice, SERVE_ONE, SERVE_ONE]) as upstream:
        for _ in range(3):
            assert await fetch(client, upstream) == b"hello"
        assert upstream.connections == 3
        assert caplog.text.count("bytes that no request asked for") == 1


async def test_a_408_on_an_idle_connection_is_a_servers_way_to_close_and_costs_no_trust(
    make_client: MakeClient,
) -> None:
    client = make_client()
    notice = answer(b"", status=b"408 Request Time-out", headers=[b"Connection: close"])
    idle = asyncio.Event()
    plays: list[Play] = [[*SERVE_ONE, Pause(idle), Send(notice)], [*SERVE_ONE, *SERVE_ONE]]
    async with ScriptedUpstream(plays) as upstream:
        assert await fetch(client, upstream) == b"hello"
        idle.set()
        await until(lambda: counts(client, upstream).open == 0)
        assert [await fetch(client, upstream) for _ in range(2)] == [b"hello", b"hello"]
        assert upstream.connections == 2


async def test_an_origin_that_is_gone_is_forgotten_with_its_connections_unless_one_is_in_use(
    make_client: MakeClient,
) -> None:
    client = make_client()
    gate = asyncio.Event()
    async with ScriptedUpstream([Expect(), Pause(gate), Send(answer(b"hello"))]) as upstream:
        task = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        assert not client.forget(origin_of(upstream))
        gate.set()
        assert await task == b"hello"
        assert counts(client, upstream).idle == 1
        assert client.forget(origin_of(upstream))
        assert client.counts() == {}
        assert client.forget(origin_of(upstream))
        async with asyncio.timeout(20):
            await upstream.peers[0].left.wait()


async def test_an_origin_forgotten_while_in_use_is_dropped_with_its_last_connection(make_client: MakeClient) -> None:
    """And so is one to which a late request is sent afterwards."""
    client = make_client(idle_expiry_seconds=0.05)
    gate = asyncio.Event()
    plays: list[Play] = [[Expect(), Pause(gate), Send(answer(b"hello"))], SERVE_ONE]
    async with ScriptedUpstream(plays) as upstream:
        task = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        assert not client.forget(origin_of(upstream))
        gate.set()
        assert await task == b"hello"
        await until(lambda: client.counts() == {})
        assert await fetch(client, upstream) == b"hello"
        await until(lambda: client.counts() == {})


async def test_a_request_that_is_cancelled_while_its_connection_opens_leaves_nothing_behind(
    make_client: MakeClient,
) -> None:
    """Whenever that is, the client can be closed: it waits for no connection that was never handed out."""
    client = make_client()
    async with ScriptedUpstream([SERVE_ONE] * 12) as upstream:
        for turn in range(12):
            request = spawn(fetch(client, upstream))
            await turns(turn)
            request.cancel()
            await asyncio.wait([request])
        async with asyncio.timeout(10):
            await client.close()
        assert counts(client, upstream).open == 0


async def test_uploads_leave_no_more_connections_than_were_in_use_at_once(make_client: MakeClient) -> None:
    """Each needs a new connection, which replaces the one that has been idle for longest."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"

    client = make_client()
    async with ScriptedUpstream([[*SERVE_ONE] * 2] * 6) as upstream:
        for _ in range(5):
            assert await fetch(client, upstream, pieces()) == b"hello"
            assert counts(client, upstream).open == 1
        assert upstream.connections == 5


async def test_no_more_than_some_thousand_origins_are_remembered_as_gone(make_client: MakeClient) -> None:
    """Replicas come and go behind a name for as long as a process lives."""
    client = make_client()
    most = 0
    for number in range(5_000):
        assert client.forget(Origin("http", f"replica-{number}", 80, b""))
        most = max(most, len(client._forgotten))  # noqa: SLF001 - internal state that no public name shows
    assert most == 4_096

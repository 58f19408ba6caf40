"""The pool's bounds and its line of waiters; that cancelling anywhere closes the connection and frees its slot."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import pytest

from proxy.clock import SystemClock
from proxy.errors import PoolTimeout, ResetMidResponse
from proxy.upstream import Limits, Origin, UpstreamClient, pool
from proxy.upstream.connection import Connection
from proxy.upstream.timeouts import Deadlines
from tests.proxy.upstream.conftest import MakeClient, counts, fetch, origin_of, spawn, turns, until
from tests.support.clock import FakeClock
from tests.support.upstream import (
    EVENT_STREAM,
    Expect,
    Mark,
    Pause,
    Play,
    ScriptedUpstream,
    Send,
    Stall,
    answer,
    chunked,
)

SERVE_ONE: Play = [Expect(), Send(answer(b"hello"))]


def gated(gate: asyncio.Event) -> Play:
    """The first request of a connection waits for `gate`; three more are served."""
    return [Expect(), Pause(gate), Send(answer(b"first")), *SERVE_ONE, *SERVE_ONE, *SERVE_ONE]


async def test_no_more_than_the_limit_are_open_and_those_who_wait_are_served_in_turn(make_client: MakeClient) -> None:
    client = make_client(max_connections=1)
    gate = asyncio.Event()
    async with ScriptedUpstream(gated(gate)) as upstream:
        tasks = [spawn(fetch(client, upstream, b"%d" % number)) for number in range(4)]
        await until(lambda: len(upstream.requests) == 1)
        assert counts(client, upstream).waiting == 3
        gate.set()
        await asyncio.gather(*tasks)
        assert upstream.connections == 1
        assert [request.body for request in upstream.requests] == [b"0", b"1", b"2", b"3"]


async def test_who_waits_too_long_is_refused_and_leaves_the_line(make_client: MakeClient) -> None:
    client = make_client(max_connections=1, pool_wait_seconds=0.01)
    gate = asyncio.Event()
    async with ScriptedUpstream(gated(gate)) as upstream:
        first = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        with pytest.raises(PoolTimeout, match=r"^no connection to the upstream became free in time$"):
            await fetch(client, upstream)
        assert counts(client, upstream).waiting == 0
        gate.set()
        assert await first == b"first"
        assert await fetch(client, upstream) == b"hello"


async def test_a_line_that_is_full_refuses_at_once(make_client: MakeClient) -> None:
    client = make_client(max_connections=1, max_waiting=1)
    gate = asyncio.Event()
    async with ScriptedUpstream(gated(gate)) as upstream:
        tasks = [spawn(fetch(client, upstream)) for _ in range(2)]
        await until(lambda: len(upstream.requests) == 1)
        with pytest.raises(PoolTimeout, match=r"^too many requests wait for a connection to the upstream$"):
            await fetch(client, upstream)
        gate.set()
        await asyncio.gather(*tasks)


async def test_no_more_than_the_limit_stay_idle(make_client: MakeClient) -> None:
    client = make_client(max_idle=2)
    gate = asyncio.Event()
    async with ScriptedUpstream(gated(gate)) as upstream:
        tasks = [spawn(fetch(client, upstream)) for _ in range(4)]
        await until(lambda: len(upstream.requests) == 4)
        gate.set()
        await asyncio.gather(*tasks)
        assert (counts(client, upstream).open, counts(client, upstream).idle) == (2, 2)


async def test_a_slot_of_a_failed_request_goes_to_the_one_who_waits(make_client: MakeClient) -> None:
    client = make_client(max_connections=1)
    here = asyncio.Event()
    async with ScriptedUpstream([[Expect(), Mark(here), Stall()], SERVE_ONE]) as upstream:
        first = spawn(fetch(client, upstream))
        await here.wait()
        second = spawn(fetch(client, upstream))
        await until(lambda: counts(client, upstream).waiting == 1)
        first.cancel()
        assert await second == b"hello"


async def test_a_connection_on_probation_holds_up_nobody(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PROBATION_SECONDS", 1_000)
    client = make_client(max_connections=1, idle_expiry_seconds=1_000, pool_wait_seconds=1)
    gate = asyncio.Event()
    stream: Play = [Expect(), Pause(gate), Send(chunked(b"data: 1\n\n", headers=[EVENT_STREAM]))]
    async with ScriptedUpstream([stream, stream, SERVE_ONE]) as upstream:
        first = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        second = spawn(fetch(client, upstream))  # waits while the stream runs
        await until(lambda: counts(client, upstream).waiting == 1)
        gate.set()
        await first
        await second
        assert counts(client, upstream).idle == 1
        assert await fetch(client, upstream) == b"hello"  # comes when it is on probation


async def test_who_needs_a_fresh_connection_gets_the_slot_and_not_the_used_one(make_client: MakeClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"upload"

    client = make_client(max_connections=1)
    gate = asyncio.Event()
    async with ScriptedUpstream([gated(gate), SERVE_ONE]) as upstream:
        first = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        second = spawn(fetch(client, upstream, body()))
        await until(lambda: counts(client, upstream).waiting == 1)
        gate.set()
        await first
        assert await second == b"hello"
        assert upstream.connections == 2


# -- cancellation, at each await


async def assert_cancelled_and_closed(
    client: UpstreamClient, upstream: ScriptedUpstream, task: asyncio.Task[bytes], origin: Origin | None = None
) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert client.counts()[origin or origin_of(upstream)].open == 0, "the slot is free"
    async with asyncio.timeout(20):
        await upstream.peers[-1].left.wait()


async def test_cancelled_while_waiting_for_a_connection(make_client: MakeClient) -> None:
    client = make_client(max_connections=1)
    gate = asyncio.Event()
    async with ScriptedUpstream(gated(gate)) as upstream:
        first = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        second = spawn(fetch(client, upstream))
        await until(lambda: counts(client, upstream).waiting == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert counts(client, upstream).waiting == 0
        gate.set()
        assert await first == b"first"
        assert counts(client, upstream).idle == 1
        assert len(upstream.requests) == 1


async def test_cancelled_just_as_a_connection_was_granted_passes_it_on(make_client: MakeClient) -> None:
    client = make_client(max_connections=1)
    gate = asyncio.Event()
    async with ScriptedUpstream(gated(gate)) as upstream:
        answered = spawn(client.request(origin_of(upstream), b"GET", b"/"))
        await until(lambda: len(upstream.requests) == 1)
        second = spawn(fetch(client, upstream, b"second"))
        third = spawn(fetch(client, upstream, b"third"))
        await until(lambda: counts(client, upstream).waiting == 2)
        gate.set()
        await until(lambda: counts(client, upstream).waiting == 1)  # granted in this very turn, not yet resumed
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert await third == b"hello"
        await answered
        assert upstream.connections == 1
        assert [request.body for request in upstream.requests] == [b"", b"third"]


async def test_cancelled_just_as_a_slot_was_granted_passes_it_on(make_client: MakeClient) -> None:
    client = make_client(max_connections=1)
    async with ScriptedUpstream([[Expect(), Send(chunked(b"x", end=False)), Stall()], SERVE_ONE]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        second = spawn(fetch(client, upstream, b"second"))
        third = spawn(fetch(client, upstream, b"third"))
        await until(lambda: counts(client, upstream).waiting == 2)
        answered.abort()
        second.cancel()
        assert await third == b"hello"
        assert counts(client, upstream).open == 1


async def test_cancelled_while_connecting(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([Stall()]) as upstream:
        origin = Origin.parse(f"https://127.0.0.1:{upstream.port}")
        task = spawn(_read(client, origin))
        await until(lambda: upstream.connections == 1)
        await assert_cancelled_and_closed(client, upstream, task, origin)


async def test_cancelled_while_the_body_is_written(make_client: MakeClient) -> None:
    produced = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal produced
        while True:
            produced += 1
            yield b"x" * 65_536

    client = make_client()
    gate = asyncio.Event()
    async with ScriptedUpstream([Pause(gate), Stall()]) as upstream:
        task = spawn(fetch(client, upstream, body()))
        seen = -1
        while seen != produced or not produced:
            seen = produced
            await turns(500)
        gate.set()
        await assert_cancelled_and_closed(client, upstream, task)


async def test_cancelled_while_the_body_is_awaited(make_client: MakeClient) -> None:
    here = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"first"
        here.set()
        await asyncio.Event().wait()

    client = make_client()
    async with ScriptedUpstream([Stall()]) as upstream:
        task = spawn(fetch(client, upstream, body()))
        await here.wait()
        await until(lambda: upstream.connections == 1)
        await assert_cancelled_and_closed(client, upstream, task)


async def test_cancelled_while_waiting_for_the_head(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([Expect(), Stall()]) as upstream:
        task = spawn(fetch(client, upstream))
        await until(lambda: len(upstream.requests) == 1)
        await assert_cancelled_and_closed(client, upstream, task)


async def test_cancelled_while_waiting_for_a_piece_of_the_body(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([Expect(), Send(chunked(b"part", end=False)), Stall()]) as upstream:
        answered = await client.request(origin_of(upstream), b"GET", b"/")
        assert await answered.next_chunk() == b"part"
        task = spawn(answered.next_chunk())
        await turns()
        await assert_cancelled_and_closed(client, upstream, task)
        with pytest.raises(ResetMidResponse):
            await answered.next_chunk()


async def test_an_answer_given_up_closes_and_one_that_ended_is_left_alone(make_client: MakeClient) -> None:
    client = make_client()
    async with ScriptedUpstream([*SERVE_ONE, Expect(), Send(chunked(b"part", end=False)), Stall()]) as upstream:
        whole = await client.request(origin_of(upstream), b"GET", b"/")
        whole.abort()
        assert counts(client, upstream).idle == 1
        assert whole.body_now() == b"hello"
        part = await client.request(origin_of(upstream), b"GET", b"/")
        part.abort()
        part.abort()
        assert counts(client, upstream).open == 0
        await upstream.peers[0].left.wait()


async def _read(client: UpstreamClient, origin: Origin) -> bytes:
    return await (await client.request(origin, b"GET", b"/")).read(99)


class SocketTransport(asyncio.Transport):
    """The transport of a connection whose bytes the loop never reads."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.closed = False

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def write(self, data: Any) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0


class Timer:
    """A timer that the test lets run."""

    def __init__(self, callback: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        self.ring = lambda: callback(*arguments)
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """The part of a loop that a pool needs, with timers and a time that the test sets."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []
        self.seconds = 1.0

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def call_later(self, _: float, callback: Callable[..., object], *arguments: Any) -> Timer:
        self.timers.append(Timer(callback, arguments))
        return self.timers[-1]

    def time(self) -> float:
        return self.seconds


class Pooled:
    """A pool whose connections are opened by hand, each on a socket of its own."""

    def __init__(self, **limits: Any) -> None:
        self.loop = Loop()
        self.limits = Limits(**limits)
        self.clock = FakeClock()
        self.pool = pool.Pool(self.loop, self.limits, "http://replica")  # type: ignore[arg-type]
        self.deadlines = Deadlines(asyncio.get_running_loop(), self.clock)
        self.ends: list[socket.socket] = []

    async def open(self) -> Connection:
        """Take a slot and open a connection in it."""
        assert await self.pool.obtain(fresh=True) is None
        ours, theirs = socket.socketpair()
        self.ends += [ours, theirs]
        connection = Connection(asyncio.get_running_loop(), self.clock, self.deadlines, self.pool, self.limits)
        connection.connection_made(SocketTransport(ours))
        self.pool.opened_one(connection)
        return connection

    def serve(self, connection: Connection, response: bytes = answer(b"hello")) -> None:
        """Serve one exchange on it; it is then the pool's again."""
        connection.begin(self.limits, head_only=False)
        connection.data_received(response)


@pytest.fixture
async def pooled() -> AsyncIterator[Callable[..., Pooled]]:
    """Make pools with given limits; their sockets are closed behind the test."""
    made: list[Pooled] = []

    def make(**limits: Any) -> Pooled:
        made.append(Pooled(**limits))
        return made[-1]

    yield make
    for each in made:
        each.deadlines.stop()
        for end in each.ends:
            end.close()


MakePooled: TypeAlias = Callable[..., Pooled]
STREAM = chunked(b"data: 1\n\n", headers=[EVENT_STREAM])


async def test_a_connection_that_came_back_meanwhile_is_obtained_before_a_new_one(pooled: MakePooled) -> None:
    """And only by a request that may use one that has served."""
    here = pooled(max_connections=2)
    connection = await here.open()
    here.serve(connection)
    assert await here.pool.obtain(fresh=False) is connection
    assert (here.pool.counts.open, here.pool.counts.reused) == (1, 1)
    here.serve(connection)
    assert await here.pool.obtain(fresh=True) is None
    assert not connection.usable, "it makes room, else uploads would leave one more each"


async def test_a_connection_that_was_lost_is_not_kept(pooled: MakePooled) -> None:
    """A pool lives as long as its replica, which may close connections for years."""
    here = pooled()
    connection = await here.open()
    here.serve(connection)
    connection.connection_lost(None)
    assert here.pool.counts.open == 0
    assert not [each for each in gc.get_referrers(connection) if isinstance(each, set | dict | deque)]


async def test_a_slot_and_a_connection_pass_by_the_requests_whose_time_is_up(pooled: MakePooled) -> None:
    """Their timers have run and they have not, so they are still in the line."""
    for comes in ("a connection", "a slot"):
        here = pooled(max_connections=1)
        connection = await here.open()
        late, waiting = spawn(here.pool.obtain(fresh=False)), spawn(here.pool.obtain(fresh=False))
        await turns()
        here.loop.timers[0].ring()
        if comes == "a slot":
            connection.close()
        else:
            here.serve(connection)
        with pytest.raises(PoolTimeout):
            await late
        assert await waiting is (None if comes == "a slot" else connection)
        assert (here.pool.counts.open, here.pool.counts.waiting) == (1, 0)


async def test_a_timer_that_runs_just_after_a_connection_was_granted_takes_nothing_away(pooled: MakePooled) -> None:
    here = pooled(max_connections=1)
    connection = await here.open()
    waiting = spawn(here.pool.obtain(fresh=False))
    await turns()
    here.serve(connection)
    here.loop.timers[0].ring()
    assert await waiting is connection
    assert here.loop.timers[0].cancelled


async def test_a_closing_pool_refuses_who_waits_and_leaves_who_was_refused_before(pooled: MakePooled) -> None:
    here = pooled(max_connections=1)
    await here.open()
    late, waiting = spawn(here.pool.obtain(fresh=False)), spawn(here.pool.obtain(fresh=False))
    await turns()
    here.loop.timers[0].ring()
    here.pool.close()
    with pytest.raises(PoolTimeout, match="became free"):
        await late
    with pytest.raises(PoolTimeout, match=r"^the client is closing$"):
        await waiting


async def test_a_connection_that_died_on_the_way_to_a_request_that_left_goes_to_nobody(pooled: MakePooled) -> None:
    """Granted, closed by the upstream, and the request cancelled, all before the request ran."""
    here = pooled(max_connections=1)
    connection = await here.open()
    leaving, waiting = spawn(here.pool.obtain(fresh=False)), spawn(here.pool.obtain(fresh=False))
    await turns()
    here.serve(connection)
    leaving.cancel()
    connection.eof_received()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await waiting is None, "its slot goes on to the next"
    assert here.pool.counts.open == 1


async def test_distrust_is_logged_once_and_lasts_from_the_last_bytes_that_nobody_asked_for(
    pooled: MakePooled, caplog: pytest.LogCaptureFixture
) -> None:
    here = pooled()
    connections = [await here.open() for _ in range(4)]
    here.serve(connections[0], answer(b"hello") + b"POISON")
    here.loop.seconds += pool.DISTRUST_SECONDS - 1
    here.serve(connections[1], answer(b"hello") + b"POISON")
    assert caplog.text.count("upstream http://replica sent bytes that no request asked for") == 1
    assert caplog.records[0].getMessage().endswith("; its connections are not reused for 300 s")
    here.loop.seconds += pool.DISTRUST_SECONDS - 1
    here.serve(connections[2])
    assert here.pool.counts.idle == 0
    here.loop.seconds += 1
    here.serve(connections[3])
    assert here.pool.counts.idle == 1


async def test_what_is_idle_or_on_probation_is_closed_at_the_first_bytes_that_nobody_asked_for(
    pooled: MakePooled,
) -> None:
    here = pooled()
    idle, probation, poisoned = [await here.open() for _ in range(3)]
    here.serve(idle)
    here.serve(probation, STREAM)
    assert (here.pool.counts.idle, here.pool.counts.in_use) == (2, 1)
    here.serve(poisoned, answer(b"hello") + b"POISON")
    assert here.pool.counts.open == 0
    assert here.loop.timers[0].cancelled, "the end of its probation"


async def test_room_is_made_by_the_oldest_on_probation_and_then_by_the_oldest_idle_one(pooled: MakePooled) -> None:
    here = pooled(max_connections=4)
    idle, idle_too, probation, probation_too = [await here.open() for _ in range(4)]
    here.serve(idle)
    here.serve(idle_too)
    here.serve(probation, STREAM)
    here.serve(probation_too, STREAM)
    here.pool._make_room()  # noqa: SLF001 - what a request does that finds all slots taken
    assert [each.usable for each in (idle, idle_too, probation, probation_too)] == [True, True, False, True]
    here.pool._make_room()  # noqa: SLF001
    here.pool._make_room()  # noqa: SLF001
    assert [each.usable for each in (idle, idle_too, probation, probation_too)] == [False, True, False, False]


async def test_an_upstream_is_trusted_with_its_streams_after_three_that_outlived_their_probation(
    pooled: MakePooled,
) -> None:
    here = pooled()
    connection = await here.open()
    for number in range(pool.TRUSTED_AFTER):
        assert not here.pool.keeps_streams
        here.serve(connection, STREAM)
        assert here.pool.take() is None, "not before its probation is over"
        here.loop.timers[number].ring()
        assert here.pool.take() is connection
    assert here.pool.keeps_streams
    here.serve(connection, STREAM)
    assert here.pool.take() is connection


async def test_an_idle_connection_expires_after_its_time_and_one_on_probation_too(pooled: MakePooled) -> None:
    here = pooled(idle_expiry_seconds=4)
    idle, probation = await here.open(), await here.open()
    here.serve(idle)
    here.serve(probation, STREAM)
    for elapsed, left in ((3.9, 2), (0.1, 0)):
        here.clock.advance(elapsed)
        here.deadlines.ring()
        assert here.pool.counts.idle == left


@pytest.mark.parametrize("unread", [b"", b"HTTP/1.1 200 OK\r\n"])
async def test_a_connection_passes_to_a_waiting_request_only_if_nothing_waits_unread_on_it(unread: bytes) -> None:
    """The bytes come after it was given to the request and before the request runs."""
    loop = asyncio.get_running_loop()
    clock = SystemClock()
    limits = Limits(max_connections=1)
    connections = pool.Pool(loop, limits, "http://replica")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        deadlines = Deadlines(loop, clock)
        connection = Connection(loop, clock, deadlines, connections, limits)
        connection.connection_made(SocketTransport(ours))
        assert await connections.obtain(fresh=False) is None
        connection.begin(limits, head_only=False)
        waiting = spawn(connections.obtain(fresh=False))
        await turns()
        connection.data_received(answer(b"hello"))
        theirs.send(unread)
        assert await waiting is (None if unread else connection)
        assert connection.usable is not bool(unread)
        deadlines.stop()

"""The pool's bounds and its line of waiters; that cancelling anywhere closes the connection and frees its slot."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.clock import SystemClock
from proxy.errors import PoolTimeout, ResetMidResponse
from proxy.upstream import Limits, Origin, UpstreamClient, pool
from proxy.upstream.connection import Connection
from proxy.upstream.timeouts import Deadlines
from tests.proxy.upstream.conftest import MakeClient, counts, fetch, origin_of, spawn, turns, until
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
        with pytest.raises(PoolTimeout):
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
        with pytest.raises(PoolTimeout):
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
    async with asyncio.timeout(5):
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


@pytest.mark.parametrize("unread", [b"", b"HTTP/1.1 200 OK\r\n"])
async def test_a_connection_passes_to_a_waiting_request_only_if_nothing_waits_unread_on_it(unread: bytes) -> None:
    """The bytes come after it was given to the request and before the request runs."""
    loop = asyncio.get_running_loop()
    clock = SystemClock()
    limits = Limits(max_connections=1)
    connections = pool.Pool(loop, limits)
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

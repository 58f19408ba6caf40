"""Requests that end badly leave nothing for the garbage collector: what holds itself is freed late."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from tests.support.cairn import Cairn, config_for, running
from tests.support.garbage import held_by_itself
from tests.support.garbage import uncollected as uncollected
from tests.support.upstream import Expect, Reset, ScriptedUpstream, Send, Stall, Step
from tests.support.valkey import eventually

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
TIMES = 5


async def visit(cairn: Cairn, *, stream: bool, leaves: bool) -> None:
    """One request on a connection of its own, until it breaks or its client has seen enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", cairn.port)
    wish = b',"stream":true' if stream else b""
    body = b'{"model":"m","messages":[{"role":"user","content":"%b"}]%b}' % (b"word " * 2_000, wish)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    writer.write(head % len(body) + body)
    if leaves:
        await reader.readuntil(EVENT)
    else:
        await reader.read()
    writer.transport.abort()


@pytest.mark.parametrize(
    ("play", "stream", "leaves"),
    [
        pytest.param(
            [Send(STREAM + CHUNK), Send(CHUNK), Reset()], True, False, id="an upstream that resets a stream"
        ),
        pytest.param([Send(PLAIN), Reset()], False, False, id="an upstream that resets an answer"),
        pytest.param([Send(STREAM + CHUNK), Stall()], True, True, id="a client that leaves a stream"),
    ],
)
@pytest.mark.usefixtures("uncollected")
async def test_what_broke_is_freed_at_once(play: list[Step], stream: bool, leaves: bool) -> None:
    """No exception is kept by what its traceback leads to."""
    async with ScriptedUpstream([Expect(), *play]) as upstream, running(config_for([upstream.url])) as cairn:
        for _ in range(TIMES):
            await visit(cairn, stream=stream, leaves=leaves)
        await eventually(lambda: cairn.worker.requests.in_flight_limit.requests == 0)
        assert held_by_itself() == set()


@pytest.mark.usefixtures("uncollected")
async def test_an_upload_that_its_client_leaves_is_freed_at_once() -> None:
    """The task that uploaded, its time limit and the frame that names the limit do not keep each other."""
    async with (
        ScriptedUpstream([Expect(head_only=True), Stall()]) as upstream,
        running(config_for([upstream.url])) as cairn,
    ):

        def uploaded(times: int) -> bool:
            return sum(each.method == b"POST" for each in upstream.requests) == times

        for times in range(1, TIMES + 1):
            _, writer = await asyncio.open_connection("127.0.0.1", cairn.port)
            writer.write(b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n" + b"x" * 100_000)
            await eventually(partial(uploaded, times))
            writer.transport.abort()
        await eventually(lambda: cairn.worker.requests.in_flight_limit.requests == 0)
        assert held_by_itself() == set()

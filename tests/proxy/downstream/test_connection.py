"""Connections over real sockets: requests in their order, and everything that is not the plain course of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from proxy.downstream.body import IncomingRequest, read_body
from proxy.downstream.connection import Session, SessionServer
from proxy.downstream.response import ClientResponse

Play = Callable[[IncomingRequest, ClientResponse], Awaitable[None]]
OK = b"HTTP/1.1 200 OK"


async def echo(asked: IncomingRequest, answer: ClientResponse) -> None:
    body = await read_body(asked, 2**20, 5.0)
    answer.send(200, b"OK", [], asked.method.encode() + b" " + asked.raw_path.encode() + b" " + body)


@asynccontextmanager
async def serving(play: Play = echo, **options: Any) -> AsyncIterator[tuple[web.Server, int]]:
    async def handle(asked: IncomingRequest) -> ClientResponse:
        answer = ClientResponse(asked, 10.0)
        await play(asked, answer)
        return answer

    server = SessionServer(handle, auto_decompress=False, **options)
    runner = web.ServerRunner(server)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with asyncio.timeout(10):
            yield server, runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def answer_of(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Status line and body of the next answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head.partition(b"\r\n")[0], await reader.readexactly(length)


def request(path: bytes, more: bytes = b"", body: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b" % (path, more, len(body), body)


async def test_what_is_taken_from_inside_aiohttp_is_there() -> None:
    """Another version that names it otherwise fails here, and not in service."""
    inside = set(dir(Session))
    taken = "_messages _waiter _parser _buffer_paused _msg_queue_resume_size _resume_reading_if_drained"
    taken += " _request_handler _request_in_progress _handler_waiter _task_handler _force_close _close _keepalive"
    taken += " _keepalive_timeout _keepalive_handle _next_keepalive_close_time _process_keepalive _lingering_time"
    taken += (
        " _loop _drain_helper force_close close _reading_paused _pause_transport_reading _resume_transport_reading"
    )
    assert set(taken.split()) <= inside


async def test_requests_sent_ahead_are_answered_in_their_order() -> None:
    """More of them than aiohttp's parser lets wait, which stops and goes on."""
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(request(b"/%d" % number, body=b"b" * number) for number in range(40)))
        for number in range(40):
            assert await answer_of(reader) == (OK, b"POST /%d " % number + b"b" * number)
        writer.close()


async def test_what_is_no_request_is_refused_and_ends_the_connection() -> None:
    """Also one that comes behind a good one."""
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/good"))
        assert await answer_of(reader) == (OK, b"POST /good ")
        writer.write(b"no request at all\r\n\r\n")
        assert b" 400 " in (await answer_of(reader))[0]
        assert await reader.read() == b""
        writer.close()


async def test_an_upgrade_is_not_taken_up_and_the_connection_goes_on() -> None:
    """As `curl --http2` asks for."""
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/one", b"connection: upgrade\r\nupgrade: h2c\r\n"))
        assert await answer_of(reader) == (OK, b"POST /one ")
        writer.write(request(b"/two"))
        assert await answer_of(reader) == (OK, b"POST /two ")
        writer.close()


@pytest.mark.parametrize(
    ("head", "stays"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n", True),
    ],
)
async def test_a_connection_stays_as_long_as_its_client_wants(head: bytes, stays: bool) -> None:
    """By its version and its own word."""
    async with serving() as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        await answer_of(reader)
        if stays:
            writer.write(head)
            await answer_of(reader)
        else:
            assert await reader.read() == b""
        writer.close()


async def test_an_idle_connection_is_closed_after_its_time() -> None:
    """Counted from the end of its last answer."""
    async with serving(keepalive_timeout=0.05) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/"))
        await answer_of(reader)
        assert await reader.read() == b""
        writer.close()


async def test_a_body_that_was_not_read_is_left_behind() -> None:
    """What comes of it in time is dropped, and the next request is served."""

    async def refuse(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.send(403, b"No", [], asked.raw_path.encode())

    async with serving(refuse) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        whole = request(b"/one", body=b"b" * 300_000)
        writer.write(whole[:100])
        assert await answer_of(reader) == (b"HTTP/1.1 403 No", b"/one")
        writer.write(whole[100:] + request(b"/two"))
        assert await answer_of(reader) == (b"HTTP/1.1 403 No", b"/two")
        writer.close()


async def test_a_body_that_never_ends_ends_the_connection() -> None:
    """Where nobody wants it, after the lingering time."""

    async def refuse(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.send(403, b"No", [], b"")

    async with serving(refuse, lingering_time=0.05) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/one", body=b"b" * 300_000)[:-1])
        await answer_of(reader)
        assert await reader.read() == b""
        writer.close()


async def test_a_client_that_leaves_cancels_its_request() -> None:
    """At whatever it awaits."""
    entered, left = asyncio.Event(), asyncio.Event()

    async def wait(asked: IncomingRequest, answer: ClientResponse) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.set()
            raise

    async with serving(wait) as (_, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/"))
        await entered.wait()
        writer.transport.abort()
        await left.wait()


async def test_a_server_that_stops_lets_a_request_finish() -> None:
    """And closes its connection behind it."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def wait(asked: IncomingRequest, answer: ClientResponse) -> None:
        entered.set()
        await go_on.wait()
        answer.send(200, b"OK", [], b"done")

    async with serving(wait) as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/"))
        await entered.wait()
        server.pre_shutdown()
        async with asyncio.TaskGroup() as stopping:
            stopping.create_task(server.shutdown(5.0))
            go_on.set()
            assert await answer_of(reader) == (OK, b"done")
        assert await reader.read() == b""
        writer.close()

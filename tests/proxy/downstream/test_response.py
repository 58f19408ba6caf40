"""Answers to clients over real sockets: framing, back-pressure, breaking off, limits of bodies."""

from __future__ import annotations

import asyncio
import socket

import pytest

from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse, whole_response
from tests.support.answering import GET, serving, talk


async def test_a_whole_answer_has_its_length_and_its_headers_as_given() -> None:
    """One write of head and body."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.send(200, b"OK", [(b"x-a", b"1"), (b"x-a", b"2")], b"hello")

    async with serving(play) as port:
        got = await talk(port, GET)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK", b"x-a: 1", b"x-a: 2", b"content-length: 5", b"connection: close",
    ]  # fmt: skip
    assert body == b"hello"


async def test_a_connection_serves_the_next_request_after_each_framing() -> None:
    """Length, chunks and no body at all leave the connection in step."""
    plays = iter(["length", "chunked", "empty", "head"])

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        kind = next(plays)
        if kind == "length":
            answer.begin(200, b"OK", [], 4)
            await answer.write(b"ab")
            await answer.write(b"cd")
        elif kind == "chunked":
            answer.begin(200, b"OK", [], None)
            await answer.write(b"abc")
        elif kind == "empty":
            answer.begin(204, b"No Content", [], None)
        else:
            answer.begin(200, b"OK", [], 9)
            await answer.write(b"never sent")
        answer.end()

    again = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"HEAD / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    async with serving(play) as port:
        got = await talk(port, again, again, again, last)
    assert got == (
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabcd"
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        b"HTTP/1.1 204 No Content\r\n\r\n"
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\n"
    )


@pytest.mark.parametrize("written", ["whole", "in pieces", "not at all"])
@pytest.mark.parametrize(("method", "status"), [(b"HEAD", 200), (b"HEAD", 404), (b"GET", 304)])
async def test_a_response_without_a_body_leaves_the_connection_in_step(
    method: bytes, status: int, written: str
) -> None:
    """Its body is left out, since the client would take it for the next response."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        if request.target == "/last":
            answer.send(200, b"OK", [], b"last")
        elif written == "whole":
            answer.send(status, b"X", [], b"hello")
        else:
            answer.begin(status, b"X", [], 5)
            if written == "in pieces":
                await answer.write(b"he")
                answer.write_last(b"llo")
            answer.end()

    async with serving(play) as port:
        got = await talk(port, method + b" / HTTP/1.1\r\nhost: x\r\n\r\n", GET.replace(b"/ ", b"/last ", 1))
    head, _, rest = got.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [b"HTTP/1.1 %d X" % status, *([] if status == 304 else [b"content-length: 5"])]
    assert rest == b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\nconnection: close\r\n\r\nlast"


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    """The end of the connection is the end of the body."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None)
        await answer.write(b"abc")
        answer.end()

    async with serving(play) as port:
        got = await talk(port, b"GET / HTTP/1.0\r\nhost: x\r\n\r\n")
    assert got == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"


@pytest.mark.parametrize("length", [None, 100])
async def test_an_answer_that_is_broken_off_does_not_look_whole(length: int | None) -> None:
    """No terminator, and fewer bytes than announced."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], length)
        await answer.write(b"abc")
        answer.write_last(b"def")
        answer.break_off()

    async with serving(play) as port:
        got = await talk(port, GET.replace(b"connection: close\r\n", b""))
    assert b"def" in got
    assert not got.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream; charset=utf-8"])
async def test_an_answer_that_ends_with_its_connection_is_reset_when_it_is_broken_off(kind: bytes) -> None:
    """HTTP/1.0 knows no other sign; a stream has its last event, which a reset could overtake."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [(b"content-type", kind)], None)
        await answer.write(b"abc")
        answer.write_last(b"def")
        answer.break_off()

    async with serving(play) as port:
        if b"json" in kind:
            with pytest.raises(ConnectionResetError):
                await talk(port, b"GET / HTTP/1.0\r\nhost: x\r\n\r\n")
        else:
            assert (await talk(port, b"GET / HTTP/1.0\r\nhost: x\r\n\r\n")).endswith(b"\r\n\r\nabcdef")


@pytest.mark.parametrize("missing", [3, 4])
async def test_last_words_never_complete_an_announced_length(missing: int) -> None:
    """An error event in place of the missing bytes would look like the answer's own end."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], 3 + missing)
        await answer.write(b"abc")
        answer.write_last(b"def")
        answer.break_off()

    async with serving(play) as port:
        got = await talk(port, GET)
    assert got.endswith(b"\r\n\r\nabc" if missing == 3 else b"\r\n\r\nabcdef")


async def test_an_answer_that_is_broken_off_resets_none_that_its_client_still_reads() -> None:
    """The client pipelines more than is read ahead; closing at once would reset the connection."""
    broken = asyncio.Event()

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        if request.target == "/whole":
            answer.send(200, b"OK", [], bytes(300_000))
        else:
            answer.begin(200, b"OK", [], 100)
            await answer.write(b"abc")
            answer.break_off()
            broken.set()

    async with serving(play) as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader, writer = await asyncio.open_connection(sock=client, limit=1024)
        broken_off = b"GET /broken HTTP/1.1\r\nhost: x\r\n\r\n"
        writer.write(broken_off.replace(b"broken", b"whole") + broken_off + bytes(400_000))
        async with asyncio.timeout(20):
            await broken.wait()
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: 300000" in head
            assert len(await reader.readexactly(300_000)) == 300_000
            assert (await reader.read(-1)).endswith(b"content-length: 100\r\n\r\nabc")
        writer.close()


async def test_an_answer_shorter_than_announced_ends_the_connection() -> None:
    """The client must see that bytes are missing."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], 100)
        await answer.write(b"abc")
        answer.end()

    async with serving(play) as port:
        assert (await talk(port, GET.replace(b"connection: close\r\n", b""))).endswith(b"abc")


async def test_a_slow_reader_holds_the_writer_back() -> None:
    """Bytes that the client does not read do not accumulate in memory."""
    written = 0
    piece = b"x" * 65_536

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        nonlocal written
        answer.begin(200, b"OK", [], None)
        for _ in range(4096):  # 256 MB, if nobody held it back
            await answer.write(piece)
            written += len(piece)

    async with serving(play) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        for _ in range(200):
            await asyncio.sleep(0)
        before = -1
        while before != written:  # until it stands still
            before = written
            for _ in range(50):
                await asyncio.sleep(0)
        assert written < 32 * 1024 * 1024
        writer.transport.abort()


async def test_a_reader_that_never_reads_is_given_up() -> None:
    """A write waits for its limit and no longer."""
    failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None)
        try:
            while True:
                await answer.write(b"x" * 65_536)
        except ConnectionResetError as error:
            failed.set_result(type(error).__name__)
            raise

    async with serving(play, write_seconds=0.05) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        async with asyncio.timeout(20):
            assert await failed == "ClientStalled"
        writer.transport.abort()


async def test_a_writer_that_was_held_back_goes_on_when_its_client_reads() -> None:
    """Nothing is lost, and the connection serves the next request."""
    waits = 0

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        nonlocal waits
        answer.begin(200, b"OK", [], 400 * 65_536)
        for number in range(400):
            if not answer.offer(b"%c" % (number % 256) * 65_536):
                waits += 1
                await answer.drained()
        answer.end()

    async with serving(play) as port, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            for number in range(400):
                assert await reader.readexactly(65_536) == b"%c" % (number % 256) * 65_536
        assert waits > 2
        writer.close()


async def test_a_chunk_that_came_as_one_is_passed_on_as_it_came() -> None:
    """With its framing, unless the answer has another."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None if request.target == "/chunks" else 3)
        answer.offer(b"abc", b"03\r\nabc\r\n")
        answer.end()

    async with serving(play) as port:
        assert (await talk(port, GET.replace(b"/ ", b"/chunks "))).endswith(b"\r\n\r\n03\r\nabc\r\n0\r\n\r\n")
        assert (await talk(port, GET)).endswith(b"\r\n\r\nabc")


@pytest.mark.parametrize("act", ["send", "begin", "end", "break off"])
async def test_an_answer_to_a_client_that_left_is_dropped(act: str) -> None:
    """Its task runs a turn after the connection is lost; in between, a timer may write a comment, for one."""
    ends: asyncio.Queue[str] = asyncio.Queue()
    begun = asyncio.Event()

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        if act in ("end", "break off"):
            answer.begin(200, b"OK", [], None)
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # the transport is closed for good
        if act == "send":
            answer.send(200, b"OK", [], b"abc")
        elif act == "begin":
            answer.begin(200, b"OK", [], None)
        elif act == "end":
            answer.end()
        else:
            answer.write_last(b"abc")
            answer.break_off()
        ends.put_nowait(act)

    async with serving(play) as port, asyncio.timeout(20):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await begun.wait()
        writer.transport.abort()
        assert await ends.get() == act


async def test_nothing_follows_an_answer_that_was_broken_off() -> None:
    """Neither more of it nor its end."""

    async def play(request: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None)
        answer.break_off()
        assert answer.offer(b"abc")
        answer.write_last(b"abc")
        answer.end()

    async with serving(play) as port:
        assert (await talk(port, GET)).endswith(b"connection: close\r\n\r\n")


def test_the_response_to_what_is_no_request_has_its_headers_and_closes() -> None:
    """Such as the Retry-After of a refusal: a client must be able to read it."""
    text = whole_response(503, [(b"content-type", b"text/plain"), (b"retry-after", b"1")], b"busy")
    assert text == (
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 1\r\n"
        b"content-length: 4\r\nconnection: close\r\n\r\nbusy"
    )

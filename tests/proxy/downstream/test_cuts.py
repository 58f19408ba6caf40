"""However the bytes of requests are cut into reads, the requests and their bodies are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import uvloop

from proxy.downstream.body import TRUSTED_BYTES
from proxy.downstream.body_reader import read_body, stream_body
from proxy.downstream.connection import ROOM_BYTES, Connection
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from tests.support.answering import client_server, served_by
from tests.support.valkey import eventually

LIMIT_BYTES = 2**20
LONG = bytes(range(256)) * 512  # twice as long as a read; holds CR LF, and no end of a head
TRAP = LONG[:-4] + b"\r\n\r\n"
LATE = b"GET /late HTTP/1.1\r\nhost: x\r\n\r\n"


class Line(asyncio.Transport):
    """A connection whose reads are calls; keeps what was answered."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = self.paused = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def writelines(self, pieces: Any) -> None:
        self.written += b"".join(map(bytes, pieces))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    write_eof = abort = close

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


def post(body: bytes, path: bytes = b"/read") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path, len(body)) + body


def chunked(body: bytes, path: bytes = b"/read") -> bytes:
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % path
    return head + b"%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"


async def deliver(connection: Connection, line: Line, piece: bytes) -> None:
    """As an event loop does, in as many reads as there is room, and only while reading is not paused."""
    while piece:
        await eventually(lambda: not line.paused)
        room = memoryview(connection.get_buffer(-1))
        size = min(len(room), len(piece))
        room[:size] = piece[:size]
        connection.buffer_updated(size)
        if len(room) == ROOM_BYTES:
            room[:] = bytes(len(room))  # another connection's
        piece = piece[size:]


async def served(answers: int, *pieces: bytes) -> tuple[list[bytes], Line]:
    """Each request's body, if a connection reads `pieces` and gives as many answers."""
    seen: list[bytes] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        if asked.target == "/stream":
            body = b"".join([piece async for piece in stream_body(asked, 1.0)])
        elif asked.target == "/late":
            body = b"late"
        else:
            body = bytes(await read_body(asked, LIMIT_BYTES, 1.0))
        seen.append(body)
        answer.send(200, b"OK", [], b"")

    server = client_server(play, body_bytes=LIMIT_BYTES)
    line, connection = Line(), server.connect()
    connection.connection_made(line)
    for piece in pieces:
        for _ in range(4):
            await asyncio.sleep(0)
        async with asyncio.timeout(20):
            await deliver(connection, line, piece)
    await eventually(lambda: line.written.count(b"HTTP/1.1 200 OK") >= answers)
    assert not line.closed
    connection.connection_lost(None)
    await server.close()
    assert (server.heads.used, server.bodies.used) == (0, 0)
    return seen, line


def cuts(message: bytes, random: Random) -> Sequence[bytes]:
    near_ends = [message.find(b"\r\n\r\n", random.randrange(len(message))) + random.randrange(6) for _ in range(3)]
    places = {random.randrange(len(message)) for _ in range(random.randrange(6))}
    inside = sorted({0, len(message), *places, *(place for place in near_ends if 6 < place < len(message))})
    return [message[begin:end] for begin, end in pairwise(inside)]


@pytest.mark.parametrize("seed", range(100))
async def test_however_requests_are_cut_into_reads_their_bodies_are_the_same(seed: int) -> None:
    """Lengths about that of a read, every way to read a body, chunked ones among them, several requests in a read."""
    random = Random(seed)
    sent, expected = b"", list[bytes]()
    for _ in range(random.randrange(1, 6)):
        body = random.choice(
            (b"", b"hello", LONG[: ROOM_BYTES - 200], LONG[:ROOM_BYTES], LONG, TRAP, b"\r\n\r\n" * 9)
        )
        path = random.choice((b"/read", b"/read", b"/stream"))
        sent += chunked(body, path) if random.random() < 0.4 and body else post(body, path)
        expected.append(body)
    sent += LATE
    assert (await served(len(expected) + 1, *cuts(sent, random)))[0] == [*expected, b"late"]


async def test_a_request_cut_at_every_byte_is_the_same() -> None:
    """Head, chunks, trailer and the next request."""
    body = b"3;a=b\r\nabc\r\n2\r\nde\r\n0\r\nx: y\r\n\r\n"
    message = b"\r\nPOST /read HTTP/1.1\r\nHost: x\r\ntransfer-encoding: chunked\r\n\r\n" + body + post(b"next")
    seen, line = await served(2, *[message[at : at + 1] for at in range(len(message))])
    assert seen == [b"abcde", b"next"]
    assert line.written.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize("path", [b"/wait", b"/stream"])
async def test_reading_stops_while_enough_waits(path: bytes) -> None:
    """Requests ahead of their turn, or the pieces of a body that nobody takes; and goes on afterwards."""
    go_on = asyncio.Event()

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        body = stream_body(asked, 5.0)
        await go_on.wait()
        answer.send(200, b"OK", [], b"%d" % sum([len(piece) async for piece in body]))

    server, line = client_server(play, body_bytes=0), Line()
    connection = server.connect()
    connection.connection_made(line)
    await deliver(connection, line, post(b"", path) if path == b"/wait" else post(LONG * 2, path)[:100])
    await asyncio.sleep(0)
    given = 0
    while not line.paused:
        connection.get_buffer(-1)[:1000] = post(b"x", path)[:40].ljust(1000, b"x")
        connection.buffer_updated(1000)
        given += 1000
        await asyncio.sleep(0)
    assert 60_000 < given < 140_000
    go_on.set()
    await eventually(lambda: not line.paused)
    connection.connection_lost(None)
    await server.close()
    assert (server.heads.used, server.bodies.used) == (0, 0)


async def test_a_chunked_body_is_read_in_turn_with_other_connections() -> None:
    """32 reads in a row of chunks of one byte kept the loop busy for seconds. Other pauses of reading last on."""

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        body = stream_body(asked, 5.0)
        await go_on.wait()
        answer.send(200, b"OK", [], b"%d" % sum([len(piece) async for piece in body]))

    def send(piece: bytes) -> None:
        connection.get_buffer(-1)[: len(piece)] = piece
        connection.buffer_updated(len(piece))

    def reads() -> bool:
        return not line.paused

    go_on = asyncio.Event()
    server, line = client_server(play, body_bytes=0), Line()
    connection = server.connect()
    connection.connection_made(line)
    send(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(2):
        send(b"ea60\r\n" + b"x" * 60_000 + b"\r\n")
        assert not reads()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert reads()
    send(b"ea60\r\n" + b"x" * 60_000 + b"\r\n")
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reads()
    go_on.set()
    await eventually(reads)
    send(b"0\r\n\r\n")
    assert reads()
    await eventually(lambda: line.written.endswith(b"180000"))
    connection.connection_lost(None)
    await server.close()
    assert (server.heads.used, server.bodies.used) == (0, 0)


async def test_an_end_of_a_head_inside_a_body_is_none() -> None:
    """A head that came in two reads, the second of which begins with its last two bytes."""
    message = post(b"\r\n\r\n" + LONG)
    at = message.index(b"\r\n\r\n") + 2
    assert (await served(2, message[:at], message[at:], post(b"next")))[0] == [b"\r\n\r\n" + LONG, b"next"]


def test_long_bodies_are_whole_on_the_loop_that_serves() -> None:
    """uvloop reads straight into their buffers, which grow with what has come."""
    body = Random(1).randbytes(3 * TRUSTED_BYTES)

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        same = await read_body(asked, 2**26, 5.0) == body
        answer.send(200, b"OK", [], b"%d" % same)

    async def main() -> None:
        async with served_by(client_server(play, body_bytes=2**26)) as port, asyncio.timeout(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for message in (post(body), chunked(body), post(body) + post(body)):
                writer.write(message)
                for _ in range(message.count(b"HTTP/1.1\r\n")):
                    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                    assert await reader.readexactly(1) == b"1"
            writer.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())

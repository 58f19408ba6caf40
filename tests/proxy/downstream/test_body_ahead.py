"""Bodies that come with their heads: taken as they came, or given to the parser after all, and nobody can tell."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from proxy.downstream.body import IncomingRequest, read_body, stream_body
from proxy.downstream.connection import SessionServer
from proxy.downstream.reader import AHEAD_BYTES, Reader
from proxy.downstream.response import ClientResponse
from proxy.errors import TooLarge

LIMIT_BYTES = 2**20
LONG = bytes(range(256)) * (AHEAD_BYTES // 128)  # twice as long; holds CR LF, and no end of a head
TRAP = LONG[:-4] + b"\r\n\r\n"


class Line(asyncio.Transport):
    """A connection whose reads are calls; keeps what was answered."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def writelines(self, pieces: Any) -> None:
        self.written += b"".join(map(bytes, pieces))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def post(body: bytes, path: bytes = b"/read") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path, len(body)) + body


def chunked(body: bytes) -> bytes:
    return (
        b"POST /read HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(body)
        + body
        + b"\r\n0\r\n\r\n"
    )


def deliver(reader: Reader, piece: bytes) -> None:
    """As an event loop does, in as many reads as there is room."""
    while piece:
        room = memoryview(reader.get_buffer(-1))
        size = min(len(room), len(piece))
        room[:size] = piece[:size]
        reader.buffer_updated(size)
        room[:] = bytes(len(room))  # another connection's
        piece = piece[size:]


async def served(*pieces: bytes) -> tuple[list[tuple[bytes, int]], Line]:
    """Each request's body and what the parser saw of it, in bytes, where a connection reads `pieces`."""
    seen: list[tuple[bytes, int]] = []

    async def handle(asked: IncomingRequest) -> ClientResponse:
        answer = ClientResponse(asked, 10.0)
        if asked.raw_path == "/stream":
            body = b"".join([piece async for piece in stream_body(asked, 1.0)])
        elif asked.raw_path == "/refuse":
            body = b"refused"
            with pytest.raises(TooLarge):
                await read_body(asked, 1, 1.0)
        elif asked.raw_path == "/leave":
            body = b"left"
        else:
            body = bytes(await read_body(asked, LIMIT_BYTES, 1.0))
        seen.append((body, asked.content.total_bytes))
        answer.send(200, b"OK", [], b"")
        return answer

    server = SessionServer(handle, auto_decompress=False, lingering_time=0.5)
    line, reader = Line(), server()
    reader.connection_made(line)
    for piece in pieces:
        for _ in range(4):
            await asyncio.sleep(0)
        deliver(reader, piece)
    for _ in range(20):
        await asyncio.sleep(0)
    assert not line.closed
    reader.connection_lost(None)
    await server.shutdown(0.1)
    return seen, line


async def test_a_body_that_came_with_its_head_never_meets_the_parser() -> None:
    """Nothing of it was copied there."""
    assert (await served(post(LONG)))[0] == [(LONG, 0)]


async def test_what_came_behind_it_is_the_next_request() -> None:
    """Short and long, once and again, in one read."""
    seen, line = await served(post(LONG) + post(b"short") + post(TRAP), post(LONG))
    assert [body for body, _ in seen] == [LONG, b"short", TRAP, LONG]
    assert line.written.count(b"HTTP/1.1 200 OK") == 4


@pytest.mark.parametrize("path", [b"/refuse", b"/leave"])
async def test_a_body_that_nobody_reads_ends_where_the_next_request_begins(path: bytes) -> None:
    """It goes through the parser, which drops it."""
    seen, _ = await served(post(TRAP, path) + post(LONG), post(b"next"))
    assert [body for body, _ in seen] == [b"refused" if path == b"/refuse" else b"left", LONG, b"next"]


async def test_an_upload_that_is_passed_on_is_whole() -> None:
    """Its pieces come from the parser."""
    seen, _ = await served(post(TRAP, b"/stream") + post(b"next"))
    assert seen == [(TRAP, len(TRAP)), (b"next", 4)]


async def test_a_chunked_body_is_the_parsers() -> None:
    """Its framing is judged."""
    assert (await served(chunked(LONG) + post(b"next")))[0] == [(LONG, len(LONG)), (b"next", 4)]


async def test_an_end_of_a_head_inside_a_body_is_none() -> None:
    """A head that came in two reads, the second of which begins with its last two bytes."""
    message = post(b"\r\n\r\n" + LONG)
    at = message.index(b"\r\n\r\n") + 2
    assert (await served(message[:at], message[at:], post(b"next")))[0] == [
        (b"\r\n\r\n" + LONG, len(LONG) + 4),
        (b"next", 4),
    ]


def cuts(message: bytes, random: Random) -> Sequence[bytes]:
    places = sorted({0, len(message), *(random.randrange(len(message)) for _ in range(random.randrange(6)))})
    return [message[begin:end] for begin, end in pairwise(places)]


@pytest.mark.parametrize("seed", range(60))
async def test_however_requests_are_cut_into_reads_their_bodies_are_the_same(seed: int) -> None:
    """Lengths about the one from which on a body is taken, every way to read it, chunked ones among them."""
    random = Random(seed)
    sent, expected = b"", list[bytes]()
    for _ in range(random.randrange(1, 6)):
        body = random.randbytes(random.choice((0, 5, AHEAD_BYTES - 200, AHEAD_BYTES, 3 * AHEAD_BYTES)))
        kind = random.choice(("read", "read", "stream", "leave", "chunked"))
        sent += (
            chunked(body)
            if kind == "chunked" and body
            else post(body, b"/" + kind.replace("chunked", "read").encode())
        )
        expected.append(b"left" if kind == "leave" else body)
    assert [body for body, _ in (await served(*cuts(sent, random)))[0]] == expected

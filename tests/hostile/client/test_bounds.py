"""Memory that clients can take: silent connections, heads that never end, bodies that never end."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Iterator

import pytest

from proxy.downstream.body_reader import read_body
from proxy.downstream.connection import Connection
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from proxy.downstream.server import ClientServer
from proxy.errors import CairnError
from tests.proxy.downstream.test_cuts import Line
from tests.support.answering import client_server

MIB = 1024 * 1024
KIB = 1024


@pytest.fixture(autouse=True)
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def taken(since: int) -> int:
    """Bytes allocated since."""
    return tracemalloc.get_traced_memory()[0] - since


def now() -> int:
    return tracemalloc.get_traced_memory()[0]


async def read(asked: IncomingRequest, answer: ClientResponse) -> None:
    try:
        await read_body(asked, 64 * MIB, 300.0)
    except CairnError as error:
        answer.send(error.status, b"No", [], b"")
        return
    answer.send(200, b"OK", [], b"")


def connected(server: ClientServer, number: int) -> list[tuple[Connection, Line]]:
    lines = []
    for _ in range(number):
        line, connection = Line(), server.connect()
        connection.connection_made(line)
        lines.append((connection, line))
    return lines


def send(connection: Connection, piece: bytes) -> None:
    room = connection.get_buffer(-1)
    room[: len(piece)] = piece
    connection.buffer_updated(len(piece))


async def gone(server: ClientServer, lines: list[tuple[Connection, Line]]) -> None:
    for connection, _ in lines:
        connection.connection_lost(None)
    for _ in range(5):
        await asyncio.sleep(0)
    await server.close()
    assert (server.heads.used, server.bodies.used) == (0, 0)


async def test_a_silent_connection_takes_two_kilobytes() -> None:
    """And so does one that idles behind a request with a body of half a megabyte, with its task and its parser."""
    server = client_server(read)
    before = now()
    lines = connected(server, 2000)
    assert taken(before) < 2 * KIB * len(lines)
    for connection, _ in lines:
        for piece in (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 524288\r\n\r\n", *[b"x" * 65_536] * 8):
            send(connection, piece)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    assert all(line.written.startswith(b"HTTP/1.1 200 ") for _, line in lines)
    assert taken(before) < 6 * KIB * len(lines)
    await gone(server, lines)


async def test_unfinished_heads_take_no_more_than_their_bound() -> None:
    """A thousand of 30 KB each: those beyond the bound are refused."""
    server = client_server(read, head_bytes_in_flight=4 * MIB, head_bytes=64 * KIB)
    before = now()
    lines = connected(server, 1000)
    for connection, _ in lines:
        send(connection, b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 30_000)
    assert taken(before) < 4 * MIB + 4 * KIB * len(lines)
    refused = [line for _, line in lines if line.written.startswith(b"HTTP/1.1 503 ")]
    assert 850 < len(refused) < 880
    await gone(server, lines)


async def test_bodies_take_no_more_than_their_bound() -> None:
    """Two hundred of 2 MB each, of which all but a byte comes; a declared length alone takes nothing that counts."""
    server = client_server(read, body_bytes_in_flight=32 * MIB)
    before = now()
    lines = connected(server, 200)
    for connection, _ in lines:
        send(connection, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2097152\r\n\r\n")
        await asyncio.sleep(0)
    assert server.bodies.used == 0
    for _ in range(31):
        for connection, _ in lines:
            send(connection, b"x" * 65_536)
        await asyncio.sleep(0)
        assert server.bodies.used <= 32 * MIB + 65_536 * len(lines)
    await asyncio.sleep(0)
    waiting = sum(not line.written for _, line in lines)
    assert 14 <= waiting <= 16  # and not fewer: those that fail make room at once
    assert taken(before) <= 2 * MIB * (waiting + 1) + 8 * KIB * len(lines)
    await gone(server, lines)

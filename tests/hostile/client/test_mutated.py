"""Mutated input, many connections of it: no defect, no hang, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
from random import Random

import pytest
import uvloop

from proxy.downstream.body_reader import read_body
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from proxy.downstream.server import ClientServer
from proxy.errors import REASON_PHRASES, CairnError
from tests.hostile.client.inputs import BODY_BYTES_MOST, CASES
from tests.hostile.mutated_bytes import change_at
from tests.support.answering import client_server, served_by
from tests.support.valkey import eventually

SEEDS = [b"".join(case.pieces)[:20_000] for case in CASES.values() if case.pieces]
INSERTED = (b"\r\n", b"\n", b"\0", b" ", b":", b"\xff", b"0\r\n\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
CONNECTIONS = 1_000
AT_ONCE = 100
OBJECTS_PER_CONNECTION_MOST = 0.1  # left for good, among them what the test itself keeps


async def echo(request: IncomingRequest, answer: ClientResponse) -> None:
    try:
        body = await read_body(request, BODY_BYTES_MOST, 0.3)
    except CairnError as error:
        answer.send(error.status, REASON_PHRASES[error.status], [], b"")
        return
    answer.send(200, b"OK", [], bytes(body))


def mutated(random: Random) -> bytes:
    """One of the cases with up to five bytes or pieces changed, inserted, left out or doubled."""
    message = bytearray(random.choice(SEEDS))
    for _ in range(random.randrange(6)):
        change_at(random, message, random.randrange(len(message) + 1), INSERTED)
    return bytes(message)


async def visit(port: int, random: Random) -> None:
    """One connection: in two pieces, left in one of four ways."""
    message = mutated(random)
    cut, way = random.randrange(len(message) + 1), random.randrange(4)
    try:
        async with asyncio.timeout(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(message[:cut])
                await asyncio.sleep(0)
                writer.write(message[cut:])
                if way == 0:
                    writer.transport.abort()
                    return
                if way == 1:
                    writer.write_eof()
                if way == 2:
                    writer.write(b"\r\n\r\nbad\r\n\r\n")
                await reader.read()
            finally:
                writer.close()
    except ConnectionError:
        pass  # the server closed while this client was still sending


async def attack(server: ClientServer, port: int, random: Random, connections: int) -> int:
    """Visit; give the number of objects once all are gone."""
    for _ in range(connections // AT_ONCE):
        await asyncio.gather(*[visit(port, random) for _ in range(AT_ONCE)])
    await eventually(lambda: not len(server))
    assert (server.heads.used, server.bodies.used) == (0, 0)
    gc.collect()
    return len(gc.get_objects())


def test_mutated_input_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """On the loop that serves: connections, descriptors, budgets and objects are as before; a hang is a failure."""

    async def main() -> tuple[int, int]:
        server = client_server(
            echo, body_bytes=BODY_BYTES_MOST, head_seconds=0.1, keepalive_seconds=0.2, linger_seconds=0.1
        )
        random = Random(17)
        async with served_by(server) as port:
            before = await attack(server, port, random, 2 * AT_ONCE)  # fills what is kept for good
            descriptors = len(os.listdir("/dev/fd"))
            after = await attack(server, port, random, CONNECTIONS)
            assert len(os.listdir("/dev/fd")) <= descriptors
        return before, after

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        before, after = runner.run(main())
    assert after - before <= OBJECTS_PER_CONNECTION_MOST * CONNECTIONS
    assert caplog.records == []

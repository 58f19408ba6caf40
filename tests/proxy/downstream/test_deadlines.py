"""Deadlines of connections, by a clock of the test: bodies, slow readers, idle connections."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.downstream.body import GRACE_SECONDS
from proxy.downstream.body_reader import read_body, stream_body
from proxy.downstream.connection import Connection
from proxy.downstream.errors import BadHttp, ClientStalled
from proxy.downstream.limits import connections_within
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from proxy.downstream.server import ClientServer, network_of
from proxy.errors import CairnError
from tests.proxy.downstream.test_cuts import Line, deliver
from tests.support.answering import Counts, Play, client_server
from tests.support.clock import FakeClock

RATE = 100  # bytes a second
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n"


class SlowLine(Line):
    """A connection whose unsent bytes are set by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent_bytes = self.aborts = 0
        self.ends: list[str] = []  # of the sending side, by the call

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def abort(self) -> None:
        self.aborts += 1

    def close(self) -> None:
        self.ends.append("close")
        super().close()

    def write_eof(self) -> None:
        self.ends.append("write_eof")
        super().close()


class Port:
    """A client port with one connection, and a clock that the test moves."""

    def __init__(self, play: Play, **limits: Any) -> None:
        self.clock, self.counts, self.line = FakeClock(), Counts(), SlowLine()
        limits = {"body_bytes_per_second": RATE, **limits}
        self.server: ClientServer = client_server(play, self.counts, self.clock, **limits)
        self.connection: Connection = self.server.connect()
        self.connection.connection_made(self.line)

    async def send(self, piece: bytes) -> None:
        await deliver(self.connection, self.line, piece)
        await self.settle()

    async def after(self, seconds: float) -> None:
        """Let time pass, and let the server look."""
        self.clock.advance(seconds)
        self.server.look()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)

    async def end(self) -> None:
        self.connection.connection_lost(None)
        await self.settle()
        await self.server.close()
        assert (self.server.heads.used, self.server.bodies.used) == (0, 0)


async def read(asked: IncomingRequest, answer: ClientResponse) -> None:
    try:
        await read_body(asked, 2**20, 300.0)
    except CairnError as error:
        answer.send(error.status, b"No", [], b"")
    else:
        answer.send(200, b"OK", [], b"")


async def stream(asked: IncomingRequest, answer: ClientResponse) -> None:
    try:
        async for _ in stream_body(asked, 30.0):
            pass
    except CairnError as error:
        answer.send(error.status, b"No", [], b"")


async def test_a_connection_that_comes_after_the_end_is_not_served() -> None:
    """It is reset, since the upstream client is closed by then; its client may send the request elsewhere."""
    port = Port(read)
    await port.end()
    late, line = port.server.connect(), SlowLine()
    late.connection_made(line)
    assert (line.aborts, line.written) == (1, b"")
    late.connection_lost(None)
    assert len(port.server) == 0


@pytest.mark.parametrize("play", [read, stream])
async def test_a_body_keeps_a_least_rate_after_its_first_seconds(play: Play) -> None:
    """As long as it does it may take its time; a trickle below the rate is a 408."""
    port = Port(play)
    await port.send(HEAD)
    await port.after(GRACE_SECONDS - 1)
    for _ in range(20):
        await port.send(b"x" * 110)
        await port.after(1)
    assert port.line.written == b""
    for _ in range(40):
        await port.send(b"x" * 50)
        await port.after(1)
    assert port.line.written.startswith(b"HTTP/1.1 408 ")
    assert port.counts.errors == {BadHttp.BODY_LATE: 1}
    await port.end()


async def test_a_body_that_is_handed_on_must_not_stand_still() -> None:
    """However much of it has come before."""
    port = Port(stream)
    await port.send(HEAD + b"x" * 50_000)
    await port.after(29)
    assert port.line.written == b""
    await port.after(2)
    assert port.line.written.startswith(b"HTTP/1.1 408 ")
    await port.end()


async def test_a_body_that_is_read_has_a_limit_in_all() -> None:
    """However steadily it comes."""
    port = Port(read)
    await port.send(HEAD + b"x" * 60_000)
    for _ in range(29):
        await port.send(b"x" * 1000)
        await port.after(10)
    assert port.line.written == b""
    await port.after(11)
    assert port.line.written.startswith(b"HTTP/1.1 408 ")
    await port.end()


@pytest.mark.parametrize(("keepalive_seconds", "allowed_seconds"), [(75, 30), (20, 20)])
async def test_a_head_has_its_time_from_its_first_byte(keepalive_seconds: float, allowed_seconds: float) -> None:
    """However long the connection idled before, and never longer than it might have idled."""
    port = Port(read, head_seconds=30, keepalive_seconds=keepalive_seconds)
    await port.after(keepalive_seconds - 1)
    await port.send(b"GET / HTTP/1.1\r\n")
    await port.after(allowed_seconds - 1)
    await port.send(b"host: x\r\n")
    assert port.line.written == b""
    await port.after(2)
    assert port.line.written.startswith(b"HTTP/1.1 408 ")
    assert port.line.written.endswith(b"\r\n\r\nThe head of the request did not arrive in time.")
    assert port.counts.errors == {BadHttp.HEAD_LATE: 1}
    await port.end()


async def test_an_idle_connection_has_its_time_from_its_last_answer() -> None:
    """A second of it while the worker drains."""
    port = Port(read, keepalive_seconds=75)
    for _ in range(2):
        await port.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        port.line.written = b""
        await port.after(74)
        assert not port.line.is_closing()
    await port.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    await port.server.drain(0)
    await port.after(0.5)
    assert not port.line.is_closing()
    await port.after(1)
    assert port.line.is_closing()
    await port.end()


async def test_a_connection_that_comes_while_the_worker_drains_may_idle_for_a_second_only() -> None:
    """It had waited to be accepted; one that never sends a request must not hold up the drain."""
    port = Port(read, keepalive_seconds=75)
    await port.server.drain(0)
    late, line = port.server.connect(), SlowLine()
    late.connection_made(line)
    await port.after(0.5)
    assert not line.is_closing()
    await port.after(1)
    assert line.is_closing()
    late.connection_lost(None)
    await port.end()


async def test_a_client_that_reads_slowly_keeps_its_connection_and_one_that_stops_loses_it() -> None:
    """Progress is what counts, not how long the rest takes."""
    failures: list[tuple[type[BaseException], str]] = []

    async def pour(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None)
        port.connection.pause_writing()
        try:
            await answer.drained()
        except ConnectionResetError as error:
            failures.append((type(error), str(error)))
            raise

    port = Port(pour, write_seconds=10)
    port.line.unsent_bytes = 100_000
    await port.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    for _ in range(5):
        port.line.unsent_bytes -= 1000
        await port.after(11)
    assert port.line.aborts == 0
    await port.after(11)
    assert port.line.aborts > 0
    assert failures == [(ClientStalled, "the client stopped reading")]
    assert port.counts.errors == {BadHttp.READ_LATE: 1}
    await port.end()


async def test_an_idle_connection_whose_answer_is_still_being_read_is_kept() -> None:
    """Until its client stops reading."""

    async def send(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.send(200, b"OK", [], b"x" * 1000)
        port.line.unsent_bytes = 1000

    port = Port(send, keepalive_seconds=5, write_seconds=10)
    await port.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    await port.after(6)
    port.line.unsent_bytes = 500
    await port.after(11)
    assert not port.line.is_closing()
    await port.after(11)
    assert port.line.is_closing()
    await port.after(11)
    await port.after(11)
    assert port.line.aborts > 0
    await port.end()


async def test_a_connection_that_lingers_is_aborted_when_its_client_never_closes() -> None:
    """Bytes that it sends meanwhile are dropped."""

    async def refuse(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.send(403, b"No", [], b"")

    port = Port(refuse, linger_seconds=2)
    await port.send(HEAD)
    assert port.line.is_closing()  # its sending side, of this connection
    await port.send(b"x" * 50_000)
    assert port.server.bodies.used == 0
    await port.after(3)
    assert port.line.aborts > 0
    await port.end()


def test_connections_leave_descriptors_for_their_upstreams() -> None:
    """Two for each, and some to spare; a limit that is too small for any allows one."""
    assert connections_within(8192, 1024) == 448
    assert connections_within(100, 1024) == 100
    assert connections_within(100, 64) == 1
    assert connections_within(100, -1) == 100


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_addresses_of_one_client_count_together(address: str, network: str) -> None:
    """A host with IPv6 has a whole network of addresses."""
    assert network_of(address) == network

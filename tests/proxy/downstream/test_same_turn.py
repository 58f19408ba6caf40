"""Things that come in the same turn of the loop, at a connection fed by hand: each has one defined outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from proxy.downstream.body import GRACE_SECONDS, overloaded
from proxy.downstream.body_reader import read_body
from proxy.downstream.errors import BadHttp, ClientLimit
from proxy.downstream.limits import Limits
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from proxy.downstream.server import _look_seconds
from proxy.errors import CairnError, Overloaded
from tests.proxy.downstream.test_cuts import post
from tests.proxy.downstream.test_deadlines import HEAD, Port, read

CHUNKED = HEAD.replace(b"content-length: 100000", b"transfer-encoding: chunked")
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def greet(asked: IncomingRequest, answer: ClientResponse) -> None:
    answer.send(200, b"OK", [], b"hello")


async def refuse(asked: IncomingRequest, answer: ClientResponse) -> None:
    answer.send(403, b"No", [], b"")


# -- the client leaves


@pytest.mark.parametrize("goes_on", ["send", "drained", "return"])
async def test_a_handler_that_finishes_after_its_client_left_harms_nothing(goes_on: str) -> None:
    """As settling does, which is shielded from the client's leaving."""
    ends: list[str] = []

    async def settle(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], 5)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
        try:
            if goes_on == "drained":
                await answer.drained()
            elif goes_on == "send":
                await answer.write(b"hello")
                answer.end()
        except ConnectionResetError:
            ends.append("reset")

    port = Port(settle)
    await port.send(GET)
    port.line.closed = True
    port.connection.connection_lost(None)
    await port.settle()
    assert ends == (["cancelled"] if goes_on == "return" else ["cancelled", "reset"])
    assert port.line.written.count(b"hello") == 0
    await port.server.close()
    assert (len(port.server), port.server.heads.used, port.server.bodies.used) == (0, 0, 0)


async def test_a_client_that_leaves_before_its_request_began_is_not_served() -> None:
    served: list[str] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        served.append(asked.target)

    port = Port(play)
    room = port.connection.get_buffer(-1)
    room[: len(GET)] = GET
    port.connection.buffer_updated(len(GET))
    port.connection.connection_lost(None)
    await port.settle()
    assert served == []
    await port.server.close()


@pytest.mark.parametrize("ends", ["is aborted", "gets a bad head", "runs out of time"])
async def test_nothing_is_written_to_a_transport_that_is_closing(ends: str) -> None:
    """The client closed its side, and the loop has yet to say so."""
    port = Port(greet)
    await port.send(b"GET / HTTP/1.1\r\n")
    port.line.closed = True
    if ends == "gets a bad head":
        await port.send(b"no header\r\n\r\n")
        assert port.counts.errors == {BadHttp.HEADER: 1}
    elif ends == "runs out of time":
        await port.after(1_000)
        assert port.counts.errors == {BadHttp.HEAD_LATE: 1}
    else:
        port.connection.abort()
    assert port.line.written == b""
    await port.end()


async def test_a_client_that_left_is_noticed_by_the_next_write() -> None:
    """The handler need not have waited for anything."""
    ends: list[str] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None)
        port.line.closed, port.line.written = True, b""
        answer.write_last(b"abc")
        try:
            answer.offer(b"abc")
        except ConnectionResetError as error:
            ends.append(str(error))
            raise

    port = Port(play)
    await port.send(GET)
    assert (ends, port.line.written) == (["the client left"], b"")
    await port.end()


async def test_a_request_that_comes_as_its_connection_is_ended_is_not_answered() -> None:
    """The task that waits for it has been cancelled and has not run since."""
    port = Port(greet)
    await port.send(GET)
    port.line.written = b""
    closing = asyncio.get_running_loop().create_task(port.server.close())
    await asyncio.sleep(0)
    room = port.connection.get_buffer(-1)
    room[: len(GET)] = GET
    port.connection.buffer_updated(len(GET))
    await port.settle()
    port.connection.connection_lost(None)
    await closing
    assert port.line.written == b""


# -- a client that reads slowly


async def test_a_client_that_caught_up_in_the_turn_of_its_deadline_keeps_its_connection() -> None:
    """It has read everything, so no bytes are left by which its progress could be seen."""
    ends: list[str] = []

    async def pour(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None)
        await answer.drained()
        ends.append("drained")
        answer.end()

    port = Port(pour, write_seconds=10)
    port.connection.pause_writing()
    port.line.unsent_bytes = 100_000
    await port.send(GET)
    port.clock.advance(11)
    port.line.unsent_bytes = 0
    port.connection.resume_writing()
    port.server.look()
    await port.settle()
    assert (ends, port.line.aborts, port.counts.errors) == (["drained"], 0, {})
    assert port.line.written.endswith(b"0\r\n\r\n")
    await port.end()


async def test_a_client_that_is_not_behind_is_not_waited_for() -> None:
    """Nor does it matter that it was behind before, with nobody waiting."""
    done: list[bool] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], None)
        await answer.drained()
        done.append(True)
        answer.end()

    port = Port(play)
    for _ in range(2):
        await port.send(GET)
        port.connection.pause_writing()
        port.connection.resume_writing()
    assert done == [True, True]
    await port.end()


# -- bodies


async def test_a_read_that_lands_in_a_body_which_is_over_by_then_is_dropped() -> None:
    """The loop was given the body's buffer before the answer, and filled it after."""
    gate = asyncio.Event()

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        await gate.wait()
        answer.send(403, b"No", [], b"")

    port = Port(play)
    await port.send(HEAD + b"x" * 100)
    room = memoryview(port.connection.get_buffer(-1))
    gate.set()
    await port.settle()
    room[:10] = b"x" * 10
    port.connection.buffer_updated(10)
    assert port.line.written.startswith(b"HTTP/1.1 403 No")
    assert port.server.bodies.used == 0
    await port.end()


async def test_a_body_that_came_with_its_head_is_refused_when_bodies_have_no_room() -> None:
    """The bytes of other bodies count; alone, a body may exceed the limit. All of it is given back."""
    outcomes: list[object] = []
    gate = asyncio.Event()

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        try:
            outcomes.append(len(await read_body(asked, 2**20, 300.0)))
        except CairnError as error:
            outcomes.append(type(error))
        await gate.wait()
        answer.send(200, b"OK", [], b"")

    port = Port(play, body_bytes_in_flight=1_000)
    await port.send(post(b"x" * 2_000))
    other = port.server.connect()
    line = type(port.line)()
    other.connection_made(line)
    sent = post(b"y" * 10)
    other.get_buffer(-1)[: len(sent)] = sent
    other.buffer_updated(len(sent))
    await port.settle()
    assert outcomes == [2_000, Overloaded]
    assert port.counts.refusals == {ClientLimit.BODY_BYTES: 1}
    assert port.server.bodies.used == 2_010
    gate.set()
    await port.settle()
    assert port.server.bodies.used == 0
    other.connection_lost(None)
    await port.end()


async def test_what_comes_of_a_body_that_has_failed_is_dropped() -> None:
    """By its length and by its chunks; the client is answered once."""
    for head in (HEAD, CHUNKED):
        port = Port(read)
        await port.send(head)
        await port.after(GRACE_SECONDS + 1)
        assert port.line.written.startswith(b"HTTP/1.1 408 ")
        await port.send(b"3\r\nabc\r\n")
        assert (port.server.bodies.used, port.line.written.count(b"HTTP/1.1")) == (0, 1)
        await port.end()


async def test_pieces_of_a_failed_body_are_dropped_while_its_handler_still_runs() -> None:
    """The handler has seen the error and has not answered yet."""
    gate = asyncio.Event()
    errors: list[int] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        for _ in range(2):
            try:
                await read_body(asked, 2**20, 300.0)
            except CairnError as error:
                errors.append(error.status)
            await gate.wait()
        answer.send(408, b"Late", [], b"")

    for sent in (HEAD, CHUNKED):
        gate.clear()
        errors.clear()
        port = Port(play)
        await port.send(sent)
        await port.after(GRACE_SECONDS + 1)
        await port.send(b"3\r\nabc\r\n")
        assert (errors, port.server.bodies.used) == ([408], 0)
        gate.set()
        await port.settle()
        assert errors == [408, 408], "whenever it is read"
        await port.end()


async def test_a_body_without_a_least_rate_has_its_limit_alone() -> None:
    """A rate of 0 is none."""
    port = Port(read, body_bytes_per_second=0)
    await port.send(HEAD)
    await port.after(299)
    assert port.line.written == b""
    await port.after(2)
    assert port.line.written.startswith(b"HTTP/1.1 408 ")
    await port.end()


async def test_a_chunk_over_the_limit_is_refused_while_its_body_is_awaited() -> None:
    """By its size line, before a byte of it."""
    port = Port(read)
    await port.send(CHUNKED)
    await port.send(b"3\r\nabc\r\n")
    await port.send(b"ffffff\r\n")
    assert port.line.written.startswith(b"HTTP/1.1 413 ")
    await port.end()


# -- requests sent ahead


async def test_once_requests_ahead_found_no_room_none_that_follow_are_kept() -> None:
    """The answer under way is the last, and tells the client so."""
    gate = asyncio.Event()

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        await gate.wait()
        answer.send(200, b"OK", [], asked.target.encode())

    port = Port(play, head_bytes_in_flight=40)
    await port.send(GET)
    for held_bytes in (len(GET), 0, 0):
        await port.send(GET)
        assert port.server.heads.used == held_bytes
    assert port.counts.refusals == {ClientLimit.HEAD_BYTES: 1}
    gate.set()
    await port.settle()
    assert port.line.written.count(b"HTTP/1.1 200 OK") == 1
    assert b"connection: close" in port.line.written
    await port.end()


Play = Callable[[IncomingRequest, ClientResponse], Awaitable[None]]


@pytest.mark.parametrize(("play", "status"), [(greet, b"200"), (refuse, b"403")])
async def test_a_client_that_asked_for_the_end_and_sent_more_is_read_until_it_closes(
    play: Play, status: bytes
) -> None:
    """Closing at once would reset the connection under the answer."""
    last = GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    for sent, ends in ((last + GET, ["write_eof"]), (last, ["close"])):
        port = Port(play)
        await port.send(sent)
        assert port.line.written.startswith(b"HTTP/1.1 " + status)
        assert port.line.written.count(b"HTTP/1.1") == 1
        assert port.line.ends == ends
        await port.end()


async def test_a_connection_without_room_tells_its_client_to_come_again() -> None:
    """The code and the seconds are what a client's library acts upon."""
    error = overloaded()
    assert (error.status, error.code, error.retry_after_seconds) == (503, "proxy_overloaded", 1.0)
    assert error.message == "Too many requests at once."
    assert "many requests" in error.message


async def test_a_request_knows_the_address_from_which_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """None for a local socket, whose peers have no address."""
    for peername, expected in ((("10.0.0.9", 4711), "10.0.0.9"), ("", ""), (None, "")):
        peers: list[str] = []

        async def play(asked: IncomingRequest, answer: ClientResponse, peers: list[str] = peers) -> None:
            peers.append(asked.peer)
            answer.send(200, b"OK", [], b"")

        port = Port(play)
        connection = port.server.connect()
        line = type(port.line)()
        monkeypatch.setattr(line, "get_extra_info", {"peername": peername}.get)
        connection.connection_made(line)
        connection.get_buffer(-1)[: len(GET)] = GET
        connection.buffer_updated(len(GET))
        await port.settle()
        assert peers == [expected]
        connection.connection_lost(None)
        await port.end()


async def test_a_connection_is_idle_too_long_from_the_moment_of_its_deadline() -> None:
    port = Port(greet, keepalive_seconds=75)
    await port.after(74.5)
    assert not port.line.is_closing()
    await port.after(0.5)
    assert port.line.is_closing()
    await port.end()


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        (Limits(), 0.5),
        (Limits(linger_seconds=60), 1.0),
        (Limits(write_seconds=1.0), 0.25),
        (Limits(head_seconds=0.4), 0.1),
        (Limits(keepalive_seconds=0.2), 0.05),
        (Limits(body_seconds=0.8), 0.2),
        (Limits(head_seconds=0.001), 0.01),
    ],
)
def test_deadlines_are_looked_at_four_times_in_the_shortest_limit(limits: Limits, seconds: float) -> None:
    """At least once a second, and at most a hundred times."""
    assert _look_seconds(limits) == pytest.approx(seconds)

"""Connections over real sockets: requests in their order, and everything that is not the plain course of them."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from contextlib import suppress

import pytest

from proxy.downstream.body_reader import read_body, stream_body
from proxy.downstream.errors import BadHttp, ClientLimit
from proxy.downstream.request import IncomingRequest
from proxy.downstream.response import ClientResponse
from proxy.errors import CairnError
from tests.support.answering import GET, Counts, client_server, served_by, serving, talk
from tests.support.clock import FakeClock
from tests.support.valkey import eventually

OK = b"HTTP/1.1 200 OK"


async def echo(asked: IncomingRequest, answer: ClientResponse) -> None:
    try:
        body = await read_body(asked, 2**20, 5.0)
    except CairnError as error:
        answer.send(error.status, b"No", [], b"")
        return
    answer.send(200, b"OK", [], asked.method.encode() + b" " + asked.target.encode() + b" " + body)


async def refuse(asked: IncomingRequest, answer: ClientResponse) -> None:
    answer.send(403, b"No", [], asked.target.encode())


async def answer_of(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Status line and body of the next answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head.partition(b"\r\n")[0], await reader.readexactly(length)


def request(path: bytes, more: bytes = b"", body: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b" % (path, more, len(body), body)


async def test_requests_sent_ahead_are_answered_in_their_order() -> None:
    """Short ones, long ones and chunked ones; more of them than may wait, so that reading stops and goes on."""
    async with serving(echo) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        sent, expected = [], []
        for number in range(60):
            body = b"b" * (number * number * 10)
            if number % 3:
                sent.append(request(b"/%d" % number, body=body))
            else:
                head = b"POST /%d HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" % number
                sent.append(head + (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n")
            expected.append((OK, b"POST /%d " % number + body))
        writer.write(b"".join(sent))
        for each in expected:
            assert await answer_of(reader) == each
        writer.close()


async def test_answers_that_are_not_read_hold_up_the_requests_behind_them() -> None:
    """A client that pipelines and does not read makes the server hold a few answers, and loses none once it reads."""
    served = 0

    async def play(_: IncomingRequest, answer: ClientResponse) -> None:
        nonlocal served
        served += 1
        answer.send(200, b"OK", [], b"x" * 2**20)

    async with serving(play) as port, asyncio.timeout(60):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)  # or the kernel may take tens of megabytes
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=client)
        writer.write(request(b"/") * 100)
        before = -1
        while before != served:  # until it stands still
            before = served
            for _ in range(50):
                await asyncio.sleep(0)
        assert served < 30
        for _ in range(100):
            assert (await answer_of(reader))[0] == OK
        writer.close()


async def test_a_client_that_pipelines_takes_turns_with_the_others() -> None:
    """The answer to another client does not wait for all of its requests."""
    served: list[bytes] = []

    async def play(asked: IncomingRequest, answer: ClientResponse) -> None:
        served.append(asked.target.encode())
        answer.send(200, b"OK", [], b"")

    async with serving(play) as port, asyncio.timeout(20):
        _, first = await asyncio.open_connection("127.0.0.1", port)
        reader, second = await asyncio.open_connection("127.0.0.1", port)
        first.write(request(b"/first") * 1000)
        second.write(request(b"/second"))
        assert await answer_of(reader) == (OK, b"")
        assert served.index(b"/second") < 100
        assert len(served) < 200
        first.close()
        second.close()


async def test_a_request_behind_a_refused_upgrade_is_answered() -> None:
    """As `curl --http2` asks for; in one read and in the next."""
    async with serving(echo) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/one", b"connection: upgrade\r\nupgrade: h2c\r\n", b"abc") + request(b"/two"))
        assert await answer_of(reader) == (OK, b"POST /one abc")
        assert await answer_of(reader) == (OK, b"POST /two ")
        writer.write(request(b"/three"))
        assert await answer_of(reader) == (OK, b"POST /three ")
        writer.close()


async def test_what_is_no_request_is_refused_and_ends_the_connection() -> None:
    """Also one that comes behind a good one, whose answer is not lost; it is counted and not repeated."""
    counts = Counts()
    async with served_by(client_server(echo, counts)) as port:
        got = await talk(port, request(b"/good") + b"no request at all\r\n\r\n" + request(b"/never"))
    first, _, second = got.partition(b"POST /good ")
    assert first.startswith(OK)
    assert second.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\nconnection: close\r\n" in second
    assert b"no request" not in second
    assert b"never" not in got
    assert counts.errors == {BadHttp.REQUEST_LINE: 1}


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
    """By its version and its options."""
    async with serving(echo) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        await answer_of(reader)
        if stays:
            writer.write(head)
            await answer_of(reader)
        else:
            assert await reader.read() == b""
        writer.close()


async def test_empty_lines_before_a_request_are_skipped() -> None:
    """As clients of old send them behind a body."""
    async with serving(echo) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/one", body=b"a") + b"\r\n\r\n" + request(b"/two"))
        assert [await answer_of(reader) for _ in range(2)] == [(OK, b"POST /one a"), (OK, b"POST /two ")]
        writer.close()


async def test_an_idle_connection_is_closed_after_its_time() -> None:
    """Counted from the end of its last answer; one that never sent anything, too."""
    clock = FakeClock()
    server = client_server(echo, clock=clock, keepalive_seconds=75)
    async with served_by(server) as port, asyncio.timeout(20):
        silent, silent_writer = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await eventually(lambda: len(server) == 2)
        clock.advance(1)
        writer.write(request(b"/"))
        await answer_of(reader)
        clock.advance(74)
        server.look()
        assert await silent.read() == b""
        writer.write(request(b"/"))
        assert (await answer_of(reader))[0] == OK
        clock.advance(75)
        server.look()
        assert await reader.read() == b""
        writer.close()
        silent_writer.close()


async def test_a_head_has_a_time_for_all_of_it() -> None:
    """However steadily it trickles: 408, and the connection ends."""
    counts = Counts()
    async with served_by(client_server(echo, counts, head_seconds=0.1)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n")

        async def trickle() -> None:
            with suppress(ConnectionError):
                while True:
                    writer.write(b"x: y\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.01)

        trickling = asyncio.get_running_loop().create_task(trickle())
        async with asyncio.timeout(20):
            assert (await answer_of(reader))[0] == b"HTTP/1.1 408 Request Timeout"
            assert await reader.read() == b""
        trickling.cancel()
        assert counts.errors == {BadHttp.HEAD_LATE: 1}
        writer.close()


async def test_a_head_over_its_limit_is_refused_however_it_is_cut() -> None:
    """431, before it is whole."""
    long = b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200
    for pieces in ([long + b"\r\n"], [long], [long[:100], long[100:]]):
        counts = Counts()
        async with served_by(client_server(echo, counts, head_bytes=1000)) as port:
            assert (await talk(port, *pieces)).startswith(b"HTTP/1.1 431 ")
        assert counts.errors == {BadHttp.HEAD_SIZE: 1}


@pytest.mark.parametrize(("target", "status"), [(1000, b"414"), (400, b"431")])
async def test_a_target_over_the_limit_is_told_from_headers(target: int, status: bytes) -> None:
    """RFC 9112 demands this (section 3)."""
    long = b"GET /" + b"a" * target + b" HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200
    for pieces in ([long + b"\r\n"], [long], [long[:100], long[100:]]):
        async with served_by(client_server(echo, Counts(), head_bytes=1000, header_line_bytes=500)) as port:
            assert (await talk(port, *pieces)).startswith(b"HTTP/1.1 " + status)


async def test_a_body_is_asked_for_when_it_is_wanted() -> None:
    """`100 Continue` is sent when the request is accepted, before a byte of the body; and once."""

    async def stream(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.send(200, b"OK", [], b"".join([piece async for piece in stream_body(asked, 5.0)]))

    expect = request(b"/", b"expect: 100-continue\r\n", b"abc")
    for play, body in ((echo, b"POST / abc"), (stream, b"abc")):
        async with serving(play) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(expect[:-3])
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(expect[-3:-1])
            writer.write(expect[-1:])
            assert await answer_of(reader) == (OK, body)
            writer.write(expect)  # what is here already is not asked for
            assert await answer_of(reader) == (OK, body)
            writer.close()


async def test_a_body_that_is_refused_is_not_asked_for() -> None:
    """The final answer comes in place of `100 Continue`, and ends the connection.

    This holds for a body that would pass, too, until its first piece is wanted.
    """

    async def refuse_stream(asked: IncomingRequest, answer: ClientResponse) -> None:
        stream_body(asked, 5.0)
        await refuse(asked, answer)

    for play in (refuse, refuse_stream):
        async with serving(play) as port:
            got = await talk(port, request(b"/", b"expect: 100-continue\r\n", b"abc")[:-3])
        assert got == b"HTTP/1.1 403 No\r\ncontent-length: 1\r\nconnection: close\r\n\r\n/"


async def test_an_early_answer_announces_the_end_and_arrives_whole() -> None:
    """The rest of the body is read and dropped for a while: a reset could lose the answer."""
    async with serving(refuse) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        whole = request(b"/one", body=b"b" * 3_000_000)
        writer.write(whole[:100])
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"\r\nconnection: close\r\n" in head
        writer.write(whole[100:] + request(b"/two"))
        await writer.drain()
        assert await reader.read() == b"/one"
        writer.close()


async def test_a_body_that_came_whole_and_was_not_read_ends_nothing() -> None:
    """The next request is answered."""
    async with serving(refuse) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for path in (b"/one", b"/two"):
            writer.write(request(path, body=b"b" * 300))
            assert await answer_of(reader) == (b"HTTP/1.1 403 No", path)
        writer.close()


async def test_a_client_that_resets_its_connection_during_an_early_answer_fails_no_task() -> None:
    """Its end is noticed only when the server stops sending; to serve it ends like any other connection."""
    gone = socket.socket()
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    served: list[asyncio.Task[object]] = []

    async def answer_and_lose(asked: IncomingRequest, answer: ClientResponse) -> None:
        await refuse(asked, answer)
        gone.close()
        task = asyncio.current_task()
        assert task is not None
        served.append(task)

    server = client_server(answer_and_lose)
    async with served_by(server) as port:
        gone.connect(("127.0.0.1", port))
        gone.sendall(request(b"/one", body=b"b" * 300)[:-1])
        await eventually(lambda: served and not len(server))
        await asyncio.wait(served)
        assert served[0].exception() is None


async def test_a_body_that_never_ends_ends_the_connection() -> None:
    """If nobody wants it, after the lingering time, however steadily it comes."""
    clock = FakeClock()
    server = client_server(refuse, clock=clock, linger_seconds=5)
    async with served_by(server) as port, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/one", body=b"b" * 300_000)[:-1])
        await answer_of(reader)
        await writer.drain()
        clock.advance(4)
        server.look()
        assert len(server) == 1
        with suppress(ConnectionError):
            for _ in range(10):
                writer.write(b"b")
                await asyncio.sleep(0)
            clock.advance(1)
            server.look()
            assert await reader.read() == b""
        await eventually(lambda: not len(server))
        writer.close()


@pytest.mark.parametrize("sent", [b"zz\r\n", b"3\r\nabcd", b"0\r\n: a\r\n"])
async def test_a_body_whose_framing_breaks_is_refused_at_once(sent: bytes) -> None:
    """Nobody waits for the rest; the connection ends."""
    counts = Counts()
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"
    async with served_by(client_server(echo, counts)) as port:
        async with asyncio.timeout(20):
            got = await talk(port, head, sent)
    assert got.startswith(b"HTTP/1.1 400 ")
    assert counts.errors.total() == 1


async def test_a_client_that_leaves_cancels_its_request() -> None:
    """At whatever it awaits, whether it closed or reset its connection."""
    entered, left = asyncio.Queue[None](), asyncio.Queue[None]()

    async def wait(asked: IncomingRequest, answer: ClientResponse) -> None:
        entered.put_nowait(None)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.put_nowait(None)
            raise

    async with serving(wait) as port:
        for way in ("abort", "close"):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request(b"/"))
            await entered.get()
            getattr(writer.transport, way)()
            async with asyncio.timeout(20):
                await left.get()


async def test_a_client_that_leaves_inside_a_body_cancels_its_request() -> None:
    """Its bytes are given back to the budget."""
    server = client_server(echo)
    async with served_by(server) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/", body=b"x" * 500_000)[:400_000])
        await writer.drain()
        async with asyncio.timeout(20):
            await eventually(lambda: server.bodies.used >= 399_000)
            writer.transport.abort()
            await eventually(lambda: not server.bodies.used and not len(server))


async def test_a_drain_loses_no_request_of_a_busy_connection() -> None:
    """Each client is told `Connection: close` with an answer to what it sent, and only then its connection ends."""
    server = client_server(echo, drain_idle_seconds=60)
    async with served_by(server) as port:
        lines = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
        for reader, writer in lines:
            writer.write(request(b"/one"))
            await answer_of(reader)
        draining = asyncio.get_running_loop().create_task(server.drain(60.0))
        await eventually(lambda: server.is_draining)
        for reader, writer in lines:
            writer.write(request(b"/two"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(OK)
            assert b"\r\nconnection: close\r\n" in head
            assert await reader.read() == b"POST /two "
            writer.close()
        async with asyncio.timeout(20):
            await draining


async def test_a_drain_serves_all_connections_that_wait_to_be_accepted() -> None:
    """The loop takes one of them each time it polls; when the listening socket is closed the rest are reset."""
    server = client_server(echo, drain_idle_seconds=60)
    async with served_by(server) as port:
        waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(30)]  # the loop does not run
        for each in waiting:
            each.sendall(request(b"/one"))
        draining = asyncio.get_running_loop().create_task(server.drain(60.0))
        async with asyncio.timeout(20):
            for each in waiting:
                reader, writer = await asyncio.open_connection(sock=each)
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(OK)
                assert b"\r\nconnection: close\r\n" in head
                assert await reader.read() == b"POST /one "
                writer.close()
            await draining


async def test_a_drain_without_connections_is_over_in_a_few_turns_of_the_loop() -> None:
    """Nobody need wait for those that might still come."""
    draining = asyncio.get_running_loop().create_task(client_server(echo).drain(60.0))
    for _ in range(10):
        await asyncio.sleep(0)
    assert draining.done()


async def test_a_drain_waits_for_what_runs_and_not_for_what_idles() -> None:
    """An idle connection is kept for a second; one that was told to end is not waited for longer."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def wait(asked: IncomingRequest, answer: ClientResponse) -> None:
        answer.begin(200, b"OK", [], 4)
        entered.set()
        await go_on.wait()
        await answer.write(b"done")
        answer.end()

    server = client_server(wait, drain_idle_seconds=0.05, linger_seconds=0.2)
    async with served_by(server) as port:
        idle, idle_writer = await asyncio.open_connection("127.0.0.1", port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/"))
        await entered.wait()
        draining = asyncio.get_running_loop().create_task(server.drain(60.0))
        async with asyncio.timeout(20):
            assert await idle.read() == b""
            assert not draining.done()
            go_on.set()
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(OK)
            assert await reader.read() == b"done"
            await draining
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        idle_writer.close()


@pytest.mark.parametrize("limit", [ClientLimit.CONNECTIONS, ClientLimit.CONNECTIONS_PER_ADDRESS])
async def test_connections_are_bounded_in_all_and_by_address(limit: ClientLimit) -> None:
    """One too many is told so and closed; when one goes, another may come."""
    counts = Counts()
    server = client_server(echo, counts, None, **{limit.value: 2})
    async with served_by(server) as port:
        lines = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        for reader, writer in lines:
            writer.write(request(b"/"))
            await answer_of(reader)
        assert (await talk(port)).startswith(b"HTTP/1.1 503 ")
        assert counts.refusals == {limit: 1}
        lines[0][1].close()
        await eventually(lambda: len(server) == 1)
        assert (await talk(port, GET)).startswith(OK)
        server.look()
        assert counts.gauges[0] <= 2
        lines[1][1].close()


async def test_a_connection_that_was_accepted_elsewhere_is_served_and_counts() -> None:
    """Its client may have sent a request before. One whose client is gone costs nothing."""
    counts = Counts()
    server = client_server(echo, counts, None, connections_per_address=1)
    async with served_by(server) as port:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            gone = socket.create_connection(listening.getsockname())
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.close()
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            writer.write(request(b"/sent-before"))
            for _ in range(2):
                server.adopt(listening.accept()[0])
        assert await answer_of(reader) == (OK, b"POST /sent-before ")
        assert (await talk(port)).startswith(b"HTTP/1.1 503 ")
        assert counts.refusals == {ClientLimit.CONNECTIONS_PER_ADDRESS: 1}
        writer.close()


async def test_a_connection_that_was_accepted_elsewhere_does_not_block_the_loop() -> None:
    """Uvloop leaves a socket as it is: a write to a client that does not read would stop all others."""
    server = client_server(echo)
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()):
        connection = listening.accept()[0]
        server.adopt(connection)
        await eventually(lambda: len(server) == 1)
        assert not connection.getblocking()
        await server.close()


async def test_unfinished_heads_are_bounded_in_all() -> None:
    """The one that finds no room is refused; what they took is given back."""
    counts = Counts()
    server = client_server(echo, counts, head_bytes_in_flight=2_500)
    async with served_by(server) as port:
        lines = []
        for _ in range(2):
            line = await asyncio.open_connection("127.0.0.1", port)
            line[1].write(b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 1000)
            lines.append(line)
            await eventually(lambda: server.heads.used >= 1000 * len(lines))
        got = await talk(port, b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 1000)
        assert got.startswith(b"HTTP/1.1 503 ")
        assert counts.refusals == {ClientLimit.HEAD_BYTES: 1}
        for reader, writer in lines:
            writer.write(b"\r\n\r\n")
            assert (await answer_of(reader))[0] == OK
            writer.close()
        assert server.heads.used == 0


async def test_requests_ahead_that_find_no_room_are_not_answered_and_the_client_is_told() -> None:
    """The present answer is the connection's last; what was sent ahead takes no room."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def wait(asked: IncomingRequest, answer: ClientResponse) -> None:
        entered.set()
        await go_on.wait()
        answer.send(200, b"OK", [], b"done")

    counts = Counts()
    server = client_server(wait, counts, head_bytes_in_flight=500)
    async with served_by(server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/one"))
        await entered.wait()
        _, other = await asyncio.open_connection("127.0.0.1", port)
        other.write(b"GET / HTTP/1.1\r\n")
        await eventually(lambda: server.heads.used == 16)
        writer.write(request(b"/two", body=b"x" * 600))
        await eventually(lambda: counts.refusals[ClientLimit.HEAD_BYTES])
        assert server.heads.used == 16
        go_on.set()
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert b"\r\nconnection: close" in head
        assert body == b"done"
        writer.close()
        other.close()


async def test_bodies_are_bounded_by_what_has_come_of_them() -> None:
    """Those that only declare a length take no room; one that grows beyond the bound is refused."""
    counts = Counts()
    server = client_server(echo, counts, body_bytes_in_flight=300_000)
    async with served_by(server) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        for _, writer in silent:
            writer.write(request(b"/", body=b"x" * 100_000)[:100])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/", body=b"x" * 200_000))
        assert (await answer_of(reader))[0] == OK
        growing = request(b"/", body=b"x" * 250_000)
        writer.write(growing[:-1])
        async with asyncio.timeout(20):
            await eventually(lambda: server.bodies.used >= 240_000)
            assert (await talk(port, growing)).startswith(b"HTTP/1.1 503 ")
        assert counts.refusals[ClientLimit.BODY_BYTES] >= 1
        writer.write(growing[-1:])
        assert (await answer_of(reader))[0] == OK
        for _, writer in silent:
            writer.close()


async def test_a_request_leaves_nothing_behind_on_a_connection_that_rests() -> None:
    """Neither its body nor its bytes in the budgets stay."""
    server = client_server(echo)
    async with served_by(server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for size in (10, 60_000, 500_000):
            writer.write(request(b"/", body=b"x" * size))
            await answer_of(reader)
            async with asyncio.timeout(20):
                await eventually(lambda: not server.bodies.used)
        writer.close()


async def test_a_drain_ends_what_does_not_end_in_its_time(caplog: pytest.LogCaptureFixture) -> None:
    """The request is cancelled, its connection closed, and the log says how many there were."""
    entered, left = asyncio.Event(), asyncio.Event()

    async def wait(asked: IncomingRequest, answer: ClientResponse) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    server = client_server(wait)
    async with served_by(server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(b"/"))
        await entered.wait()
        await server.drain(0.05)
        assert caplog.messages == ["closing 1 connections that have not ended in time"]
        assert not left.is_set()
        await server.close()
        assert left.is_set()
        with suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


async def test_connections_that_the_limit_of_open_files_allows_no_more_are_answered_503(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process with 138 descriptors takes five clients; a sixth is told, and takes the place of one that leaves."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (138, 4096))
    counts = Counts()
    async with served_by(client_server(echo, counts)) as port:
        lines = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
        for reader, writer in lines:
            writer.write(request(b"/"))
            assert (await answer_of(reader))[0] == OK
        assert (await talk(port, request(b"/"))).startswith(b"HTTP/1.1 503 ")
        assert counts.refusals == {ClientLimit.CONNECTIONS: 1}
        lines[0][1].close()

        async def served() -> bool:
            return (await talk(port, GET)).startswith(b"HTTP/1.1 200 ")

        await eventually(served)
        for _, writer in lines[1:]:
            writer.close()

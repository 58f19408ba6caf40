"""The HTTP server before a pipeline of the test: what it hands over, and every way in which a request can fail."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proxy.accounting.access_log import route_of
from proxy.config.schema import Config, Contexts, Server
from proxy.downstream.response import Downstream
from proxy.errors import REASON_PHRASES, BadRequest, CairnError
from proxy.metrics.recorder import Recorder
from proxy.pipeline.admission import Authenticator, InFlightLimit, KnownClient
from proxy.pipeline.dispatch import Upload
from proxy.pipeline.page_guard import PageGuard
from proxy.pipeline.routes import Routes
from proxy.records import Call
from proxy.wire.errors import error_response
from proxy.worker.http_server import HttpServer
from proxy.worker.port_settings import port_settings
from tests.support.answering import served_by, talk
from tests.support.clock import FakeClock
from tests.support.loops import STANDARD_LOOP_PAUSES_WRITERS
from tests.support.valkey import eventually

Play = Callable[[Call, Downstream, Upload | None], Awaitable[None]]
OK = REASON_PHRASES[200]
CLIENTS = [KnownClient(hashlib.sha256(b"b").digest(), "bob")]


class Pipeline:
    """Answers by `play`, and remembers what it was given."""

    def __init__(self, play: Play) -> None:
        self._play = play
        self.calls: list[Call] = []
        self.errors: list[CairnError] = []
        self.turned_away: list[Call] = []

    async def handle(self, call: Call, client: Downstream, upload: Upload | None = None) -> None:
        self.calls.append(call)
        await self._play(call, client, upload)

    def turn_away(self, call: Call, error: CairnError, client: Downstream) -> None:
        self.errors.append(error)
        self.turned_away.append(call)
        response = error_response(error, call.endpoint, request_id=call.request_id)
        client.send(response.status, REASON_PHRASES[response.status], response.headers, response.body)


async def echo(call: Call, client: Downstream, upload: Upload | None) -> None:
    body = bytes(call.body)
    if upload is not None:
        body = b"".join([piece async for piece in upload.pieces])
    client.send(200, OK, [], body)


class Running:
    """A server with its parts."""

    def __init__(self, server: HttpServer, pipeline: Pipeline, room: InFlightLimit, port: int) -> None:
        self.server = server
        self.pipeline = pipeline
        self.room = room
        self.port = port

    async def ask(self, head: bytes, body: bytes = b"", target: bytes = b"/v1/chat/completions") -> tuple[int, bytes]:
        """Status and body of the answer to a POST with `head`, on a connection of its own."""
        line = b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\n" % target
        got = await talk(self.port, line + head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return int(got[9:12]), got.partition(b"\r\n\r\n")[2]


@asynccontextmanager
async def running(
    play: Play = echo,
    *,
    max_requests: int = 10,
    authenticator: Authenticator | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    pipeline, room = Pipeline(play), InFlightLimit(max_requests)
    server = HttpServer(
        port_settings(Config(server=Server(**settings), contexts=Contexts(max_context_bytes=1024))),
        routes=Routes((), (), 8090),
        authenticator=authenticator or Authenticator(CLIENTS, b"secret"),
        room=room,
        pipeline=pipeline,
        recorder=Recorder(),
        clock=FakeClock(),
        new_id=lambda: "made-id",
    )
    async with served_by(server.clients) as port:
        yield Running(server, pipeline, room, port)
        await eventually(lambda: room.requests == 0 and server.clients.bodies.used == 0)


KEY = b"authorization: Bearer b\r\n"


async def test_what_is_held_of_a_body_that_passes_has_its_room_and_is_given_back() -> None:
    """Also if the request ends while something is held."""

    async def hold(call: Call, client: Any, upload: Upload | None) -> None:
        assert upload is not None
        assert upload.room is not None
        for nbytes, used in ((100, 100), (40, 40), (0, 0), (900, 900)):
            upload.room.hold(nbytes)
            assert bodies().used == len(b"x") + used
        bodies().take(200)
        try:
            upload.room.hold(1000)
        finally:
            bodies().give(200)

    def bodies() -> Any:
        return port.server.clients.bodies

    async with running(hold, max_in_flight_bytes=1000) as port:
        assert (await port.ask(KEY, b"x", b"/v1/files"))[0] == 503
        assert [error.code for error in port.pipeline.errors] == ["proxy_overloaded"]


async def test_a_request_is_handed_over_with_who_asks_and_what_was_sent() -> None:
    """Headers in lower case, the client's own id if it is a good one, and the body whole."""
    async with running() as port:
        assert await port.ask(KEY + b"X-Request-Id: mine\r\nX-A: \xff\r\n", b"{}") == (200, b"{}")
        assert await port.ask(KEY + b"x-request-id: not a good one\r\n", b"{}") == (200, b"{}")
    first, second = port.pipeline.calls
    assert (first.request_id, second.request_id) == ("mine", "made-id")
    assert (first.method, first.target, first.tenant.name) == ("POST", "/v1/chat/completions", "bob")
    assert (b"x-a", b"\xff") in first.headers
    assert bytes(first.body) == b"{}"


async def test_an_upload_is_handed_on_as_it_comes() -> None:
    """It is not read before the pipeline wants it."""
    async with running() as port:
        assert await port.ask(KEY, b"x" * 300_000, b"/v1/files") == (200, b"x" * 300_000)
    assert port.pipeline.calls[0].body == b""


async def test_a_stranger_is_refused_without_a_look_at_the_body() -> None:
    """401, although the body is not there and would be too large."""
    async with running(max_body_bytes=10) as port:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999\r\n\r\n"
        assert (await talk(port.port, head)).startswith(b"HTTP/1.1 401 ")
    assert port.pipeline.calls == []


async def test_a_page_of_another_site_is_refused_without_a_look_at_the_body() -> None:
    """403: the method and the headers decide."""
    async with running(authenticator=Authenticator((), b"secret", pages=PageGuard())) as port:
        assert (await port.ask(b"origin: https://evil.example\r\n", b"{}"))[0] == 403
        assert (await port.ask(b"", b"{}"))[0] == 200


@pytest.mark.parametrize("path", [b"/v1/responses", b"/v1/realtime?model=x"])
async def test_a_websocket_is_refused_at_once(path: bytes) -> None:
    """426, from which clients go on over HTTP; whatever else the request lacks."""
    async with running() as port:
        got = await talk(
            port.port,
            b"GET %b HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nUpgrade: WebSocket\r\n\r\n"
            b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % path,
        )
    head, _, rest = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 426 ")
    assert b"\r\nupgrade: HTTP/1.1" in head
    assert [call.target for call in port.pipeline.turned_away] == [path.partition(b"?")[0].decode()]
    assert b"HTTP/1.1 200 OK" in rest


@pytest.mark.parametrize("target", [b"/v2/secret-0123456789", b"/", b"/v1/chat%2Fcompletions", b"/.env"])
async def test_the_route_of_a_path_that_is_not_served_is_unknown(target: bytes) -> None:
    """It does not repeat what strangers make up, and is not that of the root, which is served."""
    async with running() as port:
        assert (await port.ask(KEY, target=target))[0] in (400, 404)
    assert [route_of(call) for call in port.pipeline.turned_away] == ["unknown"]


async def test_what_a_browser_or_a_balancer_asks_first_needs_no_key() -> None:
    """A preflight of a listed origin, and whether anything answers here."""
    async with running(cors_origins=("https://a.example",)) as port:
        preflight = b"origin: https://a.example\r\naccess-control-request-method: POST\r\nconnection: close\r\n\r\n"
        got = await talk(port.port, b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + preflight)
        assert got.startswith(b"HTTP/1.1 204 ")
        assert b"\r\naccess-control-allow-origin: https://a.example\r\n" in got
        got = await talk(port.port, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 200 ")
    assert port.pipeline.calls == []


async def test_a_body_over_the_limit_is_too_large_however_full_the_house_is() -> None:
    """413 and not 503: to come back would not help."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def hold(call: Call, client: Downstream, upload: Upload | None) -> None:
        entered.set()
        await go_on.wait()
        await echo(call, client, upload)

    async with running(hold, max_body_bytes=1000, max_in_flight_bytes=1000) as port:
        first = asyncio.get_running_loop().create_task(port.ask(KEY, b"x" * 900))
        await entered.wait()
        assert (await port.ask(KEY, b"x" * 1001))[0] == 413
        assert (await port.ask(KEY, b"x" * 200))[0] == 503
        for length, status in ((1001, b"413"), (200, b"503")):  # before a byte of it has come
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n" % (KEY, length)
            assert (await talk(port.port, head)).startswith(b"HTTP/1.1 " + status)
        go_on.set()
        assert await first == (200, b"x" * 900)


async def test_a_compressed_body_takes_room_for_what_it_expands_to() -> None:
    """Beside others it is refused; alone it may exceed the bound. Its room is given back."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def hold(call: Call, client: Downstream, upload: Upload | None) -> None:
        if call.encoded_body is None:
            entered.set()
            await go_on.wait()
        await echo(call, client, upload)

    bomb = gzip.compress(b"x" * 5000)
    async with running(hold, max_in_flight_bytes=1000) as port:
        first = asyncio.get_running_loop().create_task(port.ask(KEY, b"{}"))
        await entered.wait()
        assert (await port.ask(KEY + b"content-encoding: gzip\r\n", bomb))[0] == 503
        go_on.set()
        await first
        assert await port.ask(KEY + b"content-encoding: gzip\r\n", bomb) == (200, b"x" * 5000)


async def test_requests_in_flight_are_bounded() -> None:
    """503 for the one too many; its place is free again afterwards."""
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def hold(call: Call, client: Downstream, upload: Upload | None) -> None:
        entered.set()
        await go_on.wait()
        await echo(call, client, upload)

    async with running(hold, max_requests=1) as port:
        first = asyncio.get_running_loop().create_task(port.ask(KEY, b"{}"))
        await entered.wait()
        status, body = await port.ask(KEY, b"{}")
        assert (status, json.loads(body)["error"]["code"]) == (503, "proxy_overloaded")
        go_on.set()
        assert await first == (200, b"{}")
        assert (await port.ask(KEY, b"{}"))[0] == 200


async def test_an_error_of_the_pipeline_is_answered_as_what_it_is() -> None:
    """One that it did not answer itself."""

    async def fail(call: Call, client: Downstream, upload: Upload | None) -> None:
        raise BadRequest("No.", param="model")

    async with running(fail) as port:
        status, body = await port.ask(KEY, b"{}")
        assert (status, json.loads(body)["error"]["param"]) == (400, "model")


async def test_a_defect_is_a_500_and_the_next_request_is_served(caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with the request's id, and its message stays inside."""
    fails = [True]

    async def fail(call: Call, client: Downstream, upload: Upload | None) -> None:
        if fails.pop():
            fails.append(False)
            raise ZeroDivisionError("a secret")
        await echo(call, client, upload)

    async with running(fail) as port:
        status, body = await port.ask(KEY, b"{}")
        assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
        assert b"secret" not in body
        assert (await port.ask(KEY, b"{}"))[0] == 200
    assert [record.message for record in caplog.records] == ["request made-id failed inside Cairn"]


async def test_a_defect_inside_an_answer_breaks_it_off(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody takes it for whole."""

    async def fail(call: Call, client: Downstream, upload: Upload | None) -> None:
        client.begin(200, OK, [], None)
        await client.write(b"half")
        raise ZeroDivisionError

    async with running(fail) as port:
        assert (await port.ask(KEY, b"{}"))[1] == b"4\r\nhalf\r\n"
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
        + KEY
        + b"content-length: 900000\r\n\r\n"
        + b"x" * 90_000,
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + KEY + b"transfer-encoding: chunked\r\n\r\n5\r\nabc",
        b"POST /v1/files HTTP/1.1\r\nhost: x\r\n" + KEY + b"content-length: 900000\r\n\r\n" + b"x" * 90_000,
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + KEY + b"content-length: 2\r\n\r\n{}",
    ],
)
async def test_a_client_may_leave_at_every_await(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """In a body that is read, in one that is handed on, and before an answer: nothing is left, and nothing logged."""
    inside, ends = asyncio.Event(), list[str]()

    async def wait(call: Call, client: Downstream, upload: Upload | None) -> None:
        inside.set()
        try:
            if upload is not None:
                await echo(call, client, upload)
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    with caplog.at_level(logging.INFO):
        async with running(wait) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port.port)
            writer.write(sent)
            await eventually(lambda: port.room.requests == 1)
            if b"files" in sent or sent.endswith(b"{}"):
                await inside.wait()
            writer.transport.abort()
            await eventually(lambda: port.room.requests == 0 and len(port.server.clients) == 0)
    assert ends == (["cancelled"] if inside.is_set() else [])
    assert caplog.records == []


@pytest.mark.skipif(not STANDARD_LOOP_PAUSES_WRITERS, reason="a defect of this version's standard event loop")
async def test_a_client_that_stops_reading_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    """Its connection is aborted after the limit, and nothing is logged as an error of Cairn's."""
    ended = asyncio.Event()

    async def pour(call: Call, client: Downstream, upload: Upload | None) -> None:
        client.begin(200, OK, [], None)
        try:
            while True:
                await client.write(b"x" * 65_536)
        finally:
            ended.set()

    async with running(pour, write_seconds=0.05) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + KEY + b"content-length: 0\r\n\r\n")
        clock = port.server._clock  # noqa: SLF001 - internal state that no public name shows
        assert isinstance(clock, FakeClock)
        while not ended.is_set():
            clock.advance(0.1)
            await asyncio.sleep(0.01)
        assert reader is not None
        writer.close()
    assert caplog.records == []


async def test_input_that_is_no_request_is_answered_in_the_usual_shape() -> None:
    """OpenAI's error object, and the connection ends."""
    async with running() as port:
        got = await talk(port.port, b"bad\r\n\r\n")
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"

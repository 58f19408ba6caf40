"""The admin port, before an overview of which the test says everything; and the judgement that /readyz gives."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
from collections.abc import AsyncIterator, Mapping
from datetime import date

import aiohttp
import msgspec
import pytest

from cache import RowKey, Sums
from proxy.accounting.savings import By, first_day, report
from proxy.accounting.savings import SavingsReport as Savings
from proxy.accounting.totals_reader import Unreadable
from proxy.admin.port import AdminPort
from proxy.admin.status import StatusBoard
from proxy.config.load import Admin, Config, Secret, Server
from proxy.control.messages import PoolReport, WorkerReport
from proxy.control.readiness import SILENT_SECONDS, Readiness, ReadinessStatus, Stage, WorkerView, judge
from proxy.metrics.definitions import MetricsDelta
from proxy.metrics.exposition import Exposition
from proxy.supervisor import sockets as listen
from tests.support.clock import FakeClock

TODAY = date(2026, 11, 23)


class FakeOverview:
    """A stand-in for the supervisor as the source of what is shown."""

    def __init__(self) -> None:
        self.config = Config(server=Server(max_body_bytes=1000))
        self.found = Readiness(ReadinessStatus.READY, (), 1, 0, "up", {"u": True})
        self.asked: list[tuple[str, bytes, bytes, tuple[tuple[bytes, bytes], ...]]] = []
        self.board = StatusBoard(Exposition(), self.readiness, FakeClock(), "9.9.9")

    def readiness(self) -> Readiness:
        return self.found

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        return b"cairn_x 1\n" * 100, f"text/fake; accept={accept}"

    async def explain(
        self, path: str, body: bytes, credential: bytes, headers: tuple[tuple[bytes, bytes], ...]
    ) -> tuple[int, bytes]:
        self.asked.append((path, body, credential, headers))
        return 200, b"{}"

    async def savings(self, since: str, by: By) -> Savings:
        if since == "away":
            raise Unreadable("Redis is away")
        return report({}, by, first_day(since, TODAY), TODAY)


class Running:
    """An admin port and a client for it."""

    def __init__(self, overview: FakeOverview, port: AdminPort, number: int, session: aiohttp.ClientSession) -> None:
        self.overview = overview
        self.port = port
        self.url = f"http://127.0.0.1:{number}"
        self.session = session

    async def ask(self, path: str, method: str = "GET", **kwargs) -> tuple[int, bytes, Mapping[str, str]]:
        """Status, body and headers."""
        async with asyncio.timeout(10), self.session.request(method, self.url + path, **kwargs) as answer:
            return answer.status, await answer.read(), answer.headers


@pytest.fixture
async def admin() -> AsyncIterator[Running]:
    """A running one."""
    overview = FakeOverview()
    listening = listen.open_admin("127.0.0.1", 0)
    port = AdminPort(overview)
    await port.start(listening)
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield Running(overview, port, listening.getsockname()[1], session)
    await port.close()


async def test_health_and_readiness(admin: Running) -> None:
    """Both are JSON; readiness says why it is not better."""
    assert (await admin.ask("/healthz"))[:2] == (200, b'{"status":"ok"}')
    status, body, _ = await admin.ask("/readyz")
    assert (status, json.loads(body)) == (
        200,
        {
            "status": "ready",
            "reasons": [],
            "workers": 1,
            "in_flight": 0,
            "redis": "up",
            "upstreams": {"u": True},
        },
    )


@pytest.mark.parametrize(
    ("standing", "status"),
    [(ReadinessStatus.READY, 200), (ReadinessStatus.DEGRADED, 200), (ReadinessStatus.NOT_READY, 503)],
)
async def test_only_what_is_not_ready_gets_no_requests(
    admin: Running, standing: ReadinessStatus, status: int
) -> None:
    """Degraded is served."""
    admin.overview.found = Readiness(standing, ("because",))
    found = await admin.ask("/readyz")
    assert (found[0], json.loads(found[1])["status"]) == (status, standing.value)


async def test_metrics_in_the_form_that_was_asked_for(admin: Running) -> None:
    """`Accept` is handed on; the body is compressed for who takes that."""
    status, body, headers = await admin.ask("/metrics", headers={"Accept": "x/y", "Accept-Encoding": "identity"})
    assert (status, headers["Content-Type"], body[:10]) == (200, "text/fake; accept=x/y", b"cairn_x 1\n")
    _, packed, headers = await admin.ask("/metrics", headers={"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed) == body


async def test_savings_are_json_and_what_they_cannot_be_is_told(admin: Running) -> None:
    """400 for a day that is none, 503 while Redis is away."""
    status, body, _ = await admin.ask("/savings?since=7d&by=tenant")
    assert (status, json.loads(body)["since"], json.loads(body)["by"]) == (200, "2026-11-17", "tenant")
    assert (await admin.ask("/savings"))[0] == 200
    assert (await admin.ask("/savings?since=soon"))[0] == 400
    assert (await admin.ask("/savings?by=key"))[0] == 400
    status, body, _ = await admin.ask("/savings?since=away")
    assert (status, json.loads(body)) == (503, {"error": "Redis is away"})


@pytest.mark.parametrize("path", ["/explain", "/healthz"])
async def test_a_compressed_body_is_never_expanded(admin: Running, path: str) -> None:
    """A bomb held up the port for seconds, and took hundreds of MB, whatever it was sent to."""
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    tracemalloc.start()
    try:
        for coding in ("gzip", "GZIP", "deflate", "br"):
            status, _, _ = await admin.ask(path, "POST", data=bomb[:1000], headers={"content-encoding": coding})
            assert status == (415 if path == "/explain" else 405)
        status, _, _ = await admin.ask("/healthz", "GET", data=bomb, headers={"content-encoding": "gzip"})
        assert status == 200
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert admin.overview.asked == []
    for coding in ("identity", "utf-8"):
        assert (await admin.ask("/explain", "POST", data=b"{}", headers={"content-encoding": coding}))[0] == 200


async def test_explain_hands_on_path_body_key_and_urgency(admin: Running) -> None:
    """The client's key has a separate header, since Authorization is the admin's; other headers are left out."""
    await admin.ask("/explain", "POST", data=b"{1}")
    headers = {"X-Cairn-Client-Key": "k", "X-Request-Deadline": "2.5", "X-Cairn-Priority": "high", "X-Other": "x"}
    await admin.ask("/explain?path=/v1/messages", "POST", data=b"", headers=headers)
    urgency = ((b"x-cairn-priority", b"high"), (b"x-request-deadline", b"2.5"))
    assert admin.overview.asked == [("/v1/chat/completions", b"{1}", b"", ()), ("/v1/messages", b"", b"k", urgency)]
    assert (await admin.ask("/explain"))[0] == 405
    assert (await admin.ask("/explain", "POST", data=bytes(1001)))[0] == 413


async def test_what_is_not_there_is_404_in_json(admin: Running) -> None:
    """As everything that went wrong."""
    status, body, headers = await admin.ask("/nothing")
    assert (status, json.loads(body)) == (404, {"error": "not found"})
    assert headers["Cache-Control"] == "no-store"


async def test_a_token_guards_all_but_the_probes(admin: Running) -> None:
    """Probes learn one word without it, everything with it."""
    admin.overview.config = Config(admin=Admin(token=Secret("right")))
    for given in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic right"},
        {"Authorization": "right"},
    ):
        assert (await admin.ask("/metrics", headers=given))[0] == 401
        assert (await admin.ask("/healthz", headers=given))[0] == 200
        assert (await admin.ask("/readyz", headers=given))[1] == b'{"status":"ready"}'
    right = {"Authorization": "Bearer right"}
    assert (await admin.ask("/metrics", headers=right))[0] == 200
    assert len(json.loads((await admin.ask("/readyz", headers=right))[1])) > 1


async def test_without_a_token_a_web_page_gets_nothing_by_rebinding_its_name(admin: Running) -> None:
    """Only names of loopback itself are answered."""
    answered = ("localhost:1", "LOCALHOST", "localhost:", "127.0.0.1", "[::1]:80", "[::1]")
    refused = (
        "evil.example", "[::1]evil.example", "[::1].evil.example:80", "localhost@evil.example", "",
        "localhost:80.evil.example", "127.0.0.1:x", "[::1]:80.evil.example", "[::1%evil.example]", "localhost.",
    )  # fmt: skip
    for host, status in [*((each, 200) for each in answered), *((each, 403) for each in refused)]:
        assert (await admin.ask("/metrics", headers={"Host": host}))[0] == status


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
)
@pytest.mark.parametrize("with_token", [False, True])
async def test_a_page_of_another_site_gets_nothing(admin: Running, headers: dict[str, str], with_token: bool) -> None:
    """It gets no explanation, no stream and no figures, with or without a token."""
    if with_token:
        admin.overview.config = Config(admin=Admin(token=Secret("right")))
        headers = headers | {"Authorization": "Bearer right"}
    assert (await admin.ask("/explain", "POST", data=b"{}", headers=headers))[0] == 403
    assert (await admin.ask("/events", headers=headers))[0] == 403
    assert (await admin.ask("/metrics", headers=headers))[0] == 403
    assert admin.overview.asked == []
    assert admin.overview.board.viewers == 0


async def test_an_origin_of_another_site_beside_the_own_one_is_refused(admin: Running) -> None:
    """In either order."""
    for origins in ([admin.url, "https://evil.example"], ["https://evil.example", admin.url]):
        headers = [("Origin", origin) for origin in origins]
        assert (await admin.ask("/explain", "POST", data=b"{}", headers=headers))[0] == 403


async def test_a_link_of_another_site_may_be_followed_except_to_a_stream(admin: Running) -> None:
    """A dashboard's link to the page works, and reaches the page's own requests."""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert (await admin.ask("/", headers=link))[0] == 200
    assert (await admin.ask("/metrics", headers=link))[0] == 200
    assert (await admin.ask("/events", headers=link))[0] == 403
    assert (await admin.ask("/explain", "POST", data=b"{}", headers=link))[0] == 403
    own = {"Sec-Fetch-Site": "same-origin", "Origin": admin.url, "Sec-Fetch-Mode": "cors"}
    assert (await admin.ask("/explain", "POST", data=b"{}", headers=own))[0] == 200


async def test_headers_that_are_not_utf_8_are_no_defect(admin: Running) -> None:
    """A wrong token, and a client's key as it was sent."""
    raw = b"%b %b HTTP/1.1\r\nHost: localhost\r\n%b: %b\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    async def status(target: bytes, name: bytes, value: bytes, method: bytes = b"POST") -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(admin.url.rpartition(":")[2]))
        writer.write(raw % (method, target, name, value))
        answer = await reader.read()
        writer.close()
        return int(answer.split()[1])

    assert await status(b"/explain", b"X-Cairn-Client-Key", b"k\xff\xfe") == 200
    assert admin.overview.asked == [("/v1/chat/completions", b"", b"k\xff\xfe", ())]
    assert await status(b"/explain?path=%ff", b"X-Other", b"x") == 400
    assert await status(b"/metrics", b"Accept", b"application/openmetrics-text;version=\xff", b"GET") == 200
    admin.overview.config = Config(admin=Admin(token=Secret("right")))
    assert await status(b"/explain", b"Authorization", b"Bearer \xff\xfe") == 401


# --- the status page


async def test_the_page_and_its_parts_come_with_a_strict_policy(admin: Running) -> None:
    """Scripts from this port only; compressed for who takes that, and not sent again to who has it."""
    for path, kind in {"/": "text/html", "/page.css": "text/css", "/plotly.min.js": "text/javascript"}.items():
        status, packed, headers = await admin.ask(path, headers={"Accept-Encoding": "gzip"})
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, kind)
        assert "script-src 'self';" in headers["Content-Security-Policy"]
        plain = (await admin.ask(path, headers={"Accept-Encoding": "identity"}))[1]
        assert gzip.decompress(packed) == plain
        assert (await admin.ask(path, headers={"If-None-Match": headers["ETag"]}))[:2] == (304, b"")


async def test_with_a_token_the_page_opens_and_its_figures_do_not(admin: Running) -> None:
    """The files hold none, and ask for the token themselves; without a token they are loopback's own."""
    assert (await admin.ask("/", headers={"Host": "evil.example"}))[0] == 403
    admin.overview.config = Config(admin=Admin(token=Secret("right")))
    assert (await admin.ask("/"))[0] == 200
    assert (await admin.ask("/events"))[0] == 401


async def test_the_stream_begins_with_the_history_and_ends_with_the_port(admin: Running) -> None:
    """Then a state at once, another within the second."""
    async with admin.session.get(admin.url + "/events") as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        async with asyncio.timeout(10):
            names = [(await answer.content.readuntil(b"\n\n")).split(b"\n")[0] for _ in range(3)]
            assert names == [b"event: history", b"event: state", b"event: state"]
            await admin.port.close()
            assert b"event: history" not in await answer.content.read()


async def test_the_first_state_has_the_totals_as_they_are_now(admin: Running) -> None:
    """They are read for viewers only: it waits for them, and never shows those that an earlier viewer saw."""
    board, today = admin.overview.board, date(2026, 11, 23)
    board.set_totals(report({}, By.DAY, today, today))
    board.forget_totals()
    async with asyncio.timeout(10), admin.session.get(admin.url + "/events") as answer:
        assert b"event: history" in await answer.content.readuntil(b"\n\n")
        rows = {RowKey("2026-11-23", "m", "one", "t"): Sums(prompt_tokens=9, cached_tokens=4)}
        board.set_totals(report(rows, By.DAY, today, today))
        state = await answer.content.readuntil(b"\n\n")
    saved = json.loads(state.partition(b"data: ")[2])["saved"]
    assert saved["today"]["cached_tokens"] == saved["7 days"]["cached_tokens"] == 4


async def test_a_stream_ends_when_its_token_is_replaced(admin: Running) -> None:
    """Otherwise a token that was given away would show the figures for as long as its page stays open."""
    admin.overview.config = Config(admin=Admin(token=Secret("old")))
    headers = {"Authorization": "Bearer old"}
    async with asyncio.timeout(10), admin.session.get(admin.url + "/events", headers=headers) as answer:
        await answer.content.readuntil(b"event: state")
        admin.overview.config = Config(admin=Admin(token=Secret("new")))
        await answer.content.read()


# --- the judgement


def worker(number: int = 0, ready: bool = True, silent: float = 0.1, deaths: int = 0, **report) -> WorkerView:
    """A worker that reported `report`."""
    return WorkerView(number, ready, WorkerReport(MetricsDelta(), **({"redis": "up"} | report)), silent, deaths)


def test_ready_when_all_is_well() -> None:
    """In-flight work is added up."""
    found = judge(Stage.SERVING, [worker(in_flight=2, upstreams={"a": True}), worker(1, in_flight=3)])
    assert found == Readiness(ReadinessStatus.READY, (), 2, 5, "up", {"a": True})


def test_a_ready_worker_that_has_not_reported_yet_counts() -> None:
    """Nothing bad is known of it."""
    assert judge(Stage.SERVING, [WorkerView(0, True)]).status is ReadinessStatus.READY


def test_a_background_task_that_fails_degrades() -> None:
    """A worker's or the supervisor's, each named once."""
    found = judge(Stage.SERVING, [worker(failing_tasks=("totals",)), worker(1, failing_tasks=("totals",))], ["tick"])
    assert (found.status, found.reasons) == (
        ReadinessStatus.DEGRADED,
        ("background task tick failed and is restarted", "background task totals failed and is restarted"),
    )


def test_without_redis_it_is_degraded_and_still_takes_requests() -> None:
    """Any worker that has none is enough."""
    found = judge(Stage.SERVING, [worker(), worker(1, redis="away")])
    assert (found.status, found.reasons, found.redis) == (ReadinessStatus.DEGRADED, ("redis is away",), "away")


def test_an_upstream_is_up_where_any_worker_finds_it_so() -> None:
    """One down degrades, all down is not ready."""
    one = judge(
        Stage.SERVING, [worker(upstreams={"a": False, "b": True}), worker(1, upstreams={"a": False, "b": False})]
    )
    assert (one.status, one.reasons) == (ReadinessStatus.DEGRADED, ("upstream a is down",))
    none = judge(Stage.SERVING, [worker(upstreams={"a": False})])
    assert (none.status, none.reasons[0]) == (ReadinessStatus.NOT_READY, "no upstream is up")


def test_a_pool_of_which_no_replica_is_up_is_named_and_blocks_unless_it_is_optional() -> None:
    """It is up if any worker finds it so."""
    pools = {"a": PoolReport(up=False), "b": PoolReport(up=False, optional=True), "c": PoolReport(up=True)}
    found = judge(Stage.SERVING, [worker(pools=pools, upstreams={"x": True})])
    assert found.status is ReadinessStatus.NOT_READY
    assert found.reasons == ("pool a is down", "optional pool b is down")
    found = judge(Stage.SERVING, [worker(pools=pools), worker(1, pools={"a": PoolReport(up=True)})])
    assert (found.status, found.reasons) == (ReadinessStatus.DEGRADED, ("optional pool b is down",))


def test_of_many_that_are_down_a_few_are_named_and_the_others_counted() -> None:
    """A probe may come each second, and a thousand replicas made its answer 54 KB."""
    upstreams = {f"r{number}": number < 9 for number in range(1_000)}
    pools = {f"p{number}": PoolReport(up=False, optional=number % 2 == 1) for number in range(40)}
    found = judge(Stage.SERVING, [worker(upstreams=upstreams, pools=pools, redis="away")])
    down = [f"upstream r{number} is down" for number in range(9, 14)]
    optional = [f"optional pool p{number} is down" for number in range(1, 10, 2)]
    assert found.reasons == (
        *[f"pool p{number} is down" for number in range(0, 10, 2)],
        "15 more pools are down",
        *down,
        "986 more upstreams are down",
        "redis is away",
        *optional,
        "15 more optional pools are down",
    )
    shown = found.shown()
    assert shown["upstreams"] == {f"r{number}": False for number in range(9, 109)}
    assert shown["upstreams_left_out"] == 900
    assert len(msgspec.json.encode(shown)) < 4_000
    assert len(found.upstreams) == 1_000, "the status page has a row of each"
    few = judge(Stage.SERVING, [worker(upstreams=dict.fromkeys("abcdef", False) | {"g": True})])
    assert few.reasons == tuple(f"upstream {name} is down" for name in "abcdef")
    assert few.shown() == msgspec.structs.asdict(few)


def test_a_worker_that_does_not_respond_does_not_count() -> None:
    """And the reasons name it."""
    silent = worker(1, silent=3.2)
    assert judge(Stage.SERVING, [worker(), silent]).reasons == (
        "1 of 2 workers are ready",
        "worker 1 has not responded for 3 s",
    )
    assert judge(Stage.SERVING, [worker(silent=SILENT_SECONDS)]).status is ReadinessStatus.NOT_READY


def test_a_worker_that_keeps_ending_degrades_also_while_it_runs() -> None:
    """It serves, but probably not for long."""
    found = judge(Stage.SERVING, [worker(), worker(1, deaths=4)])
    assert (found.status, found.reasons, found.workers) == (
        ReadinessStatus.DEGRADED,
        ("worker 1 has ended 4 times in a row",),
        2,
    )


def test_not_ready_without_workers_and_while_draining() -> None:
    """However well the rest is."""
    assert judge(Stage.STARTING, [worker(ready=False)]).reasons[0] == "no worker is ready"
    assert judge(Stage.SERVING, []).status is ReadinessStatus.NOT_READY
    assert judge(Stage.DRAINING, [worker()]) == Readiness(ReadinessStatus.NOT_READY, ("draining",), 1, 0, "up")


async def talk(port: int, message: bytes) -> bytes:
    """Everything that is answered to `message`."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(message)
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize(
    "start", [b"GET /healthz", b"POST /explain", b"GET /nothing", b"PUT /events", b"GET /page.js", b"OPTIONS *"]
)
@pytest.mark.parametrize("expectation", [b"\xff", b"x", b"100-continue, x"])
async def test_an_unknown_expectation_is_a_417_and_is_not_repeated(admin, start: bytes, expectation: bytes) -> None:
    """This holds for any bytes, on every path and method."""
    port = int(admin.url.rpartition(":")[2])
    head = b"%b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nexpect: %b\r\n\r\n" % (start, expectation)
    got = await talk(port, head)
    assert got.startswith(b"HTTP/1.1 417 ")
    assert got.endswith(b'\r\n\r\n{"error":"only the expectation 100-continue is supported"}')


@pytest.mark.parametrize("rest", [b"content-length: 9\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n"])
async def test_a_body_that_does_not_come_is_not_waited_for(admin: Running, rest: bytes) -> None:
    """The connection, on which a body is still due, ends with the answer."""
    admin.overview.config = Config(server=Server(body_seconds=0.05))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(admin.url.rpartition(":")[2]))
    writer.write(b"POST /explain HTTP/1.1\r\nhost: localhost\r\n" + rest)
    async with asyncio.timeout(10):
        got = await reader.readuntil(b"}")
    writer.close()
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nConnection: close\r\n" in got
    assert got.endswith(b'\r\n\r\n{"error":"the body did not come in time"}')


@pytest.mark.parametrize(
    ("accepted", "is_packed"),
    [
        (["gzip"], True),
        (["br, GZIP;q=0.5"], True),
        (["x-gzip"], True),
        (["*"], True),
        (["br", "gzip"], True),
        (["gzip ; q=0.001"], True),
        (["gzip;q=0"], False),
        (["gzip; q=0.000, *"], False),
        (["*;q=0"], False),
        (["notgzip"], False),
        (["identity"], False),
        ([], False),
    ],
)
@pytest.mark.parametrize("path", ["/metrics", "/page.js"])
async def test_a_page_is_compressed_only_for_who_accepts_that(
    admin: Running, path: str, accepted: list[str], is_packed: bool
) -> None:
    """A weight of zero means not at all."""
    lines = b"".join([b"accept-encoding: %b\r\n" % each.encode() for each in accepted])
    head = b"GET %b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n%b\r\n" % (path.encode(), lines)
    got = await talk(int(admin.url.rpartition(":")[2]), head)
    assert (b"\r\nContent-Encoding: gzip\r\n" in got) is is_packed


async def test_a_refusal_names_what_would_be_accepted(admin: Running) -> None:
    """The methods of the path, and the way to send a token."""
    for path, allowed in (("/metrics", "GET, HEAD"), ("/explain", "POST"), ("/events", "GET")):
        status, _, headers = await admin.ask(path, "PUT")
        assert (status, headers["Allow"]) == (405, allowed)
    admin.overview.config = Config(admin=Admin(token=Secret("right")))
    status, _, headers = await admin.ask("/metrics")
    assert (status, headers["WWW-Authenticate"], headers["Cache-Control"]) == (401, "Bearer", "no-store")


async def test_a_client_that_waits_for_100_continue_gets_it(admin) -> None:
    """One interim answer, then that of the request."""
    port = int(admin.url.rpartition(":")[2])
    head = b"POST /explain HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nexpect: 100-continue\r\n"
    got = await talk(port, head + b"content-length: 2\r\n\r\n{}")
    assert got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ")
    assert admin.overview.asked == [("/v1/chat/completions", b"{}", b"", ())]

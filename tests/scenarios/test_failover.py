"""One sick and one well replica: what reaches the client, what is tried, and what the fleet learns."""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import brotli
import pytest
import zstandard
from aiohttp import web

from proxy.config.schema import Auth, Config, Pool, PoolKind, Replica, Secret, Upstream
from proxy.metrics import definitions as metrics
from proxy.model import Ending
from proxy.records import Outcome
from tests.conftest import IS_COMPILED
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import Failure, OpenAIUpstream
from tests.support.valkey import eventually, free_port

BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "responses": {"input": "hi"},
    "messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "embeddings": {"input": "hi"},
}
STATUSES = [408, 424, 429, 500, 502, 503, 504, 522, 529]


class Sick(OpenAIUpstream):
    """Answers every request that runs a model with one status and body; its model list is well."""

    def __init__(self, status: int, body: bytes = b'{"error":{"message":"sick"}}', kind: str = "application/json"):
        super().__init__()
        self.status, self.body, self.kind = status, body, kind
        self.asked = 0

    async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
        if request.path.removeprefix("/v1/") not in BODIES:
            return await super()._serve(request, asked, failure)
        self.asked += 1
        return web.Response(status=self.status, body=self.body, headers={"content-type": self.kind})


@asynccontextmanager
async def sick_and_well(sick: Sick, **upstream: Any) -> AsyncIterator[tuple[Cairn, OpenAIUpstream]]:
    async with OpenAIUpstream() as well, sick:
        config = config_for([sick.url, well.url], upstream=Upstream(**upstream))
        async with running(config) as cairn:
            yield cairn, well


async def ask(http: aiohttp.ClientSession, cairn: Cairn, path: str, n: int = 0, **more: Any) -> tuple[int, str, Any]:
    """Status, body and headers of one request; `n` makes its prompt its own."""
    body = {"model": "test-model", **json.loads(json.dumps(BODIES[path]).replace("hi", f"hi {n}")), **more}
    async with http.post(f"{cairn.url}/{path}", json=body) as response:
        return response.status, await response.text(), response.headers


@pytest.mark.parametrize(("status", "stream"), [*((status, False) for status in STATUSES), (429, True), (503, True)])
async def test_of_100_requests_no_status_of_a_sick_replica_reaches_the_client(
    http: aiohttp.ClientSession, status: int, stream: bool
) -> None:
    """The sick one is found out within a few requests, and is asked rarely after that."""
    sick = Sick(status)
    async with sick_and_well(sick) as (cairn, _):
        for number in range(100):
            got, text, _ = await ask(http, cairn, "chat/completions", number, stream=stream)
            assert (got, "sick" in text) == (200, False), number
        assert 0 < sick.asked <= 12


@pytest.mark.parametrize("path", BODIES)
async def test_every_path_with_a_model_is_tried_elsewhere(http: aiohttp.ClientSession, path: str) -> None:
    """Chat, responses, messages and embeddings; the client is told what was tried."""
    sick = Sick(500)
    async with sick_and_well(sick) as (cairn, _):
        answers = [await ask(http, cairn, path, number) for number in range(40)]
        assert {status for status, _, _ in answers} == {200}
        retried = [headers for _, _, headers in answers if "x-cairn-tried" in headers]
        assert len(retried) == sick.asked > 0
        assert retried[0]["x-cairn-tried"] == f"{sick.url[7:-3]};500"
        assert retried[0]["x-cairn-reason"] == "retry"
        assert cairn.count(metrics.UPSTREAM_RETRIES, (sick.url[7:-3], "500")) == sick.asked


EVENTS = [
    ("chat/completions", b'data: {"error": {"message": "sick", "code": 500}}\n\n', "error_event"),
    ("chat/completions", b"event: error\ndata: sick\n\n", "error_event"),
    ("chat/completions", b'data: {"object": "error", "message": "sick", "code": 500}\n\n', "error_event"),
    ("chat/completions", b"", "empty"),
    ("chat/completions", b'data: {"sick', "empty"),
    ("chat/completions", b"data: [DONE]\n\n", "empty"),
    (
        "chat/completions",
        b'data: {"id":"sick","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":0}}\n\ndata: [DONE]\n\n',
        "empty",
    ),
    ("responses", b'event: error\ndata: {"type": "error", "code": "sick", "message": "sick"}\n\n', "error_event"),
    (
        "messages",
        b'event: ping\ndata: {"type": "ping"}\n\nevent: error\ndata: {"type": "error", "error": {}}\n\n',
        "error_event",
    ),
]


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
@pytest.mark.parametrize(("path", "body", "reason"), EVENTS)
async def test_a_stream_whose_first_event_is_an_error_or_missing_is_tried_elsewhere(
    http: aiohttp.ClientSession, path: str, body: bytes, reason: str, kind: str
) -> None:
    """This holds for any content type; comments and pings before it decide nothing."""
    sick = Sick(200, b": waiting\n\n" + body, kind)
    async with sick_and_well(sick) as (cairn, _):
        for number in range(20):
            status, text, _ = await ask(http, cairn, path, number, stream=True)
            assert (status, "sick" in text, "error" in text) == (200, False, False)
            assert "data:" in text or path == "messages"
        assert 0 < sick.asked <= 8
        assert cairn.count(metrics.HIDDEN_ERRORS, (sick.url[7:-3], reason)) == sick.asked


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("chat/completions", b'{"error": {"message": "sick"}}', "error_body"),
        ("responses", b'{"object": "error", "message": "sick", "code": 500}', "error_body"),
        ("messages", b'{"type": "error", "error": {"type": "sick"}}', "error_body"),
        ("embeddings", b"<html>sick</html>", "html"),
        ("chat/completions", b"", "empty"),
        ("chat/completions", b'{"detail": "sick"}', "error_body"),
        ("messages", b'{"status": "loading a sick model"}', "error_body"),
    ],
)
async def test_a_plain_200_that_is_an_error_is_tried_elsewhere(
    http: aiohttp.ClientSession, path: str, body: bytes, reason: str, stream: bool
) -> None:
    """Nothing of it has reached the client, whether that asked for a stream or not."""
    sick = Sick(200, body)
    async with sick_and_well(sick) as (cairn, _):
        for number in range(20):
            status, text, _ = await ask(http, cairn, path, number, **({"stream": True} if stream else {}))
            assert (status, "sick" in text, bool(text)) == (200, False, True)
        assert 0 < sick.asked <= 8
        assert cairn.count(metrics.HIDDEN_ERRORS, (sick.url[7:-3], reason)) == sick.asked


class Cut(OpenAIUpstream):
    """Breaks off every plain response to a prompt within its body: of a known length, in chunks, or until the end."""

    def __init__(self, head: bytes) -> None:
        super().__init__()
        self.head = head
        self.asked = 0

    async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
        if request.path.removeprefix("/v1/") not in BODIES or request.transport is None:
            return await super()._serve(request, asked, failure)
        self.asked += 1
        request.transport.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + self.head)
        await asyncio.sleep(0)
        request.transport.close()
        return web.Response()


@pytest.mark.parametrize(
    "head",
    [
        b'content-length: 99\r\n\r\n{"id":',
        b"transfer-encoding: chunked\r\n\r\n",
        b'connection: close\r\n\r\n{"id":"a",',
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "embeddings"])
async def test_a_plain_response_that_breaks_off_before_the_client_got_any_is_tried_elsewhere(
    http: aiohttp.ClientSession, path: str, head: bytes
) -> None:
    """A short body is gathered first, and of a long one nothing is written until it begins.

    If only the end of the connection is the end of the body, an unfinished document shows that it was cut.
    """
    async with OpenAIUpstream() as well, Cut(head) as sick, running(config_for([sick.url, well.url])) as cairn:
        answers = [await ask(http, cairn, path, number) for number in range(20)]
        assert {status for status, _, _ in answers} == {200}
        assert 0 < sick.asked <= 8


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
async def test_a_refusal_of_the_request_itself_is_not_tried_elsewhere(
    http: aiohttp.ClientSession, status: int
) -> None:
    """Every replica would say the same."""
    async with Sick(status) as one, Sick(status) as two, running(config_for([one.url, two.url])) as cairn:
        assert (await ask(http, cairn, "chat/completions"))[0] == status
        assert one.asked + two.asked == 1


async def test_the_statuses_and_the_number_of_retries_are_configured(http: aiohttp.ClientSession) -> None:
    """A status that is not listed is passed on, and so is any without retries."""
    for settings in ({"retry_statuses": (503,)}, {"max_retries": 0}):
        async with Sick(500) as one, Sick(500) as two:
            config = config_for([one.url, two.url], upstream=Upstream(**settings))
            async with running(config) as cairn:
                assert (await ask(http, cairn, "chat/completions"))[0] == 500
                assert one.asked + two.asked == 1


async def test_an_outage_is_not_multiplied_by_retries(http: aiohttp.ClientSession) -> None:
    """Of 100 requests that all replicas fail, a tenth are sent a second time."""
    async with Sick(500) as one, Sick(500) as two, running(config_for([one.url, two.url])) as cairn:
        answers = [await ask(http, cairn, "chat/completions", number) for number in range(100)]
        assert {status for status, _, _ in answers} == {500}
        assert 100 <= one.asked + two.asked <= 111


async def test_an_outage_of_one_pool_uses_up_no_retries_of_another(http: aiohttp.ClientSession) -> None:
    """A model whose replicas all fail is asked for often; one of another pool is served by its well replica."""
    async with Sick(500) as one, Sick(500) as two, Sick(500) as sick, OpenAIUpstream() as well:
        pools = (
            Pool(name="down", models=("down",), replicas=(Replica(one.url), Replica(two.url))),
            Pool(name="half", models=("*",), replicas=(Replica(sick.url), Replica(well.url))),
        )
        async with running(config_for((), pools=pools)) as cairn:
            for number in range(20):
                assert (await ask(http, cairn, "chat/completions", number, model="down"))[0] == 500
            for number in range(20):
                assert (await ask(http, cairn, "chat/completions", number))[0] == 200
            assert sick.asked > 0


async def test_a_request_that_timed_out_is_not_computed_a_second_time(http: aiohttp.ClientSession) -> None:
    """Its prefill goes on where it is."""
    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as one, OpenAIUpstream(gate=gate) as two:
        config = config_for([one.url, two.url], upstream=Upstream(first_byte_seconds=0.2))
        async with running(config) as cairn:
            status, text, _ = await ask(http, cairn, "chat/completions")
            assert (status, json.loads(text)["error"]["code"]) == (504, "upstream_timeout")
            assert len(one.generations) + len(two.generations) == 1
            gate.set()


async def test_a_plain_response_whose_head_comes_before_its_prefill_is_waited_for(
    http: aiohttp.ClientSession,
) -> None:
    """Only within its body is it bound by the idle limit."""

    class Early(OpenAIUpstream):
        async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
            if request.path != "/v1/chat/completions" or request.transport is None:
                return await super()._serve(request, asked, failure)
            request.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 14\r\n\r\n"
            )
            await asyncio.sleep(0.4)
            request.transport.write(b'{"choices":[]}')
            request.transport.close()
            return web.Response()

    async with Early() as upstream:
        config = config_for([upstream.url], upstream=Upstream(first_byte_seconds=10, idle_seconds=0.15))
        async with running(config) as cairn:
            assert (await ask(http, cairn, "chat/completions"))[:2] == (200, '{"choices":[]}')


async def test_one_clients_bad_prompts_close_no_engine_for_another(http: aiohttp.ClientSession) -> None:
    """Both engines answer 500 to the one prompt, and go on serving all others."""

    class Picky(OpenAIUpstream):
        async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
            if b"poison" in asked.body:
                return web.Response(status=500, text="cannot")
            return await super()._serve(request, asked, failure)

    async with Picky() as one, Picky() as two, running(config_for([one.url, two.url])) as cairn:
        bad, good = {"authorization": "Bearer bad"}, {"authorization": "Bearer good"}

        async def send(text: str, headers: dict[str, str]) -> int:
            body = {"model": "test-model", "messages": [{"role": "user", "content": text}]}
            async with http.post(f"{cairn.url}/chat/completions", json=body, headers=headers) as response:
                return response.status

        for number in range(60):
            assert await send(f"poison {number}", bad) == 500
            assert await send(f"fine {number}", good) == 200
        views = cairn.worker.replicas.fleet.snapshot("engines", 0.0)
        assert [view.available for view in views] == [True, True]


async def test_a_429_is_for_its_client_and_model_only(http: aiohttp.ClientSession) -> None:
    """With one replica nobody gets a refusal of Cairn's own: the upstream is asked each time."""
    failure = Failure(429, (("retry-after", "99999999"),), b'{"error":{"message":"slow down"}}')
    async with OpenAIUpstream(failures=[failure]) as upstream, running(config_for([upstream.url])) as cairn:
        for key, expected in (("a", 429), ("b", 200), ("a", 200)):
            headers = {"authorization": f"Bearer {key}"}
            body = {"model": "test-model", **BODIES["chat/completions"]}
            async with http.post(f"{cairn.url}/chat/completions", json=body, headers=headers) as response:
                assert response.status == expected


@pytest.mark.parametrize("words", ["Loading model", "Starting", "The model is not ready."])
async def test_a_replica_that_is_loading_its_model_gets_no_request_until_it_is_done(
    http: aiohttp.ClientSession, words: str
) -> None:
    """llama.cpp and others answer 503 to everything until then; readiness and the refusal say so."""
    loading = True

    class Loading(OpenAIUpstream):
        async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
            if loading:
                body = {"error": {"code": 503, "message": words, "type": "unavailable_error"}}
                return web.Response(status=503, text=json.dumps(body))
            return await super()._serve(request, asked, failure)

    async with Loading() as upstream, running(config_for([upstream.url])) as cairn:
        status, text, _ = await ask(http, cairn, "chat/completions")
        assert (status, upstream.generations) == (503, [])
        assert "is loading its model" in text
        cairn.worker.reporter.report()
        assert cairn.heard.last is not None
        assert not cairn.heard.last.pools["engines"].up
        loading = False

        async def served() -> bool:
            return (await ask(http, cairn, "chat/completions"))[0] == 200

        await eventually(served)
        cairn.worker.reporter.report()
        assert cairn.heard.last.pools["engines"].up


class Reloading(OpenAIUpstream):
    """Holds what it was asked for until `goes_on` is set, and may say in its model list that it loads its model."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Event()
        super().__init__(gate=self.goes_on)
        self.is_loading = False

    async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
        if self.is_loading and request.path == "/v1/models":
            return web.Response(status=503, text='{"error":{"message":"Loading model"}}')
        return await super()._serve(request, asked, failure)


def one_at_a_time(*upstreams: OpenAIUpstream) -> Config:
    replicas = [Replica(each.url, name=f"r{n}", max_concurrent=1) for n, each in enumerate(upstreams)]
    return config_for([], pools=[Pool(name="engines", replicas=tuple(replicas))])


def begin(http: aiohttp.ClientSession, cairn: Cairn, count: int) -> list[asyncio.Task[tuple[int, str, Any]]]:
    asks = [ask(http, cairn, "chat/completions", number) for number in range(count)]
    return [asyncio.ensure_future(each) for each in asks]  # noqa: TID251


async def all_but_one(
    asked: list[asyncio.Task[tuple[int, str, Any]]],
) -> tuple[set[asyncio.Task[tuple[int, str, Any]]], set[asyncio.Task[tuple[int, str, Any]]]]:
    """Wait until only one request is not answered; return those that are, and the one that is not."""
    await eventually(lambda: sum(each.done() for each in asked) >= len(asked) - 1)
    return await asyncio.wait(asked, timeout=0)


def waiting(cairn: Cairn) -> list[int]:
    return [len(queue) for queue in cairn.worker.requests.queues.by_replica.values()]


async def test_requests_that_wait_for_a_replica_are_served_elsewhere_as_soon_as_a_check_finds_it_down(
    http: aiohttp.ClientSession,
) -> None:
    """They are planned again at once, and only what the replica had begun to compute stays there."""
    async with Reloading() as one, Reloading() as two, running(one_at_a_time(one, two)) as cairn:
        asked = begin(http, cairn, 8)
        await eventually(lambda: waiting(cairn) == [3, 3])
        one.is_loading = True
        await cairn.worker.health.check(0)
        await eventually(lambda: waiting(cairn) == [0, 6])
        two.goes_on.set()
        done, pending = await all_but_one(asked)
        assert ([each.result()[0] for each in done], len(pending)) == ([200] * 7, 1)
        assert (len(one.generations), len(two.generations)) == (1, 7)
        assert all("x-cairn-tried" not in each.result()[2] for each in done), "they were sent once"
        one.goes_on.set()
        assert (await pending.pop())[0] == 200


async def test_requests_that_wait_for_the_last_replica_are_refused_with_the_reason_when_it_goes_down(
    http: aiohttp.ClientSession,
) -> None:
    """They do not wait for the queue's deadline."""
    async with Reloading() as one, running(one_at_a_time(one)) as cairn:
        asked = begin(http, cairn, 3)
        await eventually(lambda: waiting(cairn) == [2])
        one.is_loading = True
        await cairn.worker.health.check(0)
        done, pending = await all_but_one(asked)
        assert [each.result()[0] for each in done] == [503, 503]
        assert all("r0 is loading its model" in each.result()[1] for each in done)
        one.goes_on.set()
        assert (await pending.pop())[0] == 200


async def test_requests_that_wait_for_a_replica_are_served_elsewhere_when_another_request_finds_it_down(
    http: aiohttp.ClientSession,
) -> None:
    """However many they are: they were never sent, so the budget of retries is not theirs."""
    async with Reloading() as one, Reloading() as two, running(one_at_a_time(one, two)) as cairn:
        asked = begin(http, cairn, 24)
        await eventually(lambda: waiting(cairn) == [11, 11])
        await one.stop()  # the one that it computes is reset, and the next one finds nobody there
        two.goes_on.set()
        assert [(await each)[0] for each in asked] == [200] * 24


async def test_a_frozen_replica_is_found_by_its_silence_and_gets_no_request_until_it_answers(
    http: aiohttp.ClientSession,
) -> None:
    """Its kernel accepts connections; the refusal, readiness and the status page's report say what is wrong."""
    wakes = asyncio.Event()

    class Frozen(OpenAIUpstream):
        async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
            await wakes.wait()
            return await super()._serve(request, asked, failure)

    upstream = Upstream(check_seconds=0.1)
    async with Frozen() as frozen, running(config_for([frozen.url], upstream=upstream)) as cairn:

        async def found() -> bool:
            cairn.worker.reporter.report()
            assert cairn.heard.last is not None
            return not cairn.heard.last.pools["engines"].up

        await eventually(found)
        status, text, _ = await ask(http, cairn, "chat/completions")
        assert (status, frozen.generations) == (503, [])
        assert "is not responding" in text
        wakes.set()

        async def served() -> bool:
            return (await ask(http, cairn, "chat/completions"))[0] == 200

        await eventually(served)


async def test_the_start_lists_each_replica_with_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    """And each change is one line with its reason."""
    caplog.set_level("INFO")
    async with OpenAIUpstream() as upstream:
        down = f"http://127.0.0.1:{free_port()}"
        async with running(config_for([upstream.url, down])):
            text = caplog.text
    assert f"replica {upstream.url[7:-3]} (pool engines) is up: models test-model" in text
    assert text.count(f"replica {down[7:]} (pool engines) is down") == 1
    assert text.count(f"replica {down[7:]} (pool engines) is down: the upstream cannot be reached") == 1


@pytest.mark.skipif(IS_COMPILED, reason="a method of a compiled class cannot be replaced")
@pytest.mark.parametrize(
    ("path", "body", "kind", "ending"),
    [
        ("chat/completions", b'{"error": {"message": "sick"}}', "application/json", "error_body"),
        ("embeddings", b'{"error": {"message": "sick"}}', "application/json", "error_body"),
        ("chat/completions", b"<!DOCTYPE html><html>busy</html>", "text/html", "html"),
        ("chat/completions", b"not json", "text/plain", "error_body"),
        (
            "chat/completions",
            b'{"object": "error", "message": "sick", "code": 400}',
            "application/json",
            "error_body",
        ),
        ("embeddings", b'{"detail": "sick"}', "application/json", "error_body"),
        (
            "chat/completions",
            b'{"choices": [{"finish_reason": "error", "error": {"message": "sick"}}]}',
            "application/json",
            "error_body",
        ),
        (
            "chat/completions",
            b'{"choices": [{"finish_reason": "error"}], "usage": {"prompt_tokens": 9, "completion_tokens": 0}}',
            "application/json",
            "error_body",
        ),
    ],
)
async def test_a_200_that_is_none_is_relayed_and_counted_as_an_error(
    http: aiohttp.ClientSession, path: str, body: bytes, kind: str, ending: str
) -> None:
    """Its ending is not complete, and a replica that sends them is no better than one that sends 500."""
    outcomes: list[Outcome] = []
    async with Sick(200, body, kind) as sick, running(config_for([sick.url])) as cairn:
        counters = cairn.worker.accounting.settlement._counters  # noqa: SLF001 - internal state that no public name shows
        count = counters.count
        counters.count = lambda outcome, *rest: (outcomes.append(outcome), count(outcome, *rest))  # type: ignore
        status, text, _ = await ask(http, cairn, path)
        assert (status, text.encode()) == (200, body)
        assert cairn.count(metrics.HIDDEN_ERRORS, (sick.url[7:-3], ending)) == 1
        assert outcomes[0].ending is Ending.UPSTREAM_ERROR


@pytest.mark.parametrize(
    ("stream", "kind", "body"),
    [
        (False, "application/json", b'{"error": {"message": "sick"}}'),
        (
            True,
            "text/event-stream",
            b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"error":{"message":"sick"}}\n\n',
        ),
    ],
)
async def test_a_replica_whose_every_200_turns_out_to_be_an_error_is_left_alone(
    http: aiohttp.ClientSession, stream: bool, kind: str, body: bytes
) -> None:
    """The head of its next response does not make up for the errors behind the last ones."""
    sick = Sick(200, body, kind)
    async with sick_and_well(sick, max_retries=0) as (cairn, _):
        for number in range(60):
            chat = {
                "model": "test-model",
                "stream": stream,
                "messages": [{"role": "user", "content": f"hi {number}"}],
            }
            key = {"authorization": f"Bearer client {number % 2}"}
            async with http.post(f"{cairn.url}/chat/completions", json=chat, headers=key) as response:
                assert response.status == 200
                await response.read()
        assert 3 <= sick.asked <= 12


@pytest.mark.parametrize(
    "error",
    [
        b'data: {"error":{"message":"sick"}}\n\n',
        b'data: {"object":"error","message":"sick","code":500}\n\ndata: [DONE]\n\n',
        b'data: {"detail":"sick"}\n\ndata: [DONE]\n\n',
        b'error: {"code":500,"message":"sick"}\n\n',
        b'{\n  "error": {\n    "code": 503\n  }\n}\n',
    ],
)
async def test_a_stream_that_ends_with_an_error_is_not_complete(http: aiohttp.ClientSession, error: bytes) -> None:
    """It is relayed as it came."""
    events = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n' + error
    async with Sick(200, events, "text/event-stream") as sick, running(config_for([sick.url])) as cairn:
        _, text, _ = await ask(http, cairn, "chat/completions", stream=True)
        assert text.encode() == events
        assert cairn.count(metrics.HIDDEN_ERRORS, (sick.url[7:-3], "error_event")) == 1


async def test_a_stream_of_no_tokens_is_an_error_whose_usage_is_withheld_as_in_any_other(
    http: aiohttp.ClientSession,
) -> None:
    """The client did not ask for it, and may not know chunks without choices."""
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":0,"total_tokens":9}}\n\n'
    sick = Sick(200, usage + b"data: [DONE]\n\n", "text/event-stream")
    async with sick, running(config_for([sick.url])) as cairn:
        _, text, _ = await ask(http, cairn, "chat/completions", stream=True)
        assert text == "data: [DONE]\n\n"
        assert cairn.count(metrics.HIDDEN_ERRORS, (sick.url[7:-3], "empty")) == 1


async def test_a_json_body_with_the_content_type_of_a_stream_is_no_stream(http: aiohttp.ClientSession) -> None:
    """The beginning of the body decides, and its usage is counted."""
    body = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}})
    async with Sick(200, body.encode(), "text/event-stream") as sick, running(config_for([sick.url])) as cairn:
        _, text, _ = await ask(http, cairn, "chat/completions", stream=True)
        assert text == body
        assert cairn.tokens("output") == 2


async def test_embeddings_are_counted(http: aiohttp.ClientSession) -> None:
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        await ask(http, cairn, "embeddings")
        assert cairn.tokens("input_fresh") > 0


@pytest.mark.parametrize(
    ("auth", "header", "version"),
    [(None, b"authorization", None), (Auth.X_API_KEY, b"x-api-key", b"2023-06-01"), (Auth.API_KEY, b"api-key", None)],
)
async def test_a_replicas_key_is_sent_in_the_header_that_is_configured(
    http: aiohttp.ClientSession, auth: Auth | None, header: bytes, version: bytes | None
) -> None:
    """And in no other; Anthropic's needs a version, which a client's own replaces."""
    async with OpenAIUpstream() as upstream:
        replica = Replica(upstream.url, key=Secret("k"), auth=auth)
        pool = Pool(name="p", replicas=(replica,), kind=PoolKind.PROVIDER)
        async with running(config_for([], pools=[pool])) as cairn:
            await ask(http, cairn, "chat/completions")
            sent = upstream.generations[0]
            names = {name.lower() for name, _ in sent.headers}
            assert names & {b"authorization", b"x-api-key", b"api-key"} == {header}
            assert sent.header(header) == (b"Bearer k" if auth is None else b"k")
            assert sent.header(b"anthropic-version") == version


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 401, 403, 422, 500])
async def test_a_replicas_key_that_an_error_repeats_is_concealed(
    http: aiohttp.ClientSession, status: int, stream: bool
) -> None:
    """It is the operator's; the client has never seen it."""
    text = '{"error":{"message":"Incorrect API key provided: %s","code":"invalid_api_key"}}'
    async with Sick(status, (text % "sk-operator").encode()) as sick:
        pool = Pool(name="p", replicas=(Replica(sick.url, key=Secret("sk-operator")),))
        async with running(config_for([], pools=[pool])) as cairn:
            got = await ask(http, cairn, "chat/completions", stream=stream)
            assert got[:2] == (status, text % "***********")


ERROR = b'{"error":{"message":"Incorrect API key: %s","code":"invalid_api_key"}}'
KEY = b"sk-operator"
PACKERS = {"gzip": gzip.compress, "br": brotli.compress, "zstd": zstandard.compress, "deflate": zlib.compress}


class Pieces(OpenAIUpstream):
    """Answers every request that runs a model with an error in these pieces, which has no announced length."""

    def __init__(self, pieces: list[bytes], coding: str) -> None:
        super().__init__()
        self.parts, self.coding = pieces, coding

    async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
        if request.path.removeprefix("/v1/") not in BODIES:
            return await super()._serve(request, asked, failure)
        headers = {"content-type": "application/json", **({"content-encoding": self.coding} if self.coding else {})}
        response = web.StreamResponse(status=400, headers=headers)
        await response.prepare(request)
        for piece in self.parts:
            await response.write(piece)
            await asyncio.sleep(0)  # a segment of its own
        await response.write_eof()
        return response


@asynccontextmanager
async def with_key(upstream: OpenAIUpstream) -> AsyncIterator[Cairn]:
    async with upstream:
        pool = Pool(name="p", replicas=(Replica(upstream.url, key=Secret(KEY.decode())),))
        async with running(config_for([], pools=[pool])) as cairn:
            yield cairn


@pytest.mark.parametrize("padding", [0, 300_000])
@pytest.mark.parametrize("coding", PACKERS)
async def test_a_key_in_a_compressed_error_is_concealed(http, coding: str, padding: int) -> None:
    """In one that is short, which may pass as it is without a key, and in one that is not."""
    noise = random.Random(1).randbytes(padding)
    for text in (ERROR % KEY, ERROR % b"sk-others"):
        packed = PACKERS[coding](text + noise)
        async with with_key(Pieces([packed[:50], packed[50:]], coding)) as cairn:
            body = {"model": "test-model", **BODIES["chat/completions"]}
            async with http.post(f"{cairn.url}/chat/completions", json=body) as response:
                passed, named = await response.read(), response.headers.get("content-encoding")
        if padding or KEY in text:
            assert (passed, named) == (text.replace(KEY, b"*" * len(KEY)) + noise, None)
        else:
            assert (passed, named) == (packed, coding)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_in_an_error_behind_a_status_of_success_is_concealed(http, stream: bool) -> None:
    """As a whole body, and as the first event of a stream."""
    text = ERROR % KEY
    sick = Sick(200, b"data: %b\n\n" % text, "text/event-stream") if stream else Sick(200, text)
    async with with_key(sick) as cairn:
        got = await ask(http, cairn, "chat/completions", stream=stream)
        assert got[1].encode() == sick.body.replace(KEY, b"*" * len(KEY))


@pytest.mark.parametrize("at", [30, 36, 40])
async def test_a_key_that_two_pieces_of_an_error_split_is_concealed(http, at: int) -> None:
    """Also if the error is too long to be held back as a whole."""
    text = ERROR % KEY
    assert KEY[0] in text[:at]
    for before in (b"", b" " * 300_000):
        async with with_key(Pieces([before, text[:at], text[at:]], "")) as cairn:
            got = await ask(http, cairn, "chat/completions")
            assert got[1].encode() == before + text.replace(KEY, b"*" * len(KEY))


async def test_an_error_that_expands_beyond_measure_is_not_passed_on_where_it_may_hold_a_key(http) -> None:
    """It would have to be decoded to see that; the client is told that the response was bad."""
    async with with_key(Pieces([gzip.compress(bytes(50_000_000))], "gzip")) as cairn:
        got = await ask(http, cairn, "chat/completions")
        assert (got[0], "expands too much" in got[1]) == (502, True)


@pytest.mark.parametrize("coding", ["compress", "gzip"])
async def test_an_error_in_another_coding_than_its_header_says_passes(http, coding: str) -> None:
    """A text that is not compressed, in which a key is concealed, and any other bytes."""
    for text in (ERROR % KEY, b"\x1f damaged"):
        async with with_key(Pieces([text], coding)) as cairn:
            got = await ask(http, cairn, "chat/completions")
            assert got[1].encode("utf-8", "surrogateescape") == text.replace(KEY, b"*" * len(KEY))


async def test_a_providers_models_are_known_from_its_answers(http: aiohttp.ClientSession) -> None:
    """Without a key for its list; a model that only a client's wish named is not."""
    async with Sick(401) as upstream:
        pool = Pool(name="p", replicas=(Replica(upstream.url),), kind=PoolKind.PROVIDER)
        async with running(config_for([], pools=[pool])) as cairn:
            names = cairn.worker.replicas.model_names
            await ask(http, cairn, "chat/completions")
            assert names.label("unlisted") == "other"
            upstream.status, upstream.body = 200, b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
            await ask(http, cairn, "chat/completions", model="unlisted")
            assert names.label("unlisted") == "unlisted"

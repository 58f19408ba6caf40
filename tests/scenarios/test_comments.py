"""Clients of streams that wait: for a place, for the head of a response, and for its first event."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from proxy.config.schema import Config, Pool, Replica, Upstream
from proxy.metrics import definitions as metrics
from proxy.pipeline.silence import COMMENT
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import Failure, OpenAIUpstream

BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi"},
    "responses": {"input": "hi"},
    "messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
}
EVENTS = {
    "chat/completions": b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
    "completions": b'data: {"choices":[{"text":"a","finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
    "responses": b'event: response.completed\ndata: {"type":"response.completed","response":{"id":"resp_1"}}\n\n',
    "messages": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
}
SOON = 0.05
REFUSAL = b'{"error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}}'


class Slow(OpenAIUpstream):
    """Answers no request that runs a model before `gate` is set; then with the error `status`, or its events.

    With `plain` it answers a request for a stream with JSON.
    """

    def __init__(self, status: int = 200, gate: asyncio.Event | None = None, *, plain: bytes = b"") -> None:
        super().__init__(gate=gate or asyncio.Event())
        self.status = status
        self.plain = plain
        self.asked = asyncio.Event()

    async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
        path = request.path.removeprefix("/v1/")
        if path not in EVENTS:
            return await super()._serve(request, asked, failure)
        self.asked.set()
        assert self.gate is not None
        await self.gate.wait()
        if self.status != 200:
            return web.Response(status=self.status, body=REFUSAL, content_type="application/json")
        if self.plain:
            return web.Response(body=self.plain, content_type="application/json")
        return web.Response(body=EVENTS[path], content_type="text/event-stream")

    def open(self) -> None:
        """Let all answers come."""
        assert self.gate is not None
        self.gate.set()


def config(*upstreams: Slow, **settings: Any) -> Config:
    return config_for([each.url for each in upstreams], upstream=Upstream(comment_seconds=SOON, **settings))


@asynccontextmanager
async def asked(http: aiohttp.ClientSession, cairn: Cairn, path: str) -> AsyncIterator[aiohttp.ClientResponse]:
    body = {"model": "test-model", "stream": True, **BODIES[path]}
    async with http.post(f"{cairn.url}/{path}", json=body) as response:
        yield response


async def first_comment(response: aiohttp.ClientResponse) -> None:
    assert (response.status, response.content_type) == (200, "text/event-stream")
    assert await response.content.readexactly(len(COMMENT)) == COMMENT


async def rest(response: aiohttp.ClientResponse) -> bytes:
    """All that comes but comments."""
    return (await response.read()).replace(COMMENT, b"")


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_that_waits_for_its_upstream_begins_with_comments_and_goes_on_as_ever(
    http: aiohttp.ClientSession, path: str
) -> None:
    """The upstream has sent nothing at all by then."""
    async with Slow() as upstream, running(config(upstream)) as cairn, asked(http, cairn, path) as response:
        await first_comment(response)
        upstream.open()
        assert await rest(response) == EVENTS[path]


@pytest.mark.parametrize("path", ["chat/completions", "responses", "messages"])
async def test_an_error_of_the_upstream_after_a_comment_is_an_event_in_the_endpoints_dialect(
    http: aiohttp.ClientSession, path: str
) -> None:
    """The metrics count its status and not the 200 that was sent first."""
    async with Slow(400) as upstream, running(config(upstream)) as cairn:
        async with asked(http, cairn, path) as response:
            await first_comment(response)
            upstream.open()
            event = await rest(response)
        said = json.loads(event.rpartition(b"data: ")[2])
        assert event.startswith(b"data: " if path == "chat/completions" else b"event: error\ndata: ")
        assert (said if path == "responses" else said["error"])["message"] == "too long"
        cairn.worker.accounting.settlement.count()
        cairn.worker.reporter.report()
        assert [labels[3] for labels in cairn.heard.exposition.labels(metrics.REQUESTS)] == ["4xx"]


async def test_the_sdk_raises_the_error_that_came_after_a_comment() -> None:
    async with (
        Slow(400) as upstream,
        running(config(upstream)) as cairn,
        openai.AsyncOpenAI(base_url=cairn.url, api_key="k", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(model="test-model", messages=[], stream=True)
        upstream.open()
        with pytest.raises(openai.APIError, match="too long") as caught:
            await anext(aiter(stream))
        assert caught.value.code == "context_length_exceeded"


PART = {"type": "output_text", "text": "Hello", "annotations": []}
ITEM = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [PART]}
RESPONSE: dict[str, Any] = {
    "id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "m", "output": [ITEM],
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
}  # fmt: skip
MESSAGE = {"role": "assistant", "content": "Hello"}
COMPLETION = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": MESSAGE}],
}  # fmt: skip


async def test_the_sdks_accumulators_read_a_plain_answer_that_came_after_a_comment() -> None:
    """Of an upstream that knows no streams."""
    gate = asyncio.Event()
    async with (
        Slow(gate=gate, plain=json.dumps(RESPONSE).encode()) as upstream,
        running(config(upstream)) as cairn,
        openai.AsyncOpenAI(base_url=cairn.url, api_key="k", max_retries=0) as client,
    ):
        async with client.responses.stream(model="test-model", input="hi") as responses:
            upstream.open()
            assert (await responses.get_final_response()).output_text == "Hello"
        gate.clear()
        upstream.plain = json.dumps(COMPLETION).encode()
        async with client.chat.completions.stream(model="test-model", messages=[]) as chat:
            upstream.open()
            assert (await chat.get_final_completion()).choices[0].message.content == "Hello"


async def test_another_replica_answers_after_a_comment_if_the_first_one_fails(http: aiohttp.ClientSession) -> None:
    """Whichever of the two is tried first; comments are no part of an answer."""
    gate = asyncio.Event()
    async with Slow(503, gate) as sick, Slow(200, gate) as well, running(config(sick, well)) as cairn:
        async with asked(http, cairn, "chat/completions") as one, asked(http, cairn, "chat/completions") as two:
            await first_comment(one)
            await first_comment(two)
            gate.set()
            assert [await rest(one), await rest(two)] == [EVENTS["chat/completions"]] * 2
        assert sick.asked.is_set()


async def test_a_stream_that_waits_for_a_place_gets_comments_and_the_queues_refusal_as_an_event(
    http: aiohttp.ClientSession,
) -> None:
    async with Slow() as upstream:
        pool = Pool(name="p", replicas=(Replica(upstream.url, max_concurrent=1),))
        settings = config_for([], pools=[pool], upstream=Upstream(comment_seconds=SOON))
        async with (
            running(settings) as cairn,
            asked(http, cairn, "chat/completions") as first,
            asked(http, cairn, "responses") as second,
        ):
            await first_comment(first)
            await first_comment(second)
            assert len(upstream.generations) == 1
            await upstream.stop()
            event = await rest(second)
            assert event.startswith(b"event: error\ndata: ")
            assert json.loads(event.rpartition(b"data: ")[2])["type"] == "error"


@pytest.mark.parametrize(
    ("stream", "off"),
    [(False, {}), (True, {"comment_seconds": 0}), (True, {"comment_before_head": False})],
)
async def test_nothing_is_sent_early_to_a_client_that_wants_no_stream_or_where_it_is_off(
    http: aiohttp.ClientSession, stream: bool, off: dict[str, Any]
) -> None:
    """The status is the upstream's, however long it took; another Cairn's comments show that they were due."""
    async with Slow(400) as upstream, Slow() as other, running(config(other)) as commenting:
        limits = Upstream(**{"comment_seconds": SOON, **off})
        async with running(config_for([upstream.url], upstream=limits)) as cairn:
            body = {"model": "test-model", "stream": stream, **BODIES["chat/completions"]}
            ask = http.post(f"{cairn.url}/chat/completions", json=body)
            waiting = asyncio.get_running_loop().create_task(ask.__aenter__())
            await upstream.asked.wait()
            async with asked(http, commenting, "chat/completions") as pace:
                for _ in range(2):
                    await first_comment(pace)
            assert not waiting.done()
            upstream.open()
            response = await waiting
            assert (response.status, await response.read()) == (400, REFUSAL)
            response.close()

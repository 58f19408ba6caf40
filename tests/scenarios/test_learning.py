"""Every token is counted in whatever shape it is reported, and nothing is learned from what the text does not say."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from random import Random
from typing import Any

import brotli
import pytest
from aiohttp import web

from proxy.metrics import definitions as metrics
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import Failure, OpenAIUpstream

JSON = (("content-type", "application/json"),)
STREAM = (("content-type", "text/event-stream"),)
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


async def counted(http, path: str, sent: dict[str, Any], answer: bytes, headers=JSON) -> Cairn:
    """A worker that has relayed one answer, byte for byte."""
    upstream = OpenAIUpstream(failures=[Failure(200, headers, answer)], answers={"/v1/messages": answer})
    async with upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{cairn.url}/{path}", json=sent) as got:
            assert await got.read() == answer
        cairn.worker.reporter.report()
    return cairn


def tokens_in(cairn: Cairn) -> float:
    """Input tokens that were counted."""
    return cairn.tokens("input_fresh") + cairn.tokens("input_cached") + cairn.tokens("input_cache_write")


async def test_all_calls_of_a_compaction_are_counted(http) -> None:
    """The sum of the iterations is billed, not the last call alone."""
    iterations = [
        {"type": "compaction", "input_tokens": 180_000, "output_tokens": 3_500},
        {"type": "message", "input_tokens": 23_000, "output_tokens": 1_000},
    ]
    usage = {"input_tokens": 23_000, "output_tokens": 1_000, "iterations": iterations}
    answer = json.dumps({"id": "msg_1", "type": "message", "usage": usage}).encode()
    cairn = await counted(http, "messages", CHAT | {"max_tokens": 9}, answer)
    assert tokens_in(cairn) == 203_000
    assert cairn.tokens("output") == 4_500
    assert cairn.worker.accounting.token_counts.tokens_per_byte("m") == 0.25


@pytest.mark.parametrize(
    "beside",
    [rb'"x":NaN', rb'"x":[Infinity,-Infinity]', rb'"x":"\ud800"', b'"x":"\xff"', rb'"choices":[{"text":"\udfff"}]'],
)
async def test_usage_beside_what_is_not_quite_json_is_counted(http, beside: bytes) -> None:
    """A plain answer and a stream, with NaN, Infinity, half a surrogate pair or a stray byte in it."""
    usage = b'"usage":{"prompt_tokens":1000,"completion_tokens":7,"total_tokens":1007}'
    cairn = await counted(http, "chat/completions", CHAT, b"{" + beside + b"," + usage + b"}")
    assert (tokens_in(cairn), cairn.tokens("output")) == (1000, 7)
    events = (
        b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: {"choices":[{"finish_reason":"stop","delta":{}}],'
        + b",".join((beside if not beside.startswith(b'"choices"') else b'"y":NaN', usage))
        + b"}\n\ndata: [DONE]\n\n"
    )
    sent = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    cairn = await counted(http, "chat/completions", sent, events, STREAM)
    assert (tokens_in(cairn), cairn.tokens("output")) == (1000, 7)


USAGE = {"prompt_tokens": 1000, "completion_tokens": 7, "total_tokens": 1007}


@pytest.mark.parametrize(
    ("usage", "output"),
    [
        ({"x_groq": {"usage": USAGE}}, 7),
        ({"usage": {**USAGE, "total_tokens": 1207, "prompt_tokens_details": {"cached_tokens": 64}}}, 207),
        ({"usage": {**USAGE, "total_tokens": 1071, "prompt_tokens_details": {"cached_tokens": 64}}}, 7),
    ],
)
async def test_usage_in_the_words_of_a_provider_is_counted(http, usage: dict[str, Any], output: int) -> None:
    """Groq's own field; and Gemini's thinking, which only the total has, unless that has cached tokens twice."""
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **usage}
    events = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: ' + json.dumps(last).encode() + b"\n\n"
    cairn = await counted(http, "chat/completions", CHAT | {"stream": True}, events, STREAM)
    assert (tokens_in(cairn), cairn.tokens("output")) == (1000, output)


@pytest.mark.parametrize(
    ("coding", "encode"),
    [
        ("gzip, br", lambda text: brotli.compress(gzip.compress(text))),
        ("identity, gzip", gzip.compress),
        ("utf-8", bytes),
    ],
)
async def test_usage_within_several_codings_is_counted(http, coding: str, encode: Callable[[bytes], bytes]) -> None:
    """As servers behind gateways apply them, or name what is none."""
    body = encode(json.dumps({"usage": USAGE}).encode())
    cairn = await counted(http, "chat/completions", CHAT, body, (*JSON, ("content-encoding", coding)))
    assert (tokens_in(cairn), cairn.tokens("output")) == (1000, 7)


async def test_a_response_in_an_unknown_coding_is_no_error(http) -> None:
    """Its client may understand it, so that it says nothing against the replica."""
    cairn = await counted(http, "chat/completions", CHAT, b"\x01\x02", (*JSON, ("content-encoding", "x-own")))
    assert cairn.heard.exposition.total(metrics.HIDDEN_ERRORS, 1, "error_body") == 0


class Answering(OpenAIUpstream):
    """Answers every POST with the same bytes."""

    answer: tuple[tuple[tuple[str, str], ...], bytes] = (JSON, b"{}")

    async def _serve(self, request: web.BaseRequest, asked: Any, failure: Failure | None) -> web.StreamResponse:
        if request.method != "POST":
            return await super()._serve(request, asked, failure)
        return web.Response(headers=dict(self.answer[0]), body=self.answer[1])


async def counted_at(http, path: str, answer: bytes, headers=JSON) -> Cairn:
    """A worker that has relayed one answer of an endpoint without a prompt."""
    upstream = Answering()
    upstream.answer = (headers, answer)
    async with upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{cairn.url}/{path}", json={"model": "m", "input": "hi"}) as got:
            assert await got.read() == answer
        cairn.worker.reporter.report()
    return cairn


def events_of(*events: dict[str, Any]) -> bytes:
    """The bytes of a stream."""
    return b"".join([b"data: " + json.dumps(event).encode() + b"\n\n" for event in events])


IN_OUT = {"input_tokens": 1000, "output_tokens": 7, "total_tokens": 1007}


@pytest.mark.parametrize(
    ("path", "events"),
    [
        (
            "fim/completions",
            [
                {"choices": [{"index": 0, "delta": {"content": "a" * 90}}]},
                {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}], "usage": USAGE},
            ],
        ),
        (
            "audio/transcriptions",
            [
                {"type": "transcript.text.delta", "delta": "a"},
                {"type": "transcript.text.done", "text": "a", "usage": {"type": "tokens", **IN_OUT}},
            ],
        ),
        (
            "audio/speech",
            [{"type": "speech.audio.delta", "audio": "A"}, {"type": "speech.audio.done", "usage": IN_OUT}],
        ),
        (
            "images/generations",
            [
                {"type": "image_generation.partial_image", "b64_json": "A" * 90_000},
                {"type": "image_generation.completed", "b64_json": "A" * 1_200_000, "usage": IN_OUT},
            ],
        ),
    ],
)
async def test_usage_in_the_stream_of_any_path_that_runs_a_model_is_counted(
    http, path: str, events: list[dict[str, Any]]
) -> None:
    """Completions in the middle, transcripts, speech and pictures, whose last event may be long."""
    cairn = await counted_at(http, path, events_of(*events), STREAM)
    assert (tokens_in(cairn), cairn.tokens("output")) == (1000, 7)
    assert cairn.heard.exposition.total(metrics.STREAM_ABORTS, 0, "upstream") == 0


@pytest.mark.parametrize("path", ["rerank", "embeddings"])
async def test_a_total_is_the_prompt_where_there_is_no_output(http, path: str) -> None:
    """Jina and Voyage report nothing else."""
    cairn = await counted_at(http, path, b'{"results":[],"usage":{"total_tokens":38}}')
    assert (tokens_in(cairn), cairn.tokens("output")) == (38, 0)


@pytest.mark.parametrize("coding", ["", "gzip"])
@pytest.mark.parametrize("place", ["before", "behind"])
async def test_usage_of_a_response_too_long_to_be_kept_is_counted(http, place: str, coding: str) -> None:
    """Several large pictures in one response, however it is compressed."""
    usage = b'"usage":' + json.dumps(IN_OUT).encode()
    pictures = b'"data":[{"b64_json":"' + base64.b64encode(Random(1).randbytes(6_300_000)) + b'"}]'
    body = b"{" + b",".join((usage, pictures) if place == "before" else (pictures, usage)) + b"}"
    packed = gzip.compress(body, 1) if coding else body
    headers = (*JSON, ("content-encoding", coding)) if coding else JSON
    cairn = await counted_at(http, "images/generations", packed, headers)
    assert (tokens_in(cairn), cairn.tokens("output")) == (1000, 7)


@pytest.mark.parametrize("after", [0, 5_000, 20_000, 300_000])
async def test_usage_far_from_the_end_of_a_long_last_event_is_counted(http, after: int) -> None:
    """The last event of a response repeats the request, with the usage before or after it."""
    delta = {"type": "response.output_text.delta", "delta": "a"}
    usage = {
        "input_tokens": 500,
        "output_tokens": 6,
        "total_tokens": 506,
        "input_tokens_details": {"cached_tokens": 0},
    }
    tool = {"name": "t", "parameters": {"usage": {"type": "string"}}}
    response = {
        "id": "resp_1",
        "instructions": "b" * 100_000,
        "usage": usage,
        "tools": [tool],
        "metadata": "c" * after,
    }
    ended = {"type": "response.completed", "response": response}
    events = "".join(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in (delta, ended))
    cairn = await counted(http, "responses", {"model": "m", "input": "hi", "stream": True}, events.encode(), STREAM)
    assert (tokens_in(cairn), cairn.tokens("output")) == (500, 6)
    assert cairn.heard.exposition.total(metrics.STREAM_ABORTS, 0, "upstream") == 0


@pytest.mark.parametrize("fields", [{"num_cached_tokens": 64}, {"prompt_token_details": {"cached_tokens": 64}}])
async def test_mistrals_own_fields_are_read(http, fields) -> None:
    """Cached tokens at the top, or in details whose name is in the singular."""
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101, **fields}
    cairn = await counted(http, "chat/completions", CHAT, json.dumps({"usage": usage}).encode())
    assert (cairn.tokens("input_cached"), cairn.tokens("input_fresh")) == (64, 36)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_background_response_is_counted_once_when_its_usage_first_comes(http, streamed: bool) -> None:
    """Not at its creation, not while it runs, and not a second time."""
    queued = {"id": "resp_1", "object": "response", "status": "queued", "background": True, "usage": None}
    usage = {"input_tokens": 500, "output_tokens": 6, "total_tokens": 506}
    done = json.dumps(queued | {"status": "completed", "model": "m", "usage": usage}).encode()
    if streamed:
        done = b'event: response.completed\ndata: {"type":"response.completed","response":' + done + b"}\n\n"
    upstream = OpenAIUpstream(failures=[Failure(200, JSON, json.dumps(queued).encode())])
    upstream.answers["/v1/responses/resp_1"] = json.dumps(queued | {"status": "in_progress"}).encode()
    async with upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{cairn.url}/responses", json={"model": "m", "input": "x", "background": True}) as got:
            assert got.status == 200
        for expected in (0, 500, 500):
            async with http.get(f"{cairn.url}/responses/resp_1") as got:
                assert got.status == 200
                await got.read()
            assert tokens_in(cairn) == expected
            upstream.answers["/v1/responses/resp_1"] = done
        async with http.get(f"{cairn.url}/responses/resp_2") as got:
            await got.read()
        assert tokens_in(cairn) == 500


TEACHES_NOTHING = {
    "continued": {"input": "x", "previous_response_id": "resp_9"},
    "conversation": {"input": "x", "conversation": {"id": "conv_9"}},
    "stored prompt": {"input": "x", "prompt": {"id": "pmpt_1"}},
    "file": {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "file-1"}]}]},
    "picture by address": {
        "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x.example/a.png"}]}]
    },
    "hosted tool": {"input": "x", "tools": [{"type": "web_search"}]},
}


@pytest.mark.parametrize("fields", TEACHES_NOTHING.values(), ids=TEACHES_NOTHING)
async def test_a_prompt_that_the_upstream_adds_to_teaches_no_tokens_per_byte(http, fields) -> None:
    """Sixty such answers must not make a prompt of 40 KB count as millions of tokens."""
    usage = {"input_tokens": 90_000, "output_tokens": 1, "total_tokens": 90_001}
    text = {"x": "y" * 100_000} if "tools" not in fields else {}
    answer = json.dumps({"id": "resp_1", "usage": usage}).encode()
    cairn = await counted(http, "responses", {"model": "m", **fields, **text}, answer)
    assert tokens_in(cairn) == 90_000
    assert cairn.worker.accounting.token_counts.tokens_per_byte("m") == 0.25


async def test_plain_text_and_the_clients_own_tools_teach(http) -> None:
    """The ratio follows what is reported for a prompt that is all there."""
    usage = {"prompt_tokens": 5_000, "completion_tokens": 1, "total_tokens": 5_001}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"url": {"type": "string"}}}}]
    sent = {"model": "m", "messages": [{"role": "user", "content": "a" * 40_000}], "tools": tools}
    cairn = await counted(http, "chat/completions", sent, json.dumps({"usage": usage}).encode())
    assert cairn.worker.accounting.token_counts.tokens_per_byte("m") < 0.2


async def test_no_answer_makes_a_byte_more_than_one_token(http) -> None:
    """A count that cannot be that of this text alone is counted and not learned."""
    usage = {"prompt_tokens": 2_000_000, "completion_tokens": 1, "total_tokens": 2_000_001}
    cairn = await counted(http, "chat/completions", CHAT, json.dumps({"usage": usage}).encode())
    assert tokens_in(cairn) == 2_000_000
    assert cairn.worker.accounting.token_counts.tokens_per_byte("m") == 0.25


async def test_a_conversation_of_400_000_messages_is_refused_and_stalls_nobody(http) -> None:
    """They are a 400 that names them, without a view being made of each."""
    body = b'{"model":"m","messages":[' + b",".join([b"{}"] * 400_000) + b"]}"
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{cairn.url}/chat/completions", data=body) as got:
            assert got.status == 400
            assert (await got.json())["error"]["param"] == "messages"
        assert upstream.generations == []

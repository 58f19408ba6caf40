"""Cairn's assumptions about vLLM, tried on a real server: pages, usage, errors, rendering and reuse."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from benchmarks.vllm.model import NAME
from benchmarks.vllm.sessions import words
from proxy.fleet.engine_facts import read_metrics, read_version
from proxy.fleet.template_probe import Rendering, facts_of, read_tokens
from proxy.model import TemplateFacts, ToolOrder

BLOCK_TOKENS = 32

Post = Callable[..., Awaitable[tuple[int, Any]]]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def post(http, vllm_url) -> Post:
    """Send JSON to a path; the status and the answer."""

    async def send(path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        async with http.post(f"{vllm_url}{path}", json={"model": NAME, **body}, headers=headers) as answer:
            return answer.status, json.loads(await answer.read())

    return send


def chat(*texts: str, **fields: Any) -> dict[str, Any]:
    """A request with a system message, and the others by turns."""
    roles = ["system", *(("user", "assistant") * len(texts))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": messages, "max_tokens": 4, **fields}


def cached(answer: Any) -> int:
    """The cached tokens of an answer."""
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


async def page(http: aiohttp.ClientSession, url: str) -> bytes:
    async with http.get(url) as answer:
        assert answer.status == 200
        return await answer.read()


async def test_metrics_and_version_say_what_the_engine_is_and_holds(http, vllm_url):
    metrics = await page(http, f"{vllm_url}/metrics")
    facts = read_metrics(metrics)
    assert facts.capacity_tokens == 48_000
    assert facts.engine == "vLLM"
    assert facts.ranks == 1
    assert facts.started_unix_seconds is not None
    assert read_version(await page(http, f"{vllm_url}/version")).version
    for name in (b"num_requests_running", b"num_requests_waiting", b"prefix_cache_hits_total"):
        assert b'\nvllm:%b{engine="0",' % name in metrics


async def test_models_name_their_root(http, vllm_url):
    """By which names of one model are recognised."""
    (model,) = json.loads(await page(http, f"{vllm_url}/v1/models"))["data"]
    assert model["id"] == NAME
    assert model["root"].endswith("model")
    assert model["parent"] is None


async def test_cached_tokens_are_whole_blocks_of_what_was_computed_before(post):
    system = words("blocks", 700)
    _, first = await post("/v1/chat/completions", chat(system, "q1"))
    _, again = await post("/v1/chat/completions", chat(system, "q1"))
    _, other = await post("/v1/chat/completions", chat(system, "another question"))
    assert cached(first) == 0
    assert cached(again) == (again["usage"]["prompt_tokens"] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert 600 < cached(other) <= cached(again)


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"cache_salt": "mine"}, {"cache_salt": "others"}])
async def test_a_salt_and_log_probabilities_of_the_prompt_find_nothing(post, fields):
    system = words("salted", 300)
    await post("/v1/chat/completions", chat(system, "q"))
    status, answer = await post("/v1/chat/completions", chat(system, "q", **fields))
    assert status == 200
    assert cached(answer) == 0


async def test_streams_end_with_usage_if_it_is_asked_for(http, vllm_url):
    """In a chunk without choices; the first chunks bring no text."""
    body = {"model": NAME, **chat("s", "q", stream=True, stream_options={"include_usage": True})}
    async with http.post(f"{vllm_url}/v1/chat/completions", json=body) as answer:
        lines = [line[6:] async for line in answer.content if line.startswith(b"data: ")]
    assert lines[-1].strip() == b"[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert not events[0]["choices"][0]["delta"].get("content")
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_other_dialects_report_cached_tokens_too(post):
    text = words("dialects", 400)
    for _ in range(2):
        _, completion = await post("/v1/completions", {"prompt": text, "max_tokens": 2})
        _, message = await post("/v1/messages", {"messages": [{"role": "user", "content": text}], "max_tokens": 2})
        _, response = await post("/v1/responses", {"input": text, "max_output_tokens": 16, "store": False})
    assert cached(completion) > 300
    assert message["usage"]["cache_read_input_tokens"] > 300
    assert response["usage"]["input_tokens_details"]["cached_tokens"] > 300


async def test_refusals_have_a_status_and_an_error_that_names_the_reason(post):
    status, unknown = await post("/v1/chat/completions", {**chat("s", "q"), "model": "nope"})
    assert status == 404
    assert unknown["error"]["param"] == "model"
    status, long = await post("/v1/chat/completions", chat(words("long", 40_000), "q"))
    assert status == 400
    assert "context length" in long["error"]["message"]
    status, wrong = await post("/v1/chat/completions", chat("s", "q", temperature="warm"))
    assert status in (400, 422)
    assert "temperature" in json.dumps(wrong)
    status, _ = await post("/v1/chat/completions", {"messages": "none"})
    assert status in (400, 422)


async def test_probes_show_the_template(post):
    """By /tokenize with messages, tools and arguments, as Cairn asks it."""

    async def render(request: dict[str, Any]) -> Rendering | None:
        status, answer = await post("/tokenize", {"add_generation_prompt": True, **request})
        return read_tokens(json.dumps(answer).encode()) if status == 200 else None

    facts = await facts_of(render)
    assert facts == TemplateFacts(
        order=ToolOrder.SYSTEM_FIRST,
        drops_reasoning=True,
        none_drops_tools=False,
        headless=frozenset({"enable_thinking", "thinking", "reasoning_effort", "documents"}),
    )


@pytest.mark.parametrize("dialect", ["chat", "messages"])
async def test_a_billing_line_is_not_rendered(post, dialect):
    """So another one before the same system prompt finds all of it."""
    prompt = words(f"billing {dialect}", 400)

    async def ask(nonce: str) -> int:
        parts = [f"x-anthropic-billing-header: cc_version=1; cch={nonce};", prompt]
        system = [{"type": "text", "text": text} for text in parts]
        question = {"role": "user", "content": "q"}
        if dialect == "chat":
            messages = [{"role": "system", "content": system}, question]
            return cached((await post("/v1/chat/completions", {"messages": messages, "max_tokens": 2}))[1])
        _, answer = await post("/v1/messages", {"system": system, "messages": [question], "max_tokens": 2})
        return answer["usage"]["cache_read_input_tokens"] or 0

    assert await ask("a1b2c") == 0
    assert await ask("d3e4f") > 300


async def test_marks_and_ids_of_messages_are_not_rendered(post):
    text = words("marks", 400)
    part = {"type": "text", "text": text}
    plain = {"role": "user", "content": [part]}
    marked = {"role": "user", "content": [{**part, "cache_control": {"type": "ephemeral"}}], "id": "msg_1"}
    await post("/v1/chat/completions", {"messages": [plain], "max_tokens": 2})
    status, answer = await post("/v1/chat/completions", {"messages": [marked], "max_tokens": 2})
    assert status == 200
    assert cached(answer) > 300

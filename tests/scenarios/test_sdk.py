"""The OpenAI Python SDK with only its base URL changed: both clients, plain, streamed, tools, errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.support.cairn import config_for, running
from tests.support.openai_upstream import Failure, OpenAIUpstream

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief. " * 200}, {"role": "user", "content": "Hello?"}]
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]


async def both_ways(use: Callable[[openai.OpenAI], Any]) -> tuple[Any, Any]:
    """Return the results of `use` directly and through Cairn, by the synchronous client in a thread."""

    def run(url: str) -> Any:
        with openai.OpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
            return use(client)

    async with OpenAIUpstream() as direct, OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        return await asyncio.to_thread(run, direct.url), await asyncio.to_thread(run, cairn.url)


async def test_a_plain_chat_is_the_same() -> None:
    """Text, finish reason and usage."""
    direct, through = await both_ways(
        lambda client: client.chat.completions.create(model="test-model", messages=MESSAGES, tools=TOOLS)
    )
    assert through.model_dump() == direct.model_dump()


async def test_a_streamed_chat_is_the_same() -> None:
    """Every chunk."""
    direct, through = await both_ways(
        lambda client: [
            chunk.model_dump()
            for chunk in client.chat.completions.create(model="test-model", messages=MESSAGES, stream=True)
        ]
    )
    for chunk in through:
        chunk.pop("usage", None)
    for chunk in direct:
        chunk.pop("usage", None)
    assert through == direct
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in through) == "Hello, world"


async def test_a_stream_with_usage_is_the_same() -> None:
    """The usage chunk reaches the client that asked."""
    direct, through = await both_ways(
        lambda client: [
            chunk.model_dump()
            for chunk in client.chat.completions.create(
                model="test-model", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        ]
    )
    assert through == direct
    assert through[-1]["usage"]["prompt_tokens"] > 0


async def test_completions_responses_embeddings_and_models_are_the_same() -> None:
    """The other endpoints."""
    for use in (
        lambda client: client.completions.create(model="test-model", prompt="Once"),
        lambda client: client.responses.create(model="test-model", input="Hi", instructions="Be brief"),
        lambda client: client.embeddings.create(model="test-model", input=["a", "b"]),
        lambda client: list(client.models.list()),
        lambda client: [event.type for event in client.responses.create(model="test-model", input="x", stream=True)],
    ):
        direct, through = await both_ways(use)
        assert through == direct


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (Failure(400, body=b'{"error": {"message": "bad", "type": "x"}}'), openai.BadRequestError),
        (Failure(401), openai.AuthenticationError),
        (Failure(429, (("retry-after", "3"),)), openai.RateLimitError),
        (Failure(500), openai.InternalServerError),
        (Failure(cut_after_chunks=0), openai.InternalServerError),
    ],
)
async def test_errors_are_the_sdks_own(failure: Failure, kind: type[Exception]) -> None:
    """Each failure raises what the SDK's users catch."""
    async with OpenAIUpstream() as upstream:
        upstream.failures = [failure] * 3
        async with (
            running(config_for([upstream.url])) as cairn,
            openai.AsyncOpenAI(base_url=cairn.url, api_key="sk-test", max_retries=0) as client,
        ):
            with pytest.raises(kind):
                await client.chat.completions.create(model="test-model", messages=MESSAGES)


async def test_the_asynchronous_client_streams_and_a_broken_stream_raises() -> None:
    """A stream that breaks is an APIError, never a short answer taken for whole."""
    async with (
        OpenAIUpstream(failures=[None, Failure(cut_after_chunks=2)]) as upstream,
        running(config_for([upstream.url])) as cairn,
        openai.AsyncOpenAI(base_url=cairn.url, api_key="sk-test", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(model="test-model", messages=MESSAGES, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == "Hello, world"
        broken = await client.chat.completions.create(model="test-model", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError):
            [chunk async for chunk in broken]

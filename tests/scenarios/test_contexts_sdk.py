"""Stored contexts with the OpenAI Python SDK, before a scripted upstream and before a real engine."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import openai
import pytest

from demo.shapes import MODEL_NAME
from proxy.metrics import definitions as metrics
from tests.scenarios.test_conversations import words
from tests.support.cairn import config_for, running
from tests.support.engine import Engine
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import Valkey

READY_SECONDS = 60.0
QUESTIONS = 40


def upload_and_ask(url: str, model: str, document: str, questions: int) -> tuple[Any, list[Any]]:
    """The whole flow: upload, wait until ready, ask through the tag. The context, and the usage of each answer."""
    with openai.OpenAI(base_url=url, api_key="sk-test", max_retries=0) as client:
        made = client.post(
            "/caching",
            cast_to=object,
            body={
                "model": model,
                "messages": [{"role": "system", "content": document}],
                "tags": ["book"],
                "ttl": 600,
            },
        )
        assert isinstance(made, dict)
        deadline = time.monotonic() + READY_SECONDS  # noqa: TID251
        while made["status"] == "pending" and time.monotonic() < deadline:  # noqa: TID251
            time.sleep(0.02)
            made = client.get(f"/caching/{made['id']}", cast_to=object)
            assert isinstance(made, dict)
        usages = []
        for number in range(questions):
            messages: list[Any] = [
                {"role": "cache", "content": "tag=book;reset_ttl=600"},
                {"role": "user", "content": f"Question {number}?"},
            ]
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=2, temperature=0)
            usages.append(answer.usage)
        with pytest.raises(openai.NotFoundError):
            client.post("/caching/refs/tags", cast_to=object, body={"tag": "x", "cache_id": "cache-" + "0" * 32})
        return made, usages


def check(made: Any, usages: list[Any]) -> None:
    """Every question's cached tokens are the context's, within 2 %."""
    assert made["status"] == "ready"
    off = [abs(usage.prompt_tokens_details.cached_tokens - made["tokens"]) / made["tokens"] for usage in usages]
    assert max(off) < 0.02


async def test_the_whole_flow_with_the_sdk(redis: Valkey) -> None:
    """Upload, pending to ready, questions through the tag."""
    redis.flush()
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url], redis.url)) as cairn:
        made, usages = await asyncio.to_thread(upload_and_ask, cairn.url, "test-model", words("sdk", 9000), 5)
        check(made, usages)
        assert cairn.count(metrics.CONTEXT_USES, ("used",)) == 5


@pytest.mark.engine
async def test_forty_questions_on_a_stored_document_before_a_real_engine(
    redis: Valkey, two_engines: tuple[Engine, Engine]
) -> None:
    """Each goes where the document is warm, and what that saved is in the metrics."""
    redis.flush()
    async with running(config_for([engine.url for engine in two_engines], redis.url)) as cairn:
        made, usages = await asyncio.to_thread(
            upload_and_ask, cairn.url, MODEL_NAME, words("a stored document", 600), QUESTIONS
        )
        check(made, usages)
        cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
        assert cairn.count(metrics.CONTEXT_CACHED_TOKENS) == cached
        assert cairn.tokens("input_cached") >= cached

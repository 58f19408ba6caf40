"""Before a real engine: the same bytes as directly, and the cached tokens that were predicted."""

from __future__ import annotations

import re
from typing import Any

import aiohttp
import pytest

from demo.shapes import MODEL_NAME
from tests.scenarios.test_conversations import words
from tests.support.cairn import config_for, running
from tests.support.engine import Engine

pytestmark = pytest.mark.engine

VARYING = re.compile(rb'"(id|created|timings|system_fingerprint)":("[^"]*"|\d+|\{[^}]*\})')


def body(question: str, *, stream: bool, document: str = "") -> dict[str, Any]:
    content = [{"role": "system", "content": document or words("engine", 150)}, {"role": "user", "content": question}]
    return {
        "model": MODEL_NAME,
        "messages": content,
        "temperature": 0,
        "max_tokens": 8,
        "stream": stream,
        "cache_prompt": False,  # a warm prefill may round differently; here only the path may differ
    }


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_the_direct_ones_byte_for_byte(
    stream: bool, engine: Engine, http: aiohttp.ClientSession
) -> None:
    """At temperature 0 only ids, times and stamps differ."""
    asked = body("What then?", stream=stream)
    async with running(config_for([engine.url])) as cairn:
        answers = []
        for url in (engine.url, cairn.url):
            async with http.post(f"{url.removesuffix('/v1')}/v1/chat/completions", json=asked) as answer:
                assert answer.status == 200
                answers.append(await answer.read())
    direct, through = (VARYING.sub(rb"", answer) for answer in answers)
    assert through == direct
    assert len(through) > 100


async def test_reported_cached_tokens_are_those_predicted(
    two_engines: tuple[Engine, Engine], http: aiohttp.ClientSession
) -> None:
    """After the first answers prediction and report differ by less than 5 %, and follow-ups stay where they began."""
    async with running(config_for([engine.url for engine in two_engines])) as cairn:
        off: list[float] = []
        for document in range(2):
            text = words(f"document {document}", 250)
            homes = set()
            for turn in range(4):
                asked = body(f"Question {turn}?", stream=False, document=text) | {"cache_prompt": True}
                async with http.post(f"{cairn.url}/chat/completions", json=asked) as answer:
                    assert answer.status == 200
                    cached = (await answer.json())["usage"]["prompt_tokens_details"]["cached_tokens"]
                    homes.add(answer.headers["x-cairn-replica"])
                    predicted = int(answer.headers["x-cairn-matched-tokens"])
                if turn > 1:
                    off.append(abs(predicted - cached) / cached)
            assert len(homes) == 1
        assert max(off) < 0.05

"""Routing's own part of the cached tokens, against what replicas of the same kind really have under round robin."""

from __future__ import annotations

import random
from typing import Any

import aiohttp

from proxy.metrics import definitions as metrics
from tests.scenarios.test_conversations import words
from tests.support.cairn import config_for, running
from tests.support.openai_upstream import OpenAIUpstream, render

REPLICAS = 3


def conversations() -> list[dict[str, Any]]:
    """The turns of twelve conversations under one system prompt, mixed as they would come."""
    chosen = random.Random(5)
    talks = [[{"role": "system", "content": words("system", 300)}] for _ in range(12)]
    bodies: list[dict[str, Any]] = []
    while len(bodies) < 96:
        talk = chosen.choice(talks)
        talk.append({"role": "user", "content": words(f"turn {len(bodies)}", chosen.randint(50, 600))})
        bodies.append({"model": "test-model", "messages": list(talk)})
    return bodies


async def test_the_gain_is_what_the_same_replicas_lack_under_round_robin(http: aiohttp.ClientSession) -> None:
    """To a tenth; the whole stays what the upstreams reported."""
    bodies = conversations()
    in_turn = [OpenAIUpstream() for _ in range(REPLICAS)]
    for number, body in enumerate(bodies):
        in_turn[number % REPLICAS].prefill(render(body))
    round_robin = sum(sum(upstream.cached_tokens) for upstream in in_turn)

    async with OpenAIUpstream() as a, OpenAIUpstream() as b, OpenAIUpstream() as c:
        async with running(config_for([a.url, b.url, c.url])) as cairn:
            for body in bodies:
                async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
                    await answer.read()
                    assert answer.status == 200
            gain = cairn.count(metrics.ROUTING_GAIN)
            cached = sum(sum(upstream.cached_tokens) for upstream in (a, b, c))
            assert cairn.tokens("input_cached") == cached
        assert round_robin < cached
        assert abs(gain - (cached - round_robin)) < 0.1 * (cached - round_robin)

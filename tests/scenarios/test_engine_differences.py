"""Differences between engines, through a running worker: ranks behind one URL, templates, uncached requests."""

from __future__ import annotations

from typing import Any

import aiohttp

from proxy.config.schema import Pool, Replica, Template
from proxy.metrics import definitions as metrics
from proxy.model import ToolOrder
from tests.scenarios.test_conversations import words
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import OpenAIUpstream, render


def body(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ["system", *(("user", "assistant") * len(texts))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": "test-model", "messages": messages, **fields}


async def ask(http: aiohttp.ClientSession, cairn: Cairn, request: dict[str, Any], **headers: str) -> str:
    """Send a chat request; the replica that served it."""
    async with http.post(f"{cairn.url}/chat/completions", json=request, headers=headers) as answer:
        assert answer.status == 200
        await answer.read()
        return answer.headers["x-cairn-replica"]


async def test_each_rank_is_told_by_its_header_and_a_clients_own_header_changes_nothing(http) -> None:
    """A conversation stays on its rank, a cold one goes to the other; what a client claims is replaced."""
    async with OpenAIUpstream() as engine:
        pool = Pool(name="engines", replicas=(Replica(engine.url, name="engine", ranks=2, capacity_tokens=10**6),))
        async with running(config_for([], pools=[pool])) as cairn:
            one = body(words("one", 400), "a")
            first = await ask(http, cairn, one, **{"x-data-parallel-rank": "7"})
            other = await ask(http, cairn, body(words("two", 400), "b"))
            again = await ask(http, cairn, body(words("one", 400), "a", "answer", "more"))
        ranks = [asked.header(b"x-data-parallel-rank") for asked in engine.generations]
    assert {first, other} == {"engine/rank-0", "engine/rank-1"}
    assert again == first
    assert ranks == [each.rpartition("-")[2].encode() for each in (first, other, again)]


async def test_ranks_that_the_engines_metrics_show_need_no_configuration(http) -> None:
    """Two conversations go to two ranks, and each stays on its own."""
    line = 'vllm:cache_config_info{block_size="16",num_gpu_blocks="60000",engine="%d"} 1.0\n'
    async with OpenAIUpstream() as engine:
        engine.answers["/metrics"] = (line % 0 + line % 1).encode()
        async with running(config_for([engine.url])) as cairn:
            first = await ask(http, cairn, body(words("one", 400), "a"))
            other = await ask(http, cairn, body(words("two", 400), "b"))
            again = await ask(http, cairn, body(words("one", 400), "a", "answer", "more"))
        ranks = [asked.header(b"x-data-parallel-rank") for asked in engine.generations]
    assert again == first != other
    assert set(ranks) == {b"0", b"1"}
    assert ranks[2] == ranks[0]


async def test_a_template_with_the_system_message_first_is_what_prompts_are_found_by(http) -> None:
    """With the tools in common and another system message nothing is taken for known; bytes go on as they came."""
    shelf = [{"type": "function", "function": {"name": "f", "description": words("tools", 400)}}]
    async with OpenAIUpstream() as a, OpenAIUpstream() as b:
        replicas = (Replica(a.url, name="a"), Replica(b.url, name="b"))
        pool = Pool(name="engines", replicas=replicas, template=Template(order=ToolOrder.SYSTEM_FIRST))
        async with running(config_for([], pools=[pool])) as cairn:
            first = await ask(http, cairn, body(words("one", 400), "q", tools=shelf))
            second = await ask(http, cairn, body(words("two", 400), "q", tools=shelf))
            again = await ask(http, cairn, body(words("two", 400), "other", tools=shelf))
        assert second != first
        assert again == second
        assert b'"messages": [' in a.generations[0].body


async def test_requests_that_want_no_cache_are_answered_and_teach_nothing(http) -> None:
    """Two conversations of which nothing is reported as cached stay known, as do all others."""
    async with OpenAIUpstream() as engine, running(config_for([engine.url])) as cairn:
        talks = [words(f"talk {number}", 600) for number in range(4)]
        for _ in range(2):
            for talk in talks:
                await ask(http, cairn, body(talk, "q"))
        engine.restart()
        for talk in talks[:2]:
            await ask(http, cairn, body(talk, "q", cache_prompt=False))
        assert cairn.worker.memory.index.epoch(0) == 0
        assert cairn.count(metrics.TASK_FAILURES, ("template prober",)) == 0


async def test_cached_counts_that_cannot_be_are_counted_and_are_no_savings(http) -> None:
    """A replica that reports prompts nobody has sent before as cached is doubted after a few, and says so."""
    async with OpenAIUpstream() as engine, running(config_for([engine.url])) as cairn:
        counted = []
        for number in range(12):
            text = words(f"new {number}", 2_500)
            engine.prefill(render(body(text, "q")))  # computed elsewhere a moment before
            await ask(http, cairn, body(text, "q"))
            counted.append(cairn.tokens("input_cached"))
        assert counted[0] < counted[3] == counted[-1]
        assert cairn.count(metrics.CACHED_IMPLAUSIBLE) == 8

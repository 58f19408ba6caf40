"""Conversations over two replicas: every follow-up lands where its longest prefix is."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp

from proxy.config.schema import Pool, Replica
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import eventually

TURNS = 10
CONVERSATIONS = 20
SYSTEM = "You answer questions about waymarks on mountain paths. " * 40
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def words(seed: str, count: int) -> str:
    """Text that no other seed gives."""
    dice = random.Random(seed)
    return " ".join(f"{dice.getrandbits(32):x}" for _ in range(count))


async def ask(http: aiohttp.ClientSession, cairn: Cairn, messages: list[Any], tools: list[Any] | None) -> Any:
    """One turn: (replica, predicted tokens, reported cached tokens)."""
    body: dict[str, Any] = {"model": "test-model", "messages": messages}
    if tools:
        body["tools"] = tools
    async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
        assert answer.status == 200
        usage = (await answer.json())["usage"]
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
        return answer.headers["x-cairn-replica"], int(answer.headers["x-cairn-matched-tokens"]), cached


async def test_every_follow_up_lands_where_its_longest_prefix_is(http: aiohttp.ClientSession) -> None:
    """Ten turns on each of twenty conversations with a common system prompt, forks and a change of tools."""
    async with OpenAIUpstream() as one, OpenAIUpstream() as two, running(config_for([one.url, two.url])) as cairn:
        histories: dict[int, list[Any]] = {}
        tools: dict[int, list[Any]] = {}
        moved: list[tuple[int, int]] = []
        off: list[float] = []
        for number in range(CONVERSATIONS):
            question = {"role": "user", "content": words(f"{number}/0", 60)}
            histories[number] = [{"role": "system", "content": SYSTEM}, question]
        # all at once, so that they spread over both
        first = await asyncio.gather(*[ask(http, cairn, history, None) for history in histories.values()])
        homes = {number: replica for number, (replica, _, _) in enumerate(first)}
        for turn in range(1, TURNS):
            for number, history in histories.items():
                history.append({"role": "assistant", "content": words(f"a{number}/{turn}", 30)})
                history.append({"role": "user", "content": words(f"{number}/{turn}", 60)})
                if number == 7 and turn == 5:  # a fork in mid-conversation: another second question
                    history[3:] = [{"role": "user", "content": words("fork", 60)}]
                if number == 11 and turn == 5:  # tools change: everything behind them is new
                    tools[number] = [TOOL]
                replica, predicted, cached = await ask(http, cairn, history, tools.get(number))
                if number in tools and turn == 5:
                    homes[number] = replica
                elif replica != homes[number]:
                    moved.append((number, turn))
                if turn > 1 and cached:
                    off.append(abs(predicted - cached) / cached)
        assert moved == []
        assert len(set(homes.values())) == 2, "one replica got everything"
        assert sum(off) / len(off) < 0.05
        cached_share = sum(one.cached_tokens + two.cached_tokens) / sum(one.prompt_tokens + two.prompt_tokens)
        assert cached_share > 0.75


async def test_a_burst_of_siblings_makes_at_most_two_prefills(http: aiohttp.ClientSession) -> None:
    """Fifty requests with the same cold prompt at once: the others wait for the first, or share a second."""
    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as one, OpenAIUpstream(gate=gate) as two:
        async with running(config_for([one.url, two.url])) as cairn:
            document = words("document", 3000)
            bodies = [
                [{"role": "system", "content": document}, {"role": "user", "content": f"question {number}"}]
                for number in range(50)
            ]
            asked = asyncio.gather(*[ask(http, cairn, body, None) for body in bodies])
            await asyncio.sleep(0)
            gate.set()
            await asked
        cold = [
            prompt
            for upstream in (one, two)
            for prompt, cached in zip(upstream.prompt_tokens, upstream.cached_tokens, strict=True)
            if cached < prompt / 2
        ]
        assert 1 <= len(cold) <= 2


async def test_a_restarted_replica_is_known_as_cold_after_two_answers(http: aiohttp.ClientSession) -> None:
    """Two confident predictions with nothing cached begin a new epoch; nothing of the old one is predicted."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        prompts = [[{"role": "user", "content": words(f"p{number}", 900)}] for number in range(6)]
        for _ in range(2):
            for prompt in prompts:
                await ask(http, cairn, prompt, None)
        upstream.restart()
        predicted = [(await ask(http, cairn, prompt, None))[1] for prompt in prompts]
        assert [tokens > 1000 for tokens in predicted] == [True, True, False, False, False, False]


async def test_a_failure_takes_the_placement_back(http: aiohttp.ClientSession) -> None:
    """Tokens that were never computed are not predicted."""
    from tests.support.openai_upstream import Failure

    async with OpenAIUpstream(failures=[Failure(500)]) as upstream, running(config_for([upstream.url])) as cairn:
        body = {"model": "test-model", "messages": [{"role": "user", "content": words("x", 900)}]}
        async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
            assert answer.status == 500
        assert cairn.worker.memory.index.replicas()[0].blocks == 0


async def test_a_client_that_leaves_while_it_waits_for_a_place_leaves_nothing(http: aiohttp.ClientSession) -> None:
    """Its prefix was never sent, so it is not placed; its charge and its place in the queue are gone."""
    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as upstream:
        pool = Pool(name="p", replicas=(Replica(upstream.url, max_concurrent=1),))
        async with running(config_for([], pools=[pool])) as cairn:
            first = asyncio.get_running_loop().create_task(
                ask(http, cairn, [{"role": "user", "content": words("first", 900)}], None)
            )
            await eventually(lambda: upstream.in_flight == 1)
            blocks = cairn.worker.memory.index.replicas()[0].blocks
            second = asyncio.get_running_loop().create_task(
                ask(http, cairn, [{"role": "user", "content": words("second", 900)}], None)
            )
            await eventually(lambda: len(cairn.worker.requests.queues.by_replica[0]) == 1)
            second.cancel()
            await eventually(lambda: cairn.worker.requests.in_flight_limit.requests == 1)
            assert len(cairn.worker.requests.queues.by_replica[0]) == 0
            assert cairn.worker.memory.index.replicas()[0].blocks == blocks
            gate.set()
            await first
            assert cairn.worker.replicas.fleet.own_in_flight(0) == 0
        assert len(upstream.generations) == 1

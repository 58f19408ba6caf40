"""Several proxies on one Redis, and Redis at its worst: the index is shared, and no request ever waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import aiohttp
import pytest

from cache import JournalState
from proxy.errors import RateLimited
from proxy.routing.cold_admission import TurnKind
from proxy.routing.cold_turn import Turn, Verdict
from proxy.routing.fair_shares import Priority
from tests.scenarios.test_conversations import words
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import Valkey, eventually
from tests.support.valkey import running as valkey_running

WITHIN_SECONDS = 1.0  # a second proxy knows what the first one placed; 1 to 30 ms, but machines may be busy


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with valkey_running() as valkey:
        yield valkey


NEW_SESSION = Turn(
    pool="engines",
    prompt_tokens=100_000.0,
    uncached_tokens=100_000.0,
    known_tokens=0.0,
    prompt_end=7,
    body_bytes=1_000,
    tenant="tenant",
    weight=1.0,
    priority=Priority.NORMAL,
    deadline_seconds=None,
)


def body(seed: str) -> dict[str, object]:
    return {"model": "test-model", "messages": [{"role": "user", "content": words(seed, 900)}]}


async def ask(http: aiohttp.ClientSession, cairn: Cairn, seed: str) -> tuple[str, int]:
    """The replica and the matched tokens of a prompt of some 8 KB."""
    async with http.post(f"{cairn.url}/chat/completions", json=body(seed)) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
        return answer.headers["x-cairn-replica"], int(answer.headers["x-cairn-matched-tokens"])


async def test_a_second_proxy_knows_what_the_first_one_placed(http: aiohttp.ClientSession, valkey: Valkey) -> None:
    """A follow-up at another proxy lands where the first put the prefix, a moment later. It also knows whom the first
    told to come back.
    """
    async with OpenAIUpstream() as a, OpenAIUpstream() as b:
        config = config_for([a.url, b.url], valkey.url)
        async with running(config) as one, running(config) as two:
            await eventually(
                lambda: one.worker.sharing.journal.others == 1 and two.worker.sharing.journal.others == 1
            )
            for number in range(8):
                blocks = two.worker.memory.index.stats().blocks
                replica, _ = await ask(http, one, f"p{number}")
                await eventually(partial(grew, two, blocks), WITHIN_SECONDS)
                followed, matched = await ask(http, two, f"p{number}")
                assert followed == replica
                assert matched == pytest.approx(2000, rel=0.2)
            refused = Verdict(TurnKind.COLD, waits=True, seconds=1_000.0)
            with pytest.raises(RateLimited):
                await one.worker.sharing.cold_gate.wait(NEW_SESSION, refused)
            tickets = two.worker.sharing.cold_gate.pool(NEW_SESSION.pool).tickets
            await eventually(lambda: len(tickets) == 1)


def grew(cairn: Cairn, blocks: int) -> bool:
    """The worker's index has more blocks than it had."""
    return cairn.worker.memory.index.stats().blocks > blocks


async def test_a_restarted_proxy_knows_what_it_knew_before_it_serves(
    http: aiohttp.ClientSession, valkey: Valkey
) -> None:
    """The index is rebuilt from the stream before the first request is accepted."""
    async with OpenAIUpstream() as a, OpenAIUpstream() as b:
        config = config_for([a.url, b.url], valkey.url)
        async with running(config) as cairn:
            homes = [(await ask(http, cairn, f"p{number}"))[0] for number in range(6)]
        async with running(config) as cairn:
            assert cairn.worker.sharing.journal.state is JournalState.LIVE
            for number, home in enumerate(homes):
                replica, matched = await ask(http, cairn, f"p{number}")
                assert replica == home
                assert matched > 1500


async def test_what_was_made_on_a_replica_is_found_by_another_proxy_and_after_a_restart(
    http: aiohttp.ClientSession, valkey: Valkey
) -> None:
    """A response made through one proxy is followed up through another at the same replica."""
    async with OpenAIUpstream() as a, OpenAIUpstream() as b:
        config = config_for([a.url, b.url], valkey.url)
        asked = {"model": "test-model", "input": "hi"}
        async with running(config) as one, running(config) as two:
            async with http.post(f"{one.url}/responses", json=asked) as answer:
                made_at, made_id = answer.headers["x-cairn-replica"], (await answer.json())["id"]
            await eventually(lambda: two.worker.sharing.journal.locations.of(made_id) == made_at)
        async with running(config) as cairn:
            assert cairn.worker.sharing.journal.locations.of(made_id) == made_at
            follow_up = asked | {"previous_response_id": made_id}
            async with http.post(f"{cairn.url}/responses", json=follow_up) as answer:
                assert answer.headers["x-cairn-replica"] == made_at


@asynccontextmanager
async def under_load(cairn: Cairn, http: aiohttp.ClientSession) -> AsyncIterator[list[float]]:
    """Four clients that never stop asking; yields the seconds that each request took. A refusal fails the test."""
    taken: list[float] = []
    stop = asyncio.Event()

    async def client(number: int) -> None:
        turn = 0
        while not stop.is_set():
            began = time.monotonic()  # noqa: TID251
            await ask(http, cairn, f"{number}/{turn % 5}")
            taken.append(time.monotonic() - began)  # noqa: TID251
            turn += 1

    async with asyncio.TaskGroup() as clients:
        for number in range(4):
            clients.create_task(client(number))
        try:
            yield taken
        finally:
            stop.set()


async def served(taken: list[float], count: int) -> None:
    """Wait for this many more answers."""
    before = len(taken)
    await eventually(lambda: len(taken) >= before + count, within_seconds=60)


FAULTS: dict[str, tuple[Callable[[Valkey], None], Callable[[Valkey], object]]] = {
    "stopped": (lambda valkey: valkey.kill(), lambda valkey: valkey.start()),
    "hung": (lambda valkey: valkey.hang(), lambda valkey: valkey.go_on()),
    "flushed": (lambda valkey: valkey.flush(), lambda valkey: None),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_redis_stopped_hung_or_flushed_under_load_loses_no_request(
    fault: str, http: aiohttp.ClientSession, valkey: Valkey
) -> None:
    """Requests go on at the same latency, the state is shown, and it heals by itself."""
    break_it, mend_it = FAULTS[fault]
    async with OpenAIUpstream() as a, OpenAIUpstream() as b:
        config = config_for([a.url, b.url], valkey.url)
        async with running(config) as cairn, under_load(cairn, http) as taken:
            await served(taken, 60)
            before = sorted(taken)[len(taken) // 2]
            await asyncio.to_thread(break_it, valkey)
            mark = len(taken)
            await served(taken, 120)
            during = sorted(taken[mark:])
            if fault != "flushed":
                await eventually(lambda: cairn.worker.sharing.journal.state is JournalState.ALONE)
                cairn.worker.reporter.report()
                assert cairn.heard.last is not None
                await eventually(lambda: cairn.heard.last and str(cairn.heard.last.redis).startswith("away ("))
            await asyncio.to_thread(mend_it, valkey)
            await eventually(lambda: cairn.worker.sharing.journal.state is JournalState.LIVE)
            await served(taken, 60)
            # an operation on Redis may take a second: were any waited for, the median would show it
            assert during[len(during) // 2] < before + 0.4
        if fault != "hung":
            async with running(config) as again:
                await eventually(lambda: again.worker.memory.index.stats().blocks > 0)

"""Cold turns and tenants before simulated engines over HTTP: who waits, and that nobody waits for a flood."""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from statistics import median
from typing import Any

import aiohttp
import msgspec
import pytest

from benchmarks.replay.engines import Connection, LiveEngine
from proxy.clock import SystemClock
from proxy.config.schema import Admission, Client, Pool, Replica, RequestPriority
from proxy.control.messages import Explain
from proxy.routing.fair_shares import Priority
from tests.support.cairn import Cairn, config_for, running
from tests.support.valkey import eventually

SPEED = 2.0
"""How much faster than the clock the engines are."""

LOOP_TURNS = 20
"""Turns of the event loop in which a cancelled request has left every queue."""

TOKENS_PER_SECOND = 8_000.0
CLOCK = SystemClock()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A session that opens as many connections as it needs."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


def key_hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@asynccontextmanager
async def fleet(replicas: int, *, limit: int | None = None, speed: float = SPEED) -> AsyncIterator[Cairn]:
    """A worker before as many simulated engines, with four clients; the first may ask for high priority."""
    loop = asyncio.get_running_loop()
    servers = []
    for number in range(replicas):
        engine = LiveEngine(number, 1_000_000, speed, pins=True)
        servers.append(await loop.create_server(functools.partial(Connection, engine), "127.0.0.1", 0))
    endpoints = tuple(
        Replica(
            f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
            prefill_tokens_per_second=TOKENS_PER_SECOND * speed,
            max_concurrent=limit,
        )
        for server in servers
    )
    clients = (
        Client("one", key_hash("key-one"), highest_priority=RequestPriority.HIGH),
        *(Client(name, key_hash(f"key-{name}")) for name in ("two", "three", "four")),
    )
    pool = Pool(name="engines", replicas=endpoints)
    admission = Admission(quiet_seconds=0.25)
    try:
        async with running(config_for([], pools=[pool], clients=clients, admission=admission)) as cairn:
            yield cairn
    finally:
        for server in servers:
            server.close()


async def ask(
    http: aiohttp.ClientSession, cairn: Cairn, client: str, name: str, tokens: int, **headers: str
) -> float:
    """Send one streamed prompt of its own, and return the seconds until its first token."""
    text = (f"{name} " * (4 * tokens // (len(name) + 1) + 1))[: 4 * tokens]
    body = {"model": "replay", "stream": True, "max_tokens": 4, "messages": [{"role": "user", "content": text}]}
    sent, first = CLOCK.monotonic(), 0.0
    headers = {"authorization": f"Bearer key-{client}", **{name.replace("_", "-"): v for name, v in headers.items()}}
    async with http.post(f"{cairn.url}/chat/completions", json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        async for piece in answer.content.iter_any():
            if not first and b'"content":"w' in piece:
                first = CLOCK.monotonic()
    return first - sent


async def stopped(tasks: list[asyncio.Task[float]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("limit", [None, 2], ids=["no limit", "max_concurrent 2"])
@pytest.mark.parametrize(
    ("count", "tokens", "speed"), [(24, 100_000, 2.0), (300, 4_000, 1.0)], ids=["24 long ones", "300 equal ones"]
)
async def test_a_flood_of_one_tenant_does_not_make_another_wait(http, count, tokens, speed, limit):
    """The other's small prompts, one after another, have their first token within a second of the engines' time in
    the median, while a prompt of the flood may take twelve."""
    async with fleet(4, limit=limit, speed=speed) as cairn, asyncio.TaskGroup() as group:
        flood = [group.create_task(ask(http, cairn, "one", f"flood{n}", tokens)) for n in range(count)]
        await eventually(lambda: cairn.worker.replicas.fleet.snapshot("engines", CLOCK.monotonic())[0].in_flight)
        waits = [await ask(http, cairn, "two", f"small{n}", 1_000) for n in range(7)]
        assert not all(task.done() for task in flood)
        await stopped(flood)
    assert median(waits) * speed < 1.0


async def test_four_equal_tenants_get_the_same(http):
    """Jain's index of their answers is at least .95, though one sends four times as many requests as the others."""
    answered = dict.fromkeys(("one", "two", "three", "four"), 0)

    async def count(name: str, number: int) -> float:
        wait = await ask(http, cairn, name, f"{name}{number}", 2_000)
        answered[name] += 1
        return wait

    async with fleet(2, speed=4.0) as cairn, asyncio.TaskGroup() as group:
        sent = [(name, number) for number in range(120) for name in answered if name == "one" or number < 30]
        asked = [group.create_task(count(name, number)) for name, number in sent]
        await eventually(lambda: sum(answered.values()) >= 80, within_seconds=60.0)
        await stopped(asked)
    amounts = list(answered.values())
    assert sum(amounts) ** 2 / (len(amounts) * sum(each * each for each in amounts)) >= 0.95


async def test_a_client_that_leaves_while_it_waits_is_gone_from_the_queue(http):
    """A few turns of the loop after the worker sees its connection end, and with it the memory of its body."""
    async with fleet(1) as cairn, asyncio.TaskGroup() as group:
        gate, clients = cairn.worker.sharing.cold_gate, cairn.worker.http_server.clients
        asked = [group.create_task(ask(http, cairn, "one", f"long{n}", 100_000)) for n in range(6)]
        await eventually(lambda: gate.waiting()[Priority.NORMAL] >= 3)
        before, held, connections = gate.waiting()[Priority.NORMAL], gate.waiting_bytes, len(clients)
        await stopped(asked[-2:])
        await eventually(lambda: len(clients) <= connections - 2)
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)
        assert gate.waiting()[Priority.NORMAL] <= before - 2
        assert gate.waiting_bytes < held
        await stopped(asked)
    assert gate.waiting_bytes == 0


async def test_a_request_of_high_priority_goes_before_the_batch_in_front_of_it(http):
    """If its client may ask for that."""
    async with fleet(1) as cairn, asyncio.TaskGroup() as group:
        gate = cairn.worker.sharing.cold_gate
        batch = [group.create_task(ask(http, cairn, "one", f"batch{n}", 30_000)) for n in range(6)]
        await eventually(lambda: gate.waiting()[Priority.NORMAL] >= 3)
        await ask(http, cairn, "one", "urgent", 30_000, x_cairn_priority="high")
        assert sum(task.done() for task in batch) <= 3
        await stopped(batch)


async def test_a_deadline_that_cannot_be_met_is_refused_at_once(http):
    """504 with a code of its own, and not after the wait."""
    async with fleet(1) as cairn, asyncio.TaskGroup() as group:
        batch = [group.create_task(ask(http, cairn, "one", f"batch{n}", 100_000)) for n in range(6)]
        await eventually(lambda: cairn.worker.sharing.cold_gate.waiting()[Priority.NORMAL] >= 3)
        body = {"model": "replay", "messages": [{"role": "user", "content": "late " * 80_000}]}
        headers = {"authorization": "Bearer key-one", "x-request-deadline": "5"}
        sent = CLOCK.monotonic()
        async with http.post(f"{cairn.url}/chat/completions", json=body, headers=headers) as answer:
            assert answer.status == 504
            assert (await answer.json())["error"]["code"] == "deadline_unreachable"
        assert CLOCK.monotonic() - sent < 5
        await stopped(batch)


async def test_explain_says_whether_a_prompt_would_wait_why_and_how_long(http):
    """A short one would not; a long one would, behind those that wait already unless its priority is higher. One with
    a deadline that cannot be met is refused.
    """
    async with fleet(1) as cairn, asyncio.TaskGroup() as group:
        batch = [group.create_task(ask(http, cairn, "one", f"batch{n}", 100_000)) for n in range(4)]
        await eventually(lambda: cairn.worker.sharing.cold_gate.waiting()[Priority.NORMAL] >= 2)

        async def explained(words: int, *headers: tuple[bytes, bytes], **more: object) -> tuple[int, dict[str, Any]]:
            body = {"model": "replay", "messages": [{"role": "user", "content": "asks " * words}], **more}
            question = Explain(1, "/v1/chat/completions", msgspec.json.encode(body), b"key-one", headers)
            status, answer = await cairn.worker.explainer.explain(question, cairn.worker.http_server.authenticator)
            return status, msgspec.json.decode(answer)

        waits = [(await explained(words))[1]["wait"] for words in (100, 80_000)]
        urgent = [
            (await explained(80_000, (b"x-cairn-priority", b"high")))[1]["wait"],
            (await explained(80_000, service_tier="priority"))[1]["wait"],
        ]
        status, refused = await explained(80_000, (b"x-request-deadline", b"1"))
        await stopped(batch)
    assert [(each["priority"], each["waits"], each["seconds"]) for each in urgent] == 2 * [("high", True, 0.0)]
    assert (status, refused["error"]["code"]) == (504, "deadline_unreachable")
    assert waits[1]["priority"] == "normal"
    assert (waits[0]["waits"], waits[0]["reason"]) == (False, "")
    assert waits[1]["waits"]
    assert "every replica has enough work" in waits[1]["reason"]
    assert waits[1]["seconds"] > 2 * 100_000 / (TOKENS_PER_SECOND * SPEED)

"""A Redis that answers after 200 ms: no request waits for it, and the log does not fill."""

from __future__ import annotations

import time

import aiohttp
import pytest

from cache import StoreState
from tests.scenarios.test_conversations import words
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.relay import Relay
from tests.support.valkey import Valkey, eventually

SLOW_SECONDS = 0.4
REQUESTS = 30


async def ask(http: aiohttp.ClientSession, cairn: Cairn, number: int) -> float:
    """The seconds that a new prompt takes."""
    body = {"model": "test-model", "messages": [{"role": "user", "content": words(f"{number}", 900)}]}
    began = time.monotonic()  # noqa: TID251
    async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
        await answer.read()
        assert answer.status == 200
    return time.monotonic() - began  # noqa: TID251


async def test_no_request_waits_for_a_slow_redis_and_the_log_stays_short(
    http: aiohttp.ClientSession, redis: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests take as long as before, whether or not its operations fail, and none of them adds a line."""
    async with (
        OpenAIUpstream() as upstream,
        Relay(redis.port) as relay,
        running(
            config_for([upstream.url], f"redis://127.0.0.1:{relay.port}/0", redis_seconds=SLOW_SECONDS / 8)
        ) as cairn,
    ):
        store = cairn.worker.memory.store
        await ask(http, cairn, 0)
        assert store.state is StoreState.AVAILABLE
        relay.delay_seconds = SLOW_SECONDS
        caplog.clear()
        taken = [await ask(http, cairn, number) for number in range(1, REQUESTS)]
        assert sorted(taken)[REQUESTS // 2] < SLOW_SECONDS / 2
        assert len(caplog.records) <= 2
        assert not any(record.exc_info for record in caplog.records)
        relay.delay_seconds = 0.0
        await eventually(lambda: store.state is StoreState.AVAILABLE)

"""The wall clock jumps: durations are measured on the monotonic clock, and what is stored expires by Redis's."""

from __future__ import annotations

import time

import pytest

from cache import JournalState
from proxy.clock import SystemClock
from tests.support.context_client import MODEL, two_proxies
from tests.support.valkey import Valkey, eventually


async def test_a_jump_of_the_wall_clock_costs_no_answer_and_no_sharing(
    redis: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hours ahead, two behind, and back: prompts and stored contexts are served, and both proxies share."""
    shift_seconds = 0.0
    monkeypatch.setattr(SystemClock, "unix", staticmethod(lambda: time.time() + shift_seconds))  # noqa: TID251
    async with two_proxies(redis) as (here, there, _):
        journals = [client.cairn.worker.sharing.journal for client in (here, there)]
        made = await here.put()  # it expires in ten minutes
        assert (await there.ask(f"cache_id={made['id']}"))[0] == 200
        for number, jump_seconds in enumerate((7200.0, -7200.0, 0.0)):
            shift_seconds = jump_seconds
            applied = journals[1].stats.applied_deltas
            prompt = {"model": MODEL, "messages": [{"role": "user", "content": f"{number} waymark " * 2000}]}
            assert (await here.call("POST", "/chat/completions", prompt))[0] == 200
            for client in (here, there):
                status, body, _ = await client.ask(f"cache_id={made['id']}")
                assert status == 200, body
            await eventually(lambda: journals[1].stats.applied_deltas > applied)  # noqa: B023
            await eventually(lambda: all(journal.others == 1 for journal in journals))
            assert all(journal.state is JournalState.LIVE for journal in journals)

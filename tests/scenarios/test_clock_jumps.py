"""The wall clock jumps: durations are measured on the monotonic clock, and what is stored expires by Redis's."""

from __future__ import annotations

import asyncio
import time

import pytest

from cache import JournalState
from proxy.clock import SystemClock
from tests.support.context_client import MODEL, two_proxies
from tests.support.valkey import Valkey, eventually


async def is_alive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """True if a request on the connection is answered."""
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
    except (OSError, asyncio.IncompleteReadError):
        return False
    return True


async def test_a_jump_of_the_wall_clock_costs_no_answer_and_no_sharing(
    redis: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hours ahead, two behind, and back: prompts and stored contexts are served, and both proxies share.

    A connection that has rested for a moment is not taken for one that has rested for two hours.
    """
    shift_seconds = 0.0
    monkeypatch.setattr(SystemClock, "unix", staticmethod(lambda: time.time() + shift_seconds))  # noqa: TID251
    async with two_proxies(redis) as (here, there, _):
        journals = [client.cairn.worker.sharing.journal for client in (here, there)]
        made = await here.put()  # it expires in ten minutes
        assert (await there.ask(f"cache_id={made['id']}"))[0] == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", here.cairn.port)
        assert await is_alive(reader, writer)
        for number, jump_seconds in enumerate((7200.0, -7200.0, 0.0)):
            shift_seconds = jump_seconds
            here.cairn.worker.http_server.clients.look()  # closes what has rested for too long
            assert await is_alive(reader, writer)
            applied = journals[1].stats.applied_deltas
            prompt = {"model": MODEL, "messages": [{"role": "user", "content": f"{number} waymark " * 2000}]}
            assert (await here.call("POST", "/chat/completions", prompt))[0] == 200
            for client in (here, there):
                status, body, _ = await client.ask(f"cache_id={made['id']}")
                assert status == 200, body
            await eventually(lambda: journals[1].stats.applied_deltas > applied)  # noqa: B023
            await eventually(lambda: all(journal.others == 1 for journal in journals))
            assert all(journal.state is JournalState.LIVE for journal in journals)
        writer.close()

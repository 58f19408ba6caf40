"""The bytes of stored contexts: read once for all who wait, and checked."""

from __future__ import annotations

import asyncio

import pytest

from cache import keys
from cache.errors import StoreCorrupt
from tests.support.context_store import ONE, draft, opened
from tests.support.valkey import Valkey


async def test_one_read_fills_the_memory_however_many_wait(server: Valkey) -> None:
    """A hundred at once."""
    server.flush()
    async with opened([server]) as one, opened([server]) as two:
        made = await one.contexts.create(ONE, draft(3_000_000))
        row = await two.contexts.row(ONE, made.id)
        found = await asyncio.gather(*[two.contexts.content(ONE, row) for _ in range(100)])
        assert len(set(map(id, found))) == 1
        assert two.contexts._bytes.contents.reads == 1  # noqa: SLF001 - internal state that no public name shows


async def test_a_damaged_context_is_counted_and_not_kept(server: Valkey) -> None:
    """The manifest too is checked."""
    server.flush()
    async with opened([server]) as one, opened([server]) as two:
        row = await one.contexts.create(ONE, draft())
        server.ask("HSET", keys.tenant(ONE, "context", row.id), "manifest", "x")
        with pytest.raises(StoreCorrupt):
            await two.contexts.content(ONE, row)
        assert two.damaged == 1
        server.ask("HSET", keys.tenant(ONE, "context", row.id), "head", "x")
        with pytest.raises(StoreCorrupt):
            await two.contexts.row(ONE, row.id)

"""Contexts and tags that a worker remembers: dropped when they change, and served while Redis is away."""

from __future__ import annotations

import asyncio

import pytest

from cache.contexts.rows import ContextRow
from cache.errors import StoreUnavailable
from tests.support.context_store import ONE, TENANTS, draft, opened
from tests.support.valkey import Valkey, eventually, seconds_until


async def test_news_on_the_channel_drops_what_is_remembered_and_nonsense_does_nothing(nodes: list[Valkey]) -> None:
    """Also of what was being read meanwhile; on a Cluster the channel reaches every node."""
    async with opened(nodes) as one, opened(nodes) as two:
        await eventually(lambda: one.contexts._memory.is_subscribed and two.contexts._memory.is_subscribed)  # noqa: SLF001 - internal state that no public name shows
        taken: list[float] = []
        for tenant in TENANTS:  # in slots of different nodes
            row = await one.contexts.create(tenant, draft(2000, tags=("t",)))
            assert (await two.contexts.tagged(tenant, "t")).id == row.id
            other = await one.contexts.create(tenant, draft(2000))
            await one.contexts.set_tag(tenant, "t", other.id)

            async def follows(tenant: str = tenant, expected: ContextRow = other) -> bool:
                return (await two.contexts.tagged(tenant, "t")).id == expected.id

            taken.append(await seconds_until(follows))
        assert min(taken) < 0.1
        for payload in (b"", b"x", b"a b", b"\xff \xfe c", b"a z b"):
            two.contexts.receive(payload)


async def test_with_redis_away_what_is_remembered_is_found(server: Valkey) -> None:
    """And what is not is not."""
    own = await asyncio.to_thread(Valkey().start)
    try:
        async with opened([own]) as one:
            row = await one.contexts.create(ONE, draft(tags=("t",)))
            await one.contexts.tagged(ONE, "t")
            await asyncio.to_thread(own.kill)
            found = await one.contexts.tagged(ONE, "t")
            assert (await one.contexts.content(ONE, found)).size_bytes == 40_000
            assert (await one.contexts.known_row(ONE, row.id)).id == row.id
            for reading in (one.contexts.tagged(ONE, "u"), one.contexts.known_row(ONE, "x"), one.contexts.ids(ONE)):
                with pytest.raises(StoreUnavailable):
                    await reading
            with pytest.raises(StoreUnavailable):
                await one.contexts.create(ONE, draft())
    finally:
        await asyncio.to_thread(own.end)

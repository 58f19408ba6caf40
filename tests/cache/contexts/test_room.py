"""Room for stored contexts by worth: of a tenant's budget, of pins, of all tenants together."""

from __future__ import annotations

import asyncio

import pytest

from cache.errors import QuotaFull, UnknownContext
from tests.support.context_store import ONE, TENANTS, draft, opened
from tests.support.valkey import Valkey


async def test_the_least_worth_goes_when_a_tenants_budget_is_full(nodes: list[Valkey]) -> None:
    """Used ones and pinned ones stay, expired ones go first; each is counted by its reason."""
    async with opened(nodes, tenant_bytes=200_000) as one:
        contexts = one.contexts
        rows = [await contexts.create(ONE, draft()) for _ in range(4)]
        pinned = await contexts.update(ONE, rows[0].id, metadata={"pin": "true"})
        assert pinned.pinned
        for _ in range(3):
            contexts.used(ONE, rows[1], None)
        await contexts.flush()
        newest = await contexts.create(ONE, draft(80_000))
        assert {row.id for row in await contexts.rows(ONE)} == {rows[0].id, rows[1].id, newest.id}
        assert one.evicted == {"room": 2}
        assert contexts.total_bytes <= 200_000
        await contexts.update(ONE, rows[1].id, ttl_seconds=0.02)
        await asyncio.sleep(0.03)
        await contexts.create(ONE, draft(60_000))
        assert rows[1].id not in {row.id for row in await contexts.rows(ONE)}
        assert one.evicted == {"room": 2, "expired": 1}


async def test_with_only_pinned_ones_left_a_creation_is_refused(nodes: list[Valkey]) -> None:
    """So is one that is larger than the budget; and pins have a quota of their own."""
    async with opened(nodes, tenant_bytes=100_000, pinned_bytes=90_000) as one:
        contexts = one.contexts
        with pytest.raises(QuotaFull):
            await contexts.create(ONE, draft(150_000))
        await contexts.create(ONE, draft(metadata={"pin": "1"}))
        second = await contexts.create(ONE, draft(metadata={"pin": "yes"}))
        with pytest.raises(QuotaFull):
            await contexts.create(ONE, draft())
        plain = await contexts.create(ONE, draft(10_000))
        with pytest.raises(QuotaFull):
            await contexts.update(ONE, plain.id, metadata={"pin": "1"})
        await contexts.update(ONE, second.id, metadata={})
        await contexts.update(ONE, plain.id, metadata={"pin": "1"})
        assert len(await contexts.rows(ONE)) == 3


async def test_over_all_tenants_the_least_worth_goes_whosever_it_is(nodes: list[Valkey]) -> None:
    """The total budget is one for all."""
    async with opened(nodes, total_bytes=200_000) as one:
        contexts = one.contexts
        poor = await contexts.create(TENANTS[0], draft(value_usd=1e-9))
        for tenant in TENANTS[1:]:
            await contexts.create(tenant, draft(60_000))
        await contexts.create(TENANTS[2], draft(60_000))
        assert await contexts.rows(TENANTS[0]) == []
        assert one.evicted == {"room": 1}
        with pytest.raises(UnknownContext):
            await contexts.row(TENANTS[0], poor.id)

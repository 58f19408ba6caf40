"""Room for stored contexts by worth: of a tenant's budget, of pins, of all tenants together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cache import keys
from cache.contexts import scripts
from cache.contexts.access import Trust
from cache.errors import PastExpiry, QuotaFull, UnknownContext
from cache.store.store import Script
from tests.support.context_store import ONE, TENANTS, draft, opened
from tests.support.valkey import Valkey, eventually


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


async def test_a_pinned_creation_beyond_the_quota_of_pins_is_refused_although_the_budget_has_room(
    server: Valkey,
) -> None:
    """Otherwise one client's pins could take a whole budget that its other contexts need."""
    server.flush()
    async with opened([server], tenant_bytes=200_000, pinned_bytes=50_000) as one:
        await one.contexts.create(ONE, draft(metadata={"pin": "1"}))
        with pytest.raises(QuotaFull, match=r"contexts\.pinned_bytes"):
            await one.contexts.create(ONE, draft(metadata={"pin": "1"}))
        await one.contexts.create(ONE, draft())


async def test_creations_at_once_cannot_exceed_the_total_budget_together(nodes: list[Valkey]) -> None:
    """Two workers, eight tenants, contexts that may not be discarded: room is reserved before it is taken."""
    async with opened(nodes, total_bytes=150_000) as one, opened(nodes, total_bytes=150_000) as two:
        tenants = [f"{number:032x}" for number in range(8)]
        creations = [
            (one, two)[number % 2].contexts.create(tenant, draft(60_000, metadata={"pin": "1"}))
            for number, tenant in enumerate(tenants)
        ]
        results = await asyncio.gather(*creations, return_exceptions=True)
        refused = [result for result in results if isinstance(result, BaseException)]
        assert all(isinstance(error, QuotaFull) for error in refused)
        assert len(refused) == 6
        kept = [row for tenant in tenants for row in await one.contexts.rows(tenant)]
        assert sum(row.size_bytes for row in kept) <= 150_000


async def test_a_reservation_in_the_total_budget_ends_with_the_creation(server: Valkey) -> None:
    """Whether it succeeds, is refused for another reason, or finds that the context exists."""
    server.flush()
    async with opened([server], total_bytes=100_000) as one:
        with pytest.raises(PastExpiry):
            await one.contexts.create(ONE, draft(70_000, ttl_seconds=None, expires_unix_seconds=1.0))
        await eventually(lambda: server.ask("EXISTS", keys.CONTEXTS_RESERVED) == b":0\r\n")
        same = draft(70_000)
        await one.contexts.create(ONE, same)
        await one.contexts.create(ONE, same)
        assert server.ask("EXISTS", keys.CONTEXTS_RESERVED) == b":0\r\n"


async def test_reservations_that_are_damaged_or_over_take_no_room(server: Valkey) -> None:
    """They are dropped where the next one is made; so are damaged totals."""
    server.flush()
    server.ask(
        "HSET", keys.CONTEXTS_RESERVED, "a", "90000:1", "b", "nan:9", "c", "9" * 5000 + ":" + "9" * 5000, "d", ""
    )
    server.ask("HSET", keys.CONTEXTS_TOTALS, TENANTS[1], "9" * 5000 + ":1", TENANTS[2], "inf:1")
    async with opened([server], started=False, total_bytes=100_000) as one:
        assert await one.contexts.create(ONE, draft(70_000))
        assert server.ask("EXISTS", keys.CONTEXTS_RESERVED) == b":0\r\n"


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


@pytest.mark.parametrize("trust", [Trust.LISTED, Trust.UNCHECKED])
async def test_creations_at_once_search_for_room_one_after_another(server: Valkey, trust: Trust) -> None:
    """Each search reads the contexts of all clients; together they would read the same, until none ends in time."""
    server.flush()
    async with opened([server], started=False, total_bytes=60_000, unchecked_bytes=60_000) as one:
        for number in range(10):
            await one.contexts.create(TENANTS[number % len(TENANTS)], draft(5_000), trust)
        run_script = one.store.run_script
        running = most = searches = 0

        async def counted(script: Script, *args: Any, **options: Any) -> Any:
            nonlocal running, most, searches
            if script is not scripts.IDS:
                return await run_script(script, *args, **options)
            running, searches = running + 1, searches + 1
            most = max(most, running)
            try:
                return await run_script(script, *args, **options)
            finally:
                running -= 1

        one.store.run_script = counted  # type: ignore[method-assign]
        await asyncio.gather(*[one.contexts.create(ONE, draft(5_000), trust) for _ in range(12)])
        assert searches
        assert most == 1

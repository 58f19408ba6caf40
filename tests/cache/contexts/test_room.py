"""Room for stored contexts by worth: of a tenant's budget, of pins, of all tenants together."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from cache import keys
from cache.contexts import scripts
from cache.contexts.access import Trust
from cache.errors import PastExpiry, PinRefused, QuotaFull, UnknownContext
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


def hash_of(server: Valkey, key: str) -> dict[bytes, bytes]:
    words = server.ask("HGETALL", key).split(b"\r\n")[2::2]
    return dict(zip(words[::2], words[1::2], strict=True))


def sums_of(server: Valkey) -> dict[bytes, int]:
    """The sums over all tenants that Redis keeps."""
    return {name: int(value) for name, value in hash_of(server, keys.CONTEXTS_SUMS).items() if name != b"at"}


def counted(server: Valkey) -> dict[bytes, int]:
    """The same, counted."""
    totals = [list(map(int, each.split(b":"))) for each in hash_of(server, keys.CONTEXTS_TOTALS).values()]
    unlisted = [list(map(int, each.split(b":"))) for each in hash_of(server, keys.CONTEXTS_UNLISTED).values()]
    unchecked = [size for size, _, accepted, _ in unlisted if accepted != 1]
    return {
        b"bytes": sum(size for size, _ in totals),
        b"contexts": sum(count for _, count in totals),
        b"pinned": sum(pinned for _, pinned, _, _ in unlisted),
        b"unchecked": sum(unchecked),
        b"tenants": len(unchecked),
    }


async def test_a_creation_reads_the_totals_of_no_other_tenant(server: Valkey) -> None:
    """With 20,000 tenants each creation took 75 ms, of which it held Redis for 14 and its worker for 50."""
    server.flush()
    others = [f"{number:032x}" for number in range(100, 3_100)]
    server.ask("HSET", keys.CONTEXTS_TOTALS, *[word for name in others for word in (name, "10:1")])
    server.ask("HSET", keys.CONTEXTS_UNLISTED, *[word for name in others for word in (name, "10:0:1:0")])
    async with opened([server], started=False) as one:
        contexts = one.contexts
        await contexts.create(ONE, draft(1_000))
        server.ask("CONFIG", "RESETSTAT")
        for tenant, trust in zip(TENANTS, Trust, strict=True):
            await contexts.create(tenant, draft(1_000), trust)
        facts = server.ask("INFO", "commandstats", "stats").decode().splitlines()
        assert not [line for line in facts if line.startswith("cmdstat_hvals")], "the totals of all were counted"
        sent = next(int(line.split(":")[1]) for line in facts if line.startswith("total_net_output_bytes:"))
        assert sent < 20_000
        assert contexts.total_contexts == 3_004
        rows = [row for tenant in TENANTS for row in await contexts.rows(tenant)]
        assert contexts.total_bytes == 30_000 + sum(row.size_bytes for row in rows)


async def test_the_sums_over_all_tenants_are_exact_whatever_happens(server: Valkey) -> None:
    """Two workers, listed and unlisted tenants, pins, keys that become accepted, deletions, expiries and sweeps."""
    server.flush()
    chosen = random.Random(1)
    async with opened([server], total_bytes=40_000, unchecked_bytes=9_000) as one, opened([server]) as two:
        seen: Counter[bytes] = Counter()
        for _ in range(100):
            contexts = chosen.choice((one, two)).contexts
            place = chosen.randrange(len(TENANTS))
            tenant, trust = TENANTS[place], list(Trust)[place]
            rows = await contexts.rows(tenant)
            what = chosen.choice(("create", "create", "create", "delete", "pin", "sweep", "accept", "expire"))
            with suppress(QuotaFull, PinRefused, UnknownContext):
                if what == "create":
                    await contexts.create(tenant, draft(chosen.randrange(2_000, 9_000)), trust)
                elif what == "sweep":
                    await contexts._room.sweep()  # noqa: SLF001 - it would come within a minute
                elif what == "accept" and trust is Trust.ACCEPTED:
                    contexts.accepted(tenant)
                    await contexts._accepted.flush()  # noqa: SLF001 - so that it is known now
                elif rows:
                    row = chosen.choice(rows)
                    if what == "delete":
                        await contexts.delete(tenant, row.id)
                    elif what == "pin":
                        pin = {} if row.pinned else {"pin": "1"}
                        await contexts.update(tenant, row.id, metadata=pin, trust=trust)
                    else:
                        await contexts.update(tenant, row.id, ttl_seconds=0.001)
            await eventually(lambda: sums_of(server) in ({}, counted(server)), 5)
            seen.update(name for name, value in sums_of(server).items() if value)
        assert all(seen[name] > 5 for name in counted(server)), "each has had a value"


@pytest.mark.parametrize("changes", [("at", "1"), ("bytes", "-1"), ("bytes", "x"), ("bytes", "9" * 30), None])
async def test_sums_that_are_old_or_damaged_or_gone_are_counted_again(
    server: Valkey, changes: tuple[str, str] | None
) -> None:
    """A proxy of an older version changes totals without them."""
    server.flush()
    async with opened([server], started=False, total_bytes=100_000) as one:
        await one.contexts.create(ONE, draft(1_000))
        server.ask("HSET", keys.CONTEXTS_TOTALS, TENANTS[1], "90000:7")
        if changes is None:
            server.ask("DEL", keys.CONTEXTS_SUMS)
        else:
            server.ask("HSET", keys.CONTEXTS_SUMS, *changes)
        await one.contexts.create(ONE, draft(1_000))
        assert one.contexts.total_contexts == 9
        assert sums_of(server)[b"bytes"] == one.contexts.total_bytes > 92_000


async def test_totals_of_very_many_tenants_are_parsed_with_turns_between(
    server: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each sweep and each survey reads them all."""
    server.flush()
    names = [f"{number:032x}" for number in range(3_000)]
    server.ask("HSET", keys.CONTEXTS_TOTALS, *[word for name in names for word in (name, "10:1")])
    async with opened([server], started=False) as one:
        pairs = await one.contexts._access.hash(keys.CONTEXTS_TOTALS)  # noqa: SLF001 - at once, below

        async def known(key: str) -> list[tuple[bytes, bytes]]:
            assert key == keys.CONTEXTS_TOTALS
            return pairs

        monkeypatch.setattr(one.contexts._access, "hash", known)  # noqa: SLF001
        turns = 0
        reading = asyncio.ensure_future(one.contexts._room.renew())  # noqa: SLF001, TID251
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        assert turns >= 5
        assert len(await reading) == 3_000


async def test_many_contexts_are_dropped_some_at_a_time_and_their_tags_read_once_for_each_time(
    server: Valkey,
) -> None:
    """Redis serves no one else during a script: 100 contexts among 5,000 tags held it for more than half a second."""
    server.flush()
    async with opened([server], started=False, contexts_at_most=200, tags_at_most=500) as one:
        rows = [await one.contexts.create(ONE, draft(100, tags=(f"a{n}", f"b{n}"))) for n in range(80)]
        server.ask("CONFIG", "RESETSTAT")
        room = one.contexts._room  # noqa: SLF001 - as a full budget would
        assert await room.drop(ONE, "unpinned", [row.id for row in rows[:70]], "room") == 70
        facts = server.ask("INFO", "commandstats").decode().splitlines()
        calls = next(int(line.split("=")[1].split(",")[0]) for line in facts if line.startswith("cmdstat_hgetall"))
        assert calls == 3
        assert {tag.tag for tag in await one.contexts.tags(ONE)} == {f"{x}{n}" for x in "ab" for n in range(70, 80)}
        assert one.evicted == {"room": 70}
        assert one.contexts.total_contexts == 10

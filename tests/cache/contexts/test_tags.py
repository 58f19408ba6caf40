"""Tags of stored contexts, and rows that are damaged, on real Valkeys."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace

from cache import keys
from cache.contexts.access import Trust
from cache.errors import QuotaFull, StoreCorrupt, UnknownContext
from tests.support.context_store import ONE, draft, opened
from tests.support.valkey import Valkey, eventually


async def test_a_tag_is_set_moved_listed_and_deleted(nodes: list[Valkey]) -> None:
    """Deleting one that does not exist is no error; there is a limit of them, which the error names."""
    async with opened(nodes, tags_at_most=2) as one:
        first, second = [await one.contexts.create(ONE, draft(2_000)) for _ in range(2)]
        assert (await one.contexts.set_tag(ONE, "t", first.id)).context_id == first.id
        assert (await one.contexts.set_tag(ONE, "t", second.id)).context_id == second.id
        assert (await one.contexts.tag(ONE, "t")).context_id == second.id
        await one.contexts.set_tag(ONE, "u", first.id)
        assert [tag.tag for tag in await one.contexts.tags(ONE)] == ["t", "u"]
        with pytest.raises(QuotaFull, match=r"limit of 2 tags is reached.*contexts\.max_tags"):
            await one.contexts.set_tag(ONE, "v", first.id)
        with pytest.raises(UnknownContext):
            await one.contexts.set_tag(ONE, "t", "cache-none")
        for _ in range(2):
            await one.contexts.delete_tag(ONE, "u")
        with pytest.raises(UnknownContext):
            await one.contexts.tag(ONE, "u")


async def test_a_tag_whose_old_context_is_gone_is_followed_to_the_new_one(server: Valkey) -> None:
    """Also if only the deletion has been received yet, and while what is remembered is not current."""
    server.flush()
    async with opened([server]) as one, opened([server]) as two:
        await eventually(lambda: two.contexts._memory.is_subscribed)  # noqa: SLF001 - internal state that no public name shows
        old = await one.contexts.create(ONE, draft(2_000, tags=("t",)))
        assert (await two.contexts.tagged(ONE, "t")).id == old.id
        known = two.contexts._memory.tag(ONE, "t")  # noqa: SLF001 - internal state that no public name shows
        new = await one.contexts.create(ONE, draft(2_000))
        await one.contexts.set_tag(ONE, "t", new.id)
        await one.contexts.delete(ONE, old.id)
        await eventually(lambda: two.contexts._memory.row(ONE, old.id) is None)  # noqa: SLF001 - internal state that no public name shows
        assert known is not None
        two.contexts._memory._tags.put(ONE, "t", known)  # as if the move had not been received  # noqa: SLF001 - internal state that no public name shows
        assert (await two.contexts.tagged(ONE, "t")).id == new.id
        two.contexts._memory._end()  # noqa: SLF001 - internal state that no public name shows
        assert (await two.contexts.tagged(ONE, "t")).id == new.id


async def test_limits_change_while_it_runs(server: Valkey) -> None:
    """The next creation obeys them, and contents in memory at once; each error names its limit."""
    server.flush()
    async with opened([server]) as one:
        kept = await one.contexts.create(ONE, draft(2_000))
        limits = one.contexts._access.limits  # noqa: SLF001 - internal state that no public name shows
        one.contexts.adopt(replace(limits, contexts_at_most=1, memory_bytes=1))
        assert len(one.contexts._bytes.contents) == 0  # noqa: SLF001 - internal state that no public name shows
        with pytest.raises(QuotaFull, match=r"limit of 1 stored contexts is reached.*contexts\.max_contexts"):
            await one.contexts.create(ONE, draft(2_000))
        assert [row.id for row in await one.contexts.some_rows(ONE, [kept.id, "cache-none"])] == [kept.id]
        assert one.contexts.dropped == {
            "context_total": 0,
            "context_message": 0,
            "context_use": 0,
            "accepted_key": 0,
        }


async def test_a_pin_that_cannot_be_changed_gives_its_reservation_back(server: Valkey) -> None:
    """And pinning what is pinned reserves nothing."""
    server.flush()
    async with opened([server], pinned_bytes=50_000) as one:
        row = await one.contexts.create(ONE, draft(40_000, metadata={"pin": "1"}), Trust.ACCEPTED)
        await one.contexts.update(ONE, row.id, metadata={"pin": "yes"}, trust=Trust.ACCEPTED)
        other = await one.contexts.create(ONE, draft(40_000), Trust.ACCEPTED)
        with pytest.raises(QuotaFull, match=r"contexts\.pinned_bytes"):
            await one.contexts.update(ONE, other.id, metadata={"pin": "1"}, trust=Trust.ACCEPTED)

        def is_right() -> bool:
            pinned = server.ask("HGET", keys.CONTEXTS_UNLISTED, ONE).split(b"\r\n")[1].split(b":")[1]
            return 40_000 < int(pinned) < 50_000

        await eventually(is_right)


async def test_damaged_rows_are_discarded_before_all_others(server: Valkey) -> None:
    """They are left out of lists; asking for one is an error; each is counted."""
    server.flush()
    async with opened([server], tenant_bytes=100_000) as one:
        good, bad = [await one.contexts.create(ONE, draft(40_000)) for _ in range(2)]
        server.ask("HSET", keys.tenant(ONE, "context", bad.id), "uses", "nan")
        assert [row.id for row in await one.contexts.rows(ONE)] == [good.id]
        with pytest.raises(StoreCorrupt):
            await one.contexts.row(ONE, bad.id)
        assert one.damaged == 2
        new = await one.contexts.create(ONE, draft(40_000))
        assert {row.id for row in await one.contexts.rows(ONE)} == {good.id, new.id}
        assert one.evicted == {"damaged": 1}


async def test_with_redis_slow_a_remembered_row_is_served(server: Valkey) -> None:
    """A tag that cannot be read again at once is served as remembered."""
    own = await asyncio.to_thread(Valkey().start)
    try:
        async with opened([own], started=False) as one:
            row = await one.contexts.create(ONE, draft(2_000))
            own.hang()
            assert (await one.contexts.known_row(ONE, row.id)).id == row.id
            own.go_on()
    finally:
        await asyncio.to_thread(own.end)
    server.flush()

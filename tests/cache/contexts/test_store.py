"""Stored contexts in Redis: one server and a Cluster of three; whole or nothing, quotas, all gone at the end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cache import keys
from cache.contexts.rows import ContextStatus
from cache.errors import PastExpiry, QuotaFull, StoreCorrupt, StoreFull, UnknownContext
from cache.store.store import Script, Store
from tests.support.context_store import ONE, TENANTS, draft, keys_left, opened
from tests.support.valkey import Valkey


async def test_what_is_stored_is_found_by_another_with_every_byte(nodes: list[Valkey]) -> None:
    """Several segments, tools, names, metadata, tags."""
    async with opened(nodes) as one, opened(nodes) as two:
        made = draft(2_500_000, tools=b"[1]", name="n", description="d", metadata={"a": "b"}, tags=("t", "u"))
        row = await one.contexts.create(ONE, made)
        found = await two.contexts.tagged(ONE, "u")
        assert (found.id, found.head, found.metadata) == (row.id, row.head, {"a": "b"})
        content = await two.contexts.content(ONE, found)
        assert (content.messages, content.tools) == (made.messages, b"[1]")
        assert [found.id for found in await two.contexts.rows(ONE)] == [row.id]
        assert await two.contexts.rows(TENANTS[1]) == []


async def test_two_contexts_share_a_documents_segments_and_the_last_takes_them_along(nodes: list[Valkey]) -> None:
    """The second costs its manifest; when one goes the other is whole; when both are gone nothing is left."""
    async with opened(nodes) as one:
        first = await one.contexts.create(ONE, draft(1_500_000, seed=1))
        alone = one.contexts.total_bytes
        second = await one.contexts.create(ONE, draft(1_500_000, seed=1))
        assert one.contexts.total_bytes - alone < 2000
        await one.contexts.delete(ONE, first.id)
        async with opened(nodes) as two:
            assert len((await two.contexts.content(ONE, second)).messages) == 1_500_000
        await one.contexts.delete(ONE, second.id)
        assert one.contexts.total_bytes == 0
        assert {key for key in keys_left(nodes) if "segment" in key or "context:" in key} == set()


async def test_tenants_share_nothing(nodes: list[Valkey]) -> None:
    """They share neither ids nor tags nor segments."""
    async with opened(nodes) as one:
        for tenant in TENANTS:
            await one.contexts.create(tenant, draft(seed=7, id="cache-" + "a" * 32, tags=("t",)))
        await one.contexts.delete(TENANTS[0], "cache-" + "a" * 32)
        with pytest.raises(UnknownContext):
            await one.contexts.tagged(TENANTS[0], "t")
        for tenant in TENANTS[1:]:
            assert (await one.contexts.tagged(tenant, "t")).id == "cache-" + "a" * 32
        assert len([key for key in keys_left(nodes) if "segment" in key]) == 2


class Cut(Exception):
    """The worker died here."""


class Fragile:
    """A store that dies before, or after, its nth operation."""

    def __init__(self, store: Store, dies_at: int, *, after: bool) -> None:
        self._store = store
        self._left = dies_at
        self._after = after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("execute", "execute_many", "run_script"):
            return found

        async def fragile(*args: Any, **named: Any) -> Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                raise Cut
            result = await found(*args, **named)
            if self._left == 0:
                raise Cut
            return result

        return fragile


@pytest.mark.parametrize("after", [False, True])
async def test_a_creation_cut_off_anywhere_leaves_a_whole_context_or_nothing(server: Valkey, after: bool) -> None:
    """Nothing visible, nothing counted, and what was uploaded ends by itself within ten minutes."""
    finished = False
    dies_at = 0
    while not finished:
        dies_at += 1
        server.flush()
        async with opened([server], started=False) as one:
            contexts = one.contexts
            made = draft(6_000_000, tags=("t",))
            whole = contexts._access.store  # noqa: SLF001 - internal state that no public name shows
            contexts._access.store = Fragile(whole, dies_at, after=after)  # type: ignore[assignment]  # noqa: SLF001 - internal state that no public name shows
            try:
                await contexts.create(ONE, made)
                finished = True
            except Cut:
                pass
            contexts._access.store = whole  # noqa: SLF001 - internal state that no public name shows
            async with opened([server]) as two:
                rows = await two.contexts.rows(ONE)
                await two.contexts.sweep()
                if rows:
                    assert (await two.contexts.content(ONE, rows[0])).messages == made.messages
                    assert (await two.contexts.tagged(ONE, "t")).id == made.id
                else:
                    assert two.contexts.total_bytes == 0
                    assert await two.contexts.tags(ONE) == []
                    for key in keys_left([server]):
                        remaining = int(server.ask("TTL", key)[1:])
                        assert 0 < remaining <= 600, key
    assert dies_at > 6


async def test_a_commit_that_was_not_heard_of_is_not_made_twice(server: Valkey) -> None:
    """The same id again changes nothing."""
    server.flush()
    async with opened([server]) as one:
        made = draft()
        await one.contexts.create(ONE, made)
        before = one.contexts.total_bytes
        await one.contexts.create(ONE, made)
        assert (one.contexts.total_bytes, one.contexts.total_contexts) == (before, 1)


async def test_there_are_quotas_of_contexts_and_tags(server: Valkey) -> None:
    """Beyond them a creation, or a new tag, is refused; moving a tag is not."""
    server.flush()
    async with opened([server], contexts_at_most=2, tags_at_most=2) as one:
        contexts = one.contexts
        row = await contexts.create(ONE, draft(2000, tags=("a", "b")))
        for tags in (("c",), ()):
            if tags:
                with pytest.raises(QuotaFull):
                    await contexts.create(ONE, draft(2000, tags=tags))
            else:
                await contexts.create(ONE, draft(2000))
        with pytest.raises(QuotaFull):
            await contexts.create(ONE, draft(2000))
        with pytest.raises(QuotaFull):
            await contexts.set_tag(ONE, "c", row.id)
        await contexts.set_tag(ONE, "a", row.id)


async def test_an_end_in_the_past_is_refused_by_rediss_clock(server: Valkey) -> None:
    """At the creation and at a change."""
    server.flush()
    async with opened([server]) as one:
        with pytest.raises(PastExpiry):
            await one.contexts.create(ONE, draft(ttl_seconds=None, expires_unix_seconds=1e9))
        row = await one.contexts.create(ONE, draft())
        with pytest.raises(PastExpiry):
            await one.contexts.update(ONE, row.id, expires_unix_seconds=1e9)


async def test_revived_contexts_keep_their_segments(server: Valkey) -> None:
    """A longer life is one of everything that the context is made of."""
    server.flush()
    async with opened([server], grace_seconds=1) as one:
        contexts = one.contexts
        row = await contexts.create(ONE, draft(50_000, ttl_seconds=1))
        await contexts.update(ONE, row.id, ttl_seconds=500)
        short = [key for key in keys_left([server]) if not int(server.ask("TTL", key)[1:]) > 490]
        assert short == []
        contexts.used(ONE, row, 5000)
        await contexts.flush()
        short = [key for key in keys_left([server]) if not int(server.ask("TTL", key)[1:]) > 4900]
        assert short == []


async def test_everything_goes_by_itself_in_the_end(server: Valkey) -> None:
    """Not even the tenant's own keys stay for ever."""
    server.flush()
    async with opened([server]) as one:
        await one.contexts.create(ONE, draft(tags=("t",)))
        assert all(int(server.ask("TTL", key)[1:]) > 0 for key in keys_left([server]))


async def test_flushall_is_a_context_that_is_not_there_and_counts_right_afterwards(server: Valkey) -> None:
    """Never half of one."""
    server.flush()
    async with opened([server]) as one, opened([server]) as two:
        row = await one.contexts.create(ONE, draft())
        server.flush()
        with pytest.raises(UnknownContext):
            await two.contexts.content(ONE, row)
        await two.contexts.sweep()
        assert two.contexts.total_bytes == 0
        await two.contexts.create(ONE, draft())
        assert two.contexts.total_contexts == 1


@pytest.mark.parametrize("name", ["ids", "gone", "held", "refs", "sizes", "sum", "tags"])
async def test_a_key_of_the_wrong_type_is_replaced_when_a_context_is_stored(server: Valkey, name: str) -> None:
    """Its contents are lost; until then a list has the rows that can be read."""
    server.flush()
    async with opened([server]) as one:
        await one.contexts.create(ONE, draft(seed=1))
        key = keys.tenant(ONE, name)
        server.ask("DEL", key)
        server.ask("SET", key, "x")
        if name != "tags":
            await one.contexts.rows(ONE)
        made = await one.contexts.create(ONE, draft(seed=2, tags=("t",)))
        assert made.id in [row.id for row in await one.contexts.rows(ONE)]
        assert (await one.contexts.tagged(ONE, "t")).id == made.id
        assert (await one.contexts.content(ONE, made)).messages


async def test_a_context_or_a_segment_of_the_wrong_type_costs_only_its_own_context(server: Valkey) -> None:
    """The context is damaged, and can be deleted; the segment is uploaded again with the next context that has it."""
    server.flush()
    async with opened([server]) as one, opened([server]) as two:
        good, bad = [await one.contexts.create(ONE, draft(seed=seed)) for seed in (1, 2)]
        key = keys.tenant(ONE, "context", bad.id)
        server.ask("DEL", key)
        server.ask("SADD", key, "x")
        assert [row.id for row in await two.contexts.rows(ONE)] == [good.id]
        with pytest.raises(StoreCorrupt):
            await two.contexts.row(ONE, bad.id)
        await two.contexts.delete(ONE, bad.id)
        segment = next(each for each in keys_left([server]) if ":segment:" in each)
        server.ask("DEL", segment)
        server.ask("SADD", segment, "x")
        again = await two.contexts.create(ONE, draft(seed=1))
        assert (await two.contexts.content(ONE, again)).messages


async def test_a_context_left_in_the_middle_of_its_warming_is_an_error_and_not_pending_for_ever(
    server: Valkey,
) -> None:
    """The worker that warmed it died."""
    server.flush()
    async with opened([server], warming_seconds=0.01) as one:
        row = await one.contexts.create(ONE, draft(status=ContextStatus.PENDING))
        assert row.stored_status is ContextStatus.PENDING
        assert row.status(row.as_of_unix_seconds + 1) is ContextStatus.ERROR
        await one.contexts.finish(ONE, row.id, 77, 0.5)
        done = await one.contexts.row(ONE, row.id)
        assert (done.status(done.as_of_unix_seconds), done.tokens, done.value_usd) == (ContextStatus.READY, 77, 0.5)


async def test_a_full_redis_refuses_a_creation_and_serves_on() -> None:
    """Nothing of it is visible, what is there is found, and room made makes room."""
    full = Valkey("--maxmemory", "6mb", "--maxmemory-policy", "noeviction")
    await asyncio.to_thread(full.start)
    try:
        async with opened([full]) as one:
            row = await one.contexts.create(ONE, draft(tags=("t",)))
            with pytest.raises(StoreFull):
                await one.contexts.create(ONE, draft(8_000_000))
            assert [found.id for found in await one.contexts.rows(ONE)] == [row.id]
            assert (await one.contexts.tagged(ONE, "t")).id == row.id
    finally:
        await asyncio.to_thread(full.end)


def test_scripts_have_names_of_their_own() -> None:
    """Two with one name would be told apart by nobody."""
    from cache.contexts import scripts as context_scripts

    found = [value.name for value in vars(context_scripts).values() if isinstance(value, Script)]
    assert len(found) == len(set(found)) > 5

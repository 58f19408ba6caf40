"""Stored contexts in Redis: one server and a Cluster of three; whole or nothing, room by worth, quotas, all gone at
the end."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from cache import keys
from cache.context_rows import ContextRow, ContextStatus, Draft
from cache.contexts import ContextLimits, ContextStore
from cache.errors import PastExpiry, QuotaFull, StoreCorrupt, StoreFull, StoreUnavailable, UnknownContext
from cache.store import Script, Store, open_store
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support import valkey
from tests.support.valkey import Valkey, eventually

MIB = 1024 * 1024
LIMITS = ContextLimits(
    total_bytes=64 * MIB,
    tenant_bytes=32 * MIB,
    pinned_bytes=4 * MIB,
    contexts_at_most=50,
    tags_at_most=20,
    grace_seconds=60,
    memory_bytes=32 * MIB,
    warming_seconds=60,
)
TENANTS = [f"{number:032x}" for number in range(3)]
ONE = TENANTS[0]


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with valkey.running() as running:
        yield running


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Valkey]]:
    with valkey.cluster_of_three() as nodes:
        yield list(nodes)


@pytest.fixture(params=["one server", "a Cluster of three"])
def nodes(request: pytest.FixtureRequest) -> list[Valkey]:
    """Emptied."""
    found: list[Valkey] = (
        [request.getfixturevalue("server")] if request.param == "one server" else request.getfixturevalue("cluster")
    )
    for node in found:
        node.flush()
    return found


def url_of(nodes: list[Valkey]) -> str:
    if len(nodes) == 1:
        return nodes[0].url
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def keys_left(nodes: list[Valkey]) -> set[str]:
    """Every key on every node, but for the total over all tenants."""
    found: set[str] = set()
    for node in nodes:
        words = node.ask("KEYS", "*").split(b"\r\n")
        found |= {word.decode() for word in words if word.startswith(b"cairn:")}
    return found - {keys.CONTEXTS_TOTALS, keys.CONTEXTS_SWEEPER}


class Opened:
    """A context store with its counts."""

    def __init__(self, store: Store, limits: ContextLimits, tasks: Tasks) -> None:
        self.evicted: Counter[str] = Counter()
        self.damaged = 0
        self.store = store
        self.contexts = ContextStore(
            store, limits, clock=SystemClock(), tasks=tasks, evicted=self._evict, damaged=self._damage
        )

    def _evict(self, reason: str, number: int) -> None:
        self.evicted[reason] += number

    def _damage(self) -> None:
        self.damaged += 1


@asynccontextmanager
async def opened(nodes: list[Valkey], *, started: bool = True, **changes: Any) -> AsyncIterator[Opened]:
    tasks = Tasks()
    store = open_store(url_of(nodes), clock=SystemClock(), tasks=tasks, limit_seconds=1.0)
    await store.start()
    await store.wait_available()
    one = Opened(store, msgspec.structs.replace(LIMITS, **changes), tasks)
    if started:
        await one.contexts.start()
    try:
        yield one
    finally:
        await one.contexts.close()
        await store.close()
        await tasks.close()


numbers = iter(range(1, 1_000_000))


def draft(size: int = 40_000, seed: int | None = None, **changes: Any) -> Draft:
    """A context of one message of bytes that do not compress."""
    number = next(numbers)
    messages = random.Random(number if seed is None else seed).randbytes(size)
    fields: dict[str, Any] = {
        "id": f"cache-{number:032x}",
        "model": "m",
        "tools": b"",
        "messages": messages,
        "bounds": array("I", (0, size)),
        "ttl_seconds": 600.0,
        "expires_unix_seconds": None,
        "status": ContextStatus.READY,
        "tokens": size // 4,
        "value_usd": size / 4 * 1e-6,
    }
    return Draft(**{**fields, **changes})


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
    """Neither ids nor tags nor segments."""
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
            whole = contexts._store
            contexts._store = Fragile(whole, dies_at, after=after)  # type: ignore[assignment]
            try:
                await contexts.create(ONE, made)
                finished = True
            except Cut:
                pass
            contexts._store = whole
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


async def test_the_least_worth_goes_when_a_tenants_budget_is_full(nodes: list[Valkey]) -> None:
    """Used ones and pinned ones stay, expired ones go first; each is counted by its reason."""
    async with opened(nodes, tenant_bytes=200_000) as one:
        contexts = one.contexts
        rows = [await contexts.create(ONE, draft()) for _ in range(4)]
        pinned = await contexts.update(ONE, rows[0].id, metadata={"pin": "true"})
        assert pinned.pinned
        for _ in range(3):
            contexts.used(ONE, rows[1], None)
        await contexts._flush()
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
        await contexts._flush()
        short = [key for key in keys_left([server]) if not int(server.ask("TTL", key)[1:]) > 4900]
        assert short == []


async def test_everything_goes_by_itself_in_the_end(server: Valkey) -> None:
    """Not even the tenant's own keys stay for ever."""
    server.flush()
    async with opened([server]) as one:
        await one.contexts.create(ONE, draft(tags=("t",)))
        assert all(int(server.ask("TTL", key)[1:]) > 0 for key in keys_left([server]))


async def test_one_read_fills_the_memory_however_many_wait(server: Valkey) -> None:
    """A hundred at once."""
    server.flush()
    async with opened([server]) as one, opened([server]) as two:
        made = await one.contexts.create(ONE, draft(3_000_000))
        row = await two.contexts.row(ONE, made.id)
        found = await asyncio.gather(*[two.contexts.content(ONE, row) for _ in range(100)])
        assert len(set(map(id, found))) == 1
        assert two.contexts._contents.reads == 1


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


async def test_news_on_the_channel_drops_what_is_remembered_and_nonsense_does_nothing(nodes: list[Valkey]) -> None:
    """Also of what was being read meanwhile; on a Cluster the channel reaches every node."""
    async with opened(nodes) as one, opened(nodes) as two:
        await eventually(lambda: one.contexts._heard and two.contexts._heard)
        for tenant in TENANTS:  # in slots of different nodes
            row = await one.contexts.create(tenant, draft(2000, tags=("t",)))
            assert (await two.contexts.tagged(tenant, "t")).id == row.id
            other = await one.contexts.create(tenant, draft(2000))
            await one.contexts.set_tag(tenant, "t", other.id)

            async def follows(tenant: str = tenant, expected: ContextRow = other) -> bool:
                return (await two.contexts.tagged(tenant, "t")).id == expected.id

            await eventually(follows, within_seconds=0.1)
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
    from cache import context_scripts

    found = [value.name for value in vars(context_scripts).values() if isinstance(value, Script)]
    assert len(found) == len(set(found)) > 5

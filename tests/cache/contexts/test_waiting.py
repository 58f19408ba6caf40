"""Uses of contexts and accepted keys wait for Redis: they are kept, bounded, and written later."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from cache.contexts import accepted as accepted_module
from cache.contexts import uses as uses_module
from cache.contexts.accepted import AcceptedTenants
from cache.contexts.access import Access
from cache.contexts.room import ContextRoom
from cache.contexts.uses import ContextUses
from cache.errors import CacheError, StoreCorrupt, StoreFull, StoreRefused, StoreUnavailable
from tests.support.clock import FakeClock
from tests.support.context_store import LIMITS, ONE
from tests.support.fake_store import FakeStore


class Bench:
    def __init__(self) -> None:
        self.store = FakeStore()
        self.clock = FakeClock()
        self.access = Access(self.store.as_store(), LIMITS, self.clock)
        self.store.replies = {"context-used": 1_700_000_000_500, "EXISTS": 0}


async def until(running: Coroutine[Any, Any, None], store: FakeStore, operations: int) -> None:
    """Run a loop until it has done this many operations."""
    done = asyncio.Event()

    def count() -> None:
        if len(store.ran) >= operations:
            done.set()

    store.did = count
    task = asyncio.ensure_future(running)  # noqa: TID251
    await asyncio.wait_for(done.wait(), 30)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])


async def test_uses_are_reported_together_and_set_the_clock() -> None:
    """Times and the last reset of each context."""
    bench = Bench()
    uses = ContextUses(bench.access)
    for reset in (None, 60.0, None):
        uses.add(ONE, "a", reset)
    uses.add(ONE, "b", None)
    assert await uses.flush()
    assert bench.store.ran == [("context-used", (60_000, "a", 3, 60_000, "b", 1, 0))]
    assert bench.access.now() == 1_700_000_000.5


@pytest.mark.parametrize("error", [StoreUnavailable("away"), StoreFull("full")])
async def test_uses_wait_while_redis_does_not_take_them(error: CacheError) -> None:
    """And are reported once, with those that came meanwhile."""
    bench = Bench()
    uses = ContextUses(bench.access)
    uses.add(ONE, "a", 60.0)
    bench.store.errors.append(error)
    assert not await uses.flush()
    uses.add(ONE, "a", None)
    assert await uses.flush()
    assert bench.store.ran[-1] == ("context-used", (60_000, "a", 2, 60_000))
    assert uses.dropped == 0


async def test_refused_uses_and_those_beyond_the_bound_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's error would come again."""
    monkeypatch.setattr(uses_module, "WAITING_AT_MOST", 2)
    bench = Bench()
    uses = ContextUses(bench.access)
    for name in "abc":
        uses.add(ONE, name, None)
    assert uses.dropped == 1
    bench.store.errors.append(StoreRefused("wrong type"))
    assert await uses.flush()
    assert uses.dropped == 3
    assert await uses.flush()
    assert len(bench.store.ran) == 1


async def test_the_loop_reports_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pause."""
    monkeypatch.setattr(uses_module, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(uses_module, "RETRY_FIRST_SECONDS", 0.001)
    bench = Bench()
    uses = ContextUses(bench.access)
    uses.add(ONE, "a", None)
    bench.store.errors.append(StoreUnavailable("away"))
    await until(uses.run(), bench.store, 2)
    assert [name for name, _ in bench.store.ran] == ["context-used"] * 2


async def test_an_accepted_key_is_known_here_at_once_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a failure of Redis."""
    monkeypatch.setattr(accepted_module, "RETRY_FIRST_SECONDS", 0.001)
    bench = Bench()
    accepted = AcceptedTenants(bench.access)
    accepted.note(ONE)
    accepted.note(ONE)
    assert await accepted.includes(ONE)
    bench.store.errors.append(StoreUnavailable("away"))
    await until(accepted.run(), bench.store, 3)
    await accepted.flush()
    assert [name for name, _ in bench.store.ran] == ["SET", "SET", "context-accept"]


async def test_what_is_remembered_of_accepted_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten one is looked up; one too many to wait for Redis is counted."""
    monkeypatch.setattr(accepted_module, "REMEMBERED_AT_MOST", 2)
    monkeypatch.setattr(accepted_module, "WAITING_AT_MOST", 3)
    bench = Bench()
    accepted = AcceptedTenants(bench.access)
    for name in "abcd":
        accepted.note(name)
    assert accepted.dropped == 1
    assert not await accepted.includes("a")
    bench.store.replies["EXISTS"] = 1
    assert await accepted.includes("a")
    bench.store.replies["EXISTS"] = 0
    assert await accepted.includes("a")


class NoListing:
    """A listing of no contexts."""

    async def kept(self, tenant: str) -> list[Any]:
        del tenant
        return []

    async def rows(self, tenant: str) -> list[Any]:
        del tenant
        return []


def room(bench: Bench) -> ContextRoom:
    return ContextRoom(bench.access, NoListing(), lambda reason, number: None)  # type: ignore[arg-type]


async def test_totals_that_could_not_be_written_are_left_to_the_next_sweep() -> None:
    """The creation that caused them has succeeded."""
    bench = Bench()
    bench.store.errors += [StoreUnavailable("away"), StoreUnavailable("away")]
    await room(bench).changed(ONE, (1, 1, 0))
    await room(bench).refresh(ONE)
    await room(bench).changed(ONE, None)
    assert len(bench.store.ran) == 2


async def test_a_sweep_goes_on_after_a_damaged_tenant() -> None:
    """Which is counted."""
    bench = Bench()
    totals = {b"one": b"5:1", b"two": b"6:1"}
    replies: Iterator[list[Any]] = iter([[b"junk"], [1, [0, 0, 0]]])

    def hash_of(key: str) -> dict[bytes, bytes]:
        return {} if "unlisted" in key else totals

    def swept() -> list[Any]:
        return next(replies)

    bench.store.replies |= {"HGETALL": hash_of, "context-sweep": swept, "context-note": [6, 1]}
    sweeping = room(bench)
    await sweeping.sweep()
    assert sweeping.dropped_totals == 1
    assert [args[0] for name, args in bench.store.ran if name == "context-note"] == ["two"]


async def test_background_work_goes_on_after_an_error_of_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker sweeps, the others only read the totals."""
    monkeypatch.setattr("cache.contexts.room.SWEEP_SECONDS", 0.001)
    monkeypatch.setattr("cache.contexts.room.SURVEY_SECONDS", 0.001)
    bench = Bench()
    bench.store.replies |= {"HGETALL": {}, "context-begin-sweep": 0}
    bench.store.errors.append(StoreUnavailable("away"))
    await until(room(bench).run_sweeps(), bench.store, 3)
    assert [name for name, _ in bench.store.ran[:3]] == ["context-begin-sweep"] * 2 + ["HGETALL"]
    bench.store.ran.clear()
    bench.store.replies["context-begin-sweep"] = 1
    await until(room(bench).run_sweeps(), bench.store, 3)
    assert [name for name, _ in bench.store.ran[:3]] == ["context-begin-sweep", "HGETALL", "HGETALL"]
    bench.store.ran.clear()
    bench.store.errors.append(StoreCorrupt("damaged"))
    await until(room(bench).run_surveys(), bench.store, 2)
    assert [name for name, _ in bench.store.ran[:2]] == ["HGETALL", "HGETALL"]

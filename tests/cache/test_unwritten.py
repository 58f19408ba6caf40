"""Totals and the secret on a scripted store: every kind of refusal, and the loops around them."""

from __future__ import annotations

import asyncio

import pytest

from cache import secret as secret_module
from cache import totals as totals_module
from cache.errors import StoreCorrupt, StoreFull, StoreRefused, StoreUnavailable
from cache.secret import SharedSecret, shared_secret
from cache.totals import OTHER, Sums, Totals
from tests.support.fake_store import FakeStore
from tests.support.valkey import eventually

DAY = "2026-11-23"


async def test_only_a_refusal_of_the_batch_itself_loses_it() -> None:
    """Full or away it waits, and is sent again as it was."""
    store = FakeStore()
    store.replies["add-totals"] = 0
    totals = Totals(store.as_store(), "w")
    totals.row(DAY, "m", "u", "t").add(Sums(answers=1, missing=2))
    store.errors += [StoreFull("full"), StoreUnavailable("away")]
    assert not await totals.flush()
    totals.row(DAY, "m", "u", "t").add(Sums(answers=5))
    assert not await totals.flush()
    assert await totals.flush()
    sent = [args[0] for _, args in store.ran]
    assert sent == [1, 1, 1, 2]
    assert totals.dropped == {"total_lost": 0, "total_without_tenant": 0}
    totals.row(DAY, "m", "u", "t").add(Sums(answers=1, missing=2))
    store.errors.append(StoreRefused("wrong type"))
    assert await totals.flush()
    assert (totals.refused_batches, totals.lost_increments) == (1, 2)


async def test_the_last_rows_are_tried_again_for_a_moment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis may be slow just when a worker ends; what it never takes is one line of the log."""
    monkeypatch.setattr(totals_module, "CLOSE_PAUSE_SECONDS", 0.0)
    store = FakeStore()
    store.replies["add-totals"] = 0
    totals = Totals(store.as_store(), "w")
    totals.row(DAY, "m", "u", "t").answers += 1
    store.errors += [StoreUnavailable("slow")] * 3
    await totals.close()
    assert [args[0] for _, args in store.ran] == [1] * 4
    assert caplog.records == []
    monkeypatch.setattr(totals_module, "CLOSE_SECONDS", 0.01)
    totals.row(DAY, "m", "u", "t").answers += 1
    store.errors += [StoreUnavailable("away")] * 1_000_000
    await totals.close()
    assert "the totals of the last requests were not written" in caplog.text


async def test_rows_beyond_the_bound_are_counted_as_they_lose_their_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their amounts are kept."""
    monkeypatch.setattr(totals_module, "ROWS_PENDING", 3)
    totals = Totals(FakeStore().as_store(), "w")
    for number in range(5):
        totals.row(DAY, "m", "u", f"t{number}").answers += 1
    assert totals.merged_rows == 2
    assert totals.row(DAY, "m", "u", OTHER).answers == 2


async def test_totals_are_written_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the task is cancelled."""
    monkeypatch.setattr(totals_module, "FLUSH_SECONDS", 0.001)
    store = FakeStore()
    store.replies["add-totals"] = 0
    totals = Totals(store.as_store(), "w")
    totals.row(DAY, "m", "u", "t").answers += 1
    running = asyncio.ensure_future(totals.run())  # noqa: TID251
    await eventually(lambda: store.ran)
    running.cancel()
    assert totals.pending_rows == 0


async def test_an_amount_beyond_redis_is_limited() -> None:
    """Redis counts in 64 bits."""
    store = FakeStore()
    store.replies["add-totals"] = 0
    totals = Totals(store.as_store(), "w")
    totals.row(DAY, "m", "u", "t").input_picos = 10**30
    await totals.flush()
    assert store.ran[0][1][-1] == 2**63 - 1


async def test_a_secret_is_adopted_once_and_compared_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pause in between."""
    monkeypatch.setattr(secret_module, "CHECK_SECONDS", 0.001)
    monkeypatch.setattr(secret_module, "RETRY_FIRST_SECONDS", 0.001)
    store = FakeStore()
    answers = [b"a" * 32, b"a" * 32, b"b" * 100]
    store.replies |= {"agree-on-secret": b"a" * 32, "GET": lambda _: answers.pop(0) if answers else b"b" * 100}
    store.errors.append(StoreUnavailable("away"))
    adopted = list[bytes]()
    shared = SharedSecret(store.as_store(), adopted.append)
    running = asyncio.ensure_future(shared.run())  # noqa: TID251
    await shared.agreed.wait()
    await eventually(lambda: len(adopted) == 2)
    running.cancel()
    assert adopted[0] == b"a" * 32
    assert len(adopted[1]) == 64


async def test_a_reply_that_is_no_secret_is_damage() -> None:
    """Nothing is adopted."""
    store = FakeStore()
    store.replies["agree-on-secret"] = 7
    with pytest.raises(StoreCorrupt):
        await shared_secret(store.as_store())

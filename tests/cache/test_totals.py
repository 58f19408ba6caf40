"""Totals: exact sums that outlive the process, counted once however often they are sent."""

from __future__ import annotations

from datetime import date

import pytest

from cache import keys, totals
from cache.errors import StoreTimeout
from cache.store.store import Store, open_store
from cache.totals import MAX_AMOUNT, OTHER, RowKey, Sums, Totals, read_totals
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.valkey import PATIENT_SECONDS, Valkey, cluster_of_three, eventually

DAY = "2026-11-23"
BEFORE = "2026-11-22"
FIRST = LAST = date.fromisoformat(DAY)


def count(writer: Totals, day: str = DAY, tenant: str = "red", **figures: int) -> None:
    writer.row(day, "m", "u", tenant).add(Sums(**figures))


async def test_two_writers_add_up_to_the_last_unit(store: Store) -> None:
    """Each figure by day, model, upstream and tenant; integers as large as a day's bill in picodollars."""
    one, two = Totals(store, "one"), Totals(store, "two")
    count(one, answers=1, prompt_tokens=7, input_picos=10**17 + 1)
    count(two, answers=2, prompt_tokens=8, input_picos=10**17 + 1, saving_picos=3)
    count(two, day="2026-11-22", answers=5)
    assert await one.flush()
    assert await two.flush()
    found = await read_totals(store, FIRST, LAST)
    assert found == {
        RowKey(DAY, "m", "u", "red"): Sums(answers=3, prompt_tokens=15, input_picos=2 * 10**17 + 2, saving_picos=3)
    }
    both_days = await read_totals(store, date(2026, 11, 1), LAST)
    assert [key.day for key in both_days] == ["2026-11-22", DAY]


async def test_rows_that_are_merged_while_they_are_read_add_up(store: Store) -> None:
    """Over all days and tenants, however many days are read in one round trip."""
    writer = Totals(store, "w")
    days = [f"2026-11-{day:02}" for day in range(1, 3 * totals.READ_DAYS)]
    for day in days:
        count(writer, day=day, answers=2)
        count(writer, day=day, tenant="blue", answers=1, prompt_tokens=5)
    await writer.flush()
    found = await read_totals(store, date(2026, 10, 31), LAST, lambda key: key._replace(day="", tenant=""))
    assert found == {RowKey("", "m", "u", ""): Sums(answers=3 * len(days), prompt_tokens=5 * len(days))}


async def test_names_of_any_characters_stay_apart(store: Store) -> None:
    """Names that an upstream lists may contain anything."""
    writer = Totals(store, "w")
    names = ('a"b', "a\x1fb", "a:b", "ä", "")
    for name in names:
        writer.row(DAY, name, name, name).answers += 1
    await writer.flush()
    assert {key.model for key in await read_totals(store, FIRST, LAST)} == set(names)


async def test_a_batch_whose_answer_was_lost_counts_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrived, but its reply did not, so the writer sends it again; later amounts are a separate batch."""
    writer = Totals(store, "w")
    count(writer, answers=1)
    really = store.run_script

    async def lose_the_answer(*args: object) -> None:
        await really(*args)  # type: ignore[arg-type]
        raise StoreTimeout("lost")

    monkeypatch.setattr(store, "run_script", lose_the_answer)
    assert not await writer.flush()
    monkeypatch.setattr(store, "run_script", really)
    count(writer, answers=10)
    assert await writer.flush()
    assert (await read_totals(store, FIRST, LAST))[RowKey(DAY, "m", "u", "red")].answers == 11


async def test_more_rows_than_a_batch_are_all_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several scripts, over two days."""
    monkeypatch.setattr(totals, "BATCH_ROWS", 7)
    writer = Totals(store, "w")
    for number in range(40):
        count(writer, day=f"2026-11-2{number % 2}", tenant=f"t{number}", answers=number)
    assert await writer.flush()
    found = await read_totals(store, date(2026, 11, 20), LAST)
    assert sum(sums.answers for sums in found.values()) == sum(range(40))
    assert len(found) == 39  # a row of zeros is not written


async def test_with_redis_away_rows_gather_and_are_written_when_it_is_back() -> None:
    """Nothing is lost and nothing waits."""
    tasks, valkey = Tasks(), Valkey()
    store = open_store(valkey.url, clock=SystemClock(), tasks=tasks, limit_seconds=PATIENT_SECONDS)
    try:
        await store.start()
        writer = Totals(store, "w")
        count(writer, answers=1)
        assert not await writer.flush()
        count(writer, answers=2)
        valkey.start()
        await eventually(writer.flush)
        assert (await read_totals(store, FIRST, LAST))[RowKey(DAY, "m", "u", "red")].answers == 3
    finally:
        await store.close()
        await tasks.close()
        valkey.end()


async def test_made_up_tenants_are_bounded_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound they are counted together; a new day tells new ones apart."""
    monkeypatch.setattr(totals, "TENANTS_A_DAY", 10)
    tasks = Tasks()
    writer = Totals(open_store(None, clock=SystemClock(), tasks=tasks), "w")
    for number in range(1000):
        count(writer, tenant=f"t{number}", answers=1)
    assert writer.pending_rows == 11
    assert writer.row(DAY, "m", "u", OTHER).answers == 990
    count(writer, day="2026-11-24", tenant="t999", answers=1)
    assert writer.row("2026-11-24", "m", "u", "t999").answers == 1


async def test_rows_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as Redis is away."""
    monkeypatch.setattr(totals, "ROWS_PENDING", 20)
    writer = Totals(open_store(None, clock=SystemClock(), tasks=Tasks()), "w")
    for number in range(500):
        count(writer, tenant=f"t{number}", answers=1)
    assert writer.pending_rows == 21


async def test_damage_in_redis_is_replaced_and_costs_only_its_own_amounts(store: Store, valkey: Valkey) -> None:
    """A day of another type, a field that is not a number. A sum that would overflow stays; that is counted."""
    writer = Totals(store, "w")
    valkey.ask("SET", keys.totals_day(BEFORE), "not a hash")
    valkey.ask("HSET", keys.totals_day(DAY), '["answers","m","u","green"]', "x")
    valkey.ask("HSET", keys.totals_day(DAY), '["missing","m","u","green"]', str(MAX_AMOUNT))
    count(writer, day=BEFORE, answers=1)
    count(writer, tenant="green", answers=1, missing=1)
    assert await writer.flush()
    assert writer.lost_increments == 1
    found = await read_totals(store, date.fromisoformat(BEFORE), LAST)
    assert found == {
        RowKey(BEFORE, "m", "u", "red"): Sums(answers=1),
        RowKey(DAY, "m", "u", "green"): Sums(answers=1, missing=MAX_AMOUNT),
    }


async def test_a_damaged_day_that_nobody_writes_hides_no_other(store: Store, valkey: Valkey) -> None:
    """It is left out."""
    writer = Totals(store, "w")
    valkey.ask("SET", keys.totals_day(BEFORE), "not a hash")
    count(writer, answers=1)
    assert await writer.flush()
    assert await read_totals(store, date.fromisoformat(BEFORE), LAST) == {
        RowKey(DAY, "m", "u", "red"): Sums(answers=1)
    }


async def test_what_is_unknown_in_a_day_is_passed_over_and_days_expire(store: Store, valkey: Valkey) -> None:
    """A newer version's figure does not break an older reader."""
    writer = Totals(store, "w")
    count(writer, answers=4)
    await writer.flush()
    day = keys.totals_day(DAY)
    valkey.ask("HSET", day, '["new_figure","m","u","red"]', "9")
    valkey.ask("HSET", day, "junk", "9")
    valkey.ask("HSET", day, '["answers","m","u","blue"]', "x")
    assert await read_totals(store, FIRST, LAST) == {RowKey(DAY, "m", "u", "red"): Sums(answers=4)}
    assert int(valkey.ask("TTL", day)[1:]) > 399 * 86_400


async def test_totals_lie_in_one_slot_of_a_cluster() -> None:
    """Script and pipeline touch keys of one slot only."""
    with cluster_of_three() as nodes:
        tasks = Tasks()
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        store = open_store(url, clock=SystemClock(), tasks=tasks, limit_seconds=PATIENT_SECONDS)
        try:
            await store.start()
            writer = Totals(store, "w")
            count(writer, answers=1)
            count(writer, day="2026-11-22", answers=1)
            assert await writer.flush()
            assert len(await read_totals(store, date(2025, 1, 1), LAST)) == 2
        finally:
            await store.close()
            await tasks.close()

"""Claims on replicas for cold turns, against a real Valkey."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cache import keys
from cache.errors import CacheError
from cache.replication.cold_claims import GONE_SECONDS, LOOK_SECONDS, PART_TAKEN, ColdClaims
from cache.store.store import Store, open_store
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.clock import FakeClock
from tests.support.valkey import PATIENT_SECONDS, Valkey, eventually


class Two:
    """Two workers on one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.tasks = tasks = Tasks()
        self.gone: list[str] = []
        self.clock = FakeClock()
        self.one = ColdClaims(store, "one", clock=self.clock, tasks=tasks, gone=lambda: self.gone)
        self.two = ColdClaims(store, "two", clock=self.clock, tasks=tasks)


@pytest.fixture
async def two(server: Valkey) -> AsyncIterator[Two]:
    server.flush()
    tasks = Tasks()
    store = open_store(
        f"redis://127.0.0.1:{server.port}/0", clock=SystemClock(), tasks=tasks, limit_seconds=PATIENT_SECONDS
    )
    await store.start()
    two = Two(store)
    yield two
    await two.tasks.close()
    await store.close()
    await tasks.close()


async def take(
    claims: ColdClaims, replicas: list[str], place: str, waited_seconds: float = 0.0, **more
) -> str | None:
    about = {"tenant": "a", "claim_seconds": 30.0, "most": 9, **more}
    return await claims.take("pool", replicas, order=(place, waited_seconds), **about)


async def test_a_replica_is_held_by_one_until_it_is_released(two: Two) -> None:
    """The other gets the next one, then none, then the first."""
    assert await take(two.one, ["r0", "r1"], "1") == "r0"
    assert await take(two.two, ["r0", "r1"], "2") == "r1"
    assert await take(two.two, ["r0"], "2") is None
    two.two.release("pool", "r0")  # not its own
    two.one.release("pool", "r0")

    async def free() -> bool:
        return await take(two.two, ["r0"], "2") == "r0"

    await eventually(free)


async def test_the_oldest_turn_of_all_goes_first(two: Two) -> None:
    """A worker whose turn is later gets nothing while an older one waits elsewhere, until that is withdrawn."""
    assert await take(two.one, [], "1") is None
    assert await take(two.two, ["r0"], "2") is None
    two.one.withdraw("pool")

    async def free() -> bool:
        return await take(two.two, ["r0"], "2") == "r0"

    await eventually(free)


async def test_of_turns_with_the_same_place_the_one_that_has_waited_longest_goes_first(two: Two) -> None:
    """By one clock, that of Redis: a machine whose clock is an hour ahead would else wait for all others."""
    assert await take(two.one, [], "1:0", waited_seconds=9.0) is None
    assert await take(two.two, ["r0"], "1:0", waited_seconds=8.0) is None
    assert await take(two.two, [], "1:0", waited_seconds=3_600.0) is None
    assert await take(two.one, ["r0"], "1:0", waited_seconds=9.0) is None
    assert await take(two.one, ["r0"], "0:0") == "r0"


async def test_a_busy_replica_rests_between_the_cold_turns_of_all_workers(two: Two) -> None:
    """Each worker would else send one as often as if it were alone; a quiet replica takes one at any time."""

    async def released() -> bool:
        return not await two.store.execute("HEXISTS", keys.cold_claims("pool"), "r0")

    assert await take(two.one, ["r0"], "1") == "r0"
    two.one.release("pool", "r0")
    await eventually(released)
    assert await take(two.two, ["r0"], "2", busy={"r0": 60.0}) is None
    two.two.withdraw("pool")
    assert await take(two.one, ["r0", "r1"], "1", busy={"r0": 60.0, "r1": 60.0}) == "r1"
    assert await take(two.one, ["r0"], "1", busy={"r0": 0.0}) == "r0"
    two.one.release("pool", "r0")
    await eventually(released)
    assert await take(two.one, ["r0"], "1", busy={"r1": 60.0}) == "r0"
    two.one.release("pool", "r0")
    await eventually(released)
    assert await take(two.one, ["r0"], "1", busy={"r0": 0.0, "r1": 60.0}) == "r0", "each rests for its own time"


async def test_a_claim_ends_by_itself(two: Two) -> None:
    """A worker that died holds nothing for ever."""
    assert await take(two.one, ["r0"], "1", claim_seconds=0.02) == "r0"

    async def free() -> bool:
        return await take(two.two, ["r0"], "2") == "r0"

    await eventually(free)


async def test_a_claim_ends_with_its_worker(two: Two, server: Valkey) -> None:
    """One that has just been made does not: its worker has come back. Claims of others stay."""

    def claimed(seconds_ago: float) -> None:
        at_milliseconds = round((time.time() - seconds_ago) * 1000)  # noqa: TID251
        server.ask("HSET", keys.cold_last("pool"), "r0", str(at_milliseconds))

    assert await take(two.two, ["r0"], "2") == "r0"
    two.gone = ["three", "two"]
    claimed(-60.0)  # so that it has just been made, however long the machine pauses
    assert await take(two.one, ["r0"], "1") is None
    claimed(GONE_SECONDS + 1.0)
    two.gone = ["three"]
    assert await take(two.one, ["r0"], "1") is None
    two.gone = ["three", "two"]
    assert await take(two.one, ["r0"], "1") == "r0"


async def claim_of_a_worker_that_is_gone(two: Two, server: Valkey) -> None:
    """Leave a claim that was made some seconds ago, by a worker that nobody has heard."""
    dead = ColdClaims(two.store, "dead", clock=two.clock, tasks=Tasks())
    assert await take(dead, ["r0"], "0") == "r0"
    made_ms = round((time.time() - GONE_SECONDS - 1.0) * 1000)  # noqa: TID251
    server.ask("HSET", keys.cold_last("pool"), "r0", str(made_ms))


async def looked(two: Two, claims: ColdClaims, **more: Any) -> str | None:
    """Ask in vain, wait until the look that this starts is over, and ask again."""
    assert not await take(claims, ["r0"], "1", **more)
    await eventually(lambda: not len(two.tasks))
    return await take(claims, ["r0"], "1", **more)


async def test_a_claim_ends_with_its_worker_though_nobody_heard_it_fall_silent(two: Two, server: Valkey) -> None:
    """All workers of a proxy were killed and started again: the new ones know none of the old ones. Whoever announces
    itself keeps its claim, and all do while this one does not: Redis may have lost who is there."""
    await claim_of_a_worker_that_is_gone(two, server)
    for announced in (["two"], ["one", "dead"]):
        server.ask("DEL", keys.WRITERS)
        for name in announced:
            server.ask("ZADD", keys.WRITERS, "1", name)
        assert await looked(two, two.one) is None
        two.clock.advance(LOOK_SECONDS)
    server.ask("ZREM", keys.WRITERS, "dead")
    assert await looked(two, two.one) == "r0"


async def test_a_tenant_whose_part_was_claimed_by_a_worker_that_is_gone_gets_it(two: Two, server: Valkey) -> None:
    """Otherwise none of its turns would go, to whatever replica."""
    await claim_of_a_worker_that_is_gone(two, server)
    server.ask("ZADD", keys.WRITERS, "1", "one")
    assert await take(two.one, ["r1"], "1", most=1) == PART_TAKEN
    await eventually(lambda: not len(two.tasks))
    assert await take(two.one, ["r1"], "1", most=1) == "r1"


async def test_a_worker_that_waits_looks_for_such_claims_once_a_second(two: Two, server: Valkey) -> None:
    """And not with each of the many turns that get no replica."""
    server.ask("ZADD", keys.WRITERS, "1", "one")
    assert await take(two.two, ["r0"], "0") == "r0"
    server.ask("ZADD", keys.WRITERS, "1", "two")
    assert await looked(two, two.one) is None
    server.ask("DEL", keys.cold_claims("pool"))
    await claim_of_a_worker_that_is_gone(two, server)
    assert await looked(two, two.one) is None
    two.clock.advance(LOOK_SECONDS)
    assert await looked(two, two.one) == "r0"


async def test_each_pool_has_its_own_looks(two: Two, server: Valkey) -> None:
    """Otherwise the turns of one that asks first each time would keep those of another waiting for a dead worker."""
    server.ask("ZADD", keys.WRITERS, "1", "one")
    waits = two.one.take("other", [], order=("1", 0.0), tenant="a", claim_seconds=30.0, most=9)
    assert await waits is None
    await claim_of_a_worker_that_is_gone(two, server)
    assert await looked(two, two.one) == "r0"


async def test_who_was_gone_when_the_last_turn_went_may_be_back_when_the_next_one_waits(
    two: Two, server: Valkey
) -> None:
    """A worker that could not announce itself for some seconds keeps its claims."""
    server.ask("ZADD", keys.WRITERS, "1", "one")
    await claim_of_a_worker_that_is_gone(two, server)
    assert await take(two.one, ["r0"], "1") is None
    await eventually(lambda: not len(two.tasks))
    two.one.withdraw("pool")
    server.ask("ZADD", keys.WRITERS, "1", "dead")
    assert await take(two.one, ["r0"], "1") is None


async def test_a_tenant_holds_no_more_than_its_part_over_all_workers(two: Two) -> None:
    """Another tenant's turn is not in its way."""
    assert await take(two.one, ["r0", "r1"], "1", most=1) == "r0"
    assert await take(two.two, ["r0", "r1"], "2", most=1) == PART_TAKEN
    assert await take(two.two, ["r0", "r1"], "2", tenant="b", most=1) == "r1"


async def test_a_turn_of_a_tenant_that_has_its_part_keeps_no_other_turn_waiting(two: Two) -> None:
    """The replica that is left is for others, though the turn came before theirs."""
    assert await take(two.one, ["r0", "r1"], "1", most=1) == "r0"
    assert await take(two.two, ["r1"], "2", most=1) == PART_TAKEN
    assert await take(two.one, ["r1"], "3", tenant="b", most=1) == "r1"


async def test_a_lower_priority_gets_its_floor_while_another_worker_s_higher_one_always_waits(two: Two) -> None:
    """One claim of twenty of the same work; the highest one is not affected."""
    turns = 0
    assert await take(two.one, [], "1:0:5", tokens=100.0) is None
    while await take(two.two, ["r0"], "2:0:0", tokens=100.0) is None:
        assert await take(two.one, ["r0"], "1:0:5", tokens=100.0) == "r0"
        assert await take(two.one, [], "1:0:5", tokens=100.0) is None
        turns += 1
        await two.store.execute("HDEL", keys.cold_claims("pool"), "r0")
    assert turns == 20
    await two.store.execute("HDEL", keys.cold_claims("pool"), "r0")
    assert await take(two.two, ["r0"], "2:0:0", tokens=100.0) is None, "it has to save up again"


async def test_a_worker_that_does_not_know_of_its_claim_gets_it_again(two: Two) -> None:
    """The answer was lost. The claim counts neither against it nor against its tenant."""
    assert await take(two.one, ["r0"], "1") == "r0"
    assert await take(two.two, ["r0"], "2") is None
    two.two.withdraw("pool")
    assert await take(two.one, ["r0"], "1", most=1) == "r0"


async def test_a_release_that_comes_late_ends_no_later_claim(two: Two) -> None:
    """Each claim has a number."""
    assert await take(two.one, ["r0"], "1") == "r0"
    late = two.one._release("pool", "r0", 1)  # noqa: SLF001 - a task that has not run yet
    assert await take(two.one, ["r0"], "1") == "r0"
    await late
    assert await take(two.two, ["r0"], "2") is None


async def test_without_redis_the_caller_is_told(server: Valkey) -> None:
    """It goes on alone; what cannot be taken back is counted and nothing else."""
    tasks = Tasks()
    claims = ColdClaims(open_store(None, clock=SystemClock(), tasks=tasks), "one", clock=SystemClock(), tasks=tasks)
    with pytest.raises(CacheError):
        await take(claims, ["r0"], "1")
    claims.withdraw("pool")
    await eventually(lambda: claims.failed == 1)


@pytest.mark.parametrize("value", ["junk", "", "99999999999999999|other|a", "99999999999999999|0"])
async def test_damaged_entries_hold_nothing_back(two: Two, server: Valkey, value: str) -> None:
    """Without an end, or with one that is further away than any entry lasts, they are deleted."""
    server.ask("HSET", keys.cold_heads("pool"), "ghost", value)
    server.ask("HSET", keys.cold_claims("pool"), "r0", value)
    assert await take(two.one, ["r0"], "1") == "r0"
    assert server.ask("HGET", keys.cold_heads("pool"), "ghost") == b"$-1\r\n"


async def test_keys_of_the_wrong_type_hold_nothing_back(two: Two, server: Valkey) -> None:
    """They are replaced."""
    for key in (keys.cold_heads("pool"), keys.cold_claims("pool"), keys.cold_last("pool")):
        server.ask("DEL", key)
        server.ask("SADD", key, "x")
    assert await take(two.one, ["r0"], "1") == "r0"
    assert await take(two.two, ["r0"], "2") is None


def set_back_by(server: Valkey, seconds: float, holder: str = "ghost") -> None:
    """Leave what a worker has written by a clock that was ahead by `seconds` and has been set back since."""
    now_ms = round((time.time() + seconds) * 1000)  # noqa: TID251
    server.ask("HSET", keys.cold_heads("pool"), holder, f"{now_ms + 2_000}|")
    server.ask("HSET", keys.cold_claims("pool"), "r0", f"{now_ms + 30_000}|{holder}|a")
    server.ask("HSET", keys.cold_last("pool"), "r0", str(now_ms))


async def test_a_clock_that_was_set_back_holds_nothing_back(two: Two, server: Valkey) -> None:
    """A turn that was named, and a claim that was made, half an hour in the future are not waited for."""
    set_back_by(server, 1_800.0)
    assert await take(two.one, ["r0"], "1") == "r0"


async def test_a_claim_that_was_made_at_no_known_time_holds_nothing_back(two: Two, server: Valkey) -> None:
    """Every claim is written together with its time; a made-up one may name a worker that never ends."""
    server.ask("HSET", keys.cold_claims("pool"), "r0", f"{round((time.time() + 3_000) * 1000)}|ghost|a")  # noqa: TID251
    assert await take(two.one, ["r0"], "1") == "r0"

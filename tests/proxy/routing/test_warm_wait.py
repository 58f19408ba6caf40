"""Warm turns that wait for the replica that holds them, before they are placed."""

from __future__ import annotations

import asyncio

import pytest

from proxy.errors import DeadlineUnreachable
from proxy.fleet import Fleet
from proxy.fleet.replica import ReplicaSpec
from proxy.routing import replica_queue, warm_wait
from proxy.routing.cold_turn import GateLimits
from proxy.routing.fair_shares import QUANTUM_TOKENS, Share, TenantShares
from proxy.routing.warm_wait import WarmQueues
from proxy.tasks import Tasks
from tests.support.clock import FakeClock


class Work:
    """The seconds of prefill that were sent to each replica."""

    def __init__(self) -> None:
        self.seconds = {0: 100.0, 1: 0.0}
        self.unused: set[int] = set()

    def sent_seconds(self, number: int, now_seconds: float) -> float:
        assert now_seconds >= 0.0
        return self.seconds[number]

    def is_used(self, number: int) -> bool:
        return number not in self.unused


class Bench:
    """The queues, before a busy replica 0 and a quiet replica 1."""

    def __init__(self) -> None:
        self.work, self.shares, self.tasks, self.limits = Work(), TenantShares(), Tasks(), GateLimits()
        self.queues = WarmQueues(self.work, self.shares, lambda: self.limits, FakeClock())

    async def begin(self, work_seconds: float = 1.0, tenant: str = "a", tokens: float = 0.0) -> asyncio.Task[None]:
        waiting = self.queues.wait(0, work_seconds, Share(tenant, tokens=tokens))
        turn = self.tasks.start(waiting, "turn")
        await turns()
        return turn


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_a_turn_waits_until_its_replica_is_quiet() -> None:
    """It is counted until then, and another one waits behind it whatever the replica does."""
    bench = Bench()
    assert [bench.queues.is_busy(number) for number in (0, 1)] == [True, False]
    turn = await bench.begin()
    assert (bench.queues.waiting(0), bench.queues.waiting(1), turn.done()) == (1, 0, False)
    bench.work.seconds[0] = 0.0
    assert bench.queues.is_busy(0)
    bench.queues.look()
    await turns()
    assert (bench.queues.waiting(0), turn.done(), bench.queues.is_busy(0)) == (0, True, False)


async def test_turns_do_not_wait_for_a_replica_that_is_down() -> None:
    """It may never do what was sent there: all of them are judged again at once."""
    bench = Bench()
    waiting = [await bench.begin() for _ in range(3)]
    bench.work.unused.add(0)
    bench.queues.look()
    for _ in range(3):
        await turns()
    assert all(turn.done() for turn in waiting)
    assert not bench.queues.is_busy(0)


async def test_turns_do_not_wait_once_the_gate_is_switched_off() -> None:
    """Those that come then are sent at once, and would go before them."""
    bench = Bench()
    waiting = [await bench.begin() for _ in range(3)]
    bench.limits = GateLimits(enabled=False)
    bench.queues.look()
    for _ in range(3):
        await turns()
    assert all(turn.done() for turn in waiting)
    assert not bench.queues.is_busy(0)


async def test_turns_do_not_wait_for_a_replica_that_is_removed_while_another_process_uses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its work is not known any more."""
    monkeypatch.setattr(replica_queue, "RECHECK_SECONDS", 0.0)
    clock, fleet = FakeClock(), Fleet(lambda: 0.5)
    number = fleet.add(ReplicaSpec("replica-0", "engines"))
    row = (100_000.0, 1.0, 100_000.0, 0.0, 0.0, 0.0, 0.0, 100_000.0, 100_000.0)
    fleet.absorb("other", {"replica-0": row}, clock.monotonic())
    queues = WarmQueues(fleet, TenantShares(), GateLimits, clock)
    turn = Tasks().start(queues.wait(number, 1.0, Share()), "turn")
    await turns()
    assert not turn.done()
    fleet.remove(number)
    assert fleet.forget(number)
    await asyncio.wait_for(turn, 10.0)


async def test_the_wait_is_estimated_by_what_was_sent_and_what_waits() -> None:
    """Minus the work with which a replica counts as quiet; no wait at all at one that is not busy."""
    bench = Bench()
    quiet_seconds = bench.limits.quiet_seconds
    assert (bench.queues.wait_seconds(0), bench.queues.wait_seconds(1)) == (100.0 - quiet_seconds, 0.0)
    for work_seconds in (2.0, 3.0):
        await bench.begin(work_seconds)
    assert bench.queues.sent_seconds(0, 0.0) == 100.0
    assert bench.queues.wait_seconds(0) == 105.0 - quiet_seconds
    bench.work.seconds[0] = 0.0
    assert bench.queues.wait_seconds(0) == max(5.0 - quiet_seconds, 0.0)
    await bench.tasks.close()
    assert bench.queues.wait_seconds(0) == 0.0
    bench.work.seconds[0] = 100.0
    await bench.begin(quiet_seconds / 2)
    bench.work.seconds[0] = 0.0
    assert bench.queues.wait_seconds(0) == 0.0, "what waits there is less than what counts as quiet"


async def test_a_turn_whose_own_deadline_passes_is_refused() -> None:
    """Nobody waits for its answer any more."""
    bench = Bench()
    async with asyncio.timeout(20):
        with pytest.raises(DeadlineUnreachable):
            await bench.queues.wait(0, 1.0, Share("a"), deadline_seconds=0.0)
    assert bench.queues.waiting(0) == 0


async def test_what_a_turn_computes_counts_for_its_tenant_everywhere() -> None:
    """The next turn of the others goes first, also in queues elsewhere."""
    bench = Bench()
    await bench.begin(tokens=5 * QUANTUM_TOKENS)
    bench.work.seconds[0] = 0.0
    bench.queues.look()
    await turns()
    assert bench.shares.round_of("a") == 5


async def test_beyond_so_many_and_after_its_patience_a_turn_is_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It returns although its replica is busy."""
    bench = Bench()
    monkeypatch.setattr(warm_wait, "MAX_WAITING", 1)
    first, second = await bench.begin(), await bench.begin()
    assert (first.done(), second.done(), bench.queues.waiting(0)) == (False, True, 1)
    await bench.tasks.close()
    monkeypatch.setattr(warm_wait, "PATIENCE_SECONDS", 0.0)
    async with asyncio.timeout(20):
        await bench.queues.wait(0, 1.0, Share("a"))

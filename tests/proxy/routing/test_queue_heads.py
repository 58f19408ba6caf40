"""Queues of several processes for the same replica keep one order among priorities and tenants."""

from __future__ import annotations

import asyncio
from functools import partial
from math import inf
from typing import Any

import pytest

from proxy.routing.fair_shares import Priority, Share, TenantShares
from proxy.routing.queue_heads import HOLD_SECONDS, OWED, SILENCE_SECONDS, Elsewhere, Head, QueueHeads, row_of
from proxy.routing.replica_queue import OTHERS_SECONDS, QueueLimits, ReplicaQueue
from tests.support.clock import FakeClock

TURNS = 10
NOTHING_SENT = (0.0, 0.0, 0.0)


def head(tenant: str, priority: int = Priority.NORMAL, round_number: int = 0, sent: Any = NOTHING_SENT) -> Head:
    return Head(tenant, priority, round_number, sent, 1 << max(priority, 0))


async def settle() -> None:
    """Let the tasks run that can."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


class Processes:
    """Queues of as many processes for one replica, which takes one request of all of them at a time."""

    def __init__(self, count: int) -> None:
        self.clock, self.busy, self.sent = FakeClock(), True, list[str]()
        self.shares = TenantShares()  # all processes know the same
        self.tasks: list[asyncio.Task[None]] = []
        self.queues = [
            ReplicaQueue(
                None,
                QueueLimits(),
                self.clock,
                shares=self.shares,
                is_crowded=lambda: self.busy,
                heads=partial(self.others_of, number),
            )
            for number in range(count)
        ]

    def others_of(self, number: int) -> dict[str, Head]:
        return self.others(number)

    def others(self, number: int) -> dict[str, Head]:
        heads = {str(other): queue.head() for other, queue in enumerate(self.queues) if other != number}
        return {name: found for name, found in heads.items() if found is not None}

    def ask(self, number: int, tenant: str, priority: Priority = Priority.NORMAL, tokens: float = 50_000.0) -> None:
        async def send() -> None:
            await self.queues[number].acquire(1.0, Share(tenant, 1.0, priority, tokens))
            self.sent.append(tenant)
            self.busy = True

        self.tasks.append(asyncio.get_running_loop().create_task(send()))

    async def room(self) -> None:
        """The replica becomes free, and the first process hears of it first."""
        self.busy = False
        for queue in self.queues:
            queue.look()
            await settle()

    def end(self) -> None:
        for task in self.tasks:
            task.cancel()


async def test_a_lower_priority_lets_a_higher_one_of_another_process_go_first():
    """Though the replica becomes free in the process in which the lower one waits."""
    processes = Processes(2)
    for _ in range(4):
        processes.ask(0, "low", Priority.LOW)
        processes.ask(1, "high", Priority.HIGH)
    await settle()
    for _ in range(3):
        await processes.room()
    assert processes.sent == ["high"] * 3
    processes.end()


async def test_a_lower_priority_gets_its_floor_of_what_another_process_sends():
    """A twentieth: after twenty prompts of the higher one, one of the lower one."""
    processes = Processes(2)
    for _ in range(30):
        processes.ask(0, "low", Priority.LOW)
        processes.ask(1, "high", Priority.HIGH)
    await settle()
    for _ in range(30):
        await processes.room()
    assert processes.sent.count("low") == 1
    assert 19 <= processes.sent.index("low") <= 23
    processes.end()


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_a_lower_priority_that_waits_in_several_processes_gets_its_floor_once(count):
    """Behind a higher one in each: every process owed it a twentieth of what all had sent."""
    processes = Processes(count)
    for number in range(count):
        for _ in range(400 // count):
            processes.ask(number, "low", Priority.LOW)
            processes.ask(number, "high", Priority.HIGH)
    await settle()
    for _ in range(400):
        await processes.room()
    assert len(processes.sent) == 400
    assert 14 <= processes.sent.count("low") <= 20
    processes.end()


async def test_tenants_of_several_processes_take_turns():
    """Each at one process only, of which the first one always hears first that there is room."""
    processes = Processes(2)
    for _ in range(6):
        processes.ask(0, "flood")
        processes.ask(1, "small")
    await settle()
    for _ in range(6):
        await processes.room()
    assert processes.sent.count("small") == 3
    processes.end()


async def test_a_request_that_cannot_go_keeps_no_replica_idle():
    """The others let it go first for a quarter of a second."""
    processes = Processes(1)
    queue = processes.queues[0]
    stuck = {"peer": head("high", Priority.HIGH)}
    processes.others = lambda number: stuck  # type: ignore[method-assign]
    processes.ask(0, "low", Priority.LOW)
    await settle()
    await processes.room()
    assert not processes.sent
    processes.clock.advance(HOLD_SECONDS)
    queue.look()
    await settle()
    assert processes.sent == ["low"]


async def test_a_process_sends_nothing_while_others_have_sent_enough():
    """For some seconds, in case it is wrong about the replica's rate."""
    clock, sent = FakeClock(), list[str]()
    queue = ReplicaQueue(
        None,
        QueueLimits(),
        clock,
        is_crowded=lambda: False,
        is_crowded_by_others=lambda: True,
        heads=lambda: {"peer": head("flood")},
    )

    async def send() -> None:
        await queue.acquire(1.0, Share("flood", tokens=4_000.0))
        sent.append("flood")

    task = asyncio.get_running_loop().create_task(send())
    await settle()
    queue.look()
    await settle()
    assert not sent
    clock.advance(OTHERS_SECONDS)
    queue.look()
    await settle()
    assert sent == ["flood"]
    await task


async def test_what_goes_before_all_others_may_have_any_free_place():
    """Also those that are the others' by equal parts."""
    asked: list[bool] = []

    def places(_waiting: int, is_first: bool) -> int:
        asked.append(is_first)
        return 2 if is_first else 0

    queue = ReplicaQueue(4, QueueLimits(), FakeClock(), places, heads=lambda: {"peer": head("b", Priority.LOW)})
    permit = await queue.acquire(1.0, Share("a", tokens=1.0))
    assert asked[-1]
    permit.done()


@pytest.mark.parametrize(
    ("other", "before"),
    [
        (head("b", Priority.HIGH, 9), True),
        (head("b", Priority.LOW, 0), False),
        (head("b", round_number=4), True),
        (head("b", round_number=5), False),
        (head("a", round_number=4), False),
        (head("a", OWED, 9), True),
    ],
)
def test_only_a_higher_priority_or_another_tenant_in_an_earlier_round_goes_first(other, before):
    """Requests of one tenant do not wait for each other."""
    own = head("a", round_number=5)
    assert other.goes_before(own) is before
    assert Elsewhere().must_hold(own, {"peer": other}, 0.0) is before


def test_heads_are_told_and_end_with_their_process():
    """By a goodbye, by silence, or by a message without them; damaged rows are no heads."""
    heads, told = QueueHeads(), head("tenant", Priority.LOW, 7, (1.0, 2.0, 3.0))
    rows = dict([row_of("replica", told), ("\0queue:replica\0x", (inf,) * 6), ("\0queue:replica\0y", (1.0,))])
    for end in (lambda: heads.forget("peer"), lambda: heads.absorb("peer", {}, 0.0)):
        heads.absorb("peer", rows, 0.0)
        assert heads.at("replica", 0.5) == {"peer": told}
        assert not heads.at("other", 0.5)
        end()
        assert not heads.at("replica", 0.5)
    heads.absorb("peer", rows, 0.0)
    assert not heads.at("replica", SILENCE_SECONDS)

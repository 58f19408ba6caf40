"""Requests are held back only before engines, whose order can be kept in no other way."""

from __future__ import annotations

import asyncio
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from cache import JournalState
from proxy.fleet import Fleet
from proxy.fleet.peers import ShareRow
from proxy.fleet.replica import ReplicaSpec
from proxy.routing.fair_shares import Priority, Share, TenantShares
from proxy.routing.queue_heads import Head, QueueHeads
from proxy.routing.replica_queue import QueueLimits
from proxy.worker.replica_queues import SENT_AHEAD, ReplicaQueues
from tests.support.clock import FakeClock
from tests.support.operations import operations

RATE = 1_000.0
SENT = 3 * SENT_AHEAD[1]


class Bench:
    """The queues of replicas that compute a request in a second."""

    def __init__(self, *, is_engine: bool, limit: int | None = None, replicas: int = 1, others: int = 0) -> None:
        self.fleet, self.clock, self.shares = Fleet(Random(1).random), FakeClock(), TenantShares()
        pools: Any = SimpleNamespace(served=range(replicas))
        journal: Any = SimpleNamespace(others=others, state=JournalState.LIVE)
        for number in range(replicas):
            self.fleet.add(ReplicaSpec(f"r{number}", "pool", prefill_tokens_per_second=RATE, in_flight_limit=limit))
        self.queues = ReplicaQueues(
            self.fleet,
            pools,
            journal,
            self.clock,
            writer_id="w",
            shares=self.shares,
            heads=QueueHeads(),
            is_engine=lambda _number: is_engine,
        )
        self.queues.update()

    def sent(self, seconds: float = 1.0) -> int:
        """Count the requests of so many seconds that need not wait, of many that come at once."""
        permits = 0
        for _ in range(SENT):
            if self.queues.by_replica[0].try_acquire() is not None:
                permits += 1
                self.fleet.charge(0, seconds * RATE, self.clock.monotonic())
        return permits


@pytest.mark.parametrize(
    ("is_engine", "limit", "at_once"),
    [(False, None, SENT), (True, None, SENT_AHEAD[1]), (False, SENT, SENT_AHEAD[1])],
    ids=["unknown", "engine", "with a limit"],
)
def test_only_before_an_engine_do_requests_wait_for_its_prefills(is_engine, limit, at_once):
    """An engine is sent little ahead; a provider or a balancer, which says nothing of itself, is sent everything."""
    assert Bench(is_engine=is_engine, limit=limit).sent() == at_once


@pytest.mark.parametrize(("pace", "at_once"), [(1.0, SENT_AHEAD[1]), (6.0, 7)])
def test_more_is_sent_ahead_where_the_gate_has_more_time(pace, at_once):
    """In proportion, so that a benchmark in faster time keeps the same order."""
    bench = Bench(is_engine=True)
    bench.queues.set_limits(QueueLimits(), pace)
    assert bench.sent() == at_once


@pytest.mark.parametrize(("others", "of_a_second", "of_half_a_second"), [(0, 4, 4), (1, 2, 2), (3, 1, 1), (15, 1, 1)])
def test_processes_together_send_as_much_ahead_as_one(others, of_a_second, of_half_a_second):
    """A burst reaches all before they hear of each other: four of each would be what a newcomer then waits for."""
    assert Bench(is_engine=True, others=others).sent() == of_a_second
    assert Bench(is_engine=True, others=others).sent(0.5) == of_half_a_second


@pytest.mark.parametrize(("seconds", "at_once"), [(0.0, 2), (0.7, 2), (1.1, 1)])
def test_what_another_process_has_sent_ahead_counts_too(seconds, at_once):
    """It is one engine, which computes what it was sent in order of arrival."""
    bench = Bench(is_engine=True, others=3)
    tokens = seconds * RATE
    sent = ShareRow(tokens, 1, tokens, 0.0, 0.0, 9.0, sent_tokens=tokens)
    bench.fleet.absorb("peer", {"r0": tuple(sent)}, bench.clock.monotonic())
    assert bench.sent(0.2) == at_once


def test_what_others_have_sent_is_enough_for_an_engine():
    """With several tenants, any work; for a tenant alone, as many requests as one process sends ahead."""
    for is_engine, tenants, peers, crowded in (
        (True, "ab", 1, True),
        (True, "a", 1, False),
        (True, "a", SENT_AHEAD[1], True),
        (False, "ab", SENT_AHEAD[1], False),
    ):
        bench = Bench(is_engine=is_engine)
        for tenant in tenants:
            bench.shares.seen(tenant, 1.0, bench.clock.monotonic())
        tokens = 1.5 * RATE / peers
        sent = ShareRow(tokens, 1, tokens, 0.0, 0.0, 9.0, sent_tokens=tokens)
        for peer in range(peers):
            bench.fleet.absorb(f"peer {peer}", {"r0": tuple(sent)}, bench.clock.monotonic())
        assert bench.queues.is_crowded_by_others(0) is crowded
        if peers == 1:
            bench.clock.advance(1.45)
            assert not bench.queues.is_crowded_by_others(0)


async def test_what_waits_is_told_to_the_other_processes():
    """By replica, with its tenant; nothing while none waits."""
    bench = Bench(is_engine=False, limit=1, replicas=3)
    assert bench.queues.rows() == {}
    permit = bench.queues.by_replica[1].try_acquire()
    assert permit is not None
    waiting = asyncio.get_running_loop().create_task(
        bench.queues.by_replica[1].acquire(1.0, Share("tenant", 1.0, Priority.LOW, 5.0))
    )
    await asyncio.sleep(0)
    heads = QueueHeads()
    heads.absorb("peer", bench.queues.rows(), 0.0)
    assert heads.at("r1", 0.0) == {"peer": Head("tenant", Priority.LOW, 0, (0.0, 0.0, 0.0), 1 << Priority.LOW)}
    permit.done()
    (await waiting).done()
    assert bench.queues.rows() == {}


async def test_an_end_of_work_looks_only_at_queues_in_which_requests_wait():
    """Two ends in every request: with a thousand replicas, looking at all of them took as long as all the rest."""
    queue = (bench := Bench(is_engine=False, limit=1, replicas=100)).queues.by_replica[7]
    idle = operations(bench.queues.look)
    permit = queue.try_acquire()
    assert permit is not None
    waiting = asyncio.get_running_loop().create_task(queue.acquire(1.0))
    await asyncio.sleep(0)
    assert len(queue) == 1
    looking = operations(bench.queues.look)
    permit.done()
    (await waiting).done()
    assert idle <= operations(Bench(is_engine=False, replicas=2).queues.look)
    assert idle < looking
    assert operations(bench.queues.look) == idle

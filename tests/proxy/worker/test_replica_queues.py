"""Requests are held back only before engines, whose order can be kept in no other way."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from cache import JournalState
from proxy.fleet import Fleet
from proxy.fleet.replica import ReplicaSpec
from proxy.routing.fair_shares import TenantShares
from proxy.worker.replica_queues import SENT_AHEAD, ReplicaQueues
from tests.support.clock import FakeClock

RATE = 1_000.0
SENT = 3 * SENT_AHEAD[1]


@pytest.mark.parametrize(
    ("is_engine", "limit", "at_once"),
    [(False, None, SENT), (True, None, SENT_AHEAD[1]), (False, SENT, SENT_AHEAD[1])],
    ids=["unknown", "engine", "with a limit"],
)
def test_only_before_an_engine_do_requests_wait_for_its_prefills(is_engine, limit, at_once):
    """An engine is sent little ahead; a provider or a balancer, which says nothing of itself, is sent everything."""
    fleet, clock = Fleet(Random(1).random), FakeClock()
    pools: Any = SimpleNamespace(served=[0])
    journal: Any = SimpleNamespace(others=0, state=JournalState.LIVE)
    fleet.add(ReplicaSpec("a", "pool", prefill_tokens_per_second=RATE, in_flight_limit=limit))
    queues = ReplicaQueues(
        fleet,
        pools,
        journal,
        clock,
        writer_id="w",
        shares=TenantShares(),
        is_engine=lambda _number: is_engine,
    )
    queues.update()
    permits = []
    for _ in range(SENT):
        permit = queues.by_replica[0].try_acquire()
        if permit is not None:
            permits.append(permit)
            fleet.charge(0, RATE, clock.monotonic())
    assert len(permits) == at_once

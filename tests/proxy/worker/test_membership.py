"""Which replicas are down, since when and why."""

from __future__ import annotations

from typing import Any, cast

import pytest

from proxy.control.messages import ReplicaDown
from proxy.fleet import Change, Fleet, ReplicaChange, ReplicaSpec
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.upstream import Origin
from proxy.worker.membership import DownReplicas, Forgetting, TurningAway
from tests.support.clock import FakeClock


def test_a_replica_is_down_since_its_first_failure_with_its_newest_reason() -> None:
    """Until it answers; one that is drained stays as it is."""
    clock = FakeClock(unix_seconds=100.0)
    down = DownReplicas(clock.unix)
    for change, reason in (
        (Change.ADDED, ""),
        (Change.DOWN, "connection refused"),
        (Change.THROTTLED, "full"),
        (Change.DRAINING, ""),
    ):
        down.replica_changed(ReplicaChange("one", "p", change, reason))
        clock.advance(10)
    assert down.report() == {"one": ReplicaDown(110.0, "full")}
    down.replica_changed(ReplicaChange("one", "p", Change.UP, "a request was answered"))
    assert down.report() == {}


@pytest.mark.parametrize(
    ("change", "leaves"),
    [
        (Change.DOWN, True),
        (Change.THROTTLED, True),
        (Change.DRAINING, True),
        (Change.RATE_LIMITED, False),
        (Change.RESTARTED, False),
        (Change.UP, False),
    ],
)
def test_requests_that_wait_leave_a_replica_that_takes_no_more(change: Change, *, leaves: bool) -> None:
    """One key's 429 and a restart concern only what is sent next."""
    fleet = Fleet(lambda: 0.5)
    fleet.add(ReplicaSpec("other", "p"))
    fleet.add(ReplicaSpec("one", "p"))
    left, looked = list[int](), list[int]()

    class Attempts:
        def turn_away(self, replica: int) -> None:
            left.append(replica)

    class ColdGate:
        def changed(self) -> None:
            looked.append(1)

    turning = TurningAway(fleet, cast("Any", Attempts()), cast("Any", ColdGate()))
    turning.replica_changed(ReplicaChange("one", "p", change))
    turning.replica_changed(ReplicaChange("unknown", "p", change))
    assert (left, looked) == (([1], [1]) if leaves else ([], []))


def test_the_gate_forgets_a_pool_with_its_last_replica() -> None:
    """A pool is renamed by a reload: its replicas go one after another, others stay."""
    forgotten = list[str]()

    class Part:
        def forget(self, *about: object) -> None: ...

    class ColdGate:
        def forget(self, pool: str) -> None:
            forgotten.append(pool)

    origin = Origin("http", "127.0.0.1", 80)
    backends = {
        number: ReplicaEndpoint(f"r{number}", pool, "http://127.0.0.1", origin)
        for number, pool in enumerate(["old", "old", "new"])
    }
    pools, part = Pools([], None, backends), cast("Any", Part())
    forgetting = Forgetting(part, part, part, part, part, cast("Any", ColdGate()), pools)
    for number in (1, 0):
        assert forgotten == []
        forgetting.replica_forgotten(number, pools.forget(number))
    assert forgotten == ["old"]

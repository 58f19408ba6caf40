"""Which replicas are down, since when and why."""

from __future__ import annotations

from proxy.control.messages import ReplicaDown
from proxy.fleet import Change, ReplicaChange
from proxy.worker.membership import DownReplicas
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

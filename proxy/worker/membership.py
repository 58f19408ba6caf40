"""Log every change of a replica, remember which are down, and drop what is kept for one that is gone for good."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from proxy.control.messages import ReplicaDown
from proxy.fleet import Change, Fleet, ReplicaChange
from proxy.fleet.findings import EngineFindings
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.logs import REPLICAS
from proxy.metrics.recorder import Recorder
from proxy.pipeline.attempt import Attempts
from proxy.pipeline.dispatch import Dispatcher
from proxy.pipeline.settlement import Settlement
from proxy.routing.cold_gate import ColdGate
from proxy.upstream import UpstreamClient

log = logging.getLogger(REPLICAS)

_WARNED: Final = frozenset({Change.DOWN, Change.THROTTLED})
_LEFT: Final = _WARNED | {Change.DRAINING}


class DownReplicas:
    """Remembers since when replicas are down, and why. `unix_seconds` is the clock."""

    def __init__(self, unix_seconds: Callable[[], float]) -> None:
        self._unix_seconds = unix_seconds
        self._down: dict[str, ReplicaDown] = {}

    def replica_changed(self, change: ReplicaChange) -> None:
        """Log a change, and remember it."""
        log_change(change)
        if change.change in _WARNED:
            known = self._down.get(change.name)
            since_seconds = self._unix_seconds() if known is None else known.since_unix_seconds
            self._down[change.name] = ReplicaDown(since_seconds, change.reason)
        elif change.change is not Change.DRAINING:
            self._down.pop(change.name, None)

    def report(self) -> dict[str, ReplicaDown]:
        """Return the replicas that are down, by name."""
        return dict(self._down)


def log_change(change: ReplicaChange) -> None:
    """Write one line about a change of a replica."""
    level = logging.WARNING if change.change in _WARNED else logging.INFO
    reason = f": {change.reason}" if change.reason else ""
    log.log(level, "replica %s (pool %s) is %s%s", change.name, change.pool, change.change.value, reason)


class TurningAway:
    """Sends requests elsewhere that wait for a replica which is not used any more."""

    def __init__(self, fleet: Fleet, attempts: Attempts, cold_gate: ColdGate) -> None:
        self._fleet = fleet
        self._attempts = attempts
        self._cold_gate = cold_gate

    def replica_changed(self, change: ReplicaChange) -> None:
        """Let them be planned again if the replica is down, full or removed."""
        number = self._fleet.number_of(change.name)
        if change.change in _LEFT and number is not None:
            self._attempts.turn_away(number)
            self._cold_gate.changed()


class Forgetting:
    """Drops what the parts of a worker keep for a replica that is gone for good."""

    def __init__(
        self,
        client: UpstreamClient,
        dispatcher: Dispatcher,
        findings: EngineFindings,
        settlement: Settlement,
        recorder: Recorder,
        cold_gate: ColdGate,
        pools: Pools,
    ) -> None:
        self._client = client
        self._dispatcher = dispatcher
        self._findings = findings
        self._settlement = settlement
        self._recorder = recorder
        self._cold_gate = cold_gate
        self._pools = pools

    def replicas_changed(self, joined: Sequence[int]) -> None:
        """Do nothing: state of a replica is created when it is first used."""

    def replica_forgotten(self, number: int, endpoint: ReplicaEndpoint) -> None:
        """Drop connections, learned facts and series, and with a pool's last replica what the gate knows of it."""
        self._dispatcher.forget(number)
        self._findings.forget(number)
        self._client.forget(endpoint.origin)
        self._settlement.forget(number, endpoint.name)
        self._recorder.forget(endpoint.name)
        if all(each.pool != endpoint.pool for each in self._pools.backends.values()):
            self._cold_gate.forget(endpoint.pool)

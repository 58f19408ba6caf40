"""Log every change of a replica, and drop what is kept for one that is gone for good."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from proxy.fleet import Change, ReplicaChange
from proxy.fleet.pools import ReplicaEndpoint
from proxy.pipeline.dispatch import Dispatcher
from proxy.upstream import UpstreamClient

log = logging.getLogger("cairn.replicas")

_WARNED: Final = frozenset({Change.DOWN, Change.THROTTLED})


def log_change(change: ReplicaChange) -> None:
    """Write one line about a change of a replica."""
    level = logging.WARNING if change.change in _WARNED else logging.INFO
    reason = f": {change.reason}" if change.reason else ""
    log.log(level, "replica %s (pool %s) is %s%s", change.name, change.pool, change.change.value, reason)


class Forgetting:
    """Drops connections to a replica that is gone for good, and what was learned of it."""

    def __init__(self, client: UpstreamClient, dispatcher: Dispatcher) -> None:
        self._client = client
        self._dispatcher = dispatcher

    def replicas_changed(self, joined: Sequence[int]) -> None:
        """Do nothing: what is kept for a replica is made when it is first used."""

    def replica_forgotten(self, number: int, endpoint: ReplicaEndpoint) -> None:
        """Drop what is kept for a replica."""
        self._dispatcher.forget(number)
        self._client.forget(endpoint.origin)

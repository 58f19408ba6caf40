"""The replicas as this process sees them: their work, their speed, and whether they respond."""

from proxy.fleet.breaker import BreakerSettings, BreakerState, Cause, Failure
from proxy.fleet.fleet import Change, Fleet, ReplicaChange
from proxy.fleet.peers import ShareRow
from proxy.fleet.rate import PrefillRate
from proxy.fleet.replica import ReplicaSpec, ThrottleKey
from proxy.fleet.served_models import Need
from proxy.fleet.work import Charge

__all__ = [
    "BreakerSettings",
    "BreakerState",
    "Cause",
    "Change",
    "Charge",
    "Failure",
    "Fleet",
    "Need",
    "PrefillRate",
    "ReplicaChange",
    "ReplicaSpec",
    "ShareRow",
    "ThrottleKey",
]

"""The replicas as this process sees them: what they do now, how fast they are, whether they answer."""

from proxy.fleet.breaker import Backoff, Breaker, BreakerState
from proxy.fleet.fleet import Fleet, ReplicaSpec, ShareRow
from proxy.fleet.rate import PrefillRate
from proxy.fleet.work import Charge

__all__ = ["Backoff", "Breaker", "BreakerState", "Charge", "Fleet", "PrefillRate", "ReplicaSpec", "ShareRow"]

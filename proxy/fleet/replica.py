"""The state of one replica. Only the fleet changes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Final

from proxy.fleet.breaker import PROBED, Breaker, Cause
from proxy.fleet.peers import PeerWork
from proxy.fleet.rate import PoolRates, PrefillRate
from proxy.fleet.work import Work
from proxy.records import ReplicaView

THROTTLES_AT_MOST: Final = 1024
"""Keys and models remembered per replica; clients choose both."""

ThrottleKey = tuple[str, str]
"""The key and the model that met a 429."""


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """A replica as configured. `name` is unique over all pools and the same in every proxy."""

    name: str
    pool: str
    prefill_tokens_per_second: float | None = None
    in_flight_limit: int | None = None
    is_far: bool = False  # known to be in another zone than this Cairn


class Throttles:
    """Keys and models to which a replica answered 429, each until a time."""

    __slots__ = ("_until_seconds",)

    def __init__(self) -> None:
        self._until_seconds: dict[ThrottleKey, float] = {}

    def __len__(self) -> int:
        return len(self._until_seconds)

    def set(self, key: ThrottleKey, until_seconds: float, now_seconds: float) -> bool:
        """Throttle `key` until a time. Return False if it was throttled already."""
        before = self._until_seconds.pop(key, 0.0)
        if len(self._until_seconds) >= THROTTLES_AT_MOST:
            self._drop(now_seconds)
        self._until_seconds[key] = max(before, until_seconds)
        return before <= now_seconds

    def until(self, key: ThrottleKey, now_seconds: float) -> float:
        """Return until when `key` is throttled, 0 if it is not."""
        until = self._until_seconds.get(key)
        if until is None:
            return 0.0
        if until <= now_seconds:
            del self._until_seconds[key]
            return 0.0
        return until

    def _drop(self, now_seconds: float) -> None:
        """Make room: drop throttles that are over, else the oldest."""
        self._until_seconds = {key: until for key, until in self._until_seconds.items() if until > now_seconds}
        if len(self._until_seconds) >= THROTTLES_AT_MOST:
            del self._until_seconds[next(iter(self._until_seconds))]


class ReplicaState:
    """One replica: its specification, breaker, work and rate."""

    __slots__ = (
        "breaker",
        "id",
        "is_draining",
        "learned_limit",
        "limit",
        "own_rate",
        "peers",
        "quiet_view",
        "rate",
        "rates",
        "spec",
        "throttles",
        "work",
    )

    def __init__(self, number: int, spec: ReplicaSpec, breaker: Breaker, rates: PoolRates) -> None:
        self.id = number
        self.spec = spec
        self.breaker = breaker
        self.work = Work()
        self.peers = PeerWork()
        self.rate = PrefillRate(spec.prefill_tokens_per_second)
        self.own_rate: float | None = None  # `rate.own`
        self.rates = rates
        self.limit = spec.in_flight_limit
        self.learned_limit: int | None = None
        self.throttles = Throttles()
        self.is_draining = False  # removed while requests were under way
        self.quiet_view: ReplicaView | None = None

    @property
    def rate_now(self) -> float:
        """The prefill rate in uncached tokens per second: its own, or that of its pool."""
        own = self.own_rate
        return self.rates.fallback if own is None else own

    def load(self, now_seconds: float) -> tuple[float, float]:
        """Return all processes' pending tokens minus the running head's progress, and the lateness in seconds."""
        done, late = self._progress(now_seconds)
        return max(self.work.pending_tokens + self.peers.pending_tokens - done, 0.0), late

    def sent_tokens(self, now_seconds: float) -> float:
        """Return the tokens that all processes have sent here, minus the running head's progress."""
        done, _ = self._progress(now_seconds)
        return max(self.work.sent_tokens + self.peers.sent_tokens - done, 0.0)

    def _progress(self, now_seconds: float) -> tuple[float, float]:
        """Return the tokens that are done of the oldest prefill of all processes, and the lateness in seconds."""
        work, peers = self.work, self.peers
        work.settle(now_seconds)
        head, late = work.head, 0.0
        sent, head_tokens = inf, 0.0
        if head is not None:
            sent, head_tokens = head.sent_seconds, head.uncached_tokens
            if not head.plain and now_seconds > head.due_seconds:
                late = now_seconds - head.due_seconds
        for peer_sent, tokens, due in peers.heads.values():
            late = max(late, now_seconds - due)
            if peer_sent < sent:
                sent, head_tokens = peer_sent, tokens
        if not head_tokens:
            return 0.0, late
        since = max(sent, work.released_seconds, peers.released_seconds)
        return min(max(now_seconds - since, 0.0) * self.rate_now, head_tokens), late

    def view(self, now_seconds: float, in_flight_seconds: float, key: ThrottleKey | None = None) -> ReplicaView:
        """Return a frozen row; the same object again while nothing happens here."""
        own, quiet = self.own_rate, self.quiet_view
        rate_now = self.rates.fallback if own is None else own
        if quiet is not None and quiet.rate_tokens_per_second == rate_now:
            return quiet
        pending, late = self.load(now_seconds)
        in_flight = self.work.in_flight + int(self.peers.in_flight)
        closed = self.breaker.is_closed
        available = closed or self.breaker.allows(now_seconds)
        wait_seconds = 0.0 if available else self.breaker.wait_seconds(now_seconds)
        because = "" if available else _because(self.breaker.cause)
        if key is not None and available and len(self.throttles):
            until = self.throttles.until(key, now_seconds)
            if until:
                available, wait_seconds, because = False, until - now_seconds, RATE_LIMITED
        view = ReplicaView(
            id=self.id,
            name=self.spec.name,
            available=available,
            rate_tokens_per_second=rate_now,
            pending_tokens=pending,
            in_flight=in_flight,
            in_flight_limit=self.limit,
            lateness_seconds=late,
            in_flight_seconds=in_flight_seconds,
            queued=self.work.waiting + int(self.peers.waiting),
            retry_after_seconds=wait_seconds,
            unavailable_because=because,
            running_tokens=self.work.running_tokens + self.peers.running_tokens,
            is_far=self.spec.is_far,
        )
        if (
            closed
            and not in_flight
            and not pending
            and self.work.head is None
            and not self.peers.pending_tokens
            and not len(self.throttles)
        ):
            self.quiet_view = view
        return view

    @property
    def has_work(self) -> bool:
        """True if requests of any process are there."""
        return self.work.in_flight > 0 or self.peers.in_flight > 0

    @property
    def is_probed(self) -> bool:
        """True if a health check, and no request, brings it back."""
        return self.breaker.cause in PROBED

    @property
    def may_be_tried(self) -> bool:
        """True unless it is known that no request can reach the model; one that has work may be silent for that."""
        cause = self.breaker.cause
        return cause not in PROBED or (cause is Cause.SILENT and self.has_work)


RATE_LIMITED: Final = "rate limited for this key and model"


def _because(cause: Cause | None) -> str:
    return "being tried again" if cause is None else cause.value

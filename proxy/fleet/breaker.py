"""When a replica that refused is tried again. It must not know why anyone would want to.

A failure opens it for a back-off which doubles with each further one; after that one request (or one probe) may pass,
and its fate decides. A replica that names a time itself (Retry-After on 429, 503 or 529) is left alone until then,
and no back-off grows: it works, it is full.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class BreakerState(enum.StrEnum):
    """The value is the metric label."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long a replica is left alone: `first_seconds` doubling up to `most_seconds`, each off by up to `jitter`."""

    first_seconds: float = 0.5
    most_seconds: float = 30.0
    jitter: float = 0.25  # share; so that many proxies do not come back in step
    failures_to_open: int = 3  # in a row, of the kind that may be the request's own fault
    most_retry_after_seconds: float = 120.0  # a replica that asks for more is asked again all the same
    throttled_seconds: float = 1.0  # it said "too many" and not for how long


class Breaker:
    """One replica's. `random` gives floats in [0, 1)."""

    __slots__ = ("_backoff", "_failures", "_openings", "_random", "_trying", "_until_seconds")

    def __init__(self, backoff: Backoff, random: Callable[[], float]) -> None:
        self._backoff = backoff
        self._random = random
        self._failures = 0
        self._openings = 0
        self._until_seconds: float | None = None
        self._trying = False

    def state(self, now_seconds: float) -> BreakerState:
        """Closed, open, or past its back-off and waiting for one to try."""
        if self._until_seconds is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now_seconds < self._until_seconds else BreakerState.HALF_OPEN

    @property
    def is_closed(self) -> bool:
        """True where nothing is wrong, without asking the time."""
        return self._until_seconds is None

    def allows(self, now_seconds: float) -> bool:
        """True where a request may be sent now: closed, or the back-off is over and none tries yet."""
        return self._until_seconds is None or (now_seconds >= self._until_seconds and not self._trying)

    def wait_seconds(self, now_seconds: float) -> float:
        """Until it is tried again; the back-off's first step where somebody tries just now."""
        if self._until_seconds is None:
            return 0.0
        remaining = self._until_seconds - now_seconds
        return remaining if remaining > 0 else self._backoff.first_seconds

    def try_one(self, now_seconds: float) -> bool:
        """Take the one trial of a half-open breaker; True where this was it (say later how it went)."""
        if self._until_seconds is None or now_seconds < self._until_seconds or self._trying:
            return False
        self._trying = True
        return True

    def abandon_trial(self) -> None:
        """The trial ended with no news of the replica (its client left): another may try."""
        self._trying = False

    def succeeded(self) -> None:
        """It answered: all is forgotten."""
        if self._failures or self._until_seconds is not None:
            self._failures = 0
            self._openings = 0
            self._until_seconds = None
            self._trying = False

    def failed(self, now_seconds: float, *, unreachable: bool) -> bool:
        """It did not answer, or with a server's error; True where this opened the breaker.

        `unreachable` (refused, timed out, no TLS) opens it at once; anything else may be the request's own fault, and
        opens it when it happens several times in a row, or to the one that tries.
        """
        self._failures += 1
        if not (unreachable or self._trying or self._failures >= self._backoff.failures_to_open):
            return False
        if self._until_seconds is not None and now_seconds < self._until_seconds:
            return False  # one of many that were under way when it opened
        pause = min(self._backoff.first_seconds * 2.0 ** min(self._openings, 32), self._backoff.most_seconds)
        pause *= 1.0 + self._backoff.jitter * (2.0 * self._random() - 1.0)
        self._openings += 1
        self._until_seconds = now_seconds + pause
        self._trying = False
        return True

    def throttled(self, now_seconds: float, retry_after_seconds: float | None) -> None:
        """It asked to be left alone (429, 503 or 529), for `retry_after_seconds` where it said so."""
        pause = self._backoff.throttled_seconds if retry_after_seconds is None else retry_after_seconds
        pause = min(max(pause, 0.0), self._backoff.most_retry_after_seconds)
        until = now_seconds + pause
        if self._until_seconds is None or until > self._until_seconds:
            self._until_seconds = until
        self._trying = False

"""Decide when to stop asking a Redis that fails, and when to probe it again. Pure: the time is passed in.

state       operations              leaves to
closed      go through              open, after several failures in a row
open        fail at once            half open, when a probe is sent
half open   fail at once            closed if the probe succeeds, else open with a longer pause
"""

from __future__ import annotations

import enum

from cache.backoff import ExponentialBackoff

FAILURES_TO_OPEN = 5  # in a row; fewer could be one lost connection of a pool
SPAN_TO_OPEN_SECONDS = (
    0.25  # least time from the first failure to the last: a pause of 200 ms that fails twenty at once is harmless
)
WINDOW_SECONDS = 10.0  # a failure older than this is forgotten
PAUSE_FIRST_SECONDS = 0.1  # a restart of Redis takes about this long
PAUSE_MOST_SECONDS = 5.0  # a probe every five seconds costs nothing and notices recovery soon enough


class BreakerState(enum.StrEnum):
    """State of a breaker; the value is the metric label."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Counts failures in a row. All times are monotonic seconds."""

    def __init__(self, state: BreakerState) -> None:
        self.state = state
        self._failures = 0
        self._first_failure_seconds = 0.0
        self._last_failure_seconds = 0.0
        self._backoff = ExponentialBackoff(PAUSE_FIRST_SECONDS, PAUSE_MOST_SECONDS)

    @property
    def closed(self) -> bool:
        """True if operations may go through."""
        return self.state is BreakerState.CLOSED

    def pause_seconds(self, random: float) -> float:
        """Return the seconds to wait before the next probe; within an outage each call returns a longer pause."""
        return self._backoff.next_seconds(random)

    def succeeded(self) -> None:
        """Note that an operation was answered. Does not close an open breaker: only a probe does."""
        self._failures = 0

    def failed(self, now_seconds: float) -> bool:
        """Note a failed operation; return whether it opened the breaker."""
        if self.state is not BreakerState.CLOSED:
            return False
        if not self._failures or now_seconds - self._last_failure_seconds > WINDOW_SECONDS:
            self._failures, self._first_failure_seconds = 0, now_seconds
        self._failures += 1
        self._last_failure_seconds = now_seconds
        lasted = now_seconds - self._first_failure_seconds >= SPAN_TO_OPEN_SECONDS
        if self._failures < FAILURES_TO_OPEN or not lasted:
            return False
        self.state = BreakerState.OPEN
        return True

    def probing(self) -> None:
        """Note that a probe is being sent."""
        self.state = BreakerState.HALF_OPEN

    def probe_succeeded(self) -> None:
        """Close the breaker."""
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._backoff.reset()

    def probe_failed(self) -> None:
        """Keep the breaker open until the next probe."""
        self.state = BreakerState.OPEN

"""Decide when to stop asking a Redis that fails, and when to probe it again. Pure: the time is passed in.

state       operations              leaves to
closed      go through              open, after several failures in a row, or as many refusals with others between
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


class _Failures:
    """Failures of one kind, none of which came too long after the one before."""

    __slots__ = ("_first_seconds", "_last_seconds", "_number")

    def __init__(self) -> None:
        self._number = 0
        self._first_seconds = 0.0
        self._last_seconds = 0.0

    def forget(self) -> None:
        self._number = 0

    def add(self, now_seconds: float) -> bool:
        """Note a failure; return whether there are enough of them."""
        if not self._number or now_seconds - self._last_seconds > WINDOW_SECONDS:
            self._number, self._first_seconds = 0, now_seconds
        self._number += 1
        self._last_seconds = now_seconds
        return self._number >= FAILURES_TO_OPEN and now_seconds - self._first_seconds >= SPAN_TO_OPEN_SECONDS


class Breaker:
    """Counts failures in a row, and refusals. All times are monotonic seconds.

    A refusal is a reply of Redis that leaves no doubt: that another command succeeds, as one may that reads if Redis
    is full or if the user lacks permissions for some, does not take it back.
    """

    def __init__(self, state: BreakerState) -> None:
        self.state = state
        self._failures = _Failures()
        self._refusals = _Failures()
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
        self._failures.forget()

    def failed(self, now_seconds: float, *, is_refusal: bool = False) -> bool:
        """Note a failed operation; return whether it opened the breaker."""
        if self.state is not BreakerState.CLOSED:
            return False
        is_enough = self._failures.add(now_seconds)
        if is_refusal and self._refusals.add(now_seconds):
            is_enough = True
        if is_enough:
            self.state = BreakerState.OPEN
        return is_enough

    def open(self) -> None:
        """Open at once, since Redis is known not to serve."""
        self.state = BreakerState.OPEN

    def probing(self) -> None:
        """Note that a probe is being sent."""
        self.state = BreakerState.HALF_OPEN

    def probe_succeeded(self) -> None:
        """Close the breaker."""
        self.state = BreakerState.CLOSED
        self._failures.forget()
        self._refusals.forget()
        self._backoff.reset()

    def probe_failed(self) -> None:
        """Keep the breaker open until the next probe."""
        self.state = BreakerState.OPEN

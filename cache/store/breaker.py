"""When to stop asking a Redis that does not answer, and when to ask again. Pure: it is told the time.

Closed: every operation goes through. Open: none does, a probe asks from time to time. Half-open: that probe is on
its way; its success closes, its failure opens again with a longer pause.
"""

from __future__ import annotations

import enum

FAILURES_TO_OPEN = 5  # in a row; fewer could be one lost connection of a pool
SPAN_TO_OPEN_SECONDS = 0.25  # from the first to the last: a pause of 200 ms that fails twenty at once is a blip
WINDOW_SECONDS = 10.0  # a failure as old as this says nothing about now
PAUSE_FIRST_SECONDS = 0.1  # a restart of Redis takes about as long
PAUSE_LAST_SECONDS = 5.0  # one probe in five seconds costs nothing and heals soon enough


class BreakerState(enum.StrEnum):
    """The value is the metric label."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Counts failures in a row; all times are monotonic seconds. Starts open: nothing is known of Redis yet."""

    def __init__(self) -> None:
        self.state = BreakerState.OPEN
        self._failures = 0
        self._first_failure_seconds = 0.0
        self._last_failure_seconds = 0.0
        self._pause_seconds = 0.0

    @property
    def closed(self) -> bool:
        """True where operations may go through."""
        return self.state is BreakerState.CLOSED

    @property
    def pause_seconds(self) -> float:
        """How long to wait before the next probe; the caller adds jitter."""
        return self._pause_seconds

    def succeeded(self) -> None:
        """An operation was answered, be it with a refusal. Only a probe closes an open breaker."""
        self._failures = 0

    def failed(self, now_seconds: float) -> bool:
        """An operation was not answered; True where this one opened the breaker."""
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
        self._pause_seconds = PAUSE_FIRST_SECONDS
        return True

    def probing(self) -> None:
        """The probe goes out."""
        self.state = BreakerState.HALF_OPEN

    def probe_succeeded(self) -> None:
        """Redis answers: everything goes through again."""
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._pause_seconds = PAUSE_FIRST_SECONDS

    def probe_failed(self) -> None:
        """Still away: wait twice as long, up to the last pause."""
        self.state = BreakerState.OPEN
        self._pause_seconds = min(PAUSE_LAST_SECONDS, max(PAUSE_FIRST_SECONDS, self._pause_seconds * 2))

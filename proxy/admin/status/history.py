"""Keep readings of the counters: a bounded ring of the last ten minutes and one of the last day. Pure."""

from __future__ import annotations

from collections import deque

import msgspec

SECONDS_KEPT = 601  # ten minutes at one per second, and the reading before
MINUTES_KEPT = 1441  # a day, and the reading before
_MINUTE_SECONDS = 60.0


class Sample(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The counters at one moment. A plot shows their growth between two samples."""

    unix_seconds: float
    requests: float
    prompt_tokens: float
    cached_tokens: float
    errors: dict[str, float] = {}  # by reason


class History:
    """Samples in chronological order. If one is missed, the next one includes its growth."""

    def __init__(self) -> None:
        self.seconds: deque[Sample] = deque(maxlen=SECONDS_KEPT)
        self.minutes: deque[Sample] = deque(maxlen=MINUTES_KEPT)

    def add(self, sample: Sample) -> None:
        """Add a sample; call it about once a second."""
        if self.seconds and sample.unix_seconds <= self.seconds[-1].unix_seconds:
            return  # the wall clock was set back; wait until it has caught up
        self.seconds.append(sample)
        if not self.minutes or sample.unix_seconds - self.minutes[-1].unix_seconds >= _MINUTE_SECONDS:
            self.minutes.append(sample)

    def requests_per_second(self, window_seconds: float) -> float:
        """Return the mean rate over the last `window_seconds`, or over a shorter history."""
        if len(self.seconds) < 2:
            return 0.0
        last = self.seconds[-1]
        first = self.seconds[0]
        for sample in reversed(self.seconds):
            first = sample
            if last.unix_seconds - sample.unix_seconds >= window_seconds:
                break
        return (last.requests - first.requests) / (last.unix_seconds - first.unix_seconds)

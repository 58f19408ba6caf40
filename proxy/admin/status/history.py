"""The last minutes and the last day as counter readings: a bounded ring of each. Pure."""

from __future__ import annotations

from collections import deque

import msgspec

SECONDS_KEPT = 601  # ten minutes of readings a second apart, and the one before
MINUTES_KEPT = 1441  # a day
_MINUTE_SECONDS = 60.0


class Sample(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Counters as they stood at one moment; their growth between two moments is what a plot shows."""

    unix_seconds: float
    requests: float
    prompt_tokens: float
    cached_tokens: float


class History:
    """Readings in the order of time. A missed reading leaves no hole: the next one has its growth."""

    def __init__(self) -> None:
        self.seconds: deque[Sample] = deque(maxlen=SECONDS_KEPT)
        self.minutes: deque[Sample] = deque(maxlen=MINUTES_KEPT)

    def add(self, sample: Sample) -> None:
        """Take a reading; call it about once a second."""
        if self.seconds and sample.unix_seconds <= self.seconds[-1].unix_seconds:
            return  # the wall clock was set back; wait until it is past what is known
        self.seconds.append(sample)
        if not self.minutes or sample.unix_seconds - self.minutes[-1].unix_seconds >= _MINUTE_SECONDS:
            self.minutes.append(sample)

    def requests_per_second(self, window_seconds: float) -> float:
        """Over the last `window_seconds` of readings, or what there is of them."""
        if len(self.seconds) < 2:
            return 0.0
        last = self.seconds[-1]
        first = self.seconds[0]
        for sample in reversed(self.seconds):
            first = sample
            if last.unix_seconds - sample.unix_seconds >= window_seconds:
                break
        return (last.requests - first.requests) / (last.unix_seconds - first.unix_seconds)

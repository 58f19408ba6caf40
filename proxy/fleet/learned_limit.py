"""Learn how many requests an engine works on at once from its own gauges. Pure: clocks are passed in.

An engine that is sent more requests than it can run keeps the rest in its own queue, first come, first served. They
had better wait in Cairn, which serves tenants by their shares; for that it must know the engine's limit. vLLM reports
no limit, only how many requests run and how many wait. While some wait, those that run are as many as it can run:
`max_num_seqs`, or what its cache has room for.
"""

from __future__ import annotations

from typing import Final

LEAST_LIMIT: Final = 16
"""Lowest limit that is learned. With few requests running, others may wait only because a long prompt takes all
of a step's tokens, which another rule bounds: the seconds of prefill that a replica is sent ahead.
"""

GROWTH: Final = 1.5
"""The limit grows by this factor while it is reached and nothing waits in the engine: it was too low."""

PEAK_SECONDS: Final = 300.0
"""Time for which the highest number of running requests counts; other prompts may leave room for fewer."""


class LearnedLimit:
    """The limit of one engine. `value` is None until one was seen."""

    __slots__ = ("_peak", "_peak_seconds", "value")

    def __init__(self) -> None:
        self.value: int | None = None
        self._peak = 0
        self._peak_seconds = 0.0

    def observe(self, running: int, waiting: int, now_seconds: float) -> int | None:
        """Return the limit after one look at the engine's gauges."""
        if running >= self._peak or now_seconds - self._peak_seconds > PEAK_SECONDS:
            self._peak, self._peak_seconds = running, now_seconds
        if waiting > 0:
            if self._peak >= LEAST_LIMIT:
                self.value = self._peak
        elif self.value is not None and running >= self.value:
            self.value = int(self.value * GROWTH)
        return self.value

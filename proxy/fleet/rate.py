"""Learn how fast a replica prefills from its responses. Pure: durations are passed in."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Final

REMEMBERED: Final = 64
"""Observations kept: enough for a percentile, few enough to follow a change of hardware within minutes."""

ENOUGH: Final = 8
"""Number of observations from which the learned rate is used."""

PERCENTILE: Final = 0.9
"""An observation may contain waits that cannot be seen from here (another client's requests, a slow network), so most
are too low. The highest one is never taken, however few there are: it may be an error.
"""

LEAST_TOKENS: Final = 256.0
"""With fewer uncached tokens an observation shows the fixed cost of a request and not the rate."""

LEAST_SECONDS: Final = 0.005
"""A shorter prefill shows the resolution of a clock, a step shared with another prefill, or a wrong count."""

MOST_UNCONFIRMED: Final = 50_000.0
"""Tokens per second believed from a single observation: no accelerator in use today is faster."""


class PrefillRate:
    """Uncached tokens per second of one replica."""

    __slots__ = ("_order", "_sorted", "configured", "guessed")

    def __init__(self, configured: float | None = None) -> None:
        self.configured = configured
        self.guessed: float | None = None  # the lowest `guess` while nothing was observed
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def observe(self, uncached_tokens: float, prefill_seconds: float) -> bool:
        """Learn from one response: tokens that the engine reports as computed, and the seconds they took.

        Return whether it computed enough to count.
        """
        if uncached_tokens < LEAST_TOKENS or prefill_seconds < LEAST_SECONDS:
            return False
        rate = uncached_tokens / prefill_seconds
        self._order.append(rate)
        insort(self._sorted, rate)
        if len(self._order) > REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        return True

    def guess(self, predicted_tokens: float, prefill_seconds: float) -> bool:
        """Guess the rate from a prefill that has ended, before its response ends and reports the computed tokens.

        Return whether this changes the guess.
        """
        if self._sorted or predicted_tokens < LEAST_TOKENS or prefill_seconds < LEAST_SECONDS:
            return False
        rate = predicted_tokens / prefill_seconds
        if self.guessed is not None and rate >= self.guessed:
            return False
        self.guessed = rate
        return True

    def forget(self) -> None:
        """Forget everything learned: the replica restarted or moved."""
        self.guessed = None
        self._order.clear()
        self._sorted.clear()

    @property
    def seen(self) -> list[float]:
        """The last 64 observations in ascending order."""
        return self._sorted

    @property
    def learned(self) -> float | None:
        """The 90th percentile of the last 64 observations, None before the 8th."""
        return _high(self._sorted)

    @property
    def measured(self) -> float | None:
        """The rate from the first observation on, for the accounting, which takes no guesses."""
        return self.learned or (_likely(self._sorted) if self._sorted else self.configured)

    @property
    def own(self) -> float | None:
        """The learned rate, else the configured one, else None: the caller then takes the pool's."""
        learned = self.learned
        return self.configured if learned is None else learned


def pooled(rates: Sequence[PrefillRate], default: float) -> float:
    """Return the rate of a pool none of whose replicas has enough observations.

    All observations together count, so a new pool knows its rate after eight responses and not after eight per
    replica. Fewer than eight count only if they are faster than `default`: unseen waits make an observation too low.
    Before the first response has ended the lowest guess counts, since a guess is too high if more was cached than
    predicted.
    """
    seen = sorted(chain.from_iterable(rate.seen for rate in rates))
    if not seen:
        lowest = min((rate.guessed for rate in rates if rate.guessed is not None), default=default)
        return max(default, min(lowest, MOST_UNCONFIRMED))
    return _high(seen) or max(default, _likely(seen))


def _high(ordered: Sequence[float]) -> float | None:
    """Return the 90th percentile, but never the highest; None with too few observations."""
    count = len(ordered)
    return ordered[min(int(count * PERCENTILE), count - 2)] if count >= ENOUGH else None


def _likely(ordered: Sequence[float]) -> float:
    """Return the lower median of a few observations; a single one is bounded."""
    return ordered[(len(ordered) - 1) // 2] if len(ordered) > 1 else min(ordered[0], MOST_UNCONFIRMED)

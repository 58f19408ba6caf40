"""How fast a replica prefills, learned from what it did. It must not know the time."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Final

REMEMBERED: Final = 64
"""Observations kept: enough for a percentile, few enough to follow a change of hardware within minutes."""

ENOUGH: Final = 8
"""Observations from which on the learned rate counts."""

PERCENTILE: Final = 0.9
"""What is taken for a prefill may hold waits that nobody sees from here (another's requests, a slow network), so most
observations are too low; the very fastest may be luck."""

LEAST_TOKENS: Final = 256.0
"""Fewer uncached tokens than this tell the fixed cost of a request and not the rate."""

LEAST_SECONDS: Final = 0.0005
"""A prefill under this is a clock's grain, one that shared its step with the one before, or a made-up answer."""


class PrefillRate:
    """Uncached tokens per second of one replica."""

    __slots__ = ("_order", "_sorted", "configured", "guessed")

    def __init__(self, configured: float | None = None) -> None:
        self.configured = configured
        self.guessed: float | None = None  # the slowest of `guess`, while nothing was observed
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def observe(self, uncached_tokens: float, prefill_seconds: float) -> bool:
        """One answer: what it computed as the engine reported it, and how long that took. True where it counts."""
        if uncached_tokens < LEAST_TOKENS or prefill_seconds < LEAST_SECONDS:
            return False
        rate = uncached_tokens / prefill_seconds
        self._order.append(rate)
        insort(self._sorted, rate)
        if len(self._order) > REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        return True

    def guess(self, predicted_tokens: float, prefill_seconds: float) -> bool:
        """A prefill ended, and its answer, which tells what was computed, may take a minute more. True where this
        changes what is guessed until then."""
        if self._sorted or predicted_tokens < LEAST_TOKENS or prefill_seconds < LEAST_SECONDS:
            return False
        rate = predicted_tokens / prefill_seconds
        if self.guessed is not None and rate >= self.guessed:
            return False
        self.guessed = rate
        return True

    def forget(self) -> None:
        """The replica is another one now (restarted, moved)."""
        self.guessed = None
        self._order.clear()
        self._sorted.clear()

    @property
    def seen(self) -> list[float]:
        """The last 64 observations, in order of size."""
        return self._sorted

    @property
    def learned(self) -> float | None:
        """The 90th percentile of the last 64 observations, from 8 on."""
        return _high(self._sorted)

    @property
    def measured(self) -> float | None:
        """What the replica has shown so far, were it once; for accounts, where a guess would be a made-up saving."""
        return self.learned or (self._sorted[len(self._sorted) // 2] if self._sorted else self.configured)

    @property
    def own(self) -> float | None:
        """Learned, else configured, else None: the pool's is for the caller to take."""
        learned = self.learned
        return self.configured if learned is None else learned


def pooled(rates: Sequence[PrefillRate], default: float) -> float:
    """What all of them have shown together, while none has enough of its own: a new pool knows its rate eight answers
    after its start, and not eight for each replica. What fewer answers showed counts where it is faster than the
    default: a wait that nobody saw makes an observation too low, hardly anything makes it too high. A guess may well
    be too high (more was cached than predicted), so of those the slowest counts, until the first answer has ended."""
    seen = sorted(chain.from_iterable(rate.seen for rate in rates))
    if not seen:
        return max(default, min((rate.guessed for rate in rates if rate.guessed is not None), default=default))
    return _high(seen) or max(default, seen[len(seen) // 2])


def _high(ordered: Sequence[float]) -> float | None:
    count = len(ordered)
    return ordered[min(int(count * PERCENTILE), count - 1)] if count >= ENOUGH else None

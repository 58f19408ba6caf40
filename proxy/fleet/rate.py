"""Learn how fast a replica prefills from its responses. Pure: durations are passed in."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
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


_Part = tuple[float | None, tuple[float, ...], float | None]
"""The contribution of one replica: its own rate, or else its observations and its guess."""


class PoolRates:
    """The rates of one pool's replicas. `fallback` is the rate of each that has no `own` one.

    That is the median of the others'. If none has one, all observations together count, so a new pool knows its rate
    after eight responses and not after eight per replica. Fewer than eight count only if they are faster than
    `default`: unseen waits make an observation too low. Before the first response has ended the lowest guess counts,
    since a guess is too high if more was cached than predicted.

    Every response may change a rate, so all are kept in order: a change takes no pass over the replicas.
    """

    __slots__ = ("_default", "_guesses", "_own", "_parts", "_seen", "fallback")

    def __init__(self, default: float) -> None:
        self._default = default
        self._own: list[float] = []
        self._seen: list[float] = []  # by replicas without an own rate
        self._guesses: list[float] = []  # for such replicas
        self._parts: dict[int, _Part] = {}
        self.fallback = default

    def put(self, replica: int, rate: PrefillRate) -> None:
        """Take over what is known of a replica now, in place of what was."""
        own = rate.own
        part: _Part = (own, (), None) if own is not None else (None, tuple(rate.seen), rate.guessed)
        before = self._parts.get(replica)
        if part == before:
            return
        if before is not None:
            self._take_out(before)
        self._parts[replica] = part
        if own is not None:
            insort(self._own, own)
        for observed in part[1]:
            insort(self._seen, observed)
        if part[2] is not None:
            insort(self._guesses, part[2])
        self._update()

    def drop(self, replica: int) -> None:
        """Forget a replica that leaves the pool."""
        before = self._parts.pop(replica, None)
        if before is not None:
            self._take_out(before)
            self._update()

    def _take_out(self, part: _Part) -> None:
        own, seen, guessed = part
        if own is not None:
            del self._own[bisect_left(self._own, own)]
        for observed in seen:
            del self._seen[bisect_left(self._seen, observed)]
        if guessed is not None:
            del self._guesses[bisect_left(self._guesses, guessed)]

    def _update(self) -> None:
        own, seen = self._own, self._seen
        if own:
            self.fallback = (own[(len(own) - 1) // 2] + own[len(own) // 2]) / 2
        elif seen:
            self.fallback = _high(seen) or max(self._default, _likely(seen))
        else:
            lowest = self._guesses[0] if self._guesses else self._default
            self.fallback = max(self._default, min(lowest, MOST_UNCONFIRMED))


def _high(ordered: Sequence[float]) -> float | None:
    """Return the 90th percentile, but never the highest; None with too few observations."""
    count = len(ordered)
    return ordered[min(int(count * PERCENTILE), count - 2)] if count >= ENOUGH else None


def _likely(ordered: Sequence[float]) -> float:
    """Return the lower median of a few observations; a single one is bounded."""
    return ordered[(len(ordered) - 1) // 2] if len(ordered) > 1 else min(ordered[0], MOST_UNCONFIRMED)

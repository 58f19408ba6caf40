"""Decide which stored contexts to discard when a budget is full: those with the least worth per byte. Pure.

The rule is greedy-dual (Young 1994; with sizes, Cao and Irani 1997; with frequencies, Cherkasova 1998). Those
algorithms raise a floor at every eviction, so that unused entries fall behind; here the clock is the floor. Uses
decay with the time constant `MEMORY_SECONDS`:

    worth(now) = uses(now) / MEMORY_SECONDS x value of one use / bytes          (USD per second and byte)
    ln worth(now) = rank - now / MEMORY_SECONDS

so `rank` changes only at a use, and contexts of several tenants can be compared without updating any.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import msgspec

MEMORY_SECONDS = 300.0
"""Time constant of a use. On the conversation trace 300 s saves most at budgets of 1 to 10 % of all segments;
60 s is nearly LRU, an hour nearly LFU."""

SHARE_AT_ONCE = 0.02
"""Share of the contexts that are discarded at once if there are many: to choose them, all must be read. With full
budgets and small contexts each creation would otherwise read thousands.
"""

_LEAST = 1e-300  # so that a worth of zero has a logarithm

Key = TypeVar("Key", bound=Hashable)


class StoredValue(msgspec.Struct, frozen=True, gc=False):
    """Use of a context: `uses`, decayed, as of `used_seconds`."""

    uses: float
    used_seconds: float

    def used(self, now_seconds: float, times: float = 1.0) -> StoredValue:
        """Return the value after `times` more uses."""
        return StoredValue(self.uses_at(now_seconds) + times, max(now_seconds, self.used_seconds))

    def uses_at(self, now_seconds: float) -> float:
        """Return the decayed uses at a moment. They never grow with time."""
        return self.uses * math.exp(-max(0.0, now_seconds - self.used_seconds) / MEMORY_SECONDS)

    def rank(self, value_usd: float, size_bytes: int) -> float:
        """Return the rank of a context; a higher one is kept longer. `value_usd` is the saving of one use."""
        density = max(self.uses * value_usd, _LEAST) / MEMORY_SECONDS / max(1, size_bytes)
        return math.log(density) + self.used_seconds / MEMORY_SECONDS

    def worth(self, value_usd: float, size_bytes: int, now_seconds: float) -> float:
        """Return the worth in USD per second and byte."""
        return self.uses_at(now_seconds) * value_usd / MEMORY_SECONDS / max(1, size_bytes)


class Kept(msgspec.Struct, frozen=True, gc=False):
    """A context that takes room. Expired ones are discarded first, lowest rank first; pinned ones never."""

    rank: float
    size_bytes: int
    pinned: bool = False
    expired: bool = False


class Choice(Generic[Key]):
    """Chooses contexts to discard while they are read, so that not all of them are held at once.

    Of those that were considered it holds the ones that go first and free `needed_bytes`, at least `least` of them.
    """

    def __init__(self, needed_bytes: int, least: int = 0) -> None:
        self._needed_bytes = needed_bytes
        self._least = least
        self._held: list[tuple[bool, float, int, int, Key]] = []  # a heap: the one that would go last is the first
        self._held_bytes = 0
        self._considered = 0

    def consider(self, key: Key, kept: Kept) -> None:
        """Take a context into account. A pinned one is never chosen, and of equal ones the first that came."""
        if kept.pinned:
            return
        self._considered += 1
        entry = (kept.expired, -kept.rank, -kept.size_bytes, -self._considered, key)
        if self._is_enough_without(0) and (not self._held or entry < self._held[0]):
            return
        heapq.heappush(self._held, entry)
        self._held_bytes += kept.size_bytes
        while self._held and self._is_enough_without(1):
            _, _, size_bytes, _, _ = heapq.heappop(self._held)
            self._held_bytes += size_bytes

    def chosen(self) -> list[Key] | None:
        """Return which to discard, in order; None if discarding all would not free enough."""
        if self._held_bytes < self._needed_bytes:
            return None
        return [key for *_, key in sorted(self._held, reverse=True)]

    def _is_enough_without(self, last: int) -> bool:
        """Return True if what is held would do without the `last` (0 or 1) that would go last."""
        spared_bytes = -self._held[0][2] if last else 0
        return self._held_bytes - spared_bytes >= self._needed_bytes and len(self._held) - last >= self._least


def least_at_once(contexts: int) -> int:
    """Return how many of a number of contexts are discarded at least."""
    return int(SHARE_AT_ONCE * contexts)


def choose(contexts: Sequence[tuple[Key, Kept]], needed_bytes: int) -> list[Key] | None:
    """Return which to discard, in order, to free `needed_bytes`; None if discarding all would not be enough.

    Of 50 or more that are not pinned it is at least `SHARE_AT_ONCE`, even if fewer would be enough.
    """
    choice: Choice[Key] = Choice(needed_bytes, least_at_once(sum(not kept.pinned for _, kept in contexts)))
    for key, kept in contexts:
        choice.consider(key, kept)
    return choice.chosen()

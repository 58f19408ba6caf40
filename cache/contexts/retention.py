"""What to keep and what to discard when a budget is full: whatever is worth least, per byte, goes first.

Pure; it knows neither Redis nor what the things are. The rule is greedy-dual (Young 1994; with sizes, Cao and Irani
1997; with frequencies, Cherkasova 1998). Where those raise a floor at every eviction, so that what is not used falls
behind, here the floor is the clock itself: uses are decayed by `MEMORY_SECONDS`, and

    worth(now) = uses(now) / MEMORY_SECONDS x value of one use / bytes          (USD per second and byte)
    ln worth(now) = rank - now / MEMORY_SECONDS

so `rank` changes only at a use, and things are compared, also those of several tenants, without touching any.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import TypeVar

import msgspec

MEMORY_SECONDS = 300.0
"""How long a use counts, e-fold. On the conversation trace 300 s saves most at budgets of 1 to 10 % of all segments;
60 s is nearly LRU, an hour nearly LFU."""

_LEAST = 1e-300  # a worth of nothing still has a logarithm

Key = TypeVar("Key", bound=Hashable)


class StoredValue(msgspec.Struct, frozen=True, gc=False):
    """How much something is used: `uses` as of `used_seconds`, decayed ones."""

    uses: float
    used_seconds: float

    def used(self, now_seconds: float, times: float = 1.0) -> StoredValue:
        """After `times` more uses."""
        return StoredValue(self.uses_at(now_seconds) + times, max(now_seconds, self.used_seconds))

    def uses_at(self, now_seconds: float) -> float:
        """The decayed uses at a moment; time never makes more of them."""
        return self.uses * math.exp(-max(0.0, now_seconds - self.used_seconds) / MEMORY_SECONDS)

    def rank(self, value_usd: float, size_bytes: int) -> float:
        """What is compared: higher is to be kept. `value_usd` is what one use saves."""
        density = max(self.uses * value_usd, _LEAST) / MEMORY_SECONDS / max(1, size_bytes)
        return math.log(density) + self.used_seconds / MEMORY_SECONDS

    def worth(self, value_usd: float, size_bytes: int, now_seconds: float) -> float:
        """USD per second and byte."""
        return self.uses_at(now_seconds) * value_usd / MEMORY_SECONDS / max(1, size_bytes)


class Kept(msgspec.Struct, frozen=True, gc=False):
    """One thing that takes room. What has `expired` goes first, oldest rank first; what is `pinned` never."""

    rank: float
    size_bytes: int
    pinned: bool = False
    expired: bool = False


def choose(things: Iterable[tuple[Key, Kept]], needed_bytes: int) -> list[Key] | None:
    """Which to discard so that `needed_bytes` become free, in order; None where even all would not do."""
    ordered = sorted(
        ((not thing.expired, thing.rank, thing.size_bytes, number, key) for number, (key, thing) in enumerate(things)
         if not thing.pinned),
        key=lambda row: row[:4],
    )  # fmt: skip
    chosen: list[Key] = []
    for _, _, size_bytes, _, key in ordered:
        if needed_bytes <= 0:
            break
        chosen.append(key)
        needed_bytes -= size_bytes
    return chosen if needed_bytes <= 0 else None

"""Choose which segments of a trace to keep within a budget: by Cairn's rule, by LRU and by LFU.

Every policy gives a thing a rank at each use; when the budget is exceeded the lowest rank is dropped. The only clock
is the trace's.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.fleet.trace import BLOCK_TOKENS, BYTES_PER_TOKEN, Request
from cache.contexts.retention import StoredValue

SEGMENT_BYTES = BLOCK_TOKENS * BYTES_PER_TOKEN
SEGMENT_USD = BLOCK_TOKENS * 1e-6
"""Saving of one use of a segment; the same for all, so it changes nothing but the figures' scale."""

Rank = Callable[[StoredValue | None, float], tuple[StoredValue, float]]
"""Maps the value before a use (None: not kept) and its time to the value and the rank after it."""


class Outcome(msgspec.Struct, frozen=True):
    """Tokens of all requests, and of the leading segments that were there when a request came."""

    saved_tokens: int
    tokens: int

    @property
    def share(self) -> float:
        """Share of all tokens."""
        return self.saved_tokens / self.tokens


def worth(before: StoredValue | None, now_seconds: float) -> tuple[StoredValue, float]:
    """Rank by Cairn's rule: `cache.contexts.retention`."""
    standing = StoredValue(1.0, now_seconds) if before is None else before.used(now_seconds)
    return standing, standing.rank(SEGMENT_USD, SEGMENT_BYTES)


def least_recent(_: StoredValue | None, now_seconds: float) -> tuple[StoredValue, float]:
    """Rank by LRU: the time of the last use."""
    return StoredValue(1.0, now_seconds), now_seconds


def least_frequent(before: StoredValue | None, now_seconds: float) -> tuple[StoredValue, float]:
    """Rank by LFU: the number of uses since it was added."""
    uses = 1.0 if before is None else before.uses + 1.0
    return StoredValue(uses, now_seconds), uses


POLICIES: dict[str, Rank] = {"worth per byte": worth, "LRU": least_recent, "LFU": least_frequent}


def run(requests: Sequence[Request], rank: Rank, budget: int) -> Outcome:
    """Serve `requests` with room for `budget` segments; a segment saves only behind all before it."""
    kept: dict[int, tuple[StoredValue, float]] = {}
    heap: list[tuple[float, int, int]] = []
    saved = tokens = uses = 0
    for request in requests:
        tokens += request.input_tokens
        leading = 0
        for block in request.blocks:
            if block not in kept:
                break
            leading += 1
        saved += min(leading * BLOCK_TOKENS, request.input_tokens)
        for block in request.blocks:
            before = kept.get(block)
            _, value = kept[block] = rank(None if before is None else before[0], request.arrival_seconds)
            # at the same time, what is deeper in a prompt is dropped first: it is useless without what precedes it
            uses += 1
            heapq.heappush(heap, (value, -uses, block))
        _trim(kept, heap, budget)
    return Outcome(saved, tokens)


def _trim(kept: dict[int, tuple[StoredValue, float]], heap: list[tuple[float, int, int]], budget: int) -> None:
    while len(kept) > budget:
        value, _, block = heapq.heappop(heap)
        current = kept.get(block)
        if current is not None and current[1] == value:
            del kept[block]

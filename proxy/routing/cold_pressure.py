"""Whether sessions need more cache than there is: only then do cold turns wait (`cold_admission`).

The sign is work that is done again. A prompt that was served before and must be computed once more was evicted in
between; where there is room, hardly any is. Pure: clocks are passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import exp
from typing import Final

MAX_REMEMBERED: Final = 262_144
"""Boundaries of served prompts that are remembered, about 25 MB: two of each of the last 131,072 prompts."""

MEMORY_SECONDS: Final = 120.0
"""Time constant of the mean. It must span several long prefills and pass when the sessions have gone."""

ON_SHARE: Final = 0.5
OFF_SHARE: Final = 0.3
"""Cold turns wait while this share of what is computed was computed before. Above the size of the caches it is nine
tenths without the gate and two thirds with it, at three quarters of their size a half, at half of it a quarter; in
open-loop traces at most a third."""

CROWDED_SHARE: Final = 0.15
CROWDED_SECONDS: Final = 10.0
"""With all queues longer than this, less is enough: what is saved of the cache then saves everyone's waiting."""

MIN_COMPUTED_TOKENS: Final = 50_000.0
"""Below this the share is noise."""


class ServedPrompts:
    """Ends of prompts that were sent somewhere, so that a prompt which continues one is known again."""

    def __init__(self, most: int = MAX_REMEMBERED) -> None:
        self._most = most
        self._boundaries: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._boundaries)

    def note(self, hashes: Sequence[int]) -> None:
        """A prompt was sent. Its last two boundaries are kept, since the last one is often not whole."""
        kept = self._boundaries
        for boundary in hashes[-2:]:
            kept[boundary] = None
            kept.move_to_end(boundary)
        while len(kept) > self._most:
            kept.popitem(last=False)

    def depth(self, hashes: Sequence[int]) -> int:
        """The blocks up to the end of a prompt sent before, 0 if it continues none. Looks up each at worst."""
        kept = self._boundaries
        for place in range(len(hashes), 0, -1):
            if hashes[place - 1] in kept:
                return place
        return 0


class ColdPressure:
    """The share of recent work that was done before, and whether cold turns wait because of it."""

    def __init__(self) -> None:
        self._computed_tokens = 0.0
        self._repeated_tokens = 0.0
        self._seen_seconds = 0.0
        self._is_on = False

    @property
    def repeated_share(self) -> float:
        """The share, 0 to 1; 0 while too little is known."""
        if self._computed_tokens < MIN_COMPUTED_TOKENS:
            return 0.0
        return min(self._repeated_tokens / self._computed_tokens, 1.0)

    def observe(self, computed_tokens: float, repeated_tokens: float, now_seconds: float) -> None:
        """One answer: tokens that were computed for it, and those of them that were computed before."""
        kept = exp(min(self._seen_seconds - now_seconds, 0.0) / MEMORY_SECONDS)
        self._seen_seconds = max(now_seconds, self._seen_seconds)
        self._computed_tokens = self._computed_tokens * kept + computed_tokens
        self._repeated_tokens = self._repeated_tokens * kept + repeated_tokens

    def is_on(self, shortest_queue_seconds: float, waiting: int) -> bool:
        """True if a cold turn that comes now must wait. `waiting` are those that wait already."""
        share = self.repeated_share
        if self._is_on:
            self._is_on = waiting > 0 or share >= OFF_SHARE
        else:
            self._is_on = share >= ON_SHARE or (share >= CROWDED_SHARE and shortest_queue_seconds >= CROWDED_SECONDS)
        return self._is_on

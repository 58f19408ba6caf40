"""Detect that sessions need more cache than there is: only then do cold turns wait (`cold_admission`).

The sign is repeated work. A prompt that was served before and must be computed again was evicted in between; if there
is enough room, this is rare. Pure: clocks are passed in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import exp, inf
from typing import Final, NamedTuple

MAX_REMEMBERED: Final = 262_144
"""Boundaries of served prompts that are remembered, about 25 MB: two of each of the last 131,072 prompts."""

FIRST_PAUSE_SECONDS: Final = 60.0
"""Assumed time from one turn of a session to its next, until one was observed."""

PAUSE_STEP: Final = 0.02
"""Weight of the newest pause in the mean."""

SHARE_STEP: Final = 0.02
"""Weight of the newest prompt in the mean of `own_share`."""

LEAST_OWN_SHARE: Final = 0.25
"""Lower bound of `own_share`: concurrent prompts are never assumed to need less than a quarter of their tokens."""

ENDED_AFTER_PAUSES: Final = 3.0
"""Mean pauses without a turn after which a session has ended: of exponential pauses one in twenty is longer."""

NEED_SECONDS: Final = 1.0
"""Age up to which the sum of what all sessions need is used again: with thousands of them it takes a millisecond."""

RESTING_SECONDS: Final = 5.0
"""A session rests for this time after the end of a turn: most pauses of an agent's tools are shorter. With 10 s one
percent more turns are served, and cold ones wait a sixth longer.
"""

MEMORY_SECONDS: Final = 120.0
"""Time constant of the mean. It must span several long prefills, and be short enough to forget ended sessions."""

ON_SHARE: Final = 0.5
OFF_SHARE: Final = 0.3
"""Cold turns wait while this share of the computed tokens had been computed before. If the sessions need more
than the caches hold, the share is 0.9 without the gate and 0.67 with it; if they need three quarters of the
caches, 0.5; if half, 0.25. In open-loop traces it is at most 0.33.
"""

CROWDED_SHARE: Final = 0.15
CROWDED_SECONDS: Final = 10.0
"""If all queues are longer than this, a smaller share is enough: cached tokens then shorten everyone's wait."""

MIN_COMPUTED_TOKENS: Final = 50_000.0
"""With fewer computed tokens the share is noise."""


class _Served:
    """The last turn of a session: its prompt minus what its first turn shared with other sessions, and its time."""

    __slots__ = ("boundaries", "ended_seconds", "is_withdrawn", "own_tokens", "seen_seconds", "shared_tokens")

    def __init__(
        self, boundaries: tuple[int, ...], own_tokens: float, shared_tokens: float, seen_seconds: float
    ) -> None:
        self.boundaries = boundaries
        self.own_tokens = own_tokens
        self.shared_tokens = shared_tokens
        self.seen_seconds = seen_seconds
        self.ended_seconds = inf
        self.is_withdrawn = False  # it was not sent after all


class Noted(NamedTuple):
    """A prompt as noted, and the turn before it in its session, None if it is the first."""

    turn: _Served
    before: _Served | None


class ServedPrompts:
    """Ends of prompts that were sent to a replica, by which a prompt that continues one is recognised."""

    def __init__(self, most: int = MAX_REMEMBERED) -> None:
        self._most = most
        self._boundaries: dict[int, _Served] = {}
        self._latest: OrderedDict[_Served, None] = OrderedDict()
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._own_share = 1.0
        self._needed_tokens = 0.0
        self._needed_seconds = -inf
        self._ended: dict[int, OrderedDict[_Served, None]] = {}  # by replica, the earliest first

    @property
    def own_share(self) -> float:
        """Mean share of a prompt that no other session has: the part that it adds to a cache with the others."""
        return max(self._own_share, LEAST_OWN_SHARE)

    def __len__(self) -> int:
        return len(self._boundaries)

    def depth(self, hashes: Sequence[int]) -> int:
        """Return the number of blocks up to the end of the prompt that this one continues, 0 if it continues none."""
        kept = self._boundaries
        for place in range(len(hashes), 0, -1):
            if hashes[place - 1] in kept:
                return place
        return 0

    def note(
        self, hashes: Sequence[int], depth: int, prompt_tokens: float, matched_tokens: float, now_seconds: float
    ) -> Noted:
        """Note a prompt, whose first `depth` blocks are an earlier one; a new one shares `matched_tokens` with
        others.

        Its last two boundaries are kept, because the last block is often incomplete. Return what `withdraw` needs.
        """
        before = self._boundaries.get(hashes[depth - 1]) if depth else None
        shared = min(matched_tokens, prompt_tokens)
        if before is not None:
            shared = min(before.shared_tokens, prompt_tokens)
            self._pause_seconds += PAUSE_STEP * (now_seconds - before.seen_seconds - self._pause_seconds)
            self._drop(before)
        self._own_share += SHARE_STEP * (1.0 - shared / max(prompt_tokens, 1.0) - self._own_share)
        served = _Served(tuple(hashes[-2:]), prompt_tokens - shared, shared, now_seconds)
        self._latest[served] = None
        for boundary in served.boundaries:
            other = self._boundaries.get(boundary)
            if other is not None:
                self._drop(other)
            self._boundaries[boundary] = served
        while len(self._boundaries) > self._most:
            self._drop(next(iter(self._latest)))
        return Noted(served, before)

    def withdraw(self, noted: Noted, now_seconds: float) -> None:
        """Forget a prompt that was not sent: it was refused, or its client left while it waited.

        Otherwise it would count as computed before when it comes again. The turn before it is the latest once more.
        """
        turn, before = noted
        turn.is_withdrawn = True
        if turn not in self._latest:
            return  # continued, or forgotten
        self._drop(turn)
        if before is None or before.is_withdrawn:
            return
        before.seen_seconds = now_seconds
        self._latest[before] = None
        for boundary in before.boundaries:
            self._boundaries.setdefault(boundary, before)

    def ended(
        self, prompt_end: int, replica: int, now_seconds: float, resting_seconds: float = RESTING_SECONDS
    ) -> None:
        """Note that a replica answered the prompt with this last hash: its session rests, until it continues.

        What ended there more than `resting_seconds` ago is forgotten: nobody asks for it while no turn waits.
        """
        served = self._boundaries.get(prompt_end)
        if served is not None:
            served.ended_seconds = now_seconds
            resting = self._resting(replica, now_seconds - resting_seconds)
            resting.pop(served, None)  # several requests may have had the same prompt
            resting[served] = None

    def resting_tokens(self, replica: int, now_seconds: float, resting_seconds: float = RESTING_SECONDS) -> float:
        """Return the tokens of the prompts whose answers ended at a replica within `resting_seconds` and that none
        continues.
        """
        latest, resting = self._latest, self._resting(replica, now_seconds - resting_seconds)
        return sum([each.own_tokens + each.shared_tokens for each in resting if each in latest])

    def _resting(self, replica: int, oldest: float) -> OrderedDict[_Served, None]:
        """Return the prompts whose answers ended at a replica since `oldest`, and forget earlier ones."""
        ended = self._ended.get(replica)
        if ended is None:
            ended = self._ended[replica] = OrderedDict()
        while ended and next(iter(ended)).ended_seconds < oldest:
            ended.popitem(last=False)
        return ended

    def needed_tokens(self, now_seconds: float) -> float:
        """Return the tokens that continuing sessions need in the caches: the sum of their own parts.

        A session continues if its last turn is no older than three times the mean time from one turn to the next, or
        than a minute if that is longer.
        """
        oldest = now_seconds - max(ENDED_AFTER_PAUSES * self._pause_seconds, FIRST_PAUSE_SECONDS)
        needed = 0.0
        for served in reversed(self._latest):
            if served.seen_seconds < oldest:
                break
            needed += served.own_tokens
        return needed

    def recently_needed_tokens(self, now_seconds: float) -> float:
        """Return `needed_tokens` of now, or of a moment ago."""
        if now_seconds - self._needed_seconds >= NEED_SECONDS:
            self._needed_tokens = self.needed_tokens(now_seconds)
            self._needed_seconds = now_seconds
        return self._needed_tokens

    def _drop(self, served: _Served) -> None:
        self._latest.pop(served, None)
        for boundary in served.boundaries:
            if self._boundaries.get(boundary) is served:
                del self._boundaries[boundary]


class ColdPressure:
    """The share of recent work that was repeated, and whether cold turns wait because of it."""

    def __init__(self, memory_seconds: float = MEMORY_SECONDS) -> None:
        self.memory_seconds = memory_seconds
        self._computed_tokens = 0.0
        self._repeated_tokens = 0.0
        self._seen_seconds = 0.0
        self._is_on = False

    @property
    def is_holding(self) -> bool:
        """The last result of `is_on`."""
        return self._is_on

    def is_fresh(self, now_seconds: float) -> bool:
        """Return True if a response was noted so lately that it says something about the present."""
        return now_seconds - self._seen_seconds < self.memory_seconds

    @property
    def repeated_share(self) -> float:
        """The share of repeated work, 0 to 1; 0 while too little is known."""
        if self._computed_tokens < MIN_COMPUTED_TOKENS:
            return 0.0
        return min(self._repeated_tokens / self._computed_tokens, 1.0)

    def observe(self, computed_tokens: float, repeated_tokens: float, now_seconds: float) -> None:
        """Note a response: the tokens that were computed for it, and how many of them had been computed before."""
        kept = exp(min(self._seen_seconds - now_seconds, 0.0) / self.memory_seconds)
        self._seen_seconds = max(now_seconds, self._seen_seconds)
        self._computed_tokens = self._computed_tokens * kept + computed_tokens
        self._repeated_tokens = self._repeated_tokens * kept + repeated_tokens

    def is_on(self, shortest_queue_seconds: float, waiting: int, crowded_seconds: float = CROWDED_SECONDS) -> bool:
        """Return True if a cold turn that arrives now must wait. `waiting` is the number of turns waiting already."""
        share = self.repeated_share
        if self._is_on:
            self._is_on = waiting > 0 or share >= OFF_SHARE
        else:
            self._is_on = share >= ON_SHARE or (share >= CROWDED_SHARE and shortest_queue_seconds >= crowded_seconds)
        return self._is_on

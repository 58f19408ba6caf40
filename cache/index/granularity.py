"""Learn the steps in which an engine reuses prompts, from the cached tokens that it reports.

Engines reuse whole blocks: often of 16 tokens, with hybrid models of several hundred, and some never reuse the last
whole block. A reported count may therefore be up to two blocks lower than what is held, without any loss. Prompts
shorter than these blocks are not reused at all.
"""

from __future__ import annotations

from math import gcd
from typing import Final

MIN_COUNTS: Final = 3
"""Different reported counts needed before their common divisor counts as the block size."""

MIN_REPEATED: Final = 8
"""Or two different counts in this many reports: with large blocks, prompts of a usual length have no third."""

MIN_SPREAD_TOKENS: Final = 128
"""Or one count in `MIN_REPEATED` reports, for whole prompts whose lengths differ by this much; or in more reports if
they differ less, in proportion.
"""

MIN_BLOCK_TOKENS: Final = 16
"""A smaller common divisor makes no difference to any prediction."""

MAX_LAG_BLOCKS: Final = 2
"""Number of whole blocks at the end of a held prefix that an engine may leave unused."""


MIN_ENDS: Final = 8
"""Reports needed to know how many blocks at the end an engine leaves unused."""

SURE_END_SHARE: Final = 0.8
"""Share of these reports that must agree before fewer blocks than expected are no longer explained by them."""

END_MARGIN_TOKENS: Final = 128
"""Error of a count that is allowed for before it decides how many blocks a prompt has."""

MIN_MISSES: Final = 3
"""Number of whole recent prompts in a row of which nothing was cached, after which prompts up to their length count
as too short to be reused. Such an engine has shown no count from which its block size could be computed.
"""

MIN_OLD_MISSES: Final = 8
"""The same for prompts so old that they may have been evicted."""

MAX_FLOOR_TOKENS: Final = 8_192
"""A longer prompt has usable blocks on any engine: the largest known block has 2,096 tokens, and at most two at the
end are left unused.
"""

MIN_LONG_MISSES: Final = 8
"""Number of recent prompts longer than this of which nothing was cached, after which an engine that has never reused
anything counts as one that reuses nothing: its cache is turned off.
"""

FLOOR_GROWTH: Final = 2
"""Factor by which prompts may be longer than those of which nothing was cached, and still be expected to find
nothing, until one does. Conversations grow with each turn, so each turn is longer than those that missed before.
"""

MAX_BLOCK_TOKENS: Final = 2_096
"""The largest known block."""

TRIAL_PROMPTS: Final = 16
"""One of so many prompts that are too short to be reused is routed as if it were not: nothing else would show that
the engine reuses such prompts if all of them went elsewhere.
"""

_NO_HIT: Final = 1 << 62  # tokens of the shortest prompt that was reused, as long as there is none

COARSE_TOKENS: Final = 256
"""Number of unused tokens at the end of a prompt from which routing takes them into account."""


class Granularity:
    """One replica's block size and unused last blocks.

    `block_tokens` is 0 until it is known; `lag_blocks` are the whole blocks at the end that it does not reuse. Of
    prompts of at most `floor_tokens` nothing is reused.
    """

    __slots__ = (
        "_counts",
        "_divisor",
        "_ends",
        "_hidden",
        "_lags",
        "_long_misses",
        "_longest_miss",
        "_misses",
        "_reports",
        "_same",
        "_shortest_hit",
        "block_tokens",
        "floor_tokens",
        "lag_blocks",
    )

    def __init__(self) -> None:
        self._divisor = 0
        self._counts: set[int] = set()
        self._reports = 0
        self._same = (0, 0, 0, 0)  # last count for a whole prompt, repetitions in a row, least and most held
        self._lags = [0] * (MAX_LAG_BLOCKS + 1)
        self._ends = 0
        self._misses = 0
        self._hidden = 0  # look-ups in which a prompt was too short to be expected
        self._long_misses = 0
        self._longest_miss = 0
        self._shortest_hit = _NO_HIT
        self.block_tokens = 0
        self.floor_tokens = 0
        self.lag_blocks = 0

    def observe(self, cached_tokens: int) -> None:
        """Learn from a reported count of any prompt."""
        if not cached_tokens or self._divisor == 1:
            return
        self._divisor = gcd(self._divisor, cached_tokens)
        if self.floor_tokens:
            self._set_floor()
        if len(self._counts) < MIN_COUNTS:
            self._counts.add(cached_tokens)
            self._reports += 1
        different = len(self._counts)
        is_known = different >= MIN_COUNTS or (different > 1 and self._reports >= MIN_REPEATED)
        if self._divisor != self.block_tokens and (is_known or self.block_tokens):  # or a repeated count showed it
            self._set_block(self._divisor)

    def observe_whole(self, held_tokens: int, cached_tokens: int) -> None:
        """Learn from what was cached of a whole earlier prompt: one count for several lengths is whole blocks."""
        count, times, least, most = self._same
        if held_tokens >= (MAX_LAG_BLOCKS + 2) * cached_tokens:  # more is missing than blocks at an end
            self._same = (0, 0, 0, 0)
            return
        if count != cached_tokens:
            self._same = (cached_tokens, 1, held_tokens, held_tokens)
            return
        least, most = min(least, held_tokens), max(most, held_tokens)
        self._same = (count, times + 1, least, most)
        is_spread = (most - least) * times >= MIN_SPREAD_TOKENS * MIN_REPEATED
        if times >= MIN_REPEATED and is_spread and not self.block_tokens:
            self._set_block(self._divisor)

    def is_repeated(self, cached_tokens: int) -> bool:
        """Return True if the last whole prompts all had this count, as with blocks as long as the prompts."""
        count, times, _, _ = self._same
        return times > 1 and count == cached_tokens

    def _set_block(self, tokens: int) -> None:
        tokens = tokens if tokens >= MIN_BLOCK_TOKENS else 0
        if tokens != self.block_tokens:
            self.block_tokens, self.lag_blocks, self._ends = tokens, 0, 0
            self._lags = [0] * (MAX_LAG_BLOCKS + 1)

    def observe_end(self, held_tokens: int, cached_tokens: int) -> None:
        """Learn where reuse ends, from a prompt that continues one of which `held_tokens` were surely held."""
        if not self.block_tokens:
            return
        lag = held_tokens // self.block_tokens - cached_tokens // self.block_tokens
        if 0 <= lag <= MAX_LAG_BLOCKS:
            lags = self._lags
            lags[lag] += 1
            best = lags.index(max(lags))
            self.lag_blocks = best
            self._ends += 1

    def observe_miss(self, held_tokens: int, *, is_recent: bool) -> None:
        """Learn from a whole earlier prompt of `held_tokens` of which nothing was cached.

        It is used only if no prompt of this length or shorter has been reused. `is_recent` is true if the engine
        cannot have evicted it since.
        """
        if held_tokens >= self._shortest_hit:
            return
        if held_tokens > MAX_FLOOR_TOKENS:
            if not is_recent or self._shortest_hit < _NO_HIT:
                return
            self._long_misses += 1
            if self._long_misses < MIN_LONG_MISSES:
                return
        self._misses += 1
        self._longest_miss = max(self._longest_miss, held_tokens)
        if self.floor_tokens or self._misses >= (MIN_MISSES if is_recent else MIN_OLD_MISSES):
            self._set_floor()

    def observe_hit(self, held_tokens: int) -> None:
        """Learn that some of a prompt of `held_tokens` was reused, so longer prompts do not lack a whole block."""
        if held_tokens < self._shortest_hit:
            self._shortest_hit = held_tokens
            if self.floor_tokens and not self.block_tokens:
                self._set_block(self._divisor)  # a guess, corrected by the next count: nothing shorter was reused
            if held_tokens <= self._longest_miss:
                self._misses = self._long_misses = self._longest_miss = self.floor_tokens = 0
            elif self.floor_tokens:
                self._set_floor()

    def _set_floor(self) -> None:
        """Expect nothing of prompts up to twice as long as those that missed, or up to what reports allow."""
        tokens = min(FLOOR_GROWTH * self._longest_miss, self._shortest_hit - 1)
        if self._long_misses < MIN_LONG_MISSES:
            tokens = min(tokens, MAX_FLOOR_TOKENS)
        if self._divisor >= MIN_BLOCK_TOKENS:
            tokens = min(tokens, (MAX_LAG_BLOCKS + 1) * self._divisor)
        self.floor_tokens = tokens if tokens >= COARSE_TOKENS else 0

    def is_trial(self, held_tokens: int) -> bool:
        """Return True for one in many prompts that are too short to be reused: it is routed as if it were not."""
        if held_tokens > self.floor_tokens:
            return False
        self._hidden = (self._hidden + 1) % TRIAL_PROMPTS
        return self._hidden == 0

    @property
    def is_coarse(self) -> bool:
        """True if the end of a prompt that may not be reused is long enough to matter for routing."""
        return self.floor_tokens > 0 or self.block_tokens * (1 + self.lag_blocks) >= COARSE_TOKENS

    def usable(self, held_tokens: int) -> int:
        """Return the tokens that the engine will reuse of `held_tokens`."""
        if held_tokens <= self.floor_tokens:
            return 0
        block = self.block_tokens
        if not block:
            return held_tokens
        return max(0, (held_tokens // block - self.lag_blocks) * block)

    def may_explain(self, missing_tokens: int) -> bool:
        """Return True if blocks may be the reason for a shortfall: too few counts were reported to know their size.

        They are at most as large as the common divisor of the counts so far.
        """
        if self.block_tokens or self._divisor == 1 or len(self._counts) >= MIN_COUNTS:
            return False
        return missing_tokens <= (MAX_LAG_BLOCKS + 1) * (self._divisor or MAX_BLOCK_TOKENS)

    def tolerance_tokens(self) -> int:
        """Return the largest shortfall that whole blocks alone explain."""
        return self.block_tokens * (1 if self._ends >= MIN_ENDS else MAX_LAG_BLOCKS + 1)

    def knows_end(self, held_tokens: int) -> bool:
        """Return True if it is certain how many blocks are reused of a whole earlier prompt of `held_tokens`."""
        ends, sure = self._ends, SURE_END_SHARE * self._ends
        if not self.block_tokens or ends < MIN_ENDS or self._lags[self.lag_blocks] < sure:
            return False
        return self.usable(held_tokens - END_MARGIN_TOKENS) == self.usable(held_tokens)

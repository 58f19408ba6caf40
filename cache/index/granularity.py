"""The steps in which an engine reuses a prompt, learned from the cached tokens that it reports.

Engines reuse whole blocks: of 16 tokens on many, of several hundred on hybrid models, and some never reuse the last
whole block. A reported count therefore falls short of what is held by up to two blocks, and that is no loss.
"""

from __future__ import annotations

from math import gcd
from typing import Final

MIN_COUNTS: Final = 3
"""Different reported counts needed before their common divisor is taken for the block size."""

MIN_BLOCK_TOKENS: Final = 16
"""A smaller common divisor makes no difference to any prediction."""

MAX_LAG_BLOCKS: Final = 2
"""Number of whole blocks at the end of a held prefix that an engine may leave unused."""


class Granularity:
    """One replica's block size and unused last blocks.

    `block_tokens` is 0 until it is known; `lag_blocks` are the whole blocks at the end that it does not reuse.
    """

    __slots__ = ("_counts", "_divisor", "_lags", "block_tokens", "lag_blocks")

    def __init__(self) -> None:
        self._divisor = 0
        self._counts: set[int] = set()
        self._lags = [0] * (MAX_LAG_BLOCKS + 1)
        self.block_tokens = 0
        self.lag_blocks = 0

    def observe(self, cached_tokens: int) -> None:
        """Learn from a reported count, whatever prompt it was for."""
        if not cached_tokens or self._divisor == 1:
            return
        self._divisor = gcd(self._divisor, cached_tokens)
        if len(self._counts) < MIN_COUNTS:
            self._counts.add(cached_tokens)
        known = len(self._counts) >= MIN_COUNTS and self._divisor >= MIN_BLOCK_TOKENS
        self.block_tokens = self._divisor if known else 0

    def observe_end(self, held_tokens: int, cached_tokens: int) -> None:
        """Learn where reuse ends, from a prompt that went on from one of which `held_tokens` were surely held."""
        if not self.block_tokens:
            return
        lag = held_tokens // self.block_tokens - cached_tokens // self.block_tokens
        if 0 <= lag <= MAX_LAG_BLOCKS:
            lags = self._lags
            lags[lag] += 1
            best = lags.index(max(lags))
            self.lag_blocks = best

    def usable(self, held_tokens: int) -> int:
        """The tokens that the engine will reuse of `held_tokens`."""
        block = self.block_tokens
        if not block:
            return held_tokens
        return max(0, (held_tokens // block - self.lag_blocks) * block)

    def tolerance_tokens(self) -> int:
        """A shortfall up to this is explained by whole blocks alone."""
        return (MAX_LAG_BLOCKS + 1) * self.block_tokens

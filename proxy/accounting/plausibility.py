"""Recognise cached tokens that cannot be: of new prompts, more than the prompt has, or without any time spared.

An engine that only decodes, behind one that only prefills, reports what was handed over as cached, although it was
computed a moment before. That is no saving and says nothing about the cache. One such answer may be due to a prompt
that was sent past Cairn before; a replica is doubted when most of its new prompts are reported like this. A prompt
is new if a long part of it is, since most begin with tools and instructions that are common to many.

An engine may also report as cached what it computes again, or fetches as slowly: then its first tokens come as late
as without a cache. Pure.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from proxy.records import Usage

MIN_NEW_TOKENS: Final = 1_024
"""Prompts of which fewer tokens are new do not count: they may have been sent by other ways."""

LAST_BLOCK_TOKENS: Final = 16
"""Engines always compute the end of a prompt, up to a block."""

MIN_FLAGGED: Final = 5
"""Number of a replica's responses that must be suspicious before it is doubted."""

DOUBTED_SHARE: Final = 0.8
"""Share of a replica's responses of a kind that must be suspicious before it is doubted."""

MEMORY: Final = 64
"""Responses of a replica after which both of its counts are halved, so that a repaired engine is believed again."""

COLD_SHARE: Final = 0.1
CLAIMED_SHARE: Final = 0.5
"""Of prompts with a smaller cached share than the first the time is that of computing them; of those with at least
the second, it must be shorter.
"""

AS_LONG_SHARE: Final = 0.8
"""A prompt that took this share of the time for computing all of it was not cached by half."""

MIN_SPARED_SECONDS: Final = 0.25
"""A shorter time that should have been spared may be lost among the fixed costs of a request."""

MIN_COLD: Final = 3
RATE_STEP: Final = 0.25
"""Number of prompts computed as a whole before the rate is known, and the weight of the newest."""


def is_impossible(usage: Usage) -> bool:
    """Return True if the cached tokens were reported as negative, or as more than the prompt has."""
    return usage.inconsistent and usage.cached_tokens in (0, usage.prompt_tokens)


class _Flagged:
    """Responses of one replica, and how many of them were flagged."""

    __slots__ = ("flagged", "seen")

    def __init__(self) -> None:
        self.seen = 0
        self.flagged = 0

    def count(self, is_flagged: bool) -> None:
        """Count a response; the counts are halved from time to time."""
        self.seen += 1
        self.flagged += is_flagged
        if self.seen > MEMORY:
            self.seen //= 2
            self.flagged //= 2

    @property
    def are_most(self) -> bool:
        """True if enough of the responses were flagged, and nearly all."""
        return self.flagged >= MIN_FLAGGED and self.flagged >= DOUBTED_SHARE * self.seen


class CachedCounts:
    """New prompts by replica: how many there were, and how many of them were reported as wholly cached."""

    def __init__(self) -> None:
        self._new: defaultdict[int, _Flagged] = defaultdict(_Flagged)

    def is_doubtful(self, replica: int, prompt_tokens: int, cached_tokens: int, *, new_tokens: int) -> bool:
        """Learn from a response; return whether its cached tokens are to be ignored.

        `new_tokens` of the prompt were known nowhere before.
        """
        if new_tokens >= MIN_NEW_TOKENS:
            self._new[replica].count(cached_tokens >= prompt_tokens - LAST_BLOCK_TOKENS)
        return cached_tokens > 0 and replica in self._new and self._new[replica].are_most

    def forget(self, replica: int) -> None:
        """Drop what is kept for a replica that is gone."""
        self._new.pop(replica, None)


class SparedTime:
    """By replica: how fast it computes whole prompts, and how often it took as long for a prompt reported as cached.

    Only requests that had the replica to themselves show this, since others wait.
    """

    def __init__(self) -> None:
        self._rates: dict[int, tuple[float, int]] = {}  # mean tokens per second, and the number of prompts
        self._claims: defaultdict[int, _Flagged] = defaultdict(_Flagged)

    def is_doubtful(
        self, replica: int, prompt_tokens: int, cached_tokens: int, prefill_seconds: float | None
    ) -> bool:
        """Learn from a response; return whether its cached tokens are to be ignored.

        `prefill_seconds` is the time until the first token, None if it is unknown or others were served meanwhile.
        """
        if prefill_seconds is not None and prefill_seconds > 0.0 and prompt_tokens >= MIN_NEW_TOKENS:
            if cached_tokens < COLD_SHARE * prompt_tokens:
                self._note_rate(replica, prompt_tokens / prefill_seconds)
            elif cached_tokens >= CLAIMED_SHARE * prompt_tokens:
                self._note_claim(replica, prompt_tokens, cached_tokens, prefill_seconds)
        return cached_tokens > 0 and replica in self._claims and self._claims[replica].are_most

    def forget(self, replica: int) -> None:
        """Drop what is kept for a replica that is gone."""
        self._rates.pop(replica, None)
        self._claims.pop(replica, None)

    def _note_rate(self, replica: int, rate: float) -> None:
        mean, count = self._rates.get(replica, (rate, 0))
        self._rates[replica] = mean + RATE_STEP * (rate - mean), count + 1

    def _note_claim(self, replica: int, prompt_tokens: int, cached_tokens: int, prefill_seconds: float) -> None:
        rate, count = self._rates.get(replica, (0.0, 0))
        if count >= MIN_COLD and cached_tokens / rate >= MIN_SPARED_SECONDS:
            self._claims[replica].count(prefill_seconds >= AS_LONG_SHARE * prompt_tokens / rate)

"""Recognise impossible cached tokens: new prompts, never seen before, as wholly cached; or more than the prompt has.

An engine that only decodes, behind one that only prefills, reports what was handed over as cached, although it was
computed a moment before. That is no saving and says nothing about the cache. One such answer may be due to a prompt
that was sent past Cairn before; a replica is doubted when most of its new prompts are reported like this. A prompt
is new if a long part of it is, since most begin with tools and instructions that are common to many. Pure.
"""

from __future__ import annotations

from typing import Final

from proxy.model import Usage

MIN_NEW_TOKENS: Final = 1_024
"""Prompts of which fewer tokens are new do not count: they may have been sent by other ways."""

LAST_BLOCK_TOKENS: Final = 16
"""Engines always compute the end of a prompt, up to a block."""

MIN_NEW_PROMPTS: Final = 5
"""Number of a replica's new prompts that must be reported as wholly cached before it is doubted."""

DOUBTED_SHARE: Final = 0.8
"""Share of a replica's new prompts that must be reported as wholly cached before it is doubted."""

MEMORY: Final = 64
"""New prompts of a replica after which both of its counts are halved, so that a repaired engine is believed again."""


def is_impossible(usage: Usage) -> bool:
    """Return True if the cached tokens were reported as negative, or as more than the prompt has."""
    return usage.inconsistent and usage.cached_tokens in (0, usage.prompt_tokens)


class CachedCounts:
    """New prompts by replica: how many there were, and how many of them were reported as wholly cached."""

    def __init__(self) -> None:
        self._new: dict[int, int] = {}
        self._cached: dict[int, int] = {}

    def is_doubtful(self, replica: int, prompt_tokens: int, cached_tokens: int, *, new_tokens: int) -> bool:
        """Learn from a response; return whether its cached tokens are to be ignored.

        `new_tokens` of the prompt were known nowhere before.
        """
        if new_tokens >= MIN_NEW_TOKENS:
            self._count(replica, cached_tokens >= prompt_tokens - LAST_BLOCK_TOKENS)
        if not cached_tokens:
            return False
        cached = self._cached.get(replica, 0)
        return cached >= MIN_NEW_PROMPTS and cached >= DOUBTED_SHARE * self._new[replica]

    def forget(self, replica: int) -> None:
        """Drop what is kept for a replica that is gone."""
        self._new.pop(replica, None)
        self._cached.pop(replica, None)

    def _count(self, replica: int, is_cached: bool) -> None:
        new, cached = self._new.get(replica, 0) + 1, self._cached.get(replica, 0) + is_cached
        if new > MEMORY:
            new, cached = new // 2, cached // 2
        self._new[replica], self._cached[replica] = new, cached

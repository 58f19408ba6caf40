"""Cached tokens that cannot be: whose are doubted, and when they are believed again."""

from __future__ import annotations

import pytest

from proxy.accounting.plausibility import MEMORY, MIN_NEW_PROMPTS, CachedCounts, is_impossible
from proxy.wire.usage import normal


def new_prompts(counts: CachedCounts, number: int, cached: int, replica: int = 0) -> list[bool]:
    return [counts.is_doubtful(replica, 5_000, cached, new_tokens=5_000) for _ in range(number)]


def test_a_replica_that_reports_new_prompts_as_wholly_cached_is_doubted_after_a_few():
    counts = CachedCounts()
    assert new_prompts(counts, MIN_NEW_PROMPTS, 4_990) == [False] * (MIN_NEW_PROMPTS - 1) + [True]
    assert counts.is_doubtful(0, 9_000, 6_000, new_tokens=0), "whatever it reports then"
    assert not counts.is_doubtful(1, 5_000, 4_990, new_tokens=0)


def test_known_prompts_and_those_with_a_short_new_part_raise_no_doubt():
    counts = CachedCounts()
    for _ in range(50):
        assert not counts.is_doubtful(0, 5_000, 4_999, new_tokens=0)
        assert not counts.is_doubtful(0, 9_000, 8_999, new_tokens=1_000)


def test_a_replica_whose_new_prompts_are_mostly_computed_is_believed():
    """Some that came around Cairn are cached indeed."""
    counts = CachedCounts()
    for _ in range(20):
        assert not any(new_prompts(counts, 1, 4_990))
        assert not any(new_prompts(counts, 2, 0))


def test_an_engine_that_was_repaired_is_believed_again():
    counts = CachedCounts()
    assert new_prompts(counts, 3 * MEMORY, 4_990)[-1]
    new_prompts(counts, MEMORY, 0)
    assert not counts.is_doubtful(0, 5_000, 3_000, new_tokens=0)


@pytest.mark.parametrize(
    ("cached", "impossible"),
    [(101, True), (10**9, True), (-1, True), (0, False), (64, False), (100, False), ("64", False), (None, False)],
)
def test_a_count_that_is_negative_or_above_the_prompts_is_impossible(cached, impossible):
    usage = normal({"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": cached}})
    assert usage is not None
    assert is_impossible(usage) is impossible

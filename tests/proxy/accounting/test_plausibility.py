"""Cached tokens that cannot be: whose are doubted, and when they are believed again."""

from __future__ import annotations

from proxy.accounting.plausibility import MEMORY, MIN_NEW_PROMPTS, CachedCounts


def new_prompts(counts: CachedCounts, number: int, cached: int, replica: int = 0) -> list[bool]:
    return [counts.is_doubtful(replica, 5_000, cached, is_new=True) for _ in range(number)]


def test_a_replica_that_reports_new_prompts_as_wholly_cached_is_doubted_after_a_few():
    counts = CachedCounts()
    assert new_prompts(counts, MIN_NEW_PROMPTS, 4_990) == [False] * (MIN_NEW_PROMPTS - 1) + [True]
    assert counts.is_doubtful(0, 9_000, 6_000, is_new=False), "whatever it reports then"
    assert not counts.is_doubtful(1, 5_000, 4_990, is_new=False)


def test_known_prompts_and_short_ones_raise_no_doubt():
    counts = CachedCounts()
    for _ in range(50):
        assert not counts.is_doubtful(0, 5_000, 4_999, is_new=False)
        assert not counts.is_doubtful(0, 1_000, 999, is_new=True)


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
    assert not counts.is_doubtful(0, 5_000, 3_000, is_new=False)

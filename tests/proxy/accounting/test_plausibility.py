"""Cached tokens that cannot be: whose are doubted, and when they are believed again."""

from __future__ import annotations

import pytest

from proxy.accounting.plausibility import MEMORY, MIN_FLAGGED, CachedCounts, SparedTime, is_impossible
from proxy.wire.usage import normal


def new_prompts(counts: CachedCounts, number: int, cached: int, replica: int = 0) -> list[bool]:
    return [counts.is_doubtful(replica, 5_000, cached, new_tokens=5_000) for _ in range(number)]


def test_a_replica_that_reports_new_prompts_as_wholly_cached_is_doubted_after_a_few():
    counts = CachedCounts()
    assert new_prompts(counts, MIN_FLAGGED, 4_990) == [False] * (MIN_FLAGGED - 1) + [True]
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


def claims(times: SparedTime, number: int, seconds: float, cached: int = 3_600, replica: int = 0) -> list[bool]:
    return [times.is_doubtful(replica, 4_000, cached, seconds) for _ in range(number)]


def test_a_replica_whose_cached_prompts_take_as_long_as_the_others_is_doubted_after_a_few():
    """Nothing was spared; as soon as time is, it is believed again."""
    times = SparedTime()
    assert not any(claims(times, 4, 1.0, cached=0))
    assert claims(times, MIN_FLAGGED, 0.95) == [False] * (MIN_FLAGGED - 1) + [True]
    assert times.is_doubtful(0, 9_000, 4_000, None), "whatever it reports then"
    assert not times.is_doubtful(0, 9_000, 0, None)
    assert not times.is_doubtful(1, 4_000, 3_600, 0.95), "another one spares time, as far as is known"
    assert not claims(times, 2 * MEMORY, 0.15)[-1]
    times.forget(0)
    assert not any(claims(times, 2 * MIN_FLAGGED, 0.95)), "how long a whole prompt takes is not known"


@pytest.mark.parametrize(
    ("cold_seconds", "seconds", "cached"),
    [(1.0, 0.2, 3_600), (1.0, 0.95, 1_000), (1.0, None, 3_600), (0.2, 0.19, 3_600), (1.0, 0.0, 3_600)],
    ids=["time is spared", "a small part", "not alone", "too little time to tell", "no time"],
)
def test_a_replica_is_believed_if_time_is_spared_or_cannot_show_it(cold_seconds, seconds, cached):
    times = SparedTime()
    claims(times, 4, cold_seconds, cached=0)
    assert not any(times.is_doubtful(0, 4_000, cached, seconds) for _ in range(4 * MIN_FLAGGED))

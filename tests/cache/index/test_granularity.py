"""The block size of an engine, and the blocks at an end that it leaves unused, from the counts that it reports."""

from __future__ import annotations

import pytest

from cache.index.granularity import (
    COARSE_TOKENS,
    FLOOR_GROWTH,
    MAX_FLOOR_TOKENS,
    MIN_ENDS,
    MIN_LONG_MISSES,
    MIN_MISSES,
    MIN_OLD_MISSES,
    MIN_REPEATED,
    TRIAL_PROMPTS,
    Granularity,
)


@pytest.mark.parametrize("counts", [(528, 1_056, 2_640), (1_056, 528, *[1_056] * 6)])
def test_the_block_is_the_common_divisor_of_three_counts_or_of_two_that_repeat(counts):
    known = Granularity()
    for count in counts[:-1]:
        known.observe(count)
    assert known.block_tokens == 0
    known.observe(counts[-1])
    assert known.block_tokens == 528


def test_one_count_for_longer_and_shorter_prompts_is_a_block_until_another_comes():
    known = Granularity()
    for turn in range(MIN_REPEATED + 1):
        assert known.block_tokens == 0
        known.observe(2_112)
        known.observe_whole(2_700 + 50 * turn, 2_112)
    assert known.block_tokens == 2_112
    known.observe(2_640)
    assert known.block_tokens == 528


@pytest.mark.parametrize(("held", "step"), [(2_700, 0), (12_000, 50)])
def test_one_count_says_nothing_of_equal_prompts_nor_of_those_that_lack_much_more(held, step):
    """Such as conversations that were evicted up to a system prompt that all share."""
    known = Granularity()
    for turn in range(3 * MIN_REPEATED):
        known.observe(2_112)
        known.observe_whole(held + step * turn, 2_112)
    assert known.block_tokens == 0


def test_the_tolerance_is_one_block_once_the_end_is_known():
    known = Granularity()
    for count in (528, 1_056, 1_584):
        known.observe(count)
    for _ in range(MIN_ENDS):
        assert known.tolerance_tokens() == 3 * 528
        known.observe_end(2_700, 2_112)
    assert known.lag_blocks == 1
    assert known.usable(2_700) == 2_112
    assert known.tolerance_tokens() == 528
    known.observe(16)
    assert (known.block_tokens, known.lag_blocks) == (16, 0), "what was learned of larger blocks is void"


@pytest.mark.parametrize(("is_recent", "needed"), [(True, MIN_MISSES), (False, MIN_OLD_MISSES)])
def test_nothing_is_expected_of_prompts_that_are_too_short_for_a_block(is_recent, needed):
    """Prompts that may have been evicted must miss more often before their length is taken for the reason."""
    known = Granularity()
    for turn in range(needed):
        assert known.usable(2_700) == 2_700
        known.observe_miss(2_700 + turn, is_recent=is_recent)
    assert known.floor_tokens == FLOOR_GROWTH * (2_700 + needed - 1)
    assert known.usable(known.floor_tokens) == 0
    assert known.usable(known.floor_tokens + 1) == known.floor_tokens + 1
    assert known.is_coarse


def test_a_hit_of_a_prompt_as_short_restores_what_is_expected():
    known = Granularity()
    for _ in range(MIN_MISSES):
        known.observe_miss(2_700, is_recent=True)
    known.observe_hit(2_710)
    assert (known.usable(2_709), known.usable(2_710)) == (0, 2_710), "a longer one only shows where the floor ends"
    known.observe_hit(2_600)
    assert known.usable(2_600) == 2_600
    for _ in range(MIN_OLD_MISSES):
        known.observe_miss(2_700, is_recent=True)
    assert known.floor_tokens == 0, "one as short was reused: what is missed since then has another reason"


def test_reports_of_smaller_blocks_bound_the_length_of_prompts_of_which_nothing_is_expected():
    """Of three blocks at least one is reused, whatever missed before."""
    known = Granularity()
    for _ in range(MIN_MISSES):
        known.observe_miss(3_000, is_recent=True)
    assert known.floor_tokens == 6_000
    known.observe(1_024)
    assert known.floor_tokens == 3 * 1_024
    known.observe(1_040)
    assert (known.floor_tokens, known.usable(1_500)) == (0, 1_500)


def test_one_of_many_short_prompts_is_tried_and_longer_ones_are_no_trial():
    known = Granularity()
    for _ in range(MIN_MISSES):
        known.observe_miss(2_700, is_recent=True)
    tried = [known.is_trial(2_700) for _ in range(2 * TRIAL_PROMPTS)]
    assert tried == [*[False] * (TRIAL_PROMPTS - 1), True] * 2
    assert not any(known.is_trial(known.floor_tokens + 1) for _ in range(2 * TRIAL_PROMPTS))


@pytest.mark.parametrize("lags", [[1] * MIN_ENDS, [1, 1, 1, 0] * MIN_ENDS])
def test_the_end_of_reuse_is_known_if_most_reports_agree_and_the_length_is_not_near_a_boundary(lags):
    known = Granularity()
    for count in (528, 1_056, 1_584):
        known.observe(count)
    for lag in lags[:-1]:
        known.observe_end(2_900, 2_640 - 528 * lag)
    assert not known.knows_end(2_900)
    known.observe_end(2_900, 2_112)
    agree = len(set(lags)) == 1
    assert (known.knows_end(2_900), known.knows_end(2_640 + 100)) == (agree, False)


def test_the_first_count_after_misses_is_taken_for_a_block_until_another_comes():
    """Nothing shorter was reused, so that the block and what is left unused at the end are known at once."""
    known = Granularity()
    for _ in range(MIN_MISSES):
        known.observe_miss(4_000, is_recent=True)
    known.observe(2_096)
    known.observe_hit(4_300)
    known.observe_end(4_300, 2_096)
    assert (known.block_tokens, known.lag_blocks) == (2_096, 1)
    assert (known.usable(4_250), known.usable(6_400)) == (0, 4_192)
    known.observe(528)
    assert known.block_tokens == 16


@pytest.mark.parametrize(("is_recent", "had_hit"), [(False, False), (True, True)])
def test_no_engine_has_blocks_as_long_as_the_longest_prompts(is_recent, had_hit):
    """They may have been evicted, or an engine that reused one before has another reason now."""
    known = Granularity()
    if had_hit:
        known.observe_hit(5 * MAX_FLOOR_TOKENS)
    for _ in range(4 * MIN_LONG_MISSES):
        known.observe_miss(2 * MAX_FLOOR_TOKENS, is_recent=is_recent)
    assert known.floor_tokens == 0


def test_of_an_engine_that_never_reuses_anything_nothing_is_expected_until_it_does():
    """However long the prompts are: its cache is turned off."""
    known, held = Granularity(), 2 * MAX_FLOOR_TOKENS
    for _ in range(MIN_LONG_MISSES - 1):
        known.observe_miss(held, is_recent=True)
    assert known.usable(held) == held
    for _ in range(MIN_MISSES):
        known.observe_miss(held, is_recent=True)
    assert (known.usable(held), known.is_coarse) == (0, True)
    known.observe_hit(held)
    assert known.usable(held) == held


def test_small_blocks_make_no_difference_to_routing():
    known = Granularity()
    for count in (COARSE_TOKENS // 2, COARSE_TOKENS, 3 * COARSE_TOKENS // 2):
        known.observe(count)
    assert (known.block_tokens, known.is_coarse) == (COARSE_TOKENS // 2, False)


def test_until_the_size_of_blocks_is_known_they_explain_what_up_to_three_of_them_hold():
    """The largest known block, or the common divisor of the first counts; afterwards their size decides alone."""
    granularity = Granularity()
    assert (granularity.may_explain(3 * 2_096), granularity.may_explain(3 * 2_096 + 1)) == (True, False)
    granularity.observe(1_056)
    granularity.observe(1_584)
    assert (granularity.may_explain(3 * 528), granularity.may_explain(3 * 528 + 1)) == (True, False)
    granularity.observe(2_112)
    assert granularity.block_tokens == 528
    assert not granularity.may_explain(1)


def test_an_engine_without_blocks_explains_nothing_by_them():
    granularity = Granularity()
    for count in (1_000, 1_001):
        granularity.observe(count)
    assert not granularity.may_explain(1)


def test_a_bound_below_which_nothing_is_expected_counts_from_the_size_of_coarse_blocks_on():
    """Do not round for a smaller one."""
    known = Granularity()
    for _ in range(MIN_MISSES):
        known.observe_miss(COARSE_TOKENS // FLOOR_GROWTH, is_recent=True)
    assert known.floor_tokens == COARSE_TOKENS
    assert known.usable(COARSE_TOKENS) == 0

"""The block size of an engine, and the blocks at an end that it leaves unused, from the counts that it reports."""

from __future__ import annotations

import pytest

from cache.index.granularity import MIN_ENDS, MIN_REPEATED, Granularity


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
    assert known.tolerance_tokens() == 3 * 528
    for _ in range(MIN_ENDS):
        known.observe_end(2_700, 2_112)
    assert known.lag_blocks == 1
    assert known.usable(2_700) == 2_112
    assert known.tolerance_tokens() == 528
    known.observe(16)
    assert (known.block_tokens, known.lag_blocks) == (16, 0), "what was learned of larger blocks is void"

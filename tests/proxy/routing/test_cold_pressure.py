"""Whether cold turns must wait: work that is done again."""

from __future__ import annotations

from math import log

import pytest

from proxy.routing.cold_pressure import (
    CROWDED_SECONDS,
    CROWDED_SHARE,
    ENDED_AFTER_PAUSES,
    FIRST_PAUSE_SECONDS,
    MEMORY_SECONDS,
    MIN_COMPUTED_TOKENS,
    NEED_SECONDS,
    OFF_SHARE,
    PAUSE_STEP,
    RESTING_SECONDS,
    ColdPressure,
    ServedPrompts,
)


def test_a_prompt_that_continues_a_served_one_is_known_to_that_depth():
    """Also if the last block of the former was not whole and is another in the latter."""
    served = ServedPrompts()
    served.note([1, 2, 3, 4], 0, 4.0, 0.0, 0.0)
    assert served.depth([1, 2, 3, 4, 5, 6]) == 4
    assert served.depth([1, 2, 3, 9, 10]) == 3
    assert served.depth([1, 2, 8]) == 0


def test_a_prompt_that_continues_one_of_a_single_block_is_known_too():
    """As short agents' prompts are in large blocks."""
    served = ServedPrompts()
    served.note([1], 0, 1.0, 0.0, 0.0)
    assert served.depth([1, 2, 3]) == 1


def test_a_session_needs_its_room_for_as_long_as_its_next_turn_may_come():
    """At the last moment, too."""
    served = ServedPrompts()
    served.note([1, 2, 3], 0, 3_000.0, 1_000.0, 0.0)
    last_seconds = ENDED_AFTER_PAUSES * FIRST_PAUSE_SECONDS
    assert served.needed_tokens(last_seconds) == 2_000.0
    assert served.needed_tokens(last_seconds + 0.1) == 0.0


def test_a_prompt_that_was_not_sent_after_all_is_unknown_and_its_session_is_where_it_was():
    """It was refused, or its client left; nothing of it was computed."""
    served = ServedPrompts()
    fresh = served.note([7, 8, 9], 0, 9_000.0, 0.0, 0.0)
    served.withdraw(fresh, 1.0)
    assert (len(served), served.needed_tokens(1.0)) == (0, 0.0)
    served.note([1, 2, 3], 0, 3_000.0, 1_000.0, 0.0)
    longer = [1, 2, 3, 4, 5]
    further = served.note(longer, 3, 5_000.0, 3_000.0, 50.0)
    assert served.needed_tokens(51.0) == 4_000.0
    served.withdraw(further, 100.0)
    served.withdraw(further, 100.0)
    assert (served.depth(longer), served.needed_tokens(101.0)) == (3, 2_000.0)


def test_a_prompt_that_another_continues_stays_known_though_it_was_not_sent_itself():
    """A client that asks again while its first request waits: the second one counts, then neither."""
    served = ServedPrompts()
    first = served.note([1, 2, 3], 0, 3_000.0, 0.0, 0.0)
    again = served.note([1, 2, 3], 3, 3_000.0, 0.0, 1.0)
    served.withdraw(first, 2.0)
    assert served.depth([1, 2, 3]) == 3
    served.withdraw(again, 3.0)
    assert len(served) == 0


def test_only_the_latest_prompts_are_remembered():
    """A bound on memory; those used last stay."""
    served = ServedPrompts(most=4)
    for name in (10, 20, 30):
        served.note([name, name + 1], 0, 2.0, 0.0, 0.0)
    assert len(served) == 4
    assert (served.depth([10, 11]), served.depth([20, 21]), served.depth([30, 31])) == (0, 2, 2)


def test_what_sessions_need_is_the_own_part_of_each_that_goes_on():
    """The last prompt of each counts, minus what it shared at its first turn, until it was silent for long."""
    served = ServedPrompts()
    served.note([1, 2, 3], 0, 3_000.0, 1_000.0, 0.0)
    served.note([7, 8, 9], 0, 5_000.0, 0.0, 0.0)
    assert served.needed_tokens(1.0) == 2_000 + 5_000
    longer = [1, 2, 3, 4, 5]
    served.note(longer, served.depth(longer), 6_000.0, 4_000.0, 10.0)
    assert served.needed_tokens(11.0) == 5_000 + 5_000
    assert served.needed_tokens(1_000.0) == 0.0


def test_a_session_rests_where_its_turn_ended_until_the_next_one_comes_or_it_is_silent():
    """Whole prompts, by replica; what was never sent does not rest."""
    served = ServedPrompts()
    served.note([1, 2, 3], 0, 3_000.0, 1_000.0, 0.0)
    served.note([7, 8, 9], 0, 5_000.0, 0.0, 0.0)
    assert served.resting_tokens(0, 5.0) == 0.0
    served.ended(3, 0, 5.0)
    served.ended(9, 0, 6.0)
    served.ended(99, 0, 6.0)
    assert (served.resting_tokens(0, 7.0), served.resting_tokens(1, 7.0)) == (8_000.0, 0.0)
    longer = [1, 2, 3, 4, 5]
    served.note(longer, served.depth(longer), 6_000.0, 3_000.0, 8.0)
    assert served.resting_tokens(0, 9.0) == 5_000.0
    assert served.resting_tokens(0, 6.0 + RESTING_SECONDS) == 5_000.0
    assert served.resting_tokens(0, 6.1 + RESTING_SECONDS) == 0.0


def test_turns_that_rest_no_longer_are_forgotten_though_none_waits():
    """Else each answer would be remembered for ever by a fleet with room for all."""
    served = ServedPrompts()
    for number in range(1_000):
        now = RESTING_SECONDS * number
        served.note([2 * number, 2 * number + 1], 0, 1_000.0, 0.0, now)
        served.ended(2 * number + 1, 0, now)
    assert len(served._ended[0]) <= 2  # noqa: SLF001 - nothing else shows it


def test_a_prompt_that_several_requests_had_rests_once():
    """It is in the cache once."""
    served = ServedPrompts()
    for _ in range(3):
        served.note([1, 2, 3], 0, 3_000.0, 0.0, 0.0)
    for _ in range(3):
        served.ended(3, 0, 1.0)
    assert served.resting_tokens(0, 2.0) == 3_000.0


def test_cold_turns_wait_once_half_of_the_work_was_done_before_and_until_less_than_a_third_is():
    """And as long as any waits."""
    pressure = ColdPressure()
    pressure.observe(100_000, 49_000, 0.0)
    assert not pressure.is_on(0.0, 0)
    pressure.observe(100_000, 55_000, 0.0)
    assert pressure.is_on(0.0, 0)
    pressure.observe(100_000, 0, 0.0)
    assert pressure.is_on(0.0, 0)  # 104 of 300
    pressure.observe(100_000, 0, 0.0)
    assert pressure.is_on(0.0, 1)
    assert not pressure.is_on(0.0, 0)


def test_with_long_queues_everywhere_less_is_enough():
    """A fifth, which open-loop traces have at moderate load, does nothing while queues are short."""
    pressure = ColdPressure()
    pressure.observe(100_000, 20_000, 0.0)
    assert not pressure.is_on(CROWDED_SECONDS - 0.1, 0)
    assert pressure.is_on(CROWDED_SECONDS, 0)


def test_exactly_the_share_for_crowded_replicas_is_enough():
    """As with half, if they are not crowded."""
    pressure = ColdPressure()
    pressure.observe(100_000, CROWDED_SHARE * 100_000, 0.0)
    assert pressure.is_on(CROWDED_SECONDS, 0)


def test_little_work_and_old_work_say_nothing():
    """The first long prompt after an idle hour is no sign of pressure."""
    pressure = ColdPressure()
    pressure.observe(MIN_COMPUTED_TOKENS - 1, MIN_COMPUTED_TOKENS - 1, 0.0)
    assert not pressure.is_on(0.0, 0)
    pressure.observe(1_000_000, 900_000, 0.0)
    assert pressure.is_on(0.0, 0)
    pressure.observe(1.0, 0.0, 20 * MEMORY_SECONDS)
    assert pressure.repeated_share == 0.0
    assert not pressure.is_on(0.0, 0)


def test_exactly_half_is_enough_and_never_more_than_all():
    """Both shares are means, and the repeated part of an answer may be more than it computed."""
    pressure = ColdPressure()
    pressure.observe(100_000, 50_000, 0.0)
    assert pressure.is_on(0.0, 0)
    assert pressure.is_holding
    pressure.observe(0, 90_000_000, 0.0)
    assert pressure.repeated_share == 1.0


def test_a_prompt_adds_only_its_own_part_to_a_cache():
    """At least a quarter is assumed, however much prompts share."""
    served = ServedPrompts()
    assert served.own_share == 1.0
    for name in range(0, 4_000, 2):
        served.note([name, name + 1], 0, 1_000.0, 500.0, 0.0)
    assert 0.49 < served.own_share < 0.51
    for name in range(10_000, 14_000, 2):
        served.note([name, name + 1], 0, 1_000.0, 1_000.0, 0.0)
    assert served.own_share == 0.25


def test_two_sessions_that_end_alike_are_one_from_then_on():
    served = ServedPrompts()
    served.note([1, 2], 0, 1_000.0, 0.0, 0.0)
    served.note([3, 2], 0, 2_000.0, 0.0, 0.0)
    assert served.needed_tokens(1.0) == 2_000.0
    assert served.depth([1]) == 0


def test_the_share_is_a_mean_in_which_older_work_counts_less():
    """Half after 83 s; an answer that is noted late makes nothing older or younger."""
    pressure = ColdPressure()
    pressure.observe(100_000, 90_000, 10.0)
    pressure.observe(100_000, 0, 10.0 + MEMORY_SECONDS * log(2.0))
    assert pressure.repeated_share == pytest.approx(0.3)
    pressure.observe(150_000, 0, 5.0)
    assert pressure.repeated_share == pytest.approx(0.15)
    pressure.observe(0, 0, 10.0 + MEMORY_SECONDS * log(2.0))
    pressure.observe(300_000, 45_000, 10.0 + MEMORY_SECONDS * log(2.0))
    assert pressure.repeated_share == pytest.approx(0.15)


def test_the_memory_of_the_share_can_be_shorter():
    """It follows the pace of the gate."""
    pressure = ColdPressure(memory_seconds=10.0)
    pressure.observe(100_000, 100_000, 0.0)
    pressure.observe(100_000, 0, 10.0 * log(2.0))
    assert pressure.repeated_share == pytest.approx(1 / 3)


def test_each_bound_of_the_pressure_belongs_to_it():
    """The least work that says something, and the share at which turns still wait."""
    pressure = ColdPressure()
    pressure.observe(MIN_COMPUTED_TOKENS, MIN_COMPUTED_TOKENS, 0.0)
    assert pressure.repeated_share == 1.0
    assert pressure.is_on(0.0, 0)
    pressure = ColdPressure()
    pressure.observe(100_000, 100_000, 0.0)
    assert pressure.is_on(0.0, 0)
    pressure.observe(900_000, OFF_SHARE * 1_000_000 - 100_000, 0.0)
    assert pressure.is_on(0.0, 0)
    pressure.observe(1_000, 0, 0.0)
    assert not pressure.is_on(0.0, 0)


def test_sessions_that_pause_for_longer_need_their_room_for_longer():
    """Three times the mean pause, which each turn moves by a fiftieth; no less than a minute."""
    for pause_seconds, turns, least in ((500.0, 1, 0.0), (1.0, 1_000, FIRST_PAUSE_SECONDS)):
        served, mean, now = ServedPrompts(), FIRST_PAUSE_SECONDS, 0.0
        served.note([1, 2], 0, 1_000.0, 0.0, now)
        for _ in range(turns):
            now += pause_seconds
            served.note([1, 2], 2, 1_000.0, 0.0, now)
            mean += PAUSE_STEP * (pause_seconds - mean)
        last = now + max(ENDED_AFTER_PAUSES * mean, least)
        assert served.needed_tokens(last - 0.01) == 1_000.0
        assert served.needed_tokens(last + 0.01) == 0.0


def test_each_prompt_moves_the_share_that_is_its_own_by_a_fiftieth():
    """A turn shares what the first one of its session did, and no prompt more than all of it."""
    served = ServedPrompts()
    served.note([1, 2], 0, 1_000.0, 500.0, 0.0)
    assert served.own_share == pytest.approx(0.99)
    served.note([1, 2, 3], 2, 2_000.0, 1_900.0, 1.0)
    assert served.own_share == pytest.approx(0.99 + 0.02 * (0.75 - 0.99))
    before = served.own_share
    served.note([7, 8], 0, 1_000.0, 5_000.0, 2.0)
    assert served.own_share == pytest.approx(before * 0.98)
    assert served.needed_tokens(2.0) == 1_500.0


def test_a_prompt_of_no_tokens_is_its_own():
    """As one whose count is not known yet."""
    served = ServedPrompts()
    served.note([1], 0, 0.0, 0.0, 0.0)
    assert (served.own_share, served.needed_tokens(0.0)) == (1.0, 0.0)


def test_a_prompt_that_comes_back_to_a_session_that_was_withdrawn_before_finds_neither():
    """Both its turns were refused, the later one last."""
    served = ServedPrompts()
    first = served.note([1, 2], 0, 1_000.0, 0.0, 0.0)
    second = served.note([1, 2, 3, 4], 2, 2_000.0, 0.0, 1.0)
    served.withdraw(first, 2.0)
    served.withdraw(second, 3.0)
    assert (len(served), served.needed_tokens(3.0)) == (0, 0.0)


def test_a_session_whose_next_turn_was_withdrawn_continues_from_that_moment():
    """Its place in the order of last turns is the newest, and the boundaries of others are theirs."""
    served = ServedPrompts()
    served.note([1, 2], 0, 1_000.0, 0.0, 0.0)
    further = served.note([1, 2, 3, 4], 2, 3_000.0, 0.0, 10.0)
    other = served.note([9, 2], 0, 500.0, 0.0, 11.0)
    served.withdraw(further, 100.0)
    assert served.needed_tokens(100.0 + ENDED_AFTER_PAUSES * 59.0) == 1_000.0
    assert served.depth([9, 2]) == 2
    served.withdraw(other, 101.0)
    assert served.depth([1]) == 1


def test_a_sum_of_what_sessions_need_is_used_for_a_second():
    """The gate asks for it whenever work ends somewhere."""
    served = ServedPrompts()
    served.note([1, 2], 0, 1_000.0, 0.0, 0.0)
    assert served.recently_needed_tokens(0.0) == 1_000.0
    served.note([3, 4], 0, 500.0, 0.0, 0.0)
    assert served.recently_needed_tokens(NEED_SECONDS - 0.1) == 1_000.0
    assert served.recently_needed_tokens(NEED_SECONDS) == 1_500.0

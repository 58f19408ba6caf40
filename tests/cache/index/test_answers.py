"""The index learns from responses: forks in flight, renderings that shrink, other writers' answers."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from cache.index.feedback import _common_blocks
from cache.index.fingerprint import Fingerprint
from cache.index.matching import round_to_blocks
from cache.index.placement import Placement
from cache.index.prefix_index import LOADED_ROWS, MAX_IN_FLIGHT, FeedbackKind, Held, PrefixIndex, RunRow
from cache.index.rows import HolderRow
from tests.cache.index.test_prefix_index import BLOCK_BYTES, BLOCK_TOKENS, Bench, chain, fill, talk


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- forks


def test_a_fork_under_others_in_flight_counts_as_missed_once_it_was_proved(bench):
    """Two such answers correct its count; those of prompts that came before it was proved are a third needed."""
    for name in "ab":
        bench.served(talk(name, 12, system=8))
    crowd = [bench.ask(talk(name, 12, system=8)) for name in "xyz"]
    assert [each.confident for each in crowd] == [True, False, False]
    kinds = [bench.index.answered(each, 6_000, 0, 0, bench.now).learnt for each in crowd]
    assert kinds == [FeedbackKind.FORK, FeedbackKind.RECOUNTED, FeedbackKind.RECOUNTED]
    assert bench.ask(talk("w", 12, system=8)).predicted_tokens == 0


def test_forks_sent_before_their_part_was_computed_need_one_miss_more(bench):
    first = bench.ask(talk("a", 12, system=8))
    crowd = [bench.ask(talk(name, 12, system=8)) for name in "bcdef"]
    assert not any(each.proved for each in crowd)
    early = bench.index.answered(crowd[0], 6_000, 0, 0, bench.now).learnt
    assert early is FeedbackKind.NOTHING, "the first one may not have been computed yet"
    bench.index.answered(first, 6_000, 0, 0, bench.now)
    kinds = [bench.index.answered(each, 6_000, 0, 0, bench.now).learnt for each in crowd[1:4]]
    assert kinds == [FeedbackKind.FORK, FeedbackKind.FORK, FeedbackKind.RECOUNTED]
    assert bench.ask(talk("w", 12, system=8)).predicted_tokens == 0


def test_a_fork_that_hits_more_than_was_found_before_is_expected_so_far_again(bench):
    """And all of it, once all of it was found."""
    for name in "abcde":
        bench.served(talk(name, 12, system=8), 4_000 if name < "c" else 0)
    assert bench.ask(talk("v", 12, system=8)).predicted_tokens == 0
    for found, expected in ((2_000, 2_000), (4_000, 4_000)):
        bench.served(talk(f"w{found}", 12, system=8), found)
        assert bench.ask(talk(f"x{found}", 12, system=8)).predicted_tokens == pytest.approx(expected, abs=300)


def test_the_end_of_a_prompt_at_a_fork_is_worth_all_of_it_to_who_goes_on_there(bench):
    """Other prompts find less at that place, which says nothing of the one that ended there."""
    bench.served(talk("s", 8, system=8))
    for name in "abcd":
        bench.served(talk(name, 12, system=8), 0 if name > "a" else None, replica=1)
    held = bench.index.match(talk("q", 12, system=8)).held
    assert held[0].tokens == 4_000
    assert held[1].tokens < 4_000


def test_a_small_error_at_a_fork_is_put_right_at_once(bench):
    bench.served(talk("a", 12, system=8))
    feedback = bench.served(talk("b", 12, system=8), 3_400)
    assert (feedback.learnt, feedback.error_tokens) == (FeedbackKind.RECOUNTED, -600)
    assert bench.ask(talk("c", 12, system=8)).predicted_tokens == 3_400
    assert bench.depth(talk("c", 12, system=8)) == 12


def test_an_answer_at_a_fork_whose_entries_have_gone_corrects_nothing_and_brings_back_its_prompt(bench):
    """An engine holds a whole prompt at the end of its answer, and nothing that only others had in common."""
    for name in "ab":
        bench.served(talk(name, 12, system=8))
    late = bench.ask(talk("c", 12, system=8))
    right = bench.ask(talk("d", 12, system=8))
    bench.index.set_budget(0, 0)
    while bench.index.tend(bench.now):
        pass
    bench.index.set_budget(0, 2**31)
    assert bench.index.answered(late, 6_000, 0, 0, bench.now).learnt in (FeedbackKind.FORK, FeedbackKind.NOTHING)
    assert bench.index.answered(right, 6_000, 4_000, 0, bench.now).learnt in (
        FeedbackKind.RIGHT,
        FeedbackKind.NOTHING,
    )
    assert [bench.depth(talk(name, 12, system=8)) for name in "abcd"] == [8, 8, 12, 12]


# -- whole prompts


def test_a_prompt_that_is_rendered_shorter_now_is_no_eviction(bench):
    """Old reasoning is dropped by some templates: fewer tokens than its parts had are reported."""
    fill(bench, "abcdefgh", 68)
    for name in "abc":
        placement = bench.ask(talk(name, 9))
        assert bench.index.answered(placement, 2_000, 600, 0, bench.now).learnt is FeedbackKind.TAIL
    assert bench.index.replicas()[0].budget_tokens == 68 * BLOCK_TOKENS


def test_a_prompt_that_became_much_shorter_shortens_what_precedes_its_end_unless_another_prompt_shares_it(bench):
    bench.served(talk("a", 4))
    bench.served(talk("a", 5), replica=1)
    placement = bench.ask(talk("a", 5), 1)
    bench.index.answered(placement, 1_000, 0, 0, bench.now)
    assert bench.index.match(talk("a", 4)).known_tokens == 1_000
    bench.served(talk("b", 4))
    for last in "xy":
        bench.served(chain("b0", "b1", "b2", "b3", last), replica=1)
    placement = bench.ask(chain("b0", "b1", "b2", "b3", "x"), 1)
    bench.index.answered(placement, 1_000, 0, 0, bench.now)
    assert bench.index.match(talk("b", 4)).known_tokens == 4 * BLOCK_TOKENS


def test_a_prompt_of_unknown_room_that_was_partly_there_is_no_eviction(bench):
    for name in "abcdefgh":
        bench.served(talk(name, 8))
    bench.served(talk("h", 8))
    for name in "abcd":
        assert bench.served(talk(name, 8), 2_500).learnt is FeedbackKind.TAIL
    assert bench.index.replicas()[0].budget_tokens == 2**31


def test_hits_of_old_prompts_take_the_evictions_back_that_they_disprove(bench):
    """Two evictions, then a prompt older than both is found whole: the next two are again the first."""
    fill(bench, "abcdefgh", 64)
    for name in "bc":
        assert bench.served(talk(name, 8), 600).learnt is FeedbackKind.EVICTED
    assert bench.served(talk("a", 8)).learnt is FeedbackKind.RIGHT
    for name in "de":
        assert bench.served(talk(name, 8), 600).budget_tokens is None


def test_an_eviction_takes_back_a_slot_that_was_learned_and_none_that_was_stated(bench):
    bench.index.set_capacity(0, None, slots=4)
    state = bench.index._replica(0)  # noqa: SLF001 - internal state that no public name shows
    assert (state.slots, state.stated_slots) == (4, 4)
    for name in "abcd":
        bench.served(talk(name, 8), 0)
    bench.served(talk("a", 9), 8 * BLOCK_TOKENS + 900)
    assert state.slots == 5
    for name in "bcd":
        bench.served(talk(name, 8))
    for _ in range(3):
        for name in "abcd":
            bench.served(talk(name, 9), 0)
    assert state.slots >= 4


def test_a_report_of_a_prompt_with_damaged_ends_still_adds_up(bench):
    """A count of 0 for a whole prompt, then a real one."""
    bench.served(talk("a", 4))
    placement = bench.ask(talk("a", 6))
    bench.index.answered(placement, 0, None, 0, bench.now)
    assert bench.index.match(talk("a", 6)).held[0].tokens == 0
    bench.index.answered(bench.ask(talk("a", 6)), 3_000, None, 0, bench.now)
    assert bench.index.match(talk("a", 6)).held[0].tokens == 3_000


def test_counts_that_were_reported_stay_when_another_writer_reports_an_earlier_end(bench):
    """The prompts ended one after the other on one chain, and the shortest is reported again, otherwise."""
    bench.index.answered(bench.ask(talk("a", 2)), 1_000, 0, 0, bench.now)
    bench.index.answered(bench.ask(talk("a", 4)), 2_000, 1_000, 0, bench.now)
    bench.index.answered(bench.ask(talk("a", 6)), 3_000, 2_000, 0, bench.now)
    bench.index.apply_answer(0, talk("a", 2), 1_300, 0, 0)
    assert bench.index.match(talk("a", 2)).held[0].tokens == 1_300
    assert bench.index.match(talk("a", 4)).held[0].tokens == 2_000
    assert bench.index.match(talk("a", 6)).held[0].tokens == 3_000


# -- other writers


def test_the_answer_of_another_writer_teaches_what_its_own_would(bench):
    """Its tokens, what was computed, the engine's blocks and the shortest prompt that was reused."""
    prompt = talk("a", 8)
    bench.index.apply_place(0, prompt, 100.0, 0, 77, 1.0)
    bench.index.apply_answer(0, prompt, 4_100, 50, 3)
    assert bench.index.match(prompt).held[0].tokens == 100, "of another epoch"
    bench.index.apply_answer(0, prompt, 4_100, 50, 0)
    assert bench.index.match(prompt).held[0].tokens == 4_100
    own = bench.ask(talk("a", 9))
    assert (own.predicted_tokens, own.exact, own.proved, own.allowance_tokens) == (4_100, True, True, 50)
    for count in range(1, 9):
        bench.index.apply_answer(0, prompt, 4_100, 50, 0, cached_tokens=2_096 * count)
    held = bench.index.match(prompt).held[0]
    assert (held.tokens, held.unused_tokens) == (2_096, 2_004)
    assert bench.index._replica(0).shortest_hit_tokens == 4_100  # noqa: SLF001 - internal state that no public name shows


def test_an_epoch_begins_once_and_is_shown(bench):
    bench.served(talk("a", 3))
    bench.index.new_epoch(0, 4)
    bench.served(talk("b", 3))
    for epoch in (4, 3, 0):
        bench.index.new_epoch(0, epoch)
    assert (bench.index.replicas()[0].epoch, bench.depth(talk("b", 3))) == (4, 3)


def test_placements_that_nobody_ends_are_forgotten_the_oldest_first():
    """A worker that lost a request would keep a prefix from being trusted for ever, and grow."""
    index = PrefixIndex()
    empty = chain()
    first = index.place(0, talk("a", 2), 1_000, 1.0)
    index.answered(first, 1_000, 0, 0, 1.0)
    index.place(0, talk("a", 2), 1_000, 2.0)
    assert not index.place(1, empty, 0, 2.0).confident
    for _ in range(MAX_IN_FLIGHT):
        index.place(1, empty, 0, 3.0)
    assert len(index._in_flight) == MAX_IN_FLIGHT  # noqa: SLF001 - internal state that no public name shows
    assert index.place(0, talk("a", 3), 1_500, 4.0).confident


def test_what_evictions_cost_is_added_up_over_runs_and_epochs(bench):
    for name in "abc":
        bench.ask(talk(name, 4))
    bench.index.set_budget(0, 2 * BLOCK_TOKENS)
    bench.index.tend(bench.now)
    assert bench.index.replicas()[0].evicted_blocks == 10
    bench.index.new_epoch(0, 1)
    bench.index.set_budget(0, 0)
    bench.ask(talk("d", 4))
    assert bench.index.replicas()[0].evicted_blocks == 14


def test_taking_back_is_no_eviction(bench):
    """Neither of a whole run nor of its end: a later prompt of it is cold, not evicted."""
    bench.index.take_back(bench.ask(talk("a", 4)))
    bench.served(talk("b", 2))
    bench.index.take_back(bench.ask(talk("b", 6)))
    assert bench.index.replicas()[0].evicted_blocks == 0
    assert not bench.index.match(talk("a", 4)).evicted
    assert not bench.index.match(talk("b", 6)).evicted


# -- snapshots


def test_a_snapshot_leaves_out_what_nobody_holds_and_reads_a_holder_once(bench):
    for name in "ab":
        bench.served(talk(name, 4, system=2))
    rows = [row for rows in bench.index.snapshot(1) for row in rows]
    doubled = [
        msgspec.structs.replace(row, holders=(*row.holders, *row.holders, HolderRow(9, 1.0, 0, 0, 0)))
        if isinstance(row, RunRow)
        else row
        for row in rows
    ]
    other = PrefixIndex()
    for _ in other.load(doubled):
        pass
    assert {each: stats.blocks for each, stats in other.replicas().items()} == {0: 6}
    assert other.stats().residencies == bench.index.stats().residencies


def test_a_snapshot_goes_on_past_what_was_evicted_while_it_is_written(bench):
    """Runs that nobody holds any more are left out, and those after them are not."""
    for name in "abc":
        bench.served(talk(name, 4))
    rows = [row for chunk in bench.index.snapshot() for row in chunk if isinstance(row, RunRow)]
    middle = next(name for name in "abc" if array("Q", rows[1].hashes) == talk(name, 4).hashes)
    last = next(name for name in "abc" if array("Q", rows[2].hashes) == talk(name, 4).hashes)
    writing = bench.index.snapshot(1)
    while not isinstance((first := next(writing))[0], RunRow):
        pass
    for name in {*"abc"} - {middle}:
        bench.served(talk(name, 4))
    bench.index.set_budget(0, 8 * BLOCK_TOKENS)
    bench.index.tend(bench.now)
    assert bench.depth(talk(middle, 4)) == 0
    assert [row.hashes for chunk in (first, *writing) for row in chunk] == [
        rows[0].hashes,
        talk(last, 4).hashes.tobytes(),
    ]


def test_a_run_that_is_divided_while_a_snapshot_is_written_is_read_again_as_a_whole(bench):
    """Its head comes before its rest, which could not be placed otherwise."""
    for name in "abc":
        bench.served(talk(name, 4))
    writing = bench.index.snapshot(1)
    chunks = [next(writing), next(writing)]
    for name in "abc":
        bench.served(chain(f"{name}0", f"{name}1", "other"))
    other = PrefixIndex()
    for _ in other.load([row for chunk in (*chunks, *writing) for row in chunk]):
        pass
    assert [other.match(talk(name, 4)).known_blocks for name in "abc"] == [4, 4, 4]


def test_what_is_generated_after_a_prompt_is_not_expected_again_once_another_continued_it(bench):
    """The longer prompt contains it."""
    bench.served(talk("a", 4), output=100)
    assert bench.ask(talk("a", 6)).allowance_tokens == 100
    assert bench.ask(talk("a", 8)).allowance_tokens == 0


def test_hits_make_a_restart_less_likely_and_losses_more(bench):
    """Both by a share of what is left."""
    state = bench.index._replica(0)  # noqa: SLF001 - internal state that no public name shows
    shares = [state.hit_share]
    for learn in (state.saw_loss, state.saw_loss, state.saw_hit, state.saw_hit):
        learn()
        shares.append(state.hit_share)
    assert 1.0 == shares[0] > shares[1] > shares[2] < shares[3] < shares[4] < 1.0


def test_of_large_blocks_only_whole_ones_are_expected_and_the_match_keeps_its_size(bench):
    """Its bytes are those that are held."""
    state = bench.index._replica(0)  # noqa: SLF001 - internal state that no public name shows
    bench.served(talk("a", 4))
    for count in (784, 1_568, 2_352):
        state.granularity.observe(count)
    found = bench.index.match(talk("a", 4)).held
    steps = bench.index._tree.walk(talk("a", 4).hashes)  # noqa: SLF001 - as above
    round_to_blocks(found, steps, [0, 1], {0: state})
    assert found == {0: Held(4, 4 * BLOCK_BYTES, 2 * 784, 4 * BLOCK_TOKENS - 2 * 784)}


def test_pictures_in_several_prompts_are_recounted_each_in_its_own(bench):
    """A replica's tokens are those of all its prompts, and a count that was reported stays."""
    first, second = (
        Fingerprint(talk(name, 2).hashes, talk(name, 2).ends, ((100, 1_000, 50),)) for name in ("a", "b")
    )
    for prompt in (first, second):
        bench.index.place(0, prompt, 1_000, bench.now)
    assert bench.index.replicas()[0].tokens == 2_000
    placement = bench.index.place(0, second, 1_000, bench.now)
    bench.index.answered(placement, 1_400, 0, 0, bench.now)
    assert bench.index.replicas()[0].tokens == 1_000 + 1_400
    longer = Fingerprint(talk("b", 3).hashes, talk("b", 3).ends, second.media)
    placement = bench.index.place(0, longer, 1_900, bench.now)
    bench.index.answered(placement, 2_300, 1_400, 0, bench.now)
    held = bench.index.match(second).held[0]
    assert (held.blocks, held.tokens) == (2, 1_400)


def test_chains_share_the_boundaries_up_to_the_first_that_differs():
    """None at all if they differ from the start."""
    for mine, theirs, common in (("abcd", "abxy", 2), ("abcd", "xbcd", 0), ("ab", "abcd", 2), ("a", "b", 0)):
        one, other = (Placement(1, 0, 0, chain(*names), 1.0) for names in (mine, theirs))
        assert _common_blocks(one, other) == common


def test_a_long_snapshot_is_read_in_portions_and_in_the_order_of_use():
    """Sorted at once it would be a pause; so would it be to link all of it."""
    bench = Bench()
    for number in range(2_500):
        bench.ask(talk(str(number), 1))
    rows = [row for rows in bench.index.snapshot() for row in rows]
    other = PrefixIndex()
    turns = sum(1 for _ in other.load(rows))
    assert turns >= 2 * 2_500 // LOADED_ROWS
    other.set_budget(0, 3 * BLOCK_TOKENS)
    while other.tend(bench.now):
        pass
    assert [other.match(talk(str(number), 1)).known_blocks for number in (0, 2_496, 2_497, 2_499)] == [0, 0, 1, 1]


def test_another_writers_answer_places_a_prompt_that_only_other_replicas_hold(bench):
    """Its placement may have been lost on the way, or evicted here."""
    prompt = talk("a", 12)
    bench.served(prompt, replica=1)
    assert bench.depth(prompt) == 0
    bench.index.apply_answer(0, prompt, 6_000, 0, 0)
    assert (bench.depth(prompt), bench.depth(prompt, 1)) == (12, 12)
    assert bench.ask(prompt).proved


def test_another_writers_answer_of_a_past_epoch_changes_nothing(bench):
    prompt = talk("a", 12)
    bench.index.new_epoch(0, 2)
    for epoch in (1, 3):
        bench.index.apply_answer(0, prompt, 6_000, 0, epoch, cached_tokens=512)
        assert bench.depth(prompt) == 0
    bench.index.apply_answer(0, prompt, 6_000, 0, 2)
    assert bench.depth(prompt) == 12


def test_an_epoch_that_is_not_newer_is_ignored(bench):
    """It is told more than once, and may come late."""
    prompt = talk("a", 12)
    bench.index.new_epoch(0, 2)
    bench.served(prompt)
    for epoch in (1, 2):
        bench.index.new_epoch(0, epoch)
        assert bench.depth(prompt) == 12
    bench.index.new_epoch(0, 3)
    assert bench.depth(prompt) == 0

"""The index's operations one by one; test_prefix_index_model compares its set semantics with a model."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from cache.index.fingerprint import Fingerprint
from cache.index.hashing import chain_root, cut
from cache.index.prefix_index import FeedbackKind, PrefixIndex, RunRow
from cache.index.tree import EVICTED_HASHES

BLOCK_BYTES = 2_048
BLOCK_TOKENS = 500


def chain(*names: str, block_bytes: int = BLOCK_BYTES) -> Fingerprint:
    """A prompt with one block for each name."""
    hashes = array("Q", [hash(names[: i + 1]) % 2**64 for i in range(len(names))])
    return Fingerprint(hashes, array("I", [block_bytes * (i + 1) for i in range(len(names))]))


def talk(name: str, blocks: int, system: int = 0) -> Fingerprint:
    """Return a prompt of `blocks` blocks, the first `system` of which are common to all."""
    return chain(*[f"s{i}" for i in range(system)], *[f"{name}{i}" for i in range(blocks - system)])


class Bench:
    """An index with the shortest way to ask and answer it, and a clock that goes on by itself."""

    def __init__(self) -> None:
        self.index = PrefixIndex(origin=3)
        self.now = 100.0

    def ask(self, prompt: Fingerprint, replica: int = 0):
        self.now += 1.0
        return self.index.place(replica, prompt, BLOCK_TOKENS * len(prompt), self.now)

    def served(
        self, prompt: Fingerprint, cached: int | None = None, *, replica: int = 0, output: int = 0, decide=True
    ):
        """Place and answer, with what was predicted as cached if nothing else is said."""
        placement = self.ask(prompt, replica)
        cached = placement.predicted_tokens if cached is None else cached
        tokens = BLOCK_TOKENS * len(prompt)
        return self.index.answered(placement, tokens, cached, output, self.now, decide=decide)

    def depth(self, prompt: Fingerprint, replica: int = 0) -> int:
        held = self.index.match(prompt).held.get(replica)
        return held.blocks if held else 0


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- what a match says


def test_a_cold_prompt_is_known_to_nobody(bench):
    match = bench.index.match(talk("a", 4))
    assert (match.held, match.known_blocks, match.evicted, match.diverged) == ({}, 0, False, False)


def test_a_conversation_that_grew_is_not_taken_for_one_that_changed(bench):
    bench.served(talk("a", 4))
    grown = bench.index.match(talk("a", 6))
    assert (grown.known_blocks, grown.known_bytes, grown.known_tokens) == (4, 4 * BLOCK_BYTES, 4 * BLOCK_TOKENS)
    assert not grown.diverged
    changed = bench.index.match(chain("a0", "a1", "other"))
    assert (changed.known_blocks, changed.diverged) == (2, True)


def test_an_evicted_prefix_is_told_from_a_cold_one_however_often_it_was_trimmed(bench):
    bench.served(talk("a", 6))
    for blocks in (4, 2, 0):
        bench.index.set_budget(0, blocks * BLOCK_TOKENS)
        bench.index.tend(bench.now)
        match = bench.index.match(talk("a", 6))
        assert (match.known_blocks, match.evicted) == (blocks, True)
    assert not bench.index.match(talk("b", 6)).evicted


def test_the_memory_of_what_was_evicted_is_bounded(bench):
    bench.index.set_budget(0, 0)
    for i in range(EVICTED_HASHES + 50):
        bench.index.place(0, chain(str(i)), BLOCK_TOKENS, 1.0)
    assert len(bench.index._tree._evicted) == EVICTED_HASHES  # noqa: SLF001 - internal state that no public name shows
    assert not bench.index.match(chain("0")).evicted


def test_an_empty_prompt_can_be_asked_for_placed_and_answered(bench):
    empty = chain()
    assert bench.index.match(empty).held == {}
    bench.served(empty)
    assert bench.index.stats().blocks == 0


# -- how it is kept


def test_a_conversation_stays_one_node_while_it_only_grows(bench):
    for blocks in range(1, 30):
        bench.served(talk("a", blocks))
    assert bench.index.stats().nodes == 1


def test_a_block_held_by_two_is_counted_once_in_all_and_once_for_each(bench):
    bench.served(talk("a", 5), replica=0)
    bench.served(talk("a", 7), replica=1)
    assert bench.index.stats().blocks == 7
    assert [each.blocks for each in bench.index.replicas().values()] == [5, 7]


def test_the_bound_on_all_blocks_holds_whatever_the_budgets_say():
    index = PrefixIndex(max_blocks=50)
    for i in range(100):
        index.place(i % 3, talk(str(i), 5), 10, float(i))
        assert index.stats().blocks <= 50
    assert index.match(talk("99", 5)).known_blocks == 5


def test_upkeep_is_done_in_bounded_shares(bench):
    for i in range(1_200):
        bench.served(talk(str(i), 1))
    bench.index.new_epoch(0, 1)
    shares = 1
    while bench.index.tend(bench.now):
        shares += 1
    assert shares == 3
    assert bench.index.stats().nodes == 0


def test_a_removed_replica_is_forgotten(bench):
    bench.served(talk("a", 3))
    bench.index.remove(0)
    assert bench.index.match(talk("a", 3)).held == {}
    assert bench.index.replicas() == {}


def test_a_provider_forgets_by_time_and_not_by_what_it_reports(bench):
    bench.index.set_ttl(0, 300.0)
    bench.served(talk("a", 3))
    bench.served(talk("a", 4))
    for name in "bcd":
        bench.served(talk(name, 8))
        assert bench.served(talk(name, 9), 0).learnt is FeedbackKind.NOTHING
    assert bench.index.epoch(0) == 0
    bench.index.tend(bench.now + 295.0)
    assert bench.depth(talk("a", 4)) == 0
    assert bench.depth(talk("d", 9)) == 9


# -- taking back


def test_what_was_built_on_is_not_taken_back(bench):
    first = bench.ask(talk("a", 4))
    bench.ask(talk("a", 6))
    bench.index.take_back(first)
    assert bench.depth(talk("a", 6)) == 6


def test_taking_back_leaves_what_was_there_before(bench):
    bench.served(talk("a", 4))
    bench.index.take_back(bench.ask(talk("a", 9)))
    assert bench.depth(talk("a", 9)) == 4


def test_another_writers_verbs_do_what_its_own_did(bench):
    other, prompt = PrefixIndex(origin=8), talk("a", 5)
    bench.served(talk("a", 2))
    other.apply_place(0, talk("a", 2), 1_000, 0, 1, 1.0)
    placement = bench.ask(prompt)
    for _ in range(2):
        assert other.apply_place(0, prompt, 2_500, placement.epoch, placement.id, bench.now)
        assert other.match(prompt).held[0].blocks == 5
    for _ in range(2):
        other.apply_take_back(0, prompt, placement.held_blocks, placement.epoch, placement.id)
        assert other.match(prompt).held[0].blocks == 2


def test_a_delta_of_an_epoch_that_is_over_counts_for_nothing_and_a_newer_one_begins_it(bench):
    assert bench.index.apply_place(0, talk("a", 5), 1, 2, 77, 1.0)
    assert bench.index.epoch(0) == 2
    assert not bench.index.apply_place(0, talk("b", 5), 1, 1, 78, 1.0)
    bench.index.apply_take_back(0, talk("a", 5), 0, 1, 77)
    assert bench.depth(talk("a", 5)) == 5
    assert bench.depth(talk("b", 5)) == 0


# -- tokens


def test_a_prompt_once_answered_predicts_its_own_count_exactly(bench):
    prose, chinese = chain("p0", "p1"), chain("p0", "p1", "c0", "c1")
    bench.index.answered(bench.ask(prose), 900, 0, 50, bench.now)
    bench.index.answered(bench.ask(chinese), 900 + 2_700, 900, 50, bench.now)
    longer = bench.ask(chain("p0", "p1", "c0", "c1", "d0"))
    assert (longer.predicted_tokens, longer.exact, longer.confident) == (3_600, True, True)
    fork = bench.ask(chain("p0", "p1", "x0"))
    assert (fork.predicted_tokens, fork.exact) == (900, True)


def test_a_fork_learns_its_count_from_what_was_cached_and_keeps_the_branches_right(bench):
    """The system prompt is dense, the rest is not: bytes alone would give 500 a block to both."""
    one, two, three = (talk(name, 4, system=2) for name in "xyz")
    bench.index.answered(bench.ask(one), 2_000, 0, 0, bench.now)
    fork = bench.ask(two)
    assert (fork.predicted_tokens, fork.exact) == (1_000, False)
    feedback = bench.index.answered(fork, 2_000, 1_280, 0, bench.now)
    assert feedback.learnt is FeedbackKind.RIGHT
    assert bench.ask(three).predicted_tokens == 1_280
    assert [bench.index.match(each).held[0].tokens for each in (one, two)] == [2_000, 2_000]


def test_a_wrong_count_at_a_fork_is_not_taken_for_an_eviction(bench):
    bench.index.answered(bench.ask(talk("x", 12, system=8)), 6_000, 0, 0, bench.now)
    feedback = bench.index.answered(bench.ask(talk("y", 12, system=8)), 6_000, 3_000, 0, bench.now)
    assert (feedback.learnt, feedback.budget_tokens) == (FeedbackKind.RECOUNTED, None)
    assert bench.ask(talk("z", 12, system=8)).predicted_tokens == 3_000


@pytest.mark.parametrize("reported", [0, 1, 700, 10**15])
def test_the_path_adds_up_to_any_report(bench, reported):
    bench.served(talk("a", 3))
    bench.index.answered(bench.ask(talk("a", 7, system=0)), reported, 0, 0, bench.now)
    tokens = bench.index.match(talk("a", 7)).held[0].tokens
    assert tokens == min(reported, 2**30)
    assert bench.index.replicas()[0].tokens == tokens


# -- confidence


def test_a_prediction_is_confident_when_answered_and_not_in_flight(bench):
    first = bench.ask(talk("a", 4))
    assert not bench.ask(talk("a", 5)).confident
    bench.index.settled(first)
    bench.served(talk("b", 4))
    sibling = bench.ask(talk("b", 5))
    assert sibling.confident
    assert not bench.ask(talk("b", 6)).confident
    assert bench.depth(talk("b", 6)) == 6


# -- the closed loop


def test_nothing_is_learnt_where_the_upstream_does_not_say(bench):
    bench.served(talk("a", 9))
    feedback = bench.index.answered(bench.ask(talk("a", 9)), 4_500, None, 0, bench.now)
    assert (feedback.learnt, feedback.error_tokens, feedback.predicted_tokens) == (FeedbackKind.NOTHING, None, 4_500)


def test_two_confident_misses_on_different_prefixes_mean_a_restart(bench):
    for name in "abcabc":
        bench.served(talk(name, 8))
    late = bench.ask(talk("c", 9))
    assert bench.served(talk("a", 9), 0).learnt is FeedbackKind.SUSPECT
    feedback = bench.served(talk("b", 9), 0)
    assert (feedback.learnt, feedback.epoch) == (FeedbackKind.RESTARTED, 1)
    assert bench.depth(talk("a", 9)) == 0
    assert bench.depth(talk("b", 9)) == 9
    assert bench.index.answered(late, 4_500, 0, 0, bench.now).learnt is FeedbackKind.STALE


def test_two_misses_on_one_conversation_or_with_a_hit_between_are_no_restart(bench):
    for name in "abcdefabcdef":
        bench.served(talk(name, 8))
    assert bench.served(talk("a", 9), 0).learnt is FeedbackKind.SUSPECT
    assert bench.served(talk("a", 10), 0).learnt is FeedbackKind.SUSPECT
    assert bench.served(talk("c", 10)).learnt is FeedbackKind.RIGHT
    assert bench.served(talk("b", 9), 0).learnt is FeedbackKind.SUSPECT
    assert bench.index.epoch(0) == 0


def test_an_engine_that_loses_prompts_without_a_restart_needs_more_misses_in_a_row_for_one(bench):
    """As one that reuses whole prompts only, under pressure: its misses look like a restart, and are no news."""
    talks = [talk(f"n{n}", 8) for n in range(30)]
    for _ in range(2):
        for each in talks:
            bench.served(each)
    assert bench.index._replica(0).restart_misses == 2  # noqa: SLF001 - internal state that no public name shows
    for lost, kept in zip(talks[:5], talks[5:10], strict=True):
        assert bench.served(lost, 0).learnt is FeedbackKind.SUSPECT
        bench.served(kept)
    needed = bench.index._replica(0).restart_misses  # noqa: SLF001 - internal state that no public name shows
    assert 3 <= needed <= 8
    kinds = [bench.served(each, 0).learnt for each in talks[10 : 10 + needed]]
    assert kinds == [FeedbackKind.SUSPECT] * (needed - 1) + [FeedbackKind.RESTARTED]


def test_an_engine_that_never_reused_anything_is_not_taken_for_one_that_restarted(bench):
    for name in "ab":
        bench.served(talk(name, 8))
    for name in "aba":
        assert bench.served(talk(name, 9), 0).learnt is FeedbackKind.TAIL
    assert bench.served(talk("b", 9), 0).learnt is FeedbackKind.RIGHT, "nothing is expected any more"
    assert bench.index.epoch(0) == 0


def test_what_is_held_is_reduced_to_what_the_engine_reuses_of_it(bench):
    """A look-up rounds to the engine's blocks, and a new epoch forgets them."""
    for turn in range(10):
        bench.served(talk("a", 8 + turn), (7 + turn) * BLOCK_TOKENS // 2_096 * 2_096)
    held = bench.index.match(talk("a", 17)).held[0]
    assert held.tokens % 2_096 == 0
    assert held.tokens + held.unused_tokens == 17 * BLOCK_TOKENS
    bench.index.new_epoch(0, 1)
    bench.served(talk("a", 17), 0)
    held = bench.index.match(talk("a", 17)).held[0]
    assert (held.tokens, held.unused_tokens) == (17 * BLOCK_TOKENS, 0)


def test_a_hit_of_what_was_computed_after_the_first_miss_disproves_nothing(bench):
    """A shared head that came back with the first answer is no proof that the rest was still there."""
    for name in "abcabc":
        bench.served(talk(name, 8, system=4))
    assert bench.served(talk("a", 9, system=4), 0).learnt is FeedbackKind.SUSPECT
    assert bench.served(talk("b", 9, system=4), 4 * BLOCK_TOKENS).learnt is FeedbackKind.RESTARTED


def test_who_may_not_decide_only_hears_what_follows(bench):
    for name in "abcabc":
        bench.served(talk(name, 8))
    bench.served(talk("a", 9), 0, decide=False)
    assert bench.served(talk("b", 9), 0, decide=False).epoch == 1
    assert bench.index.epoch(0) == 0
    assert bench.depth(talk("a", 9)) == 9


def fill(bench, names: str, budget_blocks: int) -> None:
    """Conversations of eight blocks, in this order, of which the last is proven to be there."""
    bench.index.set_capacity(0, budget_blocks * BLOCK_TOKENS)
    for name in names:
        bench.served(talk(name, 8))
    bench.served(talk(names[-1], 8))


def test_evictions_of_several_prompts_shrink_a_full_budget_and_one_or_two_do_not(bench):
    fill(bench, "abcdefgh", 64)
    for name in "ab":
        feedback = bench.served(talk(name, 8), 600)
        assert (feedback.learnt, feedback.budget_tokens) == (FeedbackKind.EVICTED, None)
    feedback = bench.served(talk("c", 8), 600)
    assert (feedback.learnt, feedback.budget_tokens) == (FeedbackKind.LESS, 64 * BLOCK_TOKENS * 99 // 100)
    again = bench.served(talk("d", 8), 600)
    assert (again.learnt, again.budget_tokens) == (FeedbackKind.EVICTED, None)
    assert bench.index.replicas()[0].tokens <= 64 * BLOCK_TOKENS * 99 // 100


def test_one_prompt_evicted_time_and_again_is_one_piece_of_evidence(bench):
    fill(bench, "abcdefgh", 64)
    for _ in range(5):
        for name in "bcdefgh":
            bench.ask(talk(name, 8))
        assert bench.served(talk("a", 8), 600).learnt is FeedbackKind.EVICTED
    assert bench.index.replicas()[0].budget_tokens == 64 * BLOCK_TOKENS


def test_evictions_of_one_tenant_shrink_no_budget_that_several_use(bench):
    bench.index.place(0, talk("z", 1), BLOCK_TOKENS, bench.now, source=7)
    fill(bench, "abcdefgh", 66)
    for name in "abcdef":
        assert bench.served(talk(name, 8), 600).learnt is FeedbackKind.EVICTED
    assert bench.index.replicas()[0].budget_tokens == 66 * BLOCK_TOKENS


def test_a_budget_never_shrinks_below_what_was_proven_to_be_there(bench):
    fill(bench, "abcdefgh", 64)
    bench.served(talk("b", 8))  # seven newer conversations are there with it
    for _ in range(30):
        for name in "acdefgh":
            bench.served(talk(name, 8), 600)
        proven = bench.index._replicas[0].proven_tokens  # noqa: SLF001 - internal state that no public name shows
        assert bench.index.replicas()[0].budget_tokens >= proven > 0


def test_a_shortfall_before_the_room_is_used_up_moves_no_budget(bench):
    fill(bench, "abcdefgh", 200)
    for name in "abcdefg":
        assert bench.served(talk(name, 8), 600).learnt is FeedbackKind.TAIL
    assert bench.index.replicas()[0].budget_tokens == 200 * BLOCK_TOKENS


def test_an_unknown_budget_becomes_what_the_evicted_prompts_needed(bench):
    for name in "abcdefgh":
        bench.served(talk(name, 8))
    bench.served(talk("h", 8))
    for name in "abc":
        assert bench.served(talk(name, 8), 600).budget_tokens is None
    assert bench.served(talk("d", 8), 600).budget_tokens == 64 * BLOCK_TOKENS


def test_a_budget_stays_under_the_stated_capacity_and_comes_back_to_it(bench):
    bench.index.set_capacity(0, 64 * BLOCK_TOKENS)
    for name in "abcdefgh":
        bench.served(talk(name, 8))
    assert bench.served(talk("new", 12), 4_000).budget_tokens is None
    bench.index.set_budget(0, 10**6)
    assert bench.index.replicas()[0].budget_tokens == 64 * BLOCK_TOKENS
    bench.index.set_budget(0, 40 * BLOCK_TOKENS)
    names = "abcde"
    for _ in range(400):
        for name in names:
            bench.served(talk(name, 8))
    assert bench.index.replicas()[0].budget_tokens > 40 * BLOCK_TOKENS


def test_another_conversation_is_never_forgotten_for_a_shortfall(bench):
    bench.index.set_budget(0, 100 * BLOCK_TOKENS)
    for name in "abc":
        bench.served(talk(name, 8, system=6))
    bench.served(talk("a", 9, system=6), 600)
    for name, blocks in (("a", 9), ("b", 8), ("c", 8)):
        assert bench.depth(talk(name, blocks, system=6)) == blocks


def test_a_fork_that_does_not_hit_twice_is_worth_what_was_found(bench):
    """The engine renders something else at that place: the next prompt that forks off there is not expected there."""
    for name in "abc":
        bench.served(talk(name, 12, system=8))
    assert bench.served(talk("d", 12, system=8), 0).learnt is FeedbackKind.FORK
    second = bench.ask(talk("e", 12, system=8))
    assert second.predicted_tokens == 8 * BLOCK_TOKENS
    assert bench.index.answered(second, 6_000, 0, 0, bench.now).learnt is FeedbackKind.RECOUNTED
    assert bench.ask(talk("f", 12, system=8)).predicted_tokens == 0
    assert bench.index.match(talk("a", 12, system=8)).held[0].tokens == 6_000


def test_a_fork_that_was_counted_too_short_is_put_right_by_one_answer(bench):
    for name in "abc":
        bench.served(talk(name, 12, system=8))
    for name in "de":
        bench.served(talk(name, 12, system=8), 0)
    assert bench.served(talk("f", 12, system=8), 4_000).learnt is FeedbackKind.RECOUNTED
    assert bench.ask(talk("g", 12, system=8)).predicted_tokens == pytest.approx(4_000, abs=200)


@pytest.mark.parametrize("confirmed", [True, False])
def test_an_engine_that_kept_what_the_index_dropped_does_not_change_the_count_of_a_fork(bench, confirmed):
    """Or every prompt that forks off there would be expected to be cached as far as the one that was kept."""
    bench.index.set_budget(0, 20 * BLOCK_TOKENS)
    bench.served(talk("a", 20, system=8))
    for name in "bc":
        if confirmed:
            bench.served(talk(name, 14, system=8))
        else:
            bench.ask(talk(name, 14, system=8))
    bench.index.tend(bench.now)
    assert bench.depth(talk("a", 20, system=8)) == 8
    before = bench.ask(talk("d", 14, system=8)).predicted_tokens
    assert bench.served(talk("a", 21, system=8), 20 * BLOCK_TOKENS).learnt is FeedbackKind.MORE
    assert bench.ask(talk("e", 14, system=8)).predicted_tokens == before


def test_a_sibling_in_flight_makes_a_shortfall_no_news(bench):
    bench.served(talk("a", 8))
    bench.ask(talk("a", 9))
    assert bench.served(talk("a", 10), 0).learnt is FeedbackKind.NOTHING


def test_more_than_predicted_grows_a_full_budget_and_the_engines_own_output_does_not(bench):
    bench.index.set_budget(0, 20 * BLOCK_TOKENS)
    bench.served(talk("a", 8), output=3_000)
    assert bench.served(talk("a", 18), 8 * BLOCK_TOKENS + 3_000).learnt is not FeedbackKind.MORE
    bench.served(talk("b", 8))
    feedback = bench.served(talk("c", 10), 4_000)
    assert (feedback.learnt, feedback.budget_tokens) == (FeedbackKind.MORE, 10_251)


def test_a_budget_that_is_not_full_does_not_grow(bench):
    bench.index.set_budget(0, 10**6)
    assert bench.served(talk("c", 10), 4_000).budget_tokens is None


# -- snapshots


def rebuilt(index: PrefixIndex, replica_of=None) -> PrefixIndex:
    other = PrefixIndex(origin=9)
    for _ in other.load([row for rows in index.snapshot(2) for row in rows], replica_of):
        pass
    return other


def test_a_rebuilt_index_evicts_in_the_same_order_and_knows_the_same_counts(bench):
    for name in "abcab":
        bench.served(talk(name, 6, system=3))
    other = rebuilt(bench.index)
    for budget in range(15 * BLOCK_TOKENS, 0, -300):
        for each in (bench.index, other):
            each.set_budget(0, budget)
            each.tend(bench.now)
        for name in "abc":
            assert bench.index.match(talk(name, 6, system=3)) == other.match(talk(name, 6, system=3))


def test_replica_numbers_are_translated_and_unknown_ones_left_out(bench):
    bench.served(talk("a", 3), replica=0)
    bench.served(talk("a", 5), replica=1)
    other = rebuilt(bench.index, {0: 7})
    assert {replica: held.blocks for replica, held in other.match(talk("a", 5)).held.items()} == {7: 3}
    assert other.replicas().keys() == {7}


def test_a_time_to_live_is_not_taken_from_a_snapshot(bench):
    """It is configured, and whoever wrote the snapshot may have had another configuration."""
    bench.served(talk("a", 3))
    bench.index.set_ttl(0, 60.0)
    other = rebuilt(bench.index)
    other.tend(1e6)
    assert 0 in other.match(talk("a", 3)).held


def test_a_snapshot_stays_prefix_closed_while_the_index_changes_under_it(bench):
    for name in "abcdef":
        bench.served(talk(name, 6, system=3))
    rows = []
    for turn, chunk in enumerate(bench.index.snapshot(1), 1):
        rows.extend(chunk)
        bench.served(chain("s0", f"new{turn}"), replica=turn % 3)
        bench.served(talk("abcdef"[turn % 6], 9, system=3), replica=1)
        bench.index.set_budget(0, max(1_000, 9_000 - 1_000 * turn))
    other = PrefixIndex()
    for _ in other.load(rows):
        pass
    _assert_closed(other)
    for replica in range(3):
        other.set_budget(replica, 0)
    while other.tend(0.0):
        pass
    assert other.stats().nodes == 0


def test_a_leaf_touched_between_two_chunks_is_still_evicted_before_its_parent(bench):
    for name in "ab":
        bench.served(talk(name, 4, system=2))
    rows = []
    for chunk in bench.index.snapshot(1):
        rows.extend(chunk)
        if len(rows) == 2:  # the replica and the common parent are written
            for name in "ab":
                bench.served(talk(name, 4, system=2))
    other = PrefixIndex()
    for _ in other.load(rows):
        pass
    other.set_budget(0, 4 * BLOCK_TOKENS)
    other.tend(0.0)
    assert sorted(other.match(talk(name, 4, system=2)).known_blocks for name in "ab") == [2, 4]


def _assert_closed(index: PrefixIndex) -> None:
    stack = list((index._tree.root.children or {}).values())  # noqa: SLF001 - internal state that no public name shows
    while stack:
        node = stack.pop()
        for child in (node.children or {}).values():
            assert child.held.keys() <= node.held.keys()
            stack.append(child)


def test_loading_lets_go_of_what_was_there_little_by_little(bench):
    bench.served(talk("a", 3))
    rows = [row for rows in bench.index.snapshot() for row in rows]
    bench.served(talk("b", 3))
    for _ in bench.index.load(rows):
        pass
    assert bench.depth(talk("a", 3)) == 3
    assert bench.depth(talk("b", 3)) == 0
    assert not bench.index.tend(bench.now)
    assert not bench.index._eviction._retired  # noqa: SLF001 - internal state that no public name shows


def test_the_index_goes_on_while_another_is_read_in_and_then_is_the_other(bench):
    for i in range(300):
        bench.served(talk(f"a{i}", 3, system=1))
    rows = [row for rows in bench.index.snapshot() for row in rows]
    live = Bench()
    live.served(talk("mine", 4))
    live.index.set_ttl(0, 5_000.0)
    turns = 0
    for _ in live.index.load(rows):
        turns += 1
        live.served(talk("mine", 4 + turns))
        assert live.depth(talk("mine", 4 + turns)) == 4 + turns
        assert live.depth(talk("a7", 3, system=1)) == 0
    assert turns > 3
    assert live.depth(talk("a7", 3, system=1)) == 3
    assert live.depth(talk("mine", 4)) == 0
    live.index.tend(bench.now + 5_001.0)
    assert live.depth(talk("a7", 3, system=1)) == 0


def test_an_epoch_that_began_while_a_snapshot_was_read_in_stays_empty(bench):
    bench.served(talk("a", 3))
    rows = [row for rows in bench.index.snapshot() for row in rows]
    other = PrefixIndex()
    for _ in other.load(rows):
        other.new_epoch(0, 4)
    assert (other.epoch(0), other.match(talk("a", 3)).held) == (4, {})


def test_a_run_that_was_not_written_so_is_left_out_with_what_hangs_on_it(bench):
    bench.served(talk("a", 4, system=2))
    bench.served(talk("b", 4, system=2))
    rows = [row for rows in bench.index.snapshot() for row in rows]
    broken = [
        msgspec.structs.replace(row, ends=row.ends[:-1]) if isinstance(row, RunRow) and row.parent is None else row
        for row in rows
    ]
    other = PrefixIndex()
    for _ in other.load(broken):
        pass
    assert other.stats().blocks == 0


def test_a_real_conversation_is_found_turn_after_turn():
    """Cut and index together: each follow-up finds all of the turn before."""
    index, root, messages, before = PrefixIndex(), chain_root([b"model"]), [b"system " * 300], 0
    for turn in range(8):
        messages = [*messages, b"question %d " % turn * 40]
        prompt = cut(root, messages)
        placement = index.place(1, prompt, prompt.size_bytes / 4, float(turn))
        assert placement.held_blocks == before
        before = len(prompt)
        index.answered(placement, prompt.size_bytes // 4, placement.predicted_tokens, 9, float(turn))


def test_a_part_before_or_behind_an_image_has_the_tokens_of_its_text_here_and_at_other_writers():
    """Forty blocks, of which an image takes most bytes and few tokens: it absorbs the error of the estimate."""
    hashes = array("Q", range(1, 41))
    ends = array("I", range(2_000, 82_000, 2_000))
    picture = Fingerprint(hashes, ends, ((4_000, 72_000, 1_000),))
    mine, theirs = PrefixIndex(), PrefixIndex(origin=1)
    placement = mine.place(0, picture, 4_000.0, 1.0)
    mine.answered(placement, 3_256, 0, 10, 2.0)
    theirs.apply_place(0, picture, 4_000.0, 0, placement.id, 1.0)
    theirs.apply_answer(0, picture, 3_256, 10, 0)
    for index in (mine, theirs):
        held = [index.match(Fingerprint(hashes[:blocks], ends[:blocks])).held[0].tokens for blocks in (1, 2, 36, 40)]
        assert held == [500, 1_000, 1_256, 3_256]


def test_an_image_with_too_high_an_estimate_leaves_the_text_its_tokens():
    """The whole prompt has fewer tokens than the image was guessed to have: both are scaled, then the image alone."""
    picture = Fingerprint(array("Q", (1, 2)), array("I", (4_000, 84_000)), ((4_000, 84_000, 3_000),))
    index = PrefixIndex()
    placement = index.place(0, picture, 2_000.0, 1.0)
    index.answered(placement, 1_100, 0, 0, 2.0)
    assert index.match(Fingerprint(array("Q", (1,)), array("I", (4_000,)))).held[0].tokens == 500

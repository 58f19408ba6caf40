"""The index's memory of a replica, by which later responses are judged, is bounded."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from cache.index.feedback import MAX_EVICTIONS, judge, new_budget
from cache.index.fingerprint import Fingerprint
from cache.index.nodes import Node, ReplicaEntries, Residency, Step
from cache.index.placement import FeedbackKind, Placement
from cache.index.prefix_index import PrefixIndex
from cache.index.replica_state import UNLIMITED_TOKENS, ReplicaState
from tests.support.workers import prompt


def test_evictions_that_decide_nothing_are_not_remembered_for_ever() -> None:
    """A replica that never has what was predicted, over hundreds of different prompts."""
    index = PrefixIndex(origin=1)
    for round_number in range(3):
        for seed in range(60):
            placement = index.place(0, prompt(seed, 6_000), 5_000, float(round_number))
            index.answered(placement, 5_000, 100, 10, float(round_number))
    assert len(index._replica(0).evictions) <= MAX_EVICTIONS  # noqa: SLF001 - internal state that no public name shows


# -- each bound, by a replica whose state is written down


def entries(tokens: int) -> ReplicaEntries:
    held = ReplicaEntries(0, Residency(None, None, None, 0.0, 0))
    held.tokens = tokens
    return held


def replica(tokens: int = 9_000, budget: int = 10_000, *, block: int = 16, **fields: Any) -> ReplicaState:
    """A full replica of known capacity, whose blocks are known."""
    state = ReplicaState(entries(tokens), budget_tokens=budget, capacity_tokens=budget)
    for count in (block, 2 * block, 3 * block) if block else ():
        state.granularity.observe(count)
    for name, value in fields.items():
        setattr(state, name, value)
    return state


def placed(seed: int = 0, **fields: Any) -> Placement:
    """A whole earlier prompt of 5,000 tokens that is confidently expected."""
    expected = {
        "held_blocks": 3,
        "held_tokens": 5_000,
        "predicted_tokens": 5_000,
        "proved": True,
        "confident": True,
        "exact": True,
        "whole": True,
        "reuse_tokens": 9_000,
        "source": seed,
    }
    hashes = array("Q", [10 * seed + 1, 10 * seed + 2, 10 * seed + 3, 10 * seed + 4])
    fingerprint = Fingerprint(hashes, array("I", [1, 2, 3, 4]))
    return Placement(seed, 0, 0, fingerprint, 0.0, **{**expected, **fields})


NOTHING, RIGHT, FORK, TAIL = FeedbackKind.NOTHING, FeedbackKind.RIGHT, FeedbackKind.FORK, FeedbackKind.TAIL
EVICTED, LESS, MORE, SUSPECT = FeedbackKind.EVICTED, FeedbackKind.LESS, FeedbackKind.MORE, FeedbackKind.SUSPECT
RESTARTED = FeedbackKind.RESTARTED


@pytest.mark.parametrize(
    ("state", "placement", "cached", "learnt"),
    [
        (replica(), placed(), None, NOTHING),
        (replica(ttl_seconds=60.0), placed(), 0, NOTHING),
        (replica(), placed(), 5_000 - 128, RIGHT),
        (replica(), placed(), 5_000 - 129, EVICTED),
        (replica(), placed(), 5_000 + 128, RIGHT),
        (replica(), placed(), 5_000 + 129, MORE),
        (replica(), placed(tolerance_tokens=300), 4_700, RIGHT),
        (replica(), placed(tolerance_tokens=300), 4_699, EVICTED),
        (replica(), placed(allowance_tokens=50), 5_178, RIGHT),
        (replica(), placed(allowance_tokens=50), 5_179, MORE),
        (replica(block=528), placed(predicted_tokens=3_696 + 3 * 528), 3_696, RIGHT),
        (replica(block=528), placed(predicted_tokens=3_697 + 3 * 528), 3_696, EVICTED),
        (replica(), placed(confident=False), 1_000, NOTHING),
        (replica(), placed(whole=False), 1_000, FORK),
        (replica(), placed(predicted_tokens=9_000), 5_900, RIGHT),
        # older than what was shown to be cached, or not
        (replica(proven_tokens=8_999), placed(), 1_000, EVICTED),
        (replica(proven_tokens=9_000), placed(), 1_000, TAIL),
        # nearly full, or not
        (replica(8_500), placed(), 1_000, EVICTED),
        (replica(8_499), placed(), 1_000, TAIL),
        # of an unknown capacity: a little older than that, and than half of the entries
        (replica(8_000, capacity_tokens=None, proven_tokens=4_000), placed(reuse_tokens=4_501), 1_000, EVICTED),
        (replica(8_000, capacity_tokens=None, proven_tokens=4_000), placed(reuse_tokens=4_500), 1_000, TAIL),
        (replica(8_000, capacity_tokens=None, proven_tokens=0), placed(reuse_tokens=4_501), 1_000, TAIL),
        (replica(8_000, capacity_tokens=None, proven_tokens=1), placed(reuse_tokens=4_001), 1_000, EVICTED),
        (replica(8_000, capacity_tokens=None, proven_tokens=1), placed(reuse_tokens=4_000), 1_000, TAIL),
        # of an unknown budget: half of it cached may be a part that others share
        (replica(budget=UNLIMITED_TOKENS, capacity_tokens=None, proven_tokens=1), placed(), 2_500, EVICTED),
        (replica(budget=UNLIMITED_TOKENS, capacity_tokens=None, proven_tokens=1), placed(), 2_501, TAIL),
        (replica(budget=UNLIMITED_TOKENS - 1, capacity_tokens=None, proven_tokens=1), placed(), 2_501, EVICTED),
        # blocks that are not known yet
        (replica(block=0), placed(), 1_250, TAIL),
        (replica(block=0), placed(), 1_249, EVICTED),
        # nothing cached
        (replica(8_499), placed(), 64, TAIL),
        (replica(8_499, shortest_hit_tokens=5_000), placed(), 64, SUSPECT),
        (replica(8_499, shortest_hit_tokens=5_001), placed(), 64, TAIL),
        (replica(8_499, shortest_hit_tokens=5_000), placed(), 65, TAIL),
        (replica(8_500, shortest_hit_tokens=5_000), placed(), 0, EVICTED),
        (replica(8_500, shortest_hit_tokens=5_000, proven_tokens=9_000), placed(), 0, SUSPECT),
        # after another whole prompt of which nothing was cached
        (replica(8_499, shortest_hit_tokens=5_000, suspects=[placed(1)]), placed(), 0, RESTARTED),
        (replica(8_499, shortest_hit_tokens=5_000, suspects=[placed(0)]), placed(), 0, SUSPECT),
    ],
    ids=range(37),
)
def test_a_response_is_explained_by_its_error_and_by_what_the_replica_has_shown(
    state: ReplicaState, placement: Placement, cached: int | None, learnt: FeedbackKind
) -> None:
    """Each bound belongs to the side on which it is written."""
    assert judge(state, placement, 5_900, cached, []) is learnt


def test_a_prompt_that_became_shorter_was_rendered_differently() -> None:
    """By more than a quarter of what was appended to it, and by more than is reported in one step."""
    node = Node(None, array("Q"), array("I"), array("I"), {})
    for estimated, held, shortest in ((10_000, 5_000, 8_750), (5_200, 5_000, 5_072)):
        for prompt_tokens, learnt in ((shortest, EVICTED), (shortest - 1, TAIL)):
            steps = [Step(node, 1, 4, estimated)]
            placement = placed(held_tokens=held, predicted_tokens=held)
            assert judge(replica(), placement, prompt_tokens, 1_000, steps) is learnt
            assert judge(replica(), placement, prompt_tokens, 1_000, [Step(node, 1, 3, estimated)]) is EVICTED


def test_the_third_eviction_shrinks_a_known_budget_and_the_fourth_an_unknown_one() -> None:
    """Of different prompts; each makes what was proved a fiftieth smaller."""
    for budget, kinds in ((10_000, [EVICTED, EVICTED, LESS]), (UNLIMITED_TOKENS, [EVICTED, EVICTED, EVICTED, LESS])):
        state = replica(budget=budget, placed_tokens=9_000, proven_tokens=1_000)
        assert judge(state, placed(0), 5_900, 1_000, []) is EVICTED
        assert state.proven_tokens == 980
        assert [judge(state, placed(seed), 5_900, 1_000, []) for seed in range(len(kinds))] == kinds


@pytest.mark.parametrize(("tokens", "placed_tokens", "learnt"), [(9_000, 750, LESS), (9_000, 749, EVICTED)])
def test_a_budget_shrinks_once_a_twelfth_of_the_cache_was_placed_anew(
    tokens: int, placed_tokens: int, learnt: FeedbackKind
) -> None:
    """Of the entries, or of the budget if that is smaller."""
    state = replica(tokens, placed_tokens=placed_tokens, evictions=[placed(1), placed(2)])
    assert judge(state, placed(), 5_900, 1_000, []) is learnt
    state = replica(3 * tokens, budget=tokens, placed_tokens=placed_tokens, evictions=[placed(1), placed(2)])
    assert judge(state, placed(), 5_900, 1_000, []) is learnt


def test_where_several_tenants_are_served_evictions_of_one_do_not_shrink_the_budget() -> None:
    """One of them may send prompts that are rendered anew each time."""
    for second, learnt in ((7, EVICTED), (8, LESS)):
        state = replica(placed_tokens=9_000, sources={7, 8})
        state.evictions = [placed(1, source=7), placed(2, source=second)]
        assert judge(state, placed(0, source=7), 5_900, 1_000, []) is learnt


def test_an_eviction_from_a_slot_takes_back_what_was_learned_beyond_the_stated_ones() -> None:
    for slots, left in ((6, 5), (4, 4)):
        state = replica(slots=slots, stated_slots=4)
        assert judge(state, placed(), 5_900, 1_000, []) is EVICTED
        assert state.slots == left


def test_more_than_predicted_proves_room_and_one_slot_more() -> None:
    """An engine with slots then keeps prompts elsewhere too, so that its stated capacity means nothing."""
    state = replica(slots=4, proven_tokens=6_000, suspects=[placed(1)])
    assert judge(state, placed(), 9_000, 5_999, []) is MORE
    assert (state.proven_tokens, state.slots, state.capacity_tokens, state.suspects) == (6_000, 5, None, [])
    assert judge(state, placed(forks=True, whole=False), 9_000, 6_001, []) is MORE
    assert (state.proven_tokens, state.slots) == (6_001, 5)


@pytest.mark.parametrize(
    ("state", "reuse", "learnt", "resident", "budget"),
    [
        # an eviction: what the evicted prompts needed, within a hundredth and a twentieth of a stated budget
        (replica(evictions=[placed(1, reuse_tokens=9_700)]), 0, LESS, 0, 9_700),
        (replica(evictions=[placed(1, reuse_tokens=9_000)]), 0, LESS, 0, 9_500),
        (replica(evictions=[placed(1, reuse_tokens=9_990)]), 0, LESS, 0, 9_900),
        (replica(), 0, LESS, 0, 9_900),
        (replica(evictions=[placed(1, reuse_tokens=9_000)], proven_tokens=9_600), 0, LESS, 0, 9_600),
        (replica(evictions=[placed(1, reuse_tokens=9_000)], proven_tokens=99_000), 0, LESS, 0, 10_000),
        (replica(evictions=[placed(1, reuse_tokens=4_000)], capacity_tokens=None), 0, LESS, 0, 4_000),
        (replica(evictions=[placed(1, reuse_tokens=0)], capacity_tokens=None), 0, LESS, 0, 1),
        # growth: only of a full budget, and within the capacity
        (replica(capacity_tokens=None), 0, MORE, 9_500, 10_251),
        (replica(capacity_tokens=None), 0, MORE, 9_499, None),
        (replica(capacity_tokens=10_100), 0, MORE, 9_500, 10_100),
        (replica(), 0, MORE, 9_500, None),
        (replica(capacity_tokens=None), 9_000, RIGHT, 9_500, 10_010),
        (replica(capacity_tokens=None), 8_999, RIGHT, 9_500, None),
        (replica(capacity_tokens=None), 9_000, TAIL, 9_500, None),
    ],
    ids=range(15),
)
def test_a_budget_follows_what_was_evicted_and_what_was_found(
    state: ReplicaState, reuse: int, learnt: FeedbackKind, resident: int, budget: int | None
) -> None:
    state.evictions = list(state.evictions)
    assert new_budget(state, placed(reuse_tokens=reuse), learnt, resident) == budget
    assert state.evictions == [] or learnt is not LESS


def test_a_hit_drops_the_evictions_that_it_disproves() -> None:
    """A prompt that is as old was still cached; what is older may have been evicted."""
    state = replica(evictions=[placed(1, reuse_tokens=9_001), placed(2, reuse_tokens=9_000)], proven_tokens=8_000)
    assert judge(state, placed(), 5_900, 5_000, []) is RIGHT
    assert [each.reuse_tokens for each in state.evictions] == [9_001]
    assert (state.proven_tokens, state.shortest_hit_tokens) == (9_000, 5_000)
    assert judge(state, placed(3, held_tokens=5_001, reuse_tokens=8_999), 5_900, 5_000, []) is RIGHT
    assert (state.proven_tokens, state.shortest_hit_tokens) == (9_000, 5_000)

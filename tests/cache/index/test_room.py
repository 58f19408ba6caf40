"""Room at a replica: prompts in slots, free room, what a placement would evict, the bound on all blocks together."""

from __future__ import annotations

import tracemalloc

import pytest

from cache.index.eviction import UPKEEP_STEPS
from cache.index.hashing import cut
from cache.index.prefix_index import UNLIMITED_TOKENS, FeedbackKind, PrefixIndex
from cache.index.replica_state import MAX_RESTART_MISSES, ReplicaState
from cache.index.tree import new_entries, reuse_distance
from tests.cache.index.test_prefix_index import BLOCK_TOKENS, Bench, chain, talk
from tests.support.operations import operations

TOKENS = float(BLOCK_TOKENS)


@pytest.fixture
def slots() -> Bench:
    """An index whose replica 0 is an engine with two slots."""
    bench = Bench()
    bench.index.set_capacity(0, None, slots=2)
    return bench


def depths(bench: Bench, *names: str) -> list[int]:
    return [bench.depth(talk(name, 4)) for name in names]


# -- slots


def test_an_engine_with_slots_keeps_the_prompts_used_last(slots):
    for name in "abac":
        slots.ask(talk(name, 4))
    assert depths(slots, "a", "b", "c") == [4, 0, 4]
    assert slots.index.match(talk("b", 4)).evicted


def test_a_prompt_that_goes_on_keeps_its_slot(slots):
    for blocks in range(1, 6):
        slots.ask(talk("a", blocks))
        slots.ask(talk("b", 4))
    assert depths(slots, "a", "b") == [4, 4]
    assert slots.depth(talk("a", 5)) == 5


def test_of_a_prompt_that_loses_its_slot_goes_what_no_other_one_shares(slots):
    """The system prompt stays with those that begin with it, and goes with the last of them."""
    for name in "abc":
        slots.ask(talk(name, 6, system=2))
    assert [slots.depth(talk(name, 6, system=2)) for name in "abc"] == [2, 6, 6]
    slots.ask(talk("x", 4))
    assert [slots.depth(talk(name, 6, system=2)) for name in "bc"] == [2, 6]
    slots.ask(talk("y", 4))
    assert slots.depth(talk("b", 6, system=2)) == 0
    assert slots.index.stats().blocks == 8


def test_clearing_slots_takes_a_bounded_number_of_steps_at_a_time():
    """The next placement goes on with it."""
    bench = Bench()
    for number in range(1_300):
        bench.ask(talk(str(number), 1))
    bench.index.set_capacity(0, None, slots=1)
    left = []
    for number in range(3):
        bench.ask(talk(f"new{number}", 1))
        left.append(bench.index.replicas()[0].blocks)
    assert left == [801, 302, 1]


def test_a_placement_in_a_slot_costs_no_more_where_other_replicas_hold_more_prompts_with_its_beginning():
    """In a pool with an engine that holds 50,000 sessions, looking for its own among them took 5 ms."""

    def cost(others: int) -> int:
        bench = Bench()
        bench.index.set_capacity(0, None, slots=2)
        for number in range(others):
            bench.ask(talk(f"other{number}", 4, system=2), 1)
        for name in "abc":
            bench.ask(talk(name, 4, system=2))
        return operations(lambda: bench.index.place(0, talk("d", 4, system=2), 4 * TOKENS, 9.0))

    assert cost(100) < 1.5 * cost(1)


def test_more_than_predicted_shows_that_an_engine_holds_one_prompt_more(slots):
    """Some keep prompts in the host's memory too, outside their slots."""
    for name in "abc":
        slots.served(talk(name, 8), 0)
    assert slots.served(talk("a", 9), 8 * BLOCK_TOKENS).learnt is FeedbackKind.MORE
    for name in "bc":
        slots.ask(talk(name, 8))
    assert slots.index.free_prompts(0, 1) == 0
    assert [slots.depth(talk(name, 8)) for name in "abc"] == [8, 8, 8]


def test_free_slots_are_counted_and_the_one_of_a_prompt_that_goes_on_costs_nothing(slots):
    assert slots.index.free_prompts(0, 1.0) == 2
    slots.ask(talk("a", 4))
    assert slots.index.free_prompts(0, 10**9) == 1
    assert slots.index.dropped_tokens(0, 0.0, 9 * TOKENS) == 0.0, "a slot is free"
    slots.ask(talk("b", 8))
    assert slots.index.free_prompts(0, 1.0) == 0
    assert slots.index.dropped_tokens(0, 0.0, 9 * TOKENS) == 6 * TOKENS, "the average of what the slots hold"
    assert slots.index.dropped_tokens(0, 10 * TOKENS, 9 * TOKENS) == 0.0, "it goes on in its own"


def test_an_engine_without_a_slot_drops_nothing_for_another_prompt():
    index = PrefixIndex()
    index.set_capacity(0, None, slots=0)
    assert (index.dropped_tokens(0, 0.0, TOKENS), index.free_prompts(0, 1.0)) == (0.0, 0)


# -- room in tokens


def test_what_a_prompt_would_evict_is_what_exceeds_the_budget_and_no_more_than_its_own(slots):
    bench = Bench()
    bench.index.set_budget(0, 10 * BLOCK_TOKENS)
    bench.ask(talk("a", 8))
    for uncached, dropped in ((1, 0), (2, 0), (3, 1), (12, 10), (100, 98)):
        assert bench.index.dropped_tokens(0, 0.0, uncached * TOKENS) == dropped * TOKENS
    bench.index.set_budget(0, BLOCK_TOKENS)
    assert bench.index.dropped_tokens(0, 0.0, 2 * TOKENS) == 2 * TOKENS


def test_free_room_is_counted_in_prompts_of_at_least_a_thousand_tokens():
    bench = Bench()
    bench.index.set_budget(0, 10_240)
    bench.ask(talk("a", 4))
    assert [bench.index.free_prompts(0, tokens) for tokens in (1.0, 1_024.0, 2_000.0, 8_240.0, 8_241.0)] == [
        8,
        8,
        4,
        1,
        0,
    ]
    bench.index.set_budget(0, 100)
    assert bench.index.free_prompts(0, 1.0) == 0


def test_of_replicas_of_unknown_room_what_they_hold_is_counted():
    """In prompts that have begun, so that one which holds little differs from one that holds nothing."""
    bench = Bench()
    bench.ask(talk("a", 8), replica=0)
    bench.ask(talk("b", 4), replica=1)
    bench.index.set_ttl(2, None)
    assert [bench.index.held_prompts(replica, 1_900.0) for replica in (0, 1, 2)] == [3, 2, 0]
    assert [bench.index.free_prompts(replica, 1_900.0) for replica in (0, 1, 2)] == [None] * 3


def test_nothing_is_known_of_the_room_of_an_unknown_replica():
    index = PrefixIndex()
    assert (index.dropped_tokens(5, 0.0, TOKENS), index.free_prompts(5, TOKENS)) == (0.0, None)
    assert index.held_prompts(5, TOKENS) == 0


# -- the process


def test_the_bound_on_all_blocks_takes_from_the_replica_that_holds_most():
    index = PrefixIndex(max_blocks=20)
    index.place(0, talk("small", 5), 100, 1.0)
    for number in range(10):
        index.place(1, talk(str(number), 5), 100, 2.0 + number)
    assert index.stats().blocks == 20
    assert index.match(talk("small", 5)).held.keys() == {0}
    assert [index.match(talk(str(number), 5)).known_blocks for number in (0, 6, 7, 9)] == [0, 0, 5, 5]


def test_a_budget_cuts_the_end_of_the_oldest_run_as_far_as_it_must():
    bench = Bench()
    bench.ask(talk("old", 8))
    bench.ask(talk("new", 4))
    bench.index.set_budget(0, 9 * BLOCK_TOKENS)
    bench.index.tend(bench.now)
    assert (bench.depth(talk("old", 8)), bench.depth(talk("new", 4))) == (5, 4)
    assert bench.index.replicas()[0].evicted_blocks == 3
    bench.index.set_budget(0, 4 * BLOCK_TOKENS + 1)
    bench.index.tend(bench.now)
    assert (bench.depth(talk("old", 8)), bench.depth(talk("new", 4))) == (0, 4)


def test_the_end_of_a_run_that_another_replica_holds_too_is_cut_for_one_of_them():
    """It counts as evicted there, and the other one keeps it."""
    bench = Bench()
    for replica in (0, 1):
        bench.ask(talk("a", 8), replica)
    bench.index.set_budget(0, 5 * BLOCK_TOKENS)
    bench.index.tend(bench.now)
    assert (bench.depth(talk("a", 8), 0), bench.depth(talk("a", 8), 1)) == (5, 8)
    assert [bench.index.replicas()[replica].evicted_blocks for replica in (0, 1)] == [3, 0]


def test_a_run_that_was_cut_keeps_the_counts_that_were_reported_up_to_there():
    """Also one for the very boundary at which it ends now."""
    bench = Bench()
    for blocks in (4, 6, 8):
        bench.served(talk("a", blocks))
    bench.index.set_budget(0, 6 * BLOCK_TOKENS)
    bench.index.tend(bench.now)
    (step,) = bench.index._tree.walk(talk("a", 8).hashes)  # noqa: SLF001 - internal state that no public name shows
    assert (len(step.node.hashes), step.node.pins) == (6, (4, 6))


def test_a_prompt_that_runs_stays_although_it_is_the_oldest():
    """Its engine uses it now; of those that were answered the oldest goes."""
    bench = Bench()
    bench.ask(talk("running", 4))
    for name in ("old", "new"):
        bench.served(talk(name, 4))
    bench.index.set_budget(0, 8 * BLOCK_TOKENS)
    bench.index.tend(bench.now)
    assert depths(bench, "running", "old", "new") == [4, 0, 4]


def test_the_distance_of_reuse_is_exact_near_either_end_of_the_order_of_use():
    """And a lower bound between them."""
    bench = Bench()
    for name in "abcdefgh":
        bench.ask(talk(name, 1))
    entries = bench.index._replica(0).entries  # noqa: SLF001 - internal state that no public name shows
    walk = bench.index._tree.walk  # noqa: SLF001 - as above
    held = [walk(talk(name, 1).hashes)[0].node.held[entries] for name in "abcdefgh"]
    distances = [reuse_distance(entries, each, steps=3) / BLOCK_TOKENS for each in held]
    assert distances == [8, 7, 6, 4, 4, 3, 2, 1]


def test_one_call_drops_no_more_runs_than_its_steps():
    """And as many, if so many are over the budget."""
    bench = Bench()
    for number in range(UPKEEP_STEPS + 100):
        bench.served(talk(str(number), 1))
    bench.index.set_budget(0, 0)
    left = [(bench.index.tend(bench.now), bench.index.replicas()[0].blocks) for _ in range(2)]
    assert left == [(True, 100), (False, 0)]


def test_upkeep_goes_on_with_past_epochs_at_the_next_placement():
    bench = Bench()
    for number in range(600):
        bench.ask(talk(str(number), 1))
    bench.index.new_epoch(0, 1)
    assert bench.index.stats().nodes == 600
    bench.ask(talk("x", 1))
    assert bench.index.stats().nodes == 101
    bench.ask(talk("y", 1))
    assert bench.index.stats().nodes == 2


def test_an_entry_ends_at_its_time_to_live_and_each_use_begins_it_anew():
    bench = Bench()
    bench.index.set_ttl(0, 10.0)
    bench.index.place(0, talk("a", 1), TOKENS, 100.0)
    bench.index.place(0, talk("b", 1), TOKENS, 101.0)
    bench.index.place(0, talk("a", 1), TOKENS, 105.0)
    for now, left in ((110.9, [1, 1]), (111.0, [1, 0]), (114.9, [1, 0]), (115.0, [0, 0])):
        assert not bench.index.tend(now)
        assert [bench.depth(talk(name, 1)) for name in "ab"] == left


def test_what_ended_at_its_time_to_live_is_known_to_have_been_held():
    """A prompt that comes back later is one that was dropped, not a new one."""
    bench = Bench()
    bench.index.set_ttl(0, 10.0)
    bench.index.place(0, talk("a", 3), 3 * TOKENS, 100.0)
    bench.index.tend(110.0)
    assert bench.index.match(talk("a", 3)).evicted_from == 0
    assert bench.index.replicas()[0].evicted_blocks == 3


def test_a_budget_that_is_passed_by_one_token_makes_the_oldest_go():
    bench = Bench()
    bench.served(talk("a", 1))
    bench.index.set_budget(0, 2 * BLOCK_TOKENS - 1)
    bench.served(talk("b", 1))
    assert [bench.depth(talk(name, 1)) for name in "ab"] == [0, 1]


def test_misses_of_one_tenant_never_mean_a_restart_of_a_replica_that_serves_several():
    """However many they are; one more of another tenant does."""
    state = ReplicaState(new_entries(0), sources={7, 8})
    assert not state.is_restart(7, [7] * MAX_RESTART_MISSES)
    assert state.is_restart(8, [7] * MAX_RESTART_MISSES)


def test_tenants_of_a_replica_are_told_apart_until_its_next_epoch():
    index = PrefixIndex()
    index.place(0, talk("a", 1), TOKENS, 1.0, source=7)
    assert not index._replica(0).has_several_sources  # noqa: SLF001 - internal state that no public name shows
    index.place(0, talk("b", 1), TOKENS, 2.0, source=8)
    assert index._replica(0).has_several_sources  # noqa: SLF001 - internal state that no public name shows
    index.new_epoch(0, 1)
    assert not index._replica(0).has_several_sources  # noqa: SLF001 - internal state that no public name shows
    assert (index.epoch(0), index.replicas()[0].blocks) == (1, 0)


# -- other writers and damaged chains


def test_taking_back_by_another_writer_ends_where_another_placement_or_prompt_builds_on_it():
    index, prompt = PrefixIndex(), talk("a", 6)
    index.apply_place(0, talk("a", 2), 2 * BLOCK_TOKENS, 0, 1, 1.0)
    index.apply_place(0, prompt, 6 * BLOCK_TOKENS, 0, 2, 2.0)
    index.apply_take_back(0, talk("other", 3), 0, 0, 2)
    index.apply_take_back(0, prompt, 2, 0, 9)
    index.apply_take_back(1, prompt, 2, 0, 2)
    assert index.match(prompt).held[0].blocks == 6
    index.apply_take_back(0, prompt, 2, 0, 2)
    assert index.match(prompt).held[0].blocks == 2


def test_two_chains_of_equal_hashes_and_other_lengths_are_placed_without_harm():
    """One of them was damaged in Redis, and its ends lie before those of the other."""
    bench = Bench()
    bench.ask(chain("a", "b", block_bytes=10_000))
    damaged = chain("a", "b", "c", block_bytes=1_000)
    placement = bench.ask(damaged)
    assert placement.held_blocks == 2
    assert bench.depth(damaged) == 3
    assert bench.index.replicas()[0].tokens > 0


def test_taking_back_leaves_a_shared_head_to_another_prompt_of_the_same_placement():
    """One id came twice, as in a damaged entry."""
    index = PrefixIndex()
    for name in "ab":
        index.apply_place(0, talk(name, 4, system=2), 4 * BLOCK_TOKENS, 0, 1, 1.0)
    index.apply_take_back(0, talk("a", 4, system=2), 0, 0, 1)
    assert [index.match(talk(name, 4, system=2)).held[0].blocks for name in "ab"] == [2, 4]


def test_a_replica_that_was_never_used_can_be_removed_and_has_no_bound():
    index = PrefixIndex()
    index.remove(9)
    assert index.replicas() == {}
    assert index.budget_tokens(9) == UNLIMITED_TOKENS


def test_the_bound_on_memory_holds_for_prompts_of_one_block_that_no_bound_on_blocks_would_stop():
    """The newest stay, and what was evicted is known to have been."""
    index = PrefixIndex(max_bytes=100_000)
    for number in range(500):
        index.place(number % 2, talk(str(number), 1), 100, float(number))
        assert index.stats().size_bytes <= 100_000
    assert index.stats().size_bytes > 90_000
    assert [index.match(talk(str(number), 1)).known_blocks for number in (0, 420, 499)] == [0, 1, 1]
    assert index.match(talk("0", 1)).evicted


@pytest.mark.parametrize(("prompts", "blocks", "holders"), [(1_000, 1, 1), (1_000, 2, 2), (500, 12, 1), (30, 900, 1)])
def test_the_size_of_the_index_is_that_of_its_memory(prompts, blocks, holders):
    """Within a fifth, for answered prompts of any length; boundaries are as large as real ones."""
    index = PrefixIndex(origin=1)
    tracemalloc.start()
    try:
        for number in range(prompts):
            fingerprint = cut(2**62 + number, [b"x" * 512 * blocks])
            for replica in range(holders):
                tokens = fingerprint.size_bytes // 4
                placement = index.place(replica, fingerprint, tokens, 1e9 + number)
                index.answered(placement, tokens, int(placement.predicted_tokens), 9, 1e9 + number)
        del fingerprint, placement
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.8 * taken < index.stats().size_bytes < 1.2 * taken

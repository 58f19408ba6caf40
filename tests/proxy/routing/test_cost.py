"""The choice of replica: properties of the cost, and the reasons given with it."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import Held, Match
from proxy.errors import Overloaded
from proxy.model import CacheStatus, MissReason, RouteReason
from proxy.records import Demand, ReplicaView
from proxy.routing.cost import future_weight, plan


def held_part(size_bytes: int, tokens: float) -> Held:
    """One block of `size_bytes` that a replica holds."""
    return Held(1, size_bytes, int(tokens))


NOTHING = Match({})
LONG = Demand(size_bytes=40_000, prompt_tokens=10_000.0, tie_hash=7, last_block_bytes=2_048)


def view(number: int = 0, **changes: Any) -> ReplicaView:
    row = ReplicaView(
        id=number,
        name=f"replica-{number}",
        available=True,
        rate_tokens_per_second=8_000.0,
        pending_tokens=0.0,
        in_flight=0,
        in_flight_limit=None,
        lateness_seconds=0.0,
        in_flight_seconds=0.05,
    )
    return dataclasses.replace(row, **changes)


def chosen(*args, **kwargs) -> int:
    return plan(*args, **kwargs).chosen.replica.id


def test_a_follow_up_goes_where_its_longest_prefix_is():
    """Warm beats cold on an idle fleet, and the reason says so."""
    made = plan(
        LONG, Match({1: held_part(30_000, 7_500.0), 2: held_part(10_000, 2_500.0)}), [view(0), view(1), view(2)]
    )
    assert made.chosen.replica.id == 1
    assert (made.reason, made.cache, made.miss) == (RouteReason.WARM, CacheStatus.PARTIAL, MissReason.NONE)
    assert [candidate.replica.id for candidate in made.candidates] == [1, 2, 0]
    assert made.chosen.uncached_tokens == 2_500.0


def test_a_hot_prefix_spreads_when_its_holders_queue_costs_more_than_a_cold_prefill():
    """There is one crossing, at the queue that costs as much, and no threshold at which affinity is dropped."""
    held = Match({0: held_part(39_000, 9_750.0)})

    def where(pending: float) -> int:
        return chosen(LONG, held, [view(0, pending_tokens=pending), view(1)])

    assert where(3 * 9_750 - 500) == 0
    assert where(3 * 9_750 + 500) == 1
    made = plan(LONG, held, [view(0, pending_tokens=40_000.0), view(1)])
    assert (made.reason, made.miss, made.cache) == (RouteReason.SPREAD, MissReason.ELSEWHERE, CacheStatus.MISS)


def test_decoding_beside_others_has_a_price_from_the_ninth_on():
    """A hot prompt gets a second copy when its holder decodes many; differences between small numbers are nothing."""
    held = Match({0: held_part(39_000, 9_750.0), 1: held_part(38_000, 9_500.0)})

    def where(in_flight: int, more: Match = held) -> int:
        return chosen(LONG, more, [view(0, in_flight=in_flight), view(1)])

    assert [where(in_flight) for in_flight in (1, 8, 9, 10)] == [0, 0, 0, 1]
    alone = Match({0: held_part(39_000, 9_750.0)})
    assert [where(in_flight, alone) for in_flight in (10, 81, 82)] == [0, 0, 1]


def test_nobody_waits_for_a_further_copy_of_a_hot_prefix():
    """While it is computed, its idle replica is the cheapest for all that follow; they go where it is already there,
    the cheapest of those, unless the queue there is the longer wait."""
    held = Match({number: held_part(39_000, 9_750.0) for number in (0, 1, 2)})
    making = view(0, pending_tokens=8_000.0, in_flight=1)

    def where(pending: float = 0.0, *, more: Match = held) -> int:
        views = [making, view(1, pending_tokens=pending, in_flight=50), view(2, pending_tokens=pending, in_flight=40)]
        return chosen(LONG, more, [*views, view(3)], held_back=lambda replica, _: replica == 0)

    assert where() == 2
    assert where(7_900.0) == 2
    assert where(8_100.0) == 0
    assert where(more=Match({0: held_part(39_000, 9_750.0), 2: held_part(38_000, 9_500.0)})) == 0
    made = plan(LONG, held, [making, view(1, in_flight=50)], held_back=lambda replica, _: replica == 0)
    assert [candidate.replica.id for candidate in made.candidates] == [1, 0]
    assert (made.reason, made.cache) == (RouteReason.WARM, CacheStatus.HIT)


def test_the_longer_every_queue_the_dearer_a_second_prefill():
    """With all queues at 4 s the holder keeps a prompt that it would lose with the others idle."""
    held = Match({0: held_part(39_000, 9_750.0)})
    assert chosen(LONG, held, [view(0, pending_tokens=32_000 + 30_000.0), view(1, pending_tokens=32_000.0)]) == 0
    assert chosen(LONG, held, [view(0, pending_tokens=30_000.0), view(1)]) == 1


def test_the_growing_weight_is_bounded():
    """An overload of minutes leaves the weight at sixty."""
    assert future_weight([view(0), view(1, pending_tokens=80_000.0)]) == 2.0
    assert future_weight([view(0, pending_tokens=8_000.0)]) == 10.0
    assert future_weight([view(0, pending_tokens=8_000_000.0)]) == 60.0


@given(
    short_tokens=st.floats(1, 1_000),
    long_tokens=st.floats(2_500, 200_000),
    rate=st.floats(1_000, 50_000),
    others=st.integers(1, 7),
)
def test_a_short_cold_prompt_never_moves_a_warm_long_one(short_tokens, long_tokens, rate, others):
    """Charged to the holder itself, a prompt too short to share costs it less than losing what is warm."""
    holder = view(0, pending_tokens=short_tokens, in_flight=1, rate_tokens_per_second=rate)
    idle = [view(n, rate_tokens_per_second=rate) for n in range(1, others + 1)]
    demand = Demand(size_bytes=int(long_tokens * 4), prompt_tokens=long_tokens)
    assert chosen(demand, Match({0: held_part(int(long_tokens * 4), long_tokens)}), [holder, *idle]) == 0


@pytest.mark.parametrize("count", range(2, 9))
def test_ties_do_not_favour_the_first(count):
    """Cold prompts on an idle fleet fall on every replica about alike, whatever their order in the snapshot."""
    random = Random(count)
    views = [view(n) for n in range(count)]
    random.shuffle(views)
    falls = [0] * count
    for _ in range(100 * count):
        falls[chosen(dataclasses.replace(LONG, tie_hash=random.getrandbits(64)), NOTHING, views)] += 1
    assert min(falls) > 70
    assert max(falls) < 130


def test_a_tie_is_broken_alike_in_every_process():
    """The same prefix and names give the same replica, in any order of the rows: proxies need not talk for it."""
    views = [view(n) for n in range(8)]
    assert chosen(LONG, NOTHING, views) == chosen(LONG, NOTHING, views[::-1])
    assert chosen(dataclasses.replace(LONG, tie_hash=1), NOTHING, views) == 3  # fixed: no seed of the process in it


def test_of_equal_costs_the_fewest_in_flight_wins():
    """Rendezvous comes second."""
    views = [view(n, in_flight=0 if n == 5 else 3, in_flight_seconds=0.0) for n in range(8)]
    assert {chosen(dataclasses.replace(LONG, tie_hash=h), NOTHING, views) for h in range(50)} == {5}


def test_a_tie_goes_to_this_zone_and_to_the_idle_one_first():
    """The zone decides only between replicas that are equally good: a busier one of this zone waits."""
    views = [view(n, is_far=n != 2) for n in range(4)]
    demands = [dataclasses.replace(LONG, tie_hash=h) for h in range(50)]
    assert {chosen(demand, NOTHING, views) for demand in demands} == {2}
    views[2] = view(2, in_flight=1)
    assert 2 not in {chosen(demand, NOTHING, views) for demand in demands}
    held = Match({0: held_part(30_000, 7_500.0)})
    assert chosen(LONG, held, [view(0, is_far=True), view(1)]) == 0


def test_rates_that_differ_by_noise_are_a_tie():
    """A replica that looks one percent faster does not get every cold prompt of an idle fleet."""
    views = [view(0, rate_tokens_per_second=8_080.0), view(1)]
    assert {chosen(dataclasses.replace(LONG, tie_hash=h), NOTHING, views) for h in range(50)} == {0, 1}


def test_replicas_that_hold_the_same_part_tie_whatever_its_length():
    """The idle one is chosen, although it is the second."""
    held = Match({0: held_part(30_000, 7_500.0), 1: held_part(30_000, 7_500.0)})
    views = [view(0, in_flight=1, in_flight_seconds=0.0), view(1, in_flight_seconds=0.0)]
    assert {chosen(dataclasses.replace(LONG, tie_hash=h), held, views) for h in range(20)} == {1}


def test_mixed_hardware_is_priced_by_its_own_rate():
    """A cold prompt goes to the fast one, until its queue takes longer than the slow one's prefill."""
    slow, fast = view(0, rate_tokens_per_second=2_000.0), view(1, rate_tokens_per_second=16_000.0)
    assert chosen(LONG, NOTHING, [slow, fast]) == 1
    assert chosen(LONG, NOTHING, [slow, dataclasses.replace(fast, pending_tokens=60_000.0)]) == 1
    assert chosen(LONG, NOTHING, [slow, dataclasses.replace(fast, pending_tokens=80_000.0)]) == 0
    # the same tokens warm on the slow one save more seconds there than a cold prefill costs on the fast one
    assert chosen(LONG, Match({0: held_part(39_000, 9_800.0)}), [slow, fast]) == 0


def test_a_replica_that_stalls_repels():
    """Its lateness counts in full, even for what is warm there."""
    held = Match({0: held_part(39_000, 9_750.0)})
    assert chosen(LONG, held, [view(0, lateness_seconds=1.0), view(1)]) == 0
    assert chosen(LONG, held, [view(0, lateness_seconds=5.0), view(1)]) == 1


def test_in_flight_requests_have_a_price():
    """A holder with a hundred decodes is left for a replica with none, once that costs more than the prefill."""
    held = Match({0: held_part(39_000, 9_750.0)})
    assert chosen(LONG, held, [view(0, in_flight=20), view(1)]) == 0
    assert chosen(LONG, held, [view(0, in_flight=100), view(1)]) == 1


def test_unavailable_replicas_are_left_out_and_said_to_be_why():
    """A prefix that only a replica that is down holds is a miss with that reason."""
    made = plan(LONG, Match({0: held_part(39_000, 9_750.0)}), [view(0, available=False), view(1), view(2)])
    assert [candidate.replica.id for candidate in made.candidates if candidate.replica.id == 0] == []
    assert (made.reason, made.miss) == (RouteReason.COLD, MissReason.DOWN)


def test_none_left_is_503_with_the_seconds_until_the_first_is_tried():
    """Retry-After is the shortest back-off, at least a second, and a second if there is none."""
    views = [view(0, available=False, retry_after_seconds=9.0), view(1, available=False, retry_after_seconds=3.0)]
    with pytest.raises(Overloaded) as caught:
        plan(LONG, NOTHING, views)
    assert (caught.value.status, caught.value.retry_after_seconds) == (503, 3.0)
    for none_left in ([view(0, available=False, retry_after_seconds=0.2)], [view(0, available=False)], []):
        with pytest.raises(Overloaded) as caught:
            plan(LONG, NOTHING, none_left)
        assert caught.value.retry_after_seconds == 1.0


def test_what_is_pinned_goes_there_however_busy_it_is():
    """The object lives on one replica: no cost moves it, and without that replica there is no answer."""
    pinned = dataclasses.replace(LONG, pinned_replica=1)
    busy = view(1, pending_tokens=90_000.0)
    made = plan(pinned, Match({0: held_part(39_000, 9_750.0)}), [view(0), busy])
    assert ([c.replica.id for c in made.candidates], made.reason) == ([1], RouteReason.PINNED)
    with pytest.raises(Overloaded):
        plan(pinned, NOTHING, [view(0), view(1, available=False)])


def test_short_prompts_are_no_hits_and_no_misses():
    """Under the size worth sharing the least busy one takes it, and the cache status is bypass."""
    made = plan(Demand(1_000, 250.0), NOTHING, [view(0, pending_tokens=5_000.0), view(1)])
    assert made.chosen.replica.id == 1
    assert (made.reason, made.miss, made.cache) == (RouteReason.SHORT, MissReason.SHORT, CacheStatus.BYPASS)


def test_reasons_of_hits_and_misses():
    """All but the last block is a hit, and of what is new nothing was missed; one replica is the only one."""
    grown = {0: held_part(20_000, 5_000.0)}
    assert plan(LONG, Match(grown), [view(0), view(1)]).miss is MissReason.NONE
    assert plan(LONG, Match(grown, diverged=True), [view(0), view(1)]).miss is MissReason.CHANGED
    made = plan(LONG, Match({0: held_part(38_000, 9_500.0)}), [view(0), view(1)])
    assert (made.cache, made.miss) == (CacheStatus.HIT, MissReason.NONE)
    assert plan(LONG, Match({}, evicted_from=0), [view(0), view(1)]).miss is MissReason.EVICTED
    assert plan(LONG, NOTHING, [view(0), view(1)]).miss is MissReason.COLD
    assert plan(LONG, NOTHING, [view(0)]).reason is RouteReason.ONLY


@given(
    st.lists(
        st.tuples(st.floats(100, 50_000), st.floats(0, 1e6), st.integers(0, 200), st.floats(0, 100)),
        min_size=1,
        max_size=9,
    ),
    st.floats(0, 1e6),
)
def test_every_available_replica_is_a_candidate_in_order_of_cost(rows, tokens):
    """Except for the tie at the head, costs rise; none is lost or listed twice, and each computes something."""
    views = [
        view(n, rate_tokens_per_second=rate, pending_tokens=pending, in_flight=flying, lateness_seconds=late)
        for n, (rate, pending, flying, late) in enumerate(rows)
    ]
    made = plan(Demand(9_000, tokens), Match({0: held_part(9_000, tokens)}), views)
    costs = [candidate.cost_seconds for candidate in made.candidates]
    assert costs[1:] == sorted(costs[1:])
    assert costs[0] <= min(costs) * 1.02 + 0.002
    assert sorted(candidate.replica.id for candidate in made.candidates) == list(range(len(rows)))
    assert all(candidate.uncached_tokens >= 1 for candidate in made.candidates)


def with_prior(replica: int) -> Demand:
    return dataclasses.replace(LONG, prior_replica=replica)


def test_the_replica_of_the_session_is_taken_if_it_costs_little_more_and_holds_as_much():
    """A hint breaks ties; where another holds more of the prompt, or is much less loaded, it says nothing."""
    views = [view(0), view(1, pending_tokens=1_000.0), view(2)]
    assert chosen(with_prior(1), NOTHING, views) == 1
    assert chosen(with_prior(1), NOTHING, [view(0), view(1, pending_tokens=20_000.0)]) == 0
    assert chosen(with_prior(1), Match({0: held_part(39_000, 9_750.0)}), [view(0), view(1)]) == 0
    assert chosen(with_prior(9), NOTHING, [view(0), view(1)]) in (0, 1)


class FakeRoom:
    """Replicas with free room for this many prompts (None: not known); those without must evict for every prompt."""

    def __init__(self, *free: int | None, held: tuple[int, ...] = ()) -> None:
        self.free = free
        self.held = held

    def dropped_tokens(self, replica: int, matched_tokens: float, uncached_tokens: float) -> float:
        return uncached_tokens if self.free[replica] == 0 else 0.0

    def free_prompts(self, replica: int, prompt_tokens: float) -> int | None:
        return self.free[replica]

    def held_prompts(self, replica: int, prompt_tokens: float) -> int:
        return self.held[replica]


@pytest.mark.parametrize("tie", range(8))
def test_a_cold_prompt_goes_where_there_is_most_room_whatever_its_hash(tie):
    demand = dataclasses.replace(LONG, tie_hash=tie)
    assert chosen(demand, NOTHING, [view(0), view(1), view(2)], room=FakeRoom(1, 3, 2)) == 1


@pytest.mark.parametrize("tie", range(4))
def test_where_a_room_is_not_known_a_cold_prompt_goes_where_least_is_held(tie):
    """A known room would always be larger than an unknown one, and idle replicas would stay empty."""
    demand = dataclasses.replace(LONG, tie_hash=tie)
    room = FakeRoom(400, None, None, held=(3, 2, 1))
    assert chosen(demand, NOTHING, [view(0), view(1), view(2)], room=room) == 2
    assert chosen(demand, NOTHING, [view(0), view(1)], room=FakeRoom(400, None, held=(1, 2))) == 0


def test_what_must_be_evicted_costs_as_much_as_computing_it_three_times():
    """A replica with room takes a cold prompt although it has the longer queue, up to that cost."""

    def where(pending: float) -> int:
        return chosen(LONG, NOTHING, [view(0), view(1, pending_tokens=pending)], room=FakeRoom(0, 1))

    assert [where(28_000.0), where(32_000.0)] == [1, 0]


def test_a_shared_head_is_copied_to_an_idle_replica_with_room_once_waiting_takes_longer_than_computing_it():
    """The price of the copy is its time alone; a conversation's own history keeps the full price, and so does a copy
    where little room is left, or where something else is being computed."""
    shared = Match({0: held_part(32_000, 8_000.0)}, known_bytes=32_000, diverged=True)

    def where(pending: float, *, match: Match = shared, room: int = 8, other: float = 0.0) -> int:
        return chosen(
            LONG, match, [view(0, pending_tokens=pending), view(1, pending_tokens=other)], room=FakeRoom(8, room)
        )

    assert [where(7_900.0), where(8_100.0)] == [0, 1]
    own = dataclasses.replace(shared, diverged=False)
    assert [where(23_900.0, match=own), where(24_100.0, match=own)] == [0, 1]
    assert [where(23_900.0, room=7), where(24_100.0, room=7)] == [0, 1]
    assert where(12_000.0, other=300.0) == 0


def test_no_copy_is_made_if_a_holder_of_the_shared_head_is_idle():
    held = Match({0: held_part(32_000, 8_000.0), 1: held_part(32_000, 8_000.0)}, diverged=True)
    views = [view(0, pending_tokens=50_000.0), view(1, lateness_seconds=1.2), view(2)]
    assert chosen(LONG, held, views, room=FakeRoom(8, 8, 8)) == 1


def test_room_is_not_asked_for_a_prompt_that_is_nearly_all_there():
    held = Match({0: held_part(39_900, 9_900.0), 1: held_part(39_900, 9_900.0)})
    assert chosen(LONG, held, [view(0), view(1, pending_tokens=400.0)], room=FakeRoom(0, 1)) == 0


@pytest.mark.parametrize("tie", range(8))
def test_a_prompt_that_was_evicted_goes_back_where_it_was_when_all_are_full(tie):
    """An engine may still have what the index let go."""
    demand = dataclasses.replace(LONG, tie_hash=tie)
    match = Match({}, evicted_from=2)
    assert chosen(demand, match, [view(0), view(1), view(2)], room=FakeRoom(0, 0, 0)) == 2


def unused_part(size_bytes: int, tokens: int) -> Held:
    """One block that a replica holds and does not reuse."""
    return Held(1, size_bytes, 0, tokens)


@pytest.mark.parametrize("tie", range(8))
def test_a_prompt_that_no_replica_reuses_stays_with_the_one_that_holds_it(tie):
    """Computing it costs the same everywhere, but only there it needs no new room, unless others are idle."""
    demand = dataclasses.replace(LONG, tie_hash=tie)
    match = Match({1: unused_part(39_600, 9_900)})
    assert chosen(demand, match, [view(0), view(1), view(2)], room=FakeRoom(1, 0, 1)) == 1
    assert chosen(demand, match, [view(0), view(1, in_flight=1)], room=FakeRoom(1, 0)) == 0


def test_room_is_needed_only_for_what_is_not_held():
    """A full replica that holds a prompt is charged for the rest of it, though it computes all of it again."""
    asked: dict[int, float] = {}

    class AskedRoom(FakeRoom):
        def dropped_tokens(self, replica: int, matched_tokens: float, uncached_tokens: float) -> float:
            asked[replica] = uncached_tokens
            return super().dropped_tokens(replica, matched_tokens, uncached_tokens)

    plan(LONG, Match({1: unused_part(39_000, 9_700)}), [view(0), view(1)], room=AskedRoom(1, 0))
    assert asked == {0: 10_000.0, 1: 300.0}


def test_a_replica_that_names_no_time_does_not_shorten_the_wait_for_the_others():
    views = [view(0, available=False), view(1, available=False, retry_after_seconds=5.0)]
    with pytest.raises(Overloaded) as caught:
        plan(LONG, NOTHING, views)
    assert caught.value.retry_after_seconds == 5.0


def test_the_error_names_the_pool_and_the_first_replicas_with_what_is_wrong_with_each():
    """And how many there are more."""
    views = [view(n, available=False, unavailable_because="unreachable") for n in range(9)]
    views[1] = view(1, available=False)
    first = "replica-0 is unreachable, replica-1 is unavailable, replica-2 is unreachable, replica-3 is unreachable"
    for known, why in ((views, f"{first}, and 5 more"), (views[:5], f"{first}, and 1 more"), (views[:4], first)):
        with pytest.raises(Overloaded) as caught:
            plan(LONG, NOTHING, known, pool_name="gpus")
        assert caught.value.message == f"No replica of pool 'gpus' can take this request now: {why}."
    with pytest.raises(Overloaded, match=r"^No replica of pool '' can take this request now: there is none\.$"):
        plan(LONG, NOTHING, [])


def test_a_tie_is_settled_though_another_replica_costs_much_more():
    """Whatever its place in the snapshot."""
    busy = view(0, in_flight=3, in_flight_seconds=0.0)
    idle = view(1, in_flight_seconds=0.0)
    far_behind = view(2, pending_tokens=1e6, in_flight_seconds=0.0)
    for views in ([busy, idle, far_behind], [far_behind, busy, idle], [idle, far_behind, busy]):
        assert chosen(LONG, NOTHING, views) == 1

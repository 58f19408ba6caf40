"""Cold turns: which they are, when the first that waits may go, and in which order."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.cold_admission import (
    COLD_QUIET,
    MOST_PASSED_OVER,
    NEW_AFTER_SECONDS,
    PATIENCE_SECONDS,
    PREFILL_WEIGHT,
    QUIET_SECONDS,
    RESERVED_SHARE,
    REST_SECONDS,
    ROOM_PATIENCE,
    SEARCH_SECONDS,
    SHORT_TOKENS,
    SPARING_ROUNDS,
    SPARING_SHARE,
    ColdQueue,
    ColdTurn,
    ReplicaRoom,
    TurnKind,
    about_as_good,
    can_run,
    classify,
    short_tokens,
)
from proxy.routing.fair_shares import Priority
from tests.support.operations import operations


def turn(name: str = "", prompt: float = 100_000.0, uncached: float = 90_000.0, **more) -> ColdTurn[str]:
    return ColdTurn(name, prompt, uncached, **more)


def room(replica: int = 0, pending: float = 0.0, running: float = 0.0, capacity: float | None = 1e6) -> ReplicaRoom:
    return ReplicaRoom(replica, pending, running, capacity)


@pytest.mark.parametrize(
    ("prompt", "uncached", "kind"),
    [
        (4_096, 4_096, TurnKind.SHORT),
        (100_000, SHORT_TOKENS, TurnKind.SHORT),
        (100_000, 30_000, TurnKind.WARM),
        (100_000, 30_001, TurnKind.COLD),
        (5_000, 5_000, TurnKind.COLD),
    ],
)
def test_a_turn_is_short_warm_or_cold_by_what_the_best_replica_lacks(prompt, uncached, kind):
    """Short by tokens, warm by a share of the prompt."""
    assert classify(prompt, uncached) is kind


def test_what_is_short_shrinks_with_small_caches():
    """A prompt of 3,000 tokens evicts a sixteenth of a cache of 48,000."""
    assert short_tokens(1_000_000) == SHORT_TOKENS
    assert short_tokens(48_000) == 480
    assert classify(3_000, 3_000, short_tokens(48_000)) is TurnKind.COLD
    assert about_as_good({0: 100.0, 1: 580.0, 2: 581.0}, short_tokens(48_000)) == {0, 1}


def test_a_warm_turn_may_go_where_it_costs_little_more_than_at_the_best():
    """Within 4,096 tokens."""
    assert about_as_good({0: 1_000.0, 1: 5_096.0, 2: 5_097.0}) == {0, 1}


def test_the_first_goes_to_a_quiet_replica_with_room():
    """Not to one that computes for longer, nor to one whose running prompts leave no room."""
    queue: ColdQueue[str] = ColdQueue()
    rooms = [
        room(0, pending=COLD_QUIET * QUIET_SECONDS),
        room(1, pending=COLD_QUIET * QUIET_SECONDS + 0.01),
        room(2, running=900_001.0),
        room(3, running=900_000.0),
        room(4, running=1e9, capacity=None),
    ]
    assert queue.open_to(queue.join(turn(), 0.0), rooms, 0.0) == {0, 3, 4}


def test_a_prompt_larger_than_the_cache_goes_when_nothing_runs():
    """It would wait for ever otherwise."""
    assert can_run(room(running=0.0, capacity=1_000), 100_000)
    assert not can_run(room(running=1.0, capacity=1_000), 100_000)


def test_what_prompts_share_takes_room_once():
    """A third of the cache would stay empty if it were counted for each."""
    shared_by_half = ReplicaRoom(0, 0.0, 1_500_000.0, 1e6, own_share=0.5)
    assert can_run(shared_by_half, 500_000)
    assert not can_run(shared_by_half, 500_001)


def resting(replica: int, tokens: float, running: float = 700_000.0) -> ReplicaRoom:
    """A replica where turns of `tokens` ended a moment ago; half of each prompt is shared."""
    return ReplicaRoom(replica, 0.0, running, 1e6, own_share=0.5, resting_tokens=tokens)


def test_under_pressure_a_turn_leaves_resting_sessions_alone_for_a_minute():
    """It goes at once if they fit as well, or if there is no pressure; and at last in any case."""
    queue: ColdQueue[str] = ColdQueue()
    waiting = queue.join(turn(), 0.0)
    most = (1.0 - RESERVED_SHARE) * 1e6 / 0.5 - 800_000.0
    rooms = [resting(0, most), resting(1, most + 1)]
    assert queue.open_to(waiting, rooms, 0.0, is_pressed=True) == {0}
    assert queue.open_to(waiting, rooms, 0.0, is_pressed=False) == {0, 1}
    assert queue.open_to(waiting, rooms, PATIENCE_SECONDS - 0.1, is_pressed=True) == {0}
    assert queue.open_to(waiting, rooms, PATIENCE_SECONDS, is_pressed=True) == {0, 1}


def test_the_minute_goes_on_while_others_are_the_first_in_between():
    """A tenant that has its part is passed over, and without pressure all that wait are looked at."""
    queue: ColdQueue[str] = ColdQueue()
    first = queue.join(turn(tenant="a"), 0.0)
    queue.join(turn(tenant="b"), 1.0)
    rooms = [ReplicaRoom(0, 0.0, 600_000.0, 1e6, resting_tokens=900_000.0)]
    busy = [dataclasses.replace(rooms[0], pending_seconds=9.0)]
    for second in range(int(PATIENCE_SECONDS)):
        assert queue.next_to_go(rooms, float(second), is_pressed=True) == (first, ())
        queue.next_to_go(rooms, second + 0.3, is_pressed=True, skipped={"a"})
        queue.next_to_go(busy, second + 0.6)
    assert queue.next_to_go(rooms, PATIENCE_SECONDS, is_pressed=True) == (first, (0,))
    queue.serve(first, 0, PATIENCE_SECONDS)
    queue.leave(first)


@pytest.mark.parametrize("is_pressed", [False, True])
@pytest.mark.parametrize("pace", [1.0, 0.5])
def test_a_prompt_that_never_fits_beside_those_that_run_goes_at_last(is_pressed: bool, pace: float):
    """If some of many small sessions always run, a prompt of most of the cache would keep all cold turns waiting."""
    queue: ColdQueue[str] = ColdQueue()
    rooms, patience = [room(0, running=200_000.0)], pace * PATIENCE_SECONDS
    large, small = queue.join(turn(prompt=900_000.0), 0.0), queue.join(turn(), 0.0)
    begins = 50.0  # when it is first asked

    def next_at(now: float) -> tuple[object, tuple[int, ...]] | None:
        return queue.next_to_go(rooms, now, is_pressed=is_pressed, patience_seconds=patience)

    assert next_at(begins) == (large, ())
    assert next_at(begins + ROOM_PATIENCE * patience - 0.1) == (large, ())
    assert next_at(begins + ROOM_PATIENCE * patience) == (large, (0,))
    queue.serve(large, 0, begins + ROOM_PATIENCE * patience)
    assert next_at(begins + ROOM_PATIENCE * patience) == (small, (0,))


def test_a_turn_goes_only_where_it_can_be_served_and_is_in_nobody_s_way_elsewhere():
    """It is in the way where it could be served: there it goes first."""
    queue: ColdQueue[str] = ColdQueue()
    only_one = queue.join(turn(unfit=frozenset({0}), prefill_seconds={1: 9.0}), 0.0)
    anywhere = queue.join(turn(prefill_seconds={0: 9.0, 1: 9.0}), 1.0)
    busy = {number: room(number, pending=9.0) for number in range(2)}
    quiet = {number: room(number) for number in range(2)}
    assert queue.open_to(only_one, quiet.values(), 2.0) == {1}
    for is_pressed in (True, False):
        assert queue.next_to_go([quiet[0], busy[1]], 2.0, is_pressed=is_pressed) == (anywhere, (0,))
        assert queue.next_to_go([busy[0], quiet[1]], 2.0, is_pressed=is_pressed) == (only_one, (1,))
        taken = dataclasses.replace(quiet[0], is_taken=True)
        assert queue.next_to_go([taken, busy[1]], 2.0, is_pressed=is_pressed) == (only_one, ())
    queue.leave(anywhere)
    assert queue.next_to_go([quiet[0], busy[1]], 2.0, is_pressed=True) is None


def test_no_more_than_some_turns_are_passed_over_in_one_look_but_for_one_each_half_second():
    """A worker looks hundreds of times a second, and thousands may wait for the same busy replica; but a turn behind
    them, for which a replica is free, must not wait until they are fewer."""
    queue: ColdQueue[str] = ColdQueue()
    unfit = [queue.join(turn(unfit=frozenset({0})), 0.0) for _ in range(MOST_PASSED_OVER)]
    anywhere = queue.join(turn(), 1.0)
    rooms, none_free = [room(0), room(1, pending=9.0)], [room(0, pending=9.0), room(1, pending=9.0)]
    assert queue.next_to_go(none_free, 2.0, is_pressed=True) == (unfit[0], ())
    found = [queue.next_to_go(rooms, 2.0 + 0.4 * SEARCH_SECONDS * look, is_pressed=True) for look in range(6)]
    assert found == [(anywhere, (0,)), None, None, (anywhere, (0,)), None, None]
    queue.leave(unfit[0])
    assert queue.next_to_go(rooms, 2.0 + 2.2 * SEARCH_SECONDS, is_pressed=True) == (anywhere, (0,))


def test_turns_that_only_busy_replicas_can_serve_cost_no_look_at_each_while_another_replica_is_free():
    """Each message of another worker makes one look; only the first of them waits for its replica to be next."""

    def costs(turns: int) -> int:
        queue: ColdQueue[str] = ColdQueue()
        for _ in range(turns):
            queue.join(turn(unfit=frozenset({0})), 0.0)
        rooms = [room(0), room(1, pending=9.0)]
        assert queue.next_to_go(rooms, 2.0, is_pressed=True) is None
        return operations(lambda: queue.next_to_go(rooms, 2.0, is_pressed=True))

    costs(1)
    assert costs(200) == costs(2)


def test_a_turn_that_is_passed_over_is_passed_by_none_that_needs_the_same_replicas():
    """Though there is room for a smaller one behind it: at its own replicas it goes first, as in a pool of equals."""
    queue: ColdQueue[str] = ColdQueue()
    large = queue.join(turn(prompt=9e5, unfit=frozenset({0})), 0.0)
    small = queue.join(turn(prompt=1e4, unfit=frozenset({0})), 1.0)
    rooms = [room(0), room(1, running=9e5)]
    assert queue.next_to_go(rooms, 2.0) is None
    queue.leave(large)
    assert queue.next_to_go(rooms, 2.0) == (small, (1,))


def test_who_cannot_be_served_where_is_known_of_all_that_wait():
    """Of those that were served or have left, nothing is kept."""
    queue: ColdQueue[str] = ColdQueue()
    served, left = [queue.join(turn(unfit=frozenset({0})), 0.0) for _ in range(2)]
    other = queue.join(turn(), 0.0)
    queue.serve(served, 1, 1.0)
    assert queue.unfit == {frozenset({0}), frozenset()}
    for _ in range(2):
        queue.leave(left)
        queue.leave(served)
    assert queue.unfit == {frozenset()}
    queue.leave(other)
    assert queue.unfit == set()


def test_nobody_is_spared_where_less_than_a_third_of_the_cache_runs():
    """Such a replica has time for a cold prefill, and waiting for those that rest would leave it idle."""
    queue: ColdQueue[str] = ColdQueue()
    waiting = queue.join(turn(), 0.0)
    least = SPARING_SHARE * 1e6 / 0.5
    rooms = [resting(0, 5e6, running=0.0), resting(1, 5e6, running=least - 1.0), resting(2, 5e6, running=least)]
    assert queue.open_to(waiting, rooms, 0.0, is_pressed=True) == {0, 1}


def test_a_turn_spares_nobody_once_it_has_waited_as_long_as_without_the_gate():
    """Without it turns wait for about a round: the time to compute the prompts of all sessions once."""
    queue: ColdQueue[str] = ColdQueue()
    waiting = queue.join(turn(), 100.0)
    rooms = [resting(0, 5e6)]
    late = 100.0 + SPARING_ROUNDS * 20.0
    assert queue.open_to(waiting, rooms, late - 0.1, is_pressed=True, round_seconds=20.0) == set()
    assert queue.open_to(waiting, rooms, late, is_pressed=True, round_seconds=20.0) == {0}


def test_the_minute_begins_when_a_turn_is_the_first():
    """If twice as many sessions are active as fit, all wait for longer; each would go without sparing any."""
    queue: ColdQueue[str] = ColdQueue()
    first, second = queue.join(turn(), 0.0), queue.join(turn(), 0.0)
    rooms = [ReplicaRoom(0, 0.0, 600_000.0, 1e6, resting_tokens=900_000.0)]
    for waiting, begins in ((first, 0.0), (second, PATIENCE_SECONDS)):
        assert queue.open_to(waiting, rooms, begins, is_pressed=True) == set()
        assert queue.open_to(waiting, rooms, begins + PATIENCE_SECONDS - 0.1, is_pressed=True) == set()
        assert queue.open_to(waiting, rooms, begins + PATIENCE_SECONDS, is_pressed=True) == {0}


def test_a_replica_that_is_never_quiet_takes_a_cold_turn_once_in_a_minute():
    """Counted from its last one, or from when turns began to wait if it never took any."""
    queue: ColdQueue[str] = ColdQueue()
    busy = [room(0, pending=9.0)]
    waiting = queue.join(turn(), 100.0)
    assert queue.open_to(waiting, busy, 100.0 + REST_SECONDS - 0.1) == set()
    assert queue.open_to(waiting, busy, 100.0 + REST_SECONDS) == {0}
    queue.serve(waiting, 0, 160.0)
    waiting = queue.join(turn(), 161.0)
    assert queue.open_to(waiting, busy, 160.0 + REST_SECONDS - 0.1) == set()
    assert queue.open_to(waiting, busy, 160.0 + REST_SECONDS) == {0}


def test_turns_go_in_order_of_arrival():
    """And one whose client left is not in the way."""
    queue: ColdQueue[str] = ColdQueue()
    all_of = [queue.join(turn(str(n)), float(n)) for n in range(4)]
    queue.leave(all_of[0])
    out = []
    while (head := queue.head(9.0)) is not None:
        out.append(head.item.item)
        queue.serve(head, 0, 9.0)
    assert out == ["1", "2", "3"]


def test_a_turn_of_a_session_that_was_served_goes_before_a_new_one_of_the_same_age():
    """Of the same age means no more than a second older."""
    queue: ColdQueue[str] = ColdQueue()
    queue.join(turn("new", is_new=True), 10.0)
    queue.join(turn("served"), 10.0 + NEW_AFTER_SECONDS * 0.9)
    queue.join(turn("later"), 10.0 + NEW_AFTER_SECONDS * 1.1)
    order = []
    while (head := queue.head(20.0)) is not None:
        order.append(head.item.item)
        queue.serve(head, 0, 20.0)
    assert order == ["served", "new", "later"]


def test_priorities_and_tenants_share_the_queue():
    """The order of arrival holds within one tenant and priority."""
    queue: ColdQueue[str] = ColdQueue()
    for number in range(3):
        queue.join(turn(f"flood {number}", tenant="flood"), float(number))
    queue.join(turn("other", tenant="other"), 5.0)
    queue.join(turn("urgent", tenant="flood", priority=Priority.HIGH), 6.0)
    order = []
    while (head := queue.head(9.0)) is not None:
        order.append(head.item.item)
        queue.serve(head, 0, 9.0)
    assert order[0] == "urgent"
    assert order.index("other") < order.index("flood 1")


@given(st.lists(st.tuples(st.booleans(), st.floats(0.0, 5.0)), min_size=1, max_size=50))
def test_no_turn_is_passed_by_more_than_a_second_of_later_ones(arrivals):
    """First come, first served, except for new ones and those of the same second."""
    queue: ColdQueue[float] = ColdQueue()
    now = 0.0
    for is_new, gap in arrivals:
        now += gap
        queue.join(ColdTurn(now, 9_000.0, 9_000.0, is_new), now)
    last = 0.0
    while (head := queue.head(now)) is not None:
        queue.serve(head, 0, now)
        assert head.item.item >= last - NEW_AFTER_SECONDS - 1e-9
        last = max(last, head.item.item)


def held_by(seconds: dict[int, float], name: str = "", **more) -> ColdTurn[str]:
    """A turn that takes `seconds` to compute at each replica."""
    return turn(name, prefill_seconds=seconds, **more)


def test_without_pressure_a_turn_waits_for_the_busy_replica_that_holds_part_of_it_and_lets_others_go():
    """It waits if that costs less than to compute the part again elsewhere."""
    queue: ColdQueue[str] = ColdQueue()
    saved = 2.0
    held = queue.join(held_by({0: 4.0, 1: 4.0 + saved}), 0.0)
    other = queue.join(held_by({0: 6.0, 1: 6.0}), 1.0)
    busy = PREFILL_WEIGHT * saved
    assert queue.next_to_go([room(0, pending=busy - 0.1), room(1)], 1.0) == (other, (1,))
    assert queue.next_to_go([room(0, pending=busy + 0.1), room(1)], 1.0) == (held, (1,))
    assert queue.next_to_go([room(0), room(1)], 1.0) == (held, (0, 1))
    assert queue.next_to_go([room(0, pending=9.0), room(1, pending=9.0)], 1.0) == (held, ())


def test_under_pressure_a_turn_goes_to_the_best_of_the_quiet_replicas():
    """To compute as much as possible counts for more then than what one turn takes."""
    queue: ColdQueue[str] = ColdQueue()
    held = queue.join(held_by({0: 4.0, 1: 9.0, 2: 8.0}), 0.0)
    rooms = [room(0, pending=1.0), room(1), room(2)]
    assert queue.next_to_go(rooms, 0.0, is_pressed=True) == (held, (2, 1))
    assert queue.next_to_go(rooms, 0.0) is None


def test_a_turn_waits_for_a_replica_that_holds_it_behind_those_that_do_so_already():
    """So that a flood of prompts with a common head does not queue at one replica beside idle ones."""
    queue: ColdQueue[str] = ColdQueue()
    queue.join(held_by({0: 10.0, 1: 12.0}), 0.0)
    second = queue.join(held_by({0: 10.0, 1: 12.0}), 0.0)
    assert queue.next_to_go([room(0, pending=1.0), room(1)], 0.0) == (second, (1,))


def test_the_work_of_all_turns_that_wait_for_a_replica_counts_for_the_next_one():
    """Not only that of the last one: here three wait, and a fourth would wait for longer than it takes elsewhere."""
    queue: ColdQueue[str] = ColdQueue()
    own, saved, pending = 4.0, 4.0, 1.0
    assert pending + 2 * own < PREFILL_WEIGHT * saved < pending + 3 * own
    alike = [queue.join(held_by({0: own, 1: own + saved}), 0.0) for _ in range(3)]
    rooms = [room(0, pending=pending), room(1)]
    assert queue.next_to_go(rooms, 0.0) is None
    alike.append(queue.join(held_by({0: own, 1: own + saved}), 0.0))
    assert queue.next_to_go(rooms, 0.0) == (alike[3], (1,))


def test_a_turn_does_not_wait_for_a_busy_replica_that_came_after_it():
    """Nothing says that it holds any of the prompt, and a quiet one is there."""
    queue: ColdQueue[str] = ColdQueue()
    first = queue.join(turn(prefill_seconds={0: 9.0}), 0.0)
    rooms = [ReplicaRoom(0, 0.0, 0.0, 1e6), ReplicaRoom(1, 5.0, 0.0, 1e6)]
    assert queue.next_to_go(rooms, 1.0) == (first, (0,))


def test_a_turn_does_not_wait_for_ever_for_the_replica_that_holds_it():
    """Its room or its state may keep it from ever becoming open."""
    queue: ColdQueue[str] = ColdQueue()
    held = queue.join(held_by({0: 4.0, 1: 9.0}), 0.0)
    rooms = [room(0, pending=1.0), room(1)]
    assert queue.next_to_go(rooms, 20.0 - 0.1, patience_seconds=20.0) is None
    assert queue.next_to_go(rooms, 20.0, patience_seconds=20.0) == (held, (1,))
    assert queue.next_to_go(rooms, PATIENCE_SECONDS - 0.1) is None


def test_a_replica_that_computes_a_cold_turn_takes_no_other_one():
    """Though it may be worth the wait."""
    queue: ColdQueue[str] = ColdQueue()
    taken = ReplicaRoom(0, 0.0, 0.0, 1e6, is_taken=True)
    queue.join(held_by({0: 4.0, 1: 9.0}), 0.0)
    assert queue.next_to_go([taken, room(1)], 0.0) is None
    other = queue.join(held_by({0: 9.0, 1: 9.0}), 0.0)
    assert queue.next_to_go([taken, room(1)], 0.0) == (other, (1,))


def test_no_turn_of_a_skipped_tenant_goes():
    """It has its part of the replicas."""
    queue: ColdQueue[str] = ColdQueue()
    queue.join(turn(tenant="a"), 0.0)
    assert queue.next_to_go([room(0)], 0.0, skipped={"a"}) is None
    other = queue.join(turn(tenant="b"), 1.0)
    assert queue.next_to_go([room(0)], 1.0, skipped={"a"}) == (other, (0,))

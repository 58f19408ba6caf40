"""The order of discarding: expired contexts first, then those worth least per byte, pinned ones never."""

from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from cache.contexts.retention import MEMORY_SECONDS, SHARE_AT_ONCE, Choice, Kept, StoredValue, choose, least_at_once

moments = st.floats(0, 1e6)


@given(moments, moments, st.floats(1e-9, 10), st.integers(1, 10**8), st.floats(1e-9, 10), st.integers(1, 10**8))
def test_ranks_order_as_worths_do_at_any_later_moment(
    one: float, two: float, value_one: float, size_one: int, value_two: float, size_two: int
) -> None:
    """So nothing has to be touched for the others to age."""
    first, second = StoredValue(1.0, one), StoredValue(3.0, two)
    now = max(one, two) + 10
    worths = first.worth(value_one, size_one, now), second.worth(value_two, size_two, now)
    ranks = first.rank(value_one, size_one), second.rank(value_two, size_two)
    if min(worths) > 1e-250 and abs(ranks[0] - ranks[1]) > 1e-3:
        assert (worths[0] < worths[1]) == (ranks[0] < ranks[1])


def test_uses_fade_by_e_in_the_memory_time_and_add_up() -> None:
    """Two uses one memory time apart are 1 + 1/e; a clock that goes back makes no more of them."""
    standing = StoredValue(1.0, 0.0).used(MEMORY_SECONDS)
    assert abs(standing.uses - 1.3679) < 1e-3
    assert standing.uses_at(0.0) == standing.uses


def test_the_least_worth_per_byte_goes_first_and_only_as_many_as_needed() -> None:
    """A small thing of the same worth outranks a large one."""
    small, large = StoredValue(1, 0).rank(1.0, 10), StoredValue(1, 0).rank(1.0, 1000)
    things = [("small", Kept(small, 10)), ("large", Kept(large, 1000))]
    assert choose(things, 500) == ["large"]
    assert choose(things, 1005) == ["large", "small"]


def test_of_many_a_share_goes_at_once() -> None:
    """All are read to choose one; with 500 the ten that are worth least go, and the next nine creations need not read
    them again. Pinned ones count neither as many nor as chosen.
    """
    many = [(number, Kept(float(number), 10)) for number in range(500)]
    pinned = [(number, Kept(-1.0, 10, pinned=True)) for number in range(500, 1000)]
    assert choose(pinned + many, 1) == list(range(10))
    assert choose(many, 150) == list(range(15))
    assert choose(many[:49], 1) == [0]


def test_of_many_that_are_considered_few_are_held() -> None:
    """A search reads the contexts of all clients, and what it holds at a time does not grow with their number."""
    contexts = 50_000
    choice: Choice[str] = Choice(1000, least_at_once(contexts))
    tracemalloc.start()
    for number in range(contexts):
        choice.consider(f"ctx_{number}", Kept(float(-number % 997), 10))
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    chosen = choice.chosen()
    assert chosen is not None
    assert len(chosen) == 1000
    assert held_bytes < 400 * len(chosen)


def test_what_has_expired_goes_before_anything_that_is_alive() -> None:
    """This holds for any worth."""
    assert choose([("alive", Kept(-9.0, 10)), ("over", Kept(9.0, 10, expired=True))], 5) == ["over"]


def test_what_is_pinned_stays_and_where_that_is_not_enough_there_is_no_choice() -> None:
    """None, so that the caller can refuse."""
    assert choose([("pinned", Kept(-9.0, 100, pinned=True)), ("free", Kept(9.0, 10))], 5) == ["free"]
    assert choose([("pinned", Kept(-9.0, 100, pinned=True))], 5) is None


@given(
    st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 100), st.booleans(), st.booleans())), st.integers(1, 500)
)
def test_what_is_chosen_is_enough_and_nothing_of_it_is_superfluous(
    rows: list[tuple[float, int, bool, bool]], needed: int
) -> None:
    """Without the last one it would not do, or it would be less than the share of many that go at once."""
    things = [(number, Kept(*row)) for number, row in enumerate(rows)]
    chosen = choose(things, needed)
    free = sum(row[1] for row in rows if not row[2])
    if chosen is None:
        assert free < needed
    else:
        sizes = [rows[number][1] for number in chosen]
        least = int(SHARE_AT_ONCE * sum(not row[2] for row in rows))
        assert sum(sizes) >= needed
        assert sum(sizes[:-1]) < needed or len(chosen) == least
        assert not any(rows[number][2] for number in chosen)

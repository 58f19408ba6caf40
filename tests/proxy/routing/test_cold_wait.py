"""How long a cold turn will wait, and that a Retry-After is kept."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.cold_wait import (
    GRACE_SECONDS,
    LATE_SECONDS,
    MAX_ROWS,
    MAX_TICKETS,
    SENDS,
    LineRates,
    Tickets,
)
from proxy.routing.fair_shares import MAX_TENANTS, Priority
from tests.support.operations import operations


def test_each_line_has_its_own_rate_within_the_bounds_of_the_present():
    """The least until it is measured; time in which none of the line waited does not count."""
    rates, line = LineRates(), ("a", Priority.NORMAL)
    assert rates.seconds_for(*line, 50_000.0, 3.0, 90.0) == 3.0
    for began in (100.0, 5_000.0):
        for _ in range(2):
            rates.joined(*line, began)
        for taken in (began + 10.0, began + 20.0):
            rates.took(*line, 50_000.0, taken)
            rates.left(*line)
    rates.joined("b", Priority.NORMAL, 5_000.0)
    rates.took("b", Priority.NORMAL, 50_000.0, 5_002.0)
    assert rates.seconds_for(*line, 50_000.0, 3.0, 90.0) == pytest.approx(10.0)
    assert rates.seconds_for(*line, 50_000.0, 12.0, 90.0) == 12.0
    assert rates.seconds_for(*line, 50_000.0, 3.0, 6.0) == 6.0
    assert rates.seconds_for("b", Priority.NORMAL, 50_000.0, 1.0, 90.0) == pytest.approx(2.0)
    assert rates.seconds_for("b", Priority.LOW, 50_000.0, 1.0, 90.0) == 1.0


def test_the_number_of_lines_is_bounded():
    """Those used longest ago are forgotten, even if turns still wait."""
    rates = LineRates()
    for number in range(MAX_TENANTS + 10):
        rates.joined(str(number), Priority.NORMAL, float(number))
    assert len(rates) == MAX_TENANTS
    rates.took("0", Priority.NORMAL, 1.0, 2_000.0)
    rates.left("0", Priority.NORMAL)
    assert rates.seconds_for("0", Priority.NORMAL, 1.0, 3.0, 9.0) == 3.0


def test_a_turn_that_was_sent_away_comes_back_as_old_as_it_is():
    """For its own tenant alone, and not for ever."""
    tickets = Tickets()
    tickets.give("a", 7, 50_000.0, 100.0, 30.0, 100.0)
    assert tickets.arrival("a", 7, 130.0) == 100.0
    assert tickets.arrival("b", 7, 130.0) == 130.0
    late = 100.0 + 2 * 30.0 + GRACE_SECONDS + 1.0
    assert tickets.arrival("a", 7, late) == late
    tickets.expire(late)
    assert len(tickets) == 0


def test_those_that_were_sent_away_are_counted_before_later_ones():
    """Or each of them would be told the same time."""
    tickets = Tickets()
    tickets.give("a", 1, 50_000.0, 100.0, 30.0, 100.0)
    tickets.give("a", 2, 70_000.0, 101.0, 30.0, 101.0)
    tickets.give("b", 1, 5.0, 101.0, 20.0, 101.0)
    assert list(tickets.expected(102.0, 102.0)) == [(19.0, "b", 5.0), (28.0, "a", 50_000.0), (29.0, "a", 70_000.0)]
    assert list(tickets.expected(101.0, 102.0)) == [(28.0, "a", 50_000.0)]
    tickets.take("a", 1)
    assert list(tickets.expected(102.0, 102.0)) == [(19.0, "b", 5.0), (29.0, "a", 70_000.0)]


@given(
    st.lists(
        st.tuples(st.sampled_from(("give", "take", "absorb", "expire")), st.integers(0, 5), st.integers(1, 40)),
        max_size=40,
    )
)
def test_whatever_came_and_went_those_that_are_left_are_expected_in_order(steps: list[tuple[str, int, int]]):
    """Here or in another worker, again and again."""
    tickets, due, now = Tickets(), dict[int, float](), 0.0
    for step, number, seconds in steps:
        back = float(seconds)
        if step == "give":
            tickets.give("a", number, 1.0, 0.0, back, now)
            due[number] = now + back
        elif step == "take":
            tickets.take("a", number)
            due.pop(number, None)
        elif step == "absorb":
            tickets.absorb({f"\0ticket:\0{number:x}\0a": (1.0, 1.0, back, 90.0)}, now)
            due[number] = now + back
        else:
            tickets.expire(now)
        now += 1.0
    left = sorted(max(each - now, 0.0) for each in due.values() if each + LATE_SECONDS >= now)
    assert [seconds for seconds, _, _ in tickets.expected(1e3, now)] == left


def test_who_comes_back_first_is_found_without_a_look_at_all_others():
    """Every turn that is judged asks, and thousands may have been turned away."""

    def costs(tickets_kept: int) -> int:
        tickets = Tickets()
        for number in range(tickets_kept):
            tickets.give("a", number, 1.0, 0.0, 30.0 + number, 0.0)
        return operations(lambda: list(islice(tickets.expected(1.0, 1.0), 4)))

    costs(4)
    assert costs(4_000) == costs(8)


def test_those_that_are_late_are_not_expected_any_more_and_keep_their_place():
    """Most of them have given up."""
    tickets = Tickets()
    tickets.give("a", 1, 50_000.0, 100.0, 30.0, 100.0)
    due = 100.0 + 30.0
    assert list(tickets.expected(200.0, due + LATE_SECONDS)) == [(0.0, "a", 50_000.0)]
    assert list(tickets.expected(200.0, due + LATE_SECONDS + 0.1)) == []
    assert tickets.arrival("a", 1, due + LATE_SECONDS + 0.1) == 100.0


def test_the_number_of_tickets_is_bounded():
    """The oldest go."""
    tickets = Tickets()
    for number in range(MAX_TICKETS + 5):
        tickets.give("a", number, 1.0, 0.0, 1.0, 0.0)
    assert len(tickets) == MAX_TICKETS


def test_a_turn_that_is_sent_away_again_is_as_new_as_the_newest():
    """It is not among the first to go when there are too many."""
    tickets = Tickets()
    for number in range(MAX_TICKETS):
        tickets.give("a", number, 1.0, 0.0, 1.0, 0.0)
    tickets.give("a", 0, 1.0, 0.0, 1.0, 0.0)
    tickets.give("a", MAX_TICKETS, 1.0, 0.0, 1.0, 0.0)
    assert tickets.arrival("a", 0, 1.0) == 0.0
    assert tickets.arrival("a", 1, 1.0) == 1.0


def test_the_other_workers_know_who_was_sent_away_and_who_came_back():
    """By their own clocks, a few times, and each pool for itself."""
    here, there, other = Tickets("one"), Tickets("one"), Tickets("two")
    here.give("a", 2**64 - 1, 50_000.0, 90.0, 30.0, 100.0)
    for _ in range(SENDS):
        rows = here.rows(102.0)
        there.absorb(rows, 5_002.0)
        other.absorb(rows, 5_002.0)
    assert here.rows(102.0) == {}
    assert (there.arrival("a", 2**64 - 1, 5_010.0), len(other)) == (4_990.0, 0)
    assert not there.is_due("a", 2**64 - 1, 5_029.0)
    assert there.is_due("a", 2**64 - 1, 5_030.0)
    assert list(there.expected(5_000.0, 5_002.0)) == [(28.0, "a", 50_000.0)]
    assert there.rows(5_002.0) == {}  # told by one, not by all in turn
    there.take("a", 2**64 - 1)
    here.absorb(there.rows(5_031.0), 131.0)
    assert (len(here), len(there)) == (0, 0)


def test_a_report_contains_a_few_tickets_and_each_gets_its_turn():
    """The others follow in the next reports."""
    here, there = Tickets(), Tickets()
    for number in range(2 * MAX_ROWS):
        here.give("a", number, 1.0, 0.0, 30.0, 0.0)
    assert len(here.rows(0.0)) == MAX_ROWS
    for _ in range(2):
        there.absorb(here.rows(0.0), 0.0)
    assert len(there) == 2 * MAX_ROWS


@pytest.mark.parametrize("name", ["\0ticket:one\0x\0a", "\0ticket:one\0", "\0tenant:one", "replica-1"])
@pytest.mark.parametrize("row", [(1.0, 1.0, 1.0, 1.0), ()])
def test_rows_that_are_no_tickets_change_nothing(name, row):
    """Replicas, tenants, damage."""
    tickets = Tickets("one")
    tickets.absorb({name: row}, 0.0)
    assert len(tickets) == 0


@pytest.mark.parametrize("row", [(1.0, 1.0, 1.0), (1.0, 1e9, 1.0, 1.0), (1.0, 1.0, 1.0, 1e9), (-1.0, 1.0, 1.0, 1.0)])
def test_a_damaged_ticket_is_left_out(row):
    """One that would last for ever, or count for less than nothing."""
    tickets = Tickets("one")
    tickets.absorb({"\0ticket:one\x007\0a": row}, 0.0)
    assert len(tickets) == 0

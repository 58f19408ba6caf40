"""The order of the queue."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.shortest_job import Entry, ShortestJobQueue


def test_least_work_goes_first():
    """Of requests that came together."""
    line: ShortestJobQueue[str] = ShortestJobQueue(120.0)
    for name, work in [("long", 9.0), ("short", 0.1), ("middle", 2.0)]:
        line.join(name, work, 0.0)
    assert [line.next(1.0), line.next(1.0), line.next(1.0), line.next(1.0)] == ["short", "middle", "long", None]


def test_equal_work_goes_in_the_order_in_which_it_came():
    """Of two equal requests, the later one does not overtake the earlier."""
    line: ShortestJobQueue[int] = ShortestJobQueue(120.0)
    for number in range(5):
        line.join(number, 1.0, 0.0)
    assert [line.next(0.0) for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_tenth_of_the_seconds_waited_counts_against_the_work():
    """One that has waited 20 s passes one that has 1.9 s less to do, and not one that has 2.1 s less."""
    line: ShortestJobQueue[str] = ShortestJobQueue(120.0)
    line.join("old", 5.0, 0.0)
    line.join("less", 2.9, 20.0)
    line.join("nearly", 3.1, 20.0)
    assert [line.next(20.0), line.next(20.0), line.next(20.0)] == ["less", "old", "nearly"]


def test_from_half_the_deadline_on_the_oldest_goes_first():
    """However much it has to do."""
    line: ShortestJobQueue[str] = ShortestJobQueue(120.0)
    line.join("long", 1_000.0, 0.0)
    line.join("longer", 2_000.0, 1.0)
    line.join("short", 0.1, 59.0)
    assert line.next(60.0) == "long"
    assert line.next(60.5) == "short"
    assert line.next(61.0) == "longer"


def test_who_left_is_gone():
    """From the count at once, and from the order however often it is told."""
    line: ShortestJobQueue[int] = ShortestJobQueue(120.0)
    places = [line.join(n, float(n), 0.0) for n in range(100)]
    for place in places[:90]:
        line.leave(place)
        line.leave(place)
    assert len(line) == 10
    assert [line.next(0.0) for _ in range(10)] == list(range(90, 100))
    assert line.next(0.0) is None


@given(st.floats(0.1, 1_000.0), st.floats(1.0, 200.0), st.floats(0.05, 2.0))
def test_no_one_starves(work, deadline, between):
    """With ever shorter ones arriving, a request is served by the first chance after half its deadline."""
    line: ShortestJobQueue[str] = ShortestJobQueue(deadline)
    line.join("patient", work, 0.0)
    now = 0.0
    for _ in range(int(deadline / 2 / between) + 2):
        now += between
        line.join("short", 0.0, now)
        if line.next(now) == "patient":
            break
    else:
        raise AssertionError("it starved")
    assert now <= deadline / 2 + between * 1.01


@given(
    st.lists(st.tuples(st.sampled_from(["join", "leave", "next"]), st.integers(0, 99), st.floats(0, 9)), max_size=80)
)
def test_everyone_is_served_once_or_leaves(script):
    """Nothing is lost and nothing comes twice, whatever the order of events."""
    line: ShortestJobQueue[int] = ShortestJobQueue(30.0)
    waiting: set[int] = set()
    entries: list[Entry[int]] = []
    now = 0.0
    for verb, which, step in script:
        now += step
        if verb == "join":
            waiting.add(len(entries))
            entries.append(line.join(len(entries), float(which), now))
        elif verb == "leave" and entries:
            line.leave(entries[which % len(entries)])
            waiting.discard(which % len(entries))
        elif verb == "next":
            served = line.next(now)
            if served is None:
                assert not waiting
            else:
                waiting.remove(served)
        assert len(line) == len(waiting)


def test_entries_that_are_gone_are_dropped_once_they_are_more_than_those_that_wait_and_some() -> None:
    """Twice as many as wait, and sixteen."""
    queue: ShortestJobQueue[int] = ShortestJobQueue(120.0)
    entries = [queue.join(number, 1.0, 0.0) for number in range(19)]
    for kept, entry in zip(range(18, 0, -1), entries, strict=False):
        queue.leave(entry)
        assert len(queue._by_priority) == (1 if kept == 1 else 19)  # noqa: SLF001 - no public name shows it
    assert queue.next(0.0) == 18


@given(
    st.lists(st.tuples(st.floats(0.0, 50.0), st.floats(0.0, 10.0), st.booleans()), max_size=30),
    st.floats(0.0, 200.0),
)
def test_all_in_order_are_those_that_would_be_served_one_after_the_other(arrivals, later):
    """The overdue ones first, without those that left; and nothing is taken out."""
    line: ShortestJobQueue[int] = ShortestJobQueue(120.0)
    now, entries = 0.0, []
    for number, (work, gap, leaves) in enumerate(arrivals):
        now += gap
        entries.append((line.join(number, work, now), leaves))
    for entry, leaves in entries:
        if leaves:
            line.leave(entry)
    now += later
    order = [entry.item for entry in line.in_order(now)]
    assert len(order) == len(line)
    assert order == [line.next(now) for _ in order]

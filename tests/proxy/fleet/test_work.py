"""The work that one process has at a replica, as its requests come, start, get tokens and end."""

from __future__ import annotations

from proxy.fleet.work import Charge, Work
from tests.support.operations import operations

RATE = 100.0  # tokens per second


def charged(work: Work, *, plain: bool = False, gated: bool = False, starts: bool = True) -> Charge:
    charge = Charge(0, 50.0, plain=plain, gated=gated, prompt_tokens=80.0)
    work.add(charge)
    if starts:
        work.start(charge, RATE, 1.0)
    return charge


def test_requests_that_leave_the_queue_in_any_order_leave_the_others_counted() -> None:
    """One that was sent, and one that was not."""
    work = Work()
    sent, first, second = charged(work), charged(work, starts=False), charged(work, starts=False)
    assert (work.in_flight, work.waiting, work.running_tokens) == (3, 2, 240.0)
    work.end(first, 2.0)
    assert (work.in_flight, work.waiting, work.running_tokens) == (2, 1, 160.0)
    work.end(sent, 2.0)
    assert (work.in_flight, work.waiting, work.running_tokens) == (1, 1, 80.0)
    work.leave(second)
    assert (work.in_flight, work.waiting, work.running_tokens, work.pending_tokens) == (0, 0, 0.0, 0.0)


def test_a_later_first_token_ends_the_prefills_before_it_that_cannot_be_seen() -> None:
    """One that can be seen and has none yet is still computed: engines may take a short prompt first."""
    work = Work()
    unseen, seen, later = charged(work, plain=True), charged(work), charged(work)
    work.first_token(later, 2.0)
    assert (unseen.pending, seen.pending, later.pending) == (False, True, False)
    assert work.pending_tokens == 50.0


def test_a_request_that_hangs_keeps_nothing_of_those_that_are_served_meanwhile() -> None:
    """Or each of them would cost more than the one before, and they would count as unanswered."""

    def cost(served_before: int) -> int:
        work = Work()
        hanging = charged(work)

        def serve() -> None:
            charge = charged(work)
            work.first_token(charge, 2.0)
            work.end(charge, 3.0)

        for _ in range(served_before):
            serve()
        assert (work.unanswered, work.head, work.pending_tokens) == (1, hanging, 50.0)
        return operations(serve)

    assert cost(1_000) == cost(1)


def test_one_that_waits_for_anothers_prefill_is_pending_but_not_in_flight() -> None:
    work = Work()
    gated = charged(work, gated=True, starts=False)
    assert (work.in_flight, work.waiting, work.pending_tokens) == (0, 0, 50.0)
    work.end(gated, 2.0)
    assert (work.in_flight, work.waiting, work.pending_tokens) == (0, 0, 0.0)

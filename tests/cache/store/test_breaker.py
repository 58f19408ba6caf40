"""The breaker: when it opens, when it probes, when it closes. Time is passed in."""

from __future__ import annotations

import pytest

from cache.store.breaker import FAILURES_TO_OPEN, PAUSE_MOST_SECONDS, WINDOW_SECONDS, Breaker, BreakerState


def failing(breaker: Breaker, times: int, start_seconds: float = 0.0, step_seconds: float = 0.1) -> list[bool]:
    return [breaker.failed(start_seconds + number * step_seconds) for number in range(times)]


def test_failures_in_a_row_that_last_open_it_once() -> None:
    """Further failures change nothing."""
    breaker = Breaker(BreakerState.CLOSED)
    assert failing(breaker, FAILURES_TO_OPEN + 2) == [False] * (FAILURES_TO_OPEN - 1) + [True, False, False]
    assert not breaker.closed


def test_one_pause_that_fails_many_at_once_opens_nothing() -> None:
    """Twenty failures within a fifth of a second are one blip."""
    assert not any(failing(Breaker(BreakerState.CLOSED), 20, step_seconds=0.01))


def test_a_success_or_a_long_time_forgets_earlier_failures() -> None:
    """They are not in a row then."""
    breaker = Breaker(BreakerState.CLOSED)
    failing(breaker, FAILURES_TO_OPEN - 1)
    breaker.succeeded()
    assert not breaker.failed(1.0)
    breaker = Breaker(BreakerState.CLOSED)
    failing(breaker, FAILURES_TO_OPEN - 1)
    assert not breaker.failed(1.0 + WINDOW_SECONDS)


def test_refusals_open_it_whatever_succeeds_between_them_and_a_probe_forgets_them() -> None:
    """Within the same time as failures in a row."""
    breaker = Breaker(BreakerState.CLOSED)
    for begin_seconds in (0.0, 100.0):
        opened = []
        for number in range(FAILURES_TO_OPEN):
            opened.append(breaker.failed(begin_seconds + number, is_refusal=True))
            breaker.succeeded()
        assert opened == [False] * (FAILURES_TO_OPEN - 1) + [True]
        breaker.probe_succeeded()
    for number in range(FAILURES_TO_OPEN):
        assert not breaker.failed(200.0 + number * (WINDOW_SECONDS + 1), is_refusal=True)
        breaker.succeeded()


def test_only_a_probe_closes_it_and_pauses_grow_until_one_succeeds() -> None:
    """Up to the longest."""
    breaker = Breaker(BreakerState.OPEN)
    breaker.succeeded()
    pauses = []
    for _ in range(8):
        pauses.append(breaker.pause_seconds(0.5))
        breaker.probing()
        assert breaker.state is BreakerState.HALF_OPEN
        breaker.probe_failed()
    assert pauses[:3] == pytest.approx([0.1, 0.2, 0.4])
    assert pauses[-1] == PAUSE_MOST_SECONDS
    breaker.probing()
    breaker.probe_succeeded()
    assert breaker.closed
    assert breaker.pause_seconds(0.5) == pytest.approx(0.1)

"""Findings of all workers are logged once, and a finding that one of them repeats is logged again."""

from __future__ import annotations

import logging

import pytest

from proxy.control.messages import Announced
from proxy.supervisor.announcements import LINES_MOST, SAME_SECONDS, Announcements

DOWN = Announced(logging.WARNING, "replica a (pool p) is down: refused")
UP = Announced(logging.INFO, "replica a (pool p) is up")


def logged(caplog: pytest.LogCaptureFixture, *events: tuple[int, Announced, float]) -> list[tuple[int, str]]:
    """Level and text of what is logged for (worker, line, seconds)."""
    caplog.set_level(logging.INFO)
    announcements = Announcements()
    for worker, line, seconds in events:
        announcements.add(worker, line, seconds)
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_the_same_line_of_several_workers_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    found = logged(caplog, (0, DOWN, 100.0), (1, DOWN, 100.1), (2, DOWN, 103.0), (1, UP, 104.0), (0, UP, 104.0))
    assert found == [(DOWN.level, DOWN.text), (UP.level, UP.text)]


def test_a_change_that_comes_again_is_logged_again(caplog: pytest.LogCaptureFixture) -> None:
    """From the same worker at once; from another one if it is too late to be the same event."""
    assert len(logged(caplog, (0, DOWN, 1.0), (0, UP, 2.0), (0, DOWN, 3.0), (0, UP, 4.0))) == 4
    caplog.clear()
    assert len(logged(caplog, (0, DOWN, 1.0), (1, DOWN, 1.0 + SAME_SECONDS))) == 2


def test_the_last_line_about_a_replica_is_true(caplog: pytest.LogCaptureFixture) -> None:
    """A worker's first line may come behind that of another one which got an answer earlier."""
    silent = Announced(logging.INFO, "replica a (pool p) has not responded yet")
    other = Announced(logging.INFO, "replica b (pool p) is up")
    found = logged(caplog, (0, UP, 1.0), (0, other, 1.0), (1, silent, 1.1), (1, other, 1.2), (1, UP, 1.3))
    assert [text for _, text in found] == [UP.text, other.text, silent.text, UP.text]


def test_a_late_line_of_another_worker_is_not_logged_behind_a_newer_one(caplog: pytest.LogCaptureFixture) -> None:
    """It is about the change before the last one."""
    found = logged(caplog, (0, DOWN, 1.0), (0, UP, 2.0), (1, DOWN, 2.1), (1, UP, 2.2))
    assert [text for _, text in found] == [DOWN.text, UP.text]


def test_as_many_lines_as_ever_may_come_take_bounded_memory() -> None:
    announcements = Announcements()
    for number in range(2 * LINES_MOST):
        announcements.add(0, Announced(logging.DEBUG, f"line {number}"), 0.0)
    assert len(announcements._logged) == LINES_MOST  # noqa: SLF001 - what is bounded

"""Errors of the last hour, by client, model and reason."""

from __future__ import annotations

import dataclasses

import pytest

from proxy.accounting.error_stats import ROWS_AT_MOST, ROWS_REPORTED, ErrorStats, error_reason
from proxy.model import Ending, Endpoint
from proxy.records import Outcome, Times
from tests.support.clock import FakeClock

FINE = Outcome("r", Endpoint.CHAT, "m", False, Ending.COMPLETE, 200, Times(0.0), tenant_name="web")


def failed(ending: Ending = Ending.UPSTREAM_FAILED, code: str | None = "upstream_timeout", **changes) -> Outcome:
    return dataclasses.replace(FINE, ending=ending, error_code=code, **changes)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (FINE, None),
        (failed(Ending.CLIENT_LEFT, None), None),
        (failed(), "upstream_timeout"),
        (failed(Ending.UPSTREAM_FAILED, None), "upstream_failed"),
        (failed(Ending.UPSTREAM_BROKE, "upstream_reset"), "upstream_broke"),
        (failed(Ending.UPSTREAM_ERROR, None), "upstream_error"),
        (failed(Ending.TRUNCATED, None), "truncated"),
        (failed(Ending.REFUSED, "rate_limit_exceeded"), "rate_limit_exceeded"),
        (failed(Ending.UPSTREAM_STATUS, None, status=404), "upstream_4xx"),
        (failed(Ending.UPSTREAM_STATUS, None, status=503), "upstream_5xx"),
        (failed(Ending.INTERNAL, None), "internal_error"),
    ],
)
def test_every_failure_has_a_reason(outcome: Outcome, reason: str | None) -> None:
    """From a closed set; success and a client that left have none."""
    assert error_reason(outcome) == reason


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(unix_seconds=600_000.0)


@pytest.fixture
def stats(clock: FakeClock) -> ErrorStats:
    return ErrorStats(clock.unix)


def test_equal_errors_are_one_row_and_the_most_frequent_comes_first(stats: ErrorStats, clock: FakeClock) -> None:
    """With the time of the last one."""
    stats.add(failed(tenant_name="batch"), "m", "upstream_timeout")
    for _ in range(3):
        stats.add(failed(), "m", "upstream_timeout")
        clock.advance(1)
    rows = stats.report()
    assert [(row.client, row.model, row.reason, row.count) for row in rows] == [
        ("web", "m", "upstream_timeout", 3),
        ("batch", "m", "upstream_timeout", 1),
    ]
    assert rows[0].last_unix_seconds == 600_002.0


def test_an_error_is_forgotten_after_an_hour(stats: ErrorStats, clock: FakeClock) -> None:
    """In steps of ten minutes, whether or not others follow."""
    stats.add(failed(), "m", "upstream_timeout")
    clock.advance(3000)
    stats.add(failed(), "m", "upstream_timeout")
    assert [row.count for row in stats.report()] == [2]
    clock.advance(600)
    assert [row.count for row in stats.report()] == [1]
    clock.advance(3600)
    assert stats.report() == []
    clock.advance(1e6)
    stats.add(failed(), "m", "upstream_timeout")
    assert [row.count for row in stats.report()] == [1]


def test_made_up_clients_do_not_grow_memory(stats: ErrorStats, clock: FakeClock) -> None:
    """The oldest go first, and a report is short."""
    for number in range(ROWS_AT_MOST + 100):
        clock.advance(0.1)
        stats.add(failed(tenant_name=f"client-{number}"), "m", "upstream_timeout")
    assert len(stats._counts) == len(stats._last) == ROWS_AT_MOST  # noqa: SLF001 - internal state that no public name shows
    assert ("client-0", "m", "upstream_timeout") not in stats._counts  # noqa: SLF001 - internal state that no public name shows
    assert len(stats.report()) == ROWS_REPORTED

"""When a replica that failed, or asked to be left alone, is tried again."""

from __future__ import annotations

import pytest

from proxy.fleet.breaker import Breaker, BreakerSettings, BreakerState, Cause, Failure

SETTINGS = BreakerSettings(first_seconds=2.0, most_seconds=8.0)


def breaker() -> Breaker:
    """A breaker whose back-offs are not shortened by chance."""
    return Breaker(SETTINGS, lambda: 0.5)


def broken(prompt: int, client: int = 1) -> Failure:
    """A failure of the connection."""
    return Failure(prompt, client, by_status=False)


def refused(prompt: int, client: int = 1) -> Failure:
    """A failure that the engine reported."""
    return Failure(prompt, client, by_status=True)


def test_a_replica_that_is_well_is_waited_for_by_nobody() -> None:
    """And another response changes nothing."""
    each = breaker()
    each.responded()
    assert (each.wait_seconds(0.0), each.allows(0.0), each.state(0.0)) == (0.0, True, BreakerState.CLOSED)
    assert not each.try_one(0.0)


def test_after_its_back_off_one_trial_is_made_at_a_time() -> None:
    """The others wait for its result, or for a further back-off."""
    each = breaker()
    assert each.unreachable(0.0)
    opens_seconds = each.wait_seconds(0.0)
    assert each.state(opens_seconds / 2) is BreakerState.OPEN
    assert not each.try_one(opens_seconds / 2)
    assert each.state(opens_seconds) is BreakerState.HALF_OPEN
    assert each.try_one(opens_seconds)
    assert not each.try_one(opens_seconds)
    assert not each.allows(opens_seconds)
    assert each.wait_seconds(opens_seconds) == SETTINGS.first_seconds
    each.abandon_trial()
    assert each.allows(opens_seconds)
    each.responded()
    assert (each.is_closed, each.cause) == (True, None)


def test_an_engine_that_reports_an_error_is_reachable() -> None:
    """So requests may be sent again, though its failure is remembered."""
    each = breaker()
    each.unreachable(0.0)
    assert not each.failed(broken(1), 0.1)
    assert each.cause is Cause.UNREACHABLE
    assert not each.failed(refused(1), 0.1)
    assert each.is_closed


def test_connections_that_break_open_it_after_three_prompts_of_one_client() -> None:
    """Errors that the engine reports need two clients, and the two kinds are not added up."""
    each = breaker()
    assert [each.failed(broken(prompt), 0.0) for prompt in (1, 1, 2, 3)] == [False, False, False, True]
    each = breaker()
    failures = [refused(1), refused(2), broken(3), broken(4)]
    assert [each.failed(failure, 0.0) for failure in failures] == [False] * 4
    assert each.failed(broken(5), 0.0)
    each = breaker()
    assert [each.failed(refused(prompt), 0.0) for prompt in (1, 2, 3)] == [False] * 3
    assert each.failed(refused(3, client=2), 0.0)
    assert each.cause is Cause.FAILING


def test_a_response_clears_the_evidence() -> None:
    each = breaker()
    for _ in range(3):
        for prompt in (1, 2):
            assert not each.failed(broken(prompt), 0.0)
        each.responded()
    assert each.is_closed


@pytest.mark.parametrize(("cause", "closes"), [(Cause.UNREACHABLE, True), (Cause.LOADING, True), (None, False)])
def test_a_health_check_that_is_answered_closes_it_only_if_it_could_not_be_reached_before(
    cause: Cause | None, closes: bool
) -> None:
    """One that fails its requests may answer checks all the time."""
    each = breaker()
    if cause is None:
        each.proven(0.0)
    else:
        each.unreachable(0.0, cause)
    each.reached()
    assert each.is_closed is closes


def test_a_full_replica_is_left_alone_for_the_longest_time_that_it_asked() -> None:
    """Within a bound, and for a second if it named none."""
    each = breaker()
    assert each.throttled(0.0, 10.0)
    assert not each.throttled(1.0, 9.0)
    assert each.wait_seconds(0.0) == 10.0
    assert each.throttled(1.0, 10.0)
    assert each.wait_seconds(1.0) == 10.0
    assert [each.pause_seconds(asked) for asked in (None, -5.0, 1e9)] == [1.0, 0.0, 120.0]


def test_back_offs_grow_while_nothing_succeeds_and_begin_anew_after_a_success() -> None:
    each = breaker()
    now_seconds, waits = 0.0, []
    for _ in range(4):
        each.unreachable(now_seconds)
        waits.append(each.wait_seconds(now_seconds))
        assert not each.unreachable(now_seconds), "it is open already"
        now_seconds += waits[-1]
    assert waits[0] < waits[1] < waits[2]
    assert max(waits) <= SETTINGS.most_seconds
    each.responded()
    each.unreachable(now_seconds)
    assert each.wait_seconds(now_seconds) == waits[0]


def test_failures_behind_a_good_head_are_forgotten_only_after_a_whole_response() -> None:
    """Each such response begins like a good one, so that its head alone proves nothing against them."""
    each = breaker()
    for prompt in range(SETTINGS.prompts_to_open):
        each.responded()
        opened = each.failed(Failure(prompt, prompt, by_status=True, after_head=True), 0.0)
        assert opened is (prompt == SETTINGS.prompts_to_open - 1)
    first_wait_seconds = each.wait_seconds(0.0)
    each.responded()  # the trial's response begins well, too
    assert each.is_closed
    assert each.failed(Failure(9, 9, by_status=True, after_head=True), 1.0)
    assert each.wait_seconds(1.0) > first_wait_seconds
    each.responded()
    each.completed()
    assert not each.failed(Failure(10, 10, by_status=True, after_head=True), 2.0)

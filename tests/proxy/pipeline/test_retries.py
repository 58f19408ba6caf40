"""When a request is tried at another replica, and how often."""

from __future__ import annotations

import pytest

from proxy.errors import (
    BadResponse,
    ConnectFailed,
    ConnectTimeout,
    FirstByteTimeout,
    IdleTimeout,
    PoolTimeout,
    ResetBeforeResponse,
    ResetMidResponse,
    TlsFailed,
    UpstreamError,
)
from proxy.model import Endpoint
from proxy.pipeline.retries import (
    REFUSALS_AT_MOST,
    AttemptFailure,
    FailureKind,
    RetryBudget,
    may_repeat,
    may_try_again,
    next_candidate,
    of_error,
    shows_the_replica_fails,
)
from proxy.records import Call, Candidate, Prompt, ReplicaView, Tenant

REPLICAS = [ReplicaView(n, f"r{n}", True, 1.0, 0.0, 0, None, 0.0, 0.05) for n in range(3)]
CANDIDATES = [Candidate(replica, 0, 0.0, 1.0, 1.0) for replica in REPLICAS]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectFailed("x"), FailureKind.UNSENT),
        (ConnectTimeout("x"), FailureKind.UNSENT),
        (TlsFailed("x"), FailureKind.UNSENT),
        (PoolTimeout("x"), FailureKind.UNSENT),
        (ResetBeforeResponse("x"), FailureKind.BROKEN),
        (ResetMidResponse("x"), FailureKind.BROKEN),
        (BadResponse("x"), FailureKind.BROKEN),
        (FirstByteTimeout("x"), FailureKind.SLOW),
        (IdleTimeout("x"), FailureKind.SLOW),
    ],
)
def test_every_error_has_a_kind(error: UpstreamError, kind: FailureKind) -> None:
    failure = of_error(CANDIDATES[1], error)
    assert (failure.replica, failure.name, failure.kind, failure.reason) == (1, "r1", kind, error.reason)


def call(method: str, endpoint: Endpoint, *, may_have_effects: bool = False) -> Call:
    """A request."""
    return Call("r", Tenant("t"), endpoint, method, "/", (), b"", 0.0, 0.0, may_have_effects=may_have_effects)


@pytest.mark.parametrize("kind", FailureKind)
def test_what_may_be_repeated(kind: FailureKind) -> None:
    """Requests that run a model or only read, unless they may still be computed; and all that were never sent."""
    failure = AttemptFailure(0, "r0", kind, "500")
    prompt = Prompt(b"", "m", False, (), (), 0)

    def repeats(asked: Call, prompt: Prompt | None = None, *, in_memory: bool = True) -> bool:
        return may_repeat(failure, asked, prompt, in_memory=in_memory)

    slow, unsent = kind is FailureKind.SLOW, kind is FailureKind.UNSENT
    for repeatable in (call("POST", Endpoint.CHAT), call("GET", Endpoint.OTHER), call("HEAD", Endpoint.OTHER)):
        assert repeats(repeatable, prompt) is not slow
        assert repeats(repeatable, prompt, in_memory=False) is unsent
    assert repeats(call("POST", Endpoint.OTHER)) is unsent
    assert repeats(call("DELETE", Endpoint.OTHER)) is unsent
    with_effects = Prompt(b"", "m", False, (), (), 0, has_effects=True)
    refused = kind is FailureKind.LACKS
    assert repeats(call("POST", Endpoint.RESPONSES), with_effects) is (unsent or refused)
    assert repeats(call("POST", Endpoint.INFERENCE, may_have_effects=True)) is (unsent or refused)


@pytest.mark.parametrize(("status", "again"), [("401", True), ("403", True), ("429", True), ("503", False)])
def test_what_has_effects_is_repeated_if_the_server_says_that_it_has_not_begun(status: str, again: bool) -> None:
    """A proxy may say 503 after it has lost its server."""
    failure = AttemptFailure(0, "r0", FailureKind.STATUS, status)
    asked = call("POST", Endpoint.INFERENCE, may_have_effects=True)
    assert may_repeat(failure, asked, None, in_memory=True) is again
    assert not may_repeat(failure, call("POST", Endpoint.OTHER), None, in_memory=True)


def failed(number: int, reason: str = "500") -> AttemptFailure:
    return AttemptFailure(number, f"r{number}", FailureKind.STATUS, reason)


def test_the_next_is_the_cheapest_that_is_open_and_was_not_tried() -> None:
    assert next_candidate([failed(0)], CANDIDATES, [True, True, True]) is CANDIDATES[1]
    assert next_candidate([failed(0)], CANDIDATES, [True, False, True]) is CANDIDATES[2]
    assert next_candidate([failed(0), failed(2)], CANDIDATES, [True, False, True]) is None


def test_a_replica_alone_is_tried_again_once_if_its_connection_died() -> None:
    """Not after a status, and not a third time."""
    alone = CANDIDATES[:1]
    died = failed(0, ResetBeforeResponse.reason)
    assert next_candidate([died], alone, [True]) is alone[0]
    assert next_candidate([died], alone, [False]) is alone[0]
    assert next_candidate([died, died], alone, [True]) is None
    assert next_candidate([failed(0)], alone, [True]) is None


@pytest.mark.parametrize(
    ("failures", "refusals", "max_retries", "again"),
    [
        (1, 0, 0, False),
        (1, 0, 1, True),
        (2, 0, 1, False),
        (2, 0, 2, True),
        (3, 0, 2, False),
        (0, 1, 0, False),
        (0, REFUSALS_AT_MOST - 1, 1, True),
        (0, REFUSALS_AT_MOST, 1, False),
        (1, REFUSALS_AT_MOST - 1, 1, True),
        (2, 1, 1, False),
    ],
)
def test_failures_are_bounded_by_the_retries_and_refusals_by_their_own_number(
    failures: int, refusals: int, max_retries: int, again: bool
) -> None:
    """Neither counts as the other; where nothing may be tried again, refusals may not either."""
    lacks = AttemptFailure(1, "r1", FailureKind.LACKS, "model_not_found")
    assert may_try_again([failed(0)] * failures + [lacks] * refusals, max_retries) is again


def test_a_success_elsewhere_proves_nothing_about_a_429_or_a_connection_that_was_not_made() -> None:
    assert shows_the_replica_fails(failed(0))
    assert not shows_the_replica_fails(failed(0, "429"))
    assert not shows_the_replica_fails(of_error(CANDIDATES[0], ConnectFailed("x")))


def test_the_budget_is_a_tenth_of_the_requests_of_ten_seconds_and_at_least_three() -> None:
    budget = RetryBudget()
    assert [budget.take(0.0) for _ in range(4)] == [True, True, True, False]
    for number in range(100):
        budget.note_request(number / 100)
    assert [budget.take(1.0) for _ in range(8)] == [True] * 7 + [False]
    assert not budget.take(9.9)
    assert [budget.take(10.5) for _ in range(2)] == [True, True]  # the first three are ten seconds old
    for _ in range(2):
        budget.take(25.0)
    assert budget.take(25.0)
    assert not budget.take(25.0)  # and the requests are, too


def test_each_end_of_the_budgets_time_belongs_to_it() -> None:
    """A retry counts until it is ten seconds old, and the requests of a second until all of it is that old."""
    budget = RetryBudget()
    assert [budget.take(5.0) for _ in range(3)] == [True] * 3
    assert not budget.take(14.9)
    assert budget.take(15.0)
    budget = RetryBudget()
    for _ in range(50):
        budget.note_request(5.9)
    assert [budget.take(16.0) for _ in range(6)] == [True] * 5 + [False]
    budget = RetryBudget()
    for _ in range(50):
        budget.note_request(5.9)
    assert [budget.take(16.1) for _ in range(4)] == [True] * 3 + [False]


def test_old_requests_are_forgotten_though_nothing_is_retried() -> None:
    """A pool that never fails keeps a dozen numbers."""
    budget = RetryBudget()
    for second in range(1_000):
        budget.note_request(float(second))
    assert len(budget._requests) <= 12  # noqa: SLF001 - internal state that no public name shows
    assert budget._total == len(budget._requests)  # noqa: SLF001

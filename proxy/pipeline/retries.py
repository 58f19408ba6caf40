"""Decide whether a request that failed at one replica is tried at another. Pure: clocks are passed in.

Nothing of a response may have reached the client. A request that timed out waiting for its first byte is never sent
again: the engine usually goes on computing its prompt, and another would compute it a second time.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from proxy.errors import (
    ConnectFailed,
    FirstByteTimeout,
    IdleTimeout,
    PoolTimeout,
    ResetBeforeResponse,
    UpstreamError,
)
from proxy.records import Call, Candidate, Prompt

BUDGET_SECONDS: Final = 10.0
BUDGET_SHARE: Final = 0.1
BUDGET_LEAST: Final = 3

REFUSALS_AT_MOST: Final = 8
"""Replicas that may refuse a request for what they lack before it is given up. Such a refusal takes no time, and is
remembered, so it is no part of the budget and of the number of retries."""

_IDEMPOTENT_METHODS: Final = frozenset({"GET", "HEAD"})
_REFUSING: Final = frozenset({"401", "403", "429"})
"""Statuses of a server that has not begun. Others do not show that: a proxy that lost its server may say 503."""


class FailureKind(enum.Enum):
    """Kinds of failure of an attempt, as far as a retry depends on them."""

    UNSENT = "unsent"  # no connection: the replica has not seen the request
    BROKEN = "broken"  # the connection or the response broke before anything reached the client
    SLOW = "slow"  # no first byte or no event in time: the replica may still be computing
    STATUS = "status"  # a response with a status that asks for another try
    HIDDEN = "hidden"  # a status of success, and an error or nothing behind it
    LACKS = "lacks"  # a refusal for something that another replica may have; nothing was computed


class AttemptFailure(NamedTuple):
    """A failed attempt. `reason` is the label of the metric and of the header: an error's reason, or the status."""

    replica: int
    name: str
    kind: FailureKind
    reason: str
    reused: bool = False  # on a pooled connection that the upstream had closed


def shows_the_replica_fails(failure: AttemptFailure) -> bool:
    """Return whether success at another replica proves that this one fails. A 429 is about the key and the model."""
    return failure.kind not in (FailureKind.UNSENT, FailureKind.LACKS) and failure.reason != "429"


def of_error(candidate: Candidate, error: UpstreamError) -> AttemptFailure:
    """Describe an attempt that raised `error` before anything reached the client."""
    if isinstance(error, ConnectFailed | PoolTimeout):
        kind = FailureKind.UNSENT
    elif isinstance(error, FirstByteTimeout | IdleTimeout):
        kind = FailureKind.SLOW
    else:
        kind = FailureKind.BROKEN
    reused = isinstance(error, ResetBeforeResponse) and error.reused
    return AttemptFailure(candidate.replica.id, candidate.replica.name, kind, error.reason, reused)


def is_repeatable(call: Call, prompt: Prompt | None) -> bool:
    """Return whether the request may run twice without harm: all that it does is its answer."""
    if not call.endpoint.runs_model:
        return call.method in _IDEMPOTENT_METHODS
    return not call.may_have_effects and (prompt is None or not prompt.has_effects)


def may_repeat(failure: AttemptFailure, call: Call, prompt: Prompt | None, *, in_memory: bool) -> bool:
    """Return whether a request may be sent again without harm. A body that is not `in_memory` can be read once."""
    if failure.kind is FailureKind.UNSENT:
        return True
    if failure.kind is FailureKind.SLOW or not in_memory:
        return False
    if is_repeatable(call, prompt):
        return True
    was_refused = failure.kind is FailureKind.LACKS or failure.reason in _REFUSING
    return call.endpoint.runs_model and was_refused


def may_try_again(failures: Sequence[AttemptFailure], max_retries: int) -> bool:
    """Return whether the number of attempts allows another one after `failures`."""
    refusals = sum([failure.kind is FailureKind.LACKS for failure in failures])
    return max_retries > 0 and len(failures) - refusals <= max_retries and refusals < REFUSALS_AT_MOST


def next_candidate(
    failures: Sequence[AttemptFailure], candidates: Sequence[Candidate], open_replicas: Sequence[bool]
) -> Candidate | None:
    """Return the candidate for the next attempt: the cheapest untried one that is open.

    A single candidate is tried once more if its connection died before the first byte of a response.
    """
    tried = {failure.replica for failure in failures}
    for candidate, is_open in zip(candidates, open_replicas, strict=True):
        if is_open and candidate.replica.id not in tried:
            return candidate
    if len(candidates) == 1 and len(failures) == 1 and failures[0].reason == ResetBeforeResponse.reason:
        return candidates[0]
    return None


class RetryBudget:
    """Retries allowed in one pool: a tenth of its requests of the last ten seconds, at least three.

    Without it an outage would multiply the load by the number of retries.
    """

    def __init__(self) -> None:
        self._requests: deque[tuple[int, int]] = deque()  # (second, requests in it)
        self._retries: deque[float] = deque()
        self._total = 0

    def note_request(self, now_seconds: float) -> None:
        """Count a request."""
        second = int(now_seconds)
        requests = self._requests
        if requests and requests[-1][0] == second:
            requests[-1] = (second, requests[-1][1] + 1)
        else:
            requests.append((second, 1))
            self._drop_old(now_seconds)
        self._total += 1

    def take(self, now_seconds: float) -> bool:
        """Spend one retry. Return False if none is left."""
        self._drop_old(now_seconds)
        if len(self._retries) >= max(BUDGET_LEAST, self._total * BUDGET_SHARE):
            return False
        self._retries.append(now_seconds)
        return True

    def _drop_old(self, now_seconds: float) -> None:
        oldest = now_seconds - BUDGET_SECONDS
        while self._requests and self._requests[0][0] < oldest - 1:
            self._total -= self._requests.popleft()[1]
        while self._retries and self._retries[0] <= oldest:
            self._retries.popleft()

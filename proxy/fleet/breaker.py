"""Decide when a replica that failed, or is full, is tried again. Pure: clock and randomness are passed in.

A breaker is closed while the replica is fine. Each way to open it is a `Cause`:

    cause        opened by                                                      closed by
    -----------  -------------------------------------------------------------  ----------------------------------
    UNREACHABLE  a connection that could not be made                            any response, to a request or probe
    LOADING      a health check answered "loading the model"                    any other response
    SILENT       health checks without an answer (`proxy.fleet.silence`)        any response, to a request or probe
    FAILING      evidence that the replica fails, not the request (see below)   a response that is not a failure
    THROTTLED    503 or 529: the replica is full                                time

After its back-off (doubling with each opening in a row) one request or probe may try; its result decides. A silent
replica is tried by probes only: a request would wait for as long as a prefill may take.

A request may fail through its own fault, so failures are weighed as evidence: a request that failed here and
succeeded elsewhere proves at once that the replica fails; otherwise it takes several distinct prompts, and, for
failures that the engine itself reported by a status, several clients too. A response that is not a failure clears all
of it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from proxy.backoff import ExponentialBackoff

CLIENTS_TO_OPEN: Final = 2
"""Distinct clients whose requests must have failed by status: one client's bad prompts must not affect others."""

_EVIDENCE_KEPT: Final = 64  # failures remembered, the latest ones


class BreakerState(enum.StrEnum):
    """State of a breaker; the value is the metric label."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Cause(enum.StrEnum):
    """Why a breaker is open; in log lines and in the message of a 503."""

    UNREACHABLE = "unreachable"
    LOADING = "loading its model"
    SILENT = "not responding"
    FAILING = "failing"
    THROTTLED = "full"


PROBED: Final = frozenset({Cause.UNREACHABLE, Cause.LOADING, Cause.SILENT})
"""Causes that the answer to a probe removes. One that failed requests is tried by a request: its model list proves
nothing.
"""


@dataclass(frozen=True, slots=True)
class BreakerSettings:
    """Time for which a replica is left alone: `first_seconds`, doubling up to `most_seconds`."""

    first_seconds: float = 0.5
    most_seconds: float = 30.0
    prompts_to_open: int = 3  # distinct prompts that failed in a row, without proof that the replica fails
    most_retry_after_seconds: float = 120.0  # a longer Retry-After is cut to this
    throttled_seconds: float = 1.0  # after a 429, 503 or 529 without a usable Retry-After


class Failure(NamedTuple):
    """A failed request as evidence. `prompt` and `client` are hashes that only distinguish prompts and clients."""

    prompt: int
    client: int
    by_status: bool  # the engine answered with an error; otherwise the connection or the response broke
    after_head: bool = False  # the response began with the head of a success


class Breaker:
    """The breaker of one replica. `random` returns floats in [0, 1)."""

    __slots__ = ("_backoff", "_failures", "_random", "_settings", "_trying", "_until_seconds", "cause")

    def __init__(self, settings: BreakerSettings, random: Callable[[], float]) -> None:
        self._settings = settings
        self._random = random
        self._backoff = ExponentialBackoff(settings.first_seconds, settings.most_seconds)
        self._failures: dict[Failure, None] = {}
        self._until_seconds: float | None = None
        self._trying = False
        self.cause: Cause | None = None

    def state(self, now_seconds: float) -> BreakerState:
        """Return whether it is closed, open, or past its back-off and waiting for a trial."""
        if self._until_seconds is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now_seconds < self._until_seconds else BreakerState.HALF_OPEN

    @property
    def is_closed(self) -> bool:
        """True if nothing is wrong."""
        return self._until_seconds is None

    def allows(self, now_seconds: float) -> bool:
        """Return whether a request may be sent now: it is closed, or its back-off is over and no trial runs."""
        if self._until_seconds is None:
            return True
        return now_seconds >= self._until_seconds and not self._trying and self.cause is not Cause.SILENT

    def wait_seconds(self, now_seconds: float) -> float:
        """Return the time until the next trial; the first back-off while a trial runs."""
        if self._until_seconds is None:
            return 0.0
        remaining = self._until_seconds - now_seconds
        return remaining if remaining > 0 else self._settings.first_seconds

    def try_one(self, now_seconds: float) -> bool:
        """Claim the one trial of a half-open breaker. Return whether it was claimed; its result must be reported."""
        if self._until_seconds is None or now_seconds < self._until_seconds or self._trying:
            return False
        self._trying = True
        return True

    def abandon_trial(self) -> None:
        """End a trial without a result, such as one whose client left, so that another may start."""
        self._trying = False

    def responded(self) -> None:
        """Close after the head of a response that is not a failure.

        Failures that were seen only after such a head are remembered, with the back-off that they have led to, until
        a response is `completed`.
        """
        if self._failures or self._until_seconds is not None:
            self._failures = {failure: None for failure in self._failures if failure.after_head}
            self._close(keep_backoff=bool(self._failures))

    def completed(self) -> None:
        """Forget all evidence after a whole response without an error."""
        if self._failures:
            self._failures.clear()
            self._backoff.reset()

    def reached(self) -> None:
        """Note a probe that was answered. That closes it only if the cause is one of `PROBED`."""
        if self.cause in PROBED:
            self._close()
        self._trying = False

    def unreachable(self, now_seconds: float, cause: Cause = Cause.UNREACHABLE) -> bool:
        """Open at once. Return False if it was open already."""
        return self._open(now_seconds, cause)

    def failed(self, failure: Failure, now_seconds: float, *, may_open: bool = True) -> bool:
        """Weigh a failed request. Return whether this opened it; `may_open` False only remembers the evidence."""
        if len(self._failures) >= _EVIDENCE_KEPT:
            del self._failures[next(iter(self._failures))]
        self._failures[failure] = None
        self._trying = False
        if failure.by_status and self.cause in (Cause.UNREACHABLE, Cause.SILENT):
            self._close()  # a status shows that the engine is there
        if not may_open or not self._is_convincing():
            return False
        return self._open(now_seconds, Cause.FAILING)

    def proven(self, now_seconds: float) -> bool:
        """Open after a request that failed here and succeeded elsewhere. Return False if it was open already."""
        return self._open(now_seconds, Cause.FAILING)

    def throttled(self, now_seconds: float, retry_after_seconds: float | None) -> bool:
        """Do not use a full replica for as long as it asked. Return False if the present pause is longer already."""
        until = now_seconds + self.pause_seconds(retry_after_seconds)
        self._trying = False
        if self._until_seconds is not None and until <= self._until_seconds:
            return False
        self._until_seconds, self.cause = until, Cause.THROTTLED
        return True

    def pause_seconds(self, retry_after_seconds: float | None) -> float:
        """Return the seconds for which a Retry-After is honoured; None if it is missing or malformed."""
        asked = self._settings.throttled_seconds if retry_after_seconds is None else retry_after_seconds
        return min(max(asked, 0.0), self._settings.most_retry_after_seconds)

    def _is_convincing(self) -> bool:
        failures = self._failures
        if len({failure.prompt for failure in failures}) < self._settings.prompts_to_open:
            return False
        if any(not failure.by_status for failure in failures):
            broken = {failure.prompt for failure in failures if not failure.by_status}
            if len(broken) >= self._settings.prompts_to_open:
                return True
        return len({failure.client for failure in failures}) >= CLIENTS_TO_OPEN

    def _open(self, now_seconds: float, cause: Cause) -> bool:
        if self._until_seconds is not None and now_seconds < self._until_seconds:
            return False  # one of several requests that were under way when it opened
        if self.cause is Cause.SILENT and cause is Cause.FAILING:
            return False  # requests that time out there are no news, and a request would be tried after the back-off
        self._until_seconds = now_seconds + self._backoff.next_seconds(self._random())
        self.cause = cause
        self._trying = False
        return True

    def _close(self, *, keep_backoff: bool = False) -> None:
        if not keep_backoff:
            self._backoff.reset()
        self._until_seconds = None
        self._trying = False
        self.cause = None

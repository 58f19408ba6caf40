"""Count errors of the last hour by client, model and reason, for the status page. Pure.

Bounded: of more combinations than `ROWS_AT_MOST`, those that occurred longest ago are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import nlargest
from typing import Final

from proxy.control.error_rows import ErrorRow
from proxy.model import Ending
from proxy.records import Outcome

ROWS_AT_MOST: Final = 512
ROWS_REPORTED: Final = 50
_COMPLETE: Final = Ending.COMPLETE
_SLOTS: Final = 6
_SLOT_SECONDS: Final = 600.0
_REASONS = {
    Ending.UPSTREAM_FAILED: "upstream_failed",
    Ending.UPSTREAM_BROKE: "upstream_broke",
    Ending.UPSTREAM_ERROR: "upstream_error",
    Ending.TRUNCATED: "truncated",
    Ending.REFUSED: "other",
    Ending.INTERNAL: "internal_error",
}
_CODE_SAYS_MORE = frozenset({Ending.UPSTREAM_FAILED, Ending.REFUSED})


def error_reason(outcome: Outcome) -> str | None:
    """Return why a request failed, as a metric label from a closed set; None if it did not fail.

    A client that left is not an error.
    """
    ending = outcome.ending
    if ending is _COMPLETE:
        return None
    if ending is Ending.UPSTREAM_STATUS:
        return f"upstream_{outcome.status // 100}xx"
    reason = _REASONS.get(ending)
    return outcome.error_code if outcome.error_code and ending in _CODE_SAYS_MORE else reason


class ErrorStats:
    """The errors of one worker."""

    def __init__(self, unix_seconds: Callable[[], float]) -> None:
        self._unix_seconds = unix_seconds
        self._counts: dict[tuple[str, str, str], list[int]] = {}  # per ten minutes, the present ones first
        self._last: dict[tuple[str, str, str], float] = {}
        self._slot = 0

    def add(self, outcome: Outcome, model: str, reason: str) -> None:
        """Count an error; `model` is the metric label, `reason` that of `error_reason`."""
        now_seconds = self._turn()
        key = (outcome.tenant_name, model, reason)
        self._counts.setdefault(key, [0] * _SLOTS)[0] += 1
        self._last[key] = now_seconds
        if len(self._counts) > ROWS_AT_MOST:
            oldest = min(self._last, key=self._last.__getitem__)
            del self._counts[oldest], self._last[oldest]

    def report(self) -> list[ErrorRow]:
        """Return the most frequent errors of the last hour."""
        self._turn()
        best = nlargest(ROWS_REPORTED, self._counts.items(), key=lambda item: sum(item[1]))
        return [ErrorRow(*key, sum(counts), self._last[key]) for key, counts in best]

    def _turn(self) -> float:
        """Move on to the present ten minutes; returns the time."""
        now_seconds = self._unix_seconds()
        passed = int(now_seconds // _SLOT_SECONDS) - self._slot
        if passed > 0:
            self._slot += passed
            fresh = [0] * min(passed, _SLOTS)
            self._counts = {key: (fresh + counts)[:_SLOTS] for key, counts in self._counts.items()}
            self._counts = {key: counts for key, counts in self._counts.items() if any(counts)}
            self._last = {key: self._last[key] for key in self._counts}
        return now_seconds

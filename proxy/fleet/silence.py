"""Decide from unanswered health checks that a replica is frozen. Pure: clocks are passed in.

A stopped or hung process still accepts connections, because its kernel does, and then sends nothing. A busy engine
may look the same: one with a single thread answers nothing while it computes a prompt, and a loaded event loop
answers late. So a replica is frozen only if

- several health checks in a row went unanswered,
- nothing else has come from it since the first of them was sent: no byte of any response,
- it has no request to work on, or has had much longer for those that it had than was predicted.
"""

from __future__ import annotations

from typing import Final

UNANSWERED_CHECKS: Final = 3
"""Health checks in a row that must go unanswered; a single pause of the replica or of the network shows nothing."""


class Silence:
    """The unanswered health checks of one replica.

    `since_seconds` is when the first of them was sent, `expected_seconds` when the prefill that the replica had to do
    then should end.
    """

    __slots__ = ("checks", "expected_seconds", "since_seconds")

    def __init__(self, since_seconds: float, expected_seconds: float) -> None:
        self.since_seconds = since_seconds
        self.expected_seconds = expected_seconds
        self.checks = 0

    def shows_a_frozen_replica(self, now_seconds: float, *, has_work: bool, busy_seconds: float) -> bool:
        """Return whether it has lasted too long; a replica that has work may be silent for `busy_seconds` more."""
        if self.checks < UNANSWERED_CHECKS:
            return False
        return not has_work or now_seconds - max(self.since_seconds, self.expected_seconds) >= busy_seconds

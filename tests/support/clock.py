"""A clock that moves only when a test moves it."""

from __future__ import annotations


class FakeClock:
    """Both clocks of `proxy.clock.Clock`, advanced by hand."""

    def __init__(self, monotonic_seconds: float = 1_000.0, unix_seconds: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic_seconds
        self._unix = unix_seconds

    def monotonic(self) -> float:
        return self._monotonic

    def unix(self) -> float:
        return self._unix

    def advance(self, seconds: float) -> None:
        """Move both clocks forward."""
        self._monotonic += seconds
        self._unix += seconds

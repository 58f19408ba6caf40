"""Measure the rate at which what waits is taken, to predict how long more would wait. Pure."""

from __future__ import annotations

from math import exp
from typing import Final

MEMORY_SECONDS: Final = 120.0
"""Time constant of the measured rate: several long prefills."""


class WaitingRate:
    """Work that replicas take per second while some waits: tokens, or requests."""

    def __init__(self) -> None:
        self._work = 0.0
        self._seconds = 0.0
        self._last_seconds: float | None = None

    def began(self, now_seconds: float) -> None:
        """Note that work begins to wait, after none did."""
        self._last_seconds = now_seconds

    def took(self, work: float, now_seconds: float) -> None:
        """Note that `work` that waited was sent."""
        last = now_seconds if self._last_seconds is None else self._last_seconds
        elapsed = max(now_seconds - last, 0.0)
        kept = exp(-elapsed / MEMORY_SECONDS)
        self._work = self._work * kept + work
        self._seconds = self._seconds * kept + elapsed
        self._last_seconds = now_seconds

    @property
    def is_measured(self) -> bool:
        """True if work was taken, and waited long enough for a rate."""
        return self._seconds > 1.0 and self._work > 0.0

    def seconds_for(self, work: float, first_guess: float) -> float:
        """Return the seconds in which replicas take `work`; `first_guess` is the rate until one is measured."""
        measured = self._work / self._seconds if self.is_measured else 0.0
        return work / (measured or first_guess)

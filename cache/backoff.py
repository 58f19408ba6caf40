"""Exponential back-off. Pure: the caller passes in randomness and does the waiting."""

from __future__ import annotations

JITTER = 0.2
"""Share by which a pause varies either way, so that processes that failed together do not retry together."""


class ExponentialBackoff:
    """Pauses between retries: the first is `first_seconds`, each later one twice as long, at most `most_seconds`."""

    def __init__(self, first_seconds: float, most_seconds: float) -> None:
        self._first_seconds = first_seconds
        self._most_seconds = most_seconds
        self._next_seconds = first_seconds

    def next_seconds(self, random: float = 0.5) -> float:
        """Return the next pause. `random` lies in [0, 1); 0.5 means no jitter."""
        pause_seconds = self._next_seconds
        self._next_seconds = min(self._most_seconds, pause_seconds * 2)
        return pause_seconds * (1 - JITTER + 2 * JITTER * random)

    def reset(self) -> None:
        """Start over with the first pause, after a success."""
        self._next_seconds = self._first_seconds

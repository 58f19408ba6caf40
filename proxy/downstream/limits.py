"""Limits of the client port, and budgets that all connections of one worker share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one connection, and of all connections together.

    Times are in seconds. `head_bytes_in_flight` bounds incomplete heads and pipelined requests;
    `body_bytes_in_flight` bounds bodies that have arrived, not lengths that were only declared.
    """

    head_bytes: int = 64 * 1024
    header_line_bytes: int = 32 * 1024
    head_seconds: float = 30.0
    keepalive_seconds: float = 75.0
    write_seconds: float = 120.0
    linger_seconds: float = 2.0
    drain_idle_seconds: float = 1.0
    body_seconds: float = 300.0
    body_bytes: int = 32 * 1024 * 1024
    body_bytes_per_second: int = 500
    connections: int = 8192
    connections_per_address: int = 4096
    head_bytes_in_flight: int = 32 * 1024 * 1024
    body_bytes_in_flight: int = 512 * 1024 * 1024


_DESCRIPTORS_KEPT = 128  # for the log, Redis, the supervisor and files that are open for a moment
_DESCRIPTORS_EACH = 2  # a client's connection, and that of its request to an upstream


def connections_within(configured: int, descriptors: int) -> int:
    """Return the largest number of connections, at most `configured`, for which a process has enough descriptors.

    `descriptors` is the process's limit (RLIMIT_NOFILE); negative for none.
    """
    if descriptors < 0:
        return configured
    return max(1, min(configured, (descriptors - _DESCRIPTORS_KEPT) // _DESCRIPTORS_EACH))


class ByteBudget:
    """Counts bytes in use against a limit."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, nbytes: int, own: int = 0) -> bool:
        """Add `nbytes` to the bytes in use; return False if they now exceed the limit.

        A holder whose `own` bytes are the only ones in use may exceed it, so that a body larger than the limit is
        served alone. Give the bytes back in either case.
        """
        self.used += nbytes
        return self.used <= self.limit or self.used == own + nbytes

    def fits(self, nbytes: int, own: int = 0) -> bool:
        """Return True if `nbytes` more would be within the limit, or if only `own` are in use. Takes nothing."""
        return self.used == own or self.used + nbytes <= self.limit

    def give(self, nbytes: int) -> None:
        """Give `nbytes` back."""
        self.used -= nbytes

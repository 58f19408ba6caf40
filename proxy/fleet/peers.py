"""Work of other processes on the same replicas, as they report it.

Each process publishes whole rows, never differences, which drift for ever once one is lost. Rows carry ages and not
timestamps, so that each reader ages them by its own clock. The rows of a process that falls silent are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Final, NamedTuple

PEER_SILENCE_SECONDS: Final = 1.0
"""The rows of a process that has reported nothing for this long are dropped."""


class ShareRow(NamedTuple):
    """One replica's work as one process has it, for the others. Ages are seconds before it was written.

    `pending_tokens` and `sent_tokens` are gross: the progress of the running head is not subtracted, so that a reader
    can do that once for all writers. The head is the writer's oldest prefill: its tokens, the time since it was sent,
    and how far it is past its predicted first token (0 if it is not). `released_seconds` is the time since the last
    prefill ended there. `waiting` of those in flight are in the writer's queue and not sent yet. `running_tokens` are
    the prompts of all in flight, `sent_tokens` the part of the pending ones that is in no queue; a process of an
    older release leaves out both.
    """

    pending_tokens: float
    in_flight: float
    head_tokens: float
    head_seconds: float
    overdue_seconds: float
    released_seconds: float
    waiting: float = 0.0
    running_tokens: float = 0.0
    sent_tokens: float = 0.0


ROW_LENGTHS: Final = (len(ShareRow._fields) - 2, len(ShareRow._fields))


class PeerWork:
    """Work of all other processes on one replica. Times are of this process's clock."""

    __slots__ = (
        "heads",
        "in_flight",
        "pending_tokens",
        "released_seconds",
        "running_tokens",
        "sent_tokens",
        "waiting",
    )

    def __init__(self) -> None:
        self.pending_tokens = 0.0
        self.in_flight = 0.0
        self.waiting = 0.0
        self.running_tokens = 0.0
        self.sent_tokens = 0.0
        self.released_seconds = 0.0
        self.heads: dict[str, tuple[float, float, float]] = {}  # by peer: sent, tokens, due or later

    def add(self, peer: str, row: ShareRow, now_seconds: float) -> None:
        """Add the row that `peer` reported."""
        self.pending_tokens += row.pending_tokens
        self.in_flight += row.in_flight
        self.waiting += row.waiting
        self.running_tokens += row.running_tokens
        self.sent_tokens += row.sent_tokens
        self.released_seconds = max(self.released_seconds, now_seconds - row.released_seconds)
        if row.head_tokens:
            due = now_seconds - row.overdue_seconds if row.overdue_seconds > 0 else inf
            self.heads[peer] = (now_seconds - row.head_seconds, row.head_tokens, due)

    def remove(self, peer: str, row: ShareRow) -> None:
        """Subtract a row that was added before."""
        self.pending_tokens -= row.pending_tokens
        self.in_flight -= row.in_flight
        self.waiting -= row.waiting
        self.running_tokens -= row.running_tokens
        self.sent_tokens -= row.sent_tokens
        self.heads.pop(peer, None)


MAX_LOST: Final = 64
"""Lost processes that are remembered: they only matter until what they have claimed expires."""


class Peers:
    """The last rows of every other process, by replica number."""

    def __init__(self) -> None:
        self._shares: dict[str, tuple[float, dict[int, ShareRow]]] = {}
        self.lost: dict[str, None] = {}  # processes that fell silent while they had work, the last ones
        self.stale_at_seconds = inf  # time at which the first of them will have been silent for too long

    def __len__(self) -> int:
        return len(self._shares)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def put(self, peer: str, rows: Mapping[int, ShareRow], now_seconds: float) -> None:
        """Store the newest rows of `peer`, after `pop` has removed the previous ones."""
        self._shares[peer] = (now_seconds, dict(rows))
        self.lost.pop(peer, None)
        self.stale_at_seconds = min(self.stale_at_seconds, now_seconds + PEER_SILENCE_SECONDS)

    def pop(self, peer: str) -> Mapping[int, ShareRow]:
        """Remove and return the rows of `peer`."""
        return self._shares.pop(peer, (0.0, {}))[1]

    def lose(self, peer: str) -> None:
        """Note that `peer` has fallen silent. With work it would have reported, so it is dead or disconnected."""
        if self._shares[peer][1]:
            self.lost[peer] = None
            if len(self.lost) > MAX_LOST:
                del self.lost[next(iter(self.lost))]

    def drop_row(self, peer: str, number: int) -> None:
        """Remove the row of one replica, which is forgotten."""
        self._shares[peer][1].pop(number, None)

    def silent(self, now_seconds: float) -> list[str]:
        """Return the processes that have been silent for too long."""
        oldest = now_seconds - PEER_SILENCE_SECONDS
        return [peer for peer, (heard, _) in self._shares.items() if heard <= oldest]

    def refresh(self) -> None:
        """Recompute `stale_at_seconds`."""
        heard = [each for each, _ in self._shares.values()]
        self.stale_at_seconds = min(heard) + PEER_SILENCE_SECONDS if heard else inf

"""The first request that waits for each replica in every other process, so that all together keep one order. Pure.

Each process tells the others, with its work in flight, which request would go next at a replica. One whose own next
request comes later lets that one go first: a lower priority, or another tenant in a later round. Requests of one
tenant and priority do not wait for each other across processes, since that would only cost time.

A lower priority must not starve while a higher one waits elsewhere. Each process therefore tells how many tokens of
each priority it has sent from the queue, and which priorities wait there. What all have sent is owed in part to each
lower priority, which the processes in which it waits divide among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Final, NamedTuple

from proxy.routing.fair_shares import Priority

SILENCE_SECONDS: Final = 1.0
"""A process that has told nothing for this long is gone, or tells nobody what it sends either."""

HOLD_SECONDS: Final = 0.25
"""Longest time for which a request lets the same one of another process go first. That one goes within milliseconds
if it can; one that cannot must not keep a replica idle."""

OWED: Final = -1
"""In place of the priority of a request that goes next because its priority has saved up its floor."""

_QUEUE: Final = "\0queue:"
"""Prefix of the rows in the message about in-flight work, which no replica's name can have."""

_END: Final = "\0"
_ROW_LENGTH: Final = 3 + len(Priority)


class Head(NamedTuple):
    """The request that goes next in a queue: its priority or `OWED`, and its tenant's round. `sent_tokens` are those
    that were sent from the queue so far, by priority; `waiting` has the bit `1 << priority` of each that waits there.
    """

    tenant: str
    priority: int
    round_number: int
    sent_tokens: tuple[float, ...]
    waiting: int

    def goes_before(self, other: Head) -> bool:
        """Return True if it must go before `other`, False if that one goes first or if it makes no difference."""
        if self.priority != other.priority:
            return self.priority < other.priority
        return self.tenant != other.tenant and self.round_number < other.round_number


class QueueHeads:
    """The last known heads of the other processes' queues, by replica's name and process."""

    def __init__(self) -> None:
        self._own: Callable[[], dict[str, tuple[float, ...]]] = dict
        self._by_replica: dict[str, dict[str, Head]] = {}
        self._heard_seconds: dict[str, float] = {}  # of the processes with heads

    def attend(self, own: Callable[[], dict[str, tuple[float, ...]]]) -> None:
        """Take the rows of this process's queues from `own`."""
        self._own = own

    def own_rows(self) -> dict[str, tuple[float, ...]]:
        """Return the heads of this process's queues, for the others."""
        return self._own()

    def absorb(self, peer: str, rows: Mapping[str, tuple[float, ...]], now_seconds: float) -> None:
        """Replace what another process has told; rows of other kinds are left out."""
        self.forget(peer)
        for name, row in rows.items():
            if name.startswith(_QUEUE) and len(row) == _ROW_LENGTH and all(abs(each) < inf for each in row):
                replica, _, tenant = name[len(_QUEUE) :].partition(_END)
                head = Head(tenant, int(row[0]), int(row[1]), tuple(row[3:]), int(row[2]))
                self._by_replica.setdefault(replica, {})[peer] = head
                self._heard_seconds[peer] = now_seconds

    def forget(self, peer: str) -> None:
        """Drop what a process has told that is gone."""
        if self._heard_seconds.pop(peer, None) is None:
            return
        for replica in list(self._by_replica):
            heads = self._by_replica[replica]
            heads.pop(peer, None)
            if not heads:
                del self._by_replica[replica]

    def __len__(self) -> int:
        """Count the replicas for which requests wait in other processes."""
        return len(self._by_replica)

    def at(self, replica: str, now_seconds: float) -> Mapping[str, Head]:
        """Return the heads for one replica, by process; none of processes that have fallen silent."""
        heads = self._by_replica.get(replica)
        if not heads:
            return {}
        oldest = now_seconds - SILENCE_SECONDS
        silent = [peer for peer in heads if self._heard_seconds[peer] <= oldest]
        for peer in silent:
            self.forget(peer)
        return self._by_replica.get(replica, {})


def row_of(replica: str, head: Head) -> tuple[str, tuple[float, ...]]:
    """Return the name and the values by which the others are told of a head."""
    place = float(head.priority), float(head.round_number), float(head.waiting)
    return f"{_QUEUE}{replica}{_END}{head.tenant}", (*place, *head.sent_tokens)


def waiting_in(heads: Mapping[str, Head]) -> Sequence[int]:
    """Return in how many processes each priority waits, by their heads."""
    return [sum([head.waiting >> priority & 1 for head in heads.values()]) for priority in Priority]


class Elsewhere:
    """The order of one queue among those of all processes for the same replica. Not shared."""

    __slots__ = ("_first", "_held_since_seconds", "_known")

    def __init__(self) -> None:
        self._first: tuple[str, Head] | None = None
        self._held_since_seconds = 0.0
        self._known: dict[str, tuple[float, ...]] = {}  # tokens sent, by process

    def newly_sent(self, heads: Mapping[str, Head]) -> list[float]:
        """Return the tokens that others have sent from their queues since the last call, by priority."""
        sent = [0.0] * len(Priority)
        for peer, head in heads.items():
            known = self._known.get(peer)
            if known is not None:
                for priority, tokens in enumerate(head.sent_tokens):
                    sent[priority] += max(tokens - known[priority], 0.0)
        self._known = {peer: head.sent_tokens for peer, head in heads.items()}
        return sent

    def must_hold(self, own: Head, heads: Mapping[str, Head], now_seconds: float) -> bool:
        """Return True if another process's request goes first, and has not been waited for in vain."""
        for peer, head in heads.items():
            if head.goes_before(own):
                first = (peer, head)
                if self._first is None or self._first[0] != peer or self._first[1] != head:
                    self._first, self._held_since_seconds = first, now_seconds
                return now_seconds - self._held_since_seconds < HOLD_SECONDS
        self._first = None
        return False

    def no_room(self) -> None:
        """Note that there is no room: time in which nobody could go is not waited in vain."""
        self._first = None

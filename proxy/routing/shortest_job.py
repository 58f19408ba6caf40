"""The order in which waiting requests are served: least work first, with ageing. Pure.

A request's priority is its seconds of work minus a tenth of the seconds it has waited. The difference between two
requests does not change while both wait, so the priority is fixed at arrival (`work + 0.1 x arrival`) and a heap
keeps the order. After half of its deadline a request precedes all that have not reached that point, oldest first, so
that no request starves, however many short ones arrive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final, Generic, TypeVar

AGEING: Final = 0.1
"""Seconds of work that one second of waiting is worth."""

T = TypeVar("T")


class Entry(Generic[T]):
    """One waiting request. `gone` is True once it was served or left."""

    __slots__ = ("arrived_seconds", "gone", "item", "work_seconds")

    def __init__(self, item: T, work_seconds: float, arrived_seconds: float) -> None:
        self.item = item
        self.work_seconds = work_seconds
        self.arrived_seconds = arrived_seconds
        self.gone = False


class ShortestJobQueue(Generic[T]):
    """Requests that wait for one replica."""

    def __init__(self, deadline_seconds: float, ageing: float = AGEING) -> None:
        self.deadline_seconds = deadline_seconds
        self._ageing = ageing
        self._by_priority: list[tuple[float, int, Entry[T]]] = []
        self._by_arrival: deque[Entry[T]] = deque()
        self._joined = 0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def join(self, item: T, work_seconds: float, now_seconds: float) -> Entry[T]:
        """Add a request; `now_seconds` must never decrease."""
        entry = Entry(item, work_seconds, now_seconds)
        self._joined += 1
        heappush(self._by_priority, (work_seconds + self._ageing * now_seconds, self._joined, entry))
        self._by_arrival.append(entry)
        self._waiting += 1
        return entry

    def leave(self, entry: Entry[T]) -> None:
        """Remove a request whose client left or whose deadline passed. May be called twice."""
        if not entry.gone:
            entry.gone = True
            self._waiting -= 1
            if len(self._by_priority) > 2 * self._waiting + 16:
                self._compact()

    def next(self, now_seconds: float) -> T | None:
        """Remove and return the next request to serve; None if none waits."""
        entry = self.peek(now_seconds)
        if entry is None:
            return None
        self.leave(entry)
        return entry.item

    def peek(self, now_seconds: float) -> Entry[T] | None:
        """Return the entry of the next request to serve, which stays in the queue; None if none waits."""
        if not self._waiting:
            return None
        while self._by_arrival[0].gone:
            self._by_arrival.popleft()
        oldest = self._by_arrival[0]
        if now_seconds - oldest.arrived_seconds >= self.deadline_seconds / 2:
            return oldest
        while self._by_priority[0][2].gone:
            heappop(self._by_priority)
        return self._by_priority[0][2]

    def in_order(self, now_seconds: float) -> Iterator[Entry[T]]:
        """Yield all entries in the order in which they would be served if nobody else came. Change nothing meanwhile.

        Only what is taken from the iterator costs time, besides a copy of the heap once a second entry is taken.
        """
        first = self.peek(now_seconds)
        if first is None:
            return
        yield first
        overdue = now_seconds - self.deadline_seconds / 2
        for entry in self._by_arrival:
            if entry.arrived_seconds > overdue:
                break
            if not entry.gone and entry is not first:
                yield entry
        left = self._by_priority.copy()
        while left:
            _, _, entry = heappop(left)
            if not entry.gone and entry is not first and entry.arrived_seconds > overdue:
                yield entry

    def key(self, entry: Entry[T]) -> float:
        """Return the sort key of an entry: lower ones are served first, except after half of a deadline."""
        return entry.work_seconds + self._ageing * entry.arrived_seconds

    @property
    def least_key(self) -> float:
        """Return a lower bound of the keys of all that wait, which must not be none."""
        return self._by_priority[0][0]

    def _compact(self) -> None:
        """Drop the entries that are gone, which would otherwise stay until they reach the top."""
        self._by_priority = [each for each in self._by_priority if not each[2].gone]
        heapify(self._by_priority)
        self._by_arrival = deque(entry for entry in self._by_arrival if not entry.gone)

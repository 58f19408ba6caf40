"""The order in which waiting requests are served: least work first, with ageing. Pure; it knows no event loop.

A request's place is its seconds of work less a tenth of the seconds it has waited. Between two requests the
difference does not change while both wait, so the place is fixed at arrival (`work + 0.1 x arrival`) and a heap keeps
the order. From half of its deadline on a request goes before all that have not come so far, oldest first: none
starves, however many short ones arrive.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import Final, Generic, TypeVar

AGEING: Final = 0.1
"""Seconds of work that one second of waiting is worth."""

T = TypeVar("T")


class Place(Generic[T]):
    """One request in line. `gone` once it was served or left."""

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
        self._by_place: list[tuple[float, int, Place[T]]] = []
        self._by_arrival: deque[Place[T]] = deque()
        self._joined = 0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def join(self, item: T, work_seconds: float, now_seconds: float) -> Place[T]:
        """Stand in line; `now_seconds` never goes back."""
        place = Place(item, work_seconds, now_seconds)
        self._joined += 1
        heappush(self._by_place, (work_seconds + self._ageing * now_seconds, self._joined, place))
        self._by_arrival.append(place)
        self._waiting += 1
        return place

    def leave(self, place: Place[T]) -> None:
        """Its client is gone, or its deadline passed. May come twice."""
        if not place.gone:
            place.gone = True
            self._waiting -= 1
            if len(self._by_place) > 2 * self._waiting + 16:
                self._compact()

    def next(self, now_seconds: float) -> T | None:
        """Take out whose turn it is; None where nobody waits."""
        if not self._waiting:
            return None
        while self._by_arrival[0].gone:
            self._by_arrival.popleft()
        place = self._by_arrival[0]
        if now_seconds - place.arrived_seconds < self.deadline_seconds / 2:
            while (place := heappop(self._by_place)[2]).gone:
                pass
        self.leave(place)
        return place.item

    def _compact(self) -> None:
        """Forget the gone; they would else stay until they come to the top."""
        self._by_place = [entry for entry in self._by_place if not entry[2].gone]
        heapify(self._by_place)
        self._by_arrival = deque(place for place in self._by_arrival if not place.gone)

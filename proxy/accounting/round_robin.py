"""Simulate what round robin over the same replicas would have had cached, to measure the gain from routing. Pure.

Each request is also assigned to the next replica in turn, in a simulation. Each replica's simulated cache is filled
and, beyond its budget, emptied from the leaf that was unused for longest, as an engine's is. Tokens that an upstream
reported as cached in excess of what the simulated cache would have held are due to routing.

Instead of whole prompts the simulation looks at a few offsets in every prompt, denser at its beginning. A sample of
conversations would not work: as soon as most of them share a system prompt, they are all cached or all not. The
offsets cover every request and take microseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Final

from cache import Fingerprint, Placement, ReplicaStats, grid_before
from proxy.fleet.pools import Pools

_FIRST_BITS: Final = 10
OFFSETS_BYTES: Final = tuple([1 << power for power in range(_FIRST_BITS, 26)])
"""The offsets: 1 KB, 2, 4 and so on up to 32 MB. Each is a boundary of every fingerprint that reaches it
(`cache.index.hashing`). Between two of them the ends of earlier prompts give more detail."""

_FEWEST_BEFORE: Final = tuple([grid_before(offset) for offset in OFFSETS_BYTES])
"""Boundaries before each offset in a prompt of one message; with more messages there are more."""

PLACES_SEEN = 131_072
"""Places remembered as seen before (14 MB), unless the prefix index is configured to be small. A simulated cache has
a quarter of them (4 MB); when it is full, those unused for longest are dropped.
"""

INDEX_BYTES_PER_PLACE = 2048
"""Memory of the prefix index for which one place is remembered: in all a tenth of the index."""


class _SimulatedCache:
    """One replica's simulated cache: the hash at a place, and the tokens since the place before; oldest use first.

    The end of each prompt is a place too, of no tokens: the next turn continues from there.
    """

    __slots__ = ("_most_places", "budget_tokens", "epoch", "places", "tokens")

    def __init__(self, most_places: int) -> None:
        self._most_places = most_places
        # a dict takes longer to find its first key, the more were dropped before
        self.places: OrderedDict[int, float] = OrderedDict()
        self.tokens = 0.0
        self.budget_tokens = float("inf")
        self.epoch = 0

    def hold(self, fingerprint: Fingerprint, places: list[int], tokens_per_byte: float) -> None:
        """Add a prompt, the deepest place first, so that it is the first to be dropped."""
        held = self.places
        last = fingerprint.hashes[-1]
        held[last] = held.pop(last, 0.0)
        end = fingerprint.ends[-1]
        for number in range(len(places) - 1, -1, -1):
            begin = OFFSETS_BYTES[number - 1] if number else 0
            tokens = (end - begin) * tokens_per_byte
            place = places[number]
            self.tokens += tokens - held.pop(place, 0.0)
            held[place] = tokens
            end = begin
        while held and (self.tokens > self.budget_tokens or len(held) > self._most_places):
            self.tokens -= held.popitem(last=False)[1]

    def held_bytes(self, fingerprint: Fingerprint, depths: list[int], places: list[int]) -> tuple[int, int]:
        """Return bounds of the prompt's bytes that it holds: at least the first, less than the second; or equal."""
        held, ends = self.places, fingerprint.ends
        found = 0
        for place in places:
            if place not in held:
                break
            found += 1
        low, first = (OFFSETS_BYTES[found - 1], depths[found - 1] + 1) if found else (0, 0)
        high, last = (OFFSETS_BYTES[found], depths[found]) if found < len(places) else (ends[-1] + 1, len(ends))
        between = fingerprint.hashes[first:last]
        between.reverse()
        deepest = next(filter(held.__contains__, between), None)
        if deepest is None:
            return low, high
        end = ends[last - 1 - between.index(deepest)]
        return end, end


class Gain:
    """The cached tokens of one response, and those that round robin would have had. The gain may be negative."""

    __slots__ = ("cached_tokens", "round_robin_tokens")

    def __init__(self, cached_tokens: int, round_robin_tokens: float) -> None:
        self.cached_tokens = cached_tokens
        self.round_robin_tokens = round_robin_tokens


class RoundRobinBaseline:
    """The simulation of one worker. Each worker takes turns independently, and learns what the others routed.

    It remembers `most_places` places, and a quarter of that for each replica.
    """

    def __init__(self, pools: Pools, most_places: int = PLACES_SEEN) -> None:
        self._pools = pools
        self._most_places = most_places
        self._peers: dict[int, tuple[int, ...]] = {}
        self._caches: dict[int, _SimulatedCache] = {}
        self._seen: set[int] = set()
        self._seen_order: deque[int] = deque()
        self._owed: dict[str, float] = {}
        self.gained_tokens = 0  # the sum of everything that `count` returned

    def follow(self, replicas: Mapping[int, ReplicaStats]) -> None:
        """Update the replicas, their budgets and epochs from the index; call it from time to time."""
        pools: dict[str, list[tuple[str, int]]] = {}
        for number in self._pools.served:
            backend = self._pools.backends[number]
            if not backend.is_provider:  # providers keep prefixes for a time, and route by themselves
                pools.setdefault(backend.pool, []).append((backend.name, number))
        self._peers = {}
        for members in pools.values():
            numbers = tuple(number for _, number in sorted(members))
            self._peers.update(dict.fromkeys(numbers, numbers))
        for number in self._caches.keys() - self._peers.keys():
            del self._caches[number]
        for number, stats in replicas.items():
            if number not in self._peers:
                continue
            cache = self._caches.get(number)
            if cache is None or cache.epoch < stats.epoch:
                cache = self._caches[number] = _SimulatedCache(self._most_places // 4)
                cache.epoch = stats.epoch
            cache.budget_tokens = float(stats.budget_tokens)

    def placed(self, placement: int, replica: int, fingerprint: Fingerprint, prompt_tokens: float) -> None:
        """Add a prompt that another worker routed; `placement` is its id, which counts up for each writer."""
        cache = self._turn(placement, replica)
        if cache is not None and fingerprint.ends:
            places = _places(fingerprint, depths_of_offsets(fingerprint.ends))
            self._hold(cache, fingerprint, places, prompt_tokens / fingerprint.ends[-1])

    def answered(self, placement: Placement, prompt_tokens: int, cached_tokens: int | None) -> Gain | None:
        """Add a prompt of this worker that was answered.

        Returns None if nothing can be concluded: there is only one replica, cached tokens were not reported, or the
        prefix was known before this worker started.
        """
        fingerprint = placement.fingerprint
        cache = self._turn(placement.id, placement.replica)
        if cache is None or not fingerprint.ends:
            return None
        depths = depths_of_offsets(fingerprint.ends)
        places = _places(fingerprint, depths)
        tokens_per_byte = prompt_tokens / fingerprint.ends[-1]
        held_bytes = fingerprint.ends[placement.held_blocks - 1] if placement.held_blocks else 0
        gain = None
        if cached_tokens is not None and self._has_seen(places, held_bytes):
            round_robin = _round_robin(*cache.held_bytes(fingerprint, depths, places), held_bytes)
            # less or more was cached than predicted; with round robin the same would have happened
            ahead = (round_robin - held_bytes) * tokens_per_byte
            gain = Gain(cached_tokens, max(cached_tokens + ahead, 0.0))
        self._hold(cache, fingerprint, places, tokens_per_byte)
        return gain

    def count(self, label: str, gain: Gain) -> int:
        """Return the whole tokens that `gain` adds to a model's counter.

        The counter is the highest value that the sum of all differences has had: losses against round robin are made
        up for first, because a counter never decreases.
        """
        owed = self._owed.get(label, 0.0) + gain.cached_tokens - gain.round_robin_tokens
        whole = max(0, int(owed))
        self._owed[label] = owed - whole
        self.gained_tokens += whole
        return whole

    def _turn(self, placement: int, replica: int) -> _SimulatedCache | None:
        """Return the simulated cache of the replica whose turn it is."""
        peers = self._peers.get(replica, ())
        if len(peers) < 2:
            return None
        number = peers[placement % len(peers)]
        cache = self._caches.get(number)
        if cache is None:
            cache = self._caches[number] = _SimulatedCache(self._most_places // 4)
        return cache

    def _has_seen(self, places: list[int], held_bytes: int) -> bool:
        reached = min(_reached(held_bytes), len(places))
        return not reached or places[reached - 1] in self._seen

    def _hold(
        self, cache: _SimulatedCache, fingerprint: Fingerprint, places: list[int], tokens_per_byte: float
    ) -> None:
        cache.hold(fingerprint, places, tokens_per_byte)
        seen, order = self._seen, self._seen_order
        for place in places:
            if place not in seen:
                seen.add(place)
                order.append(place)
        while len(seen) > self._most_places:
            seen.discard(order.popleft())


def _reached(size_bytes: int) -> int:
    """Return how many of the offsets a prompt of this length reaches."""
    return min(max(size_bytes.bit_length() - _FIRST_BITS, 0), len(OFFSETS_BYTES))


def depths_of_offsets(ends: Sequence[int]) -> list[int]:
    """Return the number of boundaries before each of the offsets that a prompt with these boundaries reaches.

    All of them are boundaries, so usually no search is needed: there are as many more before the next one than in a
    prompt of one message as there were before the last one, unless a message ends between the two.
    """
    depths: list[int] = []
    depth = more = 0
    for number in range(_reached(ends[-1])):
        offset, fewest = OFFSETS_BYTES[number], _FEWEST_BEFORE[number]
        guess = fewest + more
        if guess >= len(ends) or ends[guess] != offset:
            guess = bisect_left(ends, offset, depth)
            more = guess - fewest
        depth = guess
        depths.append(depth)
    return depths


def _places(fingerprint: Fingerprint, depths: list[int]) -> list[int]:
    """Return the hashes at the offsets that the prompt reaches."""
    hashes = fingerprint.hashes
    return [hashes[depth] for depth in depths]


def _round_robin(low: int, high: int, held_bytes: int) -> float:
    """Return the bytes that round robin would have had cached, if its replica holds between `low` and `high`.

    The chosen replica holds `held_bytes`. Prompts fork at the same points for both, so within the bounds round robin
    is assumed to hold as much.
    """
    if low < high and low <= held_bytes < high:
        return held_bytes
    return (low + high) / 2 if low else 0.0

"""What round robin over the same replicas would have had cached: the measure of what routing itself adds.

Each request is also given, on paper, to the next replica in turn, and each replica's paper cache is filled and, over
its budget, emptied from its longest unused leaf, as an engine's is. What an upstream reported as cached beyond what
that cache would have held is routing's own part.

What is sampled is not requests but places in a prompt: a few offsets, denser at its beginning. A sample of whole
conversations would be all or nothing as soon as most of them share a system prompt; the offsets see every request,
know who shares what with whom, and cost microseconds.

Pure. It must not know metrics, and decides nothing for a request.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Mapping

from cache import Fingerprint, Placement, ReplicaStats
from proxy.fleet.pools import Pools

OFFSETS_BYTES = tuple([1 << power for power in range(10, 26)])
"""Where prompts are looked at: 1 KB, 2, 4 and so on up to 32 MB; each is a boundary of every fingerprint that reaches
it (`cache.index.hashing`). Between two of them the ends of earlier prompts tell more."""

PLACES_PER_REPLICA = 32_768  # of a paper cache, some 4 MB; beyond, the longest unused go
PLACES_SEEN = 131_072  # some 14 MB


class _SimulatedCache:
    """One replica's paper cache: hash of a place to the tokens since the place before, the longest unused first.

    The end of each prompt is a place, too, of no tokens: the next turn goes on from there.
    """

    __slots__ = ("budget_tokens", "epoch", "places", "tokens")

    def __init__(self) -> None:
        # a plain one finds its first in time of what was dropped
        self.places: OrderedDict[int, float] = OrderedDict()
        self.tokens = 0.0
        self.budget_tokens = float("inf")
        self.epoch = 0

    def hold(self, fingerprint: Fingerprint, places: list[int], tokens_per_byte: float) -> None:
        """The deepest place first, so that it is the first to go; what comes after it is counted with it."""
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
        while held and (self.tokens > self.budget_tokens or len(held) > PLACES_PER_REPLICA):
            self.tokens -= held.popitem(last=False)[1]

    def held_bytes(self, fingerprint: Fingerprint, places: list[int]) -> tuple[int, int]:
        """How much of a prompt it holds: at least, and less than; twice the same where that is known."""
        held, hashes, ends = self.places, fingerprint.hashes, fingerprint.ends
        found = 0
        for place in places:
            if place not in held:
                break
            found += 1
        low = OFFSETS_BYTES[found - 1] if found else 0
        high = OFFSETS_BYTES[found] if found < len(places) else ends[-1] + 1
        first, last = bisect_right(ends, low), bisect_left(ends, high)
        between = hashes[first:last]
        between.reverse()
        deepest = next(filter(held.__contains__, between), None)
        if deepest is None:
            return low, high
        end = ends[last - 1 - between.index(deepest)]
        return end, end


class Gain:
    """One answer's: what was reported as cached, and what round robin would have had. The difference may be < 0."""

    __slots__ = ("cached_tokens", "round_robin_tokens")

    def __init__(self, cached_tokens: int, round_robin_tokens: float) -> None:
        self.cached_tokens = cached_tokens
        self.round_robin_tokens = round_robin_tokens


class RoundRobinBaseline:
    """One per worker. Each worker takes turns by itself, as proxies side by side do, and hears of the others'."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._peers: dict[int, tuple[int, ...]] = {}
        self._papers: dict[int, _SimulatedCache] = {}
        self._seen: set[int] = set()
        self._seen_order: deque[int] = deque()
        self._owed: dict[str, float] = {}

    def follow(self, replicas: Mapping[int, ReplicaStats]) -> None:
        """Take over the index's budgets, epochs and replicas; now and then."""
        pools: dict[str, list[tuple[str, int]]] = {}
        for number in self._pools.served:
            backend = self._pools.backends[number]
            if not backend.is_provider:  # what those keep ends by time, and they route by themselves
                pools.setdefault(backend.pool, []).append((backend.name, number))
        self._peers = {}
        for members in pools.values():
            numbers = tuple(number for _, number in sorted(members))
            self._peers.update(dict.fromkeys(numbers, numbers))
        for number in self._papers.keys() - self._peers.keys():
            del self._papers[number]
        for number, stats in replicas.items():
            if number not in self._peers:
                continue
            paper = self._papers.get(number)
            if paper is None or paper.epoch < stats.epoch:
                paper = self._papers[number] = _SimulatedCache()
                paper.epoch = stats.epoch
            paper.budget_tokens = float(stats.budget_tokens)

    def placed(self, placement: int, replica: int, fingerprint: Fingerprint, prompt_tokens: float) -> None:
        """Another worker routed a prompt; `placement` is its id, which counts up for each writer."""
        paper = self._turn(placement, replica)
        if paper is not None and fingerprint.ends:
            self._hold(paper, fingerprint, _places(fingerprint), prompt_tokens / fingerprint.ends[-1])

    def answered(self, placement: Placement, prompt_tokens: int, cached_tokens: int | None) -> Gain | None:
        """A prompt of this worker was answered. None where nothing can be said: one replica only, no word on what
        was cached, or a prefix that was known before this worker was."""
        fingerprint = placement.fingerprint
        paper = self._turn(placement.id, placement.replica)
        if paper is None or not fingerprint.ends:
            return None
        places = _places(fingerprint)
        tokens_per_byte = prompt_tokens / fingerprint.ends[-1]
        held_bytes = fingerprint.ends[placement.held_blocks - 1] if placement.held_blocks else 0
        gain = None
        if cached_tokens is not None and self._has_seen(places, held_bytes):
            round_robin = _round_robin(*paper.held_bytes(fingerprint, places), held_bytes)
            # what was really cached differs from what was known to be; round robin's would, too
            ahead = (round_robin - held_bytes) * tokens_per_byte
            gain = Gain(cached_tokens, max(cached_tokens + ahead, 0.0))
        self._hold(paper, fingerprint, places, tokens_per_byte)
        return gain

    def counted(self, label: str, gain: Gain) -> int:
        """What `gain` adds to a model's counter, in whole tokens.

        The counter is the highest that the sum of all differences ever was: what round robin would have done better
        is made up for first, and nothing counts down.
        """
        owed = self._owed.get(label, 0.0) + gain.cached_tokens - gain.round_robin_tokens
        whole = max(0, int(owed))
        self._owed[label] = owed - whole
        return whole

    def _turn(self, placement: int, replica: int) -> _SimulatedCache | None:
        """The paper cache of the replica whose turn it is."""
        peers = self._peers.get(replica, ())
        if len(peers) < 2:
            return None
        number = peers[placement % len(peers)]
        paper = self._papers.get(number)
        if paper is None:
            paper = self._papers[number] = _SimulatedCache()
        return paper

    def _has_seen(self, places: list[int], held_bytes: int) -> bool:
        reached = min(bisect_right(OFFSETS_BYTES, held_bytes), len(places))
        return not reached or places[reached - 1] in self._seen

    def _hold(
        self, paper: _SimulatedCache, fingerprint: Fingerprint, places: list[int], tokens_per_byte: float
    ) -> None:
        paper.hold(fingerprint, places, tokens_per_byte)
        seen, order = self._seen, self._seen_order
        for place in places:
            if place not in seen:
                seen.add(place)
                order.append(place)
        while len(seen) > PLACES_SEEN:
            seen.discard(order.popleft())


def _places(fingerprint: Fingerprint) -> list[int]:
    """The hash at each of the offsets that the prompt reaches, all of which are among its boundaries."""
    hashes, ends = fingerprint.hashes, fingerprint.ends
    at, places = 0, []
    for number in range(bisect_right(OFFSETS_BYTES, ends[-1])):
        offset = OFFSETS_BYTES[number]
        at = bisect_left(ends, offset, at)
        places.append(hashes[at])
    return places


def _round_robin(low: int, high: int, held_bytes: int) -> float:
    """Bytes that round robin would have had cached, where its replica holds `low` and less than `high`, and the one
    really chosen `held_bytes`. Forks are the same for both, so between the two places it is taken to know as much."""
    if low < high and low <= held_bytes < high:
        return held_bytes
    return (low + high) / 2 if low else 0.0

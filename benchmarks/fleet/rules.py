"""Other routers' rules, restated from their documentation and code, on one set of books.

Each sees what a proxy can see: its routing, first tokens and ends. All ties: fewest in flight, then random.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from math import inf
from random import Random

from benchmarks.fleet.engine import PREFILL_TOKENS_PER_SECOND, BlockCache
from benchmarks.fleet.simulation import Send
from benchmarks.fleet.trace import BLOCK_TOKENS, Request
from cache.index.hashing import chain_root

RING_POINTS = 100


class Books:
    """In-flight requests and pending uncached tokens per replica, and an index filled when routed.

    The running head's progress (elapsed time x rate) is subtracted from the pending tokens, for every rule.
    """

    def __init__(self, replicas: int, capacity_tokens: int | None, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.in_flight = [0] * replicas
        self.waiting = [0] * replicas
        self._charges: list[dict[int, float]] = [{} for _ in range(replicas)]
        self._working_since = [0.0] * replicas
        self.blocks_in_flight = [0] * replicas
        self.resident_tokens = [0] * replicas
        self.index = [BlockCache(capacity_tokens) for _ in range(replicas)]

    @property
    def pending(self) -> list[float]:
        """Tokens by replica that are charged and cannot be done yet."""
        return [self._still(n) for n in range(len(self._charges))]

    @property
    def charged(self) -> list[float]:
        """Uncached tokens by replica of the requests without a first token, with nothing subtracted."""
        return [sum(charges.values()) for charges in self._charges]

    def _still(self, replica: int) -> float:
        charges = self._charges[replica]
        if not charges:
            return 0.0
        done = (self.now - self._working_since[replica]) * PREFILL_TOKENS_PER_SECOND
        return sum(charges.values()) - min(done, next(iter(charges.values())))

    def uncached(self, request: Request) -> list[float]:
        """Return the tokens that each replica would compute, according to the index."""
        return [max(1.0, request.input_tokens - cache.matched_tokens(request)) for cache in self.index]

    def least(self, costs: Sequence[float]) -> int:
        """Return the replica of least cost; ties: fewest in flight, then random."""
        best = min(zip(costs, self.in_flight, strict=True))
        tied = [n for n, key in enumerate(zip(costs, self.in_flight, strict=True)) if key == best]
        return self.random.choice(tied)

    def routed(self, request: Request, replica: int, uncached: float) -> None:
        self.in_flight[replica] += 1
        self.waiting[replica] += 1
        if not self._charges[replica]:
            self._working_since[replica] = self.now
        self._charges[replica][request.number] = uncached
        self.blocks_in_flight[replica] += len(request.blocks)
        self.resident_tokens[replica] += request.input_tokens
        self.index[replica].use(request.blocks)

    def first_token(self, request: Request, replica: int) -> None:
        self.waiting[replica] -= 1
        del self._charges[replica][request.number]
        self._working_since[replica] = self.now

    def ended(self, request: Request, replica: int) -> None:
        self.in_flight[replica] -= 1
        self.blocks_in_flight[replica] -= len(request.blocks)
        self.resident_tokens[replica] -= request.input_tokens


Choice = Callable[[Books, Request], int]


class Rule:
    """A rule with its books, as the simulation drives it."""

    def __init__(
        self, choose: Choice, replicas: int, capacity_tokens: int, *, endless_index: bool = False, seed: int = 1
    ) -> None:
        self._choose = choose
        self._books = Books(replicas, None if endless_index else capacity_tokens, seed)

    def route(self, request: Request, now: float, send: Send) -> None:
        """Send the request at once, with the uncached tokens that the rule expects."""
        self._books.now = now
        replica = self._choose(self._books, request)
        uncached = max(1.0, request.input_tokens - self._books.index[replica].matched_tokens(request))
        self._books.routed(request, replica, uncached)
        send(replica, uncached, now)

    def started(self, request: Request, now: float) -> None:
        """Do nothing: these rules have no queue."""

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        del cached_tokens
        self._books.now = now
        self._books.first_token(request, replica)

    def ended(self, request: Request, replica: int, now: float) -> None:
        del now
        self._books.ended(request, replica)


def round_robin() -> Choice:
    turn = -1

    def choose(books: Books, request: Request) -> int:
        nonlocal turn
        del request
        turn += 1
        return turn % len(books.in_flight)

    return choose


def least_in_flight(books: Books, request: Request) -> int:
    del request
    return books.least([0.0] * len(books.in_flight))


def least_pending(books: Books, request: Request) -> int:
    del request
    return books.least(books.pending)


def consistent_hash(replicas: int, key_block: int = 2) -> Choice:
    """Return the rule of a ring of 100 points per replica; the key is the chained id of the second block."""
    ring = sorted(
        (chain_root([b"%d" % replica, b"%d" % point]), replica)
        for replica in range(replicas)
        for point in range(RING_POINTS)
    )
    points = [point for point, _ in ring]

    def choose(books: Books, request: Request) -> int:
        del books
        key = chain_root([request.blocks[min(key_block, len(request.blocks)) - 1].to_bytes(8, "little")])
        return ring[bisect_left(points, key) % len(ring)][1]

    return choose


def cache_aware(threshold: float = 0.3, apart: int = 64, ratio: float = 1.5) -> Choice:
    """Return the rule of SGLang's router.

    It takes the deepest match if it is more than `threshold` of the prompt, else the smallest tree; and the fewest in
    flight if the numbers in flight differ by more than `apart` and `ratio`.
    """

    def choose(books: Books, request: Request) -> int:
        most, fewest = max(books.in_flight), min(books.in_flight)
        if most - fewest > apart and most > ratio * fewest:
            replica = books.least([0.0] * len(books.in_flight))
        else:
            matched = [cache.matched_tokens(request) for cache in books.index]
            if max(matched) > threshold * request.input_tokens:
                replica = books.random.choice([n for n, tokens in enumerate(matched) if tokens == max(matched)])
            else:
                replica = books.least([float(len(cache)) for cache in books.index])
        return replica

    return choose


def scorers(capacity_tokens: int, prefix: float = 2.0, queue: float = 1.0, resident: float = 1.0) -> Choice:
    """Return the gateway inference extension's weighted scorers (also in llm-d): prefix, queue, KV use, 2:1:1."""

    def choose(books: Books, request: Request) -> int:
        most, fewest = max(books.waiting), min(books.waiting)
        costs = []
        for n, cache in enumerate(books.index):
            matched = cache.matched_tokens(request) / max(request.input_tokens, 1)
            shorter = 1.0 - (books.waiting[n] - fewest) / (most - fewest) if most > fewest else 1.0
            used = min(books.resident_tokens[n] / capacity_tokens, 1.0)
            costs.append(-(prefix * matched + queue * shorter + resident * (1.0 - used)))
        return books.least(costs)

    return choose


def dynamo(books: Books, request: Request) -> int:
    """Choose by Dynamo's cost in blocks: pending and own prefill, and decoding blocks including the own ones."""
    uncached, pending = books.uncached(request), books.pending
    return books.least(
        [
            (pending[n] + uncached[n]) / BLOCK_TOKENS + books.blocks_in_flight[n] + len(request.blocks)
            for n in range(len(uncached))
        ]
    )


def token_aware(holds: float = 0.8, relief_seconds: float = 18.0) -> Choice:
    """Return llm-d's rule since August 2026.

    Of the replicas that hold most of the prompt, it takes the one with the fewest uncached tokens in flight and to
    come; all others are considered too once the best of them is `relief_seconds` of prefill behind.
    """

    def choose(books: Books, request: Request) -> int:
        uncached, charged = books.uncached(request), books.charged
        everyone = range(len(uncached))
        holders = [n for n in everyone if request.input_tokens - uncached[n] >= holds * request.input_tokens]
        others = [n for n in everyone if n not in holders]
        if holders and others:
            behind = min(charged[n] for n in holders) - min(charged[n] for n in others)
            among = holders if behind / PREFILL_TOKENS_PER_SECOND <= relief_seconds else list(everyone)
        else:
            among = list(everyone)
        return books.least([charged[n] + uncached[n] if n in among else inf for n in everyone])

    return choose


def lmetric(books: Books, request: Request) -> int:
    """Choose by LMetric: uncached tokens to compute, times the requests that would then be in flight."""
    uncached, charged = books.uncached(request), books.charged
    return books.least([(charged[n] + uncached[n]) * (books.in_flight[n] + 1) for n in range(len(uncached))])


def pending_and_own(weight: float = 2.0) -> Choice:
    """Return a rule of pending tokens and twice the own uncached ones: the cost rule without clock and lateness."""

    def choose(books: Books, request: Request) -> int:
        uncached = books.uncached(request)
        pending = books.pending
        return books.least([pending[n] + weight * uncached[n] for n in range(len(uncached))])

    return choose

"""Which replica a prompt should go to: one cost in seconds for each, the least wins, and why.

Pure: it knows no clock, no socket and no state of its own; what it is given decides what it answers. The fleet's
rows and the index's match come in, a `Plan` goes out. It must not know how either was learned.

The cost of replica r for a prompt p, in seconds:

    (pending(r) + uncached(p, r)) / rate(r)  +  a x uncached(p, r) / mean rate
      +  c x max(in_flight(r) - 8, 0)  +  lateness(r)

The first term is the time until the first token. The second is what p computes there, `a` times more, for those that
will wait behind it: by the mean rate of all, since behind a slow replica fewer wait, each longer. With
`a = 2 + 3 x the shortest queue of all, in seconds`: the longer all queues, the dearer it is to compute a thing twice.
The third is the price of decoding beside many others, the last repels from a replica that stalls. Nothing here drops
affinity at a threshold: a hot prefix is computed a second time exactly where waiting for its holder costs more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol
from zlib import crc32

from proxy.errors import Overloaded
from proxy.model import CacheStatus, Candidate, Demand, MissReason, Plan, ReplicaView, RouteReason

LEAST_FUTURE_WEIGHT: Final = 2.0
"""`a` where a replica is idle. What is computed twice also drives something else out of a cache, so it is dearer than
its own seconds: with 1 the hits of a trace are 0.92 of one pooled cache's, with 2 they are 0.94, for one percent more
mean TTFT; with 3 they are 0.95, for two."""

WEIGHT_PER_SECOND: Final = 3.0
"""How fast `a` grows with the shortest queue. On an overloaded trace 3 has a sixth less mean TTFT than 1, and more
hits; where queues are short it makes no difference. Above 4 the slowest wait longer."""

MAX_FUTURE_WEIGHT: Final = 30.0
"""Bound of `a`: in an overload of minutes the weight would otherwise drown the queue's own term."""

FREE_IN_FLIGHT: Final = 8
"""So many decode at no price: a step of an engine reads the weights once for all of its batch. Priced from the first
on, small differences in number outweigh queues and prefixes: a fiftieth more mean TTFT on a trace, and nothing gained
on a load of decodes, where the numbers are large. With 4 to 16 it is the same."""

MIN_UNCACHED_TOKENS: Final = 1.0
"""Engines always compute the last token, whatever they hold."""

MIN_SHAREABLE_BYTES: Final = 4_096
"""A prompt under some 1,000 tokens is not worth keeping in an index: computing it costs less than a detour."""

TIE_SHARE: Final = 0.02
TIE_SECONDS: Final = 0.002
"""Costs nearer than this to the least are one cost: learned rates differ by noise, and a fleet that is idle must not
send every cold prompt to the replica whose rate looks one percent better."""

_MASK = (1 << 64) - 1


class Held(Protocol):
    """How much of a prompt one replica holds: `cache.Held`."""

    @property
    def blocks(self) -> int: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def tokens(self) -> float: ...


class Match(Protocol):
    """What the index knows of a prompt: `cache.Match`.

    `held` has the replicas that hold more than nothing. `evicted` and `diverged` say of the deepest that any holds
    that more of the prompt was there once, or that other prompts go on differently from there.
    """

    @property
    def held(self) -> Mapping[int, Held]: ...
    @property
    def evicted(self) -> bool: ...
    @property
    def diverged(self) -> bool: ...


def plan(
    demand: Demand,
    match: Match,
    views: Sequence[ReplicaView],
    *,
    min_shareable_bytes: int = MIN_SHAREABLE_BYTES,
    weight_per_second: float = WEIGHT_PER_SECOND,
    held_back: Callable[[int, Held], bool] | None = None,
) -> Plan:
    """Order the available replicas by cost, cheapest first.

    `held_back` tells where what a replica holds is still being computed, so that this prompt would wait for it; None
    where nothing is. Raises `Overloaded`, with the seconds until the first is tried again, where none is available.
    """
    pinned = demand.pinned_replica
    if pinned is None:
        usable = [view for view in views if view.available]
    else:
        usable = [view for view in views if view.id == pinned and (view.available or view.draining)]
    if not usable:
        raise _none_left(views if pinned is None else [view for view in views if view.id == pinned])

    candidates = _ranked(demand, match.held, usable, weight_per_second)
    if held_back is not None and len(candidates) > 1:
        candidates = _not_waiting(candidates, match.held, held_back)
    if pinned is not None:
        reason = RouteReason.PINNED
    elif len(usable) == 1:
        reason = RouteReason.ONLY
    elif demand.size_bytes < min_shareable_bytes:
        reason = RouteReason.SHORT
    else:
        reason = _reason(candidates)
    if demand.size_bytes < min_shareable_bytes:
        return Plan(candidates, reason, MissReason.SHORT, CacheStatus.BYPASS, demand.prompt_tokens)
    cache, miss = _cache_status(demand, match, candidates)
    return Plan(candidates, reason, miss, cache, demand.prompt_tokens)


def future_weight(views: Sequence[ReplicaView], per_second: float = WEIGHT_PER_SECOND) -> float:
    """`a` of the cost: two, and `per_second` x the shortest queue of `views` in seconds, at most 30."""
    shortest = min([view.pending_tokens / view.rate_tokens_per_second for view in views])
    return min(LEAST_FUTURE_WEIGHT + per_second * shortest, MAX_FUTURE_WEIGHT)


def _ranked(
    demand: Demand, held: Mapping[int, Held], usable: list[ReplicaView], weight_per_second: float
) -> tuple[Candidate, ...]:
    mean_rate = sum([view.rate_tokens_per_second for view in usable]) / len(usable)
    future_seconds = future_weight(usable, weight_per_second) / mean_rate  # of one token that is computed
    prompt_tokens = demand.prompt_tokens
    candidates = []
    for view in usable:
        have = held.get(view.id)
        matched_bytes, matched_tokens = (0, 0.0) if have is None else (have.size_bytes, have.tokens)
        uncached = prompt_tokens - matched_tokens
        if uncached < MIN_UNCACHED_TOKENS:
            uncached = MIN_UNCACHED_TOKENS
        cost = (
            (view.pending_tokens + uncached) / view.rate_tokens_per_second
            + future_seconds * uncached
            + (view.in_flight_seconds * (view.in_flight - FREE_IN_FLIGHT) if view.in_flight > FREE_IN_FLIGHT else 0.0)
            + view.lateness_seconds
        )
        candidates.append(Candidate(view, matched_bytes, matched_tokens, uncached, cost))
    if len(candidates) > 1:
        candidates.sort(key=_cost)
        _settle_ties(candidates, demand.tie_hash)
    return tuple(candidates)


def _cost(candidate: Candidate) -> float:
    return candidate.cost_seconds


def _settle_ties(candidates: list[Candidate], tie_hash: int) -> None:
    """Put first, of those that cost as good as the least, the one with fewest in flight, then by rendezvous.

    Only replicas that hold equally much tie: where one holds more, a small difference is no noise.
    """
    first = candidates[0]
    bound = first.cost_seconds * (1.0 + TIE_SHARE) + TIE_SECONDS
    if candidates[1].cost_seconds > bound:
        return
    best, fewest, heaviest = 0, first.replica.in_flight, -1
    for place, candidate in enumerate(candidates):
        if candidate.cost_seconds > bound:
            break
        in_flight = candidate.replica.in_flight
        if in_flight > fewest or candidate.matched_bytes != first.matched_bytes:
            continue
        weight = _rendezvous(tie_hash, candidate.replica.name)
        if in_flight < fewest or weight > heaviest:
            best, fewest, heaviest = place, in_flight, weight
    if best:
        candidates.insert(0, candidates.pop(best))


def _not_waiting(
    candidates: tuple[Candidate, ...], held: Mapping[int, Held], held_back: Callable[[int, Held], bool]
) -> tuple[Candidate, ...]:
    """Where the cheapest would have to wait for a prefill under way, put first the cheapest of those that would have
    the first token sooner and hold no less.

    A hot prefix gets a further copy when its holders decode much; the copy's replica is then idle, and so the
    cheapest for all that follow. It is made for those that come when it is there: who waits for it gains nothing.
    """
    first = candidates[0]
    have = held.get(first.replica.id)
    if have is None or not held_back(first.replica.id, have):
        return candidates
    bound = _first_token_seconds(first)
    for place, other in enumerate(candidates):
        if (
            place
            and other.matched_bytes >= first.matched_bytes
            and _first_token_seconds(other) < bound
            and not held_back(other.replica.id, held[other.replica.id])
        ):
            return (other, *candidates[:place], *candidates[place + 1 :])
    return candidates


def _first_token_seconds(candidate: Candidate) -> float:
    replica = candidate.replica
    tokens = replica.pending_tokens + candidate.uncached_tokens
    return tokens / replica.rate_tokens_per_second + replica.lateness_seconds


def _rendezvous(tie_hash: int, name: str) -> int:
    """The weight of `name` for this prefix: one round of Fibonacci hashing over both (Knuth, TAOCP 3, 6.4).

    Not Python's own `hash`, which differs from process to process.
    """
    mixed = ((tie_hash ^ crc32(name.encode())) * 0x9E3779B97F4A7C15) & _MASK
    return ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & _MASK


def _reason(candidates: tuple[Candidate, ...]) -> RouteReason:
    chosen = candidates[0].matched_bytes
    deepest = chosen
    for candidate in candidates:
        if candidate.matched_bytes > deepest:
            deepest = candidate.matched_bytes
    if deepest == 0:
        return RouteReason.COLD
    return RouteReason.WARM if chosen == deepest else RouteReason.SPREAD


def _cache_status(demand: Demand, match: Match, candidates: tuple[Candidate, ...]) -> tuple[CacheStatus, MissReason]:
    matched = candidates[0].matched_bytes
    if matched > 0 and matched >= demand.size_bytes - demand.last_block_bytes:
        return CacheStatus.HIT, MissReason.NONE
    return (CacheStatus.PARTIAL if matched else CacheStatus.MISS), _miss(matched, match, candidates)


def _miss(matched: int, match: Match, candidates: tuple[Candidate, ...]) -> MissReason:
    """Why no more than `matched` bytes; none where the rest of the prompt is new."""
    for candidate in candidates:
        if candidate.matched_bytes > matched:
            return MissReason.ELSEWHERE
    for have in match.held.values():
        if have.size_bytes > matched:
            return MissReason.DOWN
    if match.evicted:
        return MissReason.EVICTED
    if not matched:
        return MissReason.COLD
    return MissReason.CHANGED if match.diverged else MissReason.NONE


def _none_left(views: Sequence[ReplicaView]) -> Overloaded:
    waits = [view.retry_after_seconds for view in views if view.retry_after_seconds > 0]
    return Overloaded(
        "No replica can take this request now.", retry_after_seconds=max(1.0, min(waits)) if waits else 1.0
    )

"""Choose the replica for a prompt: compute one cost in seconds for each, take the lowest, and state the reason.

Pure: no clock, no socket, no state. It takes the fleet's rows and the index's match, and returns a `Plan`.

The cost of replica r for a prompt p, in seconds:

    (pending(r) + uncached(p, r)) / rate(r)  +  a x uncached(p, r) / mean rate
      +  c x max(in_flight(r) - 8, 0)  +  lateness(r)  +  w x dropped(p, r) / mean rate

The first term is the time until the first token. The second charges what p computes there `a` times more, for the
requests that will wait behind it; it uses the mean rate of all, since behind a slow replica fewer requests wait, each
longer. `a = 2 + 8 x the shortest queue of all, in seconds`: the longer all queues are, the more it costs to compute
something twice. The third term is the price of decoding beside many others, the fourth avoids a replica that stalls,
and the last one charges what r must evict for p if another replica has more room, since it will have to be computed
again. No threshold ends affinity: a hot prefix is computed a second time exactly if waiting for its holder costs
more. At an idle replica with ample room, a copy of a prefix that other prompts share delays and evicts nothing, so it
is not charged by the second term.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol
from zlib import crc32

from proxy.errors import Overloaded
from proxy.model import CacheStatus, MissReason, RouteReason
from proxy.records import Candidate, Demand, Plan, ReplicaView

if TYPE_CHECKING:
    from cache import Held, Match

LEAST_FUTURE_WEIGHT: Final = 2.0
"""`a` while a replica is idle. A prefix that is computed twice also evicts something else, so it costs more than
its prefill. On a trace, 1 gives 0.92 of the hits of one pooled cache; 2 gives 0.94 at one percent more mean TTFT;
3 gives 0.95 at two percent more.
"""

WEIGHT_PER_SECOND: Final = 8.0
"""Growth of `a` with the shortest queue. What is computed delays all that arrive until the queue is empty, which near
saturation takes many times as long as the queue. On an overloaded trace, 8 gives 6 % less mean TTFT than 3 with a p99
2 % higher (means of six runs); with shortest queues of a third of a second it costs 1 %, with shorter ones nothing.
"""

MAX_FUTURE_WEIGHT: Final = 60.0
"""Bound of `a`: in an overload of minutes the weight would otherwise outweigh the queue's own term. With 30, the
overloaded trace loses half of what the growth by 8 a second gains; with 120 nothing changes.
"""

FREE_IN_FLIGHT: Final = 8
"""Number of requests that decode for free: an engine step reads the weights once for its whole batch. If the
first one already had a price, small differences in number would outweigh queues and prefixes: 2 % more mean TTFT
on a trace, and no gain on a decode-heavy load, where the numbers are large. 4 to 16 give the same figures.
"""

MIN_UNCACHED_TOKENS: Final = 1.0
"""Engines always compute the last token, whatever they hold."""

MIN_SHAREABLE_BYTES: Final = 4_096
"""Prompts under about 1,000 tokens are not worth indexing: computing one costs less than a detour."""

TIE_SHARE: Final = 0.02
TIE_SECONDS: Final = 0.002
"""Costs that exceed the lowest by less than this are equal: learned rates differ by noise, and an idle fleet must
not send every cold prompt to the replica whose rate looks one percent better.
"""

DROP_WEIGHT: Final = 3.0
"""`w`: how often evicted tokens are computed again, since doing so evicts others while the replica is overfull. With
1, sessions that share a head and outgrow their replica stay there although others are empty. On traces, 3 gives 0.2
to 0.6 points more hits than 1 with mean TTFT 1 to 2 % higher, and 3 % lower under overload.
"""

MIN_DROP_TOKENS: Final = 256.0
"""For a prompt with fewer uncached tokens the room at replicas is not looked up."""


IDLE_TOKENS: Final = 256.0
"""A replica with fewer tokens to compute is idle: a few hundredths of a second."""

COPY_ROOM_PROMPTS: Final = 8
"""Prompts of a length for which a replica must have free room before it gets a copy of a shared prefix at its price
in time alone. With less, copies soon evict something: 0.3 points of hits on a trace.
"""


class Room(Protocol):
    """The room for prompts at each replica: `cache.PrefixIndex`."""

    def dropped_tokens(self, replica: int, matched_tokens: float, uncached_tokens: float) -> float:
        """Predict the tokens that the replica must evict for a prompt of which it holds `matched_tokens`."""
        ...

    def free_prompts(self, replica: int, prompt_tokens: float) -> int | None:
        """Count the prompts of this length that fit into the replica's free room; None if its capacity is unknown."""
        ...

    def held_prompts(self, replica: int, prompt_tokens: float) -> int:
        """Count the prompts of this length that have as many tokens as the replica holds, rounded up."""
        ...


_NAMED_AT_MOST: Final = 4  # replicas named in an error

PRIOR_SHARE: Final = 0.15
"""Share by which the replica of the client's session may cost more: the engine may reuse more than bytes show."""

TIE_TOKENS: Final = 16.0
"""Replicas that hold the same up to one block of an engine may tie."""

_MASK = (1 << 64) - 1

# constants: the member of an enum is looked up in Python
_REASON_ONLY: Final = RouteReason.ONLY
_REASON_SHORT: Final = RouteReason.SHORT
_REASON_COLD: Final = RouteReason.COLD
_REASON_WARM: Final = RouteReason.WARM
_REASON_SPREAD: Final = RouteReason.SPREAD
_MISS_NONE: Final = MissReason.NONE
_MISS_SHORT: Final = MissReason.SHORT
_MISS_COLD: Final = MissReason.COLD
_MISS_CHANGED: Final = MissReason.CHANGED
_CACHE_HIT: Final = CacheStatus.HIT
_CACHE_PARTIAL: Final = CacheStatus.PARTIAL
_CACHE_MISS: Final = CacheStatus.MISS
_CACHE_BYPASS: Final = CacheStatus.BYPASS


def plan(
    demand: Demand,
    match: Match,
    views: Sequence[ReplicaView],
    *,
    min_shareable_bytes: int = MIN_SHAREABLE_BYTES,
    weight_per_second: float = WEIGHT_PER_SECOND,
    held_back: Callable[[int, Held], bool] | None = None,
    room: Room | None = None,
    pool_name: str = "",
) -> Plan:
    """Order the available replicas by cost, cheapest first.

    `held_back` returns True for a replica that is still computing what the index says it holds, so that this prompt
    would wait there; None means that no replica is. Raises `Overloaded`, with the seconds until the first one is
    tried again, if none is available.
    """
    pinned = demand.pinned_replica
    if pinned is None:
        usable = [view for view in views if view.available]
    else:
        usable = [view for view in views if view.id == pinned and view.available]
    if not usable:
        raise _none_left(views if pinned is None else [view for view in views if view.id == pinned], pool_name)

    candidates = _ranked(demand, match, usable, weight_per_second, room)
    if held_back is not None and len(candidates) > 1:
        candidates = _not_waiting(candidates, match.held, held_back)
    if pinned is not None:
        reason = RouteReason.PINNED
    elif len(usable) == 1:
        reason = _REASON_ONLY
    elif demand.size_bytes < min_shareable_bytes:
        reason = _REASON_SHORT
    else:
        reason = _reason(candidates)
    if demand.size_bytes < min_shareable_bytes:
        return Plan(candidates, reason, _MISS_SHORT, _CACHE_BYPASS, demand.prompt_tokens)
    cache, miss = _cache_status(demand, match, candidates)
    return Plan(candidates, reason, miss, cache, demand.prompt_tokens)


def future_weight(views: Sequence[ReplicaView], per_second: float = WEIGHT_PER_SECOND) -> float:
    """Return `a` of the cost: 2 plus `per_second` times the shortest queue of `views` in seconds, at most 60."""
    shortest = min([view.pending_tokens / view.rate_tokens_per_second for view in views])
    return min(LEAST_FUTURE_WEIGHT + per_second * shortest, MAX_FUTURE_WEIGHT)


def _ranked(
    demand: Demand, match: Match, usable: list[ReplicaView], weight_per_second: float, room: Room | None
) -> tuple[Candidate, ...]:
    held = match.held
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
        if room is not None:
            candidates = _charged_for_room(candidates, held, room, DROP_WEIGHT / mean_rate)
            if match.diverged:
                candidates = _eased_for_copies(candidates, room, prompt_tokens, future_seconds)
        candidates.sort(key=_cost)
        _settle_ties(candidates, demand, match.evicted_from, room)
        if demand.prior_replica is not None:
            _prefer(candidates, demand.prior_replica)
    return tuple(candidates)


def _cost(candidate: Candidate) -> float:
    return candidate.cost_seconds


def _charged_for_room(
    candidates: list[Candidate], held: Mapping[int, Held], room: Room, seconds_per_token: float
) -> list[Candidate]:
    """Add to each cost the tokens that the replica must evict in excess of the one that must evict fewest."""
    dropped = [
        room.dropped_tokens(each.replica.id, each.matched_tokens, _new_tokens(each, held))
        if each.uncached_tokens >= MIN_DROP_TOKENS
        else 0.0
        for each in candidates
    ]
    least = min(dropped)
    if max(dropped) <= least:
        return candidates
    return [
        _costing(each, (tokens - least) * seconds_per_token) for each, tokens in zip(candidates, dropped, strict=True)
    ]


def _eased_for_copies(
    candidates: list[Candidate], room: Room, prompt_tokens: float, seconds_per_token: float
) -> list[Candidate]:
    """Take back what idle replicas are charged, for later requests, for the part of the prompt that others hold.

    It applies if all that hold most of it are busy. Other prompts share this part, so a copy of it serves them too.
    """
    most = max([each.matched_tokens for each in candidates])
    if most < MIN_DROP_TOKENS:
        return candidates
    for each in candidates:
        if each.matched_tokens == most and each.replica.pending_tokens < IDLE_TOKENS:
            return candidates
    return [
        _costing(each, (each.matched_tokens - most) * seconds_per_token)
        if each.matched_tokens < most
        and each.replica.pending_tokens < IDLE_TOKENS
        and (room.free_prompts(each.replica.id, prompt_tokens) or 0) >= COPY_ROOM_PROMPTS
        else each
        for each in candidates
    ]


def _costing(candidate: Candidate, more_seconds: float) -> Candidate:
    """Return the candidate with `more_seconds` added to its cost."""
    return Candidate(
        candidate.replica,
        candidate.matched_bytes,
        candidate.matched_tokens,
        candidate.uncached_tokens,
        candidate.cost_seconds + more_seconds,
    )


def _new_tokens(candidate: Candidate, held: Mapping[int, Held]) -> float:
    """Return the uncached tokens that need room in the cache; tokens that are held but computed again need none."""
    have = held.get(candidate.replica.id)
    return candidate.uncached_tokens - (0 if have is None else have.unused_tokens)


def _settle_ties(candidates: list[Candidate], demand: Demand, evicted_from: int, room: Room | None) -> None:
    """Order the candidates whose cost equals the lowest.

    The first is the one with the fewest requests in flight; then the one that holds most, if none reuses more of the
    prompt; then the one with the most room; then the one that evicted the prompt, since it may still have it; then
    one in this zone; then the one that rendezvous hashing chooses. Only replicas that reuse equally much tie: if one
    reuses more, a small difference is not noise.
    """
    first = candidates[0]
    bound = first.cost_seconds * (1.0 + TIE_SHARE) + TIE_SECONDS
    if candidates[1].cost_seconds > bound:
        return
    tied = [
        each
        for each in candidates
        if each.cost_seconds <= bound and abs(each.matched_tokens - first.matched_tokens) <= TIE_TOKENS
    ]
    if len(tied) == 1:
        return
    spaces = None if room is None else _spaces(tied, room)
    best, best_key = first, (0, 0, 0, False, False, 0)
    for place, candidate in enumerate(tied):
        replica = candidate.replica
        key = (
            -replica.in_flight,
            candidate.matched_bytes,
            0 if spaces is None else spaces[place],
            replica.id == evicted_from,
            not replica.is_far,
            _rendezvous(demand.tie_hash, replica.name),
        )
        if not place or key > best_key:
            best, best_key = candidate, key
    if best is not first:
        candidates.remove(best)
        candidates.insert(0, best)


def _spaces(candidates: list[Candidate], room: Room) -> list[int]:
    """Return a number for each candidate that is higher where more prompts have room.

    If a capacity is not known, what is held is compared instead, at all of them: a known room would always win.
    """
    free = [room.free_prompts(each.replica.id, each.uncached_tokens) for each in candidates]
    known = [prompts for prompts in free if prompts is not None]
    if len(known) == len(candidates):
        return known
    return [-room.held_prompts(each.replica.id, each.uncached_tokens) for each in candidates]


def _not_waiting(
    candidates: tuple[Candidate, ...], held: Mapping[int, Held], held_back: Callable[[int, Held], bool]
) -> tuple[Candidate, ...]:
    """If the cheapest would have to wait for a running prefill, prefer one that holds as much and answers sooner.

    Of several, the cheapest goes first. A hot prefix gets another copy when its holders decode many requests; the
    replica that computes the copy is idle otherwise, and so the cheapest for all requests that follow. The copy is
    meant for requests that arrive when it is ready: one that waits for it gains nothing.
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


def _prefer(candidates: list[Candidate], prior: int) -> None:
    """Put the replica of the client's session first, if it holds as much as the first and costs little more."""
    first = candidates[0]
    for place, candidate in enumerate(candidates):
        if candidate.replica.id == prior:
            near = candidate.cost_seconds <= first.cost_seconds * (1.0 + PRIOR_SHARE) + TIE_SECONDS
            if near and candidate.matched_tokens >= first.matched_tokens - TIE_TOKENS:
                candidates.insert(0, candidates.pop(place))
            return


def _rendezvous(tie_hash: int, name: str) -> int:
    """Return the weight of `name` for this prefix: one round of Fibonacci hashing over both (Knuth, TAOCP 3, 6.4).

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
        return _REASON_COLD
    return _REASON_WARM if chosen == deepest else _REASON_SPREAD


def _cache_status(demand: Demand, match: Match, candidates: tuple[Candidate, ...]) -> tuple[CacheStatus, MissReason]:
    matched = candidates[0].matched_bytes
    if matched > 0 and matched >= demand.size_bytes - demand.last_block_bytes:
        return _CACHE_HIT, _MISS_NONE
    return (_CACHE_PARTIAL if matched else _CACHE_MISS), _miss(matched, match, candidates)


def _miss(matched: int, match: Match, candidates: tuple[Candidate, ...]) -> MissReason:
    """Return why no more than `matched` bytes were found; NONE if the rest of the prompt is new."""
    for candidate in candidates:
        if candidate.matched_bytes > matched:
            return MissReason.ELSEWHERE
    for have in match.held.values():
        if have.size_bytes > matched:
            return MissReason.DOWN
    if match.evicted:
        return MissReason.EVICTED
    if not matched:
        return _MISS_COLD
    return _MISS_CHANGED if match.diverged else _MISS_NONE


def _none_left(views: Sequence[ReplicaView], pool_name: str) -> Overloaded:
    waits = [view.retry_after_seconds for view in views if view.retry_after_seconds > 0]
    states = [f"{view.name} is {view.unavailable_because or 'unavailable'}" for view in views[:_NAMED_AT_MOST]]
    if len(views) > _NAMED_AT_MOST:
        states.append(f"and {len(views) - _NAMED_AT_MOST} more")
    why = ", ".join(states) or "there is none"
    return Overloaded(
        f"No replica of pool {pool_name!r} can take this request now: {why}.",
        retry_after_seconds=max(1.0, min(waits)) if waits else 1.0,
    )

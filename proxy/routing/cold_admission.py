"""Cold turns wait until a replica is quiet, so that sessions which need more cache than there is do not thrash.

A cold prefill of a long prompt takes seconds, in which the warm turns behind it wait, grow old and are evicted; then
they are cold too. So a turn of which no replica holds half waits here, first come first served, until a replica has
nothing else to compute and what runs there leaves room for it. Warm turns never wait here, and engines evict the
least recently used blocks, which are those of waiting sessions. The rule knows prompts only, not sessions.

Pure: clocks are passed in, nothing here waits or sends. The proxy and the simulation drive the same objects.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import inf
from typing import Final, Generic, TypeVar

from proxy.routing.cost import LEAST_FUTURE_WEIGHT
from proxy.routing.fair_shares import Claimant, FairQueue, Priority, TenantShares
from proxy.routing.shortest_job import ShortestJobQueue

SHORT_TOKENS: Final = 4_096.0
SHORT_SHARE: Final = 0.01
"""A turn with no more uncached tokens than both of these, the second being a share of the largest cache, is never
held back: it takes half a second and evicts next to nothing. The share matters for engines on a CPU: their caches
have about 50,000 tokens, for which a prompt of 3,000 is long.
"""

WARM_SHARE: Final = 0.3
"""A turn is warm if no more than this share of its prompt must be computed. Engines evict the ends of prompts first.
With 0.5 the prompts that are partly evicted still go before all others, each evicts the end of another one, and the
cold turns wait a third longer (x = 2: p99 381 s instead of 268). With 0.1 eight percent of the turns are lost.
"""

QUIET_SECONDS: Final = 0.5
"""A replica with no more pending prefill than this is quiet. Values from 0.2 to 1 s give the same result; with 2
s five percent of the turns are lost, with 4 s nine.
"""

COLD_QUIET: Final = 0.4
"""A cold turn needs this part of it, so that warm turns that wait in any worker go first. Otherwise four workers
serve a tenth fewer turns than one.
"""

REST_SECONDS: Final = 60.0
"""A replica that took no cold turn for this time takes one even if it is not quiet. The time must not be under 20
s: with 5 s more than half of the turns are lost.
"""

PATIENCE_SECONDS: Final = 60.0
"""Under pressure, the turn that goes next spares the sessions that will soon continue: it goes to a replica only if
the prompts that ended there within `cold_pressure.RESTING_SECONDS` fit as well. After this time at the head of the
queue it goes all the same, so that a prompt which hardly ever fits keeps nobody waiting.
"""

ROOM_PATIENCE: Final = 2.0
"""After this multiple of `PATIENCE_SECONDS` at the head it does not wait for room beside the prompts that run either:
the engine lets it wait, and what comes after it, until there is room. Otherwise a prompt of four fifths of a cache
waits behind eight small sessions for an hour, since some of them always run, and all cold turns behind it as well.
"""

SPARING_ROUNDS: Final = 2.0
"""It also goes all the same once it has waited for this multiple of a round, in which the replicas would compute the
prompts of all continuing sessions once. Without the gate, turns wait for about a round in the mean, and the slowest
of a hundred for about two, so sparing makes nobody wait for longer than those. On two engines of a CPU, 1.5 rounds
give 1 % fewer turns at the same p99.
"""

SPARING_SHARE: Final = 1.0 / 3.0
"""It spares them only at replicas where the prompts that run take this share of the cache. With less running, a
replica has time for a cold prefill: the sessions that rest there could not keep it busy, and while they are spared it
is idle. With more, a cold prefill delays all that run; they occupy the cache for longer, and fewer sessions have room
in it. On two engines of a CPU, with pauses of 2, 4 and 6 s, this gives 6, 0 and 1 % more turns than sparing nobody,
and sparing at all replicas 6, -5 and -4 %. Shares of 0.25 to 0.4 differ by at most two percent.
"""

RESERVED_SHARE: Final = 0.2
"""Share of a cache that is left, under pressure, to sessions that rest for longer than that. With more of it cold
turns wait longer, and warm ones less: at x = 2, 0.1 gives 3 % fewer turns at a p99 of 260 s, 0.3 gives 1 % more at
387 s.
"""

LONG_SECONDS: Final = 1.0
BACKLOG_SECONDS: Final = 3.0
"""A cold prefill of at least `LONG_SECONDS` also waits if every replica has `BACKLOG_SECONDS` of pending prefill,
or if another tenant is active: an engine neither interrupts a prefill nor reorders its requests.
"""

NEW_AFTER_SECONDS: Final = 1.0
"""A turn of a session that was served before precedes a new session's that arrived at most this much earlier."""

MOST_PASSED_OVER: Final = 256
SEARCH_SECONDS: Final = 0.5
"""Turns that are passed over in one look, behind others that what is open cannot serve either: a worker looks
hundreds of times a second. Once in `SEARCH_SECONDS` it looks through all of them.
"""

ORDER_OF_ARRIVAL: Final = 1.0
"""Weight of the arrival time that makes a queue first come, first served."""

PREFILL_WEIGHT: Final = 1.0 + LEAST_FUTURE_WEIGHT
"""Weight of a turn's own prefill, beside the work before it, in the choice of its replica: that of the cost rule
while a replica is idle. If turns without pressure went to any quiet replica, an overloaded trace would have 0.3
points fewer hits, and a time to the first token that is 4 % longer in the mean and 5 % in the slowest of a hundred.
"""

T = TypeVar("T")


class TurnKind(enum.StrEnum):
    """Class of a turn by the share of its prompt that the best replica lacks."""

    SHORT = "short"  # at most `short_tokens`: routed as usual
    WARM = "warm"  # at most `WARM_SHARE`: routed as usual, to replicas about as good as the best
    COLD = "cold"  # it waits until a replica is quiet


def short_tokens(most_capacity_tokens: float) -> float:
    """Return the number of tokens up to which a turn is short, from the size of the largest cache."""
    return min(SHORT_TOKENS, SHORT_SHARE * most_capacity_tokens)


def classify(prompt_tokens: float, least_uncached_tokens: float, short: float = SHORT_TOKENS) -> TurnKind:
    """Return the kind of a turn, by its tokens and those that the best replica would have to compute."""
    if least_uncached_tokens <= short:
        return TurnKind.SHORT
    return TurnKind.WARM if least_uncached_tokens <= WARM_SHARE * prompt_tokens else TurnKind.COLD


def waits_while_warm(kind: TurnKind, prompt_tokens: float, short: float = SHORT_TOKENS) -> bool:
    """Return True if a turn that is not cold may have become so by the time its replica can compute it."""
    return kind is not TurnKind.COLD and prompt_tokens > short


def is_long(uncached_tokens: float, rates: Iterable[float], long_seconds: float = LONG_SECONDS) -> bool:
    """Return True if a prefill takes `long_seconds` or more at every replica. `rates` are in tokens per second."""
    return uncached_tokens >= long_seconds * max(rates)


def about_as_good(uncached_tokens: Mapping[int, float], short: float = SHORT_TOKENS) -> frozenset[int]:
    """Return the replicas, by number, that would compute at most `short` tokens more than the best one."""
    bound = min(uncached_tokens.values()) + short
    return frozenset(replica for replica, tokens in uncached_tokens.items() if tokens <= bound)


@dataclass(frozen=True, slots=True)
class ReplicaRoom:
    """Work of a replica, as all processes see it.

    `running_tokens` are the prompts of requests that run there, `resting_tokens` those of sessions whose last turn
    ended there a moment ago. `cache_tokens` is the size of its cache, None if unknown; `own_share` is the mean share
    of a prompt that is in no other one. With `is_taken` a cold turn is being computed there, and no other one may go.
    """

    replica: int
    pending_seconds: float
    running_tokens: float
    cache_tokens: float | None
    own_share: float = 1.0
    resting_tokens: float = 0.0
    is_taken: bool = False


@dataclass(frozen=True, slots=True)
class ColdTurn(Generic[T]):
    """A turn that waits. `item` belongs to the caller; `is_new` means that it continues no prompt served before.

    `prefill_seconds` is the time to compute it, by replica, as it was when the turn came. Those in `unfit` cannot
    serve it: replicas of one pool may have different models.
    """

    item: T
    prompt_tokens: float
    uncached_tokens: float
    is_new: bool = False
    tenant: str = ""
    priority: Priority = Priority.NORMAL
    weight: float = 1.0
    prefill_seconds: Mapping[int, float] = field(default_factory=dict)
    unfit: frozenset[int] = frozenset()

    @property
    def delay_seconds(self) -> float:
        """Seconds by which it goes later than its arrival says."""
        return NEW_AFTER_SECONDS if self.is_new else 0.0


Waiting = Claimant[ColdTurn[T]]
"""A turn in the queue."""


class ColdQueue(Generic[T]):
    """The cold turns that wait for the replicas of one pool, and the time at which each replica took its last one.

    Several queues for the same replicas may share `last_cold_seconds`, the times by replica.
    """

    def __init__(self, shares: TenantShares | None = None, last_cold_seconds: dict[int, float] | None = None) -> None:
        self._queue: FairQueue[ColdTurn[T]] = FairQueue(shares or TenantShares(), _first_come_first_served)
        self._last_cold_seconds = {} if last_cold_seconds is None else last_cold_seconds
        self._first_seconds: dict[Waiting[T], float] = {}  # when a turn was first the first one under pressure
        self._asked_seconds: dict[Waiting[T], float] = {}  # when a turn was first one that might go
        self._unfit: Counter[frozenset[int]] = Counter()  # how many turns have the same unfit replicas
        self._searched_seconds = -inf  # when it last looked through all turns
        self._began_seconds = 0.0  # time at which the queue last ceased to be empty

    def __len__(self) -> int:
        return len(self._queue)

    def join(self, turn: ColdTurn[T], now_seconds: float) -> Waiting[T]:
        """Add a turn that arrived at `now_seconds`."""
        if not len(self._queue):
            self._began_seconds = now_seconds
        self._unfit[turn.unfit] += 1
        waiting = Claimant(turn, turn.tenant, turn.weight, turn.priority, turn.uncached_tokens)
        return self._queue.join(waiting, turn.delay_seconds, now_seconds)

    def leave(self, waiting: Waiting[T]) -> None:
        """Remove a turn that was not sent. May be called twice."""
        self._forget(waiting)
        self._queue.leave(waiting)

    def head(self, now_seconds: float, skipped: Container[str] = ()) -> Waiting[T] | None:
        """Return the turn that goes next, of no tenant in `skipped`, or None."""
        return self._queue.head(now_seconds, skipped)

    def waiting(self) -> dict[tuple[Priority, str], int]:
        """Count the turns that wait, by priority and tenant."""
        return self._queue.waiting()

    @property
    def unfit(self) -> Set[frozenset[int]]:
        """The different sets of replicas that cannot serve a turn, of all turns that wait."""
        return self._unfit.keys()

    def highest(self, skipped: Container[str] = ()) -> Priority | None:
        """Return the highest priority with which a tenant waits that is not in `skipped`, None if there is none."""
        return self._queue.highest(skipped)

    def open_to(
        self,
        waiting: Waiting[T],
        rooms: Iterable[ReplicaRoom],
        now_seconds: float,
        *,
        is_pressed: bool = False,
        quiet_seconds: float = QUIET_SECONDS,
        rest_seconds: float = REST_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        round_seconds: float = inf,
    ) -> frozenset[int]:
        """Return the replicas that may take a turn now: quiet ones with room for its prompt.

        `is_pressed` says that sessions need more cache than there is: the turn then waits for a while, rather than
        have evicted what others will use again at once. `round_seconds` is the time in which the replicas would
        compute the prompts of all continuing sessions once. After `ROOM_PATIENCE` it waits for no room any more.
        """
        tokens, unfit = waiting.item.prompt_tokens, waiting.item.unfit
        spares = (
            is_pressed
            and now_seconds - self._first_seconds.setdefault(waiting, now_seconds) < patience_seconds
            and now_seconds - waiting.arrived_seconds < SPARING_ROUNDS * round_seconds
        )
        has_room = fits if spares else can_run
        asked_seconds = self._asked_seconds.setdefault(waiting, now_seconds)
        if now_seconds - asked_seconds >= ROOM_PATIENCE * patience_seconds:
            has_room = _needs_no_room
        return frozenset(
            room.replica
            for room in rooms
            if room.replica not in unfit
            and self._is_free(room, now_seconds, quiet_seconds, rest_seconds)
            and has_room(room, tokens)
        )

    def _is_free(self, room: ReplicaRoom, now_seconds: float, quiet_seconds: float, rest_seconds: float) -> bool:
        """Return True if a replica may take a cold turn, by its work and by the time since its last one."""
        if room.is_taken:
            return False
        last_seconds = self._last_cold_seconds.get(room.replica, self._began_seconds)
        return is_quiet(room.pending_seconds, quiet_seconds) or now_seconds - last_seconds >= rest_seconds

    def next_to_go(
        self,
        rooms: Sequence[ReplicaRoom],
        now_seconds: float,
        *,
        skipped: Container[str] = (),
        is_pressed: bool = False,
        quiet_seconds: float = QUIET_SECONDS,
        rest_seconds: float = REST_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
        round_seconds: float = inf,
    ) -> tuple[Waiting[T], tuple[int, ...]] | None:
        """Return the turn that goes next, and the replicas open to it, best first; it waits on if there are none.

        Without pressure a turn may wait for a busy replica that holds part of its prompt, and lets others go before
        it, for at most `patience_seconds`. It also lets them go where it cannot be served itself, and so do all
        behind it that only the same replicas can serve. Returns None if all that wait do so. `rooms` are all replicas
        that are available, the others are as in `open_to`. No turn of a tenant in `skipped` goes.
        """
        busy_seconds = {room.replica: room.pending_seconds for room in rooms}
        passed_over, blocked = 0, set[frozenset[int]]()
        for waiting in self._queue.in_order(now_seconds, skipped):
            unfit = waiting.item.unfit
            if unfit not in blocked:
                among = self.open_to(
                    waiting,
                    rooms,
                    now_seconds,
                    is_pressed=is_pressed,
                    quiet_seconds=quiet_seconds,
                    rest_seconds=rest_seconds,
                    patience_seconds=patience_seconds,
                    round_seconds=round_seconds,
                )
                if among or not any(
                    room.replica in unfit and self._is_free(room, now_seconds, quiet_seconds, rest_seconds)
                    for room in rooms
                ):
                    costs = costs_of(waiting.item, busy_seconds)
                    best = min(costs, key=lambda replica: (costs[replica], replica not in among), default=None)
                    is_patient = not is_pressed and now_seconds - waiting.arrived_seconds < patience_seconds
                    if best is None or best in among or not among or not is_patient:
                        return waiting, tuple(sorted(among, key=lambda replica: costs[replica]))
                    busy_seconds[best] += waiting.item.prefill_seconds.get(best, 0.0)
                    continue
                blocked.add(unfit)
                if len(blocked) == len(self._unfit):
                    return None
            passed_over += 1
            if passed_over == MOST_PASSED_OVER:
                if now_seconds - self._searched_seconds < SEARCH_SECONDS:
                    return None
                self._searched_seconds = now_seconds
        return None

    def serve(self, waiting: Waiting[T], replica: int, now_seconds: float) -> None:
        """Remove a turn that is sent to `replica`."""
        self._forget(waiting)
        self._queue.serve(waiting)
        self._last_cold_seconds[replica] = now_seconds

    def _forget(self, waiting: Waiting[T]) -> None:
        """Drop what is kept for a turn that is about to leave, or has left."""
        if not waiting.is_gone:
            unfit = waiting.item.unfit
            self._unfit[unfit] -= 1
            if not self._unfit[unfit]:
                del self._unfit[unfit]
        self._first_seconds.pop(waiting, None)
        self._asked_seconds.pop(waiting, None)


def is_quiet(pending_seconds: float, quiet_seconds: float = QUIET_SECONDS) -> bool:
    """Return True if a replica is quiet enough for a cold turn."""
    return pending_seconds <= COLD_QUIET * quiet_seconds


def costs_of(turn: ColdTurn[T], busy_seconds: Mapping[int, float]) -> dict[int, float]:
    """Return what a turn costs at each replica that can serve it, in seconds, after the work to be done before it.

    A replica that was not there when the turn came holds no more of it than the one that held least.
    """
    known, unfit = turn.prefill_seconds, turn.unfit
    longest = max(known.values(), default=0.0)
    return {
        replica: seconds + PREFILL_WEIGHT * known.get(replica, longest)
        for replica, seconds in busy_seconds.items()
        if replica not in unfit
    }


def can_run(room: ReplicaRoom, prompt_tokens: float) -> bool:
    """Return True if this prompt can run beside those that run, if nothing runs, or if nobody knows the cache's size.

    What prompts share is in the cache once. Counted for each of them, it would leave a third of the cache unused if
    agents have long common instructions: cold turns would then wait a third longer.
    """
    cache, running = room.cache_tokens, room.running_tokens
    return cache is None or not running or (running + prompt_tokens) * room.own_share <= cache


def fits(room: ReplicaRoom, prompt_tokens: float) -> bool:
    """Return True if this prompt fits beside those that run and those that rest, or if little runs.

    A part of the cache is left to the sessions that rest longer. What prompts share is counted once, as by `can_run`.
    """
    cache, running = room.cache_tokens, room.running_tokens
    if cache is None or running * room.own_share < SPARING_SHARE * cache:
        return can_run(room, prompt_tokens)
    needed = (running + room.resting_tokens + prompt_tokens) * room.own_share
    return needed <= (1.0 - RESERVED_SHARE) * cache


def _needs_no_room(room: ReplicaRoom, prompt_tokens: float) -> bool:
    del room, prompt_tokens
    return True


def _first_come_first_served() -> ShortestJobQueue[Claimant[ColdTurn[T]]]:
    return ShortestJobQueue(inf, ORDER_OF_ARRIVAL)

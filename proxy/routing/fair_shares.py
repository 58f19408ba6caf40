"""Choose who is served next among tenants and priorities. Pure: clocks are passed in, nothing here waits or sends.

Tenants take turns by deficit round robin. The work of a tenant, in uncached tokens over its weight, is cut into
rounds of `QUANTUM_TOKENS`; the tenant in the lowest round is served next, and what a request takes beyond its round
counts against the next. Among tenants in the same round, the one whose first request comes first in the queue's order
is served, so a single tenant gets exactly that order. A tenant that starts to wait begins in the present round: being
idle earns nothing.

Where nobody checks keys, anyone can make up tenants without end. So those that no replica has answered yet, the
newcomers, share as a few groups (`TenantShares.name_of`), which get together at most as much as all others.

The rounds are the same in every process. `TenantShares.rows` are this process's own cumulative counters, which the
others compare with those that they received before (`absorb`): a lost message does no harm, because differences are
never sent, and neither does a process that begins or ends.

Between priorities the order is strict except for a floor: a priority that waits gets at least the share `FLOOR` of
the work.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush, heapreplace
from math import inf
from typing import Final, Generic, NamedTuple, TypeVar
from zlib import crc32

from proxy.routing.shortest_job import Entry, ShortestJobQueue

QUANTUM_TOKENS: Final = 8_192.0
"""About a second of prefill. Shorter requests of a tenant are served several at a time, in the order of the
queue. With a tenth of it, tenants' turns would override the order of short requests; with ten times as much, a
tenant would wait ten seconds for its turn.
"""

FLOOR: Final = 0.05
"""Share of the work that a lower priority gets while a higher one waits, so that it does not starve."""

MAX_OWED_TOKENS: Final = 262_144.0
"""Most tokens that a priority can save up by its floor: the work of one very long prompt."""

MAX_TENANTS: Final = 1_024
"""Tenants remembered; the one that was served longest ago is forgotten first."""

MAX_ANSWERED: Final = 16_384
"""Tenants remembered as answered. In an hour of made-up ones, with four new ones a second, none is forgotten."""

MAX_PEERS: Final = 1_024
"""Other processes whose counters are remembered: one that died says no goodbye, and comes back under another name."""

MAX_ROWS: Final = 64
"""Tenants in one message to the other processes."""

MOST_TOKENS: Final = 1e18
"""A counter above this is not told to others, who would drop the whole message: it comes from a damaged one."""

SENDS: Final = 20
"""Number of messages that repeat a change: counters are cumulative, so it is enough if one arrives."""

ACTIVE_SECONDS: Final = 10.0
"""A tenant is active while its requests wait, and for this time after its last one came or ceased to wait."""

CHECK_SECONDS: Final = 0.1
"""Time for which the set of active tenants is kept before it is computed again."""

NEWCOMER_GROUPS: Final = tuple([f"newcomers {number}" for number in range(8)])
"""Names under which newcomers share; tenants' own names are hexadecimal. With more groups, fewer newcomers wait
behind a flood of one of them, and an answered tenant waits longer for its turn: for one request of each group.
"""

_WEIGHTS_ELSEWHERE: Final = dict.fromkeys(NEWCOMER_GROUPS, 1.0 / len(NEWCOMER_GROUPS))
"""Weights of those that are active only in other processes, which do not tell them; a tenant's is taken as 1."""

VIRTUAL_TIME: Final = "\0shares"
_ANSWERED: Final = "\0answered:"
_TENANT: Final = "\0tenant:"
"""Prefixes of the tenants' rows in the message about in-flight work, which no replica's name can have."""

T = TypeVar("T")


class Priority(enum.IntEnum):
    """Classes of requests: lower values are served first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


ALONE: Final = (0,) * len(Priority)
"""In how many other processes each priority waits, if there are none."""


class _Counters:
    """The work of one tenant, in tokens over its weight: done here, done elsewhere, and skipped while it was idle.

    `start` is the total at which it last began anew.
    """

    __slots__ = ("elsewhere", "lifted", "own", "start")

    def __init__(self) -> None:
        self.own = 0.0
        self.elsewhere = 0.0
        self.lifted = 0.0
        self.start = 0.0

    @property
    def total(self) -> float:
        return self.own + self.elsewhere + self.lifted

    def lift(self, start: float) -> None:
        """Begin anew at this total, if it is above the present one."""
        if start > self.total:
            self.lifted += start - self.total
            self.start = start


class TenantShares:
    """Cumulative work of each tenant over all processes, and the point that service has reached (virtual time)."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Counters] = {}
        self._peers: dict[str, dict[str, float]] = {}
        self._reached = 0.0
        self._unsent: dict[str, int] = {}  # tenants that changed, with the number of messages still to contain them
        self._seen: dict[str, tuple[float, float]] = {}  # time of a tenant's last request, and its weight
        self._waiting: dict[str, int] = {}  # requests that wait here, by tenant
        self._went: set[str] = set()  # tenants whose last waiting request has just gone
        self._answered: dict[str, None] = {}  # tenants that are no newcomers, the one answered longest ago in front
        self._newcomers: dict[str, float] = {}  # the others that are active, with the time of their last request
        self._active_weight = 0.0
        self._answered_weight = 0.0  # of active tenants that are no newcomers
        self._configured_weights: Mapping[str, float] = {}  # in force, also for what waits
        self._checked_seconds = -inf
        self.falls = 0  # how often the round of a tenant may have fallen; otherwise rounds only rise

    def seen(self, tenant: str, weight: float, now_seconds: float) -> None:
        """Note a request of the tenant, whether or not it will wait."""
        before = self._seen.get(tenant)
        self._seen[tenant] = now_seconds, weight
        added = weight if before is None else weight - before[1]
        if added:  # at once, or a flood that begins soon after a check would pass for the only tenant
            self._active_weight += added
            if tenant not in NEWCOMER_GROUPS:
                self._answered_weight += added
        if len(self._seen) > MAX_TENANTS:
            self._check(now_seconds)  # else those that are no longer active would stay until requests wait

    def newcomer_seen(self, tenant: str, now_seconds: float) -> None:
        """Note a request of a newcomer. Together they weigh as much as they are, and no more than all others."""
        newcomers = self._newcomers
        newcomers.pop(tenant, None)
        newcomers[tenant] = now_seconds
        if len(newcomers) > MAX_TENANTS:
            del newcomers[next(iter(newcomers))]
        self._check(now_seconds)
        count = len(newcomers)
        weight = max(min(float(count), self._answered_weight), 1.0) / min(count, len(NEWCOMER_GROUPS))
        self.seen(_group_of(tenant), weight, now_seconds)

    def name_of(self, tenant: str) -> str:
        """Return the name under which a tenant shares: its own once it was answered, or while nobody was."""
        return tenant if tenant in self._answered or not self._answered else _group_of(tenant)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Use the weights of a new configuration, by tenant, also for requests that wait already."""
        self._configured_weights = weights
        for name, (last_seconds, _) in self._seen.items():
            if name in weights:
                self._seen[name] = last_seconds, weights[name]
        self._checked_seconds = -inf

    def weight_of(self, name: str) -> float:
        """Return the weight that this name was last seen with; 1 if it is not active."""
        seen = self._seen.get(name)
        return 1.0 if seen is None else seen[1]

    def answered(self, tenant: str) -> None:
        """Note that a replica has answered a tenant: it is no newcomer any more. The other processes are told."""
        if self._note_answered(tenant):
            self._counters(tenant)
            self._unsent[tenant] = SENDS

    def _note_answered(self, tenant: str) -> bool:
        """Return True if this is news."""
        answered = self._answered
        if tenant in answered:
            del answered[tenant]
            answered[tenant] = None
            return False
        answered[tenant] = None
        if len(answered) > MAX_ANSWERED:
            del answered[next(iter(answered))]
        last_seconds = self._newcomers.pop(tenant, None)
        if last_seconds is not None:
            self._seen.setdefault(tenant, (last_seconds, 1.0))
            group = _group_of(tenant)
            if group not in self._waiting and all(_group_of(other) != group for other in self._newcomers):
                self._seen.pop(group, None)  # else the tenant would share with itself
        return True

    @property
    def has_several(self) -> bool:
        """False if only one tenant can be active; takes no time."""
        return len(self._seen) > 1

    def is_contended(self, now_seconds: float) -> bool:
        """Return True if more than one tenant is active."""
        if len(self._seen) < 2:
            return False
        self._check(now_seconds)
        return len(self._seen) > 1

    def share_of(self, tenant: str, now_seconds: float) -> float:
        """Return the tenant's weight divided by that of all active tenants; 1 if it is alone."""
        seen = self._seen
        if len(seen) < 2:
            return 1.0
        self._check(now_seconds)
        own = seen.get(tenant)
        return 1.0 if own is None or own[1] >= self._active_weight else own[1] / self._active_weight

    def _check(self, now_seconds: float) -> None:
        seen = self._seen
        if now_seconds - self._checked_seconds >= CHECK_SECONDS:
            self._checked_seconds = now_seconds
            went = self._went & seen.keys()
            if not went.isdisjoint(NEWCOMER_GROUPS):
                groups = {_group_of(newcomer) for newcomer in self._newcomers}
                for name in went.intersection(NEWCOMER_GROUPS) - groups:
                    del seen[name]  # all of it were answered while they waited, and would share with themselves
            for name in went & seen.keys():
                seen[name] = now_seconds, seen[name][1]
            self._went.clear()
            oldest = now_seconds - ACTIVE_SECONDS
            for name in [name for name, (last, _) in seen.items() if last < oldest and name not in self._waiting]:
                del seen[name]
            for name in [name for name, last in self._newcomers.items() if last < oldest]:
                if _group_of(name) not in self._waiting:
                    del self._newcomers[name]
            self._active_weight = sum(weight for _, weight in seen.values())
            self._answered_weight = float(
                sum([weight for name, (_, weight) in seen.items() if name not in NEWCOMER_GROUPS])
            )

    def passes_others(self, tenant: str) -> bool:
        """Return True if requests of other tenants wait here and none of this one, which goes before them."""
        return bool(self._waiting) and tenant not in self._waiting

    def round_of(self, tenant: str) -> int:
        """Return the tenant's present round; a tenant in a lower round goes first."""
        counters = self._tenants.get(tenant)
        return int((self._reached if counters is None else counters.total) / QUANTUM_TOKENS)

    def most_before(self, tenant: str, own_tokens: float, waiting_tokens: Mapping[str, float]) -> float:
        """Return the tokens that requests of other tenants get before one of `tenant`, which has `own_tokens` of
        requests before it: of `waiting_tokens`, by tenant, no more than until each is in a later round.
        """
        ends = self._begins_at(tenant) + own_tokens / self.weight_of(tenant) + QUANTUM_TOKENS
        begins_at, weight_of = self._begins_at, self.weight_of
        return sum(
            [
                min(tokens, max(ends - begins_at(other), 0.0) * weight_of(other))
                for other, tokens in waiting_tokens.items()
            ]
        )

    def _begins_at(self, tenant: str) -> float:
        counters = self._tenants.get(tenant)
        if counters is None:
            return self._reached
        return counters.total if tenant in self._waiting else max(counters.total, self._reached)

    def waits(self, tenant: str, change: int) -> None:
        """Change the number of the tenant's waiting requests by 1 or -1. While any waits, the tenant is active."""
        left = self._waiting.get(tenant, 0) + change
        if left > 0:
            self._waiting[tenant] = left
        else:
            self._waiting.pop(tenant, None)
            self._went.add(tenant)

    def activate(self, tenant: str) -> None:
        """Let a tenant that begins to wait start no lower than the point that service has reached."""
        self._counters(tenant).lift(self._reached)

    def serve(self, tenant: str, tokens: float, weight: float = 1.0, *, contended: bool = False) -> None:
        """Count `tokens` of work as given to `tenant`.

        `contended` means that other requests wait: then only this tenant's point advances, otherwise everyone's.
        """
        counters = self._tenants.pop(tenant, None) or self._counters(tenant)
        self._tenants[tenant] = counters  # moved to the end: the one served longest ago stays in front
        if not contended:
            counters.lift(self._reached)
        self._reached = max(self._reached, counters.total)
        counters.own += tokens / self._configured_weights.get(tenant, weight)
        self._unsent[tenant] = SENDS

    def rows(self) -> dict[str, tuple[float, ...]]:
        """Return this process's recent changes for the others: the point reached, and of each tenant the work done
        here, the total as it is known here, and where it last began anew.
        """
        rows: dict[str, tuple[float, ...]] = {}
        for name in list(self._unsent)[:MAX_ROWS]:
            left = self._unsent.pop(name) - 1
            if left:
                self._unsent[name] = left  # moved to the end, so that others get their turn
            counters = self._tenants.get(name)
            if counters is not None and counters.total <= MOST_TOKENS:
                rows[_TENANT + name] = (counters.own, counters.total, counters.start)
                if name in self._answered:
                    rows[_ANSWERED + name] = (1.0,)
        if rows and self._reached <= MOST_TOKENS:
            rows[VIRTUAL_TIME] = (self._reached,)
        return rows

    def absorb(self, peer: str, rows: Mapping[str, tuple[float, ...]], now_seconds: float) -> None:
        """Add what is new in another process's newest rows; rows of replicas are left out.

        In the first row about a tenant from a process, work that is new cannot be told from work that is known
        already, from others or as a part of the point reached. The larger total is then right but for what was done
        since the last messages; to add the work would count a tenant's whole past twice whenever a process starts.
        """
        if len(reached := rows.get(VIRTUAL_TIME, ())) == 1:
            self._reached = max(self._reached, reached[0])
        told = self._peers[peer] = self._peers.pop(peer, {})  # moved to the end: the quietest peer stays in front
        for name, row in rows.items():
            if name.startswith(_TENANT) and len(row) == 3:
                tenant, (own, total, start) = name[len(_TENANT) :], row
                known = told.get(tenant)
                counters = self._tenants.get(tenant)
                if counters is None:
                    counters = self._counters(tenant)
                    counters.lifted = total
                    self.falls += total < self._reached
                elif known is None or own < known:
                    counters.elsewhere += max(total - counters.total, 0.0)
                else:
                    counters.lift(start)
                    counters.elsewhere += own - known
                if own != known and tenant not in self._seen:
                    self._seen[tenant] = now_seconds, _WEIGHTS_ELSEWHERE.get(tenant, 1.0)
                told[tenant] = own  # a tenant that the peer no longer reports keeps the work reported before
            elif name.startswith(_ANSWERED):
                self._note_answered(name[len(_ANSWERED) :])
        if len(self._peers) > MAX_PEERS:
            del self._peers[next(iter(self._peers))]

    def forget(self, peer: str) -> None:
        """Note that another process is gone; the work that it reported still counts."""
        self._peers.pop(peer, None)

    def _counters(self, tenant: str) -> _Counters:
        counters = self._tenants.get(tenant)
        if counters is None:
            if len(self._tenants) >= MAX_TENANTS:
                oldest = next(iter(self._tenants))
                self.falls += self._tenants.pop(oldest).total > self._reached
                for known in self._peers.values():
                    known.pop(oldest, None)
            counters = self._tenants[tenant] = _Counters()
            counters.lifted = self._reached
        return counters


def _group_of(newcomer: str) -> str:
    """Return the group of a newcomer. Nobody can choose it: the names of tenants are secret hashes."""
    return NEWCOMER_GROUPS[crc32(newcomer.encode()) % len(NEWCOMER_GROUPS)]


class Share(NamedTuple):
    """The tenant for which a request is served, and the work in `tokens` that counts for it."""

    tenant: str = ""
    weight: float = 1.0
    priority: Priority = Priority.NORMAL
    tokens: float = 0.0


class Claimant(Generic[T]):
    """A request in the queue. `tokens` is its uncached work."""

    __slots__ = ("entry", "item", "priority", "tenant", "tokens", "weight")

    def __init__(self, item: T, tenant: str, weight: float, priority: Priority, tokens: float) -> None:
        self.item = item
        self.tenant = tenant
        self.priority = priority
        self.tokens = tokens
        self.weight = weight
        self.entry: Entry[Claimant[T]] | None = None

    @property
    def is_gone(self) -> bool:
        """True if it was served or left."""
        return self.entry is None or self.entry.gone

    @property
    def arrived_seconds(self) -> float:
        """Time of its arrival, on the monotonic clock."""
        return 0.0 if self.entry is None else self.entry.arrived_seconds


Place = tuple[int, float, str]
"""The place of a tenant among those of its priority: its round, the key of its first request, and its name."""


_Next = tuple[int, float, str, Entry[Claimant[T]], Iterator[Entry[Claimant[T]]]]
"""A place, the entry that has it, and those that follow in its line."""


class _Line(Generic[T]):
    """The requests of one tenant with one priority. `place` is its entry in the heap: its place or an earlier one."""

    __slots__ = ("place", "queue", "tenant")

    def __init__(self, tenant: str, queue: ShortestJobQueue[Claimant[T]]) -> None:
        self.tenant = tenant
        self.queue = queue
        self.place: Place = (0, -inf, tenant)


class _Class(Generic[T]):
    """All lines of one priority, in a heap by their places, so that the first is found without a look at all.

    Places rise as tenants are served in any queue of any process, and nobody tells: an entry of the heap may be too
    early, never too late, and is corrected when it comes first. Entries that are not their line's `place` are void.
    """

    __slots__ = ("heap", "lines")

    def __init__(self) -> None:
        self.lines: dict[str, _Line[T]] = {}
        self.heap: list[Place] = []

    def put(self, line: _Line[T], place: Place) -> None:
        """Give a line its entry."""
        line.place = place
        heappush(self.heap, place)
        if len(self.heap) > 2 * len(self.lines) + 16:
            self.heap = [each.place for each in self.lines.values()]
            heapify(self.heap)


class FairQueue(Generic[T]):
    """Requests that wait for the same thing. `make_line` makes the queue of one tenant, which orders its requests."""

    def __init__(self, shares: TenantShares, make_line: Callable[[], ShortestJobQueue[Claimant[T]]]) -> None:
        self._shares = shares
        self._make_line = make_line
        self._classes: dict[Priority, _Class[T]] = {each: _Class() for each in Priority}
        self._owed = dict.fromkeys(Priority, 0.0)
        self._waiting = 0
        self._falls = shares.falls

    def __len__(self) -> int:
        return self._waiting

    def join(self, claimant: Claimant[T], order_seconds: float, now_seconds: float) -> Claimant[T]:
        """Add a request; `order_seconds` is the work by which the tenant's own queue is ordered."""
        found, tenant = self._classes[claimant.priority], claimant.tenant
        line = found.lines.get(tenant)
        is_first = line is None
        if line is None:
            line = found.lines[tenant] = _Line(tenant, self._make_line())
            self._shares.activate(tenant)
        claimant.entry = line.queue.join(claimant, order_seconds, now_seconds)
        place = self._shares.round_of(tenant), line.queue.key(claimant.entry), tenant
        if is_first or place < line.place:
            found.put(line, place)
        self._shares.waits(tenant, 1)
        self._waiting += 1
        return claimant

    def leave(self, claimant: Claimant[T]) -> None:
        """Remove a request, served or not. May be called twice."""
        entry = claimant.entry
        if entry is None or entry.gone:
            return
        found, tenant = self._classes[claimant.priority], claimant.tenant
        line = found.lines[tenant]
        line.queue.leave(entry)
        self._shares.waits(tenant, -1)
        self._waiting -= 1
        if not len(line.queue):
            del found.lines[tenant]
            if not found.lines:
                found.heap.clear()
            return
        # one that came first because it had waited for too long may have had a later place than the rest
        place = self._shares.round_of(tenant), line.queue.least_key, tenant
        if place < line.place:
            found.put(line, place)

    def head(self, now_seconds: float, skipped: Container[str] = ()) -> Claimant[T] | None:
        """Return the request to serve next, of no tenant in `skipped`; None if there is none. Changes nothing."""
        firsts: dict[Priority, Entry[Claimant[T]]] = {}
        if self._falls != self._shares.falls:
            self._rebuild()
        for priority, found in self._classes.items():
            if found.lines:
                entry = self._first_of(found, now_seconds, skipped)
                if entry is not None:
                    firsts[priority] = entry
        return firsts[self._next_of(firsts)].item if firsts else None

    def in_order(self, now_seconds: float, skipped: Container[str] = ()) -> Iterator[Claimant[T]]:
        """Yield the request to serve next, then the one to serve if that one may not be, and so on.

        It leaves out the tenants in `skipped`. Change nothing meanwhile.
        """
        first = self.head(now_seconds, skipped)
        if first is None:
            return
        yield first
        heaps = {
            priority: heap
            for priority, found in self._classes.items()
            if (heap := self._order_of(found, now_seconds, skipped, first))
        }
        while heaps:
            priority = self._next_of({each: heap[0][3] for each, heap in heaps.items()})
            heap = heaps[priority]
            round_number, _, tenant, entry, order = heap[0]
            yield entry.item
            following = next(order, None)
            if following is not None:
                key = self._classes[priority].lines[tenant].queue.key(following)
                heapreplace(heap, (round_number, key, tenant, following, order))
            else:
                heappop(heap)
                if not heap:
                    del heaps[priority]

    def serve(self, claimant: Claimant[T], elsewhere: Sequence[int] = ALONE) -> None:
        """Remove a request that is sent now, and count its work for its tenant and priority.

        `elsewhere` is in how many other processes each priority waits for the same thing.
        """
        self.leave(claimant)
        self._shares.serve(claimant.tenant, claimant.tokens, claimant.weight, contended=self._waiting > 0)
        owed = self._owed
        owed[claimant.priority] = max(owed[claimant.priority] - claimant.tokens, 0.0)
        self._owe(claimant.priority, claimant.tokens, elsewhere)
        for priority in Priority:
            if priority > claimant.priority and not self._classes[priority].lines:
                owed[priority] = 0.0

    def sent_elsewhere(self, tokens: Sequence[float], elsewhere: Sequence[int]) -> None:
        """Note the work of other processes, by priority, of which lower ones that wait here are owed a part."""
        for above, sent in enumerate(tokens):
            if sent:
                self._owe(above, sent, elsewhere)

    def _owe(self, above: int, tokens: float, elsewhere: Sequence[int]) -> None:
        """Owe each lower priority its floor of `tokens`, divided by the processes in which it waits."""
        owed = self._owed
        for priority in Priority:
            if priority > above and self._classes[priority].lines:
                own_part = FLOOR * tokens / (1 + elsewhere[priority])
                owed[priority] = min(owed[priority] + own_part, MAX_OWED_TOKENS)

    def is_owed(self, claimant: Claimant[T]) -> bool:
        """Return True if the priority of a request has saved up its work by its floor."""
        return self._owed[claimant.priority] >= max(min(claimant.tokens, MAX_OWED_TOKENS), 1.0)

    def waiting(self) -> dict[tuple[Priority, str], int]:
        """Count the waiting requests, by priority and tenant."""
        return {
            (priority, tenant): len(line.queue)
            for priority, found in self._classes.items()
            for tenant, line in found.lines.items()
        }

    def priorities(self) -> int:
        """Return the priorities that wait, as bits `1 << priority`."""
        return sum([1 << priority for priority, found in self._classes.items() if found.lines])

    def highest(self, skipped: Container[str] = ()) -> Priority | None:
        """Return the highest priority with which a tenant waits that is not in `skipped`, None if there is none."""
        for priority, found in self._classes.items():
            for tenant in found.lines:
                if tenant not in skipped:
                    return priority
        return None

    def _first_of(self, found: _Class[T], now_seconds: float, skipped: Container[str]) -> Entry[Claimant[T]] | None:
        """Return the first entry of a priority, of no tenant in `skipped`."""
        heap, lines, aside = found.heap, found.lines, list[Place]()
        first: Entry[Claimant[T]] | None = None
        while heap:
            place = heap[0]
            tenant = place[2]
            line = lines.get(tenant)
            if line is None or line.place != place:
                heappop(heap)
                continue
            if tenant in skipped:
                aside.append(heappop(heap))
                continue
            entry = line.queue.peek(now_seconds)
            assert entry is not None  # noqa: S101 - a tenant's line is never empty
            present = self._shares.round_of(tenant), line.queue.key(entry), tenant
            if present == place:
                first = entry
                break
            line.place = present
            heapreplace(heap, present)
        for place in aside:
            heappush(heap, place)
        return first

    def _order_of(
        self, found: _Class[T], now_seconds: float, skipped: Container[str], first: Claimant[T]
    ) -> list[_Next[T]]:
        """Return a heap of what comes next in the lines of one priority, after `first` is gone."""
        heap: list[_Next[T]] = []
        for tenant, line in found.lines.items():
            if tenant not in skipped:
                order = line.queue.in_order(now_seconds)
                entry = next(order)  # a tenant's line is never empty
                following = next(order, None) if entry.item is first else entry
                if following is not None:
                    heap.append((self._shares.round_of(tenant), line.queue.key(following), tenant, following, order))
        heapify(heap)
        return heap

    def _rebuild(self) -> None:
        """Give all lines their places, since some may be earlier than their entries say."""
        self._falls = self._shares.falls
        for found in self._classes.values():
            for tenant, line in found.lines.items():
                line.place = self._shares.round_of(tenant), line.queue.least_key, tenant
            found.heap = [line.place for line in found.lines.values()]
            heapify(found.heap)

    def _next_of(self, firsts: Mapping[Priority, Entry[Claimant[T]]]) -> Priority:
        """Return the priority to serve next, from the first entry of each."""
        chosen = min(firsts)
        for priority in sorted(firsts):
            if priority > chosen and self._owed[priority] >= min(firsts[priority].item.tokens, MAX_OWED_TOKENS):
                return priority
        return chosen

"""All replicas of all pools: events are reported here, and routing reads frozen snapshots.

Every call is synchronous and cheap, and does no I/O. Clocks are passed as `now_seconds` (monotonic).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import Final

from proxy.fleet.breaker import Breaker, BreakerSettings, BreakerState, Cause, Failure
from proxy.fleet.peers import PEER_SILENCE_SECONDS, ROW_LENGTHS, Peers, ShareRow
from proxy.fleet.rate import PoolRates
from proxy.fleet.replica import ReplicaSpec, ReplicaState, ThrottleKey
from proxy.fleet.served_models import NOBODY, Listing, Need, ServedModels
from proxy.fleet.work import Charge
from proxy.records import ReplicaView

DEFAULT_RATE_TOKENS_PER_SECOND: Final = 4_000.0
"""Assumed before any rate is known: between a processor (about 500) and a large accelerator (20,000 and more)."""

LEAST_IN_FLIGHT_SECONDS: Final = 0.05
MOST_IN_FLIGHT_SECONDS: Final = 0.2
"""Bounds of `c` of the cost rule. Below them a decode-heavy load herds on the holders of a hot prefix; above them
hits are given away. `c` starts at the upper bound: decode times are known only after the first responses have
ended, when the herd has formed.
"""

DECODE_SHARE = 1.0 / 64.0
"""`c` as a share of the mean decode time."""

DECODE_MEMORY = 1.0 / 64.0
"""Weight of the newest decode time in the mean."""


class Change(enum.StrEnum):
    """Change of a replica's state, as named in the log line."""

    ADDED = "added"
    DOWN = "down"
    UP = "up"
    THROTTLED = "throttled"
    RATE_LIMITED = "rate limited"  # one key for one model
    RESTARTED = "restarted"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class ReplicaChange:
    """A change of one replica, with its reason in a few words."""

    name: str
    pool: str
    change: Change
    reason: str = ""


def _ignore(_change: ReplicaChange) -> None:
    """Discard a change."""


class Fleet:
    """The replicas of every pool.

    `random` returns floats in [0, 1), for the jitter of back-offs. `changed` is called with every change.
    """

    def __init__(
        self,
        random: Callable[[], float],
        breaker: BreakerSettings | None = None,
        default_rate_tokens_per_second: float = DEFAULT_RATE_TOKENS_PER_SECOND,
        in_flight_seconds: tuple[float, float] = (LEAST_IN_FLIGHT_SECONDS, MOST_IN_FLIGHT_SECONDS),
        changed: Callable[[ReplicaChange], None] = _ignore,
    ) -> None:
        self._random = random
        self._breaker = breaker or BreakerSettings()
        self._listeners = [changed]
        self._default_rate = default_rate_tokens_per_second
        self._least_price, self._most_price = in_flight_seconds
        self._replicas: dict[int, ReplicaState] = {}
        self._free: list[int] = []  # numbers of replicas that were forgotten; the lowest is given out first
        self._ids: dict[str, int] = {}
        self._pools: dict[str, dict[int, ReplicaState]] = {}
        self._rates: dict[str, PoolRates] = {}
        self._shared: dict[int, ReplicaState] = {}  # all that may have work of this process
        self._in_flight_seconds: dict[str, float] = {}
        self._decode_seconds: dict[str, float] = {}
        self._peers = Peers()
        self.models = ServedModels()  # to be asked; it is told by way of the fleet

    def listen(self, listener: Callable[[ReplicaChange], None]) -> None:
        """Call `listener` with every change, too, once the fleet has taken it over."""
        self._listeners.append(listener)

    # -- membership

    def add(self, spec: ReplicaSpec) -> int:
        """Add a replica, or add one again under its old number with a new specification. Return the number.

        What was learned of it is kept; what it serves only while it stays in its pool.
        """
        number = self._ids.get(spec.name)
        if number is None:
            number = heappop(self._free) if self._free else len(self._replicas)
            self._ids[spec.name] = number
            breaker = Breaker(self._breaker, self._random)
            replica = self._replicas[number] = ReplicaState(number, spec, breaker, self._rates_of(spec.pool))
        else:
            replica = self._replicas[number]
            if replica.spec.pool != spec.pool:
                self._leave_pool(replica)
            replica.spec, replica.rates = spec, self._rates_of(spec.pool)
            replica.limit = replica.learned_limit if spec.in_flight_limit is None else spec.in_flight_limit
            replica.rate.configured = spec.prefill_tokens_per_second
            replica.quiet_view = None
            replica.is_draining = False
            self._pools.get(spec.pool, {}).pop(number, None)  # it has the place of its specification
        self._pools.setdefault(spec.pool, {})[number] = replica
        self._rate_changed(replica)
        return number

    def members(self) -> dict[str, int]:
        """Return the numbers of the replicas in force, by name."""
        return {replica.spec.name: replica.id for pool in self._pools.values() for replica in pool.values()}

    def remove(self, number: int) -> None:
        """Stop choosing a replica. Requests under way go on; the number is kept for its name."""
        replica = self._replicas[number]
        self._leave_pool(replica)
        in_flight = replica.work.in_flight
        replica.is_draining = in_flight > 0
        if replica.is_draining:
            self._tell(replica, Change.DRAINING, f"{in_flight} requests under way")
        else:
            self._tell(replica, Change.GONE)

    def forget(self, number: int) -> bool:
        """Drop a removed replica and free its number. Return False, having done nothing, while it is in use."""
        replica = self._replicas.get(number)
        if replica is None:
            return True
        if replica.work.in_flight or number in self._pools.get(replica.spec.pool, {}):
            return False
        for peer in self._peers:
            self._peers.drop_row(peer, number)
        if replica.is_draining:
            self._tell(replica, Change.GONE, "its last request has ended")
        del self._replicas[number], self._ids[replica.spec.name]
        self._shared.pop(number, None)
        heappush(self._free, number)
        return True

    def _leave_pool(self, replica: ReplicaState) -> None:
        self._pools.get(replica.spec.pool, {}).pop(replica.id, None)
        replica.rates.drop(replica.id)
        self.models.forget(replica.spec.pool, replica.id)

    def __contains__(self, number: int) -> bool:
        return number in self._replicas

    def number_of(self, name: str) -> int | None:
        """Return the number of a name, also of a removed one."""
        return self._ids.get(name)

    def name_of(self, number: int) -> str | None:
        """Return the name of a number, None if it was forgotten."""
        replica = self._replicas.get(number)
        return None if replica is None else replica.spec.name

    def limit_of(self, number: int) -> int | None:
        """Return how many requests may be at a replica at once; None if unknown."""
        return self._replicas[number].limit

    def places(
        self, number: int, processes: int, waiting: int, *, own_name: str, informed: bool, is_first: bool = False
    ) -> int | None:
        """Return how many requests of this process may be at a replica now, so that all together keep its limit.

        That is an equal share for each of `processes`, plus what the others leave free if requests wait in this
        process (`waiting`) and in no other. A request that goes before those that wait in the others (`is_first`) may
        have any place that is free. Without news of the others (not `informed`) it is the share alone. None
        means no limit.
        """
        replica = self._replicas[number]
        limit, peers = replica.limit, replica.peers
        if limit is None or processes <= 1:
            return limit
        share, rest = divmod(limit, processes)
        if len(self._peers) >= processes - 1:  # the remainder is given out in the order of names, once all are known
            share += sum(name < own_name for name in self._peers) < rest
        if not informed:
            return max(share, 1)
        free = max(limit - int(peers.in_flight - peers.waiting), 0)
        if is_first:
            return free
        if limit < processes:  # otherwise some would never get a place; the engine's own queue takes the few extra
            free, share = max(free, 1), max(share, 1)
        return free if waiting and not peers.waiting else min(share, free)

    def wait_seconds(self, number: int, uncached_tokens: float, now_seconds: float) -> float:
        """Return the time until the first token of a prompt of `uncached_tokens` sent to a replica now."""
        replica = self._replicas[number]
        pending, late = replica.load(now_seconds)
        return (pending + uncached_tokens) / replica.rate_now + late

    def unanswered(self, number: int) -> int:
        """Return the number of this process's requests that were sent to a replica and have no first token yet."""
        return self._replicas[number].work.unanswered

    def least_unanswered(self, number: int) -> int:
        """Return how many requests of all processes were sent to a replica and have no first token yet, at least.

        Of each other process only the oldest one is known.
        """
        replica = self._replicas[number]
        return replica.work.unanswered + len(replica.peers.heads)

    def sent_seconds(self, number: int, now_seconds: float) -> float:
        """Return the seconds of prefill that were sent to a replica and are not done, without queued requests."""
        replica = self._replicas[number]
        return replica.sent_tokens(now_seconds) / replica.rate_now

    def own_sent_seconds(self, number: int, now_seconds: float) -> float:
        """Return what of `sent_seconds` this process has sent, at least: as if the engine computed it first."""
        work, rate = self._replicas[number].work, self._replicas[number].rate_now
        return (work.sent_tokens - work.progress_tokens(rate, now_seconds)) / rate

    def own_in_flight(self, number: int) -> int:
        """Return the number of this process's requests at a replica."""
        return self._replicas[number].work.in_flight

    def has_work(self, number: int) -> bool:
        """Return whether requests of any process are at a replica."""
        return self._replicas[number].has_work

    def set_limit(self, number: int, in_flight_limit: int | None) -> None:
        """Set the limit of concurrent requests learned from the engine, which counts while none is configured."""
        replica = self._replicas[number]
        replica.learned_limit = in_flight_limit
        if replica.spec.in_flight_limit is None:
            replica.limit = in_flight_limit
            replica.quiet_view = None

    def snapshot(
        self,
        pool: str,
        now_seconds: float,
        key: ThrottleKey | None = None,
        pinned: int | None = None,
        without: frozenset[int] = NOBODY,
    ) -> tuple[ReplicaView, ...]:
        """Return frozen rows of a pool's replicas, or of the `pinned` one alone, with the work of other processes.

        Those in `without` are left out (see `lacking`). A replica that answered 429 to `key` is unavailable to it. If
        none of the rows is available, the least bad replica that may be reached is shown as available: its own answer
        is better than a refusal made without asking it.
        """
        if now_seconds >= self._peers.stale_at_seconds:
            self._drop_silent_peers(now_seconds)
        price = self._in_flight_seconds.get(pool, self._most_price)
        replicas = self._pools.get(pool, {})
        if pinned is not None:
            replicas = {pinned: replicas[pinned]} if pinned in replicas else {}
        elif without:
            replicas = {number: replica for number, replica in replicas.items() if number not in without}
        views = tuple([replica.view(now_seconds, price, key) for replica in replicas.values()])
        for view in views:
            if view.available:
                return views
        return self._with_least_bad(views)

    def is_open(self, number: int, now_seconds: float) -> bool:
        """Return whether requests may be sent to a replica now."""
        return self._replicas[number].breaker.allows(now_seconds)

    def is_used(self, number: int) -> bool:
        """Return whether a replica gets requests as a matter of course: it is not down, full or removed."""
        replica = self._replicas.get(number)
        if replica is None or replica.is_draining or not replica.breaker.is_closed:
            return False
        return number in self._pools.get(replica.spec.pool, {})

    def _with_least_bad(self, views: tuple[ReplicaView, ...]) -> tuple[ReplicaView, ...]:
        tried = [view for view in views if self._replicas[view.id].may_be_tried]
        if not tried:
            return views
        best = min(tried, key=lambda view: (view.retry_after_seconds, view.in_flight, view.id))
        shown = replace(best, available=True, unavailable_because="")
        return tuple([shown if view is best else view for view in views])

    # -- work

    def charge(
        self,
        number: int,
        uncached_tokens: float,
        now_seconds: float,
        *,
        plain: bool = False,
        gated: bool = False,
        queued: bool = False,
        prompt_tokens: float = 0.0,
    ) -> Charge:
        """Claim a replica for a request at the moment of routing.

        `plain` means that no first token will be seen. A request that is `gated` (waits for another's prefill) or
        `queued` (waits for a place) is pending there all the same and starts with `start`; any other starts now.
        """
        replica = self._replicas[number]
        replica.quiet_view = None
        charge = Charge(number, uncached_tokens, plain=plain, gated=gated, prompt_tokens=prompt_tokens)
        replica.work.add(charge)
        self._shared[number] = replica
        if not (gated or queued):
            replica.work.start(charge, replica.rate_now, now_seconds, replica.peers.pending_tokens)
        if not replica.breaker.is_closed and replica.breaker.cause is not Cause.SILENT:
            charge.is_trial = replica.breaker.try_one(now_seconds)
        return charge

    def start(self, charge: Charge, now_seconds: float) -> None:
        """Start a request that waited at the gate or in the queue. May be called twice."""
        replica = self._replicas[charge.replica]
        replica.work.start(charge, replica.rate_now, now_seconds, replica.peers.pending_tokens)

    def first_token(self, charge: Charge, now_seconds: float) -> None:
        """Release the prefill part of a charge. May be called twice."""
        replica = self._replicas[charge.replica]
        replica.work.first_token(charge, now_seconds, replica.peers.released_seconds)
        seconds = charge.prefill_seconds
        if seconds is not None and not replica.rate.seen and replica.rate.guess(charge.uncached_tokens, seconds):
            self._rate_changed(replica)

    def finish(self, charge: Charge, now_seconds: float) -> None:
        """Release a charge. May be called twice, and after `client_left`."""
        self._end_trial(charge)
        self._replicas[charge.replica].work.end(charge, now_seconds)

    def client_left(self, charge: Charge) -> None:
        """Let a charge decay at the replica's rate: its client left, but the engine may still compute."""
        self._end_trial(charge)
        self._replicas[charge.replica].work.leave(charge)

    def _end_trial(self, charge: Charge) -> None:
        if charge.is_trial:
            charge.is_trial = False
            self._replicas[charge.replica].breaker.abandon_trial()

    # -- health

    def responded(self, number: int) -> None:
        """Note a response that is not a failure of the replica."""
        replica = self._replicas[number]
        if not replica.breaker.is_closed:
            replica.breaker.responded()
            self._tell(replica, Change.UP, "a request was answered")
        else:
            replica.breaker.responded()

    def completed(self, number: int) -> None:
        """Note a response of the model that came whole and contained no error."""
        self._replicas[number].breaker.completed()

    def reached(self, number: int) -> None:
        """Note a health check that was answered."""
        replica = self._replicas[number]
        was_closed = replica.breaker.is_closed
        replica.breaker.reached()
        if replica.breaker.is_closed and not was_closed:
            self._tell(replica, Change.UP, "a health check was answered")

    def unreachable(self, number: int, now_seconds: float, reason: str, cause: Cause = Cause.UNREACHABLE) -> bool:
        """Note that a replica cannot be reached, loads its model or is frozen. Return whether that is new."""
        replica = self._replicas[number]
        replica.quiet_view = None
        known = replica.breaker.cause is cause
        opened = replica.breaker.unreachable(now_seconds, cause)
        if opened and not known:
            self._tell(replica, Change.DOWN, reason)
        return opened

    def failed(self, number: int, failure: Failure, now_seconds: float, reason: str) -> bool:
        """Note a failed request as evidence. Return whether the replica is not used from now on."""
        replica = self._replicas[number]
        replica.quiet_view = None
        may_open = not failure.by_status or self._has_other_open(replica)
        return self._told_down(replica, replica.breaker.failed(failure, now_seconds, may_open=may_open), reason)

    def proven(self, number: int, now_seconds: float, reason: str) -> bool:
        """Note that a request failed here and succeeded elsewhere. Return whether the replica is now left unused."""
        replica = self._replicas[number]
        replica.quiet_view = None
        opened = self._has_other_open(replica) and replica.breaker.proven(now_seconds)
        return self._told_down(replica, opened, reason)

    def throttled(self, number: int, now_seconds: float, retry_after_seconds: float | None, reason: str) -> None:
        """Do not use a full replica for as long as it asked, unless it is the last open one of its pool."""
        replica = self._replicas[number]
        if self._has_other_open(replica):
            replica.quiet_view = None
            if replica.breaker.throttled(now_seconds, retry_after_seconds):
                self._tell(replica, Change.THROTTLED, reason)

    def rate_limited(
        self, number: int, key: ThrottleKey, now_seconds: float, retry_after_seconds: float | None
    ) -> None:
        """Do not use a replica for one key and model, to which it answered 429."""
        replica = self._replicas[number]
        pause_seconds = replica.breaker.pause_seconds(retry_after_seconds)
        replica.quiet_view = None
        if pause_seconds > 0 and replica.throttles.set(key, now_seconds + pause_seconds, now_seconds):
            self._tell(replica, Change.RATE_LIMITED, f"429 for one key and model, for {pause_seconds:.1f} s")

    def abandon_trial(self, number: int) -> None:
        """End a probe that showed nothing."""
        self._replicas[number].breaker.abandon_trial()

    def is_probed(self, number: int) -> bool:
        """Return whether a health check, and no request, brings the replica back."""
        replica = self._replicas.get(number)
        return replica is not None and replica.is_probed

    def may_be_tried(self, number: int) -> bool:
        """Return False while it is known that no request can reach a replica's model, also between two probes."""
        return self._replicas[number].may_be_tried

    def breaker_state(self, number: int, now_seconds: float) -> BreakerState:
        """Return the state of a replica's breaker."""
        return self._replicas[number].breaker.state(now_seconds)

    def cause(self, number: int) -> Cause | None:
        """Return why a replica's breaker is open, None if it is closed."""
        return self._replicas[number].breaker.cause

    def probes(self, now_seconds: float) -> tuple[int, ...]:
        """Claim a trial of each replica that a probe can bring back. Report `reached` or `unreachable` for each."""
        return tuple(
            replica.id
            for pool in self._pools.values()
            for replica in pool.values()
            if replica.is_probed and replica.breaker.try_one(now_seconds)
        )

    def _has_other_open(self, replica: ReplicaState) -> bool:
        pool = self._pools.get(replica.spec.pool, {})
        return any(other is not replica and other.breaker.is_closed for other in pool.values())

    def _told_down(self, replica: ReplicaState, opened: bool, reason: str) -> bool:
        if opened:
            self._tell(replica, Change.DOWN, reason)
        return opened

    def _tell(self, replica: ReplicaState, change: Change, reason: str = "") -> None:
        event = ReplicaChange(replica.spec.name, replica.spec.pool, change, reason)
        for listener in self._listeners:
            listener(event)

    # -- what each replica serves, see `proxy.fleet.served_models`

    def listed(self, number: int, listing: Listing | None) -> None:
        """Take over a replica's list of models; None if it has none that can be read."""
        pool = self._replicas[number].spec.pool
        if number in self._pools.get(pool, {}):
            self.models.listed(pool, number, listing)

    def refused(self, number: int, need: Need, now_seconds: float) -> None:
        """Note that a replica refused a request for what it lacks."""
        pool = self._replicas[number].spec.pool
        if number in self._pools.get(pool, {}):
            self.models.refused(pool, number, need, now_seconds)

    def lacking(self, pool: str, needs: Iterable[Need], now_seconds: float) -> frozenset[int]:
        """Return the replicas of a pool that are known to lack what a request needs, unless all of them do."""
        return self.models.lacking(pool, needs, self._pools.get(pool, {}), now_seconds)

    # -- learned rates

    def observe_prefill(self, charge: Charge, uncached_tokens: float, prefill_seconds: float | None = None) -> None:
        """Learn from one response: tokens that the engine reports as computed, and its own time for them, if any."""
        seconds = charge.prefill_seconds if prefill_seconds is None else prefill_seconds
        replica = self._replicas[charge.replica]
        if seconds is not None and replica.rate.observe(uncached_tokens, seconds):
            self._rate_changed(replica)

    def observe_decode(self, number: int, decode_seconds: float) -> None:
        """Learn the time from one response's first token to its end."""
        pool = self._replicas[number].spec.pool
        mean = self._decode_seconds.get(pool, decode_seconds)
        mean += DECODE_MEMORY * (decode_seconds - mean)
        self._decode_seconds[pool] = mean
        self._in_flight_seconds[pool] = min(max(mean * DECODE_SHARE, self._least_price), self._most_price)

    def restarted(self, number: int) -> None:
        """Forget the learned rate: another process answers under this name."""
        replica = self._replicas[number]
        self._tell(replica, Change.RESTARTED, "its start time is newer")
        replica.rate.forget()
        self._rate_changed(replica)

    def rate_of(self, number: int) -> float:
        """Return a replica's prefill rate in uncached tokens per second: learned, configured, or that of its pool."""
        return self._replicas[number].rate_now

    def measured_rate(self, number: int) -> float | None:
        """Return the uncached tokens per second that the replica has shown or was configured with, else None."""
        return self._replicas[number].rate.measured

    def _rates_of(self, pool: str) -> PoolRates:
        rates = self._rates.get(pool)
        if rates is None:
            rates = self._rates[pool] = PoolRates(self._default_rate)
        return rates

    def _rate_changed(self, replica: ReplicaState) -> None:
        """Take over what its responses have shown; one that is removed no longer counts for its pool."""
        replica.own_rate = replica.rate.own
        if replica.id in self._pools.get(replica.spec.pool, {}):
            replica.rates.put(replica.id, replica.rate)

    # -- the other processes

    def share(self, now_seconds: float) -> dict[str, ShareRow]:
        """Return this process's own work by replica name, busy replicas only, for the others."""
        rows = {}
        for replica in list(self._shared.values()):
            work = replica.work
            work.settle(now_seconds)
            head, released = work.head, now_seconds - work.released_seconds
            if head is None and not (work.in_flight or work.pending_tokens) and released >= PEER_SILENCE_SECONDS:
                del self._shared[replica.id]
                continue
            if replica.id not in self._pools.get(replica.spec.pool, {}):
                continue
            is_late = head is not None and not head.plain
            rows[replica.spec.name] = ShareRow(
                pending_tokens=round(work.pending_tokens),
                in_flight=work.in_flight,
                head_tokens=0 if head is None else max(round(head.uncached_tokens), 1),
                head_seconds=0.0 if head is None else now_seconds - head.sent_seconds,
                overdue_seconds=max(now_seconds - head.due_seconds, 0.0) if head is not None and is_late else 0.0,
                released_seconds=released,
                waiting=work.waiting,
                running_tokens=round(work.running_tokens),
                sent_tokens=round(work.sent_tokens),
            )
        return rows

    def absorb(self, peer: str, rows: Mapping[str, tuple[float, ...]], now_seconds: float) -> None:
        """Replace the rows of another process by its newest; names unknown here are skipped."""
        self.forget_peer(peer)
        kept = {
            number: ShareRow(*row)
            for name, row in rows.items()
            if (number := self._ids.get(name)) is not None and len(row) in ROW_LENGTHS
        }
        for number, row in kept.items():
            replica = self._replicas[number]
            replica.peers.add(peer, row, now_seconds)
            replica.quiet_view = None
        self._peers.put(peer, kept, now_seconds)

    def forget_peer(self, peer: str) -> None:
        """Drop the rows of a process that is gone."""
        for number, row in self._peers.pop(peer).items():
            if (replica := self._replicas.get(number)) is not None:
                replica.peers.remove(peer, row)

    def lost_peers(self, now_seconds: float) -> tuple[str, ...]:
        """Return the last processes that fell silent while they had work: they are dead or disconnected."""
        if now_seconds >= self._peers.stale_at_seconds:
            self._drop_silent_peers(now_seconds)
        return tuple(self._peers.lost)

    def _drop_silent_peers(self, now_seconds: float) -> None:
        for peer in self._peers.silent(now_seconds):
            self._peers.lose(peer)
            self.forget_peer(peer)
        self._peers.refresh()

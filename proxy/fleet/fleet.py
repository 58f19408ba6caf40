"""All replicas of all pools: the one object that the phases tell what happens, and ask for a frozen snapshot.

Every change is synchronous and cheap; nobody here opens a socket. Clocks are passed as `now_seconds` (monotonic). It
must not know prompts, prefixes or why a replica was chosen.

In-flight work of other proxies and workers comes in whole rows (`absorb`), never as differences, which drift for ever
once one is lost; rows carry ages and not stamps, so that each reader ages them by its own clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Final, NamedTuple

from proxy.fleet.breaker import Backoff, Breaker, BreakerState
from proxy.fleet.rate import PrefillRate, pooled
from proxy.fleet.work import Charge, Work
from proxy.model import ReplicaView

DEFAULT_RATE_TOKENS_PER_SECOND: Final = 4_000.0
"""Until anything is known of anybody: between a processor (some 500) and a large accelerator (20,000 and more)."""

LEAST_IN_FLIGHT_SECONDS: Final = 0.05
MOST_IN_FLIGHT_SECONDS: Final = 0.2
"""Bounds of `c`. Below, a decode-heavy load herds on the holders of a hot prefix; above, hits are given away. It
starts at the upper one: long decodes are known only once the first have ended, when the herd has formed."""

DECODE_SHARE = 1.0 / 64.0
"""`c` as a share of the mean decode time."""

DECODE_MEMORY = 1.0 / 64.0
"""Weight of the newest decode time in the mean."""

PEER_SILENCE_SECONDS: Final = 1.0
"""In-flight work of a proxy that has said nothing for so long died with it."""


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """A replica as configured. `name` is unique over all pools and the same in every proxy."""

    name: str
    pool: str
    prefill_tokens_per_second: float | None = None
    in_flight_limit: int | None = None


class ShareRow(NamedTuple):
    """One replica's work as one process has it, for the others. Ages are seconds before it was written.

    `pending_tokens` is gross: the running head's progress is not taken off, so that readers can take it off once for
    all writers. The head is this process's oldest prefill: its tokens, since when it was sent, and how far it is past
    its predicted first token (0 where it is not). `released_seconds` is since when the last prefill ended there. Of
    those in flight `waiting` are in that process's queue and not sent yet. `running_tokens` are the prompts of all in
    flight; a process of an older release leaves it out.
    """

    pending_tokens: float
    in_flight: float
    head_tokens: float
    head_seconds: float
    overdue_seconds: float
    released_seconds: float
    waiting: float = 0.0
    running_tokens: float = 0.0


_ROW_LENGTHS: Final = (len(ShareRow._fields) - 1, len(ShareRow._fields))


class _Peers:
    """What all other processes have under way on one replica. Times by this process's clock."""

    __slots__ = ("heads", "in_flight", "pending_tokens", "released_seconds", "running_tokens", "waiting")

    def __init__(self) -> None:
        self.pending_tokens = 0.0
        self.in_flight = 0.0
        self.waiting = 0.0
        self.running_tokens = 0.0
        self.released_seconds = 0.0
        self.heads: dict[str, tuple[float, float, float]] = {}  # by peer: sent, tokens, due or later

    def add(self, peer: str, row: ShareRow, now_seconds: float) -> None:
        self.pending_tokens += row.pending_tokens
        self.in_flight += row.in_flight
        self.waiting += row.waiting
        self.running_tokens += row.running_tokens
        self.released_seconds = max(self.released_seconds, now_seconds - row.released_seconds)
        if row.head_tokens:
            due = now_seconds - row.overdue_seconds if row.overdue_seconds > 0 else inf
            self.heads[peer] = (now_seconds - row.head_seconds, row.head_tokens, due)

    def remove(self, peer: str, row: ShareRow) -> None:
        self.pending_tokens -= row.pending_tokens
        self.in_flight -= row.in_flight
        self.waiting -= row.waiting
        self.running_tokens -= row.running_tokens
        self.heads.pop(peer, None)


class _Replica:
    """One replica's state; the fleet's own."""

    __slots__ = ("breaker", "draining", "id", "limit", "peers", "quiet_view", "rate", "rate_now", "spec", "work")

    def __init__(self, number: int, spec: ReplicaSpec, breaker: Breaker) -> None:
        self.id = number
        self.spec = spec
        self.breaker = breaker
        self.work = Work()
        self.peers = _Peers()
        self.rate = PrefillRate(spec.prefill_tokens_per_second)
        self.rate_now = DEFAULT_RATE_TOKENS_PER_SECOND
        self.limit = spec.in_flight_limit
        self.draining = False
        self.quiet_view: ReplicaView | None = None

    def load(self, now_seconds: float) -> tuple[float, float]:
        """Pending tokens net of the running head's progress, and lateness in seconds, of all processes together."""
        work, peers = self.work, self.peers
        work.settle(now_seconds)
        head, late = work.head, 0.0
        sent, head_tokens = inf, 0.0
        if head is not None:
            sent, head_tokens = head.sent_seconds, head.uncached_tokens
            if not head.plain and now_seconds > head.due_seconds:
                late = now_seconds - head.due_seconds
        for peer_sent, tokens, due in peers.heads.values():
            late = max(late, now_seconds - due)
            if peer_sent < sent:
                sent, head_tokens = peer_sent, tokens
        total = work.pending_tokens + peers.pending_tokens
        if not head_tokens:
            return total, late
        since = max(sent, work.released_seconds, peers.released_seconds)
        done = min(max(now_seconds - since, 0.0) * self.rate_now, head_tokens)
        return max(total - done, 0.0), late

    def view(self, now_seconds: float, in_flight_seconds: float) -> ReplicaView:
        """A frozen row; the same object again while nothing happens here."""
        if self.quiet_view is not None:
            return self.quiet_view
        pending, late = self.load(now_seconds)
        in_flight = self.work.in_flight + int(self.peers.in_flight)
        closed = self.breaker.is_closed
        allowed = closed or self.breaker.allows(now_seconds)
        view = ReplicaView(
            self.id,
            self.spec.name,
            allowed and not self.draining,
            self.rate_now,
            pending,
            in_flight,
            self.limit,
            late,
            in_flight_seconds,
            self.work.waiting + int(self.peers.waiting),
            self.draining and allowed,
            0.0 if allowed else self.breaker.wait_seconds(now_seconds),
            self.work.running_tokens + self.peers.running_tokens,
        )
        if closed and not in_flight and not pending and self.work.head is None and not self.peers.pending_tokens:
            self.quiet_view = view
        return view


class Fleet:
    """The replicas of every pool. `random` gives floats in [0, 1), for the jitter of back-offs."""

    def __init__(
        self,
        random: Callable[[], float],
        backoff: Backoff | None = None,
        default_rate_tokens_per_second: float = DEFAULT_RATE_TOKENS_PER_SECOND,
        in_flight_seconds: tuple[float, float] = (LEAST_IN_FLIGHT_SECONDS, MOST_IN_FLIGHT_SECONDS),
    ) -> None:
        self._random = random
        self._backoff = backoff or Backoff()
        self._default_rate = default_rate_tokens_per_second
        self._least_price, self._most_price = in_flight_seconds
        self._replicas: list[_Replica] = []
        self._ids: dict[str, int] = {}
        self._pools: dict[str, list[_Replica]] = {}
        self._in_flight_seconds: dict[str, float] = {}
        self._decode_seconds: dict[str, float] = {}
        self._shares: dict[str, tuple[float, dict[int, ShareRow]]] = {}
        self._stale_at_seconds = inf

    # -- who there is

    def add(self, spec: ReplicaSpec) -> int:
        """Take a replica in, or take it up again under its old number with a new specification."""
        number = self._ids.get(spec.name)
        if number is None:
            number = self._ids[spec.name] = len(self._replicas)
            self._replicas.append(_Replica(number, spec, Breaker(self._backoff, self._random)))
        else:
            self.remove(number)
            replica = self._replicas[number]
            replica.spec, replica.limit, replica.draining = spec, spec.in_flight_limit, False
            replica.rate.configured = spec.prefill_tokens_per_second
            replica.quiet_view = None
        self._pools.setdefault(spec.pool, []).append(self._replicas[number])
        self._rates_changed(spec.pool)
        return number

    def members(self) -> dict[str, int]:
        """The replicas in force, by name."""
        return {replica.spec.name: replica.id for pool in self._pools.values() for replica in pool}

    def remove(self, number: int) -> None:
        """No longer to be chosen; what is under way there ends as it ends. Its number is kept for its name."""
        replica = self._replicas[number]
        pool = self._pools.get(replica.spec.pool, [])
        if replica in pool:
            pool.remove(replica)

    def drain(self, number: int, *, draining: bool = True) -> None:
        """Give it no new prompt but what is pinned to it; or take that back."""
        self._replicas[number].draining = draining
        self._replicas[number].quiet_view = None

    def number_of(self, name: str) -> int | None:
        """The number of a name, also of one that was removed."""
        return self._ids.get(name)

    def name_of(self, number: int) -> str:
        return self._replicas[number].spec.name

    def limit_of(self, number: int) -> int | None:
        """How many requests may be at a replica at once; None where nobody said."""
        return self._replicas[number].limit

    def places(self, number: int, processes: int, waiting: int, *, own_name: str, informed: bool) -> int | None:
        """How many requests of this process may be at a replica now, so that all together keep its limit.

        An equal share for each of `processes`; where requests wait here (`waiting`) and in no other process, also
        what the others leave free. With no news of the others (not `informed`) the share alone. None: no limit.
        """
        replica = self._replicas[number]
        limit, peers = replica.limit, replica.peers
        if limit is None or processes <= 1:
            return limit
        share, rest = divmod(limit, processes)
        if len(self._shares) >= processes - 1:  # the rest goes by the order of names, once all names are known
            share += sum(name < own_name for name in self._shares) < rest
        if not informed:
            return max(share, 1)
        free = max(limit - int(peers.in_flight - peers.waiting), 0)
        if limit < processes:  # else some would never have a place; the engine's own queue takes the few too many
            free, share = max(free, 1), max(share, 1)
        return free if waiting and not peers.waiting else min(share, free)

    def wait_seconds(self, number: int, uncached_tokens: float, now_seconds: float) -> float:
        """Until the first token of a prompt of so many uncached tokens that is sent to a replica now."""
        replica = self._replicas[number]
        pending, late = replica.load(now_seconds)
        return (pending + uncached_tokens) / replica.rate_now + late

    def own_in_flight(self, number: int) -> int:
        """Requests of this process at a replica."""
        return self._replicas[number].work.in_flight

    def set_limit(self, number: int, in_flight_limit: int | None) -> None:
        """A limit of concurrent requests learned from the engine; a configured one stands."""
        replica = self._replicas[number]
        if replica.spec.in_flight_limit is None:
            replica.limit = in_flight_limit
            replica.quiet_view = None

    def snapshot(self, pool: str, now_seconds: float) -> tuple[ReplicaView, ...]:
        """Frozen rows of a pool's replicas, the other processes' work included."""
        if now_seconds >= self._stale_at_seconds:
            self._drop_silent_peers(now_seconds)
        price = self._in_flight_seconds.get(pool, self._most_price)
        return tuple([replica.view(now_seconds, price) for replica in self._pools.get(pool, ())])

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

        `plain` says that no first token will be seen. What is `gated` (waits for another's prefill) or `queued` (for
        a place) is pending there all the same, and starts when `start` is told; all else starts now.
        """
        replica = self._replicas[number]
        replica.quiet_view = None
        charge = Charge(number, uncached_tokens, plain=plain, gated=gated, prompt_tokens=prompt_tokens)
        replica.work.add(charge)
        if not (gated or queued):
            replica.work.start(charge, replica.rate_now, now_seconds, replica.peers.pending_tokens)
        if not replica.breaker.is_closed:
            charge.is_trial = replica.breaker.try_one(now_seconds)
        return charge

    def start(self, charge: Charge, now_seconds: float) -> None:
        """What waited at the gate or in the queue is sent now. May come twice."""
        replica = self._replicas[charge.replica]
        replica.work.start(charge, replica.rate_now, now_seconds, replica.peers.pending_tokens)

    def first_token(self, charge: Charge, now_seconds: float) -> None:
        """The prefill is done: release its part. May come twice."""
        replica = self._replicas[charge.replica]
        replica.work.first_token(charge, now_seconds, replica.peers.released_seconds)
        seconds = charge.prefill_seconds
        if seconds is not None and not replica.rate.seen and replica.rate.guess(charge.uncached_tokens, seconds):
            self._rates_changed(replica.spec.pool)

    def finish(self, charge: Charge, now_seconds: float) -> None:
        """The request is over: release all of it. May come twice, and after `client_left`."""
        self._end_trial(charge)
        self._replicas[charge.replica].work.end(charge, now_seconds)

    def client_left(self, charge: Charge) -> None:
        """Nobody waits for it any more, but the engine may still compute: what is pending decays at its rate."""
        self._end_trial(charge)
        self._replicas[charge.replica].work.leave(charge)

    def _end_trial(self, charge: Charge) -> None:
        if charge.is_trial:
            charge.is_trial = False
            self._replicas[charge.replica].breaker.abandon_trial()

    # -- health

    def answered(self, number: int) -> None:
        """It answered, with any status that is not a failure of its own."""
        breaker = self._replicas[number].breaker
        breaker.succeeded()

    def failed(self, number: int, now_seconds: float, *, unreachable: bool) -> bool:
        """It could not be reached, or failed; True where it is left alone from now on."""
        replica = self._replicas[number]
        replica.quiet_view = None
        return replica.breaker.failed(now_seconds, unreachable=unreachable)

    def throttled(self, number: int, now_seconds: float, retry_after_seconds: float | None) -> None:
        """It answered 429, 503 or 529: leave it alone for as long as it says."""
        replica = self._replicas[number]
        replica.quiet_view = None
        replica.breaker.throttled(now_seconds, retry_after_seconds)

    def breaker_state(self, number: int, now_seconds: float) -> BreakerState:
        return self._replicas[number].breaker.state(now_seconds)

    def probes(self, now_seconds: float) -> tuple[int, ...]:
        """Replicas whose back-off is over, each claimed for a probe: say `answered` or `failed` of every one."""
        return tuple(
            replica.id
            for pool in self._pools.values()
            for replica in pool
            if not replica.breaker.is_closed and replica.breaker.try_one(now_seconds)
        )

    # -- what is learned

    def observe_prefill(self, charge: Charge, uncached_tokens: float, prefill_seconds: float | None = None) -> None:
        """One answer: tokens that the engine says it computed, and the seconds, where it says that too."""
        seconds = charge.prefill_seconds if prefill_seconds is None else prefill_seconds
        replica = self._replicas[charge.replica]
        if seconds is not None and replica.rate.observe(uncached_tokens, seconds):
            self._rates_changed(replica.spec.pool)

    def observe_decode(self, number: int, decode_seconds: float) -> None:
        """The time from one answer's first token to its end."""
        pool = self._replicas[number].spec.pool
        mean = self._decode_seconds.get(pool, decode_seconds)
        mean += DECODE_MEMORY * (decode_seconds - mean)
        self._decode_seconds[pool] = mean
        self._in_flight_seconds[pool] = min(max(mean * DECODE_SHARE, self._least_price), self._most_price)

    def restarted(self, number: int) -> None:
        """Another process answers under this name: what was learned of its speed is void."""
        replica = self._replicas[number]
        replica.rate.forget()
        self._rates_changed(replica.spec.pool)

    def rate_of(self, number: int) -> float:
        """Uncached tokens per second: learned, configured, or the pool's median."""
        return self._replicas[number].rate_now

    def measured_rate(self, number: int) -> float | None:
        """Uncached tokens per second that the replica has really shown (or was configured with), else None."""
        return self._replicas[number].rate.measured

    def _rates_changed(self, pool: str) -> None:
        replicas = self._pools.get(pool, ())
        known = [own for replica in replicas if (own := replica.rate.own) is not None]
        fallback = median(known) if known else pooled([each.rate for each in replicas], self._default_rate)
        for replica in replicas:
            own = replica.rate.own
            rate = fallback if own is None else own
            if rate != replica.rate_now:
                replica.rate_now = rate
                replica.quiet_view = None

    # -- the other processes

    def share(self, now_seconds: float) -> dict[str, ShareRow]:
        """This process's own work by replica name, busy replicas only, for the others."""
        rows = {}
        for pool in self._pools.values():
            for replica in pool:
                work = replica.work
                work.settle(now_seconds)
                head, released = work.head, now_seconds - work.released_seconds
                if head is not None:
                    rows[replica.spec.name] = ShareRow(
                        round(work.pending_tokens),
                        work.in_flight,
                        max(round(head.uncached_tokens), 1),
                        now_seconds - head.sent_seconds,
                        0.0 if head.plain else max(now_seconds - head.due_seconds, 0.0),
                        released,
                        work.waiting,
                        round(work.running_tokens),
                    )
                elif work.in_flight or work.pending_tokens or released < PEER_SILENCE_SECONDS:
                    rows[replica.spec.name] = ShareRow(
                        round(work.pending_tokens),
                        work.in_flight,
                        0,
                        0.0,
                        0.0,
                        released,
                        work.waiting,
                        round(work.running_tokens),
                    )
        return rows

    def absorb(self, peer: str, rows: Mapping[str, tuple[float, ...]], now_seconds: float) -> None:
        """Replace what is known of another process by its newest rows; names unknown here are left out."""
        self.forget(peer)
        kept = {
            number: ShareRow(*row)
            for name, row in rows.items()
            if (number := self._ids.get(name)) is not None and len(row) in _ROW_LENGTHS
        }
        for number, row in kept.items():
            replica = self._replicas[number]
            replica.peers.add(peer, row, now_seconds)
            replica.quiet_view = None
        self._shares[peer] = (now_seconds, kept)
        self._stale_at_seconds = min(self._stale_at_seconds, now_seconds + PEER_SILENCE_SECONDS)

    def forget(self, peer: str) -> None:
        """Another process is gone, and its work with it."""
        _, rows = self._shares.pop(peer, (0.0, {}))
        for number, row in rows.items():
            self._replicas[number].peers.remove(peer, row)

    def _drop_silent_peers(self, now_seconds: float) -> None:
        oldest = now_seconds - PEER_SILENCE_SECONDS
        for peer in [peer for peer, (heard, _) in self._shares.items() if heard <= oldest]:
            self.forget(peer)
        self._stale_at_seconds = (
            min(heard for heard, _ in self._shares.values()) + PEER_SILENCE_SECONDS if self._shares else inf
        )

"""Hold cold turns in a worker until `cold_admission` lets them go.

One `ColdGate` per worker, with a queue per pool. It looks for turns that may go whenever work ends at a replica, and
twice a second while turns wait. A turn that goes gets a pass to one replica, which no other cold turn gets until its
first token. If there are other workers, the replica is claimed through `Claims` first; while claims fail, every
worker decides alone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from math import inf
from typing import Any, Final

from cache import PART_TAKEN, CacheError
from proxy.clock import Clock
from proxy.errors import CairnError, DeadlineUnreachable, TooManySessions, TurnedAway
from proxy.records import ReplicaView
from proxy.routing.cold_admission import (
    BACKLOG_SECONDS,
    LONG_SECONDS,
    PATIENCE_SECONDS,
    ColdQueue,
    ColdTurn,
    ReplicaRoom,
    TurnKind,
    Waiting,
    is_long,
    is_quiet,
    short_tokens,
)
from proxy.routing.cold_pressure import CROWDED_SECONDS, RESTING_SECONDS, ColdPressure, ServedPrompts
from proxy.routing.cold_turn import Claims, Fleet, GateLimits, Turn, Verdict
from proxy.routing.cold_wait import LineRates, Tickets, pool_of, refusal_of
from proxy.routing.fair_shares import Priority, Share, TenantShares
from proxy.routing.waiting_rate import WaitingRate
from proxy.routing.warm_wait import WarmQueues

LOOK_SECONDS: Final = 0.5
"""Interval of looking for a turn that may go while turns wait, in addition to every end of work."""

MOST_LOOKS: Final = 16
"""Times that a wait is predicted again because it is long enough for more sessions to come back; then all count."""

CLAIM_PATIENCE: Final = 3.0
CLAIM_PATIENCE_SECONDS: Final = 30.0
"""A claim expires after `CLAIM_PATIENCE` times the predicted prefill plus this time."""

ANY_NUMBER: Final = 1_000_000
"""Replicas that a tenant alone may have: more than there are."""

UNKNOWN_SECONDS: Final = 10.0
"""Time for which turns wait on while the capacity of a replica is not known."""


class Pass:
    """A cold turn's right to one replica. `is_over`, once set, returns whether its first token came or it ended."""

    __slots__ = ("_gate", "ends_seconds", "is_over", "is_shared", "pool", "replica", "replica_name", "tenant")

    def __init__(self, gate: ColdGate, pool: str, tenant: str, replica: ReplicaView, ends_seconds: float) -> None:
        self._gate = gate
        self.pool = pool
        self.tenant = tenant
        self.replica = replica.id
        self.replica_name = replica.name
        self.ends_seconds = ends_seconds
        self.is_shared = False  # it was claimed for all workers
        self.is_over: Callable[[], bool] | None = None

    def release(self) -> None:
        """Give the replica to the next turn. May be called twice."""
        self._gate.release(self)


class _Waiter:
    """A turn in the queue, the future of its pass, and the replicas that cannot serve it."""

    __slots__ = ("future", "turn", "unfit")

    def __init__(self, turn: Turn, future: asyncio.Future[Pass], unfit: frozenset[int]) -> None:
        self.turn = turn
        self.future = future
        self.unfit = unfit


class _Pool:
    """State of one pool."""

    def __init__(self, name: str, shares: TenantShares, memory_seconds: float) -> None:
        self.name = name
        self.queue: ColdQueue[_Waiter] = ColdQueue(shares)
        self.pressure = ColdPressure(memory_seconds)
        self.served = ServedPrompts()
        self.rate = WaitingRate()
        self.line_rates = LineRates()
        self.tickets = Tickets(name)
        self.waiting: dict[_Waiter, float] = {}  # each with the time of its arrival
        self.passes: dict[int, Pass] = {}
        self.asking = False
        self.is_named = False  # the other workers know of a turn that waits here, and let it go first
        self.alarm: asyncio.TimerHandle | None = None
        self.unknown_since: dict[int, float] = {}  # the replicas whose capacity is not known


class ColdGate:
    """The gate of one worker; see the module's description.

    Args:
        fleet: gives the replicas of a pool.
        capacity_tokens: returns the tokens that a replica's cache can hold, None if unknown: then nothing waits for
            room.
        shares: the tenants' shares.
        claims: claims on replicas that all workers respect.
        others: returns the number of other workers.
        start: starts a background task.
        clock: monotonic time.
        report: sends `rows` to the other workers soon.
    """

    def __init__(
        self,
        fleet: Fleet,
        capacity_tokens: Callable[[int], float | None],
        shares: TenantShares,
        claims: Claims,
        others: Callable[[], int],
        start: Callable[[Coroutine[Any, Any, None], str], object],
        clock: Clock,
        report: Callable[[], object],
    ) -> None:
        self._fleet = fleet
        self._capacity_tokens = capacity_tokens
        self._shares = shares
        self._claims = claims
        self._others = others
        self._start = start
        self._clock = clock
        self._report = report
        self._pools: dict[str, _Pool] = {}
        self._in_use: dict[str, _Pool] = {}  # all in which turns wait or have passes; a few may no longer
        self._with_news: dict[str, _Pool] = {}  # all whose tickets the other workers are still to be told of
        self.limits = GateLimits()
        self.warm = WarmQueues(fleet, shares, lambda: self.limits, clock)
        self._warm_waiting: dict[tuple[Priority, str], int] = {}
        self.waiting_bytes = 0
        self.admitted = 0
        self.refused = 0

    # -- knowledge

    def forget(self, name: str) -> None:
        """Drop what is kept of a pool whose replicas are all gone for good, unless turns still wait there."""
        found = self._pools.get(name)
        if found is not None and not found.waiting and not found.passes:
            for pools in (self._pools, self._in_use, self._with_news):
                pools.pop(name, None)

    def pool(self, name: str) -> _Pool:
        found = self._pools.get(name)
        if found is None:
            found = self._pools[name] = _Pool(name, self._shares, self.limits.memory_seconds)
        return found

    def served(self, pool: str) -> ServedPrompts:
        """Return the prompts that were sent to a pool."""
        return self.pool(pool).served

    def placed_elsewhere(self, pool: str, hashes: Sequence[int], prompt_tokens: float) -> None:
        """Note that another worker sent a prompt to a pool."""
        served = self.pool(pool).served
        served.note(hashes, served.depth(hashes), prompt_tokens, 0.0, self._clock.monotonic())

    def ended(self, pool: str, prompt_end: int, replica: int) -> None:
        """Note that some worker's answer from a replica ended, to the prompt with this last hash."""
        resting = RESTING_SECONDS * self.limits.pace
        self.pool(pool).served.ended(prompt_end, replica, self._clock.monotonic(), resting)

    def rows(self) -> dict[str, tuple[float, ...]]:
        """Return this worker's recent refusals for the others: `Tickets.rows` of all pools."""
        now = self._clock.monotonic()
        rows: dict[str, tuple[float, ...]] = {}
        for pool in tuple(self._with_news.values()):
            news = pool.tickets.rows(now)
            rows.update(news)
            if not news:
                del self._with_news[pool.name]
        return rows

    def absorb(self, rows: Mapping[str, tuple[float, ...]]) -> None:
        """Apply the refusals of another worker."""
        now = self._clock.monotonic()
        by_pool: dict[str, dict[str, tuple[float, ...]]] = {}
        for name, row in rows.items():  # messages are frequent, and most rows are of replicas
            pool = pool_of(name)
            if pool is not None:
                by_pool.setdefault(pool, {})[name] = row
        for pool, own_rows in by_pool.items():
            if (found := self._pools.get(pool)) is not None:
                found.tickets.absorb(own_rows, now)

    def observe(self, pool: str, computed_tokens: float, repeated_tokens: float) -> None:
        """Note a response: the tokens that were computed for it, and how many of them had been computed before."""
        self.pool(pool).pressure.observe(computed_tokens, repeated_tokens, self._clock.monotonic())

    def waiting(self) -> dict[Priority, int]:
        """Count the turns that wait, by priority."""
        counts = dict.fromkeys(Priority, 0)
        for pool in self._pools.values():
            for (priority, _), count in pool.queue.waiting().items():
                counts[priority] += count
        return counts

    def waiting_by_client(self) -> dict[tuple[Priority, str], int]:
        """Count the turns that wait, by priority and configured name of their client; others are counted under ""."""
        counts: dict[tuple[Priority, str], int] = {}
        for pool in self._pools.values():
            for waiter in pool.waiting:
                key = waiter.turn.priority, waiter.turn.client
                counts[key] = counts.get(key, 0) + 1
        return counts

    def warm_waiting_by_client(self) -> Mapping[tuple[Priority, str], int]:
        """Count the turns that wait for the replica that holds them, as `waiting_by_client` does."""
        return self._warm_waiting

    @property
    def is_holding(self) -> bool:
        """True while sessions of some pool need more cache than it has, so that cold turns wait."""
        now = self._clock.monotonic()
        return any(
            pool.pressure.is_holding and (len(pool.queue) > 0 or pool.pressure.is_fresh(now))
            for pool in self._pools.values()
        )

    def need(self, pool: str) -> float | None:
        """Return the tokens that continuing sessions need over the capacity of the pool's caches; None if unknown."""
        now = self._clock.monotonic()
        held = [self._capacity_tokens(view.id) for view in self._fleet.snapshot(pool, now) if view.available]
        if not held or None in held:
            return None
        return self.pool(pool).served.needed_tokens(now) / sum([tokens or 0.0 for tokens in held])

    def judge(self, turn: Turn, kind: TurnKind, views: Sequence[ReplicaView]) -> Verdict:
        """Return whether `turn` would wait now. Changes nothing."""
        if kind is TurnKind.SHORT or not views or self.short_tokens(views) is None:
            return Verdict(kind, waits=False)
        pool, now = self.pool(turn.pool), self._clock.monotonic()
        rates = [view.rate_tokens_per_second for view in views]
        is_cold, reason = kind is TurnKind.COLD, ""
        if self._is_pressed(pool, views):
            if is_cold:
                reason = "the sessions need more cache than the replicas have"
        elif is_long(turn.uncached_tokens, rates, LONG_SECONDS * self.limits.pace):
            if self._shares.share_of(turn.tenant, now) < 1.0:
                reason = "other tenants are active, and a long prefill would keep them waiting"
            elif is_cold and (
                len(pool.queue) or min(map(_pending_seconds, views)) >= BACKLOG_SECONDS * self.limits.pace
            ):
                reason = "every replica has enough work, and only the proxy can keep the order"
        if not reason:
            return Verdict(kind, waits=False)
        seconds, least = self._wait_seconds(pool, turn, now, sum(rates))
        return Verdict(kind, waits=True, reason=reason, seconds=seconds, least_seconds=least)

    def short_tokens(self, views: Sequence[ReplicaView]) -> float | None:
        """Return the uncached tokens up to which a turn never waits for these replicas; None if no turn ever waits.

        No turn waits if the gate is off, or if the capacity of a replica is unknown: such a replica may be anything,
        and nothing shows whether it is busy.
        """
        if not self.limits.enabled:
            return None
        most = 0.0
        for view in views:
            capacity = self._capacity_tokens(view.id)
            if capacity is None:
                return None
            most = max(most, capacity)
        return short_tokens(most)

    def knows_rate(self, replica: int) -> bool:
        """Return True if a replica's prefill rate is configured or was measured, and not only guessed."""
        return self._fleet.measured_rate(replica) is not None

    def was_pressed(self, pool: str) -> bool:
        """Return True if the last turn that was judged found cold turns of a pool waiting. Takes no time."""
        return self.pool(pool).pressure.is_holding

    def is_pressed(self, pool: str, views: Sequence[ReplicaView]) -> bool:
        """Return True if cold turns of a pool wait because its sessions need more cache than there is.

        Call it only for replicas for which turns may wait at all (`short_tokens`).
        """
        return self._is_pressed(self.pool(pool), views)

    def _is_pressed(self, pool: _Pool, views: Sequence[ReplicaView]) -> bool:
        shortest = min([view.pending_tokens / view.rate_tokens_per_second for view in views])
        return pool.pressure.is_on(shortest, len(pool.queue), CROWDED_SECONDS * self.limits.pace)

    def _wait_seconds(self, pool: _Pool, turn: Turn, now: float, rate: float) -> tuple[float, float]:
        """Return about how long a turn would wait, and how long it would if no other came.

        The first is by the rate at which its tenant's turns were taken, as far as that agrees with what waits now:
        they get at least their tenant's share of what the replicas take.
        """
        arrived = pool.tickets.arrival(turn.tenant, turn.prompt_end, now)
        before: dict[str, float] = {}
        urgent_tokens = 0.0
        for waiter, since in pool.waiting.items():
            each = waiter.turn
            if each.priority < turn.priority:
                urgent_tokens += each.uncached_tokens
            elif each.priority == turn.priority and since <= arrived:
                before[each.tenant] = before.get(each.tenant, 0.0) + each.uncached_tokens
        away = pool.tickets.expected(arrived, now)
        here, back = 1.0 / (1 + self._others()), next(away, None)  # clients come back to any worker
        tenant, share = turn.tenant, self._shares.share_of(turn.tenant, now)
        for looks in range(1, MOST_LOOKS + 1):
            own = before.get(tenant, 0.0)
            others = {other: tokens for other, tokens in before.items() if other != tenant}
            # another tenant's flood goes before it only as far as its own share lags behind
            tokens = urgent_tokens + own + self._shares.most_before(tenant, own, others)
            least = pool.rate.seconds_for(tokens, rate)
            most = pool.rate.seconds_for(urgent_tokens + own / share, rate)
            seconds = pool.line_rates.seconds_for(tenant, turn.priority, own, least, most)
            # who was turned away goes before it only if it is back by then
            counted = back
            while back is not None and (back.seconds < seconds or looks == MOST_LOOKS - 1):
                before[back.tenant] = before.get(back.tenant, 0.0) + here * back.tokens
                back = next(away, None)
            if back is counted:
                break
        return seconds, least

    # -- waiting

    async def wait_warm(self, turn: Turn, replica: int, work_seconds: float) -> None:
        """Wait until a replica can compute a turn that it holds; it may hold less of it then.

        Returns at once if the waiting bodies take all the memory allowed for them.

        Raises:
            DeadlineUnreachable: the turn's deadline passed.
        """
        if self.waiting_bytes + turn.body_bytes > self.limits.max_waiting_bytes:
            return
        share = Share(turn.tenant, turn.weight, turn.priority, turn.uncached_tokens)
        key, counts = (turn.priority, turn.client), self._warm_waiting
        counts[key] = counts.get(key, 0) + 1
        self.waiting_bytes += turn.body_bytes
        try:
            await self.warm.wait(replica, work_seconds, share, turn.deadline_seconds)
        finally:
            self.waiting_bytes -= turn.body_bytes
            counts[key] -= 1
            if not counts[key]:
                del counts[key]

    async def wait(self, turn: Turn, verdict: Verdict, arrived_seconds: float | None = None) -> Pass:
        """Wait until the turn may go. `arrived_seconds` is the time of its arrival, None if that is now.

        Raises:
            RateLimited: a new session would wait for too long, or the waiting bodies take too much memory.
            DeadlineUnreachable: its deadline cannot be met, or has passed.
            TurnedAway: no replica of the pool is left, or no turn needs to wait for them any more.
        """
        now = self._clock.monotonic()
        pool = self.pool(turn.pool)
        pool.tickets.expire(now)
        refusal = self._refusal(pool, turn, verdict, now)
        if refusal is not None:
            self._refuse(pool, turn, refusal, now)
        waiter = _Waiter(turn, asyncio.get_running_loop().create_future(), self._unfit(pool, turn))
        if not len(pool.queue):
            pool.rate.began(now)
        came = now if arrived_seconds is None else arrived_seconds
        arrived = pool.tickets.arrival(turn.tenant, turn.prompt_end, came)
        pool.tickets.take(turn.tenant, turn.prompt_end)
        self._with_news[pool.name] = pool
        waiting = pool.queue.join(_cold_turn(waiter), arrived)
        pool.line_rates.joined(turn.tenant, turn.priority, now)
        self._in_use[pool.name] = pool
        pool.waiting[waiter] = arrived
        self.waiting_bytes += turn.body_bytes
        alarm = self._deadline_alarm(waiter)
        try:
            self._look(pool)
            return await waiter.future
        except BaseException:
            # the pass may have been given just when the caller was cancelled
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                waiter.future.result().release()
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
            pool.queue.leave(waiting)
            pool.line_rates.left(turn.tenant, turn.priority)
            del pool.waiting[waiter]
            self.waiting_bytes -= turn.body_bytes
            if not len(pool.queue) and self._others():
                self._withdraw(pool)

    def _unfit(self, pool: _Pool, turn: Turn) -> frozenset[int]:
        """Return the replicas that are available, but not to this turn: they lack its model, or refuse its client."""
        planned = turn.prefill_seconds
        return frozenset([view.id for view in self._available(pool) if planned and view.id not in planned])

    def refusal(self, turn: Turn, verdict: Verdict) -> CairnError | None:
        """Return the error by which a turn that waits would be refused now, None if it would not. Changes nothing."""
        return self._refusal(self.pool(turn.pool), turn, verdict, self._clock.monotonic())

    def _refusal(self, pool: _Pool, turn: Turn, verdict: Verdict, now: float) -> CairnError | None:
        return refusal_of(turn, verdict, pool.tickets, self.limits, self.waiting_bytes, now)

    def _refuse(self, pool: _Pool, turn: Turn, refusal: CairnError, now: float) -> None:
        """Raise an error, and keep the place of a new session that is to come back."""
        self.refused += 1
        if isinstance(refusal, TooManySessions):
            arrived = pool.tickets.arrival(turn.tenant, turn.prompt_end, now)
            back = refusal.retry_after_seconds or 0.0
            pool.tickets.give(turn.tenant, turn.prompt_end, turn.uncached_tokens, arrived, back, now)
            self._with_news[pool.name] = pool
            self._report()
        raise refusal

    def _deadline_alarm(self, waiter: _Waiter) -> asyncio.TimerHandle | None:
        deadline = waiter.turn.deadline_seconds
        if deadline is None:
            return None
        return asyncio.get_running_loop().call_later(
            deadline - self._clock.monotonic(),
            _fail,
            waiter,
            DeadlineUnreachable(
                "The deadline passed while the request waited for a replica.", retry_after_seconds=1.0
            ),
        )

    # -- going

    def changed(self) -> None:
        """Look for turns that may go, since work began or ended somewhere. Cheap while no turn waits."""
        self.warm.look()
        if self._in_use:
            for pool in tuple(self._in_use.values()):
                if pool.passes:
                    self._release_done(pool)
                if len(pool.queue):
                    self._look(pool)
                elif not pool.passes:
                    del self._in_use[pool.name]

    def release(self, given: Pass) -> None:
        """End a pass, and let the next turn look. May be called twice."""
        pool = self.pool(given.pool)
        if pool.passes.get(given.replica) is given:
            self._end(pool, given)
            self._look(pool)

    def _release_done(self, pool: _Pool) -> None:
        now = self._clock.monotonic()
        for given in list(pool.passes.values()):
            if now >= given.ends_seconds or (given.is_over is not None and given.is_over()):
                self._end(pool, given)

    def _end(self, pool: _Pool, given: Pass) -> None:
        del pool.passes[given.replica]
        if given.is_shared:
            self._claims.release(given.pool, given.replica_name)

    def _look(self, pool: _Pool, skipped: frozenset[str] = frozenset()) -> None:
        """Let turns go, of no tenant in `skipped`: these have their part of the replicas, as Redis has just said."""
        self._release_done(pool)
        if not self._let_go(pool):
            self._admit(pool, skipped)
        if len(pool.queue) and pool.alarm is None:
            pool.alarm = asyncio.get_running_loop().call_later(
                LOOK_SECONDS * self.limits.pace, self._look_again, pool
            )

    def _let_go(self, pool: _Pool) -> bool:
        """Turn away the turns that need not wait any more, as new ones do not, which would go before them; and those
        that no available replica can serve. Return whether there were any: they are still in the queue.

        A replica that has just joined has not told its capacity yet, which is no reason to let turns go.
        """
        if not len(pool.queue):
            return False
        now, before = self._clock.monotonic(), pool.unknown_since
        available = {view.id for view in self._available(pool)}
        pool.unknown_since = {
            replica: before.get(replica, now) for replica in available if self._capacity_tokens(replica) is None
        }
        oldest = now - UNKNOWN_SECONDS * self.limits.pace
        unknown = {replica for replica, since in pool.unknown_since.items() if since <= oldest}
        is_on = self.limits.enabled
        go = {each for each in pool.queue.unfit if not is_on or available <= each or not unknown <= each}
        if not go:
            return False
        for waiter in pool.waiting:
            if waiter.unfit in go:
                _fail(waiter, TurnedAway("There is no replica left to wait for, or no need to wait any more."))
        return True

    def _admit(self, pool: _Pool, skipped: frozenset[str]) -> None:
        while (found := self._first_that_may_go(pool, skipped)) is not None:
            waiting, views = found
            if self._others():
                self._ask(pool, waiting, views, skipped)
                break
            if not views:
                break
            self._serve(pool, waiting, views[0], shared=False)
        if found is None and pool.is_named:
            self._withdraw(pool)

    def _withdraw(self, pool: _Pool) -> None:
        """Let the other workers' turns go first: no turn waits here, or all do for busy replicas that hold them."""
        pool.is_named = False
        self._claims.withdraw(pool.name)

    def _look_again(self, pool: _Pool) -> None:
        pool.alarm = None
        self._look(pool)

    def _first_that_may_go(
        self, pool: _Pool, skipped: frozenset[str]
    ) -> tuple[Waiting[_Waiter], list[ReplicaView]] | None:
        """Return the turn that goes next, of a tenant that lacks its part of the replicas and is not in `skipped`,
        and the replicas open to it, best first. None if no turn waits, or if all wait for busy replicas that hold
        them.
        """
        if not len(pool.queue):
            return None
        now = self._clock.monotonic()
        views = self._available(pool)
        rate = sum([view.rate_tokens_per_second for view in views]) or 1.0
        found = pool.queue.next_to_go(
            [self._room(pool, view, now) for view in views],
            now,
            skipped=skipped | self._with_their_part(pool, len(views), now),
            is_pressed=pool.pressure.is_holding,
            quiet_seconds=self.limits.quiet_seconds,
            rest_seconds=self.limits.rest_seconds,
            patience_seconds=PATIENCE_SECONDS * self.limits.pace,
            round_seconds=pool.served.recently_needed_tokens(now) / rate,
        )
        if found is None:
            return None
        waiting, replicas = found
        by_number = {view.id: view for view in views}
        return waiting, [by_number[replica] for replica in replicas]

    def _with_their_part(self, pool: _Pool, replicas: int, now: float) -> set[str]:
        """Return the tenants whose cold turns are computed at as many replicas as is their part."""
        held = Counter([given.tenant for given in pool.passes.values()])
        return {tenant for tenant, count in held.items() if count >= self._part(tenant, replicas, now)}

    def _available(self, pool: _Pool) -> list[ReplicaView]:
        return [view for view in self._fleet.snapshot(pool.name, self._clock.monotonic()) if view.available]

    def _part(self, tenant: str, replicas: int, now: float) -> int:
        """Return how many replicas may compute cold turns of one tenant at once: any number if it is alone.

        Its turns then count as this worker's oldest also while it has all replicas. Otherwise those of a lower
        priority would pass them that wait in the worker which hears first of a free replica.
        """
        share = self._shares.share_of(tenant, now)
        return ANY_NUMBER if share >= 1.0 else max(min(int(share * replicas), replicas - 1), 1)

    def _serve(self, pool: _Pool, waiting: Waiting[_Waiter], replica: ReplicaView, *, shared: bool) -> None:
        now = self._clock.monotonic()
        turn, future = waiting.item.item.turn, waiting.item.item.future
        given = Pass(self, pool.name, turn.tenant, replica, now + self._claim_seconds(turn, replica))
        given.is_shared = shared
        pool.queue.serve(waiting, replica.id, now)
        pool.rate.took(turn.uncached_tokens, now)
        pool.line_rates.took(turn.tenant, turn.priority, turn.uncached_tokens, now)
        if future.done():
            if shared:
                self._claims.release(pool.name, replica.name)
            return
        pool.passes[replica.id] = given
        self._in_use[pool.name] = pool
        self.admitted += 1
        future.set_result(given)

    def _ask(self, pool: _Pool, waiting: Waiting[_Waiter], views: list[ReplicaView], skipped: frozenset[str]) -> None:
        if not pool.asking:
            pool.asking = True
            self._start(self._claim(pool, waiting, views, skipped), "cold turn claim")

    async def _claim(
        self, pool: _Pool, waiting: Waiting[_Waiter], views: list[ReplicaView], skipped: frozenset[str]
    ) -> None:
        """Claim one of the replicas for the first turn; it goes to the turn that is first once the claim succeeds."""
        turn, now = waiting.item.item.turn, self._clock.monotonic()
        got: str | None = None
        shared = True
        try:
            got = await self._claims.take(
                pool.name,
                [view.name for view in views],
                busy={
                    view.name: self.limits.rest_seconds
                    for view in views
                    if not is_quiet(_pending_seconds(view), self.limits.quiet_seconds)
                },
                order=self._order(pool, waiting, skipped, now),
                tenant=turn.tenant,
                claim_seconds=max(
                    [self._claim_seconds(turn, view) for view in views], default=CLAIM_PATIENCE_SECONDS
                ),
                most=self._part(turn.tenant, len(self._available(pool)), now),
                tokens=turn.uncached_tokens,
            )
        except CacheError:
            shared, got = False, views[0].name if views else None
        finally:
            pool.asking = False
        if got == PART_TAKEN:
            self._look(pool, skipped | {turn.tenant})
            return
        pool.is_named = shared and got is None
        if got is None:
            return
        replica = next(view for view in views if view.name == got)
        head = pool.queue.head(self._clock.monotonic(), skipped)
        if waiting.is_gone and head is not None and replica.id not in head.item.unfit:
            waiting = head
        if waiting.is_gone or replica.id in pool.passes:  # this worker may have gone on alone meanwhile
            if shared:
                self._claims.release(pool.name, got)
        else:
            self._serve(pool, waiting, replica, shared=shared)
        self._look(pool)

    def _claim_seconds(self, turn: Turn, view: ReplicaView) -> float:
        prefill = (view.pending_tokens + turn.uncached_tokens) / view.rate_tokens_per_second
        return CLAIM_PATIENCE * prefill + CLAIM_PATIENCE_SECONDS * self.limits.pace

    def _order(
        self, pool: _Pool, waiting: Waiting[_Waiter], skipped: frozenset[str], now: float
    ) -> tuple[str, float]:
        """Return the turn's position among those of all workers: a sortable text of its priority and its tenant's
        round, and the time for which it has waited.

        A turn that goes before a higher priority's by the floor of its own has the place of that priority. Otherwise
        it would wait for all of that priority in other workers, and those that wait behind it here as well.
        """
        skipped |= self._with_their_part(pool, len(self._available(pool)), now)
        highest = pool.queue.highest(skipped)
        priority = waiting.priority if highest is None else min(highest, waiting.priority)
        return f"{priority:d}:{self._shares.round_of(waiting.tenant):015d}", now - waiting.arrived_seconds

    def _room(self, pool: _Pool, view: ReplicaView, now: float) -> ReplicaRoom:
        return ReplicaRoom(
            replica=view.id,
            pending_seconds=inf if self.warm.waiting(view.id) else _pending_seconds(view),
            running_tokens=view.running_tokens,
            cache_tokens=self._capacity_tokens(view.id),
            own_share=pool.served.own_share,
            resting_tokens=pool.served.resting_tokens(view.id, now, RESTING_SECONDS * self.limits.pace),
            is_taken=view.id in pool.passes,
        )


def _cold_turn(waiter: _Waiter) -> ColdTurn[_Waiter]:
    turn = waiter.turn
    return ColdTurn(
        item=waiter,
        prompt_tokens=turn.prompt_tokens,
        uncached_tokens=turn.uncached_tokens,
        is_new=turn.is_new,
        tenant=turn.tenant,
        priority=turn.priority,
        weight=turn.weight,
        prefill_seconds=turn.prefill_seconds,
        unfit=waiter.unfit,
    )


def _pending_seconds(view: ReplicaView) -> float:
    return view.pending_tokens / view.rate_tokens_per_second


def _fail(waiter: _Waiter, error: CairnError) -> None:
    if not waiter.future.done():
        waiter.future.set_exception(error)

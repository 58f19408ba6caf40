"""Between plan and relay: find which prompt this one continues, and let it wait at the cold gate if it must.

It translates between the exchange and `proxy.routing.cold_gate`, which decides. For a prompt that need not wait it
only reads the plan and the headers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Mapping
from typing import Final

from proxy.clock import Clock
from proxy.errors import DeadlineUnreachable, Overloaded, TurnedAway
from proxy.model import Ending
from proxy.pipeline.disclosure import undisclosed_tokens
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.planner import Planner
from proxy.records import Candidate, Plan
from proxy.routing.cold_admission import SHORT_TOKENS, TurnKind, about_as_good, classify, waits_while_warm
from proxy.routing.cold_gate import ColdGate
from proxy.routing.cold_turn import Turn, Verdict
from proxy.routing.fair_shares import Priority, TenantShares
from proxy.routing.replica_queue import ReplicaQueue
from proxy.wire.urgency import urgency_of

_SHORT: Final = TurnKind.SHORT
_COLD: Final = TurnKind.COLD
_COMPLETE: Final = Ending.COMPLETE


class ColdTurns:
    """Sends cold turns through the gate. One per worker. `queues` are by replica number."""

    def __init__(
        self,
        gate: ColdGate,
        planner: Planner,
        shares: TenantShares,
        queues: Mapping[int, ReplicaQueue],
        clock: Clock,
    ) -> None:
        self._gate = gate
        self._queues = queues
        self._planner = planner
        self._shares = shares
        self._clock = clock

    def admit(self, exchange: Exchange) -> Awaitable[None] | None:
        """Return what to await before the request may be sent, None if it may be sent now.

        The request is planned again if it waited, or if only some replicas are open to it.

        Raises:
            BadRequest: a header about its urgency cannot be read.
            DeadlineUnreachable: the client's deadline cannot be met.
            RateLimited: a new session would wait for too long, or too much waits; also raised by the awaitable.
            Overloaded: no replica is left after the wait; raised by the awaitable only.
        """
        plan, pool = exchange.plan, exchange.pool
        self._name_share(exchange)
        if plan is None or pool is None or not exchange.call.endpoint.runs_model:
            return None
        now = self._clock.monotonic()
        self._read_urgency(exchange, now)
        if exchange.prompt is None or not exchange.call.endpoint.is_generation:
            return None  # it waits for a place at its replica only
        self._seen(exchange, now)
        if pool.is_provider or exchange.pinned_replica is not None:
            return None
        if self._shares.has_several and self._shares.passes_others(exchange.share_name):
            plan = exchange.plan = self._soonest_first(plan, now)
        if exchange.fingerprint is None:
            return None
        views = [candidate.replica for candidate in plan.candidates]
        short = self._gate.short_tokens(views)
        if short is None:
            return None
        least = least_uncached(plan)
        kind = classify(plan.prompt_tokens, least, short)
        self._note(exchange, plan, least, now)
        may_cool = waits_while_warm(kind, plan.prompt_tokens, short)
        if kind is _SHORT:
            return self._go_warm(exchange, plan, short) if may_cool and self._gate.was_pressed(pool.name) else None
        turn = self._turn(exchange, plan, least)
        verdict = self._gate.judge(turn, kind, views)
        if verdict.waits:
            return self._wait(exchange, turn, verdict, now)
        if may_cool and self._gate.is_pressed(pool.name, views):
            return self._go_warm(exchange, plan, short)
        return None

    def judge(self, exchange: Exchange) -> Verdict | None:
        """Return whether the request would wait now; None if such requests never wait. Changes only the exchange.

        Raises:
            BadRequest, DeadlineUnreachable, RateLimited: it would be refused so.
        """
        self._name_share(exchange)
        self._read_urgency(exchange, self._clock.monotonic())
        if exchange.plan is None:
            return None
        verdict = self._judge_turn(exchange, exchange.plan)
        if verdict is not None and verdict.waits:
            return verdict
        return self._judge_place(exchange, exchange.plan, verdict)

    def _judge_turn(self, exchange: Exchange, plan: Plan) -> Verdict | None:
        """Return whether the request waits before its replica is chosen."""
        pool = exchange.pool
        if pool is None or exchange.fingerprint is None or pool.is_provider:
            return None
        least = least_uncached(plan)
        exchange.known_tokens = self._known(exchange, plan, least)[0]
        views = [candidate.replica for candidate in plan.candidates]
        kind = classify(plan.prompt_tokens, least, self._gate.short_tokens(views) or SHORT_TOKENS)
        turn = self._turn(exchange, plan, least)
        verdict = self._gate.judge(turn, kind, views)
        if not verdict.waits:
            return self._judge_warm(plan, pool.name, kind, turn.priority)
        refusal = self._gate.refusal(turn, verdict)
        if refusal is not None:
            raise refusal
        return verdict

    def _judge_place(self, exchange: Exchange, plan: Plan, verdict: Verdict | None) -> Verdict | None:
        """Return whether the request waits for a place at its replica; else the verdict given.

        Raises RateLimited if too many wait for it already.
        """
        chosen = plan.chosen.replica
        queue = self._queues.get(chosen.id)
        if queue is None or queue.has_place:
            return verdict
        queue.check_length()
        share = exchange.waiting_share_of(plan.chosen)
        sent_seconds = self._gate.warm.sent_seconds(chosen.id, self._clock.monotonic())
        return Verdict(
            classify(plan.prompt_tokens, least_uncached(plan)) if verdict is None else verdict.kind,
            waits=True,
            reason="its replica has as many requests, or as much work, as it is sent at a time",
            seconds=queue.wait_seconds(prefill_seconds(plan.chosen), share, sent_seconds),
        )

    def _judge_warm(self, plan: Plan, pool: str, kind: TurnKind, priority: Priority) -> Verdict:
        """Return whether a turn that need not wait for a quiet replica waits for one that holds it."""
        warm, views = self._gate.warm, [candidate.replica for candidate in plan.candidates]
        short = self._gate.short_tokens(views)
        if short is None or not waits_while_warm(kind, plan.prompt_tokens, short) or not self._gate.was_pressed(pool):
            return Verdict(kind, waits=False)
        good = holding_most(plan, short)
        if not all(map(warm.is_busy, good)):
            return Verdict(kind, waits=False)
        return Verdict(
            kind,
            waits=True,
            reason="every replica that holds the prompt is busy, and may evict it before it is computed",
            seconds=min([warm.wait_seconds(replica, priority) for replica in good]),
        )

    def settle(self, exchange: Exchange) -> None:
        """Learn from a finished request how many of its computed tokens had been computed before; end its pass."""
        usage, pool, tenant = exchange.usage, exchange.pool, exchange.call.tenant
        if not tenant.is_listed and _was_answered(exchange):
            self._shares.answered(tenant.id)
        if exchange.cold_pass is not None:
            exchange.cold_pass.release()
        if exchange.noted is not None and pool is not None and not _was_sent(exchange):
            self._gate.served(pool.name).withdraw(exchange.noted, self._clock.monotonic())
        if usage is None or usage.cached_tokens is None or pool is None or exchange.fingerprint is None:
            return
        if exchange.attempt is not None:
            replica = exchange.attempt.candidate.replica.id
            self._gate.ended(pool.name, exchange.fingerprint.hashes[-1], replica)
        repeated = min(exchange.known_tokens, usage.prompt_tokens) - usage.cached_tokens
        self._gate.observe(pool.name, usage.prompt_tokens - usage.cached_tokens, max(repeated, 0.0))

    def _name_share(self, exchange: Exchange) -> None:
        """Set whose share the request uses: whoever is in the configuration was not made up."""
        tenant = exchange.call.tenant
        name = tenant.id if tenant.is_listed else self._shares.name_of(tenant.id)
        weight = tenant.weight if name == tenant.id else self._shares.weight_of(name)
        exchange.share_name, exchange.share_weight = name, weight

    def _seen(self, exchange: Exchange, now: float) -> None:
        """Note that the tenant is active."""
        tenant = exchange.call.tenant
        if exchange.share_name == tenant.id:
            self._shares.seen(tenant.id, tenant.weight, now)
        else:
            self._shares.newcomer_seen(tenant.id, now)
            exchange.share_weight = self._shares.weight_of(exchange.share_name)

    def _read_urgency(self, exchange: Exchange, now: float) -> None:
        """Set priority and deadline, within what the client may ask for. Raises if the deadline cannot be met."""
        call, plan = exchange.call, exchange.plan
        urgency = urgency_of(call.headers)
        if urgency.priority is not None:
            exchange.set_priority(urgency.priority)
        if urgency.deadline_seconds is None or plan is None:
            return
        exchange.deadline_seconds = call.received_seconds + urgency.deadline_seconds
        if not call.endpoint.is_generation:
            return  # nothing shows how long a replica takes for it
        # a rate that is only guessed may be far too low, and would never be measured if everything were refused
        knows_rate = self._gate.knows_rate
        soonest = min(
            [
                self._first_token_seconds(each, exchange, now) if knows_rate(each.replica.id) else 0.0
                for each in plan.candidates
            ]
        )
        if now + soonest > exchange.deadline_seconds:
            raise DeadlineUnreachable(
                f"The first token would come after {soonest:.1f} s, which is past the deadline.",
                retry_after_seconds=max(soonest, 1.0),
            )

    def _first_token_seconds(self, candidate: Candidate, exchange: Exchange, now: float) -> float:
        """Return the least time until the first token, as far as the tenant may know what is cached.

        Of the requests that wait for the replica only those count that go before it by priority and share. A refusal
        tells it this time; without having anything computed, it could find out what others have sent.
        """
        replica = candidate.replica
        tokens = candidate.uncached_tokens
        tokens += undisclosed_tokens(candidate, exchange.fingerprint, exchange.own_blocks)
        if (queue := self._queues.get(replica.id)) is not None:
            tokens += queue.tokens_before(exchange.waiting_share_of(candidate))
        return self._gate.warm.sent_seconds(replica.id, now) + tokens / replica.rate_tokens_per_second

    def _note(self, exchange: Exchange, plan: Plan, least: float, now: float) -> None:
        assert exchange.fingerprint is not None  # noqa: S101 - the caller looked
        assert exchange.pool is not None  # noqa: S101
        exchange.known_tokens, depth = self._known(exchange, plan, least)
        served = self._gate.served(exchange.pool.name)
        tokens = plan.prompt_tokens
        exchange.noted = served.note(exchange.fingerprint.hashes, depth, tokens, tokens - least, now)

    def _known(self, exchange: Exchange, plan: Plan, least: float) -> tuple[float, int]:
        """Return the tokens of the prompt that were served before, and the block at which they end."""
        fingerprint, pool = exchange.fingerprint, exchange.pool
        assert fingerprint is not None  # noqa: S101 - the caller looked
        assert pool is not None  # noqa: S101
        depth = self._gate.served(pool.name).depth(fingerprint.hashes)
        held = plan.prompt_tokens - least
        if not depth:
            return held, 0
        return max(held, fingerprint.ends[depth - 1] / fingerprint.ends[-1] * plan.prompt_tokens), depth

    def _turn(self, exchange: Exchange, plan: Plan, least: float) -> Turn:
        call, pool, fingerprint = exchange.call, exchange.pool, exchange.fingerprint
        assert pool is not None  # noqa: S101 - the caller looked
        assert fingerprint is not None  # noqa: S101
        return Turn(
            pool=pool.name,
            prompt_tokens=plan.prompt_tokens,
            uncached_tokens=least,
            known_tokens=exchange.known_tokens,
            prompt_end=fingerprint.hashes[-1],
            body_bytes=len(call.body),
            tenant=exchange.share_name,
            client=call.tenant.client,
            weight=exchange.share_weight,
            priority=exchange.priority_to_wait_by(),
            deadline_seconds=exchange.deadline_seconds,
            prefill_seconds={each.replica.id: prefill_seconds(each) for each in plan.candidates},
        )

    def _soonest_first(self, plan: Plan, now: float) -> Plan:
        """Try first, of the replicas that hold about as much as the best, the one whose engine is free soonest.

        The plan counts the requests that wait for a replica. One that goes before them waits only for what was sent.
        """
        if len(plan.candidates) < 2:
            return plan
        bound = least_uncached(plan) + SHORT_TOKENS
        good = [each for each in plan.candidates if each.uncached_tokens <= bound and each.replica.available]
        soonest = min(good, key=lambda each: self._gate.warm.sent_seconds(each.replica.id, now), default=plan.chosen)
        if soonest is plan.chosen:
            return plan
        others = [each for each in plan.candidates if each is not soonest]
        return dataclasses.replace(plan, candidates=(soonest, *others))

    def _go_warm(self, exchange: Exchange, plan: Plan, short: float) -> Awaitable[None] | None:
        """Plan for the replicas that hold most; return what to await if all of these are busy."""
        good = holding_most(plan, short)
        free = frozenset([each for each in good if not self._gate.warm.is_busy(each)])
        if not free:
            best = next(each for each in plan.candidates if each.replica.id in good)
            return self._wait_warm(exchange, plan, best, short)
        if plan.chosen.replica.id not in free:
            self._planner.plan(exchange, among=free)
        return None

    async def _wait_warm(self, exchange: Exchange, plan: Plan, candidate: Candidate, short: float) -> None:
        """Wait for a replica that holds the prompt; if it holds too little of it then, wait as a cold turn."""
        arrived, replica = self._clock.monotonic(), candidate.replica
        turn = self._turn(exchange, plan, candidate.uncached_tokens)
        try:
            await self._gate.wait_warm(turn, replica.id, prefill_seconds(candidate))
        finally:
            exchange.waited_seconds += self._clock.monotonic() - arrived
        exchange.is_counted = True
        self._planner.look_up(exchange)
        self._planner.plan(exchange)
        plan = exchange.plan or plan
        least = least_uncached(plan)
        kind = classify(plan.prompt_tokens, least, short)
        if kind is _COLD:
            turn = self._turn(exchange, plan, least)
            verdict = self._gate.judge(turn, kind, [each.replica for each in plan.candidates])
            if verdict.waits:
                await self._wait(exchange, turn, verdict, arrived)
            return
        good = holding_most(plan, short)
        if plan.chosen.replica.id not in good:
            self._planner.plan(exchange, among=good)

    async def _wait(self, exchange: Exchange, turn: Turn, verdict: Verdict, arrived_seconds: float) -> None:
        before = self._clock.monotonic()
        try:
            given = exchange.cold_pass = await self._gate.wait(turn, verdict, arrived_seconds)
        except TurnedAway:
            self._planner.plan_again(exchange)
            return
        finally:
            exchange.waited_seconds += self._clock.monotonic() - before
        exchange.is_counted = True
        given.is_over = lambda: _has_computed(exchange)
        try:
            self._planner.look_up(exchange)
            self._planner.plan(exchange, among=frozenset((given.replica,)))
        except Overloaded:  # its replica has just gone down
            self._planner.plan_again(exchange)
        except BaseException:
            given.release()
            raise


def holding_most(plan: Plan, short: float) -> frozenset[int]:
    """Return the replicas of a plan that hold about as much of the prompt as the best one."""
    return about_as_good({each.replica.id: each.uncached_tokens for each in plan.candidates}, short)


def least_uncached(plan: Plan) -> float:
    """Return the fewest tokens that any replica would have to compute."""
    return min([candidate.uncached_tokens for candidate in plan.candidates])


def prefill_seconds(candidate: Candidate) -> float:
    """Return the time that a replica takes to compute the prompt."""
    return candidate.uncached_tokens / candidate.replica.rate_tokens_per_second


def _was_answered(exchange: Exchange) -> bool:
    """Return True if a replica has answered as the client asked."""
    return exchange.ending is _COMPLETE and exchange.attempt is not None and exchange.status < 300


def _was_sent(exchange: Exchange) -> bool:
    """Return True if a replica computes the prompt, or has: it was placed there, and not taken back."""
    return exchange.attempt is not None and exchange.attempt.placement is not None


def _has_computed(exchange: Exchange) -> bool:
    """Return True once the prefill of the request is known to be over."""
    attempt = exchange.attempt
    return attempt is not None and not (attempt.charge.pending and attempt.charge.present)

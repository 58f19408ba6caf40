"""Phases 4 to 6: from a prompt to the plan, which lists the replicas that may serve it, best first.

It reads the index and the fleet and changes nothing but the exchange.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final

from cache import Content, Fingerprint, Match, PrefixIndex, chain_root, cut, extend
from proxy.clock import Clock, utc_date
from proxy.fleet import Fleet
from proxy.fleet.pools import Pools
from proxy.fleet.served_models import NOBODY
from proxy.fleet.templates import Templates
from proxy.model import RouteReason, TemplateFacts
from proxy.pipeline.disclosure import OwnPrefixes, limited
from proxy.pipeline.exchange import Exchange
from proxy.records import Demand, Plan, Prompt, ReplicaView
from proxy.routing import cost as routing
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.session_hints import DEFAULT_HEADERS, SessionHints
from proxy.routing.token_estimate import TokenCounts
from proxy.wire.media import locate_media
from proxy.wire.template import keyed_salt, keyed_spans, keyed_stored, stored_first

_NOTHING_MATCHED: Final = Match({})


@dataclass(frozen=True, slots=True)
class PlanningRules:
    """Constants of the decision.

    A prompt shorter than `min_shareable_bytes` gets no fingerprint. `weight_per_second` is added to the weight of
    uncached work for each second of the shortest queue. `session_headers` are the headers that name a client's
    session.
    """

    min_shareable_bytes: int
    weight_per_second: float = routing.WEIGHT_PER_SECOND
    session_headers: tuple[str, ...] = DEFAULT_HEADERS


class Planner:
    """Plans requests. One per worker.

    Args:
        fleet: gives a snapshot of a pool's replicas.
        index: finds the longest prefix that each replica holds.
        tokens: predicts how many tokens a prompt has.
        gate: knows the prefixes that are being computed, for which a request had better wait.
        templates: knows how engines render prompts, on which the key of a prefix depends.
        clock: monotonic time.
        rules: constants of the decision.
        pools: knows which pool has taken the place of one that a reload removed.
    """

    def __init__(
        self,
        fleet: Fleet,
        index: PrefixIndex,
        tokens: TokenCounts,
        gate: PrefillGate,
        templates: Templates,
        clock: Clock,
        rules: PlanningRules,
        pools: Pools,
    ) -> None:
        self._pools = pools
        self._fleet = fleet
        self._index = index
        self._tokens = tokens
        self._gate = gate
        self._templates = templates
        self._clock = clock
        self._own_prefixes = OwnPrefixes()
        self._sessions = SessionHints(rules.session_headers)
        self._min_shareable_bytes = rules.min_shareable_bytes
        self._weight_per_second = rules.weight_per_second

    def fingerprint(self, exchange: Exchange) -> None:
        """Cut the prompt into blocks and chain their hashes; a prompt that is too short to share has none."""
        prompt, pool, call = exchange.prompt, exchange.pool, exchange.call
        if prompt is None or pool is None or not call.endpoint.is_generation:
            return
        if prompt.size_bytes >= self._min_shareable_bytes:
            salt = call.tenant.salt if pool.isolated else b""
            facts = self._templates.of(pool.name, prompt.model)
            today = utc_date(self._clock.unix()) if facts.dated else ""
            root = chain_root((salt, *keyed_salt(prompt, facts, today)))
            if exchange.stored is None:
                exchange.fingerprint = self._cut(root, prompt, facts)
            else:
                exchange.fingerprint = _with_stored(root, exchange.stored.content, prompt, facts)

    def _cut(self, root: int, prompt: Prompt, facts: TemplateFacts) -> Fingerprint:
        spans = keyed_spans(prompt, facts)
        fingerprint = cut(root, spans)
        if not prompt.media:
            return fingerprint
        media = locate_media(prompt.media, prompt.body, spans, partial(self._tokens.media_tokens, prompt.model))
        return Fingerprint(fingerprint.hashes, fingerprint.ends, media)

    def look_up(self, exchange: Exchange) -> None:
        """Find how much of the prompt each replica holds and may reuse: nothing if it is to be computed anew."""
        fingerprint, tenant = exchange.fingerprint, exchange.call.tenant
        if fingerprint is not None:
            exchange.match = self._index.match(fingerprint)
            if exchange.prompt is not None and exchange.prompt.skips_cache:
                exchange.match = dataclasses.replace(exchange.match, held={})
        if not tenant.sees_all and exchange.pool is not None and not exchange.pool.isolated:
            exchange.own_blocks = 0 if fingerprint is None else self._own_prefixes.known_blocks(tenant, fingerprint)
            if exchange.only_explained and fingerprint is not None and exchange.match is not None:
                exchange.match = limited(exchange.match, fingerprint, exchange.own_blocks)

    def note_answered(self, exchange: Exchange) -> None:
        """Remember where the session was served, and that the tenant may see this prefix from now on."""
        if exchange.session is not None and exchange.attempt is not None:
            self._sessions.served(exchange.session, exchange.attempt.candidate.replica.id)
        if exchange.own_blocks is not None and exchange.fingerprint is not None:
            self._own_prefixes.add(exchange.call.tenant, exchange.fingerprint, exchange.own_blocks)

    def plan(self, exchange: Exchange, *, among: frozenset[int] | None = None) -> None:
        """Order the pool's replicas, or only those in `among`, by what this prompt would cost there.

        A request whose pool a reload has removed moves to the one that serves its model now. Raises Overloaded if no
        replica is left.
        """
        assert exchange.pool is not None  # noqa: S101 - the reader set it or raised
        demand, pool, now_seconds = self._demand(exchange), exchange.pool.name, self._clock.monotonic()
        without, models = NOBODY, self._fleet.models
        is_uneven = models.is_uneven(pool)
        if is_uneven:
            needs = exchange.needs(partial(models.is_refused, pool))
            without = self._fleet.lacking(pool, needs, now_seconds)
        views = self._fleet.snapshot(pool, now_seconds, exchange.throttle_key, exchange.pinned_replica, without)
        if not views and (successor := self._pools.successor(exchange.pool, exchange.model)) is not None:
            exchange.pool = successor
            self.plan(exchange, among=among)
            return
        exchange.is_restricted = bool(without) or exchange.pinned_replica is not None
        if is_uneven:
            fitting = _with_room(views, models.rooms(pool, exchange.model or ""), demand.prompt_tokens)
            if len(fitting) < len(views):
                views, exchange.is_restricted = fitting, True
        if exchange.avoid:
            views = tuple([view for view in views if view.name not in exchange.avoid])
        is_narrowed = False
        if among is not None:
            is_narrowed = sum([view.available for view in views if view.id not in among]) > 0
            views = tuple([view for view in views if view.id in among])
        held_back = None
        if exchange.fingerprint is not None and not self._gate.is_open:
            held_back = partial(self._gate.holds_back, exchange.fingerprint.hashes)
        exchange.plan = routing.plan(
            demand,
            exchange.match or _NOTHING_MATCHED,
            views,
            min_shareable_bytes=self._min_shareable_bytes,
            weight_per_second=self._weight_per_second,
            held_back=held_back,
            room=None if exchange.fingerprint is None else self._index,  # only a prompt that is placed takes room
            pool_name=pool,
        )
        if is_narrowed and exchange.plan.reason is RouteReason.ONLY:  # others are left out, but would be a choice
            exchange.plan = _without_only(exchange.plan)

    def plan_again(self, exchange: Exchange) -> None:
        """Plan a request whose replica went down while it waited there. Raises Overloaded if none is left.

        A cold turn that has waited at the cold gate does not do so again.
        """
        if exchange.cold_pass is not None:
            exchange.cold_pass.release()
        self.look_up(exchange)
        self.plan(exchange)

    def _demand(self, exchange: Exchange) -> Demand:
        prompt, fingerprint, match = exchange.prompt, exchange.fingerprint, exchange.match
        pinned = exchange.pinned_replica
        if prompt is None:
            return Demand(0, 0.0, pinned_replica=pinned)
        size_bytes = prompt.size_bytes
        if fingerprint is None or match is None:
            tokens = self._tokens.predict(prompt.model, size_bytes, prompt.media)
            return Demand(size_bytes, tokens, hash(exchange.call.request_id), pinned_replica=pinned)
        tokens = self._tokens.predict(prompt.model, size_bytes, prompt.media, match.known_bytes, match.known_tokens)
        ends = fingerprint.ends
        session = exchange.session = self._sessions.key(
            exchange.call.tenant.id, exchange.call.headers, prompt.cache_key
        )
        return Demand(
            size_bytes,
            tokens,
            fingerprint.hashes[min(match.known_blocks, len(ends) - 1)],
            size_bytes - (ends[-2] if len(ends) > 1 else 0),
            pinned,
            None if session is None else self._sessions.replica(session),
        )


def _with_room(
    views: tuple[ReplicaView, ...], rooms: Mapping[int, int], prompt_tokens: float
) -> tuple[ReplicaView, ...]:
    """Return the replicas whose context is long enough for a prompt, if one of them is available; else all."""
    if not rooms:
        return views
    fitting = tuple([view for view in views if rooms.get(view.id, inf) > prompt_tokens])
    return fitting if any(view.available for view in fitting) else views


def _without_only(plan: Plan) -> Plan:
    reason = RouteReason.WARM if plan.chosen.matched_bytes else RouteReason.COLD
    return Plan(plan.candidates, reason, plan.miss, plan.cache, plan.prompt_tokens)


def _with_stored(root: int, content: Content, prompt: Prompt, facts: TemplateFacts) -> Fingerprint:
    """Return the fingerprint of a stored context and of the messages that follow it.

    The context's own part is computed once, unless what follows changes how it is rendered.
    """
    rest = prompt.spans
    if not rest or not stored_first(rest, facts, has_arguments=len(prompt.chain_salt) > 1):
        return cut(root, _stored_spans(content, prompt, facts, rest))
    alone = content.chain(root, facts, partial(_stored_spans, content, prompt, facts))
    return extend(alone, keyed_spans(dataclasses.replace(prompt, tool_spans=0), facts))


def _stored_spans(
    content: Content, prompt: Prompt, facts: TemplateFacts, rest: Sequence[memoryview | bytes] = ()
) -> Sequence[memoryview | bytes]:
    return keyed_stored(prompt, content.tools, content.message_views(), rest, facts)

"""Cairn before simulated engines, without HTTP: bodies are read, keyed, looked up, planned and learned from by the
proxy's own modules, with nothing re-stated. Sequential with `ask`; on a virtual clock with `send`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random
from zlib import crc32

import msgspec

from benchmarks.engines.engine import At, Job, SimulatedEngine, Usage
from benchmarks.engines.templates import decode_chat
from cache import Feedback, Fingerprint, Placement, PrefixIndex, chain_root, cut
from proxy.fleet import Charge, Fleet, ReplicaSpec
from proxy.model import Endpoint, TemplateFacts
from proxy.records import Demand, Plan, Prompt
from proxy.routing.cost import plan
from proxy.routing.prefill_gate import Follower, Prefill, PrefillGate
from proxy.routing.token_estimate import TokenCounts
from proxy.wire.media import locate_media
from proxy.wire.request import read
from proxy.wire.template import keyed_salt, keyed_spans

POOL = "pool"
TODAY = "2026-01-31"


class Answer(msgspec.Struct, frozen=True):
    """Result of one request."""

    replica: int
    predicted_tokens: int
    usage: Usage
    feedback: Feedback


class Served(msgspec.Struct, frozen=True):
    """One request on the virtual clock."""

    replica: int
    ttft_seconds: float
    usage: Usage


class _Routed(msgspec.Struct):
    prompt: Prompt
    fingerprint: Fingerprint
    made: Plan
    placement: Placement
    charge: Charge
    prefill: Prefill | Follower | None = None


class CairnProxy:
    """One proxy before `engines`.

    `capacities` are what the engines state, in tokens; None if they do not. `facts` are what is known of their
    template.
    """

    def __init__(
        self,
        engines: Sequence[SimulatedEngine],
        *,
        capacities: Sequence[int | None] | int | None = None,
        slots: int | None = None,
        rate: float | None = None,
        at: At | None = None,
        facts: TemplateFacts | None = None,
    ) -> None:
        self.engines = list(engines)
        self.index = PrefixIndex(origin=1)
        self.fleet = Fleet(Random(1).random)
        self.gate = PrefillGate()
        self.tokens = TokenCounts()
        self.facts = facts or TemplateFacts()
        self.now = 0.0
        self._at = at
        stated = [capacities] * len(engines) if not isinstance(capacities, Sequence) else list(capacities)
        for number in range(len(engines)):
            self.fleet.add(ReplicaSpec(f"replica-{number}", POOL, prefill_tokens_per_second=rate))
            self.index.set_capacity(number, stated[number], slots)

    def ask(self, body: bytes, tenant: str = "") -> Answer:
        """Send one request and wait for its end; time passes by a second."""
        self.now += 1.0
        routed = self._route(body, tenant, self.now)
        replica = routed.placement.replica
        usage = self.engines[replica].serve(decode_chat(body))
        self.fleet.first_token(routed.charge, self.now)
        feedback = self._learn(routed, usage, self.now)
        return Answer(replica, routed.placement.predicted_tokens, usage, feedback)

    def send(self, body: bytes, tenant: str, now: float, done: Callable[[Served], None]) -> None:
        """Send one request at `now`; `done` is called at its end."""
        assert self._at is not None  # noqa: S101 - made with a calendar
        at = self._at
        routed = self._route(body, tenant, now)
        replica, chat = routed.placement.replica, decode_chat(body)
        best = routed.made.chosen
        entry = self.gate.enter(
            replica,
            routed.fingerprint.hashes,
            matched_blocks=routed.placement.held_blocks,
            matched_tokens=best.matched_tokens,
            prompt_tokens=routed.made.prompt_tokens,
            prefill_seconds=(best.replica.pending_tokens + best.uncached_tokens)
            / best.replica.rate_tokens_per_second,
        )
        prefill = entry.prefill if isinstance(entry, Follower) else entry
        first_seconds = [0.0]

        def first_token(usage: Usage, then: float) -> None:
            del usage
            first_seconds[0] = then
            self.now = then
            self.fleet.first_token(routed.charge, then)
            if prefill is not None:
                prefill.first_token()

        def ended(usage: Usage, then: float) -> None:
            self._learn(routed, usage, then)
            done(Served(replica, first_seconds[0] - now, usage))

        self.now = now
        go = partial(self._submit, replica, Job(chat, first_token, ended))
        if isinstance(entry, Follower):
            entry.then(go)
            at(now + entry.patience_seconds, lambda then: self._expire(entry, then))
        else:
            go()

    def _submit(self, replica: int, job: Job) -> None:
        assert self._at is not None  # noqa: S101
        self.engines[replica].submit(job, self.now, self._at)

    def _expire(self, follower: Follower, now: float) -> None:
        self.now = now
        follower.expire()

    def _route(self, body: bytes, tenant: str, now: float) -> _Routed:
        prompt = read(body, Endpoint.CHAT)
        salt = (b"", *keyed_salt(prompt, self.facts, TODAY))
        spans = keyed_spans(prompt, self.facts)
        media = locate_media(prompt.media, prompt.body, spans, partial(self.tokens.media_tokens, prompt.model))
        fingerprint = replace(cut(chain_root(salt), spans), media=media)
        match = self.index.match(fingerprint)
        tokens = self.tokens.predict(
            prompt.model, prompt.size_bytes, prompt.media, match.known_bytes, match.known_tokens
        )
        hashes, ends = fingerprint.hashes, fingerprint.ends
        tie = hashes[min(match.known_blocks, len(hashes) - 1)]
        demand = Demand(prompt.size_bytes, tokens, tie, prompt.size_bytes - (ends[-2] if len(ends) > 1 else 0))
        held_back = None if self.gate.is_open else partial(self.gate.holds_back, hashes)
        views = self.fleet.snapshot(POOL, now)
        made = plan(demand, match, views, min_shareable_bytes=0, held_back=held_back, room=self.index)
        replica = made.chosen.replica.id
        charge = self.fleet.charge(replica, made.chosen.uncached_tokens, now)
        placement = self.index.place(replica, fingerprint, tokens, now, source=crc32(tenant.encode()))
        return _Routed(prompt, fingerprint, made, placement, charge)

    def _learn(self, routed: _Routed, usage: Usage, now: float) -> Feedback:
        prompt = routed.prompt
        self.fleet.finish(routed.charge, now)
        self.tokens.observe(prompt.model, prompt.size_bytes, usage.prompt_tokens, prompt.media)
        self.fleet.observe_prefill(routed.charge, usage.prompt_tokens - usage.cached_tokens)
        return self.index.answered(
            routed.placement,
            usage.prompt_tokens,
            None if prompt.skips_cache else usage.cached_tokens,
            usage.output_tokens,
            now,
        )

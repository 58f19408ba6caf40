"""The way of a request: eight phases in order. Read `Pipeline.handle` first; each verb below it is one phase.

The phases decide, `Relay` does; what they learn stands in the `Exchange`. It must not know aiohttp.
"""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import Final

from cache import Match, ObjectLocations, PrefixIndex, chain_root, cut, extend
from proxy.clock import Clock
from proxy.downstream.response import Downstream
from proxy.errors import CairnError, NotFound, UpstreamError
from proxy.fleet import Fleet
from proxy.fleet.pools import Pools
from proxy.model import Call, Demand, Edit, Ending, Endpoint
from proxy.pipeline.admission import check_model
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.models_endpoint import ModelsEndpoint
from proxy.pipeline.relay import Relay, Upload
from proxy.pipeline.settlement import Settlement
from proxy.pipeline.stored_contexts import StoredContexts
from proxy.routing import cost as routing
from proxy.routing.prefill_gate import PrefillGate
from proxy.routing.token_estimate import TokenCounts
from proxy.wire import request as wire_request
from proxy.wire.errors import error_response
from proxy.wire.headers import name_context

REASON_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus} | {529: b"Site is overloaded"}
NOTHING_MATCHED = Match({})

# an enum's member is looked up in Python, at 70 ns; a constant costs nothing where this is compiled
_CHAT: Final = Endpoint.CHAT
_EMBEDDINGS: Final = Endpoint.EMBEDDINGS
_MODELS: Final = Endpoint.MODELS
_CACHING: Final = Endpoint.CACHING


class Pipeline:
    """One per worker."""

    def __init__(
        self,
        pools: Pools,
        fleet: Fleet,
        index: PrefixIndex,
        tokens: TokenCounts,
        owners: ObjectLocations,
        relay: Relay,
        catalogue: ModelsEndpoint,
        settlement: Settlement,
        contexts: StoredContexts,
        gate: PrefillGate,
        clock: Clock,
        *,
        min_shareable_bytes: int,
        weight_per_second: float = routing.WEIGHT_PER_SECOND,
    ) -> None:
        self._fleet = fleet
        self._index = index
        self._tokens = tokens
        self._owners = owners
        self._relay = relay
        self._catalogue = catalogue
        self._settlement = settlement
        self._contexts = contexts
        self._gate = gate
        self._clock = clock
        self._min_shareable_bytes = min_shareable_bytes
        self._weight_per_second = weight_per_second
        self.pools = pools

    async def handle(self, call: Call, client: Downstream, upload: Upload | None = None) -> None:
        """Answer an admitted call; `upload` is its body where that is passed through and not read.

        Nothing is raised but cancellation, ConnectionResetError (the client left) and defects.
        """
        await self.run(Exchange(call), client, upload)

    async def run(self, exchange: Exchange, client: Downstream, upload: Upload | None = None) -> None:
        """The same for a exchange that its caller reads afterwards."""
        call = exchange.call
        try:
            if call.endpoint is _CACHING:
                await self._contexts.answer(exchange, client)
                return
            if call.endpoint is _MODELS and len(self.pools.all) > 1:
                await self._catalogue.answer(exchange, client)
                return
            await self.decide(exchange)
            if exchange.only_checked:
                self._contexts.tell_checked(exchange, client)
                return
            await self._relay.run(exchange, client, upload)
        except CairnError as error:
            self.refuse(exchange, error, client)
        finally:
            self._settlement.settle(exchange)
            if exchange.context_result:
                self._contexts.settle(exchange)

    async def decide(self, exchange: Exchange) -> None:
        """The phases that choose: from the body to the plan. Changes nothing but the exchange. Raises CairnError."""
        self.read(exchange)
        await self.expand(exchange)
        self.fingerprint(exchange)
        self.look_up(exchange)
        self.plan(exchange)

    def turn_away(self, call: Call, error: CairnError, client: Downstream) -> None:
        """A call that was not admitted: it is answered, counted and logged like any other."""
        exchange = Exchange(call)
        self.refuse(exchange, error, client)
        self._settlement.settle(exchange)

    def read(self, exchange: Exchange) -> None:
        """Find the prompt in the body, and the pool that serves its model."""
        call = exchange.call
        if not (call.endpoint.is_generation or call.endpoint is _EMBEDDINGS):
            exchange.pool = self.pools.default
            if exchange.pool is None:
                raise NotFound("No default pool is configured for this path.", code="no_default_pool")
            return
        prompt = exchange.prompt = wire_request.read(call.body, call.endpoint, file_ids=len(self._owners) > 0)
        exchange.model = prompt.model
        check_model(call.tenant, prompt.model)
        exchange.pool = self.pools.serving(prompt.model)
        if exchange.pool.sends_cache_salt and exchange.pool.isolated:
            at = prompt.body.index(b"{") + 1
            exchange.edits = (Edit(at, at, b'"cache_salt":"%b",' % call.tenant.id.encode()),)

    async def expand(self, exchange: Exchange) -> None:
        """Put a stored context where the prompt names one."""
        call, prompt = exchange.call, exchange.prompt
        if prompt is None or call.endpoint is not _CHAT:
            return
        if prompt.may_name_context or name_context(call.headers):
            await self._contexts.expand(exchange)

    def fingerprint(self, exchange: Exchange) -> None:
        """Cut the prompt in blocks and chain their hashes; what is too short to share has none."""
        prompt, pool, call = exchange.prompt, exchange.pool, exchange.call
        if prompt is None or pool is None or not call.endpoint.is_generation:
            return
        if prompt.size_bytes >= self._min_shareable_bytes:
            salt = call.tenant.salt if pool.isolated else b""
            root = chain_root((salt, *prompt.chain_salt))
            if exchange.stored is None:
                exchange.fingerprint = cut(root, prompt.spans)
            else:
                exchange.fingerprint = extend(exchange.stored.content.chain(root), prompt.spans)

    def look_up(self, exchange: Exchange) -> None:
        """Ask the index who holds how much of it."""
        if exchange.fingerprint is not None:
            exchange.match = self._index.match(exchange.fingerprint)

    def plan(self, exchange: Exchange) -> None:
        """Choose among the pool's replicas."""
        assert exchange.pool is not None  # noqa: S101 - `read` set it or raised
        views = self._fleet.snapshot(exchange.pool.name, self._clock.monotonic())
        if exchange.avoid:
            views = tuple([view for view in views if view.name not in exchange.avoid])
        match = exchange.match or NOTHING_MATCHED
        held_back = None
        if exchange.fingerprint is not None and not self._gate.is_open:
            held_back = partial(self._gate.holds_back, exchange.fingerprint.hashes)
        exchange.plan = routing.plan(
            self._demand(exchange),
            match,
            views,
            min_shareable_bytes=self._min_shareable_bytes,
            weight_per_second=self._weight_per_second,
            held_back=held_back,
        )

    def refuse(self, exchange: Exchange, error: CairnError, client: Downstream) -> None:
        """Tell the client why there is no answer."""
        exchange.ending = Ending.UPSTREAM_FAILED if isinstance(error, UpstreamError) else Ending.REFUSED
        exchange.error_code = error.code or error.type
        answer = error_response(error, exchange.call.endpoint, request_id=exchange.call.request_id)
        exchange.status = answer.status
        request_id = (b"x-request-id", exchange.call.request_id.encode())
        client.send(answer.status, REASON_PHRASES[answer.status], (*answer.headers, request_id), answer.body)

    def _demand(self, exchange: Exchange) -> Demand:
        prompt, fingerprint, match = exchange.prompt, exchange.fingerprint, exchange.match
        pinned = self._pinned(exchange)
        if prompt is None:
            return Demand(0, 0.0, pinned_replica=pinned)
        size_bytes = prompt.size_bytes
        if fingerprint is None or match is None:
            tokens = self._tokens.predict(prompt.model, size_bytes, prompt.media)
            return Demand(size_bytes, tokens, hash(exchange.call.request_id), pinned_replica=pinned)
        tokens = self._tokens.predict(prompt.model, size_bytes, prompt.media, match.known_bytes, match.known_tokens)
        ends = fingerprint.ends
        return Demand(
            size_bytes,
            tokens,
            fingerprint.hashes[min(match.known_blocks, len(ends) - 1)],
            size_bytes - (ends[-2] if len(ends) > 1 else 0),
            pinned,
        )

    def _pinned(self, exchange: Exchange) -> int | None:
        """The replica where the object that the request names was made, where that is in the request's pool."""
        prompt = exchange.prompt
        if prompt is None:
            name = self._owners.in_path(exchange.call.target.partition("?")[0])
        else:
            name = self._owners.of(prompt.pinned_to) if prompt.pinned_to else None
        number = None if name is None else self._fleet.number_of(name)
        if number is None or exchange.pool is None:
            return None
        return number if self.pools.backends[number].pool == exchange.pool.name else None

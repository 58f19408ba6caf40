"""Implements the operations on stored contexts that the pipeline needs (`proxy.pipeline.stored_contexts`)."""

from __future__ import annotations

from proxy.contexts.api import ContextApi
from proxy.contexts.objects import checked_response
from proxy.contexts.ports import Counts, UsedContexts
from proxy.contexts.use import Use
from proxy.downstream.response import Downstream
from proxy.metrics.definitions import CONTEXT_CACHED_TOKENS, CONTEXT_USES
from proxy.model import Ending
from proxy.pipeline.admission import credentials_of
from proxy.pipeline.exchange import Exchange
from proxy.records import Call

_JSON = (b"content-type", b"application/json")


class StoredContexts:
    """The operations of one worker."""

    def __init__(self, store: UsedContexts, api: ContextApi, use: Use, counts: Counts) -> None:
        self._store = store
        self._api = api
        self._use = use
        self._counts = counts

    async def answer(self, exchange: Exchange, client: Downstream) -> None:
        """Answer a call to /v1/caching. Raises CairnError."""
        body = await self._api.answer(exchange.call)
        exchange.status, exchange.ending, exchange.response_bytes = 200, Ending.COMPLETE, len(body)
        client.send(200, b"OK", (_JSON, _request_id(exchange)), body)

    async def expand(self, exchange: Exchange) -> None:
        """Insert the context that a chat names. Raises CairnError if it cannot be used."""
        await self._use.expand(exchange)

    def tell_checked(self, exchange: Exchange, client: Downstream) -> None:
        """Answer a dry run whose context is valid."""
        stream = exchange.prompt is not None and exchange.prompt.stream
        body, content_type = checked_response(exchange.model, self._store.now(), stream=stream)
        exchange.status, exchange.ending, exchange.response_bytes = 200, Ending.COMPLETE, len(body)
        headers = ((b"content-type", content_type), *exchange.context_notes, _request_id(exchange))
        client.send(200, b"OK", headers, body)

    def settle(self, exchange: Exchange) -> None:
        """Note the end of any request, once it is settled: whether the upstream accepted the key, and the use of a
        context it named."""
        succeeded = exchange.ending is Ending.COMPLETE
        if succeeded and exchange.prompt is not None and exchange.attempt is not None and exchange.status < 300:
            tenant, pool = exchange.call.tenant, exchange.pool
            is_checked = pool is None or not pool.accepts_any_key
            if is_checked and not (tenant.is_listed or self._store.has_accepted(tenant.id)):
                self._note_accepted(exchange.call)
        if exchange.context_result and not exchange.is_warming:
            self._settle_use(exchange, succeeded=succeeded)

    def _note_accepted(self, call: Call) -> None:
        """Note that the upstream accepted the key of an unlisted tenant, unless it may have looked at another one.

        The first of several keys names the tenant. It could be made up, and another one be what was accepted.
        """
        if len(credentials_of(call.headers, call.target)) < 2:
            self._store.accepted(call.tenant.id)

    def _settle_use(self, exchange: Exchange, *, succeeded: bool) -> None:
        self._counts.inc(CONTEXT_USES, (exchange.context_result,))
        stored = exchange.stored
        if stored is None or exchange.only_checked or not succeeded:
            return
        self._store.used(exchange.call.tenant.id, stored.row, stored.reset_ttl_seconds)
        counted = exchange.counted_usage
        if counted is not None and counted.cached_tokens:
            self._counts.inc(CONTEXT_CACHED_TOKENS, (), counted.cached_tokens)


def _request_id(exchange: Exchange) -> tuple[bytes, bytes]:
    return (b"x-request-id", exchange.call.request_id.encode())

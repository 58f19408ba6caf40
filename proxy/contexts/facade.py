"""What the pipeline asks of stored contexts, in four verbs. It must not know how any of them is done."""

from __future__ import annotations

from cache import ContextStore
from proxy.contexts.api import ContextApi
from proxy.contexts.objects import checked_response
from proxy.contexts.use import Use
from proxy.downstream.response import Downstream
from proxy.metrics.definitions import CONTEXT_CACHED_TOKENS, CONTEXT_USES
from proxy.metrics.recorder import Recorder
from proxy.model import Ending
from proxy.pipeline.exchange import Exchange

_JSON = (b"content-type", b"application/json")


class StoredContexts:
    """One per worker."""

    def __init__(self, store: ContextStore, api: ContextApi, use: Use, recorder: Recorder) -> None:
        self._store = store
        self._api = api
        self._use = use
        self._recorder = recorder

    async def answer(self, exchange: Exchange, client: Downstream) -> None:
        """A call to /v1/caching. Raises CairnError."""
        body = await self._api.answer(exchange.call)
        exchange.status, exchange.ending, exchange.response_bytes = 200, Ending.COMPLETE, len(body)
        client.send(200, b"OK", (_JSON, _request_id(exchange)), body)

    async def expand(self, exchange: Exchange) -> None:
        """Put in the context that a chat names; raises CairnError where it cannot be used."""
        await self._use.expand(exchange)

    def tell_checked(self, exchange: Exchange, client: Downstream) -> None:
        """Answer a dry run, whose context was found good."""
        stream = exchange.prompt is not None and exchange.prompt.stream
        body, content_type = checked_response(exchange.model, self._store.now(), stream=stream)
        exchange.status, exchange.ending, exchange.response_bytes = 200, Ending.COMPLETE, len(body)
        headers = ((b"content-type", content_type), *exchange.context_notes, _request_id(exchange))
        client.send(200, b"OK", headers, body)

    def settle(self, exchange: Exchange) -> None:
        """A chat that named a context has ended: what became of it is counted, and where it went well it was used."""
        stored = exchange.stored
        if exchange.is_warming:
            return
        self._recorder.inc(CONTEXT_USES, (exchange.context_result,))
        if stored is None or exchange.only_checked or exchange.ending is not Ending.COMPLETE:
            return
        self._store.used(exchange.call.tenant.id, stored.row, stored.reset_ttl_seconds)
        if exchange.usage is not None and exchange.usage.cached_tokens:
            self._recorder.inc(CONTEXT_CACHED_TOKENS, (), exchange.usage.cached_tokens)


def _request_id(exchange: Exchange) -> tuple[bytes, bytes]:
    return (b"x-request-id", exchange.call.request_id.encode())

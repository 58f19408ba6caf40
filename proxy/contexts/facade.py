"""What the pipeline asks of stored contexts, in four verbs. It must not know how any of them is done."""

from __future__ import annotations

from cache import ContextStore
from proxy.contexts.api import ContextApi
from proxy.contexts.objects import checked_answer
from proxy.contexts.use import Use
from proxy.downstream import Downstream
from proxy.journey import Journey
from proxy.metrics import CONTEXT_CACHED_TOKENS, CONTEXT_USES
from proxy.model import Ending
from proxy.recorder import Recorder

_JSON = (b"content-type", b"application/json")


class StoredContexts:
    """One per worker."""

    def __init__(self, store: ContextStore, api: ContextApi, use: Use, recorder: Recorder) -> None:
        self._store = store
        self._api = api
        self._use = use
        self._recorder = recorder

    async def answer(self, journey: Journey, client: Downstream) -> None:
        """A call to /v1/caching. Raises CairnError."""
        body = await self._api.answer(journey.call)
        journey.status, journey.ending, journey.answer_bytes = 200, Ending.COMPLETE, len(body)
        client.send(200, b"OK", (_JSON, _request_id(journey)), body)

    async def expand(self, journey: Journey) -> None:
        """Put in the context that a chat names; raises CairnError where it cannot be used."""
        await self._use.expand(journey)

    def tell_checked(self, journey: Journey, client: Downstream) -> None:
        """Answer a dry run, whose context was found good."""
        stream = journey.prompt is not None and journey.prompt.stream
        body, content_type = checked_answer(journey.model, self._store.now(), stream=stream)
        journey.status, journey.ending, journey.answer_bytes = 200, Ending.COMPLETE, len(body)
        headers = ((b"content-type", content_type), *journey.context_notes, _request_id(journey))
        client.send(200, b"OK", headers, body)

    def settle(self, journey: Journey) -> None:
        """A chat that named a context has ended: what became of it is counted, and where it went well it was used."""
        stored = journey.stored
        if journey.is_warming:
            return
        self._recorder.inc(CONTEXT_USES, (journey.context_result,))
        if stored is None or journey.only_checked or journey.ending is not Ending.COMPLETE:
            return
        self._store.used(journey.call.tenant.id, stored.row, stored.reset_ttl_seconds)
        if journey.usage is not None and journey.usage.cached_tokens:
            self._recorder.inc(CONTEXT_CACHED_TOKENS, (), journey.usage.cached_tokens)


def _request_id(journey: Journey) -> tuple[bytes, bytes]:
    return (b"x-request-id", journey.call.request_id.encode())

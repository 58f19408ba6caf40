"""The phases of a request in their order; start reading at `Pipeline.handle`.

Reader and planner decide, the relay acts, and the `Exchange` records the result of each phase.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from proxy.downstream.response import Downstream
from proxy.errors import REASON_PHRASES, CairnError, UnknownObject, UpstreamError
from proxy.model import Ending, Endpoint
from proxy.pipeline.dispatch import Upload
from proxy.pipeline.exchange import Exchange, TakesLong
from proxy.pipeline.stored_contexts import StoredContexts
from proxy.records import Call, Tenant
from proxy.routing.cold_turn import Verdict
from proxy.wire.errors import error_event, error_response
from proxy.wire.headers import names_context

OBJECT_NEWS_SECONDS: Final = 0.05
"""Time in which an object that was created at another worker becomes known here; ten intervals of the journal."""

# constants: looking up a member of an enum takes 70 ns, while a constant is free in compiled code
_CHAT: Final = Endpoint.CHAT
_MODELS: Final = Endpoint.MODELS
_CACHING: Final = Endpoint.CACHING
_COMPLETE: Final = Ending.COMPLETE


class Reading(Protocol):
    """Phase 2, by `RequestReader`."""

    def read(self, exchange: Exchange) -> None:
        """Find model, pool and objects. Raises CairnError, and UnknownObject for an object that is not known here."""
        ...

    async def check_inserted(self, exchange: Exchange) -> None:
        """Check the models and objects that an inserted context names. Raises like `read`."""
        ...

    def checked(self, exchange: Exchange, upload: Upload, news: Callable[[], Awaitable[None]]) -> Upload:
        """Return a body that passes unread; what must be known of it is read as it passes. Raises CairnError.

        `news` waits for what other workers have announced.
        """
        ...


class Planning(Protocol):
    """Phases 4 to 6, by `Planner`."""

    def fingerprint(self, exchange: Exchange) -> None:
        """Hash the prompt in blocks."""
        ...

    def look_up(self, exchange: Exchange) -> None:
        """Find which replica holds how much of it."""
        ...

    def plan(self, exchange: Exchange) -> None:
        """Order the replicas. Raises Overloaded."""
        ...

    def note_answered(self, exchange: Exchange) -> None:
        """Remember that the tenant has had this prompt answered."""
        ...


class Relaying(Protocol):
    """Phase 7, by `Relay`."""

    async def run(self, exchange: Exchange, downstream: Downstream, upload: Upload | None = None) -> None:
        """Send the request and pass the response on. Raises CairnError while nothing of a response was written."""
        ...

    def accompany(self, exchange: Exchange, downstream: Downstream) -> None:
        """Send comments to the client of a stream until the response begins."""
        ...

    def release(self, exchange: Exchange) -> None:
        """Stop sending these comments."""
        ...


class ModelListing(Protocol):
    """The list of models, by `ModelsEndpoint`."""

    def merges_for(self, tenant: Tenant) -> bool:
        """Return True if the list must be merged here."""
        ...

    async def answer(self, exchange: Exchange, client: Downstream) -> None:
        """Write the list. Raises UpstreamError."""
        ...


class Settling(Protocol):
    """Phase 8, by `Settlement`."""

    def settle(self, exchange: Exchange) -> object:
        """Learn from a finished request, count and log it."""
        ...


class Admitting(Protocol):
    """The step between plan and relay, by `ColdTurns`."""

    def admit(self, exchange: Exchange) -> Awaitable[None] | None:
        """Return what to await before the request may be sent, None if it may be sent now.

        Raises CairnError if the request is refused; so does the awaitable.
        """
        ...

    def judge(self, exchange: Exchange) -> Verdict | None:
        """Return whether the request would wait now; None if such requests never wait. Changes nothing."""
        ...

    def settle(self, exchange: Exchange) -> None:
        """Learn from a finished request, and give back what it holds."""
        ...


class Pipeline:
    """Takes each request through its phases. One per worker."""

    def __init__(
        self,
        reader: Reading,
        planner: Planning,
        relay: Relaying,
        models_endpoint: ModelListing,
        settlement: Settling,
        contexts: StoredContexts,
        cold_turns: Admitting,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._reader = reader
        self._planner = planner
        self._relay = relay
        self._models_endpoint = models_endpoint
        self._settlement = settlement
        self._contexts = contexts
        self._sleep = sleep
        self._reads_aside = asyncio.Semaphore(1)
        self.cold_turns = cold_turns

    def handle(self, call: Call, client: Downstream, upload: Upload | None = None) -> Awaitable[None]:
        """Answer an admitted call when the result is awaited.

        Args:
            call: the request.
            client: receives the response.
            upload: the body, if it is passed through unread.

        Raises:
            ConnectionResetError: the client left.
        """
        return self.run(Exchange(call), client, upload)

    async def run(self, exchange: Exchange, client: Downstream, upload: Upload | None = None) -> None:
        """Answer as `handle` does, for an exchange that the caller reads afterwards."""
        call = exchange.call
        try:
            if call.endpoint is _CACHING:
                await self._contexts.answer(exchange, client)
                return
            if call.endpoint is _MODELS and self._models_endpoint.merges_for(call.tenant):
                await self._models_endpoint.answer(exchange, client)
                return
            wait = self._read(exchange)
            if wait is not None:  # rare; a coroutine costs more than this question
                await wait
            self._choose(exchange)
            if exchange.only_checked:
                self._contexts.tell_checked(exchange, client)
                return
            self._relay.accompany(exchange, client)
            wait = self.cold_turns.admit(exchange)
            if wait is not None:
                await wait
            if upload is not None:
                upload = self._reader.checked(exchange, upload, self._news)
            await self._relay.run(exchange, client, upload)
        except CairnError as error:
            self._refuse(exchange, error, client)
        finally:
            self._relay.release(exchange)
            if exchange.ending is _COMPLETE:
                self._planner.note_answered(exchange)
            self._settlement.settle(exchange)
            self.cold_turns.settle(exchange)
            self._contexts.settle(exchange)

    async def decide(self, exchange: Exchange) -> None:
        """Run the phases from the body to the plan. Changes only the exchange. Raises CairnError."""
        wait = self._read(exchange)
        if wait is not None:
            await wait
        self._choose(exchange)

    def _read(self, exchange: Exchange) -> Awaitable[None] | None:
        """Read the body; return what to await before the prompt is complete, None if it is."""
        try:
            is_known = self._object_is_known(exchange)
        except TakesLong:
            return self._complete_long(exchange)
        if is_known and not self._names_context(exchange):
            return None
        return self._complete(exchange, is_known)

    async def _news(self) -> None:
        """Wait for news of objects that were created at other workers."""
        await self._sleep(OBJECT_NEWS_SECONDS)

    async def _complete(self, exchange: Exchange, object_is_known: bool) -> None:
        """Wait for news of the object that the request names, and insert the stored context that it names."""
        if not object_is_known:
            await self._news()
            self._reader.read(exchange)
        if self._names_context(exchange):
            await self._insert_context(exchange)

    async def _insert_context(self, exchange: Exchange) -> None:
        """Insert the stored context that the prompt names, if the client may use what that names in turn."""
        await self._contexts.expand(exchange)
        if not await self._inserted_is_known(exchange):
            await self._news()
            await self._reader.check_inserted(exchange)

    async def _inserted_is_known(self, exchange: Exchange) -> bool:
        try:
            await self._reader.check_inserted(exchange)
        except UnknownObject:
            return False
        return True

    async def _complete_long(self, exchange: Exchange) -> None:
        """Read a body in a thread, then do the same as `_complete`."""
        unknown = await self._read_aside(exchange)
        if unknown is not None:
            await self._news()
            unknown = await self._read_aside(exchange)
        if unknown is not None:
            raise unknown
        if self._names_context(exchange):
            await self._insert_context(exchange)

    async def _read_aside(self, exchange: Exchange) -> UnknownObject | None:
        """Read the body in a thread, one at a time: several would take the interpreter from the loop in turn.

        The thread goes on if the client leaves, so it has an exchange of its own. Return the error if the body names
        an object that is not known here, and raise any other.
        """
        draft = Exchange(exchange.call)
        draft.only_explained = draft.is_read_aside = True  # an explanation is not traced; the request itself is
        unknown: UnknownObject | None = None
        async with self._reads_aside:
            try:
                await asyncio.to_thread(self._reader.read, draft)
            except UnknownObject as error:
                unknown = error
            finally:
                exchange.take_reading(draft)
        return unknown

    def _choose(self, exchange: Exchange) -> None:
        """Run the phases from the complete prompt to the plan."""
        self._planner.fingerprint(exchange)
        self._planner.look_up(exchange)
        self._planner.plan(exchange)

    def _object_is_known(self, exchange: Exchange) -> bool:
        """Read the body; return False if it names an object that another worker may not have announced yet."""
        try:
            self._reader.read(exchange)
        except UnknownObject:
            return False
        return True

    def _names_context(self, exchange: Exchange) -> bool:
        """Return True if the prompt may name a stored context, which is then inserted."""
        call, prompt = exchange.call, exchange.prompt
        if prompt is None or call.endpoint is not _CHAT:
            return False
        return prompt.may_name_context or names_context(call.headers)

    def turn_away(self, call: Call, error: CairnError, client: Downstream) -> None:
        """Answer a call that was not admitted with `error`; it is counted and logged like any other."""
        exchange = Exchange(call)
        self._refuse(exchange, error, client)
        self._settlement.settle(exchange)

    def _refuse(self, exchange: Exchange, error: CairnError, client: Downstream) -> None:
        exchange.ending = Ending.UPSTREAM_FAILED if isinstance(error, UpstreamError) else Ending.REFUSED
        exchange.error_code = error.code or error.type
        call = exchange.call
        response = error_response(error, call.endpoint, request_id=call.request_id)
        exchange.status = response.status
        if exchange.waiting is not None and exchange.waiting.head_sent:
            exchange.waiting.end_with(error_event(error, call.endpoint, request_id=call.request_id))
            return
        request_id = (b"x-request-id", call.request_id.encode())
        client.send(
            response.status,
            REASON_PHRASES[response.status],
            (*response.headers, request_id, *exchange.tried_note()),
            response.body,
        )

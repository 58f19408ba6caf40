"""A stored context in a chat request: found, checked and spliced in before the prompt is fingerprinted.

It must not know Redis, replicas or prices.
"""

from __future__ import annotations

from msgspec.structs import replace

from cache import CacheError, Content, ContextRow, ContextStatus, ContextStore, StoreCorrupt, UnknownContext
from proxy.contexts import failures
from proxy.model import Media, Prompt
from proxy.pipeline.exchange import Exchange, StoredUse
from proxy.wire import contexts as wire
from proxy.wire.contexts import Named, Reference, Spliced

_NOTE = b"x-cairn-context"  # why a context under a header was not used


class Use:
    """Puts contexts into exchanges. One per worker."""

    def __init__(self, store: ContextStore) -> None:
        self._store = store

    async def expand(self, exchange: Exchange) -> None:
        """Put the context in that the request names by a message or a header; without one nothing happens.

        Raises BadRequest, ContextNotFound, ContextsAway and ContextDamaged.
        """
        prompt = exchange.prompt
        if prompt is None:
            return
        if prompt.may_name_context and (named := wire.named_in(prompt)) is not None:
            await self._expand_named(exchange, prompt, named)
        elif (reference := wire.reference_in(exchange.call.headers)) is not None:
            await self._expand_repeated(exchange, prompt, reference)

    async def _expand_named(self, exchange: Exchange, prompt: Prompt, named: Named) -> None:
        try:
            row, content = await self._find(exchange.call.tenant.id, named.reference)
        except CacheError as error:
            exchange.context_result = _result(error)
            raise failures.shown(error) from None
        if self._is_over(row, named.reference):
            exchange.context_result = "inactive"
            raise failures.inactive()
        spliced = wire.splice_named(prompt, named, content.tools, content.messages)
        # what was sent again is in the body, where its media were found already; what is only named is not
        prompt = replace(prompt, media=tuple([Media(*each) for each in row.head.media]) + prompt.media)
        self._take(exchange, prompt, row, content, named.reference, spliced)

    async def _expand_repeated(self, exchange: Exchange, prompt: Prompt, reference: Reference) -> None:
        """The whole prompt is there, so what is wrong with the context costs its saving and not the answer."""
        try:
            row, content = await self._find(exchange.call.tenant.id, reference)
        except UnknownContext as error:
            exchange.context_result = _result(error)
            raise failures.shown(error) from None
        except CacheError as error:
            _go_on(exchange, _result(error))
            return
        if self._is_over(row, reference):
            _go_on(exchange, "inactive")
            return
        spliced = wire.splice_repeated(prompt, content.tools, content.messages, content.message_views())
        if isinstance(spliced, str):
            _go_on(exchange, "differs", spliced)
        else:
            self._take(exchange, prompt, row, content, reference, spliced)

    async def _find(self, tenant: str, reference: Reference) -> tuple[ContextRow, Content]:
        if reference.tag is not None:
            row = await self._store.tagged(tenant, reference.tag)
        elif reference.id is not None:
            row = await self._store.known_row(tenant, reference.id)
        else:
            raise UnknownContext("There is no such context.")
        return row, await self._store.content(tenant, row)

    def _is_over(self, row: ContextRow, reference: Reference) -> bool:
        return row.status(self._store.now()) is ContextStatus.INACTIVE and reference.reset_ttl_seconds is None

    def _take(
        self,
        exchange: Exchange,
        prompt: Prompt,
        row: ContextRow,
        content: Content,
        reference: Reference,
        spliced: Spliced,
    ) -> None:
        exchange.context_result = "used"
        reset = None if reference.dry_run else reference.reset_ttl_seconds
        ends = row.expires_unix_seconds if reset is None else self._store.now() + reset
        exchange.stored = StoredUse(row, content, ends, reset)
        size_bytes = content.span_bytes + sum(map(len, spliced.rest))
        exchange.prompt = replace(prompt, spans=spliced.rest, size_bytes=size_bytes)
        exchange.edits += spliced.edits
        exchange.only_checked = reference.dry_run
        exchange.context_notes = (
            (b"msh-context-cache-id", row.id.encode()),
            (b"msh-context-cache-token-exp", b"%d" % int(ends)),
        )


def _go_on(exchange: Exchange, why: str, where: str = "") -> None:
    """As sent, without the context."""
    exchange.context_result = why
    note = f"{why};{where}" if where else why
    exchange.context_notes = ((_NOTE, note.encode()),)


def _result(error: CacheError) -> str:
    if isinstance(error, UnknownContext):
        return "unknown"
    return "damaged" if isinstance(error, StoreCorrupt) else "unavailable"

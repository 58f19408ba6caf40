"""Use a stored context in a chat request: find it, check it, and splice it in before the prompt is fingerprinted."""

from __future__ import annotations

from dataclasses import replace

from cache import CacheError, Content, ContextRow, ContextStatus, StoreCorrupt, UnknownContext
from proxy.contexts import failures
from proxy.contexts.ports import FoundContexts
from proxy.pipeline.exchange import Exchange, StoredUse
from proxy.records import Media, Prompt
from proxy.wire import contexts as wire
from proxy.wire.contexts import Named, Reference, Spliced

_NOTE = b"x-cairn-context"  # explains to the client why a context that a header named was not used


class Use:
    """Inserts contexts into exchanges. One per worker."""

    def __init__(self, store: FoundContexts) -> None:
        self._store = store

    async def expand(self, exchange: Exchange) -> None:
        """Insert the context that the request names by a message or a header; do nothing if it names none.

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
        if self._has_expired(row, named.reference):
            exchange.context_result = "inactive"
            raise failures.inactive()
        spliced = wire.splice_named(prompt, named, content.tools, content.messages)
        # the media of repeated messages were found in the body already; those of a named context were not
        prompt = replace(prompt, media=tuple([Media(*each) for each in row.head.media]) + prompt.media)
        self._insert(exchange, prompt, (row, content), named.reference, spliced)

    async def _expand_repeated(self, exchange: Exchange, prompt: Prompt, reference: Reference) -> None:
        """Insert a context whose messages the request repeats.

        The request contains the whole prompt, so if the context cannot be used it is served all the same.
        """
        try:
            row, content = await self._find(exchange.call.tenant.id, reference)
        except UnknownContext as error:
            exchange.context_result = _result(error)
            raise failures.shown(error) from None
        except CacheError as error:
            _continue_without(exchange, _result(error))
            return
        if self._has_expired(row, reference):
            _continue_without(exchange, "inactive")
            return
        spliced = wire.splice_repeated(prompt, content.tools, content.messages, content.message_views())
        if isinstance(spliced, str):
            _continue_without(exchange, "differs", spliced)
        else:
            self._insert(exchange, prompt, (row, content), reference, spliced)

    async def _find(self, tenant: str, reference: Reference) -> tuple[ContextRow, Content]:
        if reference.tag is not None:
            row = await self._store.tagged(tenant, reference.tag)
        elif reference.id is not None:
            row = await self._store.known_row(tenant, reference.id)
        else:
            raise UnknownContext("There is no such context.")
        return row, await self._store.content(tenant, row)

    def _has_expired(self, row: ContextRow, reference: Reference) -> bool:
        return row.status(self._store.now()) is ContextStatus.INACTIVE and reference.reset_ttl_seconds is None

    def _insert(
        self,
        exchange: Exchange,
        prompt: Prompt,
        found: tuple[ContextRow, Content],
        reference: Reference,
        spliced: Spliced,
    ) -> None:
        row, content = found
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


def _continue_without(exchange: Exchange, why: str, where: str = "") -> None:
    exchange.context_result = why
    note = f"{why};{where}" if where else why
    exchange.context_notes = ((_NOTE, note.encode()),)


def _result(error: CacheError) -> str:
    if isinstance(error, UnknownContext):
        return "unknown"
    return "damaged" if isinstance(error, StoreCorrupt) else "unavailable"

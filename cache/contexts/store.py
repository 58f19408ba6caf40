"""Stored contexts: made whole or not at all, found by id or tag, discarded by worth when room is needed.

What a worker has read it keeps in memory: contents in bytes (`context_bytes`), rows and tags until a message on the
channel says that they are not what they were (`context_memory`). While Redis is away what is in memory goes on being
served. Expiry is judged by Redis's clock, whose offset every reply tells. It knows no HTTP, no prompt and no model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from cache.contexts import scripts
from cache.contexts.access import Access, ContextLimits, milliseconds
from cache.contexts.bytes import ContextBytes
from cache.contexts.listing import Listing
from cache.contexts.memory import ContextMemory
from cache.contexts.room import ContextRoom
from cache.contexts.rows import ContextRow, ContextStatus, Draft, Head, Tag, encode_head, pins
from cache.contexts.segments import Packed
from cache.contexts.uses import ContextUses
from cache.errors import CacheError, PastExpiry, QuotaFull, StoreCorrupt, UnknownContext
from cache.ports import Clock, Tasks
from cache.store.store import Store

REREAD_LIMIT_SECONDS = 0.05  # to read again what is remembered; what is not remembered has to be waited for
COMMIT_TRIES = 5

T = TypeVar("T")


class ContextStore:
    """One per worker. `evicted` is told why (a word) and how many; `damaged` of content that fails its digest."""

    def __init__(
        self,
        store: Store,
        limits: ContextLimits,
        *,
        clock: Clock,
        tasks: Tasks,
        evicted: Callable[[str, int], None],
        damaged: Callable[[], None],
    ) -> None:
        self._tasks = tasks
        self._access = Access(store, limits, clock)
        self._bytes = ContextBytes(self._access, tasks, damaged)
        self._listing = Listing(self._access)
        self._memory = ContextMemory(store)
        self._uses = ContextUses(self._access)
        self._room = ContextRoom(self._access, self._listing, evicted)
        self._running: list[asyncio.Task[Any]] = []
        # what a part answers by itself
        self.now = self._access.now
        self.content = self._bytes.content
        self.ids, self.rows, self.some_rows = self._listing.ids, self._listing.rows, self._listing.some_rows
        self.tags = self._listing.tags
        self.receive = self._memory.receive
        self.flush = self._uses.flush
        self.sweep, self.survey = self._room.sweep, self._room.survey

    # --- life

    async def start(self) -> None:
        """Begin to listen, to tell of uses and to sweep."""
        self._running = [
            self._tasks.start(self._memory.run(), "contexts-listen"),
            self._tasks.start(self._uses.run(), "contexts-flush"),
            self._tasks.start(self._room.run_sweeps(), "contexts-sweep"),
            self._tasks.start(self._room.run_surveys(), "contexts-survey"),
        ]

    async def close(self) -> None:
        """Tell of the last uses and end."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
            await self.flush()
        self._running = []

    def adopt(self, limits: ContextLimits) -> None:
        """Work by other limits: budgets at the next creation, times at the next change of each context."""
        self._access.limits = limits
        self._bytes.contents.limit(limits.memory_bytes)

    @property
    def total_bytes(self) -> int:
        """What all tenants' contexts take, as last heard."""
        return self._room.total_bytes

    @property
    def total_contexts(self) -> int:
        """How many there are of all tenants, as last heard."""
        return self._room.total_contexts

    @property
    def most_worth(self) -> tuple[ContextRow, ...]:
        """Those that are worth most, as last looked."""
        return self._room.most_worth

    # --- making

    async def create(self, tenant: str, draft: Draft) -> ContextRow:
        """Store `draft`, whole or not at all, discarding what is worth least where room is needed.

        Raises QuotaFull, PastExpiry, StoreUnavailable and the store's other errors.
        """
        packed = await self._bytes.pack(draft)
        head = encode_head(
            Head(draft.model, draft.name, draft.description, packed.digest, draft.size_bytes, draft.media)
        )
        compressed: dict[bytes, bytes] = {}
        for _ in range(COMMIT_TRIES):
            extra_bytes = sum(map(len, compressed.values()))
            await self._room.make_over_all(extra_bytes)
            reply = await self._commit(tenant, draft, head, packed, extra_bytes)
            word = reply[0]
            if word == b"ok":
                await self._room.changed(tenant, reply[2] if len(reply) > 2 else None)
                self._bytes.keep(tenant, draft, packed)
                return await self.row(tenant, draft.id)
            if word == b"full":
                await self._room.make(tenant, int(reply[1]))
            elif word == b"missing" and not compressed:
                wanted = [bytes.fromhex(name.decode()) for name in reply[1]]
                compressed = await self._bytes.compress(draft, packed, wanted)
            elif word == b"missing":
                await self._bytes.upload(tenant, compressed)
                compressed = {}
            else:
                raise _refusal(word)
        raise QuotaFull("Stored contexts change too fast to make room for another.")

    async def _commit(self, tenant: str, draft: Draft, head: bytes, packed: Packed, extra_bytes: int) -> Any:
        limits = self._access.limits
        return await self._access.run(
            scripts.COMMIT,
            tenant,
            draft.id,
            head,
            packed.manifest,
            "".join(digest.hex() for digest in packed.segments),
            msgspec.msgpack.encode(draft.metadata),
            int(draft.pinned),
            milliseconds(draft.expires_unix_seconds),
            milliseconds(draft.ttl_seconds),
            milliseconds(limits.grace_seconds),
            limits.tenant_bytes,
            limits.pinned_bytes,
            limits.contexts_at_most,
            limits.tags_at_most,
            draft.status.value,
            draft.tokens,
            draft.value_usd,
            milliseconds(limits.warming_seconds),
            " ".join(draft.tags),
            extra_bytes,
        )

    # --- finding

    async def row(self, tenant: str, context_id: str) -> ContextRow:
        """What is known of a context, read anew. Raises UnknownContext."""
        since = self._memory.moment()
        found = (await self._listing.read(tenant, [context_id]))[0]
        if found is None:
            self._memory.drop_row(tenant, context_id)
            raise UnknownContext("There is no such context.")
        self._memory.keep_row(tenant, found, since)
        return found

    async def known_row(self, tenant: str, context_id: str) -> ContextRow:
        """The same, from memory where that is up to date, or where Redis is away."""
        remembered = self._memory.row(tenant, context_id)
        if remembered is None:
            return await self.row(tenant, context_id)
        row = remembered.value
        if self._memory.is_current(remembered) and row.expires_unix_seconds > self.now():
            return row
        return await _or_remembered(self.row(tenant, context_id), row)

    async def tag(self, tenant: str, tag: str) -> Tag:
        """What a tag names, read anew. Raises UnknownContext."""
        since = self._memory.moment()
        found = await self._listing.tag(tenant, tag)
        if found is None:
            self._memory.drop_tag(tenant, tag)
            raise UnknownContext("There is no such tag.")
        self._memory.keep_tag(tenant, found, since)
        return found

    async def tagged(self, tenant: str, tag: str) -> ContextRow:
        """The context that a tag names, whole as it was or as it is: never between two. Raises UnknownContext."""
        known = await self._known_tag(tenant, tag)
        try:
            return await self.known_row(tenant, known.context_id)
        except UnknownContext:
            # the tag moved and what it named before was deleted, and only the second has been heard of
            moved = await self.tag(tenant, tag)
            return await self.row(tenant, moved.context_id)

    async def _known_tag(self, tenant: str, tag: str) -> Tag:
        remembered = self._memory.tag(tenant, tag)
        if remembered is None:
            return await self.tag(tenant, tag)
        if self._memory.is_current(remembered):
            return remembered.value
        return await _or_remembered(self.tag(tenant, tag), remembered.value)

    # --- changing

    async def update(
        self,
        tenant: str,
        context_id: str,
        *,
        metadata: dict[str, str] | None = None,
        ttl_seconds: float | None = None,
        expires_unix_seconds: float | None = None,
    ) -> ContextRow:
        """Change what is given; a new end revives what is inactive. Raises UnknownContext, PastExpiry, QuotaFull."""
        limits = self._access.limits
        reply = await self._access.run(
            scripts.UPDATE,
            tenant,
            context_id,
            b"" if metadata is None else msgspec.msgpack.encode(metadata),
            "" if metadata is None else int(pins(metadata)),
            milliseconds(expires_unix_seconds),
            milliseconds(ttl_seconds),
            milliseconds(limits.grace_seconds),
            limits.pinned_bytes,
        )
        if reply[0] != b"ok":
            raise _refusal(reply[0])
        return await self.row(tenant, context_id)

    async def delete(self, tenant: str, context_id: str) -> None:
        """Take a context away, with its tags. Raises UnknownContext."""
        self._memory.drop_row(tenant, context_id)
        if not await self._room.drop(tenant, "any", [context_id], "deleted"):
            raise UnknownContext("There is no such context.")

    async def finish(
        self, tenant: str, context_id: str, tokens: int, value_usd: float, problem: tuple[str, str] | None = None
    ) -> None:
        """The warming has ended: with the upstream's count of tokens, or with a problem's type and message."""
        status = ContextStatus.READY if problem is None else ContextStatus.ERROR
        encoded = b"" if problem is None else msgspec.msgpack.encode(problem)
        await self._access.run(scripts.FINISH, tenant, context_id, status.value, tokens, value_usd, encoded)

    def used(self, tenant: str, row: ContextRow, reset_ttl_seconds: float | None) -> None:
        """A context was used with success; Redis hears of it within some milliseconds."""
        self._uses.add(tenant, row.id, reset_ttl_seconds)
        if reset_ttl_seconds is not None:
            self._memory.postpone(tenant, row.id, self.now() + reset_ttl_seconds)

    async def set_tag(self, tenant: str, tag: str, context_id: str) -> Tag:
        """Make a tag, or move it. Raises UnknownContext, QuotaFull."""
        reply = await self._access.run(scripts.TAG, tenant, tag, context_id, self._access.limits.tags_at_most)
        if reply[0] != b"ok":
            raise _refusal(reply[0])
        return Tag(tag, context_id, int(reply[1]) / 1000)

    async def delete_tag(self, tenant: str, tag: str) -> None:
        """Take a tag away, if it is there."""
        self._memory.drop_tag(tenant, tag)
        await self._access.run(scripts.UNTAG, tenant, tag)


async def _or_remembered(reading: Awaitable[T], remembered: T) -> T:
    """What is read, or what is remembered where Redis does not say so at once."""
    try:
        async with asyncio.timeout(REREAD_LIMIT_SECONDS):
            return await reading
    except UnknownContext:
        raise
    except (CacheError, TimeoutError):
        return remembered


def _refusal(word: bytes) -> CacheError:
    reasons: dict[bytes, CacheError] = {
        b"unknown": UnknownContext("There is no such context."),
        b"past": PastExpiry("The end lies in the past."),
        b"pins": QuotaFull("The quota of pinned contexts is full."),
        b"many": QuotaFull("There are as many stored contexts as may be."),
        b"tags": QuotaFull("There are as many tags as may be."),
    }
    return reasons.get(word) or StoreCorrupt("a script said what it should not")

"""Stored contexts: create them atomically, find them by id or tag, discard those worth least if room is needed.

A worker keeps what it has read: contents in a bounded number of bytes (`content_cache`), rows and tags until a
message on the channel names them (`memory`). While Redis is away, what is in memory is still served. Expiry is
decided by Redis's clock, whose offset is learned from every reply.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from cache.contexts import scripts
from cache.contexts.accepted import AcceptedTenants
from cache.contexts.access import Access, ContextLimits, Trust, milliseconds
from cache.contexts.bytes import ContextBytes
from cache.contexts.listing import Listing
from cache.contexts.memory import ContextMemory
from cache.contexts.room import ContextRoom, Totals, read_totals
from cache.contexts.rows import ContextRow, ContextStatus, Draft, Head, Tag, encode_head, pins
from cache.contexts.segments import Content, Packed
from cache.contexts.uses import ContextUses
from cache.errors import CacheError, PastExpiry, PinRefused, QuotaFull, StoreCorrupt, UnknownContext
from cache.ports import Clock, Tasks
from cache.store.store import Store

REREAD_LIMIT_SECONDS = 0.05  # for reading a remembered value again; a value that is not remembered is waited for
COMMIT_TRIES = 5
_RESERVATION_BYTES = 8

T = TypeVar("T")


class _Reply(msgspec.Struct, frozen=True):
    """A reply of the scripts that change one context."""

    word: bytes
    over_bytes: int = 0
    missing: tuple[bytes, ...] = ()
    now_ms: int = 0
    totals: Totals | None = None


class ContextStore:
    """One per worker. `evicted` gets a reason and a number of contexts; `damaged` is called for each damage."""

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
        self._listing = Listing(self._access, damaged)
        self._memory = ContextMemory(store)
        self._uses = ContextUses(self._access)
        self._room = ContextRoom(self._access, self._listing, evicted)
        self._accepted = AcceptedTenants(self._access)
        self._running: list[asyncio.Task[Any]] = []

    # --- start and end

    async def start(self) -> None:
        """Begin to listen, to report uses and to sweep."""
        self._running = [
            self._tasks.keep(self._memory.run, "contexts-listen"),
            self._tasks.keep(self._uses.run, "contexts-uses"),
            self._tasks.keep(self._accepted.run, "contexts-accepted"),
            self._tasks.keep(self._room.run_sweeps, "contexts-sweep"),
            self._tasks.keep(self._room.run_surveys, "contexts-survey"),
        ]

    async def close(self) -> None:
        """Report the last uses and end."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
            await self.flush()
        self._running = []

    def adopt(self, limits: ContextLimits) -> None:
        """Replace the limits: budgets apply from the next creation, times from the next change of each context."""
        self._access.limits = limits
        self._bytes.contents.limit(limits.memory_bytes)

    async def flush(self) -> None:
        """Report the uses so far to Redis."""
        await self._uses.flush()

    async def sweep(self) -> None:
        """Delete expired contexts and correct the totals. Raises CacheError."""
        await self._room.sweep()

    async def survey(self) -> None:
        """Determine which contexts are worth most. Raises CacheError."""
        await self._room.survey()

    def receive(self, payload: bytes) -> None:
        """Handle one message of the channel."""
        self._memory.receive(payload)

    def now(self) -> float:
        """Return seconds since 1970 by Redis's clock."""
        return self._access.now()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tenants' contexts, as last read."""
        return self._room.total_bytes

    @property
    def memory_bytes(self) -> int:
        """Memory of the contents that this worker keeps."""
        return self._bytes.contents.size_bytes

    @property
    def total_contexts(self) -> int:
        """Number of all tenants' contexts, as last read."""
        return self._room.total_contexts

    @property
    def dropped(self) -> dict[str, int]:
        """Damaged values that were read, and values that waited for Redis for too long, by kind."""
        return {
            "context_total": self._room.dropped_totals,
            "context_message": self._memory.dropped_messages,
            "context_use": self._uses.dropped,
            "accepted_key": self._accepted.dropped,
        }

    @property
    def most_worth(self) -> tuple[ContextRow, ...]:
        """The contexts that are worth most, as last determined."""
        return self._room.most_worth

    # --- creating

    async def create(self, tenant: str, draft: Draft, trust: Trust = Trust.LISTED) -> ContextRow:
        """Store `draft`, whole or not at all; if room is needed, discard the contexts worth least.

        Raises QuotaFull, PinRefused, PastExpiry, StoreUnavailable and the store's other errors.
        """
        if draft.pinned:
            _check_may_pin(trust)
        packed = await self._bytes.pack(draft)
        head = encode_head(
            Head(draft.model, draft.name, draft.description, packed.digest, draft.size_bytes, draft.media)
        )
        if trust is Trust.LISTED:
            return await self._store(tenant, draft, head, packed, {}, trust)
        compressed = await self._bytes.compress(draft, packed, list(packed.segments))
        needed_bytes = len(head) + len(packed.manifest) + sum(map(len, compressed.values()))
        await self._room.reserve(tenant, needed_bytes, needed_bytes if draft.pinned else 0, trust)
        try:
            return await self._store(tenant, draft, head, packed, compressed, trust)
        except BaseException:
            self._tasks.start(self._room.refresh(tenant), "contexts-refresh")
            raise

    async def _store(
        self,
        tenant: str,
        draft: Draft,
        head: bytes,
        packed: Packed,
        compressed: dict[bytes, bytes],
        trust: Trust,
    ) -> ContextRow:
        """Store within the total budget; room is reserved from before the upload until the context is counted."""
        reservation = secrets.token_hex(_RESERVATION_BYTES)
        try:
            return await self._create(tenant, draft, head, packed, compressed, trust, reservation)
        except BaseException:
            self._tasks.start(self._room.release(reservation), "contexts-release")
            raise

    async def _create(
        self,
        tenant: str,
        draft: Draft,
        head: bytes,
        packed: Packed,
        compressed: dict[bytes, bytes],
        trust: Trust,
        reservation: str,
    ) -> ContextRow:
        upload: dict[bytes, bytes] = {}
        reserved_bytes = 0
        for _ in range(COMMIT_TRIES):
            extra_bytes = sum(map(len, upload.values()))
            needed_bytes = len(head) + len(packed.manifest) + extra_bytes
            if needed_bytes > reserved_bytes:  # it stays reserved after the upload until it is counted
                await self._room.reserve_over_all(reservation, needed_bytes)
                reserved_bytes = needed_bytes
            reply = await self._commit(tenant, draft, head, packed, extra_bytes)
            if reply.word == b"ok":
                await self._room.changed(tenant, reply.totals, trust, reservation)
                self._bytes.keep(tenant, draft, packed)
                return await self.row(tenant, draft.id)
            if reply.word == b"full":
                await self._room.make(tenant, reply.over_bytes)
            elif reply.word == b"missing" and not upload:
                if not compressed.keys() >= set(reply.missing):
                    compressed = await self._bytes.compress(draft, packed, reply.missing)
                upload = {digest: compressed[digest] for digest in reply.missing if digest in compressed}
            elif reply.word == b"missing":
                await self._bytes.upload(tenant, upload)
                upload = {}
            else:
                raise self._refusal(reply.word)
        raise QuotaFull("Stored contexts change too fast to make room for another; try again.")

    async def _commit(self, tenant: str, draft: Draft, head: bytes, packed: Packed, extra_bytes: int) -> _Reply:
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
            read=_read_reply,
        )

    # --- finding

    async def ids(self, tenant: str) -> list[str]:
        """Return the ids of a tenant's contexts, oldest first. Raises CacheError."""
        return await self._listing.ids(tenant)

    async def rows(self, tenant: str) -> list[ContextRow]:
        """Return all rows of a tenant, oldest first. Raises CacheError."""
        return await self._listing.rows(tenant)

    async def some_rows(self, tenant: str, ids: Sequence[str]) -> list[ContextRow]:
        """Return the rows of those of `ids` that exist, in their order. Raises CacheError."""
        return await self._listing.some_rows(tenant, ids)

    async def tags(self, tenant: str) -> list[Tag]:
        """Return all tags of a tenant, oldest first. Raises CacheError."""
        return await self._listing.tags(tenant)

    async def content(self, tenant: str, row: ContextRow) -> Content:
        """Return the verified bytes of a context. Raises StoreCorrupt, UnknownContext and other CacheErrors."""
        return await self._bytes.content(tenant, row)

    async def row(self, tenant: str, context_id: str) -> ContextRow:
        """Return a context's row, read from Redis. Raises UnknownContext and other CacheErrors."""
        since = self._memory.moment()
        found = await self._listing.row(tenant, context_id)
        if found is None:
            self._memory.drop_row(tenant, context_id)
            raise UnknownContext("There is no such context.")
        self._memory.keep_row(tenant, found, since)
        return found

    async def known_row(self, tenant: str, context_id: str) -> ContextRow:
        """Return a context's row, from memory if that is current or Redis is away. Raises like `row`."""
        remembered = self._memory.row(tenant, context_id)
        if remembered is None:
            return await self.row(tenant, context_id)
        row = remembered.value
        if self._memory.is_current(remembered) and row.expires_unix_seconds > self.now():
            return row
        return await _or_remembered(self.row(tenant, context_id), row)

    async def tag(self, tenant: str, tag: str) -> Tag:
        """Return a tag, read from Redis. Raises UnknownContext and other CacheErrors."""
        since = self._memory.moment()
        found = await self._listing.tag(tenant, tag)
        if found is None:
            self._memory.drop_tag(tenant, tag)
            raise UnknownContext("There is no such tag.")
        self._memory.keep_tag(tenant, found, since)
        return found

    async def tagged(self, tenant: str, tag: str) -> ContextRow:
        """Return the row of the context that a tag names; during a move of the tag, the old or the new one.

        Raises UnknownContext and other CacheErrors.
        """
        known = await self._known_tag(tenant, tag)
        try:
            return await self.known_row(tenant, known.context_id)
        except UnknownContext:
            # the tag moved and its old context was deleted, and only the deletion has been received yet
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
        trust: Trust = Trust.LISTED,
    ) -> ContextRow:
        """Change the given properties; a new expiry revives an inactive context.

        Raises UnknownContext, PastExpiry, QuotaFull, PinRefused and other CacheErrors.
        """
        pin = metadata is not None and pins(metadata)
        reserved = pin and trust is not Trust.LISTED and await self._reserve_pin(tenant, context_id, trust)
        limits = self._access.limits
        try:
            reply = await self._access.run(
                scripts.UPDATE,
                tenant,
                context_id,
                b"" if metadata is None else msgspec.msgpack.encode(metadata),
                "" if metadata is None else int(pin),
                milliseconds(expires_unix_seconds),
                milliseconds(ttl_seconds),
                milliseconds(limits.grace_seconds),
                limits.pinned_bytes,
                read=_read_reply,
            )
            if reply.word != b"ok":
                raise self._refusal(reply.word)
        except BaseException:
            if reserved:
                self._tasks.start(self._room.refresh(tenant), "contexts-refresh")
            raise
        if metadata is not None:
            await self._room.changed(tenant, reply.totals, trust)
        return await self.row(tenant, context_id)

    async def _reserve_pin(self, tenant: str, context_id: str, trust: Trust) -> bool:
        """Reserve the pinned bytes of a context that is not pinned yet; return whether that was needed."""
        size_bytes, is_pinned = await self._access.run(scripts.WHOLE, tenant, context_id, read=_read_whole)
        if is_pinned:
            return False
        _check_may_pin(trust)
        await self._room.reserve(tenant, 0, size_bytes, trust)
        return True

    async def delete(self, tenant: str, context_id: str) -> None:
        """Delete a context with its tags. Raises UnknownContext and other CacheErrors."""
        self._memory.drop_row(tenant, context_id)
        if not await self._room.drop(tenant, "any", [context_id], "deleted"):
            raise UnknownContext("There is no such context.")

    async def finish(
        self, tenant: str, context_id: str, tokens: int, value_usd: float, problem: tuple[str, str] | None = None
    ) -> None:
        """Store the outcome of warming: the upstream's count of tokens, or type and message of a problem.

        Raises CacheError.
        """
        status = ContextStatus.READY if problem is None else ContextStatus.ERROR
        encoded = b"" if problem is None else msgspec.msgpack.encode(problem)
        await self._access.run(
            scripts.FINISH, tenant, context_id, status.value, tokens, value_usd, encoded, read=lambda reply: reply
        )

    def used(self, tenant: str, row: ContextRow, reset_ttl_seconds: float | None) -> None:
        """Note a successful use; it is written to Redis some milliseconds later."""
        self._uses.add(tenant, row.id, reset_ttl_seconds)
        if reset_ttl_seconds is not None:
            self._memory.postpone(tenant, row.id, self.now() + reset_ttl_seconds)

    async def set_tag(self, tenant: str, tag: str, context_id: str) -> Tag:
        """Create or move a tag. Raises UnknownContext, QuotaFull and other CacheErrors."""
        most = self._access.limits.tags_at_most
        reply = await self._access.run(scripts.TAG, tenant, tag, context_id, most, read=_read_reply)
        if reply.word != b"ok":
            raise self._refusal(reply.word)
        return Tag(tag, context_id, reply.now_ms / 1000)

    async def delete_tag(self, tenant: str, tag: str) -> None:
        """Delete a tag if it exists. Raises CacheError."""
        self._memory.drop_tag(tenant, tag)
        await self._access.run(scripts.UNTAG, tenant, tag, read=lambda reply: reply)

    # --- trust in keys

    def accepted(self, tenant: str) -> None:
        """Note that an upstream accepted the tenant's key; cheap if it is known."""
        self._accepted.note(tenant)

    def has_accepted(self, tenant: str) -> bool:
        """Return whether it is known here that an upstream accepted the tenant's key."""
        return tenant in self._accepted

    async def trust_of(self, tenant: str) -> Trust:
        """Return the trust in a tenant that the configuration does not list. Raises CacheError."""
        return Trust.ACCEPTED if await self._accepted.includes(tenant) else Trust.UNCHECKED

    def _refusal(self, word: bytes) -> CacheError:
        limits = self._access.limits
        reasons: dict[bytes, CacheError] = {
            b"unknown": UnknownContext("There is no such context."),
            b"past": PastExpiry("The expiry is in the past."),
            b"pins": QuotaFull(
                f"The limit of {limits.pinned_bytes:,} bytes of pinned contexts is reached; unpin one or raise "
                "contexts.pinned_bytes."
            ),
            b"many": QuotaFull(
                f"The limit of {limits.contexts_at_most:,} stored contexts is reached; delete one or raise "
                "contexts.max_contexts."
            ),
            b"tags": QuotaFull(
                f"The limit of {limits.tags_at_most:,} tags is reached; delete one or raise contexts.max_tags."
            ),
        }
        return reasons.get(word) or StoreCorrupt("a script returned an unknown word")


def _check_may_pin(trust: Trust) -> None:
    if trust is Trust.UNCHECKED:
        raise PinRefused(
            "A context can be pinned once an upstream has accepted this key; send a request with it, then pin the "
            'context with PUT and metadata {"pin": "true"}. Where the replicas\' keys are open to anyone, no key is '
            "checked: the operator can list clients, who may pin."
        )


def _read_reply(reply: Any) -> _Reply:
    word, *rest = reply
    if word == b"ok":
        return _Reply(word, now_ms=int(rest[0]), totals=read_totals(rest[1]) if len(rest) > 1 else None)
    if word == b"full":
        return _Reply(word, over_bytes=int(rest[0]))
    if word == b"missing":
        return _Reply(word, missing=tuple([bytes.fromhex(name.decode()) for name in rest[0]]))
    return _Reply(word)


def _read_whole(reply: Any) -> tuple[int, bool]:
    size_bytes, is_pinned = reply
    return int(size_bytes), bool(is_pinned)


async def _or_remembered(reading: Awaitable[T], remembered: T) -> T:
    """Return the value that is read or, if Redis does not answer at once, the remembered one."""
    try:
        async with asyncio.timeout(REREAD_LIMIT_SECONDS):
            return await reading
    except UnknownContext:
        raise
    except (CacheError, TimeoutError):
        return remembered

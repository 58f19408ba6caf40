"""Stored contexts: made whole or not at all, found by id or tag, discarded by worth when room is needed.

What a worker has read it keeps in memory: contents in bytes (`cache.contents`), rows and tags until a message on the
channel says that they are not what they were. While Redis is away what is in memory goes on being served. Expiry is
judged by Redis's clock, whose offset every reply tells. It knows no HTTP, no prompt and no model.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from cache import context_scripts as scripts
from cache import keys, segments
from cache.contents import Contents
from cache.context_rows import ContextRow, ContextStatus, Draft, Head, Tag, encode_head, pins, read_row, read_tag
from cache.errors import CacheError, PastExpiry, QuotaFull, StoreCorrupt, UnknownContext
from cache.ports import Clock, Tasks
from cache.retention import choose
from cache.segments import Content, Packed
from cache.store import Script, Store, Subscription

log = logging.getLogger("cairn.contexts")

BULK_LIMIT_SECONDS = 2.0  # an operation that moves a megabyte, or lists many; nothing on the way of a plain request
REREAD_LIMIT_SECONDS = 0.05  # to read again what is remembered; what is not remembered has to be waited for
ROUND_BYTES = 4 * segments.SEGMENT_BYTES  # what one round trip carries at most
OFF_LOOP_BYTES = 128 * 1024  # above this, packing and checking are done in a thread: 0.3 ms of work
ROWS_AT_MOST = 8192  # of each, rows and tags, in a worker's memory
READ_AT_ONCE = 100
COMMIT_TRIES = 5
FLUSH_SECONDS = 0.05
SWEEP_SECONDS = 60.0
SURVEY_SECONDS = 10.0  # how often it is looked which contexts are worth most, for whoever watches
SURVEYED_AT_MOST = 500  # contexts, of the tenants that have most
SHOWN_AT_MOST = 20
RECONNECT_SECONDS = 0.05, 2.0
LISTEN_SECONDS = 1.0

T = TypeVar("T")
_Slot = tuple[str, str]  # tenant and id, or tenant and tag


class ContextLimits(msgspec.Struct, frozen=True):
    """Budgets and quotas; bytes are compressed ones in Redis, but for `memory_bytes`."""

    total_bytes: int
    tenant_bytes: int
    pinned_bytes: int  # of one tenant
    contexts_at_most: int  # of one tenant
    tags_at_most: int  # of one tenant
    grace_seconds: float
    memory_bytes: int  # of one worker
    warming_seconds: float  # a context still pending after that was left in the middle


class Remembered(msgspec.Struct, frozen=True):
    """A row or a tag and when the channel was last begun to be heard, before it was read."""

    value: Any
    heard: int


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
        self._store = store
        self._limits = limits
        self._clock = clock
        self._tasks = tasks
        self._evicted = evicted
        self._damaged = damaged
        self._contents = Contents(limits.memory_bytes, tasks)
        self._rows: OrderedDict[_Slot, Remembered] = OrderedDict()
        self._tags: OrderedDict[_Slot, Remembered] = OrderedDict()
        self._heard = 0  # which hearing of the channel this is; 0 while it is not heard
        self._hearings = 0
        self._changes = 0  # messages so far: what was being read meanwhile is not kept
        self._offset_seconds = 0.0  # Redis's clock less ours
        self._uses: dict[str, dict[str, tuple[int, float | None]]] = {}
        self._used = asyncio.Event()
        self._running: list[asyncio.Task[Any]] = []
        self.total_bytes = 0
        self.total_contexts = 0
        self.most_worth: tuple[ContextRow, ...] = ()

    # --- life

    async def start(self) -> None:
        """Begin to listen, to tell of uses and to sweep."""
        self._running = [
            self._tasks.start(self._listen_forever(), "contexts-listen"),
            self._tasks.start(self._flush_forever(), "contexts-flush"),
            self._tasks.start(self._sweep_forever(), "contexts-sweep"),
            self._tasks.start(self._survey_forever(), "contexts-survey"),
        ]

    async def close(self) -> None:
        """Tell of the last uses and end."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
            await self._flush()
        self._running = []

    def now(self) -> float:
        """Seconds since 1970 by Redis's clock, as last heard."""
        return self._clock.unix() + self._offset_seconds

    # --- making

    async def create(self, tenant: str, draft: Draft) -> ContextRow:
        """Store `draft`, whole or not at all, discarding what is worth least where room is needed.

        Raises QuotaFull, PastExpiry, StoreUnavailable and the store's other errors.
        """
        size = len(draft.messages) + len(draft.tools)
        packed: Packed = await _off_loop(size, segments.pack, draft.tools, draft.messages, draft.bounds)
        head = encode_head(Head(draft.model, draft.name, draft.description, packed.digest, size))
        compressed: dict[bytes, bytes] = {}
        for _ in range(COMMIT_TRIES):
            extra_bytes = sum(map(len, compressed.values()))
            await self._make_room_over_all(extra_bytes)
            reply = await self._commit(tenant, draft, head, packed, extra_bytes)
            word = reply[0]
            if word == b"ok":
                await self._renew_total(tenant, reply[2] if len(reply) > 2 else None)
                self._contents.put((tenant, packed.digest), _content(draft, packed.digest))
                return await self.row(tenant, draft.id)
            if word == b"full":
                await self._make_room(tenant, int(reply[1]))
            elif word == b"missing" and not compressed:
                wanted = [bytes.fromhex(name.decode()) for name in reply[1]]
                compressed = await _off_loop(size, _compress, packed, wanted)
            elif word == b"missing":
                await self._upload(tenant, compressed)
                compressed = {}
            else:
                raise _refusal(word)
        raise QuotaFull("Stored contexts change too fast to make room for another.")

    async def _commit(self, tenant: str, draft: Draft, head: bytes, packed: Packed, extra_bytes: int) -> Any:
        limits = self._limits
        return await self._run(
            scripts.COMMIT,
            tenant,
            draft.id,
            head,
            packed.manifest,
            "".join(digest.hex() for digest in packed.segments),
            msgspec.msgpack.encode(draft.metadata),
            int(draft.pinned),
            _ms(draft.expires_unix_seconds),
            _ms(draft.ttl_seconds),
            _ms(limits.grace_seconds),
            limits.tenant_bytes,
            limits.pinned_bytes,
            limits.contexts_at_most,
            limits.tags_at_most,
            draft.status.value,
            draft.tokens,
            draft.value_usd,
            _ms(limits.warming_seconds),
            " ".join(draft.tags),
            extra_bytes,
        )

    async def _upload(self, tenant: str, compressed: dict[bytes, bytes]) -> None:
        """Write segments, which go by themselves unless a commit takes them up."""
        batch: list[tuple[str | bytes | int, ...]] = []
        size = 0
        for digest, stored in compressed.items():
            batch.append(("SET", _segment_key(tenant, digest), stored, "EX", scripts.UPLOAD_SECONDS))
            size += len(stored)
            if size >= ROUND_BYTES:
                await self._many(batch)
                batch, size = [], 0
        if batch:
            await self._many(batch)

    # --- room

    async def _make_room(self, tenant: str, needed_bytes: int) -> None:
        """Discard of this tenant's contexts what is worth least."""
        rows = await self.rows(tenant)
        victims = choose([(row.id, row.kept) for row in rows], needed_bytes)
        if not victims:
            raise QuotaFull("The budget of stored contexts is full, and what is in it is pinned or would not do.")
        await self._discard(tenant, rows, victims)

    async def _make_room_over_all(self, extra_bytes: int) -> None:
        """Discard what is worth least of all tenants' where all of them together are over the budget."""
        if not extra_bytes:
            return
        totals = await self._totals()
        over = sum(size for size, _ in totals.values()) + extra_bytes - self._limits.total_bytes
        if over <= 0:
            return
        rows = {tenant: await self.rows(tenant) for tenant in totals}
        things = [((tenant, row.id), row.kept) for tenant, listed in rows.items() for row in listed]
        victims = choose(things, over)
        if not victims:
            raise QuotaFull("The budget of all stored contexts is full, and what is in it is pinned or would not do.")
        for tenant in dict.fromkeys(tenant for tenant, _ in victims):
            await self._discard(tenant, rows[tenant], [name for owner, name in victims if owner == tenant])

    async def _discard(self, tenant: str, rows: Iterable[ContextRow], victims: Sequence[str]) -> None:
        expired = {row.id for row in rows if row.kept.expired}
        for reason, ids in (
            ("expired", [name for name in victims if name in expired]),
            ("room", [name for name in victims if name not in expired]),
        ):
            if ids:
                dropped, totals = await self._run(scripts.DROP, tenant, "unpinned", *ids)
                self._evicted(reason, int(dropped))
                await self._renew_total(tenant, totals)

    async def _totals(self) -> dict[str, tuple[int, int]]:
        reply = (await self._many([("HGETALL", keys.CONTEXTS_TOTALS)]))[0]
        pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
        totals = {name.decode(): _pair(value) for name, value in pairs}
        self.total_bytes = sum(size for size, _ in totals.values())
        self.total_contexts = sum(count for _, count in totals.values())
        return totals

    async def _renew_total(self, tenant: str, totals: Sequence[int] | None) -> None:
        """Write what a tenant's contexts take now. What fails here the next sweep sets right."""
        if totals is None:
            return
        try:
            await self._write_total(tenant, *totals)
            await self._totals()
        except CacheError as error:
            log.debug("the total of contexts was not renewed: %s", error)

    async def _write_total(self, tenant: str, size: int, count: int) -> None:
        if count:
            await self._many([("HSET", keys.CONTEXTS_TOTALS, tenant, f"{size}:{count}")])
        else:
            await self._many([("HDEL", keys.CONTEXTS_TOTALS, tenant)])

    # --- finding

    async def row(self, tenant: str, context_id: str) -> ContextRow:
        """What is known of a context, read anew. Raises UnknownContext."""
        changes, heard = self._changes, self._heard
        found = (await self._read(tenant, [context_id]))[0]
        if found is None:
            self._rows.pop((tenant, context_id), None)
            raise UnknownContext("There is no such context.")
        self._remember(self._rows, (tenant, context_id), found, changes, heard)
        return found

    async def known_row(self, tenant: str, context_id: str) -> ContextRow:
        """The same, from memory where that is up to date, or where Redis is away."""
        remembered = self._rows.get((tenant, context_id))
        if remembered is None:
            return await self.row(tenant, context_id)
        row: ContextRow = remembered.value
        if remembered.heard == self._heard and self._heard and row.expires_unix_seconds > self.now():
            return row
        return await self._or_remembered(self.row(tenant, context_id), row)

    async def tagged(self, tenant: str, tag: str) -> ContextRow:
        """The context that a tag names, whole as it was or as it is: never between two. Raises UnknownContext."""
        known = await self._known_tag(tenant, tag)
        try:
            return await self.known_row(tenant, known.context_id)
        except UnknownContext:
            # the tag moved and what it named before was deleted, and only the second has been heard of
            moved = await self.tag(tenant, tag)
            return await self.row(tenant, moved.context_id)

    async def content(self, tenant: str, row: ContextRow) -> Content:
        """The bytes of a context, checked. Raises StoreCorrupt, UnknownContext, StoreUnavailable."""
        key = (tenant, row.head.digest)
        if (content := self._contents.peek(key)) is not None:
            return content
        return await self._contents.get(key, lambda: self._read_content(tenant, row))

    async def rows(self, tenant: str) -> list[ContextRow]:
        """All contexts of a tenant, oldest first."""
        ids = await self.ids(tenant)
        found: list[ContextRow | None] = []
        for start in range(0, len(ids), READ_AT_ONCE):
            found += await self._read(tenant, ids[start : start + READ_AT_ONCE])
        return [row for row in found if row is not None]

    async def ids(self, tenant: str) -> list[str]:
        """The ids of a tenant's contexts, oldest first."""
        now_ms, ids = await self._run(scripts.IDS, tenant)
        self._set_clock(int(now_ms))
        return [name.decode() for name in ids]

    async def some_rows(self, tenant: str, ids: Sequence[str]) -> list[ContextRow]:
        """Those of `ids` that are there, in their order."""
        return [row for row in await self._read(tenant, ids) if row is not None]

    async def _read(self, tenant: str, ids: Sequence[str]) -> list[ContextRow | None]:
        now_ms, replies = await self._run(scripts.READ, tenant, *ids)
        self._set_clock(int(now_ms))
        return [read_row(name, fields, int(now_ms)) for name, fields in zip(ids, replies, strict=True)]

    async def _read_content(self, tenant: str, row: ContextRow) -> Content:
        stored = (await self._many([("HGET", _context_key(tenant, row.id), "manifest")]))[0]
        if stored is None:
            raise UnknownContext("There is no such context.")
        try:
            manifest = segments.read_manifest(stored, row.head.digest)
            found = await self._read_segments(tenant, manifest.digests())
            content: Content = await _off_loop(manifest.size_bytes, segments.unpack, manifest, row.head.digest, found)
        except StoreCorrupt:
            self._damaged()
            raise
        return content

    async def _read_segments(self, tenant: str, digests: Sequence[bytes]) -> dict[bytes, bytes | None]:
        found: dict[bytes, bytes | None] = {}
        at_once = ROUND_BYTES // segments.SEGMENT_BYTES
        for start in range(0, len(digests), at_once):
            wanted = digests[start : start + at_once]
            replies = await self._many([("GET", _segment_key(tenant, digest)) for digest in wanted])
            found.update(zip(wanted, replies, strict=True))
        return found

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
        reply = await self._run(
            scripts.UPDATE,
            tenant,
            context_id,
            b"" if metadata is None else msgspec.msgpack.encode(metadata),
            "" if metadata is None else int(pins(metadata)),
            _ms(expires_unix_seconds),
            _ms(ttl_seconds),
            _ms(self._limits.grace_seconds),
            self._limits.pinned_bytes,
        )
        if reply[0] != b"ok":
            raise _refusal(reply[0])
        return await self.row(tenant, context_id)

    async def delete(self, tenant: str, context_id: str) -> None:
        """Take a context away, with its tags. Raises UnknownContext."""
        self._rows.pop((tenant, context_id), None)
        dropped, totals = await self._run(scripts.DROP, tenant, "any", context_id)
        if not dropped:
            raise UnknownContext("There is no such context.")
        self._evicted("deleted", 1)
        await self._renew_total(tenant, totals)

    async def finish(
        self, tenant: str, context_id: str, tokens: int, value_usd: float, problem: tuple[str, str] | None = None
    ) -> None:
        """The warming has ended: with the upstream's count of tokens, or with a problem's type and message."""
        status = ContextStatus.READY if problem is None else ContextStatus.ERROR
        encoded = b"" if problem is None else msgspec.msgpack.encode(problem)
        await self._run(scripts.FINISH, tenant, context_id, status.value, tokens, value_usd, encoded)

    def used(self, tenant: str, row: ContextRow, reset_ttl_seconds: float | None) -> None:
        """A context was used with success; Redis hears of it within some milliseconds."""
        uses = self._uses.setdefault(tenant, {})
        times, before = uses.get(row.id, (0, None))
        uses[row.id] = (times + 1, before if reset_ttl_seconds is None else reset_ttl_seconds)
        if reset_ttl_seconds is not None:
            remembered = self._rows.get((tenant, row.id))
            if remembered is not None:
                fresh = msgspec.structs.replace(remembered.value, expires_unix_seconds=self.now() + reset_ttl_seconds)
                self._rows[tenant, row.id] = Remembered(fresh, remembered.heard)
        self._used.set()

    # --- tags

    async def set_tag(self, tenant: str, tag: str, context_id: str) -> Tag:
        """Make a tag, or move it. Raises UnknownContext, QuotaFull."""
        reply = await self._run(scripts.TAG, tenant, tag, context_id, self._limits.tags_at_most)
        if reply[0] != b"ok":
            raise _refusal(reply[0])
        return Tag(tag, context_id, int(reply[1]) / 1000)

    async def tag(self, tenant: str, tag: str) -> Tag:
        """What a tag names, read anew. Raises UnknownContext."""
        changes, heard = self._changes, self._heard
        value = (await self._many([("HGET", keys.tenant(tenant, "tags"), tag)]))[0]
        if value is None:
            self._tags.pop((tenant, tag), None)
            raise UnknownContext("There is no such tag.")
        found = read_tag(tag, value)
        self._remember(self._tags, (tenant, tag), found, changes, heard)
        return found

    async def tags(self, tenant: str) -> list[Tag]:
        """All tags of a tenant, oldest first."""
        reply = (await self._many([("HGETALL", keys.tenant(tenant, "tags"))]))[0]
        pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
        found = [read_tag(name.decode(), value) for name, value in pairs]
        return sorted(found, key=lambda tag: (tag.created_unix_seconds, tag.tag))

    async def delete_tag(self, tenant: str, tag: str) -> None:
        """Take a tag away, if it is there."""
        self._tags.pop((tenant, tag), None)
        await self._run(scripts.UNTAG, tenant, tag)

    async def _known_tag(self, tenant: str, tag: str) -> Tag:
        remembered = self._tags.get((tenant, tag))
        if remembered is None:
            return await self.tag(tenant, tag)
        known: Tag = remembered.value
        if remembered.heard == self._heard and self._heard:
            return known
        return await self._or_remembered(self.tag(tenant, tag), known)

    async def _or_remembered(self, reading: Awaitable[T], remembered: T) -> T:
        """What is read, or what is remembered where Redis does not say so at once."""
        try:
            async with asyncio.timeout(REREAD_LIMIT_SECONDS):
                return await reading
        except UnknownContext:
            raise
        except (CacheError, TimeoutError):
            return remembered

    # --- what others change

    def receive(self, payload: bytes) -> None:
        """One message of the channel: `tenant c ID` or `tenant t TAG`."""
        self._changes += 1
        try:
            tenant, kind, name = payload.decode().split(" ", 2)
        except ValueError:
            return
        (self._rows if kind == "c" else self._tags).pop((tenant, name), None)

    def _remember(
        self, table: OrderedDict[_Slot, Remembered], slot: _Slot, value: Any, changes: int, heard: int
    ) -> None:
        if changes != self._changes or heard != self._heard:
            heard = 0  # something changed while this was read: it serves where Redis is away, and is read again
        table.pop(slot, None)
        table[slot] = Remembered(value, heard)
        if len(table) > ROWS_AT_MOST:
            table.popitem(last=False)

    async def _listen_forever(self) -> None:
        first, most = RECONNECT_SECONDS
        pause = first
        while True:
            await self._store.wait_available()
            try:
                subscription = await self._store.subscribe(keys.CONTEXTS_CHANNEL)
                try:
                    pause = first
                    self._hearings += 1
                    self._heard = self._hearings  # what was remembered before is read again: changes went unheard
                    await self._listen(subscription)
                finally:
                    self._heard = 0
                    await subscription.close()
            except CacheError as error:
                log.debug("the channel of contexts is lost: %s", error)
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(most, pause * 2)

    async def _listen(self, subscription: Subscription) -> None:
        while True:
            payload = await subscription.next(LISTEN_SECONDS)
            if payload is not None:
                self.receive(payload)

    # --- telling of uses, sweeping

    async def _flush_forever(self) -> None:
        while True:
            await self._used.wait()
            await asyncio.sleep(FLUSH_SECONDS)
            self._used.clear()
            await self._flush()

    async def _flush(self) -> None:
        """Tell Redis what was used; what it does not take is forgotten: it only orders what is discarded."""
        uses, self._uses = self._uses, {}
        for tenant, used in uses.items():
            rows = [field for name, (times, ttl) in used.items() for field in (name, times, _ms(ttl))]
            try:
                now_ms = await self._run(scripts.USED, tenant, _ms(self._limits.grace_seconds), *rows)
                self._set_clock(int(now_ms))
            except CacheError as error:
                log.debug("uses of contexts were not told: %s", error)

    async def _sweep_forever(self) -> None:
        while True:
            await self._store.wait_available()
            try:
                sweeping = ("SET", keys.CONTEXTS_SWEEPER, "1", "NX", "EX", round(SWEEP_SECONDS / 2))
                await (self.sweep() if (await self._many([sweeping]))[0] else self._totals())
            except CacheError as error:
                log.debug("contexts were not swept: %s", error)
            await asyncio.sleep(SWEEP_SECONDS * random.uniform(0.8, 1.2))

    async def sweep(self) -> None:
        """Take away what is past its grace time, and renew the totals."""
        for tenant, before in (await self._totals()).items():
            swept, (size, count) = await self._run(scripts.SWEEP, tenant)
            if swept:
                self._evicted("expired", int(swept))
            if (size, count) != before:
                await self._write_total(tenant, size, count)
        await self._totals()

    async def _survey_forever(self) -> None:
        while True:
            await self._store.wait_available()
            try:
                await self.survey()
            except CacheError as error:
                log.debug("contexts were not surveyed: %s", error)
            await asyncio.sleep(SURVEY_SECONDS * random.uniform(0.8, 1.2))

    async def survey(self) -> None:
        """See which contexts are worth most."""
        totals = await self._totals()
        rows: list[ContextRow] = []
        for tenant in sorted(totals, key=lambda tenant: totals[tenant], reverse=True):
            rows += await self.rows(tenant)
            if len(rows) >= SURVEYED_AT_MOST:
                break
        rows.sort(key=lambda row: row.worth, reverse=True)
        self.most_worth = tuple(rows[:SHOWN_AT_MOST])

    # --- within

    def _set_clock(self, now_ms: int) -> None:
        self._offset_seconds = now_ms / 1000 - self._clock.unix()

    async def _run(self, script: Script, tenant: str, *args: str | bytes | float) -> Any:
        return await self._store.run_script(script, [keys.tenant(tenant)], args, limit_seconds=BULK_LIMIT_SECONDS)

    async def _many(self, commands: Sequence[Sequence[str | bytes | int | float]]) -> list[Any]:
        return await self._store.execute_many(commands, limit_seconds=BULK_LIMIT_SECONDS)


async def _off_loop(size_bytes: int, work: Callable[..., T], *args: Any) -> T:
    """Done here, or in a thread where it would hold the loop up."""
    return work(*args) if size_bytes < OFF_LOOP_BYTES else await asyncio.to_thread(work, *args)


def _compress(packed: Packed, wanted: Sequence[bytes]) -> dict[bytes, bytes]:
    return {digest: segments.compress(packed.segments[digest]) for digest in wanted}


def _content(draft: Draft, digest: bytes) -> Content:
    return Content(digest, draft.tools, draft.messages, draft.bounds)


def _refusal(word: bytes) -> CacheError:
    reasons: dict[bytes, CacheError] = {
        b"unknown": UnknownContext("There is no such context."),
        b"past": PastExpiry("The end lies in the past."),
        b"pins": QuotaFull("The quota of pinned contexts is full."),
        b"many": QuotaFull("There are as many stored contexts as may be."),
        b"tags": QuotaFull("There are as many tags as may be."),
    }
    return reasons.get(word) or StoreCorrupt("a script said what it should not")


def _segment_key(tenant: str, digest: bytes) -> str:
    return keys.tenant(tenant, "segment", digest.hex())


def _context_key(tenant: str, context_id: str) -> str:
    return keys.tenant(tenant, "context", context_id)


def _pair(value: bytes) -> tuple[int, int]:
    size, _, count = value.partition(b":")
    return int(size), int(count)


def _ms(seconds: float | None) -> int:
    return 0 if seconds is None else round(seconds * 1000)

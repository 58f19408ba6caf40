"""The content of stored contexts: pack and upload it in segments; read it, verify it and keep it in memory.

A content is identified by the digest of its manifest. Rows and tags are handled elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from cache import keys
from cache.contexts import scripts, segments
from cache.contexts.access import Access
from cache.contexts.content_cache import ContentCache
from cache.contexts.rows import ContextRow, Draft
from cache.contexts.segments import Content, Packed
from cache.errors import StoreCorrupt, UnknownContext
from cache.ports import Tasks

ROUND_BYTES = 4 * segments.SEGMENT_BYTES  # most bytes of one round trip
OFF_LOOP_BYTES = 128 * 1024  # larger contents are packed and verified in a thread: 0.3 ms of work

T = TypeVar("T")


class ContextBytes:
    """Contents of one worker. `damaged` is called for each content that does not match its digest."""

    def __init__(self, access: Access, tasks: Tasks, damaged: Callable[[], None]) -> None:
        self._access = access
        self._damaged = damaged
        self.contents = ContentCache(access.limits.memory_bytes, tasks)

    async def pack(self, draft: Draft) -> Packed:
        """Cut a draft's content into named segments."""
        return await _off_loop(draft.size_bytes, segments.pack, draft.tools, draft.messages, draft.bounds)

    async def compress(self, draft: Draft, packed: Packed, wanted: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the stored form of the `wanted` segments of a packed draft, by digest."""
        return await _off_loop(draft.size_bytes, _compress, packed, wanted)

    async def upload(self, tenant: str, compressed: dict[bytes, bytes]) -> None:
        """Write segments. They expire unless a commit refers to them. Raises CacheError."""
        batch: list[tuple[str | bytes | int, ...]] = []
        size = 0
        for digest, stored in compressed.items():
            batch.append(("SET", _segment_key(tenant, digest), stored, "EX", scripts.UPLOAD_SECONDS))
            size += len(stored)
            if size >= ROUND_BYTES:
                await self._access.many(batch)
                batch, size = [], 0
        if batch:
            await self._access.many(batch)

    def keep(self, tenant: str, draft: Draft, packed: Packed) -> None:
        """Put the content of a draft that was just stored into memory."""
        content = Content(packed.digest, draft.tools, draft.messages, draft.bounds)
        self.contents.put((tenant, packed.digest), content)

    async def content(self, tenant: str, row: ContextRow) -> Content:
        """Return the verified bytes of a context. Raises StoreCorrupt, UnknownContext, StoreUnavailable."""
        key = (tenant, row.head.digest)
        if (content := self.contents.peek(key)) is not None:
            return content
        return await self.contents.get(key, lambda: self._read(tenant, row))

    async def _read(self, tenant: str, row: ContextRow) -> Content:
        key = keys.tenant(tenant, "context", row.id)
        stored = (await self._access.many([("HGET", key, "manifest")]))[0]
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
            replies = await self._access.many([("GET", _segment_key(tenant, digest)) for digest in wanted])
            found.update(zip(wanted, replies, strict=True))
        return found


async def _off_loop(size_bytes: int, work: Callable[..., T], *args: Any) -> T:
    """Call `work`, in a thread if it would delay the event loop."""
    return work(*args) if size_bytes < OFF_LOOP_BYTES else await asyncio.to_thread(work, *args)


def _compress(packed: Packed, wanted: Sequence[bytes]) -> dict[bytes, bytes]:
    return {digest: segments.compress(packed.segments[digest]) for digest in wanted if digest in packed.segments}


def _segment_key(tenant: str, digest: bytes) -> str:
    return keys.tenant(tenant, "segment", digest.hex())

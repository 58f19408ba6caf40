"""Read rows and tags of stored contexts from Redis: one, some, all. Nothing is remembered or changed here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from cache import keys
from cache.contexts import scripts
from cache.contexts.access import Access
from cache.contexts.retention import Kept
from cache.contexts.rows import ContextRow, Tag, read_row, read_tag
from cache.errors import StoreCorrupt
from cache.store.replies import parsed

READ_AT_ONCE = 100  # rows in one script

DAMAGED = Kept(rank=float("-inf"), size_bytes=0, expired=True)
"""In place of a damaged row, whose size is not known. It is discarded before everything else."""


class Listing:
    """Reads rows and tags. One per worker. Every method raises StoreUnavailable and the store's other errors.

    A damaged row is left out of lists, and `damaged` is called for it; only `row` raises StoreCorrupt.
    """

    def __init__(self, access: Access, damaged: Callable[[], None]) -> None:
        self._access = access
        self._damaged = damaged

    async def ids(self, tenant: str) -> list[str]:
        """Return the ids of a tenant's contexts, oldest first."""
        now_ms, ids = await self._access.run(scripts.IDS, tenant, read=_read_ids)
        self._access.set_clock(now_ms)
        return ids

    async def row(self, tenant: str, context_id: str) -> ContextRow | None:
        """Return one row, None if there is no such context. Raises StoreCorrupt."""
        found = (await self._read(tenant, [context_id]))[0]
        if isinstance(found, StoreCorrupt):
            self._damaged()
            raise found
        return found

    async def some_rows(self, tenant: str, ids: Sequence[str]) -> list[ContextRow]:
        """Return the rows of those of `ids` that exist, in their order."""
        return [row for row in await self._checked(tenant, ids) if row is not None]

    async def rows(self, tenant: str) -> list[ContextRow]:
        """Return the rows of all contexts of a tenant, oldest first."""
        ids = await self.ids(tenant)
        found: list[ContextRow] = []
        for start in range(0, len(ids), READ_AT_ONCE):
            found += await self.some_rows(tenant, ids[start : start + READ_AT_ONCE])
        return found

    async def kept(self, tenant: str) -> AsyncIterator[list[tuple[str, Kept]]]:
        """Yield every context of a tenant by id, some at a time, with the properties by which it competes."""
        ids = await self.ids(tenant)
        for start in range(0, len(ids), READ_AT_ONCE):
            some = ids[start : start + READ_AT_ONCE]
            yield [
                (name, DAMAGED if isinstance(row, StoreCorrupt) else row.kept)
                for name, row in zip(some, await self._read(tenant, some), strict=True)
                if row is not None
            ]

    async def tag(self, tenant: str, tag: str) -> Tag | None:
        """Return a tag, None if it does not exist. Raises StoreCorrupt."""
        value = (await self._access.many([("HGET", keys.tenant(tenant, "tags"), tag)]))[0]
        return None if value is None else read_tag(tag, value)

    async def tags(self, tenant: str) -> list[Tag]:
        """Return all tags of a tenant, oldest first."""
        found: list[Tag] = []
        for name, value in await self._access.hash(keys.tenant(tenant, "tags")):
            try:
                found.append(read_tag(parsed(bytes.decode, name), value))
            except StoreCorrupt:
                self._damaged()
        return sorted(found, key=lambda tag: (tag.created_unix_seconds, tag.tag))

    async def _checked(self, tenant: str, ids: Sequence[str]) -> list[ContextRow | None]:
        found: list[ContextRow | None] = []
        for row in await self._read(tenant, ids):
            if isinstance(row, StoreCorrupt):
                self._damaged()
            else:
                found.append(row)
        return found

    async def _read(self, tenant: str, ids: Sequence[str]) -> list[ContextRow | StoreCorrupt | None]:
        now_ms, replies = await self._access.run(scripts.READ, tenant, *ids, read=_read_replies)
        self._access.set_clock(now_ms)
        return [_row_or_error(name, fields, now_ms) for name, fields in zip(ids, replies, strict=True)]


def _read_ids(reply: Any) -> tuple[int, list[str]]:
    now_ms, names = reply
    return int(now_ms), [name.decode(errors="replace") for name in names]


def _read_replies(reply: Any) -> tuple[int, list[Any]]:
    now_ms, rows = reply
    return int(now_ms), list(rows)


def _row_or_error(context_id: str, fields: Any, now_ms: int) -> ContextRow | StoreCorrupt | None:
    try:
        return parsed(lambda reply: read_row(context_id, reply, now_ms), fields)
    except StoreCorrupt as error:
        return error

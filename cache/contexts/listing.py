"""Rows and tags of stored contexts as Redis has them now: one, some, all.

It remembers nothing (`cache.contexts.memory` does) and changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache import keys
from cache.contexts import scripts
from cache.contexts.access import Access
from cache.contexts.rows import ContextRow, Tag, read_row, read_tag

READ_AT_ONCE = 100  # rows in one script


class Listing:
    """One per worker. All of it raises StoreCorrupt, StoreUnavailable and the store's other errors."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def ids(self, tenant: str) -> list[str]:
        """The ids of a tenant's contexts, oldest first."""
        now_ms, ids = await self._access.run(scripts.IDS, tenant)
        self._access.set_clock(int(now_ms))
        return [name.decode() for name in ids]

    async def read(self, tenant: str, ids: Sequence[str]) -> list[ContextRow | None]:
        """What is known of each of `ids`."""
        now_ms, replies = await self._access.run(scripts.READ, tenant, *ids)
        self._access.set_clock(int(now_ms))
        return [read_row(name, fields, int(now_ms)) for name, fields in zip(ids, replies, strict=True)]

    async def some_rows(self, tenant: str, ids: Sequence[str]) -> list[ContextRow]:
        """Those of `ids` that are there, in their order."""
        return [row for row in await self.read(tenant, ids) if row is not None]

    async def rows(self, tenant: str) -> list[ContextRow]:
        """All contexts of a tenant, oldest first."""
        ids = await self.ids(tenant)
        found: list[ContextRow] = []
        for start in range(0, len(ids), READ_AT_ONCE):
            found += await self.some_rows(tenant, ids[start : start + READ_AT_ONCE])
        return found

    async def tag(self, tenant: str, tag: str) -> Tag | None:
        """What a tag names."""
        value = (await self._access.many([("HGET", keys.tenant(tenant, "tags"), tag)]))[0]
        return None if value is None else read_tag(tag, value)

    async def tags(self, tenant: str) -> list[Tag]:
        """All tags of a tenant, oldest first."""
        pairs = await self._access.hash(keys.tenant(tenant, "tags"))
        found = [read_tag(name.decode(), value) for name, value in pairs]
        return sorted(found, key=lambda tag: (tag.created_unix_seconds, tag.tag))

"""Tells Redis which stored contexts were used, some milliseconds later and together, so that no request waits for it.

What Redis does not take is forgotten: it only orders what is discarded, and moves an end that was reset.
"""

from __future__ import annotations

import asyncio
import logging

from cache.contexts import scripts
from cache.contexts.access import Access, milliseconds
from cache.errors import CacheError

log = logging.getLogger("cairn.contexts")

FLUSH_SECONDS = 0.05


class ContextUses:
    """One per worker."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._uses: dict[str, dict[str, tuple[int, float | None]]] = {}  # by tenant and id: times, and the last reset
        self._used = asyncio.Event()

    def add(self, tenant: str, context_id: str, reset_ttl_seconds: float | None) -> None:
        """One use; its end is to be so long after now, where that is given."""
        uses = self._uses.setdefault(tenant, {})
        times, before = uses.get(context_id, (0, None))
        uses[context_id] = (times + 1, before if reset_ttl_seconds is None else reset_ttl_seconds)
        self._used.set()

    async def flush(self) -> None:
        """Tell of the uses so far."""
        uses, self._uses = self._uses, {}
        for tenant, used in uses.items():
            rows = [field for name, (times, ttl) in used.items() for field in (name, times, milliseconds(ttl))]
            try:
                grace_ms = milliseconds(self._access.limits.grace_seconds)
                now_ms = await self._access.run(scripts.USED, tenant, grace_ms, *rows)
                self._access.set_clock(int(now_ms))
            except CacheError as error:
                log.debug("uses of contexts were not told: %s", error)

    async def run(self) -> None:
        """Tell of uses until cancelled."""
        while True:
            await self._used.wait()
            await asyncio.sleep(FLUSH_SECONDS)
            self._used.clear()
            await self.flush()

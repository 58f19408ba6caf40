"""Report uses of stored contexts to Redis: in batches, some milliseconds later, so that no request waits for it.

While Redis is away or refuses writes the uses wait, up to a bound; beyond it further contexts are not noted.
"""

from __future__ import annotations

import asyncio
import logging
import random

from cache.backoff import ExponentialBackoff
from cache.contexts import scripts
from cache.contexts.access import Access, milliseconds
from cache.errors import CacheError, StoreRefused

log = logging.getLogger("cairn.contexts")

FLUSH_SECONDS = 0.05
RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS = 0.1, 2.0
WAITING_AT_MOST = 4096  # contexts whose uses wait for Redis

_Uses = dict[str, tuple[int, float | None]]  # by id: number of uses, and the last reset of the expiry


class ContextUses:
    """Uses at one worker. `dropped` counts those not noted, because too many waited or Redis refused them."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._uses: dict[str, _Uses] = {}  # by tenant
        self._waiting = 0
        self._used = asyncio.Event()
        self.dropped = 0

    def add(self, tenant: str, context_id: str, reset_ttl_seconds: float | None) -> None:
        """Note one use; with `reset_ttl_seconds` the context expires that long after now."""
        self._add(tenant, context_id, 1, reset_ttl_seconds)

    async def flush(self) -> bool:
        """Report the uses so far; return False if some wait for Redis."""
        uses, self._uses, self._waiting = self._uses, {}, 0
        all_reported = True
        for tenant, used in uses.items():
            rows = [field for name, (times, ttl) in used.items() for field in (name, times, milliseconds(ttl))]
            grace_ms = milliseconds(self._access.limits.grace_seconds)
            try:
                self._access.set_clock(await self._access.run(scripts.USED, tenant, grace_ms, *rows, read=int))
            except StoreRefused as error:
                self.dropped += len(used)
                log.debug("Redis refused the uses of contexts: %s", error)
            except CacheError:
                all_reported = False
                for name, (times, ttl) in used.items():
                    self._add(tenant, name, times, ttl)
        return all_reported

    async def run(self) -> None:
        """Report until cancelled."""
        backoff = ExponentialBackoff(RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS)
        while True:
            await self._used.wait()
            await asyncio.sleep(FLUSH_SECONDS)
            await self._access.store.wait_writable()
            self._used.clear()
            if await self.flush():
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_seconds(random.random()))

    def _add(self, tenant: str, context_id: str, times: int, reset_ttl_seconds: float | None) -> None:
        uses = self._uses.get(tenant, {})
        if context_id not in uses:
            if self._waiting >= WAITING_AT_MOST:
                self.dropped += times
                return
            self._waiting += 1
        before, reset = uses.get(context_id, (0, None))
        uses[context_id] = (before + times, reset if reset_ttl_seconds is None else reset_ttl_seconds)
        self._uses[tenant] = uses
        self._used.set()

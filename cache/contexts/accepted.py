"""Remember the tenants whose key an upstream has accepted.

If clients use keys that Cairn cannot check, anyone can make up any number of them. A key with which an upstream
answered a request is genuine: its tenant may pin contexts and is not limited to the share of unchecked tenants.
Workers share what they learn through Redis.
"""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict

from cache import keys
from cache.backoff import ExponentialBackoff
from cache.contexts import scripts
from cache.contexts.access import Access
from cache.errors import CacheError

ACCEPTED_SECONDS = 7 * 86_400  # after this long without a request, a key must be accepted again
REMEMBERED_AT_MOST = 8192  # tenants; forgotten ones are looked up in Redis
WAITING_AT_MOST = 8192  # tenants not yet written to Redis
RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS = 0.1, 5.0


class AcceptedTenants:
    """The accepted tenants. One per worker. `dropped` counts tenants that were never written to Redis."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._known: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[str, None] = {}
        self._wake = asyncio.Event()
        self.dropped = 0

    def note(self, tenant: str) -> None:
        """Note that an upstream accepted the tenant's key; cheap after the first time."""
        if tenant in self._known:
            return
        self._remember(tenant)
        if len(self._waiting) >= WAITING_AT_MOST:
            self.dropped += 1
            return
        self._waiting[tenant] = None
        self._wake.set()

    def __contains__(self, tenant: object) -> bool:
        """Return whether an upstream accepted the tenant's key, as far as this worker remembers."""
        return tenant in self._known

    async def includes(self, tenant: str) -> bool:
        """Return whether an upstream accepted the tenant's key, here or at another worker. Raises CacheError."""
        if tenant in self._known:
            return True
        found = (await self._access.many([("EXISTS", keys.tenant(tenant, "accepted"))]))[0]
        if found:
            self._remember(tenant)
        return bool(found)

    async def flush(self) -> None:
        """Write new tenants to Redis. Raises CacheError; those not written wait."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            await self._access.many([("SET", keys.tenant(tenant, "accepted"), 1, "EX", ACCEPTED_SECONDS)])
            await self._access.store.run_script(scripts.ACCEPT, scripts.OVERALL_KEYS, (tenant,))
            self._waiting.pop(tenant, None)

    async def run(self) -> None:
        """Write new tenants to Redis until cancelled."""
        backoff = ExponentialBackoff(RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS)
        while True:
            await self._wake.wait()
            await self._access.store.wait_writable()
            self._wake.clear()
            try:
                await self.flush()
                backoff.reset()
            except CacheError:
                self._wake.set()
                await asyncio.sleep(backoff.next_seconds(random.random()))

    def _remember(self, tenant: str) -> None:
        self._known[tenant] = None
        if len(self._known) > REMEMBERED_AT_MOST:
            self._known.popitem(last=False)

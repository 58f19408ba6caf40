"""A tenant's keys in Redis as all parts of the context store reach them: scripts, commands, its clock, the limits.

It knows how a question goes out and comes back, and not what it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from cache import keys
from cache.ports import Clock
from cache.store.replies import hash_pairs
from cache.store.store import Script, Store

BULK_LIMIT_SECONDS = 2.0  # an operation that moves a megabyte, or lists many; nothing on the way of a plain request


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


class Access:
    """One per worker. `limits` are those in force."""

    def __init__(self, store: Store, limits: ContextLimits, clock: Clock) -> None:
        self.store = store
        self.limits = limits
        self._clock = clock
        self._offset_seconds = 0.0  # Redis's clock less ours

    def now(self) -> float:
        """Seconds since 1970 by Redis's clock, as last heard."""
        return self._clock.unix() + self._offset_seconds

    def set_clock(self, now_ms: int) -> None:
        """What a reply tells of Redis's clock."""
        self._offset_seconds = now_ms / 1000 - self._clock.unix()

    async def run(self, script: Script, tenant: str, *args: str | bytes | float) -> Any:
        """The reply of a script on a tenant's keys. Raises CacheError."""
        return await self.store.run_script(script, [keys.tenant(tenant)], args, limit_seconds=BULK_LIMIT_SECONDS)

    async def many(self, commands: Sequence[Sequence[str | bytes | int | float]]) -> list[Any]:
        """The replies to plain commands. Raises CacheError."""
        return await self.store.execute_many(commands, limit_seconds=BULK_LIMIT_SECONDS)

    async def hash(self, key: str) -> list[tuple[bytes, bytes]]:
        """All of a hash. Raises CacheError."""
        return hash_pairs((await self.many([("HGETALL", key)]))[0])


def milliseconds(seconds: float | None) -> int:
    """As scripts take a time; 0 for none."""
    return 0 if seconds is None else round(seconds * 1000)

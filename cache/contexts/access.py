"""Access to a tenant's keys in Redis, for all parts of the context store: scripts, commands, clock and limits.

Replies are read in one place (`parsed`), so that damaged data becomes a `StoreCorrupt` and nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from cache import keys
from cache.ports import Clock
from cache.store.replies import hash_pairs, parsed
from cache.store.store import Command, Script, Store

BULK_LIMIT_SECONDS = 2.0  # of an operation that moves a megabyte or lists many; never on the path of a plain request

T = TypeVar("T")


class Trust(enum.Enum):
    """Trust in the key of a tenant."""

    LISTED = "listed"  # the configuration lists it
    ACCEPTED = "accepted"  # an upstream answered a request that was sent with it
    UNCHECKED = "unchecked"  # neither: it may be made up


class ContextLimits(msgspec.Struct, frozen=True):
    """Budgets and quotas. Bytes are compressed bytes in Redis, except `memory_bytes`."""

    total_bytes: int
    tenant_bytes: int
    pinned_bytes: int  # of one tenant
    unlisted_pinned_bytes: int  # of all tenants that are not listed, together
    unchecked_bytes: int  # of all tenants with unchecked keys, together
    contexts_at_most: int  # of one tenant
    tags_at_most: int  # of one tenant
    grace_seconds: float
    memory_bytes: int  # of one worker
    warming_seconds: float  # a context that is pending for longer was abandoned


class Access:
    """Runs scripts and commands for one tenant each. One per worker. `limits` may be replaced at any time."""

    def __init__(self, store: Store, limits: ContextLimits, clock: Clock) -> None:
        self.store = store
        self.limits = limits
        self._clock = clock
        # Redis's clock (ours before its first reply) minus the monotonic one: if our clock jumps, nothing expires
        self._offset_seconds = clock.unix() - clock.monotonic()

    def now(self) -> float:
        """Return seconds since 1970 by Redis's clock, as of its last reply."""
        return self._clock.monotonic() + self._offset_seconds

    def set_clock(self, now_ms: int) -> None:
        """Set the clock from a reply of Redis."""
        self._offset_seconds = now_ms / 1000 - self._clock.monotonic()

    async def run(self, script: Script, tenant: str, *args: str | bytes | float, read: Callable[[Any], T]) -> T:
        """Run a script on a tenant's keys and return its reply, converted by `read`. Raises CacheError."""
        key = keys.tenant(tenant)
        reply = await self.store.run_script(script, [key], args, limit_seconds=BULK_LIMIT_SECONDS)
        return parsed(read, reply)

    async def many(self, commands: Sequence[Command]) -> list[Any]:
        """Return the replies to plain commands. Raises CacheError."""
        return await self.store.execute_many(commands, limit_seconds=BULK_LIMIT_SECONDS)

    async def hash(self, key: str) -> list[tuple[bytes, bytes]]:
        """Return all fields and values of a hash. Raises CacheError."""
        return parsed(hash_pairs, (await self.many([("HGETALL", key)]))[0])


def milliseconds(seconds: float | None) -> int:
    """Return a time in the milliseconds that scripts take; 0 for None."""
    return 0 if seconds is None else round(seconds * 1000)

"""The secret that keys the tenants' hash: made once, kept in Redis, the same for every proxy."""

from __future__ import annotations

import secrets

from cache import keys
from cache.store.store import Store

SECRET_BYTES = 32


async def shared_secret(store: Store) -> bytes:
    """The secret that all proxies of this Redis share; the first to ask makes it. Raises CacheError."""
    await store.execute("SET", keys.SECRET, secrets.token_bytes(SECRET_BYTES), "NX")
    secret = await store.execute("GET", keys.SECRET)
    return bytes(secret)

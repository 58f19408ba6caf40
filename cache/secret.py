"""Share the secret that keys the tenants' hash: made once, kept in Redis, the same for all workers of all proxies.

Redis may lose it (FLUSHALL, a failover). Then the first worker to notice writes back the one that it knows, and all
others adopt the secret that is in Redis, so that all workers agree on every tenant's name again.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from collections.abc import Callable

from cache import keys
from cache.backoff import ExponentialBackoff
from cache.errors import CacheError, StoreCorrupt, StoreRefused
from cache.store.store import Script, Store

SECRET_BYTES = 32
LEAST_BYTES = 16  # a shorter one could be guessed, and is replaced
KEY_BYTES = 64  # the longest key of BLAKE2b
CHECK_SECONDS = 0.5  # after Redis lost the secret, workers may disagree for this long
RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS = 0.1, 2.0

# Reply: the secret in Redis, which is ARGV[1] if there was no usable one.
_AGREE = Script(
    "agree-on-secret",
    """
local found = redis.pcall('GET', KEYS[1])
if type(found) == 'string' and #found >= tonumber(ARGV[2]) then return found end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
""",
)


def usable_key(secret: bytes) -> bytes:
    """Return `secret` as a key of BLAKE2b: itself if it is short enough, else its digest."""
    return secret if len(secret) <= KEY_BYTES else hashlib.blake2b(secret).digest()


async def shared_secret(store: Store, known: bytes | None = None) -> bytes:
    """Return the secret that all proxies of this Redis share; write `known`, or a new one, if there is none.

    Raises CacheError.
    """
    offered = secrets.token_bytes(SECRET_BYTES) if known is None else known
    try:
        found = None if known is None else await store.execute("GET", keys.SECRET)
    except StoreRefused:  # a key of another type
        found = None
    if not isinstance(found, bytes) or len(found) < LEAST_BYTES:
        found = await store.run_script(_AGREE, [keys.SECRET], (offered, LEAST_BYTES))
    if not isinstance(found, bytes):
        raise StoreCorrupt("the secret in Redis is damaged")
    return found


class SharedSecret:
    """Keeps this worker's secret equal to the one in Redis. `adopt` is called with each new one."""

    def __init__(self, store: Store, adopt: Callable[[bytes], None]) -> None:
        self._store = store
        self._adopt = adopt
        self._secret: bytes | None = None
        self.agreed = asyncio.Event()

    async def run(self) -> None:
        """Compare until cancelled; `agreed` is set once the secret is known."""
        backoff = ExponentialBackoff(RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS)
        while True:
            await self._store.wait_available()
            try:
                secret = await shared_secret(self._store, self._secret)
            except CacheError:
                await asyncio.sleep(backoff.next_seconds(random.random()))
                continue
            backoff.reset()
            if secret != self._secret:
                self._secret = secret
                self._adopt(usable_key(secret))
            self.agreed.set()
            await asyncio.sleep(CHECK_SECONDS)

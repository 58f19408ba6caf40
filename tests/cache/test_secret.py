"""The tenants' secret: all workers agree on one, whatever Redis loses."""

from __future__ import annotations

import pytest

from cache import keys
from cache.secret import KEY_BYTES, LEAST_BYTES, SharedSecret, shared_secret, usable_key
from cache.store.store import Store
from proxy.tasks import Tasks
from tests.support.valkey import Valkey, eventually


async def test_after_a_flush_a_new_worker_agrees_with_the_old_one(store: Store, valkey: Valkey, tasks: Tasks) -> None:
    """Whichever secret gets into Redis first, both workers end with it."""
    old, new = list[bytes](), list[bytes]()
    tasks.keep(SharedSecret(store, old.append).run, "old")
    await eventually(lambda: old)
    valkey.flush()
    tasks.keep(SharedSecret(store, new.append).run, "new")
    await eventually(lambda: new and old[-1] == new[-1])
    assert await shared_secret(store) == new[-1]


async def test_a_worker_writes_back_the_secret_that_redis_lost(store: Store, valkey: Valkey, tasks: Tasks) -> None:
    """So contexts stored under it after the loss stay found, and nothing is adopted twice."""
    adopted = list[bytes]()
    tasks.keep(SharedSecret(store, adopted.append).run, "secret")
    await eventually(lambda: adopted)
    valkey.flush()
    await eventually(lambda: adopted[0] in valkey.ask("GET", keys.SECRET))
    assert len(adopted) == 1


@pytest.mark.parametrize("poison", [("SET", keys.SECRET, "short"), ("LPUSH", keys.SECRET, "x")])
async def test_a_secret_that_cannot_be_used_is_replaced(
    store: Store, valkey: Valkey, poison: tuple[str, ...]
) -> None:
    """One that could be guessed, and a key of another type."""
    valkey.ask(*poison)
    made = await shared_secret(store)
    assert len(made) >= LEAST_BYTES
    valkey.ask("DEL", keys.SECRET)
    valkey.ask(*poison)
    assert await shared_secret(store, made) == made
    assert await shared_secret(store) == made


@pytest.mark.parametrize("size", [LEAST_BYTES, KEY_BYTES, KEY_BYTES + 1, 10_000])
async def test_a_secret_of_any_length_is_a_usable_key(store: Store, valkey: Valkey, size: int) -> None:
    """A short one stays as it is; from a long one every worker makes the same key."""
    valkey.ask("SET", keys.SECRET, "s" * size)
    secret = await shared_secret(store)
    assert secret == b"s" * size
    assert len(usable_key(secret)) == min(size, KEY_BYTES)
    assert usable_key(secret) == usable_key(b"s" * size)

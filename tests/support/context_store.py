"""A store of contexts on real Valkeys, with its counts, and contexts to be stored."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from cache import keys
from cache.contexts import scripts
from cache.contexts.access import ContextLimits
from cache.contexts.rows import ContextStatus, Draft
from cache.contexts.store import ContextStore
from cache.store.store import Store, open_store
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.valkey import PATIENT_SECONDS, Valkey

MIB = 1024 * 1024
LIMITS = ContextLimits(
    total_bytes=64 * MIB,
    tenant_bytes=32 * MIB,
    pinned_bytes=4 * MIB,
    unlisted_pinned_bytes=4 * MIB,
    unchecked_bytes=16 * MIB,
    contexts_at_most=50,
    tags_at_most=20,
    grace_seconds=60,
    memory_bytes=32 * MIB,
    warming_seconds=60,
)
TENANTS = [f"{number:032x}" for number in range(3)]
ONE = TENANTS[0]


def url_of(nodes: list[Valkey]) -> str:
    if len(nodes) == 1:
        return nodes[0].url
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def keys_left(nodes: list[Valkey]) -> set[str]:
    """Every key on every node, but for the total over all tenants."""
    found: set[str] = set()
    for node in nodes:
        words = node.ask("KEYS", "*").split(b"\r\n")
        found |= {word.decode() for word in words if word.startswith(b"cairn:")}
    return found - {*scripts.OVERALL_KEYS, keys.CONTEXTS_SWEEPER}


class Opened:
    """A context store with its counts."""

    def __init__(self, store: Store, limits: ContextLimits, tasks: Tasks) -> None:
        self.evicted: Counter[str] = Counter()
        self.damaged = 0
        self.store = store
        self.tasks = tasks
        self.contexts = ContextStore(
            store, limits, clock=SystemClock(), tasks=tasks, evicted=self._evict, damaged=self._damage
        )

    def _evict(self, reason: str, number: int) -> None:
        self.evicted[reason] += number

    def _damage(self) -> None:
        self.damaged += 1


@asynccontextmanager
async def opened(nodes: list[Valkey], *, started: bool = True, **changes: Any) -> AsyncIterator[Opened]:
    tasks = Tasks()
    store = open_store(url_of(nodes), clock=SystemClock(), tasks=tasks, limit_seconds=PATIENT_SECONDS)
    await store.start()
    await store.wait_available()
    one = Opened(store, msgspec.structs.replace(LIMITS, **changes), tasks)
    if started:
        await one.contexts.start()
    try:
        yield one
    finally:
        await one.contexts.close()
        await store.close()
        await tasks.close()


numbers = iter(range(1, 1_000_000))


def draft(size: int = 40_000, seed: int | None = None, **changes: Any) -> Draft:
    """A context of one message of bytes that do not compress."""
    number = next(numbers)
    messages = random.Random(number if seed is None else seed).randbytes(size)
    fields: dict[str, Any] = {
        "id": f"cache-{number:032x}",
        "model": "m",
        "tools": b"",
        "messages": messages,
        "bounds": array("I", (0, size)),
        "ttl_seconds": 600.0,
        "expires_unix_seconds": None,
        "status": ContextStatus.READY,
        "tokens": size // 4,
        "value_usd": size / 4 * 1e-6,
    }
    return Draft(**{**fields, **changes})

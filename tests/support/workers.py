"""Workers for tests of what they share: each with an index, a journal and an in-flight board on one Redis."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping

from cache.index.fingerprint import Fingerprint
from cache.index.hashing import cut
from cache.index.prefix_index import PrefixIndex
from cache.replication.inflight import LoadBroadcast, Row
from cache.replication.journal import Journal
from cache.store.store import Store, open_store
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.valkey import PATIENT_SECONDS

NAMES = ["http://one:8000", "http://two:8000", "http://three:8000"]


class Numbered:
    """Replicas numbered in the order of their names."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def number_of(self, name: str) -> int | None:
        return self._names.index(name) if name in self._names else None

    def name_of(self, number: int) -> str | None:
        return self._names[number] if number < len(self._names) else None


class Worker:
    """One worker. `names` are its replicas in the order of its own numbers, `limit_seconds` its store's limit."""

    def __init__(
        self,
        url: str,
        writer: str,
        *,
        names: list[str] | None = None,
        lease_seconds: float = 0.3,
        limit_seconds: float = PATIENT_SECONDS,
    ) -> None:
        self.clock = SystemClock()
        self.tasks = Tasks()
        self.names = NAMES if names is None else names
        self.work: dict[str, Row] = {}
        self.heard: dict[str, Mapping[str, Row]] = {}
        self.index = PrefixIndex(origin=random.Random(writer).getrandbits(24))
        self.store: Store = open_store(url, clock=self.clock, tasks=self.tasks, limit_seconds=limit_seconds)
        self.journal = Journal(
            self.index,
            self.store,
            writer,
            clock=self.clock,
            tasks=self.tasks,
            replicas=Numbered(self.names),
            lease_seconds=lease_seconds,
        )
        self.board = LoadBroadcast(
            self.store,
            writer,
            clock=self.clock,
            tasks=self.tasks,
            read=lambda: self.work,
            absorb=self.heard.__setitem__,
            forget=self.forget,
        )

    def forget(self, writer: str) -> None:
        """A writer said goodbye."""
        self.heard.pop(writer, None)

    async def start(self) -> Worker:
        await self.store.start(PATIENT_SECONDS)
        await self.journal.start(PATIENT_SECONDS)
        await self.board.start()
        return self

    async def close(self) -> None:
        """As at a clean end."""
        await self.board.close()
        await self.journal.close()
        await self.store.close()
        await self.tasks.close()

    async def die(self) -> None:
        """As by SIGKILL: nothing more is sent, no lease given up."""
        await self.tasks.close()
        await self.store.close()

    def place(self, chain: Fingerprint, replica: int = 0) -> None:
        self.journal.place(replica, chain, chain.size_bytes / 4)

    def knows(self, chain: Fingerprint, replica: int = 0) -> bool:
        """True if the whole chain is held by the replica, as far as this worker knows."""
        held = self.index.match(chain).held.get(replica)
        return held is not None and held.blocks == len(chain)


def prompt(seed: int, size_bytes: int = 20_000) -> Fingerprint:
    """A chain that no other seed shares."""
    return cut(0, [random.Random(seed).randbytes(size_bytes)])


async def each(workers: list[Worker], act: Callable[[Worker], Awaitable[object]]) -> None:
    await asyncio.gather(*(act(worker) for worker in workers))

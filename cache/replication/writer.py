"""Write the journal: queue deltas, pack them into entries, and append these to the stream.

`enqueue` is on the path of a request and waits for nothing. While Redis is away deltas wait in the queue, up to a
bound; beyond it the oldest are dropped and counted.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from typing import Final, Protocol

from cache import keys
from cache.backoff import ExponentialBackoff
from cache.errors import CacheError
from cache.ports import Clock
from cache.replication import codec
from cache.replication.codec import HASH_BYTES, Batch, Began, Budgeted, Delta, Owned, Placed
from cache.replication.stats import JournalStats
from cache.store.store import Store

BATCH_INTERVAL_SECONDS: Final = 0.005  # deltas queued meanwhile go into one entry: readers pay per entry
ALONE_INTERVAL_SECONDS: Final = 0.05  # while no other writer is known
BATCH_BLOCKS: Final = 20_000  # boundaries of one entry, about 250 KB: a millisecond or two for a reader
WRITE_LIMIT_SECONDS: Final = 0.2  # of one entry; nothing waits for it
QUEUE_BYTES = 32 * 1024 * 1024  # memory for deltas that wait while Redis is away: three for each request
RECENT_SECONDS: Final = 5.0  # own entries are kept this long, to write them again if Redis loses everything
RECENT_BYTES = 4 * 1024 * 1024
RETRY_FIRST_SECONDS: Final = 0.05
RETRY_MOST_SECONDS: Final = 1.0

_DELTA_BYTES: Final = 260  # memory of a delta in addition to its boundaries, on average of a request's

_OF_REPLICAS = (Placed, Began, Budgeted, Owned)


class ReplicaNames(Protocol):
    """Maps replica numbers of this process to stable names and back."""

    def number_of(self, name: str) -> int | None:
        """Return the number of a replica, None if this process does not have it."""
        ...

    def name_of(self, number: int) -> str | None:
        """Return the name of a replica, None if this process does not have it."""
        ...


class JournalWriter:
    """Queues this worker's deltas and appends them to the stream. One per worker."""

    def __init__(
        self, store: Store, writer_id: str, replicas: ReplicaNames, clock: Clock, stats: JournalStats
    ) -> None:
        self._store = store
        self._replicas = replicas
        self._clock = clock
        self._stats = stats
        self.head = codec.own_head(codec.JOURNAL_VERSION, writer_id)
        self.alone = True
        self._queue: deque[Delta] = deque()
        self._queue_bytes = 0
        self._unsent: deque[bytes] = deque()  # packed, but not in the stream yet
        self._recent: deque[tuple[float, bytes]] = deque()
        self._recent_bytes = 0
        self._wake = asyncio.Event()

    @property
    def queued(self) -> int:
        """Number of deltas that are not packed yet."""
        return len(self._queue)

    def enqueue(self, delta: Delta) -> None:
        """Queue a delta for all other writers."""
        self._queue.append(delta)
        self._queue_bytes += _size_bytes(delta)
        while self._queue_bytes > QUEUE_BYTES:
            self._queue_bytes -= _size_bytes(self._queue.popleft())
            self._stats.dropped_queued += 1
        self._wake.set()

    def unsent(self) -> list[Batch]:
        """Return everything that is not in the stream yet, oldest first."""
        batches = [codec.decode_batch(payload)[1] for payload in self._unsent]
        batches.append(Batch(self._names(list(self._queue)), list(self._queue)))
        return batches

    def repeat_recent(self) -> None:
        """Queue the entries of the last seconds again: Redis lost them, perhaps before everyone had read them."""
        self._unsent.extend([payload for _, payload in self._recent])
        self._recent.clear()
        self._recent_bytes = 0
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled."""
        backoff = ExponentialBackoff(RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS)
        while True:
            await self._wake.wait()
            await self._store.wait_writable()
            if not self._pack():
                self._wake.clear()
                continue
            try:
                await self._send()
                backoff.reset()
                pause_seconds = ALONE_INTERVAL_SECONDS if self.alone else BATCH_INTERVAL_SECONDS
            except CacheError:  # the store has counted it
                pause_seconds = backoff.next_seconds(random.random())
            await asyncio.sleep(pause_seconds)

    async def flush(self) -> None:
        """Write everything that is queued. Raises CacheError."""
        while self._pack():
            await self._send()

    def _pack(self) -> bool:
        """Make one entry of queued deltas unless one is waiting already; return whether there is one to send."""
        if self._unsent:
            return True
        deltas: list[Delta] = []
        blocks = 0
        while self._queue and blocks < BATCH_BLOCKS:
            deltas.append(self._queue.popleft())
            blocks += _blocks(deltas[-1])
            self._queue_bytes -= _size_bytes(deltas[-1])
        if not deltas:
            return False
        self._unsent.append(codec.encode_batch(self.head, self._names(deltas), deltas))
        self._stats.written_deltas += len(deltas)
        return True

    def _names(self, deltas: list[Delta]) -> dict[int, str]:
        numbers = {delta.replica for delta in deltas if isinstance(delta, _OF_REPLICAS)}
        return {number: name for number in numbers if (name := self._replicas.name_of(number)) is not None}

    async def _send(self) -> None:
        """Append one entry. Sending it twice is harmless, so one that may have arrived is sent again."""
        payload = self._unsent[0]
        await self._store.execute("XADD", keys.JOURNAL, "*", "d", payload, limit_seconds=WRITE_LIMIT_SECONDS)
        self._unsent.popleft()
        self._stats.written_entries += 1
        self._stats.written_bytes += len(payload)
        self._keep_recent(payload)

    def _keep_recent(self, payload: bytes) -> None:
        now = self._clock.monotonic()
        self._recent.append((now, payload))
        self._recent_bytes += len(payload)
        while self._recent_bytes > RECENT_BYTES or self._recent[0][0] < now - RECENT_SECONDS:
            self._recent_bytes -= len(self._recent.popleft()[1])
            if not self._recent:
                return


def _blocks(delta: Delta) -> int:
    """Return the weight of a delta in an entry: its number of boundaries."""
    return len(delta.hashes) // HASH_BYTES if isinstance(delta, Placed) else 1


def _size_bytes(delta: Delta) -> int:
    return _DELTA_BYTES + len(delta.hashes) + len(delta.ends) if isinstance(delta, Placed) else _DELTA_BYTES

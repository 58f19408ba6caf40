"""Write snapshots of the index, if this worker holds the lease and enough has changed.

After each snapshot all epochs and budgets are repeated in the stream, so that workers that decided differently while
Redis was away agree again.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from cache.errors import CacheError
from cache.index.prefix_index import PrefixIndex
from cache.index.rows import ReplicaRow, RunRow
from cache.ports import Clock
from cache.replication import codec
from cache.replication.codec import Began, Budgeted, SnapshotChunk
from cache.replication.owners import ObjectLocations
from cache.replication.rebuild import SLICE_SECONDS, StreamReader
from cache.replication.snapshots import PARTS_AT_ONCE, LeaseAndSnapshots
from cache.replication.stats import JournalStats
from cache.replication.writer import JournalWriter, ReplicaNames

SNAPSHOT_ENTRIES = 4_096  # entries since the last snapshot: about as many as a start replays
SNAPSHOT_REST: Final = 10
"""A snapshot for the entries' sake comes this many times as long after the last as that took. A large index takes a
second, in which many workers write as many entries as call for the next; and who loads one needs time for it."""

SNAPSHOT_BYTES = 32 * 1024 * 1024  # bytes since the last snapshot: half a second of reading
SNAPSHOT_SECONDS: Final = 60.0  # since the last snapshot, if anything changed
SNAPSHOT_ROWS: Final = 100  # of one part: about 1 ms of work at 50 boundaries a row
SNAPSHOT_OWNERS: Final = 2_000


class SnapshotWriter:
    """Writes snapshots. One per worker. Set `wanted` to force one, as after Redis lost everything."""

    def __init__(
        self,
        index: PrefixIndex,
        locations: ObjectLocations,
        replicas: ReplicaNames,
        lease: LeaseAndSnapshots,
        reader: StreamReader,
        writer: JournalWriter,
        clock: Clock,
        stats: JournalStats,
    ) -> None:
        self._index = index
        self._locations = locations
        self._replicas = replicas
        self._lease = lease
        self._reader = reader
        self._writer = writer
        self._clock = clock
        self._stats = stats
        self.wanted = True
        self._last_seconds = float("-inf")
        self._took_seconds = 0.0

    def is_due(self) -> bool:
        """Return whether a snapshot should be written now."""
        entries, size_bytes = self._reader.read_since_snapshot
        age_seconds = self._clock.monotonic() - self._last_seconds
        return (
            self.wanted
            or self._reader.snapshot_is_damaged
            or (entries >= SNAPSHOT_ENTRIES and age_seconds >= SNAPSHOT_REST * self._took_seconds)
            or size_bytes >= SNAPSHOT_BYTES
            or (entries > 0 and age_seconds >= SNAPSHOT_SECONDS)
        )

    async def write(self) -> None:
        """Write the index part by part. Later changes are in the stream after the position that is noted first."""
        reader = self._reader
        self._last_seconds = self._clock.monotonic()
        position = reader.position
        since, reader.read_since_snapshot = reader.read_since_snapshot, [0, 0]
        snapshot = secrets.token_hex(8)
        number = 0
        try:
            async for parts in self._packed():
                await self._lease.put_parts(snapshot, number, parts)
                number += len(parts)
            committed = await self._lease.commit(snapshot, number, position, self._clock.unix())
        except CacheError:
            committed = False
        if not committed:
            self._stats.failed_snapshots += 1
            reader.read_since_snapshot = [
                old + new for old, new in zip(since, reader.read_since_snapshot, strict=True)
            ]
            return
        self._took_seconds = self._clock.monotonic() - self._last_seconds
        self.wanted = reader.snapshot_is_damaged = False
        self._stats.snapshots += 1
        self._repeat_decisions()

    async def _packed(self) -> AsyncIterator[list[bytes]]:
        """Yield the encoded parts, several at a time. Other work has its turn in between."""
        parts: list[bytes] = []
        began = self._clock.monotonic()
        for chunk in self._chunks():
            parts.append(codec.encode_chunk(chunk))
            if len(parts) == PARTS_AT_ONCE:
                yield parts
                parts = []
                began = self._clock.monotonic()
            elif self._clock.monotonic() - began > SLICE_SECONDS:
                await asyncio.sleep(0)
                began = self._clock.monotonic()
        if parts:
            yield parts

    def _chunks(self) -> Iterator[SnapshotChunk]:
        for rows in self._index.snapshot(SNAPSHOT_ROWS):
            names = {each: name for each in _mentioned(rows) if (name := self._replicas.name_of(each)) is not None}
            yield SnapshotChunk(names, rows)
        for owners in self._locations.chunks(SNAPSHOT_OWNERS):
            yield SnapshotChunk({}, (), owners)

    def _repeat_decisions(self) -> None:
        for replica, stats in self._index.replicas().items():
            if self._replicas.name_of(replica) is not None:
                self._writer.enqueue(Began(replica, stats.epoch))
                self._writer.enqueue(Budgeted(replica, None, stats.budget_tokens))


def _mentioned(rows: Sequence[ReplicaRow | RunRow]) -> set[int]:
    """Return the replicas in `rows`. Each part has the names of its own, so that it needs no other part."""
    found: set[int] = set()
    for row in rows:
        if isinstance(row, ReplicaRow):
            found.add(row.replica)
        else:
            found.update([holder.replica for holder in row.holders])
    return found

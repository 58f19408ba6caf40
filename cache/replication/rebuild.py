"""Read the journal's stream, and rebuild the index from the last snapshot when the stream alone is not enough.

A rebuild loads the snapshot, then replays the entries after it. It happens at the start, after Redis lost the stream,
and after this reader fell behind the oldest entry. Damaged values in Redis are dropped and counted, never fatal:
without a usable snapshot the index is rebuilt from the stream alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from cache import keys
from cache.backoff import ExponentialBackoff
from cache.errors import CacheError, StoreCorrupt, StoreRefused
from cache.index.prefix_index import PrefixIndex
from cache.index.rows import ReplicaRow, RunRow
from cache.ports import Clock
from cache.replication import codec
from cache.replication.apply import DeltaApplier
from cache.replication.owners import ObjectLocations
from cache.replication.snapshots import START, LeaseAndSnapshots, StreamId, format_id, parse_id
from cache.replication.stats import JournalStats
from cache.replication.writer import RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS, JournalWriter, ReplicaNames
from cache.store.replies import StreamEntry
from cache.store.store import Store

READ_INTERVAL_SECONDS: Final = 0.004  # between two reads, so that one reply has the entries of several writers
READ_BLOCK_SECONDS: Final = 0.5
READ_ENTRIES: Final = 256
REPLAY_LIMIT_SECONDS: Final = 2.0  # limit of one read while the stream is replayed
MAX_PLACED_TOKENS: Final = 2**53
SLICE_SECONDS: Final = 0.004  # of applying or loading before the event loop may run


class StreamReader:
    """Follows the stream. `synced` is True while the index holds everything up to `position`."""

    def __init__(
        self,
        store: Store,
        lease: LeaseAndSnapshots,
        index: PrefixIndex,
        rows: SnapshotRows,
        applier: DeltaApplier,
        writer: JournalWriter,
        clock: Clock,
        stats: JournalStats,
    ) -> None:
        self._store = store
        self._lease = lease
        self._index = index
        self._rows = rows
        self._applier = applier
        self._writer = writer
        self._clock = clock
        self._stats = stats
        self.position: StreamId = START
        self.ready = asyncio.Event()
        self.own_budgets_until_seconds = 0.0
        self.read_since_snapshot = [0, 0]  # entries, bytes
        self.snapshot_is_damaged = False
        self._load_wanted = True
        self._losses = 0
        self._refused = False

    @property
    def live(self) -> bool:
        """True if the index contains the whole stream, and the stream can be read."""
        return self._applier.live and not self._refused

    @property
    def synced(self) -> bool:
        """True if the index has been rebuilt since the last loss."""
        return self._applier.live

    def lost(self) -> None:
        """Note that Redis lost the stream: read the new one from the start. This worker still knows the old one."""
        self._losses += 1
        self._applier.live = False

    def fell_behind(self) -> None:
        """Note that entries were trimmed before they were read here: load the snapshot."""
        self._applier.live = False
        self._load_wanted = True

    async def run(self) -> None:
        """Read until cancelled."""
        backoff = ExponentialBackoff(RETRY_FIRST_SECONDS, RETRY_MOST_SECONDS)
        while True:
            await self._store.wait_available()
            try:
                if not self.synced:
                    await self._rebuild()
                position = self.position
                entries = await self._store.read_stream(
                    keys.JOURNAL, format_id(position), READ_BLOCK_SECONDS, READ_ENTRIES
                )
                if entries and self.synced and self.position == position:
                    await self._apply(entries, own=False)
            except CacheError as error:
                self._refused = isinstance(error, StoreRefused)  # an outage is visible in the store's state instead
                await asyncio.sleep(backoff.next_seconds(random.random()))
                continue
            self._refused = False
            backoff.reset()
            if entries:
                await asyncio.sleep(READ_INTERVAL_SECONDS)

    async def _apply(self, entries: list[StreamEntry], *, own: bool) -> None:
        """Apply entries in order; with `own`, this writer's entries as well."""
        began = self._clock.monotonic()
        for entry in entries:
            self._apply_entry(entry, own=own)
            if self._clock.monotonic() - began > SLICE_SECONDS:
                await asyncio.sleep(0)
                began = self._clock.monotonic()

    def _apply_entry(self, entry: StreamEntry, *, own: bool) -> None:
        stats = self._stats
        stats.read_entries += 1
        self.read_since_snapshot[0] += 1
        self.read_since_snapshot[1] += len(entry.payload)
        self.position = parse_id(entry.id)
        if own or not entry.payload.startswith(self._writer.head):
            self._applier.apply_payload(entry.payload)
        else:
            stats.own_entries += 1
            if self._clock.monotonic() < self.own_budgets_until_seconds:
                self._applier.apply_own_budgets(entry.payload)
        stats.lag_seconds = max(0.0, self._clock.unix() - self.position[0] / 1000)

    async def _rebuild(self) -> None:
        """Load the snapshot if one is wanted, and replay the stream. Raises CacheError."""
        losses = self._losses
        position = START
        loaded = False
        if self._load_wanted and (fetched := await self._fetch()) is not None:
            stream_id, parts = fetched
            await self._load(parts)
            position, loaded = stream_id, True
        while entries := await self._store.read_range(
            keys.JOURNAL, format_id(position), READ_ENTRIES, limit_seconds=REPLAY_LIMIT_SECONDS
        ):
            await self._apply(entries, own=loaded)
            position = parse_id(entries[-1].id)
        self.position = position
        if losses == self._losses:
            self._load_wanted = False
            self._applier.live = True
            self._stats.rebuilds += 1
            self.ready.set()

    async def _fetch(self) -> tuple[StreamId, list[bytes | None]] | None:
        try:
            fetched = await self._lease.fetch()
        except StoreCorrupt:
            self._stats.dropped_corrupt += 1
            self.snapshot_is_damaged = True
            return None
        return None if fetched is None else (fetched[0].stream_id, fetched[1])

    async def _load(self, parts: list[bytes | None]) -> None:
        """Replace the index by a snapshot, then apply the deltas that no other writer has read yet."""
        replica_of: dict[int, int] = {}
        began = self._clock.monotonic()
        for _ in self._index.load(self._rows.of(parts, replica_of), replica_of):
            if self._clock.monotonic() - began > SLICE_SECONDS:
                await asyncio.sleep(0)
                began = self._clock.monotonic()
        for batch in self._writer.unsent():
            self._applier.apply(batch)


class SnapshotRows:
    """Decodes and checks the parts of a snapshot, one at a time."""

    def __init__(self, locations: ObjectLocations, replicas: ReplicaNames, clock: Clock, stats: JournalStats) -> None:
        self._locations = locations
        self._replicas = replicas
        self._clock = clock
        self._stats = stats

    def of(self, parts: list[bytes | None], replica_of: dict[int, int]) -> Iterator[ReplicaRow | RunRow]:
        """Yield the valid rows of all parts; fill `replica_of` before the rows that need it. Empties `parts`.

        The index leaves out rows below a dropped one.
        """
        seen: set[int] = set()
        named = set(replica_of.values())
        while parts:
            try:
                chunk = codec.decode_chunk(parts.pop(0) or b"")
            except StoreCorrupt:
                self._stats.dropped_corrupt += 1
                continue
            for made_id, name in chunk.owners.items():
                self._locations.learn(made_id, name)
            for number, name in chunk.names.items():
                if number in replica_of or (ours := self._replicas.number_of(name)) is None or ours in named:
                    continue
                replica_of[number] = ours
                named.add(ours)
            for row in chunk.rows:
                if not codec.is_valid(row) or (isinstance(row, ReplicaRow) and row.replica in seen):
                    self._stats.dropped_invalid += 1
                    continue
                if isinstance(row, ReplicaRow):
                    seen.add(row.replica)
                yield self._bounded(row)

    def _bounded(self, row: ReplicaRow | RunRow) -> ReplicaRow | RunRow:
        """Limit figures to values that can be written again.

        A clock ahead of ours must not make its placements the newest for ever.
        """
        if isinstance(row, ReplicaRow):
            return row if row.placed_tokens <= MAX_PLACED_TOKENS else replace(row, placed_tokens=MAX_PLACED_TOKENS)
        now = self._clock.unix()
        if all(holder.stamp <= now for holder in row.holders):
            return row
        return replace(row, holders=tuple([replace(each, stamp=min(each.stamp, now)) for each in row.holders]))

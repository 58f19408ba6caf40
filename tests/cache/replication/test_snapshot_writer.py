"""Snapshots, recent entries and parts that are written and read on fakes, without Redis."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cache.errors import CacheError, StoreCorrupt
from cache.index.fingerprint import Fingerprint
from cache.index.prefix_index import PrefixIndex
from cache.index.rows import ReplicaRow, RunRow
from cache.replication import codec, snapshot_writer, snapshots
from cache.replication.codec import MAX_ENTRY_BYTES, Began, SnapshotChunk
from cache.replication.owners import ObjectLocations
from cache.replication.rebuild import SLICE_SECONDS, SnapshotRows
from cache.replication.snapshot_writer import SNAPSHOT_BYTES, SNAPSHOT_ENTRIES, SNAPSHOT_REST
from cache.replication.snapshots import PARTS_AT_ONCE, LeaseAndSnapshots, parse_id
from cache.replication.stats import JournalStats
from cache.replication.writer import RECENT_BYTES, RECENT_SECONDS, JournalWriter
from tests.cache.replication.test_verbs import LONG, Bench
from tests.support.clock import FakeClock
from tests.support.fake_store import FakeStore
from tests.support.operations import operations
from tests.support.workers import NAMES, Numbered, prompt


class Number(int):
    """The number of a replica, which counts how often it is compared."""

    count = 0

    def __eq__(self, other: object) -> bool:
        Number.count += 1
        return super().__eq__(other)

    __hash__ = int.__hash__


class Lease:
    """Takes the parts of a snapshot, up to `most`, and commits it if it may."""

    def __init__(self, most: int = 99, *, commits: bool = True) -> None:
        self.most = most
        self.commits = commits
        self.parts: list[bytes] = []
        self.sent: list[int] = []
        self.committed_at: Any = None
        self.clock: FakeClock | None = None
        self.commit_seconds = 0.0

    async def put_parts(self, snapshot: str, first: int, parts: Sequence[bytes]) -> None:
        if first + len(parts) > self.most:
            raise CacheError("away")
        assert first == len(self.parts)
        self.parts += parts
        self.sent.append(len(parts))

    async def commit(self, snapshot: str, parts: int, position: tuple[int, int], unix_seconds: float) -> bool:
        self.committed_at = (parts, position)
        if self.clock is not None:
            self.clock.advance(self.commit_seconds)
        return self.commits


def with_lease(bench: Bench, lease: Lease) -> Any:
    writer = bench.journal._snapshots  # noqa: SLF001 - internal state that no public name shows
    writer._lease = lease  # type: ignore[assignment]  # noqa: SLF001
    return writer


async def test_a_snapshot_holds_the_index_and_is_followed_by_its_epochs_and_budgets() -> None:
    """Only of replicas that have a name; those that only this process knows mean nothing to others."""
    bench, lease = Bench(), Lease()
    writer = with_lease(bench, lease)
    bench.index.place(0, LONG, 5_000, 1.0)
    bench.index.place(99, LONG, 5_000, 2.0)
    bench.journal._reader.position = (7, 1)  # noqa: SLF001
    bench.journal._reader.read_since_snapshot = [3, 300]  # noqa: SLF001
    assert writer.is_due()
    await writer.write()
    assert not writer.is_due()
    assert lease.committed_at == (len(lease.parts), (7, 1))
    names = [name for part in lease.parts for name in codec.decode_chunk(part).names.values()]
    assert set(names) == {NAMES[0]}
    assert Began(0, 0) in bench.queued()
    assert bench.journal.stats.snapshots == 1


@pytest.mark.parametrize("lease", [Lease(most=0), Lease(commits=False)])
async def test_a_snapshot_that_was_not_committed_is_counted_and_leaves_its_reasons(lease: Lease) -> None:
    """Redis failed in it, or another worker took the lease meanwhile: what was read since stays to be covered."""
    bench = Bench()
    writer = with_lease(bench, lease)
    bench.index.place(0, LONG, 5_000, 1.0)
    reader = bench.journal._reader  # noqa: SLF001
    reader.read_since_snapshot = [3, 300]
    await writer.write()
    assert reader.read_since_snapshot == [3, 300]
    assert (writer.wanted, bench.journal.stats.failed_snapshots, bench.journal.stats.snapshots) == (True, 1, 0)
    assert bench.queued() == []


async def test_a_snapshot_for_the_sake_of_entries_waits_in_proportion_to_what_the_last_one_took() -> None:
    """Else a large index would be written all the time where many workers write. One that is wanted does not wait."""
    bench, lease = Bench(), Lease()
    writer = with_lease(bench, lease)
    lease.commit_seconds, lease.clock = 2.0, bench.clock
    await writer.write()
    reader = bench.journal._reader  # noqa: SLF001 - internal state that no public name shows
    reader.read_since_snapshot = [SNAPSHOT_ENTRIES, 0]
    bench.clock.advance(SNAPSHOT_REST * 2.0 - 2.1)
    assert not writer.is_due()
    bench.clock.advance(0.2)
    assert writer.is_due()
    reader.read_since_snapshot = [1, SNAPSHOT_BYTES]
    bench.clock.advance(-0.2)
    assert writer.is_due()
    reader.read_since_snapshot = [0, 0]
    writer.wanted = True
    assert writer.is_due()


async def test_parts_of_a_snapshot_are_written_and_read_several_at_a_time() -> None:
    """A round trip for each would take minutes for a large index, in which the first ones expire."""
    store = FakeStore()
    lease = LeaseAndSnapshots(store.as_store(), "w", lease_seconds=1.0)
    trips: list[int] = []
    run, held = store.execute_many, dict[str, bytes]()

    async def counted(commands: Sequence[Sequence[Any]], limit_seconds: float | None = None) -> list[Any]:
        trips.append(len(commands))
        return await run(commands, limit_seconds)

    store.execute_many = counted  # type: ignore[method-assign]
    store.replies["SET"] = lambda key, part, *_: held.update({key: part})
    store.replies["GET"] = held.get
    store.replies["HMGET"] = [b"s", b"1-1", b"%d" % (2 * PARTS_AT_ONCE + 1)]
    parts = [b"%d" % number for number in range(2 * PARTS_AT_ONCE + 1)]
    await lease.put_parts("s", 0, parts[:PARTS_AT_ONCE])
    await lease.put_parts("s", PARTS_AT_ONCE, parts[PARTS_AT_ONCE:])
    trips.clear()
    fetched = await lease.fetch()
    assert fetched is not None
    assert fetched[1] == parts
    assert trips == [PARTS_AT_ONCE, PARTS_AT_ONCE, 1]


@pytest.mark.parametrize(("part_seconds", "turns"), [(0.0, 0), (SLICE_SECONDS * 0.6, 4), (SLICE_SECONDS * 2, 9)])
async def test_other_work_has_its_turn_between_the_parts_of_a_snapshot(
    monkeypatch: pytest.MonkeyPatch, part_seconds: float, turns: int
) -> None:
    """Also between those that are sent together, if they take long."""
    monkeypatch.setattr(snapshot_writer, "SNAPSHOT_ROWS", 1)
    bench, lease = Bench(), Lease()
    writer = with_lease(bench, lease)
    for seed in range(9):
        bench.index.place(0, prompt(seed), 5_000, 1.0)
    encode, taken = codec.encode_chunk, 0

    def slow(chunk: SnapshotChunk) -> bytes:
        bench.clock.advance(part_seconds)
        return encode(chunk)

    async def others() -> None:
        nonlocal taken
        while lease.committed_at is None:
            taken += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(codec, "encode_chunk", slow)
    await asyncio.gather(writer.write(), others())
    assert lease.sent == [PARTS_AT_ONCE, 2]
    assert taken == turns


async def test_own_entries_are_kept_for_some_seconds_and_some_megabytes() -> None:
    """To write them again if Redis loses everything; the newest is kept whatever its size, until it is old."""
    store, clock = FakeStore(), FakeClock()
    writer = JournalWriter(store.as_store(), "w", Numbered(NAMES), clock, JournalStats())

    async def send(payload: bytes) -> None:
        writer._unsent.append(payload)  # noqa: SLF001 - internal state that no public name shows
        await writer.flush()

    await send(b"old")
    clock.advance(RECENT_SECONDS + 0.1)
    await send(b"new")
    await send(b"x" * RECENT_BYTES)
    writer.repeat_recent()
    assert list(writer._unsent) == [b"x" * RECENT_BYTES]  # noqa: SLF001
    await writer.flush()
    await send(b"x" * (RECENT_BYTES + 1))
    writer.repeat_recent()
    assert list(writer._unsent) == []  # noqa: SLF001
    assert [command[-1] for _, command in store.ran][:2] == [b"old", b"new"]


def test_what_is_too_large_to_be_an_entry_is_refused_unread() -> None:
    noise = b"\1" * (MAX_ENTRY_BYTES + 1)
    with pytest.raises(StoreCorrupt, match="journal entry is too large"):
        codec.decode_batch(noise)
    with pytest.raises(StoreCorrupt, match="vector is too large"):
        codec.decode_vector(noise)


@pytest.mark.parametrize("text", [b"", b"x", b"1-x", b"-1-0", b"18446744073709551616-0", b"0-18446744073709551616"])
def test_a_stream_id_that_redis_cannot_have_written_is_damage(text: bytes) -> None:
    with pytest.raises(StoreCorrupt):
        parse_id(text)


def test_a_stream_id_without_its_second_number_is_its_first() -> None:
    assert [parse_id(text) for text in (b"7", b"7-0", b"18446744073709551615-5")] == [(7, 0), (7, 0), (2**64 - 1, 5)]


@pytest.mark.parametrize("parts", [b"-1", b"%d" % (snapshots.MAX_PARTS + 1), b"many"])
async def test_a_snapshots_head_with_an_impossible_number_of_parts_is_damage(parts: bytes) -> None:
    store = FakeStore()
    store.replies["HMGET"] = [b"id", b"1-0", parts]
    with pytest.raises(StoreCorrupt):
        await LeaseAndSnapshots(store.as_store(), "w", lease_seconds=1.0).head()


def test_lost_and_damaged_parts_and_rows_that_come_twice_are_left_out_and_counted() -> None:
    index, stats = PrefixIndex(origin=1), JournalStats()
    index.place(0, LONG, 5_000, 1.0)
    chunks = [SnapshotChunk({0: NAMES[0]}, rows) for rows in index.snapshot()]
    first, *others = [codec.encode_chunk(chunk) for chunk in chunks]
    rows = SnapshotRows(ObjectLocations(), Numbered(NAMES), FakeClock(), stats)
    replica_of: dict[int, int] = {}
    read = list(rows.of([first, None, b"junk", first, *others], replica_of))
    assert (stats.dropped_corrupt, stats.dropped_invalid) == (2, 1)
    assert replica_of == {0: 0}
    loaded = PrefixIndex()
    for _ in loaded.load(read, replica_of):
        pass
    assert loaded.match(LONG).held[0].blocks == len(LONG)


def test_a_part_of_a_snapshot_names_only_the_replicas_in_its_rows() -> None:
    """With 1,000 replicas the names of all in each part were most of the snapshot, and took 44 ms a part to write."""
    bench = Bench()
    writer = with_lease(bench, Lease())
    for number in range(300):
        prompt = Fingerprint(array("Q", [number + 1]), array("I", [2_048]))
        bench.index.place(number // 100, prompt, 512, float(number))
    chunks = list(writer._chunks())  # noqa: SLF001 - as `write` takes them
    assert sum(len(chunk.rows) for chunk in chunks) > 300
    for chunk in chunks:
        held = {holder.replica for row in chunk.rows if isinstance(row, RunRow) for holder in row.holders}
        assert chunk.names.keys() == held | {row.replica for row in chunk.rows if isinstance(row, ReplicaRow)}


def test_reading_a_part_takes_no_longer_with_more_replicas_known_already() -> None:
    """Each name of each part was compared with all known replicas: a load with 1,000 held the worker for 146 ms."""

    def compared(known: int) -> int:
        Number.count = 0
        names = {number: f"r{number}" for number in range(known, known + 50)}
        numbers: Any = SimpleNamespace(number_of=lambda name: int(name[1:]))
        rows = SnapshotRows(ObjectLocations(), numbers, FakeClock(), JournalStats())
        list(rows.of([codec.encode_chunk(SnapshotChunk(names, ()))], {each: Number(each) for each in range(known)}))
        return Number.count

    assert compared(1_000) < compared(10) + 1_000


def test_a_row_that_a_thousand_replicas_hold_is_read_in_the_time_of_its_holders() -> None:
    """All replicas hold a system prompt, and each holder was compared with those before it."""

    def work(holders: int) -> int:
        index, prompt = PrefixIndex(origin=1), Fingerprint(array("Q", [7]), array("I", [2_048]))
        for replica in range(holders):
            index.place(replica, prompt, 512, 1.0)
        rows = [row for chunk in index.snapshot() for row in chunk]
        loaded = PrefixIndex()
        cost = operations(lambda: list(loaded.load(rows)))
        assert len(loaded.match(prompt).held) == holders
        return cost

    assert work(800) < 6 * work(200)

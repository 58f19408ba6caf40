"""Redis is a trust boundary: any bytes decode to valid values or are dropped, and the index stays usable."""

from __future__ import annotations

import contextlib
import math
from array import array
from datetime import date
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.contexts import room, rows, segments, store
from cache.contexts.memory import ContextMemory
from cache.contexts.retention import choose
from cache.errors import CacheError, StoreCorrupt
from cache.index.fingerprint import Fingerprint
from cache.index.hashing import cut
from cache.index.placement import Placement
from cache.index.prefix_index import UNLIMITED_TOKENS, PrefixIndex
from cache.index.rows import HolderRow, ReplicaRow, RunRow
from cache.replication import codec
from cache.replication.apply import MAX_EPOCH_STEP, DeltaApplier, Listeners
from cache.replication.codec import Batch, SnapshotChunk
from cache.replication.cold_claims import ColdClaims
from cache.replication.owners import ObjectLocations
from cache.replication.rebuild import SnapshotRows
from cache.replication.restarts import RestartDetector
from cache.replication.snapshots import LeaseAndSnapshots, parse_id
from cache.replication.stats import JournalStats
from cache.secret import shared_secret
from cache.store.replies import entries_of_range, entries_of_read, parsed
from cache.store.store import open_store
from cache.totals import Totals, read_totals
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.clock import FakeClock
from tests.support.workers import NAMES, Numbered, prompt

ALL_NAMES = dict(enumerate(NAMES))
CHAINS = [prompt(seed, 6_000) for seed in range(3)]
CHAINS.append(cut(0, [b"x" * 9_000]))
CHAINS.append(cut(0, [b"x" * 12_000]))  # shares its beginning with the one before

numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**31 + 1, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64 - 1]),
)
floats = st.one_of(st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 1.7e9), numbers)


@st.composite
def chains(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Hashes and ends: a real prompt's, with some of its boundaries changed, or arbitrary bytes."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=40)), draw(st.binary(max_size=20))
    chain = draw(st.sampled_from(CHAINS))
    hashes, ends = array("Q", chain.hashes), array("I", chain.ends)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(ends) - 1))
        ends[at] = draw(st.sampled_from([0, 1, ends[at - 1], 2**32 - 1, min(ends[at] + 1, 2**32 - 1)]))
    keep = draw(st.integers(0, len(ends)))
    return hashes[:keep].tobytes(), ends[:keep].tobytes()


@st.composite
def deltas(draw: st.DrawFn) -> list[Any]:
    """One delta as it lies in an entry, with any numbers."""
    tag = draw(st.integers(0, 8))
    hashes, ends = draw(chains())
    fields: list[Any] = [draw(numbers) for _ in range(3)]
    if tag == 0:
        replica, placement = draw(st.integers(0, 3)), draw(st.integers(0, 5))
        return [0, replica, placement, draw(numbers), hashes, ends, draw(numbers), draw(floats)]
    if tag in (1, 2, 4, 7):
        fields[0] = draw(st.integers(0, 5))
        extra = [draw(st.one_of(st.none(), numbers))] if tag == 2 else []
        return [tag, *fields[: {1: 2, 2: 3, 4: 2, 7: 1}[tag]], *extra]
    replica = draw(st.integers(0, 3))
    if tag == 6:
        return [6, replica, draw(st.text(max_size=300))]
    return [tag, replica, *fields[: 2 if tag == 5 else 1]]


class Usable:
    """A worker's index with what applies deltas and loads snapshots, and its use as requests make it."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.index = PrefixIndex(origin=1)
        self.sent: list[Any] = []
        self.stats = JournalStats()
        self.locations = ObjectLocations()
        replicas = Numbered(NAMES)
        restarts = RestartDetector(self.index, self.sent.append, self.clock)
        self.applier = DeltaApplier(
            self.index, self.locations, restarts, replicas, Listeners(self._placed), self.clock, self.stats
        )
        self.rows = SnapshotRows(self.locations, replicas, self.clock, self.stats)

    def _placed(self, placement: int, replica: int, fingerprint: Fingerprint, prompt_tokens: float) -> None:
        del placement, replica
        prompt_tokens / fingerprint.ends[-1]  # as the round-robin baseline does

    def use(self) -> None:
        """Route and answer real requests, look at every figure, evict, write a snapshot and read it back."""
        for number, chain in enumerate(CHAINS):
            found = self.index.match(chain)
            assert all(held.tokens >= 0 and held.blocks <= len(chain) for held in found.held.values())
            placement: Placement = self.index.place(number % 3, chain, 3_000.0, self.clock.unix())
            self.index.answered(placement, 3_000, 1_000, 50, self.clock.unix())
        assert all(stats.blocks >= 0 and stats.tokens >= 0 for stats in self.index.replicas().values())
        while self.index.tend(self.clock.unix()):
            pass
        written = [codec.encode_chunk(SnapshotChunk(ALL_NAMES, rows)) for rows in self.index.snapshot(2)]
        replica_of: dict[int, int] = {}
        for _ in self.index.load(self.rows.of(list(written), replica_of), replica_of):
            pass
        for delta in self.sent:
            codec.encode_batch(b"", ALL_NAMES, [delta])


@settings(max_examples=150, deadline=None)
@given(st.lists(deltas(), max_size=8), st.lists(deltas(), max_size=8))
def test_an_index_stays_usable_after_any_journal_entries(first: list[Any], second: list[Any]) -> None:
    """Entries with any numbers and any chains, between real requests."""
    worker = Usable()
    for entry in (first, second):
        for delta in (entry, *[[each] for each in entry]):
            payload = codec.own_head(codec.JOURNAL_VERSION, "x") + msgspec.msgpack.encode([ALL_NAMES, delta])
            worker.applier.apply_payload(payload)
        worker.use()


def test_what_an_index_writes_it_reads_back_whole() -> None:
    """No row of an undamaged index is taken for a damaged one."""
    worker = Usable()
    worker.use()
    before = {number: (stats.blocks, stats.tokens) for number, stats in worker.index.replicas().items()}
    worker.use()
    after = {number: (stats.blocks, stats.tokens) for number, stats in worker.index.replicas().items()}
    assert before == after
    assert (worker.stats.dropped_invalid, worker.stats.dropped_corrupt) == (0, 0)


@st.composite
def snapshot_rows(draw: st.DrawFn) -> list[Any]:
    """Rows as an index writes them, with some fields replaced, some rows twice and some in another order."""
    index = PrefixIndex(origin=2)
    for number, chain in enumerate(CHAINS):
        index.place(number % 3, chain, 3_000.0, 1_600_000_000.0 + number)
    found: list[Any] = [row for part in index.snapshot(100) for row in part]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(found) - 1))
        row = found[at]
        if isinstance(row, ReplicaRow):
            field = draw(st.sampled_from(row.__struct_fields__))
            found[at] = msgspec.structs.replace(row, **{field: draw(floats if field == "ttl_seconds" else numbers)})
            continue
        field = draw(st.sampled_from(row.__struct_fields__))
        hashes, ends = draw(chains())
        value: Any = {
            "parent": draw(st.one_of(st.none(), numbers, st.just(found[-1].hashes[-8:]).map(_first))),
            "hashes": hashes,
            "ends": ends,
            "tokens": draw(st.one_of(st.binary(max_size=20), st.just(row.tokens[::-1]))),
            "known": draw(numbers),
            "pins": tuple(draw(st.lists(numbers, max_size=3))),
            "holders": (
                *row.holders,
                HolderRow(draw(st.integers(-1, 4)), draw(floats), draw(numbers), draw(numbers), draw(numbers)),
            ),
        }[field]
        found[at] = msgspec.structs.replace(row, **{field: value})
    found += draw(st.lists(st.sampled_from(found), max_size=4))
    return draw(st.permutations(found)) if draw(st.booleans()) else found


def _first(raw: bytes) -> int:
    return array("Q", raw)[0] if len(raw) == 8 else 0


@settings(max_examples=150, deadline=None)
@given(
    snapshot_rows(), st.binary(max_size=30), st.dictionaries(st.integers(0, 4), st.sampled_from([*NAMES, "http://x"]))
)
def test_an_index_stays_usable_after_any_snapshot(found: list[Any], junk: bytes, names: dict[int, str]) -> None:
    """A row that comes twice, a run without its parent, a replica under two numbers, a part that is no part."""
    worker = Usable()
    parts: list[bytes | None] = [None, junk]
    for rows_of_part in (found[: len(found) // 2], found[len(found) // 2 :]):
        with contextlib.suppress(OverflowError, msgspec.MsgspecError):
            parts.append(codec.encode_chunk(SnapshotChunk(names or ALL_NAMES, rows_of_part)))
    replica_of: dict[int, int] = {}
    for _ in worker.index.load(worker.rows.of(parts, replica_of), replica_of):
        pass
    worker.use()


@settings(max_examples=300)
@given(st.binary(max_size=200), st.sampled_from([1, 2]), st.binary(min_size=1, max_size=3))
def test_any_bytes_are_a_valid_value_or_corrupt(body: bytes, version: int, writer: bytes) -> None:
    """Entries, vectors and parts of snapshots; what is decoded lies within its range."""
    payload = bytes((version, len(writer))) + writer + body
    for candidate in (body, payload):
        with contextlib.suppress(StoreCorrupt):
            for delta in codec.decode_batch(candidate)[1].deltas:
                if isinstance(delta, codec.Budgeted):
                    assert 0 < delta.to_tokens <= UNLIMITED_TOKENS
        with contextlib.suppress(StoreCorrupt):
            vector = codec.decode_vector(candidate)[1]
            assert all(math.isfinite(figure) for row in vector.rows.values() for figure in row)
        with contextlib.suppress(StoreCorrupt):
            codec.decode_chunk(candidate)


@given(st.dictionaries(st.text(max_size=5), st.lists(floats, max_size=4), max_size=3), numbers)
def test_a_vector_holds_only_finite_figures(figures: dict[str, list[Any]], number: int) -> None:
    """NaN, infinities and numbers beyond all sense make the whole vector corrupt."""
    payload = codec.own_head(codec.VECTOR_VERSION, "x") + msgspec.msgpack.encode([number, figures, False])
    try:
        vector = codec.decode_vector(payload)[1]
    except StoreCorrupt:
        return
    assert vector.number >= 0
    assert all(math.isfinite(figure) and figure >= -60 for row in vector.rows.values() for figure in row)


@pytest.mark.parametrize(
    "delta",
    [
        [5, 0, None, -1],
        [5, 0, None, 0],
        [5, 0, None, 2**40],
        [3, 0, -1],
        [0, 0, 1, 0, b"h" * 8, b"\0\0\0\0", 10, 0.0],
        [0, 0, 1, 0, b"h" * 16, b"\5\0\0\0\5\0\0\0", 10, 0.0],
        [0, 0, -1, 0, b"h" * 8, b"\5\0\0\0", 10, 0.0],
        [0, 0, 1, 0, b"h" * 8, b"\5\0\0\0", -10, 0.0],
        [3, 0, MAX_EPOCH_STEP + 1],
    ],
)
def test_each_impossible_delta_is_dropped_counted_and_changes_nothing(delta: list[Any]) -> None:
    """A negative, empty or huge budget, a chain that ends at byte 0 or stands still, an epoch from nowhere."""
    worker = Usable()
    worker.index.set_budget(0, 5_000)
    before = worker.index.replicas()
    worker.applier.apply_payload(
        codec.own_head(codec.JOURNAL_VERSION, "x") + msgspec.msgpack.encode([ALL_NAMES, [delta]])
    )
    assert worker.stats.dropped_corrupt + worker.stats.dropped_invalid == 1
    assert worker.stats.applied_deltas == 0
    assert worker.index.replicas() == before


def test_a_good_delta_after_an_impossible_one_of_the_same_entry_is_applied() -> None:
    """A chain is checked when it is its turn."""
    worker = Usable()
    bad = codec.Placed(0, 1, 0, b"h" * 8, b"\0\0\0\0", 10, 0.0)
    worker.applier.apply(Batch(ALL_NAMES, [bad, codec.Budgeted(0, None, 777)]))
    assert worker.index.replicas()[0].budget_tokens == 777
    assert worker.stats.dropped_invalid == 1


def test_a_placement_from_the_future_is_not_the_newest_for_ever() -> None:
    """This holds for a delta and for a snapshot; NaN counts as now."""
    for seconds in (1e12, float("inf"), float("nan"), -5.0):
        worker = Usable()
        chain = CHAINS[0]
        placed = codec.Placed(0, 1, 0, chain.hashes.tobytes(), chain.ends.tobytes(), 3_000, seconds)
        worker.applier.apply(Batch(ALL_NAMES, [placed]))
        stamps = [row.holders[0].stamp for part in worker.index.snapshot() for row in part if isinstance(row, RunRow)]
        assert stamps == [worker.clock.unix()]


def test_a_snapshot_row_that_comes_twice_counts_once() -> None:
    """Blocks and tokens are those of one."""
    writer, reader = Usable(), Usable()
    writer.index.place(0, CHAINS[0], 3_000.0, 5.0)
    parts: list[bytes | None] = []
    for found in writer.index.snapshot():
        parts += [codec.encode_chunk(SnapshotChunk(ALL_NAMES, [*found, *found]))] * 2
    replica_of: dict[int, int] = {}
    for _ in reader.index.load(reader.rows.of(parts, replica_of), replica_of):
        pass
    assert reader.index.replicas() == writer.index.replicas()
    assert reader.stats.dropped_invalid > 0


# --- replies

junk = st.recursive(
    st.one_of(st.none(), st.binary(max_size=30), numbers, st.floats()), lambda inner: st.lists(inner, max_size=5)
)


class Answering:
    """A store whose every reply is `reply`."""

    def __init__(self, reply: Any) -> None:
        self._reply = reply

    async def execute(self, *command: Any, limit_seconds: float | None = None) -> Any:
        return self._reply

    async def execute_many(self, commands: Any, limit_seconds: float | None = None) -> Any:
        return [self._reply for _ in commands]

    async def run_script(self, *call: Any, limit_seconds: float | None = None) -> Any:
        return self._reply


@settings(max_examples=60)
@given(st.one_of(junk, st.lists(st.one_of(junk, st.just(b"1-1")), min_size=6, max_size=6)))
async def test_any_reply_is_read_or_an_error_of_the_cache(reply: Any) -> None:
    """Lease, snapshots, totals, claims and the secret: the server may be no Redis."""
    store: Any = Answering(reply)
    lease = LeaseAndSnapshots(store, "w", lease_seconds=1.0)
    totals = Totals(store, "w")
    totals.row("2026-01-31", "m", "u", "t").answers += 1
    assert await totals.flush() in (True, False)
    day = date(2026, 1, 31)
    for call in (
        lambda: lease.tick("g"),
        lease.head,
        lease.leave,
        lambda: read_totals(store, day, day),
        lambda: shared_secret(store),
        lambda: shared_secret(store, b"known" * 9),
        lambda: ColdClaims(store, "w", clock=SystemClock(), tasks=Tasks()).take(
            "p", ["r"], order=("", 0.0), tenant="t", claim_seconds=1.0, most=1
        ),
    ):
        with contextlib.suppress(CacheError):
            await call()


@given(junk)
def test_any_reply_of_a_stream_is_read_or_corrupt(reply: Any) -> None:
    """Of a read with and without waiting."""
    for read in (entries_of_read, entries_of_range):
        with contextlib.suppress(StoreCorrupt):
            assert all(isinstance(part, bytes) for entry in parsed(read, reply) for part in (entry.id, entry.payload))


# --- stored contexts

fields = st.one_of(
    st.none(),
    st.binary(max_size=20),
    st.sampled_from([b"nan", b"inf", b"-1", b"1e400", b"9" * 5000, b"1", b"1700000000000", b"ready", b"\xff"]),
)


def good_row() -> list[bytes | None]:
    head = rows.encode_head(rows.Head("m", "", "", b"d" * 32, 10))
    return [head, b"\x80", b"1", b"2", b"ready", b"5", b"", b"100", b"1.5", b"1", b"1e-6", b"3", b"1"]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 12), fields), max_size=4), st.integers(0, 2**53))
def test_any_fields_are_a_valid_row_or_corrupt(changes: list[tuple[int, bytes | None]], now_ms: int) -> None:
    """Everything that is computed from a row that was read is finite."""
    stored = good_row()
    for at, value in changes:
        stored[at] = value
    try:
        row = parsed(lambda reply: rows.read_row("cache-1", reply, now_ms), stored)
    except StoreCorrupt:
        return
    if row is not None:
        assert math.isfinite(row.worth)
        assert math.isfinite(row.kept.rank)
        assert row.size_bytes >= 0
        assert row.tokens >= 0
        choose([("a", row.kept)], 10)
        row.status(5.0)
        msgspec.json.encode(row.metadata)


@given(junk)
def test_any_reply_of_a_script_is_read_or_corrupt(reply: Any) -> None:
    """No other exception leaves the place where replies are read."""
    for read in (store._read_reply, store._read_whole, room.read_totals, int):  # noqa: SLF001 - internal state that no public name shows
        with contextlib.suppress(StoreCorrupt):
            parsed(read, reply)


@given(st.text(max_size=10), st.binary(max_size=40))
def test_any_tag_and_any_stream_id_is_read_or_corrupt(name: str, value: bytes) -> None:
    """Times within range, ids that Redis takes."""
    with contextlib.suppress(StoreCorrupt):
        assert 0 <= rows.read_tag(name, value).created_unix_seconds < 1e12
    with contextlib.suppress(StoreCorrupt):
        assert max(parse_id(value)) < 2**64


@given(st.binary(max_size=60))
async def test_any_message_of_the_channel_is_survived(payload: bytes) -> None:
    """Counted if it cannot be read."""
    clock = FakeClock()
    memory = ContextMemory(open_store(None, clock=clock, tasks=Tasks()))
    memory.receive(payload)
    assert memory.moment().changes == 1


pieces = st.lists(st.one_of(st.binary(max_size=9), st.tuples(st.sampled_from([b"d" * 32, b""]), numbers)), max_size=3)


@settings(max_examples=300)
@given(pieces, pieces, st.binary(max_size=24), st.binary(max_size=60))
def test_any_manifest_under_its_true_digest_is_a_content_or_corrupt(
    tools: list[Any], messages: list[Any], bounds: bytes, stored: bytes
) -> None:
    """Bounds lie within the messages, sizes are not negative, a segment is what its digest names."""
    manifest = bytes((segments.VERSION,)) + msgspec.msgpack.encode([tools, messages, bounds])
    digest = segments._digest(manifest)  # noqa: SLF001 - internal state that no public name shows
    try:
        opened = segments.read_manifest(manifest, digest)
        content = segments.unpack(opened, digest, {b"d" * 32: stored})
    except StoreCorrupt:
        return
    assert content.span_bytes >= 0
    assert all(0 <= bound <= len(content.messages) for bound in content.bounds)
    content.chain(7)

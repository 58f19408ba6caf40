"""Replicates the index among all workers of all proxies through one Redis Stream, and rebuilds it at a start.

Each verb acts on the own index at once and queues what the others need to know; nothing here that a request calls
waits for Redis. One batch every few milliseconds is one entry of the stream, which everyone reads.

Who decides. An epoch is a number that only grows, so two who find the same restart agree without asking: each
begins it at once and says so. A budget is changed by a delta that names the value it starts from and counts only
where that still holds, applied by everyone, its writer included, when it comes by in the stream: of two who decide
at a time the stream's order lets one through, with no word from a third. What differs after Redis was away (each
decided alone) the lease-holder puts right: with each snapshot it repeats its epochs and budgets, which then count
for all. So no decision waits for, or dies with, the lease-holder.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

from cache import keys
from cache.errors import CacheError, StoreCorrupt
from cache.index.fingerprint import Fingerprint
from cache.index.placement import Feedback, FeedbackKind, Placement
from cache.index.prefix_index import UNLIMITED_TOKENS, PrefixIndex
from cache.index.rows import ReplicaRow, RunRow
from cache.ports import Clock, Tasks
from cache.replication import codec
from cache.replication.codec import (
    HASH_BYTES,
    Answered,
    Batch,
    Began,
    Budgeted,
    Computed,
    Delta,
    Owned,
    Placed,
    SnapshotChunk,
    Suspected,
    TakenBack,
)
from cache.replication.owners import ObjectLocations
from cache.replication.snapshots import START, LeaseAndSnapshots, StreamId, Tick, format_id, parse_id
from cache.store.store import Store, StoreState, StreamEntry

log = logging.getLogger("cairn.journal")

SHARED_FROM_BYTES: Final = 4096  # a shorter prefix is prefilled sooner than it is worth telling
BATCH_INTERVAL_SECONDS: Final = 0.005  # what is queued in between goes as one entry: a reader pays by the entry
ALONE_INTERVAL_SECONDS: Final = 0.05  # while nobody else lives; a newcomer is noticed with the next look at the lease
READ_INTERVAL_SECONDS: Final = 0.004  # between two reads, so that the entries of several writers come in one reply
READ_BLOCK_SECONDS: Final = 0.5
READ_ENTRIES: Final = 256
BATCH_BLOCKS: Final = 20_000  # boundaries of one entry, some 250 KB: a reader's millisecond or two
WRITE_LIMIT_SECONDS: Final = 0.2  # of one entry; nobody waits for it
QUEUE_BLOCKS = 1_000_000  # boundaries that wait while Redis is away, some 12 MB; beyond, the oldest go
RECENT_SECONDS: Final = 5.0  # own entries kept, to say them again should Redis lose everything
RECENT_BYTES = 4 * 1024 * 1024
REMEMBERED_BLOCKS: Final = 1_000_000  # boundaries of others' placements that may still be answered or taken back
STAND_STILL_SECONDS: Final = 0.004  # applying or loading, before the loop gets its turn
LEASE_SECONDS: Final = 3.0
SNAPSHOT_ENTRIES = 4_096  # since the last one; a start replays no more than about this
SNAPSHOT_BYTES = 32 * 1024 * 1024  # as many bytes as a start reads back in half a second
SNAPSHOT_SECONDS: Final = 60.0  # where anything changed at all
SNAPSHOT_ROWS: Final = 100  # of one part: some 1 ms of work at 50 boundaries a row
SNAPSHOT_OWNERS: Final = 2_000
READY_SECONDS: Final = 2.0
RETRY_FIRST_SECONDS, RETRY_LAST_SECONDS = 0.05, 1.0

_OF_REPLICAS = (Placed, Began, Budgeted, Owned)


class JournalState(enum.StrEnum):
    """How the shared index stands; for /readyz and a metric."""

    STARTING = "starting"
    LIVE = "live"
    ALONE = "alone"  # without Redis, or not caught up yet: this worker knows what it routed itself


_LIVE: Final = JournalState.LIVE  # constants: the member of an enum is looked up in Python
_AVAILABLE: Final = StoreState.AVAILABLE


@dataclass(slots=True)
class JournalStats:
    """Counts since the start."""

    written_entries: int = 0
    written_deltas: int = 0
    written_bytes: int = 0
    read_entries: int = 0
    own_entries: int = 0  # of those read: skipped
    applied_deltas: int = 0
    dropped_queued: int = 0  # deltas never sent: Redis was away for too long
    dropped_corrupt: int = 0  # entries or parts of a snapshot
    dropped_unknown: int = 0  # deltas of replicas that this process does not have
    dropped_orphans: int = 0  # answers to placements that are not remembered
    rebuilds: int = 0
    snapshots: int = 0
    failed_snapshots: int = 0
    lag_seconds: float = 0.0  # of the last entry applied: from its stream id to here


class Elsewhere(Protocol):
    """Who wants to know what other writers' requests do, as they come by in the stream."""

    def placed(self, placement: Placement, prompt_tokens: int) -> None:
        """One was sent; what it does not find held is being computed."""

    def computed(self, placement_id: int) -> None:
        """Its first token or its answer came."""

    def failed(self, placement_id: int) -> None:
        """It was taken back, or left."""


@dataclass(frozen=True, slots=True)
class _Remembered:
    """Another writer's placement, which may still be answered or taken back."""

    replica: int
    fingerprint: Fingerprint
    epoch: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class _Missed:
    """A placement of which `held_blocks` were confidently predicted and nothing was cached."""

    placement: int
    epoch: int
    fingerprint: Fingerprint
    held_blocks: int
    prompt_tokens: int


class Journal:
    """The index's verbs, shared. Replicas are numbers here and names in the stream; `number_of` and `name_of` map
    them and answer None for what this process does not have. `heard` is told of each placement that another writer
    made: its id, the replica, the prompt and its predicted tokens."""

    def __init__(
        self,
        index: PrefixIndex,
        store: Store,
        writer_id: str,
        *,
        clock: Clock,
        tasks: Tasks,
        number_of: Callable[[str], int | None],
        name_of: Callable[[int], str | None],
        owners: ObjectLocations | None = None,
        heard: Callable[[int, int, Fingerprint, float], None] | None = None,
        elsewhere: Elsewhere | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._index = index
        self._owners = ObjectLocations() if owners is None else owners
        self._heard = heard
        self._elsewhere = elsewhere
        self._store = store
        self._clock = clock
        self._tasks = tasks
        self._number_of = number_of
        self._name_of = name_of
        self._lease_seconds = lease_seconds
        self._writer = writer_id
        self._head = codec.own_head(codec.JOURNAL_VERSION, writer_id)
        self._keeping = LeaseAndSnapshots(store, writer_id, lease_seconds=lease_seconds)
        self.stats = JournalStats()
        self.holds_lease = False
        self.others = 0  # writers alive beside this one
        self._queue: deque[Delta] = deque()
        self._queue_blocks = 0
        self._unsent: deque[bytes] = deque()  # packed already, and not in the stream yet
        self._recent: deque[tuple[float, bytes]] = deque()
        self._recent_bytes = 0
        self._wake = asyncio.Event()
        self._remembered: OrderedDict[int, _Remembered] = OrderedDict()
        self._remembered_blocks = 0
        self._suspects: dict[int, _Missed] = {}
        self._echo_until_seconds = 0.0
        self._position = START
        self._synced = False
        self._load_wanted = True
        self._ready = asyncio.Event()
        self._generation = b""
        self._losses = 0
        self._since_snapshot = [0, 0]  # entries, bytes
        self._snapshot_seconds = float("-inf")
        self._snapshot_wanted = True
        self._snapshotting: asyncio.Task[Any] | None = None
        self._running: list[asyncio.Task[Any]] = []

    # --- the verbs: synchronous, on the path of a request

    def place(self, replica: int, fingerprint: Fingerprint, prompt_tokens: float) -> Placement:
        """Note that a prompt is routed; see `PrefixIndex.place`."""
        now = self._clock.unix()
        placement = self._index.place(replica, fingerprint, prompt_tokens, now)
        if _is_shared(placement):
            self._enqueue(_placed(placement.id, replica, placement.epoch, fingerprint, prompt_tokens, now))
        return placement

    def take_back(self, placement: Placement) -> None:
        """It failed before its first token; see `PrefixIndex.take_back`."""
        self._index.take_back(placement)
        if _is_shared(placement):
            self._enqueue(TakenBack(placement.id, placement.held_blocks))

    def computed(self, placement: Placement) -> None:
        """Its first token came: who waits for the same prefix, here or elsewhere, may go."""
        if self.others and _is_shared(placement):
            self._enqueue(Computed(placement.id))

    def left(self, placement: Placement) -> None:
        """It ended before its first token, and its placement stays: who waits for it elsewhere need not."""
        if self.others and _is_shared(placement):
            self._enqueue(TakenBack(placement.id, len(placement.fingerprint.hashes)))  # which takes nothing back

    def settled(self, placement: Placement) -> None:
        """It ended without an answer to learn from; nobody else needs to know."""
        self._index.settled(placement)

    def answered(
        self, placement: Placement, prompt_tokens: int, cached_tokens: int | None, output_tokens: int
    ) -> Feedback:
        """Learn from an answer's usage; see `PrefixIndex.answered`."""
        now = self._clock.unix()
        live = self.state is _LIVE
        feedback = self._index.answered(placement, prompt_tokens, cached_tokens, output_tokens, now, decide=not live)
        if not _is_shared(placement):
            return feedback
        self._enqueue(Answered(placement.id, prompt_tokens, output_tokens, cached_tokens))
        if cached_tokens:
            self._suspects.pop(placement.replica, None)
        if feedback.learnt is FeedbackKind.SUSPECT or feedback.epoch is not None:
            self._missed(placement, prompt_tokens, feedback)
        elif live and feedback.budget_tokens is not None:
            self._echo_until_seconds = self._clock.monotonic() + RECENT_SECONDS
            before = self._index.replicas()[placement.replica].budget_tokens
            self._enqueue(Budgeted(placement.replica, before, feedback.budget_tokens))
        return feedback

    def _missed(self, placement: Placement, prompt_tokens: int, feedback: Feedback) -> None:
        missed = _Missed(placement.id, placement.epoch, placement.fingerprint, placement.held_blocks, prompt_tokens)
        if feedback.epoch is not None:
            self._restart(placement.replica, feedback.epoch, missed)
        else:
            self._enqueue(Suspected(placement.id, placement.held_blocks))
            self._suspect(placement.replica, missed)

    def new_epoch(self, replica: int) -> None:
        """The replica is known to have begun anew, from its start time, say."""
        epoch = self._index.epoch(replica) + 1
        self._index.new_epoch(replica, epoch)
        self._enqueue(Began(replica, epoch))

    def set_budget(self, replica: int, tokens: int) -> None:
        """The replica's capacity is known, from the configuration or its own word: it counts for all."""
        self._index.set_budget(replica, tokens)
        self._enqueue(Budgeted(replica, None, tokens))

    def knows_budget(self, replica: int) -> bool:
        """True where the replica's capacity was told or learned, here or elsewhere."""
        known = self._index.replicas().get(replica)
        return known is not None and known.budget_tokens < UNLIMITED_TOKENS

    def own(self, made_id: str, replica: int) -> None:
        """Something that a replica made is asked for there from now on, by every worker."""
        name = self._name_of(replica)
        if name is not None and self._owners.learn(made_id, name):
            self._enqueue(Owned(replica, made_id))

    # --- the state

    @property
    def state(self) -> JournalState:
        """How the shared index stands."""
        if self._synced and self._store.state is _AVAILABLE:
            return _LIVE
        return JournalState.ALONE if self._ready.is_set() else JournalState.STARTING

    @property
    def queued(self) -> int:
        """Deltas that are not packed yet."""
        return len(self._queue)

    async def start(self, ready_seconds: float = READY_SECONDS) -> JournalState:
        """Begin, and come back once the index is what the others know; with Redis away at once, after
        `ready_seconds` in any case: then it goes on catching up in the background."""
        loops = {"read": self._read_forever, "write": self._write_forever, "keep": self._keep_forever}
        self._running = [self._tasks.start(loop(), f"journal-{name}") for name, loop in loops.items()]
        if self._store.state is _AVAILABLE:
            try:
                async with asyncio.timeout(ready_seconds):
                    await self._ready.wait()
            except TimeoutError:
                log.warning("the shared index is not loaded after %.1f s: going on, it follows", ready_seconds)
        self._ready.set()
        return self.state

    async def close(self) -> None:
        """Send what is queued, give the lease up, end."""
        running = [*self._running, *([self._snapshotting] if self._snapshotting else [])]
        for task in running:
            task.cancel()
        if not running:
            return
        await asyncio.wait(running)
        self._running = []
        try:
            while self._pack():
                await self._send()
            await self._keeping.leave()
        except CacheError as error:
            log.debug("the journal closed without a word: %s", error)

    # --- queueing and writing

    def _enqueue(self, delta: Delta) -> None:
        self._queue.append(delta)
        self._queue_blocks += _blocks(delta)
        while self._queue_blocks > QUEUE_BLOCKS:
            self._queue_blocks -= _blocks(self._queue.popleft())
            self.stats.dropped_queued += 1
        self._wake.set()

    def _pack(self) -> bool:
        """Make one entry of what is queued, unless one waits already; False where there is nothing to send."""
        if self._unsent:
            return True
        deltas: list[Delta] = []
        blocks = 0
        while self._queue and blocks < BATCH_BLOCKS:
            deltas.append(self._queue.popleft())
            blocks += _blocks(deltas[-1])
        if not deltas:
            return False
        self._queue_blocks -= blocks
        numbers = {delta.replica for delta in deltas if isinstance(delta, _OF_REPLICAS)}
        names = {number: name for number in numbers if (name := self._name_of(number)) is not None}
        self._unsent.append(codec.encode_batch(self._head, names, deltas))
        self.stats.written_deltas += len(deltas)
        return True

    async def _send(self) -> None:
        """One entry to the stream. Again is harmless, so what may have arrived is sent again."""
        payload = self._unsent[0]
        await self._store.execute("XADD", keys.JOURNAL, "*", "d", payload, limit_seconds=WRITE_LIMIT_SECONDS)
        self._unsent.popleft()
        self.stats.written_entries += 1
        self.stats.written_bytes += len(payload)
        self._keep_recent(payload)

    def _keep_recent(self, payload: bytes) -> None:
        now = self._clock.monotonic()
        self._recent.append((now, payload))
        self._recent_bytes += len(payload)
        while self._recent_bytes > RECENT_BYTES or self._recent[0][0] < now - RECENT_SECONDS:
            self._recent_bytes -= len(self._recent.popleft()[1])
            if not self._recent:
                return

    async def _write_forever(self) -> None:
        pause = RETRY_FIRST_SECONDS
        while True:
            await self._wake.wait()
            await self._store.wait_available()
            if not self._pack():
                self._wake.clear()
                continue
            try:
                await self._send()
            except CacheError:  # the store has counted it
                await asyncio.sleep(pause)
                pause = min(RETRY_LAST_SECONDS, pause * 2)
                continue
            pause = RETRY_FIRST_SECONDS
            await asyncio.sleep(BATCH_INTERVAL_SECONDS if self.others else ALONE_INTERVAL_SECONDS)

    # --- reading

    async def _read_forever(self) -> None:
        pause = RETRY_FIRST_SECONDS
        while True:
            await self._store.wait_available()
            try:
                if not self._synced:
                    await self._rebuild()
                position = self._position
                entries = await self._store.read_stream(
                    keys.JOURNAL, format_id(position), READ_BLOCK_SECONDS, READ_ENTRIES
                )
            except CacheError:
                await asyncio.sleep(pause)
                pause = min(RETRY_LAST_SECONDS, pause * 2)
                continue
            pause = RETRY_FIRST_SECONDS
            if entries and self._synced and self._position == position:
                await self._apply_entries(entries, own=False)
                await asyncio.sleep(READ_INTERVAL_SECONDS)

    async def _apply_entries(self, entries: list[StreamEntry], *, own: bool) -> None:
        """Apply in order, letting the loop go on in between; with `own` what this writer said itself, too."""
        began = self._clock.monotonic()
        for entry in entries:
            self._apply_entry(entry, own=own)
            now = self._clock.monotonic()
            if now - began > STAND_STILL_SECONDS:
                await asyncio.sleep(0)
                began = self._clock.monotonic()

    def _apply_entry(self, entry: StreamEntry, *, own: bool) -> None:
        stats = self.stats
        stats.read_entries += 1
        self._since_snapshot[0] += 1
        self._since_snapshot[1] += len(entry.payload)
        echo = not own and entry.payload.startswith(self._head)
        try:
            self._position = parse_id(entry.id)
            if echo:
                stats.own_entries += 1
                if self._clock.monotonic() < self._echo_until_seconds:
                    self._apply_budgets(codec.decode_batch(entry.payload)[1])
                return
            self._apply_batch(codec.decode_batch(entry.payload)[1])
        except StoreCorrupt:
            stats.dropped_corrupt += 1
        stats.lag_seconds = max(0.0, self._clock.unix() - self._position[0] / 1000)

    def _apply_batch(self, batch: Batch) -> None:
        number_of = {number: self._number_of(name) for number, name in batch.names.items()}
        now = self._clock.unix()
        for delta in batch.deltas:
            if isinstance(delta, _OF_REPLICAS):
                replica = number_of.get(delta.replica)
                if replica is None:
                    self.stats.dropped_unknown += 1
                    continue
                self._apply_to_replica(delta, replica, now)
            else:
                self._apply_to_placement(delta)
            self.stats.applied_deltas += 1

    def _apply_to_replica(self, delta: Placed | Began | Budgeted | Owned, replica: int, now: float) -> None:
        index = self._index
        if isinstance(delta, Placed):
            fingerprint = delta.fingerprint
            stamp = min(delta.unix_seconds, now)  # a clock ahead of ours must not make its placements the newest
            placed = index.apply_place(replica, fingerprint, delta.prompt_tokens, delta.epoch, delta.placement, stamp)
            if placed is not None:
                if self._elsewhere is not None and self._synced:
                    self._elsewhere.placed(placed, delta.prompt_tokens)
                remembered = _Remembered(replica, fingerprint, delta.epoch, delta.prompt_tokens)
                self._remember(delta.placement, remembered)
            if self._heard is not None:
                self._heard(delta.placement, replica, fingerprint, delta.prompt_tokens)
        elif isinstance(delta, Began):
            index.new_epoch(replica, delta.epoch)
            self._suspects.pop(replica, None)
        elif isinstance(delta, Owned):
            self._owners.learn(delta.made_id, self._name_of(replica) or "")
        else:
            self._apply_budget(delta, replica)

    def _apply_budgets(self, batch: Batch) -> None:
        """Of our own echo only the budgets that stood to be decided by the stream's order."""
        for delta in batch.deltas:
            if isinstance(delta, Budgeted):
                replica = self._number_of(batch.names.get(delta.replica, ""))
                if replica is not None:
                    self._apply_budget(delta, replica)

    def _apply_budget(self, delta: Budgeted, replica: int) -> None:
        known = self._index.replicas().get(replica)
        if delta.from_tokens is None or (known is not None and known.budget_tokens == delta.from_tokens):
            self._index.set_budget(replica, delta.to_tokens)

    def _apply_to_placement(self, delta: TakenBack | Answered | Suspected | Computed) -> None:
        self._tell_elsewhere(delta)
        if isinstance(delta, Computed):
            return
        remembered = self._remembered.get(delta.placement)
        if remembered is None:
            self.stats.dropped_orphans += 1
            return
        replica, fingerprint, epoch = remembered.replica, remembered.fingerprint, remembered.epoch
        if isinstance(delta, TakenBack):
            self._index.apply_take_back(replica, fingerprint, delta.from_block, epoch, delta.placement)
        elif isinstance(delta, Answered):
            self._index.apply_answer(replica, fingerprint, delta.prompt_tokens, delta.output_tokens, epoch)
            if delta.cached_tokens:
                self._suspects.pop(replica, None)
        elif 0 < delta.held_blocks <= len(fingerprint.hashes):
            tokens = remembered.prompt_tokens
            self._suspect(replica, _Missed(delta.placement, epoch, fingerprint, delta.held_blocks, tokens))

    def _tell_elsewhere(self, delta: TakenBack | Answered | Suspected | Computed) -> None:
        if self._elsewhere is None:
            return
        if isinstance(delta, TakenBack):
            self._elsewhere.failed(delta.placement)
        else:
            self._elsewhere.computed(delta.placement)

    def _remember(self, placement: int, remembered: _Remembered) -> None:
        known = self._remembered
        if placement not in known:
            self._remembered_blocks += len(remembered.fingerprint.hashes)
        known[placement] = remembered
        while self._remembered_blocks > REMEMBERED_BLOCKS:
            self._remembered_blocks -= len(known.popitem(last=False)[1].fingerprint.hashes)

    # --- restarts of a replica

    def _suspect(self, replica: int, suspect: _Missed) -> None:
        """A confident prediction found nothing cached, here or elsewhere: with another one on another chain the
        replica began anew."""
        first = self._suspects.get(replica)
        if suspect.epoch != self._index.epoch(replica):
            return
        if first is None or first.epoch != suspect.epoch:
            self._suspects[replica] = suspect
        elif _differ(first, suspect):
            self._restart(replica, suspect.epoch + 1, suspect)

    def _restart(self, replica: int, epoch: int, second: _Missed) -> None:
        """The replica began `epoch` and has computed in it what the two misses asked for: here and for all."""
        first = self._suspects.pop(replica, None)
        now = self._clock.unix()
        self._index.new_epoch(replica, epoch)
        self._enqueue(Began(replica, epoch))
        for missed in (first, second):
            if missed is not None:
                placed = _placed(missed.placement, replica, epoch, missed.fingerprint, missed.prompt_tokens, now)
                self._index.apply_place(
                    replica, missed.fingerprint, missed.prompt_tokens, epoch, placed.placement, now
                )
                self._enqueue(placed)

    # --- rebuilding

    async def _rebuild(self) -> None:
        """Load the snapshot where one is wanted, replay what came after it, and be live. Raises CacheError."""
        losses = self._losses
        position = START
        loaded = False
        if self._load_wanted and (fetched := await self._keeping.fetch()) is not None:
            head, parts = fetched
            await self._load(parts)
            position, loaded = head.stream_id, True
        while entries := await self._store.read_range(
            keys.JOURNAL, format_id(position), READ_ENTRIES, limit_seconds=READY_SECONDS
        ):
            await self._apply_entries(entries, own=loaded)
            position = parse_id(entries[-1].id)
        self._position = position
        if losses == self._losses:
            self._load_wanted = False
            self._synced = True
            self.stats.rebuilds += 1
            self._ready.set()

    async def _load(self, parts: list[bytes | None]) -> None:
        """Become what the snapshot says, then what is queued here and nobody has heard yet."""
        replica_of: dict[int, int] = {}
        began = self._clock.monotonic()
        for _ in self._index.load(self._rows(parts, replica_of), replica_of):
            if self._clock.monotonic() - began > STAND_STILL_SECONDS:
                await asyncio.sleep(0)
                began = self._clock.monotonic()
        names = {number: name for number in self._index.replicas() if (name := self._name_of(number)) is not None}
        for payload in self._unsent:
            self._apply_batch(codec.decode_batch(payload)[1])
        self._apply_batch(Batch(names, list(self._queue)))

    def _rows(self, parts: list[bytes | None], replica_of: dict[int, int]) -> Iterator[ReplicaRow | RunRow]:
        """The rows of all parts, decoded one part at a time; fills `replica_of` before the rows that need it."""
        while parts:
            part = parts.pop(0)
            try:
                chunk = codec.decode_chunk(part or b"")
            except StoreCorrupt:  # what hung on its rows is left out too
                self.stats.dropped_corrupt += 1
                continue
            for made_id, name in chunk.owners.items():
                self._owners.learn(made_id, name)
            for number, name in chunk.names.items():
                if (ours := self._number_of(name)) is not None:
                    replica_of[number] = ours
            yield from chunk.rows

    # --- keeping: lease, snapshots, and noticing that Redis lost something

    async def _keep_forever(self) -> None:
        while True:
            await self._store.wait_available()
            try:
                position = self._position
                self._note(await self._keeping.tick(secrets.token_hex(8)), position)
            except CacheError:
                self.holds_lease = False
            await asyncio.sleep(self._lease_seconds / 3)

    def _note(self, tick: Tick, position_before: StreamId) -> None:
        self.holds_lease = tick.holds_lease
        self.others = max(0, tick.writers - 1)
        lost = bool(self._generation) and bool(tick.generation) and tick.generation != self._generation
        if tick.generation:
            self._generation = tick.generation
        if lost or tick.tip < position_before:
            self._losses += 1
            if self._synced:
                self._say_again()
        elif self._synced and self._position < tick.trimmed:
            log.warning("this worker fell behind the shared index: loading it anew")
            self._synced, self._load_wanted = False, True
        if self.holds_lease and self._synced and self._snapshot_is_due():
            self._snapshotting = self._tasks.start(self._write_snapshot(), "journal-snapshot")

    def _say_again(self) -> None:
        """Redis lost the stream (a flush, a failover): we still know all, so read the new one from its begin and
        repeat what may not have been read by everyone. The lease-holder writes the rest as a snapshot."""
        log.warning("Redis lost the shared index: writing it anew")
        self._synced = False
        self._snapshot_wanted = True
        self._unsent.extend(payload for _, payload in self._recent)
        self._recent.clear()
        self._recent_bytes = 0
        self._wake.set()

    def _snapshot_is_due(self) -> bool:
        if self._snapshotting is not None and not self._snapshotting.done():
            return False
        entries, size_bytes = self._since_snapshot
        age_seconds = self._clock.monotonic() - self._snapshot_seconds
        return (
            self._snapshot_wanted
            or entries >= SNAPSHOT_ENTRIES
            or size_bytes >= SNAPSHOT_BYTES
            or (entries > 0 and age_seconds >= SNAPSHOT_SECONDS)
        )

    async def _write_snapshot(self) -> None:
        """Copy the index, part by part; what changes meanwhile is in the stream after `holds_up_to`."""
        self._snapshot_seconds = self._clock.monotonic()
        holds_up_to = self._position
        since, self._since_snapshot = self._since_snapshot, [0, 0]
        snapshot = secrets.token_hex(8)
        number = 0
        try:
            for chunk in self._snapshot_chunks():
                await self._keeping.put_part(snapshot, number, codec.encode_chunk(chunk))
                number += 1
            committed = await self._keeping.commit(snapshot, number, holds_up_to, self._clock.unix())
        except CacheError:
            committed = False
        if not committed:
            self.stats.failed_snapshots += 1
            self._since_snapshot = [old + new for old, new in zip(since, self._since_snapshot, strict=True)]
            return
        self._snapshot_wanted = False
        self.stats.snapshots += 1
        self._decree()

    def _snapshot_chunks(self) -> Iterator[SnapshotChunk]:
        for rows in self._index.snapshot(SNAPSHOT_ROWS):
            names = {each: name for each in self._index.replicas() if (name := self._name_of(each)) is not None}
            yield SnapshotChunk(names, rows)
        for owners in self._owners.chunks(SNAPSHOT_OWNERS):
            yield SnapshotChunk({}, (), owners)

    def _decree(self) -> None:
        """Repeat all epochs and budgets, so that what was decided apart is one again."""
        for replica, row in self._index.replicas().items():
            if self._name_of(replica) is not None:
                self._enqueue(Began(replica, row.epoch))
                self._enqueue(Budgeted(replica, None, row.budget_tokens))


def _placed(
    placement: int, replica: int, epoch: int, chain: Fingerprint, prompt_tokens: float, unix_seconds: float
) -> Placed:
    hashes, ends = chain.hashes.tobytes(), chain.ends.tobytes()
    return Placed(replica, placement, epoch, hashes, ends, int(prompt_tokens), unix_seconds)


def _differ(one: _Missed, other: _Missed) -> bool:
    """True if what the one was to find is no beginning of what the other was, nor the other way round."""
    depth = min(one.held_blocks, other.held_blocks) - 1
    return depth >= 0 and one.fingerprint.hashes[depth] != other.fingerprint.hashes[depth]


def _is_shared(placement: Placement) -> bool:
    ends = placement.fingerprint.ends
    return len(ends) > 0 and ends[-1] >= SHARED_FROM_BYTES


def _blocks(delta: Delta) -> int:
    """What a delta weighs in the queue: its boundaries."""
    return len(delta.hashes) // HASH_BYTES if isinstance(delta, Placed) else 1

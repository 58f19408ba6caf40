"""Replicate the index among all workers of all proxies through one Redis Stream.

Each operation changes this worker's index at once and queues a delta for the others (`writer`); no call of a request
waits for Redis. Every few milliseconds one entry with all queued deltas is appended to the stream, which every worker
reads and applies (`rebuild`, `apply`).

Decisions need no coordination. An epoch is a number that only grows, so two workers that detect the same restart
agree. A budget change names the value that it starts from and is applied, also by its writer, when it is read from
the stream, and only if the budget still has that value; so the stream's order decides between simultaneous changes.
Workers that decided differently while Redis was away agree again through the lease-holder, which repeats its epochs
and budgets after each snapshot. No decision waits for the lease-holder.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
from typing import Any, Final

from cache.errors import CacheError
from cache.index.fingerprint import Fingerprint
from cache.index.placement import Feedback, FeedbackKind, Placement
from cache.index.prefix_index import UNLIMITED_TOKENS, PrefixIndex
from cache.ports import Clock, Tasks
from cache.replication.apply import DeltaApplier, Listeners
from cache.replication.codec import Answered, Began, Budgeted, Computed, Owned, Suspected, TakenBack
from cache.replication.owners import ObjectLocations
from cache.replication.rebuild import SnapshotRows, StreamReader
from cache.replication.restarts import Miss, RestartDetector, placed
from cache.replication.snapshot_writer import SnapshotWriter
from cache.replication.snapshots import LeaseAndSnapshots, StreamId, Tick
from cache.replication.stats import JournalStats
from cache.replication.writer import RECENT_SECONDS, JournalWriter, ReplicaNames
from cache.store.store import Store, StoreState

log = logging.getLogger("cairn.journal")

SHARED_FROM_BYTES: Final = 4096  # computing a shorter prefix again is cheaper than sharing it
LEASE_SECONDS: Final = 3.0
READY_SECONDS: Final = 2.0


class JournalState(enum.StrEnum):
    """State of the shared index, for /readyz and a metric."""

    STARTING = "starting"
    LIVE = "live"
    ALONE = "alone"  # not connected to the others: this worker knows only what it routed itself


_LIVE: Final = JournalState.LIVE  # constants: the member of an enum is looked up in Python
_AVAILABLE: Final = StoreState.AVAILABLE


class Journal:
    """The index's operations, shared with all other workers. Replicas are numbers here and names in the stream."""

    def __init__(
        self,
        index: PrefixIndex,
        store: Store,
        writer_id: str,
        *,
        clock: Clock,
        tasks: Tasks,
        replicas: ReplicaNames,
        listeners: Listeners | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._index = index
        self._store = store
        self._clock = clock
        self._tasks = tasks
        self._replicas = replicas
        self._lease_seconds = lease_seconds
        stats = self.stats = JournalStats()
        locations = self.locations = ObjectLocations()
        writer = self._writer = JournalWriter(store, writer_id, replicas, clock, stats)
        restarts = self._restarts = RestartDetector(index, writer.enqueue, clock)
        lease = self._lease = LeaseAndSnapshots(store, writer_id, lease_seconds=lease_seconds)
        applier = DeltaApplier(index, locations, restarts, replicas, listeners or Listeners(), clock, stats)
        rows = SnapshotRows(locations, replicas, clock, stats)
        reader = self._reader = StreamReader(store, lease, index, rows, applier, writer, clock, stats)
        self._snapshots = SnapshotWriter(index, locations, replicas, lease, reader, writer, clock, stats)
        self.holds_lease = False
        self.others = 0  # other live writers
        self._generation = b""
        self._snapshotting: asyncio.Task[Any] | None = None
        self._running: list[asyncio.Task[Any]] = []

    # --- operations: synchronous, on the path of a request

    def place(self, replica: int, fingerprint: Fingerprint, prompt_tokens: float, *, source: int = 0) -> Placement:
        """Note that a prompt was routed; see `PrefixIndex.place`."""
        now = self._clock.unix()
        placement = self._index.place(replica, fingerprint, prompt_tokens, now, source=source)
        if _is_shared(placement):
            self._writer.enqueue(placed(placement, prompt_tokens, now))
        return placement

    def take_back(self, placement: Placement) -> None:
        """Undo a placement whose request failed before its first token; see `PrefixIndex.take_back`."""
        self._index.take_back(placement)
        if _is_shared(placement):
            self._writer.enqueue(TakenBack(placement.id, placement.held_blocks))

    def computed(self, placement: Placement) -> None:
        """Note that the first token came: requests that wait for the same prefix, here or elsewhere, may go on."""
        if self.others and _is_shared(placement):
            self._writer.enqueue(Computed(placement.id))

    def left(self, placement: Placement) -> None:
        """Note that the client left before the first token. The placement stays, but nothing should wait for it."""
        if self.others and _is_shared(placement):
            # from the end of the chain, so that nothing is undone
            self._writer.enqueue(TakenBack(placement.id, len(placement.fingerprint.hashes)))

    def settled(self, placement: Placement) -> None:
        """Note that a request ended without usage to learn from. Other workers need not know."""
        self._index.settled(placement)

    def answered(
        self, placement: Placement, prompt_tokens: int, cached_tokens: int | None, output_tokens: int
    ) -> Feedback:
        """Learn from the usage that an upstream reported; see `PrefixIndex.answered`."""
        now = self._clock.unix()
        live = self.state is _LIVE
        feedback = self._index.answered(placement, prompt_tokens, cached_tokens, output_tokens, now, decide=not live)
        if not _is_shared(placement):
            return feedback
        cached = None if cached_tokens is None else _counted(cached_tokens)
        self._writer.enqueue(Answered(placement.id, _counted(prompt_tokens), _counted(output_tokens), cached))
        if cached_tokens and feedback.learnt is not FeedbackKind.SUSPECT:
            self._restarts.clear(placement.replica)
        if feedback.learnt is FeedbackKind.SUSPECT or feedback.epoch is not None:
            self._missed(placement, _counted(prompt_tokens), feedback)
        elif live and feedback.budget_tokens is not None:
            self._reader.own_budgets_until_seconds = self._clock.monotonic() + RECENT_SECONDS
            before = self._index.replicas()[placement.replica].budget_tokens
            self._writer.enqueue(Budgeted(placement.replica, before, feedback.budget_tokens))
        return feedback

    def _missed(self, placement: Placement, prompt_tokens: int, feedback: Feedback) -> None:
        miss = Miss(
            placement=placement.id,
            epoch=placement.epoch,
            fingerprint=placement.fingerprint,
            held_blocks=placement.held_blocks,
            prompt_tokens=prompt_tokens,
            source=placement.source,
        )
        if feedback.epoch is not None:
            self._restarts.restarted(placement.replica, feedback.epoch, miss)
        else:
            self._writer.enqueue(Suspected(placement.id, placement.held_blocks))
            self._restarts.missed(placement.replica, miss)

    def new_epoch(self, replica: int) -> None:
        """Begin a new epoch: the replica is known to have restarted, for example by its start time."""
        epoch = self._index.epoch(replica) + 1
        self._index.new_epoch(replica, epoch)
        self._writer.enqueue(Began(replica, epoch))

    def set_capacity(self, replica: int, tokens: int | None, slots: int | None) -> None:
        """Set the capacity that the replica reports, in this worker only; see `PrefixIndex.set_capacity`."""
        self._index.set_capacity(replica, None if tokens is None else max(1, min(tokens, UNLIMITED_TOKENS)), slots)

    def set_budget(self, replica: int, tokens: int) -> None:
        """Set the replica's capacity, known from the configuration or from the replica itself, for all workers."""
        budget = max(1, min(tokens, UNLIMITED_TOKENS))
        self._index.set_budget(replica, budget)
        self._writer.enqueue(Budgeted(replica, None, budget))

    def knows_budget(self, replica: int) -> bool:
        """Return whether the replica's capacity has been set or learned, here or by another worker."""
        return self._index.budget_tokens(replica) < UNLIMITED_TOKENS

    def own(self, made_id: str, replica: int) -> None:
        """Route requests for the object `made_id` to the replica that made it, in every worker."""
        name = self._replicas.name_of(replica)
        if name is not None and self.locations.learn(made_id, name):
            self._writer.enqueue(Owned(replica, made_id))

    # --- state

    @property
    def state(self) -> JournalState:
        """State of the shared index."""
        if self._reader.live and self._store.state is _AVAILABLE:
            return _LIVE
        return JournalState.ALONE if self._reader.ready.is_set() else JournalState.STARTING

    @property
    def queued(self) -> int:
        """Number of deltas that are not packed yet."""
        return self._writer.queued

    async def start(self, ready_seconds: float = READY_SECONDS) -> JournalState:
        """Begin, and return once the index contains what the others know.

        Return at once if Redis is away, and after `ready_seconds` at the latest; the index then catches up in the
        background.
        """
        self._running = [
            self._tasks.keep(self._reader.run, "journal-read"),
            self._tasks.keep(self._writer.run, "journal-write"),
            self._tasks.keep(self._keep_lease, "journal-keep"),
        ]
        if self._store.state in (_AVAILABLE, StoreState.REFUSING_WRITES):
            try:
                async with asyncio.timeout(ready_seconds):
                    await self._reader.ready.wait()
            except TimeoutError:
                log.warning(
                    "the shared index is not loaded after %.1f s: starting without it, loading continues",
                    ready_seconds,
                )
        self._reader.ready.set()
        return self.state

    async def close(self) -> None:
        """Send the queued deltas, give up the lease, and end."""
        running = [*self._running, *([self._snapshotting] if self._snapshotting else [])]
        for task in running:
            task.cancel()
        if not running:
            return
        await asyncio.wait(running)
        self._running = []
        try:
            await self._writer.flush()
            await self._lease.leave()
        except CacheError as error:
            log.debug("the journal could not send its last entries: %s", error)

    # --- the lease

    async def _keep_lease(self) -> None:
        while True:
            await self._store.wait_available()
            try:
                position = self._reader.position
                self._note(await self._lease.tick(secrets.token_hex(8)), position)
            except CacheError:
                self.holds_lease = False
            await asyncio.sleep(self._lease_seconds / 3)

    def _note(self, tick: Tick, position_before: StreamId) -> None:
        """React to the state of the lease, and to a stream that was lost or trimmed beyond this reader."""
        self.holds_lease = tick.holds_lease
        self.others = max(0, tick.writers - 1)
        self._writer.alone = self.others == 0
        lost = bool(self._generation) and bool(tick.generation) and tick.generation != self._generation
        if tick.generation:
            self._generation = tick.generation
        reader = self._reader
        if lost or tick.tip < position_before:
            was_synced = reader.synced
            reader.lost()
            if was_synced:
                self._write_anew()
        elif reader.synced and reader.position < tick.trimmed:
            log.warning("this worker fell behind the shared index: loading it again")
            reader.fell_behind()
        self._snapshots.wanted |= not tick.has_snapshot
        if self.holds_lease and reader.synced and not self._is_snapshotting and self._snapshots.is_due():
            self._snapshotting = self._tasks.start(self._snapshots.write(), "journal-snapshot")

    def _write_anew(self) -> None:
        """Restore a stream that Redis lost (a flush, a failover), since this worker still knows everything.

        It repeats the entries that others may not have read; the lease-holder writes the rest as a snapshot.
        """
        log.warning("Redis lost the shared index: writing it again")
        self._snapshots.wanted = True
        self._writer.repeat_recent()

    @property
    def _is_snapshotting(self) -> bool:
        return self._snapshotting is not None and not self._snapshotting.done()


def _is_shared(placement: Placement) -> bool:
    ends = placement.fingerprint.ends
    return len(ends) > 0 and ends[-1] >= SHARED_FROM_BYTES


def _counted(tokens: int) -> int:
    """Return a reported number of tokens, limited to the values that an entry can have."""
    return max(0, min(tokens, UNLIMITED_TOKENS))

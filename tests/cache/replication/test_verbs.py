"""The journal's verbs on fakes: what each does to the index and queues for the others, without Redis."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cache.errors import CacheError
from cache.index.placement import Feedback, FeedbackKind, Placement
from cache.index.prefix_index import UNLIMITED_TOKENS, PrefixIndex
from cache.replication.apply import DeltaApplier, Listeners
from cache.replication.codec import (
    Answered,
    Batch,
    Began,
    Budgeted,
    Computed,
    Owned,
    Placed,
    Suspected,
    TakenBack,
    encode_batch,
    own_head,
)
from cache.replication.journal import Journal, JournalState
from cache.replication.owners import ObjectLocations
from cache.replication.restarts import RestartDetector
from cache.replication.snapshots import Tick
from cache.replication.stats import JournalStats
from cache.store.store import StoreState, open_store
from proxy.tasks import Tasks
from tests.support.clock import FakeClock
from tests.support.workers import NAMES, Numbered, prompt

LONG, OTHER, SHORT = prompt(1), prompt(2), prompt(3, 1_000)


class Bench:
    """A journal whose store is off, and what it queued."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.index = PrefixIndex(origin=1)
        tasks = Tasks()
        store = open_store(None, clock=self.clock, tasks=tasks)
        self.journal = Journal(
            self.index, store, "w", clock=self.clock, tasks=tasks, replicas=Numbered(NAMES), lease_seconds=1.0
        )

    def queued(self) -> list[Any]:
        """Everything that is queued, which is then forgotten."""
        (batch,) = self.journal._writer.unsent()  # noqa: SLF001 - internal state that no public name shows
        self.journal._writer._queue.clear()  # noqa: SLF001 - internal state that no public name shows
        self.journal._writer._queue_bytes = 0  # noqa: SLF001 - internal state that no public name shows
        return list(batch.deltas)

    def with_others(self) -> None:
        self.journal._note(Tick(False, b"g", (0, 0), 2, (0, 0)), (0, 0))  # noqa: SLF001 - internal state that no public name shows


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def test_a_placement_is_queued_with_its_whole_chain(bench: Bench) -> None:
    """A short one only changes this worker's index."""
    placement = bench.journal.place(0, LONG, 5_000.7)
    bench.journal.place(0, SHORT, 250)
    (placed,) = bench.queued()
    assert isinstance(placed, Placed)
    assert (placed.placement, placed.replica, placed.prompt_tokens) == (placement.id, 0, 5_000)
    assert placed.fingerprint.ends == LONG.ends
    assert bench.index.match(SHORT).held


async def test_the_end_of_a_request_is_queued_as_far_as_others_need_it(bench: Bench) -> None:
    """Alone nobody waits for a first token; with others they are told, and of a client that left, too."""
    long, short = bench.journal.place(0, LONG, 5_000), bench.journal.place(0, SHORT, 250)
    bench.queued()
    bench.journal.computed(long)
    bench.journal.left(long)
    assert bench.queued() == []
    bench.with_others()
    for placement in (long, short):
        bench.journal.computed(placement)
        bench.journal.left(placement)
        bench.journal.take_back(placement)
        bench.journal.settled(placement)
    assert bench.queued() == [
        Computed(long.id),
        TakenBack(long.id, len(LONG)),
        TakenBack(long.id, 0),
    ]
    assert not bench.index.match(LONG).held


async def test_reported_tokens_are_queued_within_what_an_entry_can_hold(bench: Bench) -> None:
    """An upstream may report any number."""
    placement = bench.journal.place(0, LONG, 5_000)
    bench.queued()
    bench.journal.answered(placement, 10**30, None, -7)
    bench.journal.answered(bench.journal.place(0, SHORT, 250), 250, 0, 1)
    (answered,) = bench.queued()
    assert answered == Answered(placement.id, UNLIMITED_TOKENS, 0, None)
    encode_batch(b"", {}, [answered])


async def test_two_misses_on_different_chains_are_a_restart_and_one_is_a_suspicion(bench: Bench) -> None:
    """Something cached in between clears the first."""
    placements = [bench.journal.place(0, chain, 5_000) for chain in (LONG, OTHER, LONG, OTHER)]
    held = [Placement(**{**_fields(each), "held_blocks": 3}) for each in placements]
    bench.queued()
    suspected = Feedback(5_000, -5_000, FeedbackKind.SUSPECT)
    bench.journal._missed(held[0], 5_000, suspected)  # noqa: SLF001 - internal state that no public name shows
    bench.journal._restarts.clear(0)  # noqa: SLF001 - internal state that no public name shows
    bench.journal._missed(held[1], 5_000, suspected)  # noqa: SLF001 - internal state that no public name shows
    assert [type(each) for each in bench.queued()] == [Suspected, Suspected]
    bench.journal._missed(held[2], 5_000, suspected)  # noqa: SLF001 - internal state that no public name shows
    kinds = [type(each) for each in bench.queued()]
    assert kinds == [Suspected, Began, Placed, Placed]
    assert bench.index.epoch(0) == 1
    bench.journal._missed(held[0], 5_000, suspected)  # of the old epoch  # noqa: SLF001 - internal state that no public name shows
    assert bench.index.epoch(0) == 1


def _fields(placement: Placement) -> dict[str, Any]:
    return {field.name: getattr(placement, field.name) for field in dataclasses.fields(placement)}


async def test_a_restart_that_the_index_found_itself_is_told_to_all(bench: Bench) -> None:
    """While alone the index decides, and the journal repeats it."""
    placement = bench.journal.place(1, LONG, 5_000)
    bench.queued()
    bench.journal._missed(placement, 5_000, Feedback(5_000, -5_000, FeedbackKind.RESTARTED, epoch=1))  # noqa: SLF001 - internal state that no public name shows
    assert [type(each) for each in bench.queued()] == [Began, Placed]


async def test_epochs_budgets_and_objects_are_queued_for_all(bench: Bench) -> None:
    """A budget lies within its range; an object is told once, of a replica that has a name."""
    assert not bench.journal.knows_budget(0)
    bench.journal.new_epoch(0)
    bench.journal.set_budget(0, 10**12)
    assert not bench.journal.knows_budget(0)
    bench.journal.set_budget(0, -5)
    assert bench.journal.knows_budget(0)
    bench.journal.own("resp_1", 0)
    bench.journal.own("resp_1", 0)
    bench.journal.own("resp_2", 99)
    assert bench.queued() == [
        Began(0, 1),
        Budgeted(0, None, UNLIMITED_TOKENS),
        Budgeted(0, None, 1),
        Owned(0, "resp_1"),
    ]


async def test_a_journal_without_redis_starts_alone_and_closes_without_a_word(bench: Bench) -> None:
    """At once."""
    assert bench.journal.state is JournalState.STARTING
    await bench.journal.close()
    assert await bench.journal.start() is JournalState.ALONE
    bench.journal.place(0, LONG, 5_000)
    await bench.journal.close()
    assert bench.journal.queued == 0


async def test_a_start_waits_no_longer_than_it_may(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis answers, but the index does not come: the worker starts alone, and loading goes on."""
    monkeypatch.setattr(type(bench.journal._store), "state", property(lambda store: StoreState.AVAILABLE))  # noqa: SLF001 - internal state that no public name shows
    assert await bench.journal.start(ready_seconds=0.01) is JournalState.ALONE
    await bench.journal.close()


async def test_a_lost_stream_is_written_again_and_noted_once(bench: Bench) -> None:
    """Another generation, or a stream that ends before this worker's position; only a synced worker knows it all."""
    journal = bench.journal
    journal._note(Tick(True, b"g1", (0, 0), 1, (5, 0)), (5, 0))  # noqa: SLF001 - internal state that no public name shows
    journal._reader._applier.live = True  # noqa: SLF001 - internal state that no public name shows
    journal._snapshots.wanted = False  # noqa: SLF001 - internal state that no public name shows
    journal._writer._recent.append((0.0, b"entry"))  # noqa: SLF001 - internal state that no public name shows
    journal._note(Tick(False, b"g2", (0, 0), 1, (5, 0)), (5, 0))  # noqa: SLF001 - internal state that no public name shows
    assert journal._snapshots.wanted  # noqa: SLF001 - internal state that no public name shows
    assert list(journal._writer._unsent) == [b"entry"]  # noqa: SLF001 - internal state that no public name shows
    assert not journal._reader.synced  # noqa: SLF001 - internal state that no public name shows
    journal._snapshots.wanted = False  # noqa: SLF001 - internal state that no public name shows
    journal._note(Tick(False, b"", (0, 0), 1, (0, 0)), (5, 0))  # noqa: SLF001 - internal state that no public name shows
    assert not journal._snapshots.wanted  # noqa: SLF001 - internal state that no public name shows


class Heard:
    """A listener that notes everything."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []

    def placed(self, placement: Placement, prompt_tokens: int) -> None:
        del prompt_tokens
        self.said.append(("placed", placement.id))

    def computed(self, placement_id: int) -> None:
        self.said.append(("computed", placement_id))

    def failed(self, placement_id: int) -> None:
        self.said.append(("failed", placement_id))


class Applying:
    """An applier of others' deltas with its listeners."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.index = PrefixIndex(origin=1)
        self.stats = JournalStats()
        self.locations = ObjectLocations()
        self.heard = Heard()
        self.routed: list[int] = []
        self.restarts = RestartDetector(self.index, lambda delta: None, self.clock)
        self.ended: list[tuple[int, int]] = []
        listeners = Listeners(
            lambda placement, *_: self.routed.append(placement),
            self.heard,
            lambda replica, chain: self.ended.append((replica, chain.hashes[-1])),
        )
        self.applier = DeltaApplier(
            self.index, self.locations, self.restarts, Numbered(NAMES), listeners, self.clock, self.stats
        )

    def apply(self, *deltas: Any) -> None:
        self.applier.apply(Batch(dict(enumerate([*NAMES, "http://unknown"])), list(deltas)))


def placed(placement: int, replica: int = 0, epoch: int = 0) -> Placed:
    return Placed(replica, placement, epoch, LONG.hashes.tobytes(), LONG.ends.tobytes(), 5_000, 1.0)


def test_prefills_of_others_are_told_while_the_index_is_live() -> None:
    """Placements that are applied again in a rebuild are of no interest to those who wait."""
    applying = Applying()
    applying.apply(placed(1))
    applying.applier.live = True
    applying.apply(placed(2), Computed(2), Answered(2, 5_000, 10, 1_000), TakenBack(2, 0))
    assert applying.routed == [1, 2]
    assert applying.heard.said == [("placed", 2), ("computed", 2), ("computed", 2), ("failed", 2)]


def test_answers_of_others_are_told_by_replica_and_chain() -> None:
    """Those of placements that are known; one that was taken back is no answer."""
    applying = Applying()
    applying.apply(placed(1), placed(2, replica=1), Answered(2, 5_000, 10, 1_000), TakenBack(1, 0))
    applying.apply(Answered(9, 5_000, 10, 1_000))
    assert applying.ended == [(1, LONG.hashes[-1])]


def test_deltas_of_old_epochs_unknown_replicas_and_unknown_placements_are_counted() -> None:
    """Each changes nothing."""
    applying = Applying()
    applying.apply(Began(0, 2), placed(1, epoch=1), placed(2, replica=3), Answered(9, 1, 1, None), Suspected(1, 1))
    assert not applying.index.match(LONG).held
    assert (applying.stats.dropped_unknown, applying.stats.dropped_orphans) == (1, 2)


def test_a_suspicion_of_another_worker_counts_with_the_next_one() -> None:
    """Only blocks that the chain has can have been predicted."""
    applying = Applying()
    second = Placed(0, 2, 0, OTHER.hashes.tobytes(), OTHER.ends.tobytes(), 5_000, 1.0)
    applying.apply(placed(1), second, Suspected(1, len(LONG) + 1), Suspected(1, 0))
    applying.apply(Suspected(1, 3), Suspected(2, 3))
    assert applying.index.epoch(0) == 1


def test_a_budget_change_counts_only_from_the_value_that_it_names() -> None:
    """Of an own entry only budgets are applied, of replicas that are known."""
    applying = Applying()
    applying.apply(Budgeted(0, None, 500), Budgeted(0, 400, 300), Owned(0, "resp_1"))
    assert applying.index.replicas()[0].budget_tokens == 500
    names = dict(enumerate([*NAMES, "http://unknown"]))
    own = encode_batch(own_head(1, "w"), names, [placed(7), Budgeted(0, 500, 450), Budgeted(3, None, 5)])
    applying.applier.apply_own_budgets(own)
    applying.applier.apply_own_budgets(b"junk")
    assert applying.index.replicas()[0].budget_tokens == 450
    assert not applying.index.match(LONG).held
    assert applying.locations.of("resp_1") == NAMES[0]
    assert applying.stats.dropped_corrupt == 1


def test_what_is_remembered_of_others_placements_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten first, also if one comes twice with another chain."""
    size_bytes = 640 + 12 * len(LONG)
    monkeypatch.setattr("cache.replication.apply.REMEMBERED_BYTES", 2 * size_bytes)
    applying = Applying()
    other = Placed(0, 1, 0, OTHER.hashes.tobytes(), OTHER.ends.tobytes(), 5_000, 1.0)
    applying.apply(placed(1), other, placed(2), placed(3))
    assert list(applying.applier._remembered) == [2, 3]  # noqa: SLF001 - internal state that no public name shows
    assert applying.applier._remembered_bytes == 2 * size_bytes  # noqa: SLF001 - internal state that no public name shows


async def test_an_error_of_redis_at_the_close_is_not_raised(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker ends anyway."""

    async def fail() -> None:
        raise CacheError("away")

    await bench.journal.start()
    monkeypatch.setattr(bench.journal._lease, "leave", fail)  # noqa: SLF001 - internal state that no public name shows
    await bench.journal.close()

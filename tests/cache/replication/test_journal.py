"""The shared index on a real Valkey: what one worker learns the others know, whatever Redis does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest

from cache import keys
from cache.index.placement import FeedbackKind
from cache.replication import snapshot_writer, snapshots
from cache.replication import writer as writer_module
from cache.replication.codec import Budgeted
from cache.replication.journal import JournalState
from cache.store.store import LIMIT_SECONDS
from tests.support.valkey import Valkey, cluster_of_three, eventually, seconds_until
from tests.support.workers import NAMES, Worker, prompt

Begin = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def begin(valkey: Valkey) -> AsyncIterator[Begin]:
    """Start a worker on the test's Valkey; all are closed at the end."""
    workers: list[Worker] = []

    async def begin(writer: str, **options: object) -> Worker:
        worker = Worker(valkey.url, writer, **options)  # type: ignore[arg-type]
        workers.append(worker)
        return await worker.start()

    yield begin
    for worker in workers:
        await worker.close()


async def test_a_second_worker_knows_at_once_what_the_first_placed(begin: Begin) -> None:
    """Well within 100 ms, and by name: the two number their replicas differently."""
    one, two = await begin("one"), await begin("two", names=NAMES[::-1])
    taken, lags = list[float](), list[float]()
    for seed in range(20):  # on a busy machine only the least of several is a measure
        chain = prompt(seed)
        one.place(chain, 0)
        taken.append(await seconds_until(partial(two.knows, chain, 2)))
        lags.append(two.journal.stats.lag_seconds)
        assert not two.knows(chain, 0)
        if max(min(taken), min(lags)) < 0.1:
            return
    pytest.fail(f"known only after {min(taken):.3f} s, read only after {min(lags):.3f} s")


async def test_a_short_prefix_is_not_shared(begin: Begin) -> None:
    """Under some 4 KB telling costs more than it saves."""
    one, two = await begin("one"), await begin("two")
    short, long = prompt(1, 1_000), prompt(2)
    one.place(short)
    one.place(long)
    await eventually(lambda: two.knows(long))
    assert one.knows(short)
    assert not two.knows(short)


async def test_a_placement_that_failed_is_taken_back_everywhere(begin: Begin) -> None:
    """The entries that only it created are gone at the others, too."""
    one, two = await begin("one"), await begin("two")
    chain = prompt(1)
    placement = one.journal.place(0, chain, 5_000)
    await eventually(lambda: two.knows(chain))
    one.journal.take_back(placement)
    await eventually(lambda: not two.knows(chain))


async def test_an_answers_token_count_is_known_to_all(begin: Begin) -> None:
    """The upstream's own count replaces the estimate at the other worker."""
    one, two = await begin("one"), await begin("two")
    chain = prompt(1)
    placement = one.journal.place(0, chain, 5_000)
    one.journal.answered(placement, 7_777, 0, 10)
    await eventually(lambda: two.knows(chain) and two.index.match(chain).held[0].tokens == 7_777)


async def test_a_writer_skips_its_own_echo(begin: Begin) -> None:
    """A writer's own entries are counted as read and not applied again."""
    one = await begin("one")
    one.place(prompt(1))
    await eventually(lambda: one.journal.stats.own_entries >= 1)
    assert one.journal.stats.applied_deltas == 0


async def test_placements_of_a_moment_are_one_entry(begin: Begin) -> None:
    """A hundred requests are one append."""
    one, two = await begin("one"), await begin("two")
    await eventually(lambda: one.journal.queued == 0 and (one.journal.holds_lease or two.journal.holds_lease))
    written = one.journal.stats.written_entries
    for seed in range(100):
        one.place(prompt(seed))
    await eventually(lambda: two.knows(prompt(99)))
    assert one.journal.stats.written_entries - written <= 2


async def test_a_restarted_worker_knows_before_it_is_ready_what_was_known(begin: Begin) -> None:
    """From the stream alone, before any snapshot covers it."""
    one = await begin("one")
    chains = [prompt(seed) for seed in range(20)]
    for number, chain in enumerate(chains):
        one.place(chain, number % 3)
    await one.close()
    two = await begin("two")
    assert two.journal.state is JournalState.LIVE
    assert all(two.knows(chain, number % 3) for number, chain in enumerate(chains))


async def test_a_restarted_worker_knows_what_only_the_snapshot_holds(
    begin: Begin, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the stream is trimmed, the snapshot and the rest of the stream together give all."""
    monkeypatch.setattr(snapshots, "TRIM_AGE_SECONDS", 0.0)
    monkeypatch.setattr(snapshot_writer, "SNAPSHOT_ENTRIES", 1)
    one = await begin("one")
    chains = [prompt(seed) for seed in range(20)]
    for chain in chains[:10]:
        one.place(chain)
    await eventually(lambda: one.journal.stats.snapshots >= 2 and oldest(valkey) > snapshots.START)
    for chain in chains[10:]:
        one.place(chain)
    await one.close()
    two = await begin("two", names=[*NAMES[1:], NAMES[0]])
    assert all(two.knows(chain, 2) for chain in chains)


def oldest(valkey: Valkey) -> snapshots.StreamId:
    reply = valkey.ask("XRANGE", keys.JOURNAL, "-", "+", "COUNT", "1").split(b"\r\n")
    return snapshots.parse_id(reply[3]) if len(reply) > 3 else snapshots.START


async def test_the_stream_is_never_trimmed_beyond_the_snapshot(
    begin: Begin, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment each entry after the snapshot's id is still there, its own included."""
    monkeypatch.setattr(snapshots, "TRIM_AGE_SECONDS", 0.0)
    monkeypatch.setattr(snapshot_writer, "SNAPSHOT_ENTRIES", 1)
    one = await begin("one")
    for seed in range(30):
        one.place(prompt(seed))
        await eventually(lambda: one.journal.queued == 0)
        if b"stream_id" in (reply := valkey.ask("HGETALL", keys.SNAPSHOT)):
            fields = reply.split(b"\r\n")
            held = snapshots.parse_id(fields[fields.index(b"stream_id") + 2])
            assert held == snapshots.START or oldest(valkey) <= held or oldest(valkey) == snapshots.START
    await eventually(lambda: one.journal.stats.snapshots >= 2)


async def test_a_snapshot_replaced_while_it_is_read_is_read_anew(
    begin: Begin, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start in the moment of a commit finds the old one's parts gone, and takes the new one."""
    one = await begin("one")
    await eventually(lambda: one.journal.stats.snapshots >= 1)
    one.index.place(0, prompt(1), 5_000, one.clock.unix())  # in snapshots alone
    await one.journal._snapshots.write()  # noqa: SLF001 - internal state that no public name shows
    two = Worker(valkey.url, "two")
    head, heads = two.journal._lease.head, []  # noqa: SLF001 - internal state that no public name shows

    async def head_then_commit() -> snapshots.SnapshotHead | None:
        heads.append(await head())
        if len(heads) == 1:
            await one.journal._snapshots.write()  # noqa: SLF001 - internal state that no public name shows
        return heads[-1]

    monkeypatch.setattr(two.journal._lease, "head", head_then_commit)  # noqa: SLF001 - internal state that no public name shows
    try:
        await two.start()
        assert two.knows(prompt(1))
        assert len(set(heads)) == 2
    finally:
        await two.close()


async def test_a_corrupt_entry_is_dropped_and_counted(begin: Begin, valkey: Valkey) -> None:
    """Damaged bytes, another version, a chain cut off: the next good entry is read as ever."""
    one, two = await begin("one"), await begin("two")
    for payload in (
        b"",
        b"\x09",
        b"\x01\x03abc\xff\xff",
        b"\x01\x03abc\x92\x80\x91\x98\x00\x00\x01\x00\xa0\xa0\x00\x00",
    ):
        valkey.ask("XADD", keys.JOURNAL, "*", "d", payload)
    chain = prompt(1)
    one.place(chain)
    await eventually(lambda: two.knows(chain))
    assert two.journal.stats.dropped_corrupt == 4


async def test_an_unknown_replica_is_dropped_and_counted(begin: Begin) -> None:
    """A proxy with fewer replicas takes what it knows."""
    one, two = await begin("one"), await begin("two", names=NAMES[:1])
    one.place(prompt(1), 2)
    one.place(prompt(2), 0)
    await eventually(lambda: two.knows(prompt(2), 0))
    assert two.journal.stats.dropped_unknown == 1
    assert not two.index.match(prompt(1)).held


async def test_after_a_flush_everything_is_written_anew(begin: Begin, valkey: Valkey) -> None:
    """FLUSHALL loses nothing that a worker still knows: a worker that starts later knows it all."""
    one, two = await begin("one"), await begin("two")
    old = prompt(1)
    one.place(old)
    await eventually(lambda: two.knows(old))
    await eventually(lambda: one.journal.stats.snapshots + two.journal.stats.snapshots >= 1)
    written = one.journal.stats.snapshots + two.journal.stats.snapshots
    valkey.flush()
    new = prompt(2)
    two.place(new)
    await eventually(lambda: one.knows(new))
    await eventually(lambda: one.journal.stats.snapshots + two.journal.stats.snapshots > written)
    three = await begin("three")
    assert three.knows(old)
    assert three.knows(new)


async def test_without_redis_a_worker_goes_on_alone_and_tells_later() -> None:
    """It starts at once, serves its own knowledge, and what it queued reaches the others when Redis comes."""
    valkey = Valkey()
    one = Worker(valkey.url, "one")
    two = Worker(valkey.url, "two")
    try:
        async with asyncio.timeout(10):
            await one.start()
        assert one.journal.state is JournalState.ALONE
        chain = prompt(1)
        one.place(chain)
        assert one.knows(chain)
        valkey.start()
        await two.start()
        await eventually(lambda: two.knows(chain))
        await eventually(lambda: one.journal.state is JournalState.LIVE)
    finally:
        await one.close()
        await two.close()
        valkey.end()


async def test_the_queue_is_bounded_while_redis_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go, counted."""
    monkeypatch.setattr(writer_module, "QUEUE_BYTES", 5_000)
    worker = Worker(Valkey().url, "one")
    for seed in range(50):
        worker.place(prompt(seed))
    assert worker.journal.stats.dropped_queued >= 40
    assert 0 < worker.journal.queued <= 10


async def test_a_hung_redis_delays_no_verb_and_heals(begin: Begin, valkey: Valkey) -> None:
    """SIGSTOP: placing stays a matter of microseconds; SIGCONT: the others learn what was placed meanwhile."""
    one, two = await begin("one", limit_seconds=LIMIT_SECONDS), await begin("two")
    valkey.hang()
    try:
        chains = [prompt(seed) for seed in range(50)]
        started = time.monotonic()  # noqa: TID251
        for chain in chains:
            one.place(chain)
        assert time.monotonic() - started < 2  # noqa: TID251 - fifty times the limit of an operation would be longer
        await eventually(lambda: one.journal.state is JournalState.ALONE)
    finally:
        valkey.go_on()
    await eventually(lambda: all(two.knows(chain) for chain in chains))


async def test_the_lease_passes_on_when_its_holder_dies(valkey: Valkey) -> None:
    """One holds it; killed without a word, the other takes over when it expires."""
    workers = [await Worker(valkey.url, name).start() for name in ("one", "two")]
    await eventually(lambda: all(each.journal.others == 1 for each in workers))
    await eventually(lambda: sum(each.journal.holds_lease for each in workers) == 1)
    holder, heir = sorted(workers, key=lambda each: not each.journal.holds_lease)  # the first, unless it was paused
    await holder.die()
    written = heir.journal.stats.snapshots
    await eventually(lambda: heir.journal.holds_lease)
    await eventually(lambda: heir.journal.stats.snapshots > written)
    await heir.close()


async def test_a_worker_that_fell_behind_loads_anew(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose place in the stream was trimmed away is rebuilt from the snapshot."""
    monkeypatch.setattr(snapshots, "TRIM_AGE_SECONDS", 0.0)
    one, two = await begin("one"), await begin("two")
    one.place(prompt(1))
    await eventually(lambda: two.knows(prompt(1)))
    await eventually(lambda: one.journal.stats.snapshots + two.journal.stats.snapshots >= 1)
    rebuilds = two.journal.stats.rebuilds
    two.journal._note(snapshots.Tick(False, b"", (2**60, 0), 2, (2**61, 0)), two.journal._reader.position)  # noqa: SLF001 - internal state that no public name shows
    assert two.journal.state is JournalState.ALONE
    await eventually(lambda: two.journal.stats.rebuilds > rebuilds)
    assert two.knows(prompt(1))


@pytest.mark.parametrize(
    "damage",
    [
        ("SET", keys.LEASE, "nobody", "PX", "999999999999"),
        ("XADD", keys.JOURNAL, "18446744073709551615-18446744073709551615", "d", "x"),
        ("HSET", keys.SNAPSHOT, "trimmed", "18446744073709551615-1"),
        ("HSET", keys.SNAPSHOT, "stream_id", "18446744073709551615-1"),
    ],
)
async def test_values_that_no_proxy_writes_end_no_sharing(
    begin: Begin, valkey: Valkey, damage: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease without an end, a stream with the last possible id, a snapshot of a time to come: all are replaced."""
    monkeypatch.setattr(snapshot_writer, "SNAPSHOT_SECONDS", 0.1)
    one, two = await begin("one"), await begin("two")
    one.place(prompt(1))
    await eventually(lambda: two.knows(prompt(1)))
    await eventually(lambda: one.journal.stats.snapshots + two.journal.stats.snapshots >= 1)
    valkey.ask(*damage)
    written = one.journal.stats.snapshots + two.journal.stats.snapshots
    await eventually(lambda: one.journal.stats.snapshots + two.journal.stats.snapshots > written + 1)
    await eventually(lambda: one.journal.state is two.journal.state is JournalState.LIVE)
    two.place(prompt(2))
    await eventually(lambda: one.knows(prompt(2)))
    three = await begin("three")
    assert three.knows(prompt(1))


async def test_two_confident_misses_at_two_workers_are_a_restart_for_all(begin: Begin) -> None:
    """Each worker saw one answer of the restarted replica; together they know that it is cold."""
    one, two = await begin("one"), await begin("two")
    first, second, third = prompt(1), prompt(2), prompt(3)
    for cached in (0, 5_000):
        for chain in (first, second, third):
            one.journal.answered(one.journal.place(0, chain, 5_000), 5_000, cached, 10)
    await eventually(lambda: two.journal.stats.applied_deltas >= 12)
    feedback = one.journal.answered(one.journal.place(0, first, 5_000), 5_000, 0, 10)
    assert feedback.learnt is FeedbackKind.SUSPECT
    two.journal.answered(two.journal.place(0, second, 5_000), 5_000, 0, 10)
    await eventually(lambda: one.index.epoch(0) == two.index.epoch(0) == 1)
    assert not one.index.match(third).held
    assert not two.index.match(third).held
    await eventually(lambda: one.knows(second) and two.knows(second))


async def test_a_budget_is_the_same_everywhere_whoever_learns(begin: Begin) -> None:
    """Two that decide at once end with one value: the stream's order lets the first through."""
    one, two = await begin("one"), await begin("two")
    one.journal.set_budget(0, 50_000)
    await eventually(lambda: budget(one) == budget(two) == 50_000)
    for worker, tokens in ((one, 45_000), (two, 40_000)):
        worker.journal._reader.own_budgets_until_seconds = float("inf")  # noqa: SLF001 - internal state that no public name shows
        worker.journal._writer.enqueue(Budgeted(0, 50_000, tokens))  # noqa: SLF001 - internal state that no public name shows
    await eventually(lambda: budget(one) == budget(two) != 50_000)


def budget(worker: Worker) -> int | None:
    row = worker.index.replicas().get(0)
    return None if row is None else row.budget_tokens


async def test_a_full_redis_stops_the_sharing_and_not_the_worker(begin: Begin, valkey: Valkey) -> None:
    """OOM: placing goes on; with room again the queue is sent."""
    one, two = await begin("one"), await begin("two")
    valkey.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        one.place(prompt(1))
        await eventually(lambda: one.store.errors["oom"] > 0)  # type: ignore[index]
        assert one.knows(prompt(1))
    finally:
        valkey.ask("CONFIG", "SET", "maxmemory", "0")
    await eventually(lambda: two.knows(prompt(1)))


async def test_it_works_on_a_cluster() -> None:
    """Stream, snapshot and lease lie in one slot; a worker that starts later knows all."""
    with cluster_of_three() as nodes:
        url = f"redis+cluster://127.0.0.1:{nodes[0].port}"
        one, two = (Worker(url, name) for name in ("one", "two"))
        try:
            await one.start()
            one.place(prompt(1))
            await eventually(lambda: one.journal.stats.snapshots >= 1)
            await two.start()
            assert two.journal.state is JournalState.LIVE
            one.place(prompt(2))
            await eventually(lambda: two.knows(prompt(1)) and two.knows(prompt(2)))
        finally:
            await one.close()
            await two.close()

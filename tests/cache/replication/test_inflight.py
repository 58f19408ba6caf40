"""The board of work in flight: whole vectors, numbered, and gone with a goodbye."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from cache.replication import codec
from cache.replication.inflight import LoadBroadcast, Row
from cache.store.store import open_store
from proxy.tasks import Tasks
from tests.support.clock import FakeClock
from tests.support.valkey import Valkey, eventually
from tests.support.workers import Worker

A, B = "http://a", "http://b"


class Taken:
    """A board without a store, and what it handed on."""

    def __init__(self, others: int = 1) -> None:
        clock, tasks = FakeClock(), Tasks()
        self.clock = clock
        self.rows: dict[str, Mapping[str, Row]] = {}
        self.board = LoadBroadcast(
            open_store(None, clock=clock, tasks=tasks),
            "own",
            clock=clock,
            tasks=tasks,
            read=dict,
            absorb=self.rows.__setitem__,
            forget=self.rows.__delitem__,
            others=lambda: others,
        )


def said(writer: str, number: int, rows: dict[str, Row], *, goodbye: bool = False) -> bytes:
    head = codec.own_head(codec.VECTOR_VERSION, writer)
    return codec.encode_vector(head, codec.Vector(number, rows, goodbye))


async def test_the_others_rows_are_handed_on_and_our_echo_is_not() -> None:
    """Each writer's by itself."""
    taken = Taken()
    taken.board.receive(said("x", 1, {A: (100.0, 1)}))
    taken.board.receive(said("y", 1, {B: (200.0, 3)}))
    taken.board.receive(said("own", 9, {A: (999.0, 9)}))
    assert taken.rows == {"x": {A: (100.0, 1)}, "y": {B: (200.0, 3)}}


@pytest.mark.parametrize(
    ("others", "seconds"), [(0, 0.1), (1, 0.005), (9, 0.005), (15, 0.008), (63, 0.032), (199, 0.1), (4_000, 0.1)]
)
async def test_the_more_workers_there_are_the_more_rarely_each_sends(
    others: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads what all send: its work would grow with their number. One without others sends rarely, too."""
    paused: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def pause(seconds: float) -> None:
        paused.set_result(seconds)
        await asyncio.Event().wait()

    taken = Taken(others)
    monkeypatch.setattr(asyncio, "sleep", pause)
    await taken.board.start()
    taken.board.changed()
    assert await paused == pytest.approx(seconds)
    await taken.board.close()


async def test_an_older_number_is_ignored() -> None:
    """Messages that come late or twice change nothing."""
    taken = Taken()
    taken.board.receive(said("x", 2, {A: (100.0, 1)}))
    taken.board.receive(said("x", 1, {A: (900.0, 9)}))
    taken.board.receive(said("x", 2, {A: (900.0, 9)}))
    assert taken.rows == {"x": {A: (100.0, 1)}}
    assert taken.board.dropped_stale == 2
    taken.board.receive(said("x", 3, {B: (1.0, 1)}))
    assert taken.rows == {"x": {B: (1.0, 1)}}


async def test_a_damaged_number_blocks_its_writer_for_two_seconds_only() -> None:
    """Afterwards the writer's true numbers, which are lower, count again."""
    taken = Taken()
    taken.board.receive(said("x", 2**63 - 1, {A: (1.0, 1)}))
    taken.board.receive(said("x", 5, {A: (2.0, 2)}))
    assert taken.rows == {"x": {A: (1.0, 1)}}
    taken.clock.advance(2.0)
    taken.board.receive(said("x", 6, {A: (3.0, 3)}))
    assert taken.rows == {"x": {A: (3.0, 3)}}


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), float("-inf"), 1e300, -1e6])
async def test_a_vector_with_an_impossible_figure_is_dropped(figure: float) -> None:
    """NaN, infinities and absurd sizes would spoil every routing decision."""
    taken = Taken()
    taken.board.receive(said("x", 1, {A: (figure, 1)}))
    assert taken.rows == {}
    assert taken.board.dropped_corrupt == 1


async def test_a_goodbye_is_told_and_damage_is_counted() -> None:
    """Garbage changes nothing."""
    taken = Taken()
    taken.board.receive(said("x", 1, {A: (300.0, 1)}))
    taken.board.receive(b"\x01\x01x\xff")
    taken.board.receive(b"")
    assert taken.board.dropped_corrupt == 2
    taken.board.receive(said("x", 2, {}, goodbye=True))
    assert taken.rows == {}


async def test_work_is_seen_by_the_other_worker_and_said_again_while_it_lasts(valkey: Valkey) -> None:
    """A worker that goes on unchanged is heard; one whose work is done falls silent."""
    one, two = await Worker(valkey.url, "one").start(), await Worker(valkey.url, "two").start()
    try:
        one.work = {A: (5_000.0, 3)}

        async def seen() -> bool:
            one.board.changed()
            return two.heard.get("one") == {A: (5_000.0, 3)}

        await eventually(seen)
        sent = one.board.sent
        await eventually(lambda: one.board.sent >= sent + 2)
        one.work = {}
        one.board.changed()
        await eventually(lambda: two.heard["one"] == {})
    finally:
        await one.close()
        await two.close()


async def test_a_goodbye_is_said_at_the_end(valkey: Valkey) -> None:
    """A clean end frees the replicas at once."""
    one, two = await Worker(valkey.url, "one").start(), await Worker(valkey.url, "two").start()
    try:
        one.work = {A: (5_000.0, 3)}

        async def seen() -> bool:
            one.board.changed()
            return bool(two.heard)

        await eventually(seen)
        await one.close()
        await eventually(lambda: not two.heard)
    finally:
        await two.close()


async def test_a_lost_channel_is_found_again(valkey: Valkey) -> None:
    """All connections cut: both listen again by themselves."""
    one, two = await Worker(valkey.url, "one").start(), await Worker(valkey.url, "two").start()
    try:

        async def seen() -> bool:
            one.board.changed()
            return bool(two.heard)

        await eventually(seen)
        valkey.ask("CLIENT", "KILL", "TYPE", "pubsub")
        two.heard.clear()
        await eventually(seen)
    finally:
        await one.close()
        await two.close()

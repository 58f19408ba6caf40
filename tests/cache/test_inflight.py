"""The board of work in flight: whole vectors, numbered, aged, gone with their owner."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cache import codec, inflight
from cache.inflight import InflightBoard
from cache.store import open_store
from proxy.tasks import Tasks
from tests.support.clock import FakeClock
from tests.support.valkey import Valkey, eventually, running
from tests.support.workers import Worker

A, B = "http://a", "http://b"
RATE = 1_000.0


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with running() as valkey:
        yield valkey


@pytest.fixture
def board() -> InflightBoard:
    clock, tasks = FakeClock(), Tasks()
    store = open_store(None, clock=clock, tasks=tasks)
    return InflightBoard(store, "own", clock=clock, tasks=tasks, rate_of=lambda name: RATE)


def said(writer: str, number: int, load: dict[str, tuple[float, int]], *, goodbye: bool = False) -> bytes:
    pending, requests = zip(*load.values(), strict=True) if load else ((), ())
    vector = codec.Vector(number, tuple(load), pending, requests, goodbye)
    return codec.encode_vector(codec.own_head(codec.VECTOR_VERSION, writer), vector)


async def test_the_others_loads_add_up(board: InflightBoard) -> None:
    """Per replica, over all writers but ourselves."""
    board.receive(said("x", 1, {A: (100.0, 1), B: (50.0, 2)}), 0.0)
    board.receive(said("y", 1, {A: (200.0, 3)}), 0.0)
    board.receive(said("own", 9, {A: (999.0, 9)}), 0.0)
    assert board.others(0.0) == {A: (300.0, 4), B: (50.0, 2)}


async def test_a_vector_replaces_the_last_and_an_older_number_is_ignored(board: InflightBoard) -> None:
    """Messages that come late or twice change nothing."""
    board.receive(said("x", 2, {A: (100.0, 1)}), 0.0)
    board.receive(said("x", 1, {A: (900.0, 9)}), 0.0)
    board.receive(said("x", 2, {A: (900.0, 9)}), 0.0)
    assert board.others(0.0) == {A: (100.0, 1)}
    assert board.dropped_stale == 2
    board.receive(said("x", 3, {B: (1.0, 1)}), 0.0)
    assert board.others(0.0) == {B: (1.0, 1)}


async def test_pending_ages_at_the_replicas_rate_shared_by_the_writers(board: InflightBoard) -> None:
    """A replica works off a thousand tokens a second in all, not for each writer; never below zero."""
    board.receive(said("x", 1, {A: (300.0, 1)}), 0.0)
    board.receive(said("y", 1, {A: (100.0, 1)}), 0.0)
    pending, requests = board.others(0.2)[A]
    assert (round(pending), requests) == (200, 2)
    assert board.others(0.9)[A] == (0.0, 2)


async def test_a_silent_writer_is_dropped_after_a_second(board: InflightBoard) -> None:
    """Its vector dies with it."""
    board.receive(said("x", 1, {A: (300.0, 1)}), 0.0)
    assert board.others(0.99)
    assert board.others(1.01) == {}
    assert board.writers == 0


async def test_a_goodbye_drops_at_once_and_damage_is_counted(board: InflightBoard) -> None:
    """Garbage changes nothing."""
    board.receive(said("x", 1, {A: (300.0, 1)}), 0.0)
    board.receive(b"\x01\x01x\xff", 0.0)
    board.receive(b"", 0.0)
    assert board.dropped_corrupt == 2
    board.receive(said("x", 2, {}, goodbye=True), 0.0)
    assert board.others(0.0) == {}


async def test_others_is_computed_only_when_it_may_differ(board: InflightBoard) -> None:
    """The same mapping is handed out within a few milliseconds."""
    board.receive(said("x", 1, {A: (300.0, 1)}), 0.0)
    assert board.others(0.0) is board.others(inflight.AGEING_STEP_SECONDS / 2)


async def test_a_load_is_seen_by_the_other_worker_and_dies_with_its_owner(valkey: Valkey) -> None:
    """Published, kept alive while nothing changes, and gone a second after a SIGKILL."""
    one, two = await Worker(valkey.url, "one").start(), await Worker(valkey.url, "two").start()
    try:
        now = two.clock.monotonic

        async def seen() -> bool:
            one.board.publish({A: (5_000.0, 3)})
            return A in two.board.others(now())

        await eventually(seen)
        assert two.board.others(now())[A][1] == 3
        sent = one.board.sent
        await eventually(lambda: one.board.sent >= sent + 2)
        assert two.board.others(now())[A][1] == 3
        await one.die()
        await eventually(lambda: not two.board.others(now()))
    finally:
        await two.close()


async def test_a_goodbye_is_said_at_the_end(valkey: Valkey) -> None:
    """A clean end frees the replicas at once."""
    one, two = await Worker(valkey.url, "one").start(), await Worker(valkey.url, "two").start()
    try:
        now = two.clock.monotonic

        async def seen() -> bool:
            one.board.publish({A: (5_000.0, 3)})
            return bool(two.board.others(now()))

        await eventually(seen)
        await one.close()
        await eventually(lambda: not two.board.others(now()), 0.8)
    finally:
        await two.close()


async def test_a_lost_channel_is_found_again(valkey: Valkey) -> None:
    """All connections cut: both listen again by themselves."""
    one, two = await Worker(valkey.url, "one").start(), await Worker(valkey.url, "two").start()
    try:
        now = two.clock.monotonic

        async def seen() -> bool:
            one.board.publish({A: (5_000.0, 3)})
            return bool(two.board.others(now()))

        await eventually(seen)
        valkey.ask("CLIENT", "KILL", "TYPE", "pubsub")
        received = two.board.received
        await eventually(seen)
        await eventually(lambda: two.board.received > received)
    finally:
        await one.close()
        await two.close()

"""The private store is started again when it has ended, and replaced when it stops responding."""

from __future__ import annotations

import asyncio
import threading

import pytest

from proxy.supervisor import private_store
from proxy.supervisor.private_store import SILENCE_LIMIT_SECONDS, StoreKeeper
from tests.support.clock import FakeClock
from tests.support.valkey import eventually


class Broken(Exception):
    """A store that cannot be started."""


class ScriptedStore:
    """A store whose states a test sets. Each look at it lets a second pass."""

    url = "unix:///s"

    def __init__(self, clock: FakeClock) -> None:
        self.running = True
        self.answers = True
        self.looks = self.starts = self.kills = 0
        self.looks_at_kill = self.fails = 0
        self.given_up = threading.Event()
        self._clock = clock

    def responds(self) -> bool:
        self.looks += 1
        self._clock.advance(1.0)
        return self.answers

    def start(self) -> None:
        self.starts += 1
        if self.fails:
            self.fails -= 1
            raise Broken("no room")
        self.running = self.answers = True

    def kill(self) -> None:
        self.kills += 1
        self.looks_at_kill = self.looks
        self.running = False

    def give_up(self) -> None:
        self.given_up.set()

    def stop(self) -> None:
        self.running = False


async def kept(store: ScriptedStore, clock: FakeClock, until: str, count: int) -> None:
    """Run a keeper until the store has counted something that often."""
    keeper = StoreKeeper(store, (Broken,), clock)
    running = asyncio.get_running_loop().create_task(keeper.run())
    await eventually(lambda: getattr(store, until) >= count)
    running.cancel()
    await asyncio.wait([running])
    await keeper.stop()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHECK_SECONDS", "PAUSE_FIRST_SECONDS", "PAUSE_MOST_SECONDS"):
        monkeypatch.setattr(private_store, name, 0.0)


async def test_a_store_that_has_ended_is_started_until_it_runs() -> None:
    """A failed start is tried again."""
    clock = FakeClock()
    store = ScriptedStore(clock)
    store.running, store.fails = False, 2
    await kept(store, clock, "looks", 3)
    assert (store.starts, store.kills) == (3, 0)


async def test_a_store_that_stops_responding_is_killed_and_started_after_a_while() -> None:
    """Not before the limit, and once: the new one responds."""
    clock = FakeClock()
    store = ScriptedStore(clock)
    store.answers = False
    await kept(store, clock, "looks", int(SILENCE_LIMIT_SECONDS) + 5)
    assert (store.kills, store.starts) == (1, 1)
    assert store.looks_at_kill == SILENCE_LIMIT_SECONDS


async def test_a_store_that_responds_again_in_time_is_left_alone() -> None:
    """A command that blocked it for a moment is no reason to lose a second of data."""
    clock = FakeClock()

    class Hesitating(ScriptedStore):
        def responds(self) -> bool:
            return super().responds() and self.looks % 5 == 0

    store = Hesitating(clock)
    await kept(store, clock, "looks", 40)
    assert (store.kills, store.starts) == (0, 0)


async def test_a_store_that_cannot_start_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not at every try, and not that it has ended; once it starts, the log has that too."""
    clock = FakeClock()
    store = ScriptedStore(clock)
    store.running, store.fails = False, 3
    keeper = StoreKeeper(store, (Broken,), clock)
    with caplog.at_level("INFO", "cairn.supervisor"):
        assert not await keeper.start()
        running = asyncio.get_running_loop().create_task(keeper.run())
        await eventually(lambda: store.looks >= 1)
        running.cancel()
        await asyncio.wait([running])
    await keeper.stop()
    assert store.starts == 4
    assert caplog.messages == ["serving without a store: no room", "the private Valkey has started"]


async def test_an_end_does_not_wait_for_a_start(caplog: pytest.LogCaptureFixture) -> None:
    """A store that reads much, or is stopped while it starts, once held up the end for twenty seconds."""

    class Slow(ScriptedStore):
        def start(self) -> None:
            begun.set()
            assert self.given_up.wait(60), "nobody gave it up"
            raise Broken("given up")

    clock, begun = FakeClock(), threading.Event()
    keeper = StoreKeeper(Slow(clock), (Broken,), clock)
    starting = asyncio.get_running_loop().create_task(keeper.start())
    await eventually(begun.is_set)
    await keeper.stop()
    assert not await starting
    assert not caplog.records, "no store was wanted"

"""The periodic work of a worker: upkeep of the index, and of the heap at longer intervals."""

from __future__ import annotations

import asyncio
import ctypes
from types import SimpleNamespace

import pytest

from cache import PrefixIndex
from proxy.metrics.recorder import Recorder
from proxy.tasks import Tasks
from proxy.worker import heap, maintenance
from proxy.worker.heap import return_freed_memory
from proxy.worker.maintenance import TRIM_SECONDS, Maintenance
from tests.support.clock import FakeClock

MIB = 1 << 20


async def test_the_heap_is_trimmed_once_in_each_interval_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on meanwhile."""
    monkeypatch.setattr(maintenance, "TICK_SECONDS", 0.0)
    loop, clock, tasks = asyncio.get_running_loop(), FakeClock(), Tasks()
    trimmed: asyncio.Queue[None] = asyncio.Queue()

    def trim() -> None:
        loop.call_soon_threadsafe(trimmed.put_nowait, None)

    running = tasks.start(Maintenance(PrefixIndex(), Recorder(), clock, trim).run(), "maintenance")
    try:
        await asyncio.sleep(0)  # it starts
        for seconds, times in ((TRIM_SECONDS - 1, 0), (1, 1), (TRIM_SECONDS - 1, 0), (1, 1)):
            clock.advance(seconds)
            if times:
                await asyncio.wait_for(trimmed.get(), 30)
            for _ in range(20):
                await asyncio.sleep(0)
            assert trimmed.empty()
    finally:
        running.cancel()
        await tasks.close()


class Libc:
    """A C library that notes with how many bytes it is told to trim."""

    def __init__(self) -> None:
        self.kept_bytes: list[int] = []

    def malloc_trim(self, kept: ctypes.c_size_t) -> None:
        self.kept_bytes.append(kept.value)


def test_freed_pages_are_returned_except_those_for_the_next_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A C library without such a call, and another system, are left as they are."""
    libc = Libc()
    monkeypatch.setattr(heap, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    return_freed_memory()
    assert libc.kept_bytes == [8 * MIB]
    monkeypatch.setattr(heap, "sys", SimpleNamespace(platform="darwin"))
    return_freed_memory()
    monkeypatch.setattr(heap, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    return_freed_memory()
    assert libc.kept_bytes == [8 * MIB]

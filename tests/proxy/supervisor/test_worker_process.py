"""One slot with processes that are no proper workers."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

import pytest

from proxy.clock import SystemClock
from proxy.config.load import Config
from proxy.control.channel import Explain, WorkerReport
from proxy.supervisor import worker_process as slot_module
from proxy.supervisor.worker_process import WorkerProcess, WorkerUnavailable

# what a worker gets: --control FD --listen FDS --parent PID
NONSENSE = "import os, sys, signal; os.write(int(sys.argv[2]), b'\\xff' * 8); signal.pause()"
SILENT = "import signal; signal.pause()"


class Heard:
    """A watcher that notes what it hears."""

    def __init__(self) -> None:
        self.deaths: asyncio.Queue[int] = asyncio.Queue()

    def ready(self, number: int) -> None:
        raise AssertionError("none of these is ever ready")

    def reported(self, number: int, report: WorkerReport) -> None:
        raise AssertionError("none of these reports")

    def refused(self, number: int, why: str) -> None:
        raise AssertionError("none of these refuses")

    def died(self, number: int, lives: int) -> None:
        self.deaths.put_nowait(lives)


async def dies_and_comes_back(command: Sequence[str]) -> WorkerProcess:
    """Run a slot with `command` until it saw two deaths, then end it."""
    heard = Heard()
    slot = WorkerProcess(0, command, dict(os.environ), [], Config(), heard, SystemClock())  # noqa: TID251
    running = asyncio.ensure_future(slot.run())  # noqa: TID251
    async with asyncio.timeout(20):
        assert [await heard.deaths.get(), await heard.deaths.get()] == [1, 2]
        slot.kill()
        await running
    return slot


async def test_a_worker_that_speaks_nonsense_is_ended_and_replaced() -> None:
    """A broken one must not stay."""
    await dies_and_comes_back([sys.executable, "-c", NONSENSE])


async def test_a_worker_that_is_never_ready_is_ended_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the limit for starts."""
    monkeypatch.setattr(slot_module, "START_LIMIT_SECONDS", 0.05)
    await dies_and_comes_back([sys.executable, "-c", SILENT])


async def test_a_worker_that_cannot_be_started_is_tried_again() -> None:
    """As when the machine is out of processes."""
    slot = await dies_and_comes_back(["/no/such/program"])
    assert slot.pid is None


async def test_nobody_explains_where_there_is_no_worker() -> None:
    """`WorkerUnavailable`, at once."""
    slot = WorkerProcess(0, ["/no/such/program"], {}, [], Config(), Heard(), SystemClock())
    with pytest.raises(WorkerUnavailable):
        await slot.explain(Explain(1, "/v1/x", b""), 10.0)


async def test_a_worker_that_hears_nothing_is_killed_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain ends even where the worker stands still."""
    monkeypatch.setattr(slot_module, "KILL_MARGIN_SECONDS", 0.05)
    slot = WorkerProcess(0, [sys.executable, "-c", SILENT], dict(os.environ), [], Config(), Heard(), SystemClock())  # noqa: TID251
    running = asyncio.ensure_future(slot.run())  # noqa: TID251
    async with asyncio.timeout(20):
        while slot.pid is None:  # noqa: ASYNC110 - turns of the loop, until the process is there
            await asyncio.sleep(0)
        slot.drain(0.0)
        await running
    assert slot.pid is None

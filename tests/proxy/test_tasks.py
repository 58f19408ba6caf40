"""Background tasks: failures are counted, and kept tasks restart."""

from __future__ import annotations

import asyncio

import pytest

from proxy import tasks as tasks_module
from proxy.tasks import Tasks


async def test_a_kept_task_restarts_after_each_failure_and_every_failure_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third run succeeds and ends the task."""
    monkeypatch.setattr(tasks_module, "RESTART_FIRST_SECONDS", 0.0)
    tasks, runs = Tasks(), 0

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise ValueError("bad data")

    await tasks.keep(work, "reader")
    assert runs == 3
    assert tasks.failures == {"reader": 2}
    assert not tasks.restarting


async def test_a_kept_task_is_listed_while_it_waits_to_restart_and_close_ends_it() -> None:
    """Cancelling it during the pause leaves nothing behind."""
    tasks, failed = Tasks(), asyncio.Event()

    async def work() -> None:
        failed.set()
        raise ValueError("bad data")

    tasks.keep(work, "reader")
    await failed.wait()
    await asyncio.sleep(0)
    assert tasks.restarting == {"reader"}
    await tasks.close()
    assert not tasks.restarting
    assert len(tasks) == 0


async def test_a_started_task_that_fails_is_counted_once() -> None:
    """It is not restarted."""
    tasks = Tasks()

    async def work() -> None:
        raise ValueError("bad data")

    await asyncio.wait([tasks.start(work(), "once")])
    await asyncio.sleep(0)
    assert tasks.failures == {"once": 1}

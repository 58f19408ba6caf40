"""Start background tasks, here only: keep references, name the tasks, and log and count their failures."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from proxy.backoff import ExponentialBackoff

log = logging.getLogger("cairn.tasks")

RESTART_FIRST_SECONDS = 0.1
RESTART_MOST_SECONDS = 30.0  # a task that always fails at once then costs almost nothing and stays visible
STEADY_SECONDS = 60.0  # a task that ran this long before it failed restarts with the first pause again


class Tasks:
    """Background tasks of one owner.

    `failures` counts, by task name, how many ended with an exception; `failed` is called with the name each time.
    """

    def __init__(self, failed: Callable[[str], None] | None = None) -> None:
        self._failed = failed
        self._running: set[asyncio.Task[Any]] = set()
        self.failures: Counter[str] = Counter()
        self.restarting: set[str] = set()
        """Names of kept tasks that failed and are waiting to be restarted."""

    def start(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `coroutine` until it ends or `close` is called; log and count an exception, and do not restart it."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[Any]:
        """Run `work()`, and run it again after each failure, with a growing pause. Ends when `work()` returns."""
        return self.start(self._keep(work, name), name)

    def __len__(self) -> int:
        return len(self._running)

    async def close(self) -> None:
        """Cancel all running tasks and wait for them."""
        for task in tuple(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _keep(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        loop = asyncio.get_running_loop()
        backoff = ExponentialBackoff(RESTART_FIRST_SECONDS, RESTART_MOST_SECONDS)
        while True:
            began_seconds = loop.time()
            try:
                await work()
            except Exception as error:  # noqa: BLE001 - no background task may end because of data
                self._count(name, error)
            else:
                return
            if loop.time() - began_seconds >= STEADY_SECONDS:
                backoff.reset()
            self.restarting.add(name)
            try:
                await asyncio.sleep(backoff.next_seconds(random.random()))
            finally:
                self.restarting.discard(name)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._count(task.get_name(), error)

    def _count(self, name: str, error: BaseException) -> None:
        self.failures[name] += 1
        if self._failed is not None:
            self._failed(name)
        log.error("background task %s failed", name, exc_info=error)

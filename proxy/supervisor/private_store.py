"""Run the private Valkey that Cairn starts if no Redis is configured, and start it again when it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from proxy.backoff import ExponentialBackoff

CHECK_SECONDS = 1.0
PAUSE_FIRST_SECONDS = 1.0
PAUSE_MOST_SECONDS = 30.0

log = logging.getLogger("cairn.supervisor")


class PrivateStore(Protocol):
    """A store that Cairn starts itself. `start` and `stop` block."""

    @property
    def url(self) -> str:
        """URL for the workers; known before the server runs."""
        ...

    @property
    def running(self) -> bool:
        """True if its process is alive."""
        ...

    def start(self) -> None:
        """Start it and wait until it answers."""

    def stop(self) -> None:
        """Stop it."""


class StoreKeeper:
    """Starts and stops one private store. `start` of the store raises one of `errors` if it fails."""

    def __init__(self, store: PrivateStore, errors: tuple[type[Exception], ...]) -> None:
        self._store = store
        self._errors = errors
        # one thread for the life of the process: on Linux the kernel ends the store with the thread that started it
        self._thread = ThreadPoolExecutor(1, "private-store")

    @property
    def url(self) -> str:
        """URL of the store for the workers."""
        return self._store.url

    async def start(self) -> bool:
        """Start the store; returns False if it cannot be started. Cairn then serves without one."""
        try:
            await self._in_thread(self._store.start)
        except self._errors as error:
            log.warning("serving without a store: %s", error)
            return False
        return True

    async def run(self) -> None:
        """Start the store again whenever it has ended, until cancelled."""
        backoff = ExponentialBackoff(PAUSE_FIRST_SECONDS, PAUSE_MOST_SECONDS)
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if self._store.running:
                continue
            log.warning("the private Valkey has ended; starting it")
            if await self.start():
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_seconds())

    async def stop(self) -> None:
        """Stop the store."""
        await self._in_thread(self._store.stop)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, call: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, call)

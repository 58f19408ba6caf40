"""Run the private Valkey that Cairn starts if no Redis is configured; replace it when it ends or stops responding."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from proxy.backoff import ExponentialBackoff
from proxy.clock import Clock

CHECK_SECONDS = 1.0
SILENCE_LIMIT_SECONDS = 10.0  # without an answer for this long it is frozen; a script or a disk may block it briefly
PAUSE_FIRST_SECONDS = 1.0
PAUSE_MOST_SECONDS = 30.0

_Result = TypeVar("_Result")

log = logging.getLogger("cairn.supervisor")


class PrivateStore(Protocol):
    """A store that Cairn starts itself. Its methods block."""

    @property
    def url(self) -> str:
        """URL for the workers; known before the server runs."""
        ...

    @property
    def running(self) -> bool:
        """True if its process is alive."""
        ...

    def responds(self) -> bool:
        """Return whether it answers a command."""
        ...

    def kill(self) -> None:
        """End it at once."""

    def start(self) -> None:
        """Start it and wait until it answers."""

    def give_up(self) -> None:
        """Let a start that runs in another thread fail soon, and every later one."""

    def stop(self) -> None:
        """Stop it."""


class StoreKeeper:
    """Starts and stops one private store. `start` of the store raises one of `errors` if it fails."""

    def __init__(self, store: PrivateStore, errors: tuple[type[Exception], ...], clock: Clock) -> None:
        self._store = store
        self._errors = errors
        self._clock = clock
        # one thread for the life of the process: on Linux the kernel ends the store with the thread that started it
        self._thread = ThreadPoolExecutor(1, "private-store")
        self._problem = ""  # why the last start failed
        self._has_given_up = False

    @property
    def url(self) -> str:
        """URL of the store for the workers."""
        return self._store.url

    async def start(self) -> bool:
        """Start the store; returns False if it cannot be started. Cairn then serves without one."""
        try:
            await self._in_thread(self._store.start)
        except self._errors as error:
            if str(error) != self._problem and not self._has_given_up:  # said once, and not at every try
                log.warning("serving without a store: %s", error)
            self._problem = str(error)
            return False
        if self._problem:
            log.info("the private Valkey has started")
        self._problem = ""
        return True

    async def run(self) -> None:
        """Start the store again whenever it has ended or stopped responding, until cancelled."""
        backoff = ExponentialBackoff(PAUSE_FIRST_SECONDS, PAUSE_MOST_SECONDS)
        responded_seconds = self._clock.monotonic()
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if self._store.running:
                if await self._in_thread(self._store.responds):
                    responded_seconds = self._clock.monotonic()
                if self._clock.monotonic() - responded_seconds < SILENCE_LIMIT_SECONDS:
                    continue
                log.error("the private Valkey has not responded for %.0f s; killing it", SILENCE_LIMIT_SECONDS)
                await self._in_thread(self._store.kill)
            if not self._problem:
                log.warning("the private Valkey has ended; starting it again")
            responded_seconds = self._clock.monotonic()
            if await self.start():
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next_seconds())

    def give_up(self) -> None:
        """Let a start fail soon, for which an end would have to wait, and every later one."""
        self._has_given_up = True
        self._store.give_up()

    async def stop(self) -> None:
        """Stop the store."""
        self.give_up()
        await self._in_thread(self._store.stop)
        self._thread.shutdown(wait=False)

    async def _in_thread(self, call: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

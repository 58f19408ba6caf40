"""Maintain the prefix index and the heap in the background, and measure how late the event loop runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cache import PrefixIndex
from proxy.clock import Clock
from proxy.metrics.definitions import LOOP_LAG
from proxy.metrics.recorder import Recorder

TICK_SECONDS = 0.25
TRIM_SECONDS = 60.0  # so rarely, because pages that were returned cost a fault each when they are used again


class Maintenance:
    """The periodic work of one worker. `trim_heap` is called in a thread."""

    def __init__(self, index: PrefixIndex, recorder: Recorder, clock: Clock, trim_heap: Callable[[], None]) -> None:
        self._index = index
        self._recorder = recorder
        self._clock = clock
        self._trim_heap = trim_heap

    async def run(self) -> None:
        """Tick until cancelled. The delay of a tick is the loop's lag."""
        trim_seconds = self._clock.monotonic() + TRIM_SECONDS
        while True:
            due_seconds = self._clock.monotonic() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self._recorder.observe(LOOP_LAG, (), max(self._clock.monotonic() - due_seconds, 0.0))
            # in bounded steps, so that requests are handled in between
            while self._index.tend(self._clock.unix()):  # noqa: ASYNC110 - only gives way to the loop
                await asyncio.sleep(0)
            if self._clock.monotonic() >= trim_seconds:
                trim_seconds = self._clock.monotonic() + TRIM_SECONDS
                await asyncio.to_thread(self._trim_heap)

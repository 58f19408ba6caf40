"""Maintain the prefix index in the background, and measure how late the event loop runs."""

from __future__ import annotations

import asyncio

from cache import PrefixIndex
from proxy.clock import Clock
from proxy.metrics.definitions import LOOP_LAG
from proxy.metrics.recorder import Recorder

TICK_SECONDS = 0.25


class Maintenance:
    """The periodic work of one worker."""

    def __init__(self, index: PrefixIndex, recorder: Recorder, clock: Clock) -> None:
        self._index = index
        self._recorder = recorder
        self._clock = clock

    async def run(self) -> None:
        """Tick until cancelled. The delay of a tick is the loop's lag."""
        while True:
            due_seconds = self._clock.monotonic() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            self._recorder.observe(LOOP_LAG, (), max(self._clock.monotonic() - due_seconds, 0.0))
            # in bounded steps, so that requests are handled in between
            while self._index.tend(self._clock.unix()):  # noqa: ASYNC110 - only gives way to the loop
                await asyncio.sleep(0)

"""A time limit that does not hold against an operation the time for which the event loop itself was stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

_LATE_SECONDS: Final = 0.02  # more than a busy loop's timers are late by; a pause of the process is longer


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """Raise TimeoutError if what is inside takes longer than `seconds`, as `asyncio.timeout` does.

    If the loop runs only long after that time, because the process was paused or a callback was slow, the reply may
    have come meanwhile and is not read yet, since timers are handled before what a socket received. Then the limit
    begins again, once.
    """
    loop = asyncio.get_running_loop()

    def restart_or_end(due: float) -> None:
        now = loop.time()
        limit.reschedule(now + seconds if now - due > _LATE_SECONDS else now)

    due = loop.time() + seconds
    async with asyncio.timeout(None) as limit:
        timer = loop.call_at(due, restart_or_end, due)
        try:
            yield
        finally:
            timer.cancel()

"""Leave off sending a request as soon as its response is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proxy.upstream.response import UpstreamResponse


@asynccontextmanager
async def interrupted_by(response: UpstreamResponse) -> AsyncIterator[None]:
    """End what is inside once the head of `response` has arrived or the exchange has failed.

    The time limit that ends it is named only here: it names the task, and if the task is cancelled, its exception
    names the frames of what is inside. Were the limit named there, all would stay until a full collection.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(None) as limit:
            response.interrupt_with(lambda: limit.reschedule(loop.time()))
            yield
    except TimeoutError:
        if not limit.expired():
            raise  # raised by what is inside
    finally:
        response.interrupt_with(None)

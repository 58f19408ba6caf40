"""Hearing a channel of Redis for ever, over every loss of the connection.

A message may be lost meanwhile and nobody is told which, so whoever depends on all of them asks when a hearing begins
and ends. It must not know what the messages mean.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from cache.errors import CacheError
from cache.store.store import Store

log = logging.getLogger("cairn.listening")

RECONNECT_FIRST_SECONDS, RECONNECT_LAST_SECONDS = 0.05, 2.0
LISTEN_SECONDS = 1.0  # of silence on the channel, then Redis is asked whether it lives


async def listen(
    store: Store,
    channel: str,
    receive: Callable[[bytes], None],
    *,
    begun: Callable[[], None] = lambda: None,
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Hand every message of `channel` to `receive` until cancelled; `begun` and `ended` enclose each hearing."""
    pause = RECONNECT_FIRST_SECONDS
    while True:
        await store.wait_available()
        try:
            subscription = await store.subscribe(channel)
            try:
                pause = RECONNECT_FIRST_SECONDS
                begun()
                while True:
                    payload = await subscription.next(LISTEN_SECONDS)
                    if payload is not None:
                        receive(payload)
            finally:
                ended()
                await subscription.close()
        except CacheError as error:
            log.debug("the channel %s is lost: %s", channel, error)
        await asyncio.sleep(pause * random.uniform(0.8, 1.2))
        pause = min(RECONNECT_LAST_SECONDS, pause * 2)

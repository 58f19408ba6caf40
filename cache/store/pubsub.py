"""Listen to a Redis channel for ever, and subscribe again after every loss of the connection.

Messages may be lost in between without notice. A listener that depends on all of them uses `begun` and `ended`, which
are called when a subscription begins and ends.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable

from cache.backoff import ExponentialBackoff
from cache.errors import CacheError
from cache.store.store import Store

log = logging.getLogger("cairn.pubsub")

RECONNECT_FIRST_SECONDS, RECONNECT_MOST_SECONDS = 0.05, 2.0
LISTEN_SECONDS = 1.0  # of silence on the channel, after which a ping is sent to Redis


async def listen(
    store: Store,
    channel: str,
    receive: Callable[[bytes], None],
    *,
    begun: Callable[[], None] = lambda: None,
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Pass every message of `channel` to `receive` until cancelled."""
    backoff = ExponentialBackoff(RECONNECT_FIRST_SECONDS, RECONNECT_MOST_SECONDS)
    while True:
        await store.wait_available()
        try:
            subscription = await store.subscribe(channel)
            try:
                backoff.reset()
                begun()
                while True:
                    payload = await subscription.next(LISTEN_SECONDS)
                    if payload is not None:
                        receive(payload)
            finally:
                ended()
                await subscription.close()
        except CacheError as error:
            log.debug("the subscription to %s is lost: %s", channel, error)
        await asyncio.sleep(backoff.next_seconds(random.random()))

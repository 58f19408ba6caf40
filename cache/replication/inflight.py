"""Share every worker's work in flight: each publishes its whole vector while it changes, never differences.

A lost difference would never be corrected; a lost vector is replaced by the next one some milliseconds later. Vectors
of others are passed on as a whole, in place of the writer's previous one. The receiver ages them, and drops a writer
after a second of silence. They are published on a pub/sub channel and not stored.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from cache import keys
from cache.errors import CacheError, StoreCorrupt
from cache.ports import Clock, Tasks
from cache.replication import codec
from cache.store.pubsub import listen
from cache.store.store import Store

log = logging.getLogger("cairn.inflight")

SEND_INTERVAL_SECONDS = 0.005
LONGEST_INTERVAL_SECONDS = 0.1  # vectors that are as old cost 8 % of TTFT; also of a worker without others
VECTORS_A_SECOND = 2_000
"""Of all workers together. Each worker reads them all, at about 30 us each: sixty that send every 5 ms would spend a
third of their time on it."""

REPEAT_SECONDS = 0.3  # unchanged work is published again, three times before receivers would drop it
WRITERS_AT_MOST = 4_096  # writers whose last number is remembered
NUMBER_SECONDS = 2.0  # after this time a writer's last number is ignored, so that a damaged one does no lasting harm

Row = tuple[float, ...]


class LoadBroadcast:
    """Publishes this worker's vector and passes on those of others.

    `read` returns this worker's rows by replica name, when they are sent; `absorb` takes another writer's rows;
    `forget` drops a writer that ended. `others` returns the number of other workers, which decides how often vectors
    are sent.
    """

    def __init__(
        self,
        store: Store,
        writer_id: str,
        *,
        clock: Clock,
        tasks: Tasks,
        read: Callable[[], Mapping[str, Row]],
        absorb: Callable[[str, Mapping[str, Row]], None],
        forget: Callable[[str], None],
        others: Callable[[], int] = lambda: 1,
    ) -> None:
        self._store = store
        self._clock = clock
        self._tasks = tasks
        self._read = read
        self._absorb = absorb
        self._forget = forget
        self._others = others
        self._head = codec.own_head(codec.VECTOR_VERSION, writer_id)
        # a writer that restarts under the same id begins far above any number that it used before
        self._number = int(clock.unix() * 1000)
        self._busy = False
        self._changed = asyncio.Event()
        self._received: dict[str, tuple[int, float]] = {}  # a writer's last number, and the time of its arrival
        self._running: list[asyncio.Task[Any]] = []
        self.sent = 0
        self.received = 0
        self.dropped_corrupt = 0
        self.dropped_stale = 0  # messages with a number not above the writer's last one

    async def start(self) -> None:
        """Begin to listen and to send."""
        self._running = [
            self._tasks.keep(self._send_forever, "inflight-send"),
            self._tasks.keep(lambda: listen(self._store, keys.INFLIGHT_CHANNEL, self.receive), "inflight-listen"),
        ]

    async def close(self) -> None:
        """End, and publish a last vector so that others drop this worker's work at once."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
            await self._send(goodbye=True)
        self._running = []

    @property
    def dropped(self) -> dict[str, int]:
        """Numbers of vectors that were dropped, by reason."""
        return {"vector_corrupt": self.dropped_corrupt, "vector_stale": self.dropped_stale}

    def changed(self) -> None:
        """Note that this worker's work has changed; it is read and sent within milliseconds."""
        self._changed.set()

    def receive(self, payload: bytes) -> None:
        """Handle one message of the channel. Own messages, old numbers and damaged bytes change nothing."""
        if payload.startswith(self._head):
            return
        try:
            writer, vector = codec.decode_vector(payload)
        except StoreCorrupt:
            self.dropped_corrupt += 1
            return
        self.received += 1
        now_seconds = self._clock.monotonic()
        number, received_seconds = self._received.pop(writer, (-1, 0.0))
        if vector.number <= number and now_seconds - received_seconds < NUMBER_SECONDS:
            self._received[writer] = number, received_seconds
            self.dropped_stale += 1
        elif vector.goodbye:
            self._forget(writer)
        else:
            self._received[writer] = vector.number, now_seconds
            if len(self._received) > WRITERS_AT_MOST:
                del self._received[next(iter(self._received))]
            self._absorb(writer, vector.rows)

    async def _send_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REPEAT_SECONDS if self._busy else None):
                    await self._changed.wait()
            except TimeoutError:
                pass  # nothing changed, but others drop a silent writer
            self._changed.clear()
            await self._send()
            await asyncio.sleep(interval_seconds(self._others()))

    async def _send(self, *, goodbye: bool = False) -> None:
        self._number += 1
        rows = {} if goodbye else dict(self._read())
        self._busy = bool(rows)
        payload = codec.encode_vector(self._head, codec.Vector(self._number, rows, goodbye))
        try:
            await self._store.execute("PUBLISH", keys.INFLIGHT_CHANNEL, payload)
            self.sent += 1
        except CacheError as error:  # counted by the store; the next vector replaces it
            log.debug("the in-flight vector was not sent: %s", error)


def interval_seconds(others: int) -> float:
    """Return the time between two vectors of a worker, for a number of other workers."""
    if not others:
        return LONGEST_INTERVAL_SECONDS
    return min(max((others + 1) / VECTORS_A_SECOND, SEND_INTERVAL_SECONDS), LONGEST_INTERVAL_SECONDS)

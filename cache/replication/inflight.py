"""Who has how much work in flight where: each worker's whole vector, sent while it changes, never as deltas.

Lost deltas would drift for ever; a lost vector is replaced by the next one some milliseconds later. What a writer
said is handed on whole, in place of what it said before; ageing it, and dropping it after a second of silence, is for
whoever takes it. It lives on a pub/sub channel alone: nothing of it is stored.
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

SEND_INTERVAL_SECONDS = 0.005  # news that is 100 ms old costs 8 % of TTFT
ALONE_INTERVAL_SECONDS = 0.1
REPEAT_SECONDS = 0.3  # a writer whose work goes on unchanged says so three times within the silence
WRITERS_AT_MOST = 4_096  # whose last number is remembered

Row = tuple[float, ...]


class LoadBroadcast:
    """Ours is published, the others' are handed on.

    `read` gives our rows by replica name when they are sent; `absorb` takes another writer's, `forget` drops a writer
    that said goodbye. While `alone`, it is said seldom: a newcomer hears it soon enough.
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
        alone: Callable[[], bool] = lambda: False,
    ) -> None:
        self._store = store
        self._tasks = tasks
        self._read = read
        self._absorb = absorb
        self._forget = forget
        self._alone = alone
        self._head = codec.own_head(codec.VECTOR_VERSION, writer_id)
        # a writer that comes back under a name of its own starts far above any number that was heard of it
        self._number = int(clock.unix() * 1000)
        self._busy = False
        self._changed = asyncio.Event()
        self._heard: dict[str, int] = {}
        self._running: list[asyncio.Task[Any]] = []
        self.sent = 0
        self.received = 0
        self.dropped_corrupt = 0
        self.dropped_stale = 0  # numbered below what was heard already

    async def start(self) -> None:
        """Begin to listen and to send."""
        self._running = [
            self._tasks.start(self._send_forever(), "inflight-send"),
            self._tasks.start(listen(self._store, keys.INFLIGHT_CHANNEL, self.receive), "inflight-listen"),
        ]

    async def close(self) -> None:
        """Say goodbye, so that the others drop our work at once, and end."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
            await self._send(goodbye=True)
        self._running = []

    def changed(self) -> None:
        """Our work is another than it was; it is read when it is sent, within milliseconds."""
        self._changed.set()

    def receive(self, payload: bytes) -> None:
        """One message of the channel; our own echo, an older number and damaged bytes change nothing."""
        if payload.startswith(self._head):
            return
        try:
            writer, vector = codec.decode_vector(payload)
        except StoreCorrupt:
            self.dropped_corrupt += 1
            return
        self.received += 1
        if vector.number <= self._heard.get(writer, -1):
            self.dropped_stale += 1
        elif vector.goodbye:
            self._heard.pop(writer, None)
            self._forget(writer)
        else:
            self._heard.pop(writer, None)
            self._heard[writer] = vector.number
            if len(self._heard) > WRITERS_AT_MOST:
                del self._heard[next(iter(self._heard))]
            self._absorb(writer, vector.rows)

    async def _send_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REPEAT_SECONDS if self._busy else None):
                    await self._changed.wait()
            except TimeoutError:
                pass  # nothing changed, but the others must hear that we live
            self._changed.clear()
            await self._send()
            await asyncio.sleep(ALONE_INTERVAL_SECONDS if self._alone() else SEND_INTERVAL_SECONDS)

    async def _send(self, *, goodbye: bool = False) -> None:
        self._number += 1
        rows = {} if goodbye else dict(self._read())
        self._busy = bool(rows)
        payload = codec.encode_vector(self._head, codec.Vector(self._number, rows, goodbye))
        try:
            await self._store.execute("PUBLISH", keys.INFLIGHT_CHANNEL, payload)
            self.sent += 1
        except CacheError as error:  # the next vector says it all again; the store has counted it
            log.debug("the in-flight vector was not sent: %s", error)

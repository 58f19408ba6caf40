"""Who has how much work in flight where: each worker's whole vector, sent while it changes, never as deltas.

Lost deltas would drift for ever; a lost vector is replaced by the next one some milliseconds later. What a writer
said is aged by the reader's own clock at the replica's prefill rate, and dropped after a second of silence. It lives
on a pub/sub channel alone: nothing of it is stored.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from cache import codec, keys
from cache.errors import CacheError, StoreCorrupt
from cache.ports import Clock, Tasks
from cache.store import Store, Subscription

log = logging.getLogger("cairn.inflight")

SEND_INTERVAL_SECONDS = 0.005  # news that is 100 ms old costs 8 % of TTFT
REPEAT_SECONDS = 0.3  # a writer whose work goes on unchanged says so three times within the silence
SILENCE_SECONDS = 1.0  # then it is taken for dead, and its work with it
AGEING_STEP_SECONDS = 0.005  # `others` is computed anew when it is older than this
RECONNECT_FIRST_SECONDS, RECONNECT_LAST_SECONDS = 0.05, 2.0
LISTEN_SECONDS = 1.0  # of silence on the channel, then Redis is asked whether it lives

Load = tuple[float, int]  # pending tokens, requests in flight


class _Heard(msgspec.Struct, frozen=True, gc=False):
    """The last vector of one writer and when it came, on our clock."""

    vector: codec.Vector
    seconds: float


class InflightBoard:
    """Ours is published, the others' are read.

    `rate_of` gives a replica's prefill rate by name, in tokens a second (0 where it is not known: no ageing).
    """

    def __init__(
        self,
        store: Store,
        writer_id: str,
        *,
        clock: Clock,
        tasks: Tasks,
        rate_of: Callable[[str], float],
    ) -> None:
        self._store = store
        self._clock = clock
        self._tasks = tasks
        self._rate_of = rate_of
        self._head = codec.own_head(codec.VECTOR_VERSION, writer_id)
        self._own: Mapping[str, Load] = {}
        self._number = 0
        self._changed = asyncio.Event()
        self._heard: dict[str, _Heard] = {}
        self._sums: dict[str, Load] = {}
        self._sums_seconds = float("-inf")
        self._running: list[asyncio.Task[Any]] = []
        self.sent = 0
        self.received = 0
        self.dropped_corrupt = 0
        self.dropped_stale = 0  # numbered below what was heard already

    async def start(self) -> None:
        """Begin to listen and to send."""
        self._running = [
            self._tasks.start(self._send_forever(), "inflight-send"),
            self._tasks.start(self._listen_forever(), "inflight-listen"),
        ]

    async def close(self) -> None:
        """Say goodbye, so that the others drop our work at once, and end."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
            await self._send(goodbye=True)
        self._running = []

    def publish(self, vector: Mapping[str, Load]) -> None:
        """Ours has changed. It is read when it is sent, within milliseconds, so the same live mapping may be passed
        each time; a replica without work may be left out."""
        self._own = vector
        self._changed.set()

    def others(self, now: float) -> Mapping[str, Load]:
        """Pending tokens and requests in flight of all other writers by replica; `now` on the monotonic clock.

        Work of several writers at one replica shares its rate, so each ages by its part of it.
        """
        if now - self._sums_seconds >= AGEING_STEP_SECONDS:
            self._sums = self._sum(now) if self._heard else {}
            self._sums_seconds = now
        return self._sums

    @property
    def writers(self) -> int:
        """Others heard within the last second or so."""
        return len(self._heard)

    def receive(self, payload: bytes, now: float) -> None:
        """One message of the channel; our own echo, an older number and damaged bytes change nothing."""
        if payload.startswith(self._head):
            return
        try:
            writer, vector = codec.decode_vector(payload)
        except StoreCorrupt:
            self.dropped_corrupt += 1
            return
        self.received += 1
        last = self._heard.get(writer)
        if last is not None and vector.number <= last.vector.number:
            self.dropped_stale += 1
            return
        if vector.goodbye:
            self._heard.pop(writer, None)
        else:
            self._heard[writer] = _Heard(vector, now)
        self._sums_seconds = float("-inf")

    def _sum(self, now: float) -> dict[str, Load]:
        """One pass: per replica the pending, the pending weighted by its age, and the requests in flight."""
        sums: dict[str, tuple[float, float, int]] = {}
        silent = [writer for writer, heard in self._heard.items() if now - heard.seconds > SILENCE_SECONDS]
        for writer in silent:
            del self._heard[writer]
        for heard in self._heard.values():
            age, vector = now - heard.seconds, heard.vector
            for name, pending, in_flight in zip(vector.names, vector.pending_tokens, vector.in_flight, strict=True):
                total, weighted, requests = sums.get(name, (0.0, 0.0, 0))
                sums[name] = (total + pending, weighted + pending * age, requests + in_flight)
        return {
            name: (max(0.0, total - self._rate_of(name) * weighted / total) if total > 0 else 0.0, requests)
            for name, (total, weighted, requests) in sums.items()
        }

    async def _send_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REPEAT_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                if not any(requests for _, requests in self._own.values()):
                    await self._changed.wait()
            self._changed.clear()
            await self._send()
            await asyncio.sleep(SEND_INTERVAL_SECONDS)

    async def _send(self, *, goodbye: bool = False) -> None:
        self._number += 1
        own = self._own
        vector = codec.Vector(
            self._number,
            tuple(own),
            tuple([pending for pending, _ in own.values()]),
            tuple([requests for _, requests in own.values()]),
            goodbye,
        )
        try:
            await self._store.execute("PUBLISH", keys.INFLIGHT_CHANNEL, codec.encode_vector(self._head, vector))
            self.sent += 1
        except CacheError as error:  # the next vector says it all again; the store has counted it
            log.debug("the in-flight vector was not sent: %s", error)

    async def _listen_forever(self) -> None:
        pause = RECONNECT_FIRST_SECONDS
        while True:
            await self._store.wait_available()
            try:
                subscription = await self._store.subscribe(keys.INFLIGHT_CHANNEL)
                try:
                    pause = RECONNECT_FIRST_SECONDS
                    await self._listen(subscription)
                finally:
                    await subscription.close()
            except CacheError as error:
                log.debug("the in-flight channel is lost: %s", error)
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(RECONNECT_LAST_SECONDS, pause * 2)

    async def _listen(self, subscription: Subscription) -> None:
        while True:
            payload = await subscription.next(LISTEN_SECONDS)
            if payload is not None:
                self.receive(payload, self._clock.monotonic())

"""The connection to Redis: bounded in time and in number of operations, behind two circuit breakers.

Every operation ends within its limit, with a result or with a `CacheError`. There are two kinds of outage:

- Redis is away (no connection, no reply, LOADING, NOAUTH, BUSY, or other words in reply to everything): all
  operations fail at once, until a probe succeeds.
- Redis refuses writes (out of memory, READONLY, MISCONF, NOREPLICAS): writes fail at once, until a probe can write
  again; reads and publishing continue.

Each change is logged once. Keys, encodings and scripts belong to the callers.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from traceback import clear_frames
from typing import Any, Final, TypeVar

from cache import keys
from cache.errors import CacheError, ErrorKind, StoreRefused, StoreTimeout, StoreUnavailable, WritesRefused
from cache.ports import Clock, Tasks
from cache.store import url as store_url
from cache.store.breaker import Breaker, BreakerState
from cache.store.redis_clients import CONNECT_LIMIT_SECONDS, CONNECTIONS, Clients, make_clients
from cache.store.redis_errors import map_error
from cache.store.replies import StreamEntry, entries_of_range, entries_of_read, parsed
from cache.store.time_limit import time_limit
from cache.store.url import StoreUrl, Topology

log = logging.getLogger("cairn.store")

T = TypeVar("T")

LIMIT_SECONDS = 0.05  # of one operation, including its wait for a connection and its retry
PROBE_LIMIT_SECONDS = CONNECT_LIMIT_SECONDS
PROBE_KEY_MILLISECONDS = 1000
DOUBT_PAUSE_SECONDS = 1.0  # between two questions whether Redis serves anything
STREAM_GRACE_SECONDS = 1.0  # beyond the time for which Redis is asked to block
WAITING = 64  # operations that may wait for a connection; further ones fail at once

_AWAY = frozenset(
    {ErrorKind.TIMEOUT, ErrorKind.CONNECTION, ErrorKind.LOADING, ErrorKind.AUTH, ErrorKind.BUSY}
)  # no command is served; any other error is a reply to this command
_MESSAGES = frozenset({"PUBLISH", "SUBSCRIBE"})  # also served while loading, and by any node of a failed Cluster
_WRITES = frozenset({"SET", "DEL", "UNLINK", "EXPIRE", "PEXPIRE", "XADD", "HSET", "HDEL", "SADD", "ZADD", "INCR"})

_PERMITTED: Final = """
redis.call('TIME')
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
redis.call('PUBLISH', ARGV[2], '- c -')
return 1
"""
"""Does what the scripts do: they need a command of each kind, keys and a channel. The message names no context."""

Command = Sequence[str | bytes | int | float]
Observer = Callable[[str, float, ErrorKind | None], None]  # operation, seconds, error


def observe_nothing(operation: str, seconds: float, error: ErrorKind | None) -> None:
    """Ignore an operation: the default observer."""


class StoreState(enum.StrEnum):
    """State of the connection, for /readyz and a metric."""

    STARTING = "starting"
    AVAILABLE = "available"
    REFUSING_WRITES = "refusing writes"
    AWAY = "away"
    OFF = "off"  # no Redis is configured


class Script:
    """A Lua script. It is sent in full once and called by its digest afterwards.

    `writes` is False for a script that should run even while Redis refuses writes.
    """

    __slots__ = ("digest", "name", "source", "writes")

    def __init__(self, name: str, source: str, *, writes: bool = True) -> None:
        self.name = name
        self.source = source
        self.writes = writes
        self.digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Subscription:
    """One pub/sub channel on its own connection. Not for concurrent readers."""

    def __init__(self, pubsub: Any, fail: Callable[[BaseException, str], CacheError]) -> None:
        self._pubsub = pubsub
        self._fail = fail
        self._pinged = False

    async def next(self, wait_seconds: float) -> bytes | None:
        """Return the next message, or None after `wait_seconds` without one; then a ping is sent.

        Raises StoreUnavailable if the connection is lost or the ping was not answered.
        """
        try:
            message = await self._pubsub.get_message(timeout=wait_seconds)
            if message is None:
                if self._pinged:
                    raise TimeoutError
                self._pinged = True
                await self._pubsub.ping()
                return None
        except Exception as error:
            mapped = self._fail(error, "subscribe")
            if isinstance(mapped, WritesRefused):  # MISCONF is also the reply to a ping: the connection works
                self._pinged = False
                return None
            raise mapped from error
        self._pinged = False
        return message["data"] if message["type"] == "message" else None

    async def close(self) -> None:
        """Return the connection."""
        try:
            await self._pubsub.aclose()
        except Exception as error:  # noqa: BLE001 - the connection may be broken already
            log.debug("closing a subscription: %s", type(error).__name__)


class Store:
    """Redis behind its breakers. `open_store` makes one, `start` begins to connect, `close` ends it."""

    def __init__(
        self,
        url: StoreUrl | None,
        *,
        clock: Clock,
        tasks: Tasks,
        limit_seconds: float = LIMIT_SECONDS,
        observe: Observer = observe_nothing,
    ) -> None:
        self._url = url
        self._clock = clock
        self._tasks = tasks
        self._limit_seconds = limit_seconds
        self.observe = observe
        self.errors: dict[ErrorKind, int] = dict.fromkeys(ErrorKind, 0)  # failed operations since the start
        self.skipped = 0  # operations that were not sent because of an open breaker
        self.openings = 0  # number of times that the connection's breaker opened
        self._clients: Clients | None = None
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._waiting = 0
        self._connection = _Outage(Breaker(BreakerState.OPEN))
        self._writing = _Outage(Breaker(BreakerState.CLOSED))
        self._probed = asyncio.Event()
        self._probes: list[asyncio.Task[Any]] = []
        self._doubted = asyncio.Event()  # a reply may be about the command, or about all commands

    # --- state

    @property
    def state(self) -> StoreState:
        """State of the connection."""
        if self._url is None:
            return StoreState.OFF
        if not self._connection.breaker.closed:
            return StoreState.AWAY if self._probed.is_set() else StoreState.STARTING
        return StoreState.AVAILABLE if self._writing.breaker.closed else StoreState.REFUSING_WRITES

    @property
    def reason(self) -> ErrorKind | None:
        """The error that caused the present outage; None if there is none."""
        if not self._connection.breaker.closed:
            return self._connection.kind
        return None if self._writing.breaker.closed else self._writing.kind

    @property
    def breaker_state(self) -> BreakerState:
        """State of the connection's breaker or, if that is closed, of the writes' breaker."""
        connection = self._connection.breaker
        return self._writing.breaker.state if connection.closed else connection.state

    async def start(self, wait_seconds: float = PROBE_LIMIT_SECONDS) -> StoreState:
        """Begin to connect. Return once it is known whether Redis answers, at the latest after `wait_seconds`."""
        if self._url is None:
            return self.state
        self._clients = make_clients(self._url)
        self._connection.began.set()
        self._probes = [
            self._tasks.keep(self._probe_connection, "store-probe"),
            self._tasks.keep(self._probe_writing, "store-probe-writes"),
            self._tasks.keep(self._probe_in_doubt, "store-probe-in-doubt"),
        ]
        try:
            async with time_limit(wait_seconds):
                await self._probed.wait()
        except TimeoutError:
            self._probed.set()
        return self.state

    async def wait_available(self) -> None:
        """Return once Redis answers; never if none is configured."""
        await self._connection.ended.wait()

    async def wait_writable(self) -> None:
        """Return once Redis answers and accepts writes; never if none is configured."""
        while not (self._connection.ended.is_set() and self._writing.ended.is_set()):
            await self._connection.ended.wait()
            await self._writing.ended.wait()

    async def close(self) -> None:
        """End the probes and close every connection."""
        for probe in self._probes:
            probe.cancel()
        if self._probes:
            await asyncio.wait(self._probes)
        for client in self._clients.all() if self._clients else ():
            try:
                async with asyncio.timeout(PROBE_LIMIT_SECONDS):
                    await client.aclose()
            except Exception as error:  # noqa: BLE001 - the connection may be broken already
                log.debug("closing the store: %s", type(error).__name__)

    # --- operations

    async def execute(self, *command: str | bytes | int | float, limit_seconds: float | None = None) -> Any:
        """Run one command and return Redis's reply unchanged (bytes, int, list, None). Raises CacheError."""
        name = str(command[0])
        return await self._pooled(
            name, lambda: self._client.execute_command(*command), limit_seconds, writes=name in _WRITES
        )

    async def execute_many(self, commands: Sequence[Command], limit_seconds: float | None = None) -> list[Any]:
        """Run several commands in one round trip, without a transaction. Raises CacheError.

        On a Cluster all keys must be in one slot. Scripts cannot be run this way.
        """
        writes = any(command[0] in _WRITES for command in commands)
        return await self._pooled("PIPELINE", lambda: self._pipeline(commands), limit_seconds, writes=writes)

    async def run_script(
        self, script: Script, script_keys: Sequence[str], args: Command = (), limit_seconds: float | None = None
    ) -> Any:
        """Call a script by its digest; send it in full if Redis does not know it. Raises CacheError."""
        rest = (len(script_keys), *script_keys, *args)
        try:
            return await self._run("EVALSHA", script.digest, script, rest, limit_seconds)
        except StoreRefused as error:
            if error.kind is not ErrorKind.NOSCRIPT:
                raise
        return await self._run("EVAL", script.source, script, rest, limit_seconds)

    async def _run(self, how: str, which: str, script: Script, rest: Command, limit_seconds: float | None) -> Any:
        return await self._pooled(
            how, lambda: self._client.execute_command(how, which, *rest), limit_seconds, writes=script.writes
        )

    async def read_stream(self, stream: str, after_id: bytes, block_seconds: float, count: int) -> list[StreamEntry]:
        """Return up to `count` entries after `after_id`, waiting up to `block_seconds` for the first.

        Uses its own connection. Raises CacheError.
        """
        command = ["XREAD", "COUNT", count, "BLOCK", max(1, round(block_seconds * 1000)), "STREAMS", stream, after_id]
        # With a named node, redis-py's Cluster client need not send COMMAND GETKEYS twice for each read.
        options = {"target_nodes": self._client.get_node_from_key(stream)} if self._is_cluster else {}
        reply = await self._guarded(
            "XREAD", lambda: self._reader.execute_command(*command, **options), block_seconds + STREAM_GRACE_SECONDS
        )
        return parsed(entries_of_read, reply)

    async def read_range(
        self, stream: str, after_id: bytes, count: int, limit_seconds: float | None = None
    ) -> list[StreamEntry]:
        """Return up to `count` entries after `after_id`, without waiting. Raises CacheError."""
        reply = await self.execute(
            "XRANGE", stream, b"(" + after_id, "+", "COUNT", count, limit_seconds=limit_seconds
        )
        return parsed(entries_of_range, reply)

    async def subscribe(self, channel: str) -> Subscription:
        """Subscribe to `channel`. Raises CacheError."""

        async def begin() -> Subscription:
            pubsub = self._reader.pubsub()
            await pubsub.subscribe(channel)
            return Subscription(pubsub, self._failed)

        return await self._guarded("SUBSCRIBE", begin, PROBE_LIMIT_SECONDS)

    # --- one operation

    @property
    def _client(self) -> Any:
        if self._clients is None:
            raise StoreUnavailable("the store is not started")
        return self._clients.pooled

    @property
    def _reader(self) -> Any:
        if self._clients is None:
            raise StoreUnavailable("the store is not started")
        return self._clients.reader

    @property
    def _is_cluster(self) -> bool:
        return self._url is not None and self._url.topology is Topology.CLUSTER

    async def _pipeline(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._client.pipeline() if self._is_cluster else self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)  # it would hide the error's first word
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def _pooled(
        self, operation: str, call: Callable[[], Awaitable[T]], limit_seconds: float | None, *, writes: bool
    ) -> T:
        if writes and self._connection.breaker.closed and not self._writing.breaker.closed:
            self.skipped += 1
            refused = self._writing.error or WritesRefused("")
            raise type(refused)("Redis refuses writes", refused.kind)
        return await self._guarded(
            operation, lambda: self._with_slot(call), limit_seconds or self._limit_seconds, writes=writes
        )

    async def _with_slot(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._slots.locked() and self._waiting >= WAITING:
            raise StoreTimeout("too many operations wait for a connection")
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            return await call()
        finally:
            self._slots.release()

    async def _guarded(
        self, operation: str, call: Callable[[], Awaitable[T]], limit_seconds: float, *, writes: bool = False
    ) -> T:
        if not self._connection.breaker.closed:
            self.skipped += 1
            raise StoreUnavailable("Redis is away", self._connection.kind)
        started = self._clock.monotonic()
        kind: ErrorKind | None = None
        mapped: CacheError | None = None
        try:
            async with time_limit(limit_seconds):
                result = await call()
            if operation not in _MESSAGES:
                self._connection.breaker.succeeded()
            if writes:
                self._writing.breaker.succeeded()
            return result
        except Exception as error:
            mapped = self._failed(error, operation)
            kind = mapped.kind
            raise mapped from error
        finally:
            self.observe(operation, self._clock.monotonic() - started, kind)
            mapped = None  # its cause names this frame, which would stay with both until a full collection

    def _failed(self, error: BaseException, operation: str) -> CacheError:
        """Map an exception, and report it to the breakers."""
        mapped = map_error(error, operation)
        clear_frames(error.__traceback__)  # redis-py's frames name the error, which names them
        self.errors[mapped.kind] += 1
        now_seconds = self._clock.monotonic()
        if mapped.kind in _AWAY:
            if self._connection.breaker.failed(now_seconds, is_refusal=mapped.kind is ErrorKind.AUTH):
                self.openings += 1
                self._connection_lost(mapped)
            return mapped
        if mapped.kind is ErrorKind.OTHER:
            self._doubted.set()
        else:
            self._connection.breaker.succeeded()
        if isinstance(mapped, WritesRefused):
            self._reconnect_if_read_only(mapped)
            if self._writing.breaker.failed(now_seconds, is_refusal=True):
                self._writing.begin(mapped, now_seconds)
                log.warning("Redis refuses writes (%s): they wait, reads continue", mapped.kind)
        return mapped

    def _reconnect_if_read_only(self, mapped: CacheError) -> None:
        """Drop pooled connections to a replica: they stay with the old server, though the name has a new master."""
        if mapped.kind is ErrorKind.READONLY and self._url is not None and self._url.topology is Topology.SINGLE:
            pool = self._client.connection_pool
            self._tasks.start(pool.disconnect(inuse_connections=False), "store-reconnect")

    # --- outages and probes

    def _connection_lost(self, error: CacheError) -> None:
        self._connection.begin(error, self._clock.monotonic())
        log.warning("Redis is away (%s): continuing without it", error.kind)

    async def _probe_connection(self) -> None:
        outage = self._connection
        while True:
            await outage.began.wait()
            if self._probed.is_set():
                await asyncio.sleep(outage.breaker.pause_seconds(random.random()))
            outage.breaker.probing()
            try:
                async with time_limit(PROBE_LIMIT_SECONDS):
                    # Not PING: on a Cluster this asks the node that holds the journal.
                    reply = await self._client.execute_command("EXISTS", keys.LEASE)
                    if not isinstance(reply, int):
                        raise StoreUnavailable("the server that answers is not Redis", ErrorKind.OTHER)
                    if outage.kind is ErrorKind.AUTH:
                        await self._check_permissions()
            except Exception as error:  # noqa: BLE001 - without Redis the cache goes on alone
                self._probe_of_connection_failed(map_error(error, "probe"))
            else:
                outage.breaker.probe_succeeded()
                if (seconds := outage.end(self._clock.monotonic())) is not None:
                    log.warning("Redis is back after %.1f s", seconds)
            self._probed.set()

    async def _probe_in_doubt(self) -> None:
        """After a refusal whose meaning is not known, ask something that no Redis refuses.

        What stands between Cairn and Redis, and versions to come, have words of their own for "not now".
        """
        outage = self._connection
        while True:
            await self._doubted.wait()
            self._doubted.clear()
            if outage.breaker.closed:
                try:
                    async with time_limit(PROBE_LIMIT_SECONDS):
                        await self._client.execute_command("EXISTS", keys.LEASE)
                except Exception as error:  # noqa: BLE001 - without Redis the cache goes on alone
                    if outage.breaker.closed:
                        outage.breaker.open()
                        self.openings += 1
                        self._connection_lost(map_error(error, "probe"))
            await asyncio.sleep(DOUBT_PAUSE_SECONDS)

    async def _check_permissions(self) -> None:
        """Raise the error of a user of Redis that may run only some of the commands that Cairn needs.

        Otherwise each successful probe would end an outage that the next command begins again.
        """
        try:
            await self._client.execute_command(
                "EVAL", _PERMITTED, 1, keys.PROBE, PROBE_KEY_MILLISECONDS, keys.CONTEXTS_CHANNEL
            )
        except Exception as error:
            if map_error(error, "probe").kind in _AWAY:
                raise

    def _probe_of_connection_failed(self, error: CacheError) -> None:
        self.errors[error.kind] += 1
        self._connection.breaker.probe_failed()
        if self._connection.since_seconds is None:
            self._connection_lost(error)
        self._connection.error = error

    async def _probe_writing(self) -> None:
        outage = self._writing
        while True:
            await outage.began.wait()
            await asyncio.sleep(outage.breaker.pause_seconds(random.random()))
            await self.wait_available()
            outage.breaker.probing()
            try:
                async with time_limit(PROBE_LIMIT_SECONDS):
                    await self._client.execute_command("SET", keys.PROBE, 1, "PX", PROBE_KEY_MILLISECONDS)
            except Exception as error:  # noqa: BLE001 - reads go on
                mapped = map_error(error, "probe")
                self.errors[mapped.kind] += 1
                outage.breaker.probe_failed()
                if isinstance(mapped, WritesRefused):
                    outage.error = mapped
                    self._reconnect_if_read_only(mapped)
            else:
                outage.breaker.probe_succeeded()
                if (seconds := outage.end(self._clock.monotonic())) is not None:
                    log.warning("Redis accepts writes again after %.1f s", seconds)


class _Outage:
    """One breaker with the present outage: its error, its beginning, and events for its beginning and end."""

    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        self.error: CacheError | None = None
        self.since_seconds: float | None = None
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        if breaker.closed:
            self.ended.set()

    @property
    def kind(self) -> ErrorKind | None:
        return None if self.error is None else self.error.kind

    def begin(self, error: CacheError, now_seconds: float) -> None:
        self.error = error
        self.since_seconds = now_seconds
        self.ended.clear()
        self.began.set()

    def end(self, now_seconds: float) -> float | None:
        """Return how long the outage lasted in seconds; None if there was none, as at the start."""
        self.began.clear()
        self.ended.set()
        since, self.since_seconds, self.error = self.since_seconds, None, None
        return None if since is None else now_seconds - since


def open_store(
    url: str | None,
    *,
    clock: Clock,
    tasks: Tasks,
    limit_seconds: float = LIMIT_SECONDS,
    observe: Observer = observe_nothing,
) -> Store:
    """Return the store behind `url`, not connected yet; without a URL, a store that is always off.

    Raises StoreUrlError.
    """
    parsed = None if url is None else store_url.parse(url)
    return Store(parsed, clock=clock, tasks=tasks, limit_seconds=limit_seconds, observe=observe)

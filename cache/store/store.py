"""The connection to Redis: bounded in time and in number, with a breaker. The only importer of redis.

Every operation ends within its limit, in a result or in a `CacheError`; while Redis is away it ends at once. What is
said in the log is one line when that changes. It knows nothing of what is stored: keys, codecs and scripts belong to
its callers.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import redis.asyncio as redis
from redis import exceptions as foreign
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialBackoff

from cache import keys
from cache.errors import (
    CacheError,
    ErrorKind,
    StoreFull,
    StoreReadOnly,
    StoreRefused,
    StoreTimeout,
    StoreUnavailable,
)
from cache.ports import Clock, Tasks
from cache.store import url as store_url
from cache.store.breaker import Breaker, BreakerState
from cache.store.url import StoreUrl, Topology

log = logging.getLogger("cairn.store")

T = TypeVar("T")

LIMIT_SECONDS = 0.05  # of one operation, its wait for a connection and its one retry included
PROBE_LIMIT_SECONDS = 1.0  # connecting may mean TLS, asking Sentinels, or learning a Cluster's slots
STREAM_GRACE_SECONDS = 1.0  # beyond the time that Redis was asked to block
CONNECTIONS = 16  # of one worker; more than it has operations at a time in ordinary load
WAITING = 64  # operations that may wait for one of them; beyond, they fail at once
OWN_CONNECTIONS = 4  # beside the pool: the stream's reader, the subscription, and one spare for each
RETRIES = 1  # a pooled connection may have died unseen; a second failure is the breaker's business
RETRY_BASE_SECONDS, RETRY_CAP_SECONDS = 0.002, 0.01  # so that the retry falls within the limit

# What says that Redis itself is away. A refusal (out of memory, wrong type) is an answer.
_AWAY = frozenset({ErrorKind.TIMEOUT, ErrorKind.CONNECTION, ErrorKind.LOADING, ErrorKind.AUTH})


Observer = Callable[[str, float, ErrorKind | None], None]  # operation, seconds, what went wrong


def observe_nothing(operation: str, seconds: float, error: ErrorKind | None) -> None:
    """The observer of a store that nobody watches."""


class StoreState(enum.StrEnum):
    """How the store stands; for /readyz and a metric."""

    STARTING = "starting"
    AVAILABLE = "available"
    AWAY = "away"
    OFF = "off"  # no Redis is configured


class Script:
    """A Lua script: sent once, afterwards called by its digest."""

    __slots__ = ("digest", "name", "source")

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class StreamEntry(msgspec.Struct, frozen=True, gc=False):
    """One entry of a stream: its id as Redis wrote it, and its first field's value."""

    id: bytes
    payload: bytes


class Subscription:
    """One pub/sub channel on a connection of its own. Not for two readers at a time."""

    def __init__(self, pubsub: Any, fail: Callable[[BaseException, str], CacheError]) -> None:
        self._pubsub = pubsub
        self._fail = fail
        self._pinged = False

    async def next(self, wait_seconds: float) -> bytes | None:
        """The next message, or None after `wait_seconds` of silence, which asks Redis whether it still lives.

        Raises StoreUnavailable where the connection is gone or that question found no answer.
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
            raise self._fail(error, "subscribe") from error
        self._pinged = False
        return message["data"] if message["type"] == "message" else None

    async def close(self) -> None:
        """Give the connection back."""
        try:
            await self._pubsub.aclose()
        except Exception as error:  # noqa: BLE001 - closing what may be broken already
            log.debug("closing a subscription: %s", type(error).__name__)


class Store:
    """Redis behind a breaker. Made by `open_store`; `start` begins to connect, `close` ends it."""

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
        self.skipped = 0  # operations not tried because Redis is away
        self.openings = 0  # how often the breaker opened
        self._breaker = Breaker()
        self._client: Any = None
        self._reader: Any = None  # a client of its own: a blocked read must not hold a connection of the pool
        self._sentinel: Any = None
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._waiting = 0
        self._available = asyncio.Event()
        self._opened = asyncio.Event()
        self._probed = asyncio.Event()
        self._away_since_seconds: float | None = None
        self._probe: asyncio.Task[Any] | None = None

    # --- state

    @property
    def state(self) -> StoreState:
        """How the store stands."""
        if self._url is None:
            return StoreState.OFF
        if self._breaker.closed:
            return StoreState.AVAILABLE
        return StoreState.AWAY if self._probed.is_set() else StoreState.STARTING

    @property
    def breaker_state(self) -> BreakerState:
        """For a metric."""
        return self._breaker.state

    async def start(self, wait_seconds: float = PROBE_LIMIT_SECONDS) -> StoreState:
        """Begin to connect; come back as soon as it is known whether Redis answers, after `wait_seconds` anyway."""
        if self._url is None:
            return self.state
        self._client, self._reader, self._sentinel = _clients(self._url)
        self._opened.set()
        self._probe = self._tasks.start(self._probe_forever(), "store-probe")
        try:
            async with asyncio.timeout(wait_seconds):
                await self._probed.wait()
        except TimeoutError:
            self._probed.set()
        return self.state

    async def wait_available(self) -> None:
        """Come back once Redis answers: for ever where none is configured."""
        await self._available.wait()

    async def close(self) -> None:
        """End the probe and every connection."""
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.wait([self._probe])
        for client in {self._client, self._reader, self._sentinel}:
            if client is None:
                continue
            try:
                async with asyncio.timeout(PROBE_LIMIT_SECONDS):
                    await client.aclose()
            except Exception as error:  # noqa: BLE001 - closing what may be broken already
                log.debug("closing the store: %s", type(error).__name__)

    # --- operations

    async def execute(self, *command: str | bytes | int | float, limit_seconds: float | None = None) -> Any:
        """One command; its reply as Redis gave it (bytes, int, list, None). Raises a leaf of CacheError."""
        return await self._pooled(str(command[0]), lambda: self._client.execute_command(*command), limit_seconds)

    async def execute_many(
        self, commands: Sequence[Sequence[str | bytes | int | float]], limit_seconds: float | None = None
    ) -> list[Any]:
        """Several commands in one round trip, not as a transaction; on Cluster all in one slot, and no script."""
        return await self._pooled("PIPELINE", lambda: self._pipeline(commands), limit_seconds)

    async def run_script(
        self,
        script: Script,
        script_keys: Sequence[str],
        args: Sequence[str | bytes | int | float] = (),
        limit_seconds: float | None = None,
    ) -> Any:
        """Call a script by its digest, and send it whole where Redis does not know it (any more)."""
        rest = (len(script_keys), *script_keys, *args)
        try:
            return await self.execute("EVALSHA", script.digest, *rest, limit_seconds=limit_seconds)
        except StoreRefused as error:
            if error.kind is not ErrorKind.NOSCRIPT:
                raise
        return await self.execute("EVAL", script.source, *rest, limit_seconds=limit_seconds)

    async def read_stream(self, stream: str, after_id: bytes, block_seconds: float, count: int) -> list[StreamEntry]:
        """What came after `after_id`, waiting up to `block_seconds` for the first; on a connection of its own."""
        command = ["XREAD", "COUNT", count, "BLOCK", max(1, round(block_seconds * 1000)), "STREAMS", stream, after_id]
        # A named node spares a Cluster client two COMMAND GETKEYS for each read.
        options = {"target_nodes": self._node_of(stream)} if self._is_cluster else {}
        reply = await self._guarded(
            "XREAD", lambda: self._reader.execute_command(*command, **options), block_seconds + STREAM_GRACE_SECONDS
        )
        return _entries(reply)

    async def read_range(
        self, stream: str, after_id: bytes, count: int, limit_seconds: float | None = None
    ) -> list[StreamEntry]:
        """What stands after `after_id`, without waiting."""
        reply = await self.execute(
            "XRANGE", stream, b"(" + after_id, "+", "COUNT", count, limit_seconds=limit_seconds
        )
        return _pairs(reply)

    async def subscribe(self, channel: str) -> Subscription:
        """Listen on `channel`. Raises StoreUnavailable."""

        async def begin() -> Subscription:
            pubsub = self._reader.pubsub()
            await pubsub.subscribe(channel)
            return Subscription(pubsub, self._failed)

        return await self._guarded("SUBSCRIBE", begin, PROBE_LIMIT_SECONDS)

    # --- within

    @property
    def _is_cluster(self) -> bool:
        return self._url is not None and self._url.topology is Topology.CLUSTER

    def _node_of(self, key: str) -> Any:
        return self._client.get_node_from_key(key)

    async def _pipeline(self, commands: Sequence[Sequence[str | bytes | int | float]]) -> list[Any]:
        pipeline = self._client.pipeline() if self._is_cluster else self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute()
        return replies

    async def _pooled(self, operation: str, call: Callable[[], Awaitable[T]], limit_seconds: float | None) -> T:
        return await self._guarded(operation, lambda: self._with_slot(call), limit_seconds or self._limit_seconds)

    async def _with_slot(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._slots.locked() and self._waiting >= WAITING:
            raise foreign.MaxConnectionsError
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        try:
            return await call()
        finally:
            self._slots.release()

    async def _guarded(self, operation: str, call: Callable[[], Awaitable[T]], limit_seconds: float) -> T:
        if not self._breaker.closed:
            self.skipped += 1
            raise StoreUnavailable("Redis is away")
        started = self._clock.monotonic()
        kind: ErrorKind | None = None
        try:
            async with asyncio.timeout(limit_seconds):
                result = await call()
            self._breaker.succeeded()
            return result
        except Exception as error:
            mapped = self._failed(error, operation)
            kind = mapped.kind
            raise mapped from error
        finally:
            self.observe(operation, self._clock.monotonic() - started, kind)

    def _failed(self, error: BaseException, operation: str) -> CacheError:
        mapped = map_error(error, operation)
        self.errors[mapped.kind] += 1
        if mapped.kind is ErrorKind.READONLY and self._url is not None and self._url.topology is Topology.SINGLE:
            # The name may point to the new master by now; a pooled connection would stay with the old one.
            self._tasks.start(self._client.connection_pool.disconnect(inuse_connections=False), "store-reconnect")
        if mapped.kind not in _AWAY:
            self._breaker.succeeded()
        elif self._breaker.failed(self._clock.monotonic()):
            self.openings += 1
            self._went_away(mapped.kind)
        return mapped

    def _went_away(self, kind: ErrorKind) -> None:
        self._available.clear()
        self._opened.set()
        self._away_since_seconds = self._clock.monotonic()
        log.warning("Redis is away (%s): going on without it", kind)

    def _came_back(self) -> None:
        self._opened.clear()
        self._available.set()
        if self._away_since_seconds is not None:
            log.warning("Redis is back after %.1f s", self._clock.monotonic() - self._away_since_seconds)
        self._away_since_seconds = None

    async def _probe_forever(self) -> None:
        while True:
            await self._opened.wait()
            await asyncio.sleep(self._breaker.pause_seconds * random.uniform(0.8, 1.2))
            self._breaker.probing()
            try:
                async with asyncio.timeout(PROBE_LIMIT_SECONDS):
                    # Not PING: on a Cluster this asks the node that holds the journal.
                    await self._client.execute_command("EXISTS", keys.LEASE)
            except Exception as error:  # noqa: BLE001 - the cache fails open
                self._probe_failed(map_error(error, "probe").kind)
            else:
                self._breaker.probe_succeeded()
                self._came_back()
            self._probed.set()

    def _probe_failed(self, kind: ErrorKind) -> None:
        self.errors[kind] += 1
        self._breaker.probe_failed()
        if self._away_since_seconds is None:
            self._went_away(kind)


def open_store(
    url: str | None,
    *,
    clock: Clock,
    tasks: Tasks,
    limit_seconds: float = LIMIT_SECONDS,
    observe: Observer = observe_nothing,
) -> Store:
    """The store behind `url`, not yet connected; without one a store that is always off. Raises StoreUrlError."""
    parsed = None if url is None else store_url.parse(url)
    return Store(parsed, clock=clock, tasks=tasks, limit_seconds=limit_seconds, observe=observe)


# --- foreign exceptions, mapped here and nowhere else

_MAPPING: Mapping[type[BaseException], tuple[ErrorKind, type[CacheError]]] = {
    foreign.OutOfMemoryError: (ErrorKind.OOM, StoreFull),
    foreign.ReadOnlyError: (ErrorKind.READONLY, StoreReadOnly),
    foreign.BusyLoadingError: (ErrorKind.LOADING, StoreUnavailable),
    foreign.NoScriptError: (ErrorKind.NOSCRIPT, StoreRefused),
    foreign.AuthenticationError: (ErrorKind.AUTH, StoreUnavailable),
    foreign.AuthorizationError: (ErrorKind.AUTH, StoreUnavailable),
    foreign.AuthenticationWrongNumberOfArgsError: (ErrorKind.AUTH, StoreUnavailable),
    foreign.NoPermissionError: (ErrorKind.AUTH, StoreUnavailable),
    foreign.MaxConnectionsError: (ErrorKind.TIMEOUT, StoreTimeout),
    foreign.TimeoutError: (ErrorKind.TIMEOUT, StoreTimeout),
    TimeoutError: (ErrorKind.TIMEOUT, StoreTimeout),
    foreign.ClusterDownError: (ErrorKind.CONNECTION, StoreUnavailable),
    foreign.AskError: (ErrorKind.CONNECTION, StoreUnavailable),  # and MOVED: the slots are moving
    foreign.TryAgainError: (ErrorKind.CONNECTION, StoreUnavailable),
}
# Redis's own first word, where redis-py has no class for it or wraps it in a script's error.
_WORDS: Mapping[str, tuple[ErrorKind, type[CacheError]]] = {
    "WRONGTYPE": (ErrorKind.WRONGTYPE, StoreRefused),
    "OOM": (ErrorKind.OOM, StoreFull),
    "READONLY": (ErrorKind.READONLY, StoreReadOnly),
    "LOADING": (ErrorKind.LOADING, StoreUnavailable),
    "MASTERDOWN": (ErrorKind.CONNECTION, StoreUnavailable),
    "UNBLOCKED": (ErrorKind.CONNECTION, StoreUnavailable),
    "NOAUTH": (ErrorKind.AUTH, StoreUnavailable),
    "WRONGPASS": (ErrorKind.AUTH, StoreUnavailable),
}


def map_error(error: BaseException, operation: str) -> CacheError:
    """The one place where a foreign exception gets its name here. The text of the answer is not repeated: a script's
    error could hold a key."""
    if isinstance(error, CacheError):
        return error
    for kind_of_error in type(error).__mro__:
        if (found := _MAPPING.get(kind_of_error)) is not None:
            return found[1](f"{operation}: {found[0]}", found[0])
    if isinstance(error, foreign.ResponseError):
        words = str(error).split()
        kind, leaf = _WORDS.get(words[0] if words else "", (ErrorKind.OTHER, StoreRefused))
        return leaf(f"{operation}: {kind}", kind)
    # redis-py's ConnectionError and RedisClusterException, OSError, and RuntimeError of a transport closed under us.
    return StoreUnavailable(f"{operation}: {ErrorKind.CONNECTION}", ErrorKind.CONNECTION)


# --- redis-py's clients, one pair for each topology


def _clients(url: StoreUrl) -> tuple[Any, Any, Any]:
    """The pooled client, the one for blocking reads, and what else is to be closed."""
    options = dict(parse_url(url.node_url))
    # Limits are ours (one for the whole operation), so that a blocking read can have its own.
    options |= {
        "protocol": 2,
        "driver_info": None,
        "socket_timeout": None,
        "socket_connect_timeout": PROBE_LIMIT_SECONDS,
        "retry": _retry(),
    }
    if url.topology is Topology.CLUSTER:
        client = _cluster(url, options)
        return client, client, None  # a blocked read takes a connection of its own from its node's many
    if url.topology is Topology.SENTINEL:
        return _sentinel(url, options)
    return _single(options, CONNECTIONS), _single(options, OWN_CONNECTIONS), None


def _retry() -> Retry:
    return Retry(ExponentialBackoff(cap=RETRY_CAP_SECONDS, base=RETRY_BASE_SECONDS), RETRIES)


def _single(options: dict[str, Any], connections: int) -> Any:
    return redis.Redis.from_pool(redis.ConnectionPool(max_connections=connections, **options))


def _cluster(url: StoreUrl, options: dict[str, Any]) -> Any:
    unfit = ("connection_class", "host", "port", "db")
    kept = {key: value for key, value in options.items() if key not in unfit}
    return redis.RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in url.nodes],
        ssl=url.node_url.startswith("rediss:"),
        max_connections=CONNECTIONS + OWN_CONNECTIONS,
        require_full_coverage=False,
        **kept,
    )


def _sentinel(url: StoreUrl, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    unfit = ("connection_class", "host", "port")
    kept = {key: value for key, value in options.items() if key not in unfit}
    tls = {"ssl": True} if url.node_url.startswith("rediss:") else {}
    certificates = {key: value for key, value in kept.items() if key.startswith("ssl_")}
    asking = {
        "socket_timeout": PROBE_LIMIT_SECONDS / 2,
        "socket_connect_timeout": PROBE_LIMIT_SECONDS / 2,
        "protocol": 2,
        "driver_info": None,
    }
    sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
        url.nodes, sentinel_kwargs=asking | tls | certificates | url.sentinel_options
    )
    pooled = sentinel.master_for(url.master, max_connections=CONNECTIONS, **kept, **tls)
    own = sentinel.master_for(url.master, max_connections=OWN_CONNECTIONS, **kept, **tls)
    return pooled, own, sentinel


def hash_pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """A whole hash as redis-py gives it: a dictionary, or a flat list out of a pipeline."""
    return list(reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True))


def _entries(reply: Any) -> list[StreamEntry]:
    if not reply:
        return []
    return _pairs(reply[0][1] if isinstance(reply, list) else next(iter(reply.values())))


def _pairs(pairs: Any) -> list[StreamEntry]:
    entries = []
    for entry_id, fields in pairs or ():
        values = list(fields.values()) if isinstance(fields, dict) else fields[1::2]
        entries.append(StreamEntry(entry_id, values[0] if values else b""))
    return entries

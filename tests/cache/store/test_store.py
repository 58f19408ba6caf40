"""The store before a real Valkey: what it does when Redis refuses, hangs, is full or gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest

from cache.errors import (
    CacheError,
    ErrorKind,
    StoreFull,
    StoreReadOnly,
    StoreRefused,
    StoreTimeout,
    StoreUnavailable,
    StoreUrlError,
)
from cache.store import redis_clients
from cache.store import store as store_module
from cache.store.redis_clients import check_url, make_clients
from cache.store.store import Script, Store, StoreState, open_store
from cache.store.url import Topology, parse
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.clock import FakeClock
from tests.support.garbage import held_by_itself
from tests.support.garbage import uncollected as uncollected
from tests.support.valkey import (
    PATIENT_SECONDS,
    Valkey,
    cluster_of_three,
    eventually,
    free_port,
    running,
    watched_by_sentinel,
)

DOUBLE = Script("double", "return {KEYS[1], ARGV[1] * 2}")
BOUND_SECONDS = 0.25  # the limit is 50 ms; the rest is a busy machine


class opened:  # noqa: N801 - reads as a verb after `async with`
    """A started store; unless it `is_away`, one that Redis answers."""

    def __init__(self, url: str | None, tasks: Tasks, *, is_away: bool = False, **options: object) -> None:
        self._is_away = is_away
        options = {"clock": SystemClock(), "limit_seconds": PATIENT_SECONDS} | options
        self.store = open_store(url, tasks=tasks, **options)  # type: ignore[arg-type]

    async def __aenter__(self) -> Store:
        await self.store.start()
        if not self._is_away:
            await self.store.wait_available()
        return self.store

    async def __aexit__(self, *_: object) -> None:
        await self.store.close()


@pytest.fixture
async def quick_store(valkey: Valkey, tasks: Tasks) -> AsyncIterator[Store]:
    """A store on the emptied server, with the limit that Cairn's own has."""
    store = open_store(valkey.url, clock=SystemClock(), tasks=tasks)
    await store.start()
    await store.wait_available()
    yield store
    await store.close()


async def seconds_of(store: Store, *command: str) -> float:
    """How long one operation takes, whether it is answered or not."""
    started = time.monotonic()  # noqa: TID251
    with contextlib.suppress(CacheError):
        await store.execute(*command)
    return time.monotonic() - started  # noqa: TID251


async def slowest_of(store: Store, operations: int, *command: str) -> tuple[float, float]:
    """How long the slowest of some operations takes, and for how long in all the event loop was late meanwhile.

    A busy machine stops this process for tens of milliseconds, several times within one operation.
    """
    done = asyncio.Event()

    async def slowest() -> float:
        try:
            return max(await asyncio.gather(*(seconds_of(store, *command) for _ in range(operations))))
        finally:
            done.set()

    async def lateness() -> float:
        late, before = 0.0, time.monotonic()  # noqa: TID251
        while not done.is_set():
            await asyncio.sleep(0.001)
            now = time.monotonic()  # noqa: TID251
            late, before = late + max(0.0, now - before - 0.002), now
        return late

    return await asyncio.gather(slowest(), lateness())


async def until_open(store: Store) -> None:
    async def away() -> bool:
        await seconds_of(store, "GET", "k")
        return store.state is StoreState.AWAY

    await eventually(away)


async def test_a_command_is_answered_and_observed(valkey: Valkey, tasks: Tasks) -> None:
    """Replies come as Redis gives them, and each operation is reported once with its duration."""
    seen: list[tuple[str, ErrorKind | None]] = []
    async with opened(valkey.url, tasks, observe=lambda op, _seconds, kind: seen.append((op, kind))) as store:
        assert store.state is StoreState.AVAILABLE
        await store.execute("SET", "k", b"\x00v")
        assert await store.execute("GET", "k") == b"\x00v"
        assert await store.execute_many([("GET", "k"), ("GET", "none")]) == [b"\x00v", None]
        with pytest.raises(StoreRefused):
            await store.execute("LPUSH", "k", "x")
    assert seen == [("SET", None), ("GET", None), ("PIPELINE", None), ("LPUSH", ErrorKind.WRONGTYPE)]


async def test_a_unix_socket_serves_as_well(valkey: Valkey, tasks: Tasks) -> None:
    """unix:// reaches the same server."""
    async with opened(valkey.unix_url, tasks) as store:
        assert await store.execute("PING") in (b"PONG", True)


async def test_a_script_is_sent_once_and_again_after_a_flush(store: Store, valkey: Valkey) -> None:
    """NOSCRIPT costs one more round trip and a count, never a failure."""
    valkey.ask("SCRIPT", "FLUSH")  # another test may have sent it
    assert await store.run_script(DOUBLE, ["a"], [21]) == [b"a", 42]
    assert store.errors[ErrorKind.NOSCRIPT] == 1
    assert await store.run_script(DOUBLE, ["a"], [21]) == [b"a", 42]
    assert store.errors[ErrorKind.NOSCRIPT] == 1
    valkey.ask("SCRIPT", "FLUSH")
    assert await store.run_script(DOUBLE, ["a"], [4]) == [b"a", 8]
    assert store.errors[ErrorKind.NOSCRIPT] == 2


@pytest.mark.usefixtures("uncollected")
async def test_an_operation_that_failed_is_freed_at_once(store: Store) -> None:
    """The error that is raised, its cause and the frame that mapped them do not keep each other."""
    with pytest.raises(StoreRefused):
        await store.execute("HGET", "too few arguments")
    assert held_by_itself() == set()


async def test_refused_at_start_is_known_at_once_and_heals(tasks: Tasks) -> None:
    """With nobody listening the start comes back in a moment; once somebody does, the store heals by itself."""
    valkey = Valkey()
    try:
        started = time.monotonic()  # noqa: TID251
        async with opened(valkey.url, tasks, is_away=True) as store:
            assert time.monotonic() - started < 5  # noqa: TID251
            assert store.state is StoreState.AWAY
            with pytest.raises(StoreUnavailable):
                await store.execute("GET", "k")
            assert store.skipped == 1
            await asyncio.to_thread(valkey.start)
            await asyncio.wait_for(store.wait_available(), 30)
            assert await store.execute("GET", "k") is None
    finally:
        valkey.end()


async def test_a_hung_redis_bounds_every_operation_then_opens_the_breaker_then_heals(
    quick_store: Store, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    """SIGSTOP: each operation ends within its limit, soon at once; SIGCONT: everything works, no reply mixed up."""
    store = quick_store
    await eventually(lambda: is_answered(store, "SET", "k", "right"))
    caplog.clear()
    valkey.hang()
    try:
        for operations in (1, 200):
            slowest, late = await slowest_of(store, operations, "GET", "wrong")
            assert slowest < BOUND_SECONDS * 2 + late
        await until_open(store)
        skipped = store.skipped
        with pytest.raises(StoreUnavailable):
            await store.execute("GET", "wrong")
        assert store.skipped == skipped + 1, "it was not sent"
        assert store.errors[ErrorKind.TIMEOUT] >= 5
    finally:
        valkey.go_on()
    await asyncio.wait_for(store.wait_available(), 30)
    said = [record.message for record in caplog.records if record.name == "cairn.store"]
    assert len(said) == 2, said
    assert "away (timeout)" in said[0]
    assert "back" in said[1]
    await eventually(lambda: is_answered(store, "GET", "k"))
    replies = await asyncio.gather(*(store.execute("GET", "k") for _ in range(50)), return_exceptions=True)
    assert {reply for reply in replies if not isinstance(reply, StoreTimeout | StoreUnavailable)} <= {b"right"}


async def is_answered(store: Store, *command: str) -> bool:
    """True unless the machine is so busy that a reply takes longer than the limit."""
    try:
        await store.execute(*command)
    except (StoreTimeout, StoreUnavailable):
        return False
    return True


async def test_one_slow_blip_opens_nothing(valkey: Valkey, tasks: Tasks, caplog: pytest.LogCaptureFixture) -> None:
    """Twenty operations that one pause fails together are one failure to the breaker, and no line in the log."""
    at_one_time = FakeClock()
    async with opened(valkey.url, tasks, clock=at_one_time) as store:
        valkey.hang()
        try:
            blip = [store.execute("GET", "k", limit_seconds=store_module.LIMIT_SECONDS) for _ in range(20)]
            failed = await asyncio.gather(*blip, return_exceptions=True)
        finally:
            valkey.go_on()
        assert [type(error) for error in failed] == [StoreTimeout] * 20
        assert await store.execute("GET", "k") is None
        assert store.openings == 0
    assert not [record for record in caplog.records if record.name == "cairn.store"]


async def answers(store: Store) -> bool:
    try:
        await store.execute("GET", "k")
    except CacheError:
        return False
    return True


async def test_a_killed_redis_is_away_and_comes_back_at_the_same_address(tasks: Tasks) -> None:
    """SIGKILL and a new start: connections are made anew without help."""
    with running() as valkey:
        async with opened(valkey.url, tasks) as store:
            await store.execute("SET", "k", "v")
            valkey.kill()
            await until_open(store)
            assert store.errors[ErrorKind.CONNECTION] > 0
            await asyncio.to_thread(valkey.start)
            await asyncio.wait_for(store.wait_available(), 30)
            assert await store.execute("GET", "k") is None


async def test_an_exhausted_pool_is_a_timeout_and_no_queue_grows(store: Store, tasks: Tasks) -> None:
    """Beyond the connections and a bounded number of waiting operations the next fails at once."""
    crowd = redis_clients.CONNECTIONS + store_module.WAITING
    blocked = [tasks.start(store.execute("BLPOP", "none", 1, limit_seconds=0.4), "blocked") for _ in range(crowd)]
    await asyncio.sleep(0)
    with pytest.raises(StoreTimeout):
        store.execute("GET", "k").send(None)  # runs it to its first wait, which it must not reach
    await asyncio.gather(*blocked, return_exceptions=True)
    await eventually(lambda: answers(store))


async def test_out_of_memory_fails_writes_and_leaves_reads(valkey: Valkey, tasks: Tasks) -> None:
    """noeviction: a write is StoreFull, scripts included, reads continue, and a moment of it opens no breaker."""
    a_moment = FakeClock()
    async with opened(valkey.url, tasks, clock=a_moment) as store:
        await store.execute("SET", "k", "v")
        valkey.ask("CONFIG", "SET", "maxmemory", "1")
        try:
            for _ in range(10):
                with pytest.raises(StoreFull):
                    await store.execute("SET", "other", "x")
            with pytest.raises(StoreFull):
                await store.run_script(Script("write", "return redis.call('SET', KEYS[1], 'x')"), ["other"])
            assert await store.execute("GET", "k") == b"v"
        finally:
            valkey.ask("CONFIG", "SET", "maxmemory", "0")
        assert store.errors[ErrorKind.OOM] == 11
        assert store.state is StoreState.AVAILABLE


async def test_a_replica_refuses_writes_and_is_counted(tasks: Tasks) -> None:
    """READONLY after a failover is its own kind, and the breaker stays closed: reads still work."""
    with running("--replicaof", "127.0.0.1", str(free_port())) as replica:
        async with opened(replica.url, tasks) as store:
            with pytest.raises(StoreReadOnly):
                await store.execute("SET", "k", "v")
            assert store.errors[ErrorKind.READONLY] == 1
            assert store.state is StoreState.AVAILABLE


async def test_a_wrong_password_is_counted_as_auth(tasks: Tasks) -> None:
    """The store is away with that reason, and says no password."""
    with running("--requirepass", "secret") as valkey_process:
        url = f"redis://:wrong@127.0.0.1:{valkey_process.port}/0"
        async with opened(url, tasks, is_away=True) as store:
            await eventually(lambda: store.errors[ErrorKind.AUTH] >= 1)
            assert (store.state, store.reason) == (StoreState.AWAY, ErrorKind.AUTH)


async def test_without_a_url_the_store_is_off(tasks: Tasks) -> None:
    """Every operation says so at once."""
    async with opened(None, tasks, is_away=True) as store:
        assert store.state is StoreState.OFF
        with pytest.raises(StoreUnavailable):
            await store.execute("GET", "k")


async def test_a_blocking_read_holds_no_connection_of_the_pool(store: Store, tasks: Tasks) -> None:
    """An XREAD that waits returns what is added, and nothing after its time."""
    reading = tasks.start(store.read_stream("s", b"0-0", 2.0, 10), "reading")
    added = await store.execute("XADD", "s", "*", "d", b"payload")
    (entry,) = await reading
    assert (entry.id, entry.payload) == (added, b"payload")
    assert await store.read_stream("s", entry.id, 0.01, 10) == []
    assert [entry.payload for entry in await store.read_range("s", b"0-0", 10)] == [b"payload"]


async def test_a_subscription_hears_and_notices_a_hung_redis(store: Store, valkey: Valkey) -> None:
    """A message arrives; silence is asked about, and a Redis that does not answer ends the subscription."""
    subscription = await store.subscribe("channel")
    try:
        await eventually(lambda: heard(subscription, store))
        valkey.hang()
        with pytest.raises(StoreUnavailable):  # noqa: PT012 - one of a few reads
            for _ in range(10):
                await subscription.next(0.05)
    finally:
        valkey.go_on()
        await subscription.close()


async def heard(subscription: store_module.Subscription, store: Store) -> bool:
    await store.execute("PUBLISH", "channel", b"news")
    return await subscription.next(0.05) == b"news"


async def test_a_cluster_of_three_serves_commands_scripts_streams_and_channels(tasks: Tasks) -> None:
    """redis+cluster:// finds each key's node; tenant keys of one tag go through one script."""
    with cluster_of_three() as nodes:
        url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        async with opened(url, tasks) as store:
            assert store.state is StoreState.AVAILABLE
            for number in range(20):
                await store.execute("SET", f"k{number}", number)
                assert await store.execute("GET", f"k{number}") == str(number).encode()
            assert await store.run_script(DOUBLE, ["{t}:a", "{t}:b"], [4]) == [b"{t}:a", 8]
            await store.execute_many([("SET", "{t}:a", 1), ("SET", "{t}:b", 2)])
            added = await store.execute("XADD", "s", "*", "d", b"x")
            assert [entry.id for entry in await store.read_stream("s", b"0-0", 0.1, 10)] == [added]
            subscription = await store.subscribe("channel")
            await eventually(lambda: heard(subscription, store))
            await subscription.close()


async def test_a_sentinel_names_the_master_and_its_successor(tasks: Tasks) -> None:
    """After the master's SIGKILL writes go to the promoted replica, without help."""
    with watched_by_sentinel() as watched:
        async with opened(watched.url, tasks) as store:
            assert store.state is StoreState.AVAILABLE
            await store.execute("SET", "k", "v")
            watched.master.kill()

            async def writes() -> bool:
                try:
                    await store.execute("SET", "k", "w")
                except CacheError:
                    return False
                return True

            await eventually(writes, 20)


@pytest.mark.parametrize(
    ("url", "topology", "nodes"),
    [
        ("redis://h", Topology.SINGLE, (("h", 6379),)),
        ("rediss://u:p@h:1/2", Topology.SINGLE, (("h", 1),)),
        ("unix:///tmp/s", Topology.SINGLE, ()),
        ("redis+sentinel://a,b:2,[::1]:3/main/1", Topology.SENTINEL, (("a", 26379), ("b", 2), ("::1", 3))),
        ("rediss+cluster://u:p@a:1,b:2?ssl_ca_certs=/ca", Topology.CLUSTER, (("a", 1), ("b", 2))),
    ],
)
def test_urls_are_read(url: str, topology: Topology, nodes: tuple[tuple[str, int], ...]) -> None:
    """Each form gives its topology and nodes, and is shown without its password."""
    read = parse(url)
    assert (read.topology, read.nodes) == (topology, nodes)
    assert "p@" not in read.shown


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "redis://",
        "redis://h/x",
        "redis+sentinel://h",
        "redis+cluster://h/1",
        "redis+cluster://h,:7000",
        "unix://",
        "redis://h:x",
        "h",
    ],
)
def test_bad_urls_say_what_is_wrong(url: str) -> None:
    """A URL that cannot be used is an error of its own at the start."""
    with pytest.raises(StoreUrlError, match="URL of Redis"):
        parse(url)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://h/1?foo=bar", "an unknown option, foo; known are client_name, db"),
        ("redis+sentinel://h/m?foo=1", "an unknown option, foo"),
        ("redis+sentinel://h/m?sentinel_foo=1", "an unknown option, foo"),
        ("redis+cluster://h?decode_responses=1", "an unknown option, decode_responses"),
        ("redis://h?retry_on_error=x", "an unknown option, retry_on_error"),
        ("redis://h?health_check_interval=x", "cannot be read: Invalid value for 'health_check_interval'"),
        ("unix:///s?db=q", "cannot be read: Invalid value for 'db'"),
        ("rediss://h?ssl_cert_reqs=maybe", "must be none, optional or required"),
        ("rediss://h?ssl_ca_certs=/no/such.pem", "ssl_ca_certs in the URL of Redis names a file that cannot be read"),
        ("redis://[::1", "cannot be read"),
        ("redis://<host>", "neither a name nor an address"),
        ("redis+cluster://one,${TWO}:7000", "neither a name nor an address"),
        ("redis://h1,h2:6379", "names several hosts"),
        ("redis://:a,b@h1:6379,h2:6379/0", "names several hosts"),
    ],
)
def test_a_url_of_which_no_client_can_be_made_is_refused(url: str, says: str) -> None:
    """Otherwise each worker would fail as it starts, or at its first command."""
    with pytest.raises(StoreUrlError, match=says):
        check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:p%40ss@h:1/3?client_name=x&health_check_interval=30",
        "unix:///run/redis.sock?db=2",
        "rediss://h?ssl_cert_reqs=none",
        "redis://h?max_connections=5&socket_timeout=3&protocol=3",
        "redis+sentinel://:p@h,h2:1/m/2?sentinel_password=x",
        "rediss+cluster://h,[::1]:7000?ssl_cert_reqs=required",
    ],
)
def test_clients_can_be_made_of_every_url_that_is_accepted(url: str) -> None:
    """Options that Cairn sets itself are ignored."""
    check_url(url)
    make_clients(parse(url))

"""Edges of the store on fakes: a subscription that is refused, a client that cannot close, a store never started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from redis import exceptions as foreign

from cache import keys
from cache.errors import CacheError, ErrorKind, StoreUnavailable
from cache.store.breaker import FAILURES_TO_OPEN
from cache.store.pubsub import listen
from cache.store.redis_clients import Clients
from cache.store.redis_errors import map_error
from cache.store.replies import entries_of_range, entries_of_read, hash_pairs
from cache.store.store import Store, StoreState, Subscription, open_store
from cache.store.url import parse
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.clock import FakeClock


class PubSub:
    """Gives each of `messages` in turn: a message, None for silence, or an exception."""

    def __init__(self, *messages: Any) -> None:
        self.messages = list(messages)
        self.pings = 0

    async def get_message(self, timeout: float) -> Any:
        del timeout
        message = self.messages.pop(0)
        if isinstance(message, Exception):
            raise message
        return message

    async def ping(self) -> None:
        self.pings += 1

    async def aclose(self) -> None:
        raise ConnectionResetError


def subscription(*messages: Any) -> tuple[Subscription, PubSub]:
    pubsub = PubSub(*messages)
    return Subscription(pubsub, map_error), pubsub


def message(data: bytes, kind: str = "message") -> dict[str, Any]:
    return {"type": kind, "data": data}


async def test_silence_is_answered_by_a_ping_and_two_silences_are_a_loss() -> None:
    """Any message in between shows that the connection lives."""
    listening, pubsub = subscription(None, message(b"", "pong"), None, message(b"x"), None, None)
    assert await listening.next(0.1) is None
    assert await listening.next(0.1) is None
    assert await listening.next(0.1) is None
    assert await listening.next(0.1) == b"x"
    assert await listening.next(0.1) is None
    assert pubsub.pings == 3
    with pytest.raises(StoreUnavailable):
        await listening.next(0.1)
    await listening.close()


async def test_a_ping_refused_for_a_full_disk_shows_that_redis_lives() -> None:
    """MISCONF is the reply to it, too; any other error ends the subscription."""
    listening, _ = subscription(None, foreign.ResponseError("MISCONF"), None, foreign.ResponseError("NOAUTH"))
    for _ in range(3):
        assert await listening.next(0.1) is None
    with pytest.raises(StoreUnavailable):
        await listening.next(0.1)


async def test_listening_begins_again_after_each_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it was lost at once or later."""
    monkeypatch.setattr("cache.store.pubsub.RECONNECT_FIRST_SECONDS", 0.001)
    said, received = list[str](), list[bytes]()
    pubsubs: list[Subscription | CacheError] = [
        StoreUnavailable("away"),
        subscription(message(b"a"), foreign.ConnectionError())[0],
        subscription(message(b"b"), foreign.ConnectionError())[0],
    ]
    ended = asyncio.Event()

    class Subscribing:
        async def wait_available(self) -> None:
            if not pubsubs:
                ended.set()
                await asyncio.Event().wait()

        async def subscribe(self, channel: str) -> Subscription:
            del channel
            found = pubsubs.pop(0)
            if isinstance(found, CacheError):
                raise found
            return found

    store: Any = Subscribing()
    work = listen(store, "c", received.append, begun=lambda: said.append("+"), ended=lambda: said.append("-"))
    task = asyncio.ensure_future(work)  # noqa: TID251
    await asyncio.wait_for(ended.wait(), 30)
    task.cancel()
    assert (said, received) == (["+", "-"] * 2, [b"a", b"b"])


class Client:
    """A client whose commands are `act`, and that cannot be closed."""

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act
        self.closed = False

    async def execute_command(self, *command: Any) -> Any:
        return self._act(*command)

    async def aclose(self) -> None:
        self.closed = True
        raise ConnectionResetError


async def test_a_store_that_cannot_close_its_connections_closes() -> None:
    """Each is tried."""
    store = open_store("redis://127.0.0.1:1", clock=SystemClock(), tasks=Tasks())
    pooled, reader = Client(lambda *_: None), Client(lambda *_: None)
    store._clients = Clients(pooled, reader)  # noqa: SLF001 - internal state that no public name shows
    await store.close()
    assert pooled.closed
    assert reader.closed


@pytest.fixture
def unstarted() -> Store:
    return open_store("redis://127.0.0.1:1", clock=SystemClock(), tasks=Tasks())


async def test_an_operation_before_the_start_is_unavailable(unstarted: Store) -> None:
    """As while Redis is away."""
    assert unstarted.state is StoreState.STARTING
    assert unstarted.reason is None
    for work in (unstarted.execute("GET", "k"), unstarted.read_stream("s", b"0", 0.1, 1), unstarted.subscribe("c")):
        with pytest.raises(StoreUnavailable):
            await work
    with pytest.raises(StoreUnavailable):
        _ = unstarted._reader  # noqa: SLF001 - internal state that no public name shows


async def test_a_start_that_is_not_answered_in_time_goes_on_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first probe is still under way."""
    release = asyncio.Event()

    async def hang(*_: Any) -> None:
        await release.wait()

    hanging = Client(lambda *_: None)
    monkeypatch.setattr(hanging, "execute_command", hang)
    monkeypatch.setattr("cache.store.store.make_clients", lambda url: Clients(hanging, hanging))
    tasks = Tasks()
    store = open_store("redis://127.0.0.1:1", clock=SystemClock(), tasks=tasks)
    assert await store.start(wait_seconds=0.01) is StoreState.AWAY
    await store.close()
    await tasks.close()


async def test_a_probe_of_writes_that_fails_otherwise_keeps_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a write that succeeds ends the outage."""
    monkeypatch.setattr("cache.store.breaker.PAUSE_FIRST_SECONDS", 0.001)
    answers = [foreign.ResponseError("OOM"), foreign.ConnectionError(), foreign.ReadOnlyError(), "OK"]

    class Pool:
        def __init__(self) -> None:
            self.disconnects = 0

        async def disconnect(self, *, inuse_connections: bool) -> None:
            del inuse_connections
            self.disconnects += 1

    def act(*command: Any) -> Any:
        if command[1] != keys.PROBE:
            return 0
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    client: Any = Client(act)
    client.connection_pool = Pool()
    monkeypatch.setattr("cache.store.store.make_clients", lambda url: Clients(client, client))
    tasks = Tasks()
    store = open_store("redis://127.0.0.1:1", clock=SystemClock(), tasks=tasks)
    await store.start()
    refused = map_error(foreign.ResponseError("OOM"), "SET")
    store._writing.breaker.state = store._writing.breaker.state.OPEN  # noqa: SLF001 - internal state that no public name shows
    store._writing.begin(refused, 0.0)  # noqa: SLF001 - internal state that no public name shows
    await asyncio.wait_for(store.wait_writable(), 30)
    assert answers == []
    assert store.state is StoreState.AVAILABLE
    assert client.connection_pool.disconnects == 1
    await store.close()
    await tasks.close()


def test_replies_of_every_shape_are_read_alike() -> None:
    """From a dictionary or a list, of one command or a pipeline."""
    pairs = [(b"1-0", {b"d": b"x"}), (b"2-0", [b"d", b"y"]), (b"3-0", None)]
    for reply in ([[b"s", pairs]], {b"s": pairs}):
        assert [(each.id, each.payload) for each in entries_of_read(reply)] == [
            (b"1-0", b"x"),
            (b"2-0", b"y"),
            (b"3-0", b""),
        ]
    assert entries_of_read(None) == entries_of_range(None) == []
    assert hash_pairs({b"a": b"b"}) == hash_pairs([b"a", b"b"]) == [(b"a", b"b")]


@pytest.mark.parametrize("topology", ["redis+cluster://127.0.0.1:1", "redis://127.0.0.1:1"])
async def test_messages_that_are_taken_do_not_hide_an_outage(topology: str) -> None:
    """They pass while a Cluster's node with the journal is gone, and while a server loads its file."""

    class TakesOnlyMessages:
        async def execute_command(self, name: str, *args: object) -> int:
            if name == "PUBLISH":
                return 0
            raise foreign.BusyLoadingError if "cluster" not in topology else ConnectionError

    clock = FakeClock()
    store = Store(parse(topology), clock=clock, tasks=Tasks())
    store._clients = Clients(TakesOnlyMessages(), TakesOnlyMessages())  # noqa: SLF001 - instead of servers under load
    store._connection.breaker.probe_succeeded()  # noqa: SLF001
    store._probed.set()  # noqa: SLF001
    for _ in range(FAILURES_TO_OPEN):
        if store.state is StoreState.AVAILABLE:
            await store.execute("PUBLISH", "c", "x")
        with pytest.raises(StoreUnavailable):
            await store.execute("EXISTS", "k")
        clock.advance(0.1)
    assert store.state is StoreState.AWAY


@pytest.mark.parametrize("reply", [None, b"OK", [], {}, 1.0], ids=repr)
async def test_a_server_that_is_no_redis_is_away(reply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe is answered by a number."""
    other = Client(lambda *_: reply)
    monkeypatch.setattr("cache.store.store.make_clients", lambda url: Clients(other, other))
    tasks = Tasks()
    store = open_store("redis://127.0.0.1:1", clock=SystemClock(), tasks=tasks)
    assert await store.start() is StoreState.AWAY
    assert store.reason is ErrorKind.OTHER
    await store.close()
    await tasks.close()

"""Refusals of a real Valkey that are not about the command: seen as an outage, waited for, and over when it is."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path

import pytest

from cache.errors import CacheError, ErrorKind, StoreRefused, StoreUnavailable, WritesRefused
from cache.replication.journal import JournalState
from cache.store.breaker import BreakerState
from cache.store.store import Script, Store, StoreState, open_store
from cache.totals import Sums, Totals, read_totals
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.relay import Relay
from tests.support.valkey import PATIENT_SECONDS, Valkey, eventually, free_port, running
from tests.support.workers import Worker, prompt

DAY = "2026-11-23"


@asynccontextmanager
async def opened(url: str, limit_seconds: float = PATIENT_SECONDS) -> AsyncIterator[Store]:
    tasks = Tasks()
    store = open_store(url, clock=SystemClock(), tasks=tasks, limit_seconds=limit_seconds)
    await store.start()
    await store.wait_available()
    try:
        yield store
    finally:
        await store.close()
        await tasks.close()


async def until(store: Store, state: StoreState) -> None:
    """Write now and then until the store has noticed."""

    async def noticed() -> bool:
        with contextlib.suppress(CacheError):
            await store.execute("SET", "other", "x")
        return store.state is state

    await eventually(noticed)


async def flushed(totals: Totals, store: Store) -> list[Sums]:
    """Write what is pending as soon as Redis takes it, and return what Redis has then."""
    await eventually(totals.flush)
    return list((await read_totals(store, date.fromisoformat(DAY), date.fromisoformat(DAY))).values())


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    with running() as valkey:
        yield valkey


def fill(valkey: Valkey) -> None:
    assert valkey.ask("CONFIG", "SET", "maxmemory", "1") == b"+OK\r\n"


def empty(valkey: Valkey) -> None:
    assert valkey.ask("CONFIG", "SET", "maxmemory", "0") == b"+OK\r\n"


def want_a_replica(valkey: Valkey) -> None:
    assert valkey.ask("CONFIG", "SET", "min-replicas-to-write", "1") == b"+OK\r\n"


def want_no_replica(valkey: Valkey) -> None:
    assert valkey.ask("CONFIG", "SET", "min-replicas-to-write", "0") == b"+OK\r\n"


def become_a_replica(valkey: Valkey) -> None:
    assert valkey.ask("REPLICAOF", "127.0.0.1", str(free_port())) == b"+OK\r\n"


def become_a_master(valkey: Valkey) -> None:
    assert valkey.ask("REPLICAOF", "NO", "ONE") == b"+OK\r\n"


def fail_to_save(valkey: Valkey) -> None:
    """As with a full disk: its folder is gone, so that its next background save fails."""
    folder = valkey.ask("CONFIG", "GET", "dir").split(b"\r\n")[4].decode()
    shutil.rmtree(folder)
    valkey.ask("CONFIG", "SET", "save", "3600 1")
    valkey.ask("BGSAVE")


def save_nothing(valkey: Valkey) -> None:
    assert valkey.ask("CONFIG", "SET", "stop-writes-on-bgsave-error", "no") == b"+OK\r\n"


@asynccontextmanager
async def refusing(words: bytes) -> AsyncIterator[int]:
    """Serve on a port that takes connections and replies `words` to every command; at the end all are closed."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                for _ in range(int((await reader.readuntil(b"\r\n"))[1:])):
                    await reader.readexactly(int((await reader.readuntil(b"\r\n"))[1:]) + 2)
                writer.write(words + b"\r\n")

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        for writer in writers:
            writer.transport.abort()


REFUSING_WRITES = [
    pytest.param(fill, empty, ErrorKind.OOM, id="full"),
    pytest.param(want_a_replica, want_no_replica, ErrorKind.NOREPLICAS, id="no replicas"),
    pytest.param(become_a_replica, become_a_master, ErrorKind.READONLY, id="read only"),
    pytest.param(fail_to_save, save_nothing, ErrorKind.MISCONF, id="disk full"),
]
Change = Callable[[Valkey], None]


@pytest.fixture
def spare_folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="cairn-t-")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(("begin", "end", "kind"), REFUSING_WRITES)
async def test_refused_writes_wait_while_reads_go_on_and_everything_heals(
    begin: Change, end: Change, kind: ErrorKind, spare_folder: str
) -> None:
    """The state and its reason show, writes fail at once, reads and messages pass; totals lose nothing."""
    with running("--dir", str(Path(spare_folder))) as valkey:
        async with opened(valkey.url) as store:
            await store.execute("SET", "k", "v")
            totals = Totals(store, "w")
            begin(valkey)
            await until(store, StoreState.REFUSING_WRITES)
            assert (store.reason, store.breaker_state) == (kind, BreakerState.OPEN)
            totals.row(DAY, "m", "u", "t").answers += 5
            assert not await totals.flush()
            asked = store.errors[kind]
            with pytest.raises(WritesRefused):
                await store.execute("SET", "other", "x")
            assert store.errors[kind] <= asked + 1  # at most a probe: the write itself was not sent
            assert await store.execute("GET", "k") == b"v"
            assert await store.execute("PUBLISH", "c", "x") == 0
            end(valkey)
            await asyncio.wait_for(store.wait_writable(), 30)
            assert (store.state, store.reason) == (StoreState.AVAILABLE, None)
            assert await flushed(totals, store) == [Sums(answers=5)]
            assert (totals.refused_batches, totals.lost_increments) == (0, 0)


async def test_a_full_redis_shows_though_writes_that_need_no_memory_succeed(valkey: Valkey) -> None:
    """It serves DEL and refuses SET."""
    async with opened(valkey.url) as store:
        fill(valkey)

        async def is_noticed() -> bool:
            with contextlib.suppress(WritesRefused):
                await store.execute("DEL", "nothing")
            with contextlib.suppress(WritesRefused):
                await store.execute("SET", "other", "x")
            return store.state is StoreState.REFUSING_WRITES

        await eventually(is_noticed)


async def test_an_error_of_one_of_several_commands_has_its_own_kind(valkey: Valkey) -> None:
    """redis-py puts other words before it, so that it looked like an error of the command itself."""
    async with opened(valkey.url) as store:
        await store.execute("SET", "k", "v")
        with pytest.raises(StoreRefused) as refused:
            await store.execute_many([("GET", "k"), ("HGETALL", "k"), ("GET", "k")])
        assert refused.value.kind is ErrorKind.WRONGTYPE
        want_a_replica(valkey)
        try:
            with pytest.raises(WritesRefused) as refusal:
                await store.execute_many([("GET", "k"), ("SET", "k", "w")])
        finally:
            want_no_replica(valkey)
        assert refusal.value.kind is ErrorKind.NOREPLICAS


@pytest.mark.parametrize(("begin", "end", "kind"), REFUSING_WRITES)
async def test_the_journal_goes_on_alone_while_writes_are_refused_and_tells_later(
    begin: Change, end: Change, kind: ErrorKind, spare_folder: str
) -> None:
    """Placements made meanwhile reach the other worker once Redis accepts writes again."""
    with running("--dir", str(Path(spare_folder))) as valkey:
        one, two = await Worker(valkey.url, "one").start(), await Worker(valkey.url, "two").start()
        try:
            begin(valkey)
            chains = [prompt(seed) for seed in range(5)]

            async def is_alone() -> bool:
                one.place(chains[0])
                return one.journal.state is JournalState.ALONE

            await eventually(is_alone)
            assert one.store.reason is kind
            for chain in chains:
                one.place(chain)
            end(valkey)
            await eventually(lambda: all(two.knows(chain) for chain in chains))
            await eventually(lambda: one.journal.state is JournalState.LIVE)
        finally:
            await one.close()
            await two.close()


async def test_a_password_set_on_the_running_server_is_an_outage_and_loses_no_totals(valkey: Valkey) -> None:
    """Commands fail with NOAUTH on new connections: away, with that reason, until the password is gone."""
    async with opened(valkey.url) as store:
        totals = Totals(store, "w")
        valkey.ask("CONFIG", "SET", "requirepass", "secret")
        _kill_clients(valkey, password="secret")
        await until(store, StoreState.AWAY)
        await eventually(lambda: store.reason is ErrorKind.AUTH)  # first the connections were lost
        totals.row(DAY, "m", "u", "t").answers += 5
        assert not await totals.flush()
        with pytest.raises(StoreUnavailable):
            await store.execute("GET", "k")
        _ask_with_password(valkey, "secret", b"CONFIG SET requirepass ''\r\n")
        await asyncio.wait_for(store.wait_available(), 30)
        assert await flushed(totals, store) == [Sums(answers=5)]


async def test_a_password_set_just_before_a_batch_of_totals_loses_none_of_it(valkey: Valkey) -> None:
    """The breaker is still closed, and Redis answers a long command without a password with a protocol error."""
    async with opened(valkey.url) as store:
        totals = Totals(store, "w")
        for figure in ("answers", "prompt_tokens", "output_tokens"):
            setattr(totals.row(DAY, "m", "u", "t"), figure, 5)
        valkey.ask("CONFIG", "SET", "requirepass", "secret")
        _kill_clients(valkey, password="secret")
        assert not await totals.flush()
        assert store.errors[ErrorKind.AUTH] > 0
        _ask_with_password(valkey, "secret", b"CONFIG SET requirepass ''\r\n")
        assert await flushed(totals, store) == [Sums(answers=5, prompt_tokens=5, output_tokens=5)]
        assert (totals.refused_batches, totals.lost_increments) == (0, 0)


def _ask_with_password(valkey: Valkey, password: str, command: bytes) -> None:
    with socket.create_connection(("127.0.0.1", valkey.port), timeout=PATIENT_SECONDS) as asking:
        asking.sendall(b"AUTH %b\r\n" % password.encode() + command)
        asking.recv(4096)


def _kill_clients(valkey: Valkey, password: str) -> None:
    _ask_with_password(valkey, password, b"CLIENT KILL TYPE normal SKIPME yes\r\n")


@pytest.mark.parametrize("denied", ["resetchannels", "-@scripting"])
async def test_a_user_who_may_not_do_everything_is_an_outage_until_it_may(valkey: Valkey, denied: str) -> None:
    """It shows, and does not begin and end again with each command."""
    valkey.ask("ACL", "SETUSER", "cairn", "reset", "on", ">pw", "~cairn:*", "&cairn:*", "+@all", denied)
    script = Script("try", "redis.call('TIME') redis.call('SET', 'cairn:x', 1) redis.call('PUBLISH', 'cairn:x', 'y')")
    async with opened(valkey.url.replace("//", "//cairn:pw@")) as store:

        async def is_away() -> bool:
            with contextlib.suppress(CacheError):
                await store.run_script(script, ["cairn:x"])
            with contextlib.suppress(StoreUnavailable):
                await store.execute("GET", "cairn:x")  # which this user may do
            return store.state is StoreState.AWAY

        await eventually(is_away)
        assert store.reason is ErrorKind.AUTH
        failed = store.errors[ErrorKind.AUTH]
        await eventually(lambda: store.errors[ErrorKind.AUTH] >= failed + 2)
        assert (store.state, store.openings) == (StoreState.AWAY, 1)
        valkey.ask("ACL", "SETUSER", "cairn", "&cairn:*", "+@all")
        await eventually(lambda: store.state is StoreState.AVAILABLE)
        assert await store.run_script(script, ["cairn:x"]) is None


@pytest.mark.parametrize("words", [b"-ERR upstream failure", b"-NOTREADY come again", b"-EXECABORT discarded"])
async def test_unknown_words_in_reply_to_every_command_are_an_outage(valkey: Valkey, words: bytes) -> None:
    """As from a proxy in front of Redis. Totals are kept and written to the server that answers afterwards."""
    async with Relay(valkey.port) as relay, opened(f"redis://127.0.0.1:{relay.port}") as store:
        await store.execute("SET", "k", "v")
        totals = Totals(store, "w")
        totals.row(DAY, "m", "u", "t").answers += 5

        async def is_away() -> bool:
            assert not await totals.flush()
            return store.state is StoreState.AWAY

        async with refusing(words) as refusing_port:
            relay.target_port = refusing_port
            valkey.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            await eventually(is_away)
            relay.target_port = valkey.port
        await asyncio.wait_for(store.wait_available(), 30)
        assert await flushed(totals, store) == [Sums(answers=5)]
        assert (totals.refused_batches, totals.lost_increments) == (0, 0)


async def test_a_reply_in_unknown_words_to_one_command_is_no_outage(valkey: Valkey) -> None:
    """Any other command is still served."""
    async with opened(valkey.url) as store:
        for _ in range(20):
            with pytest.raises(StoreRefused):
                await store.execute("NOSUCHCOMMAND")
        await store.execute("SET", "k", "v")
        assert (store.state, store.openings) == (StoreState.AVAILABLE, 0)


async def test_a_busy_server_is_away_and_comes_back(valkey: Valkey) -> None:
    """Another client's endless script: BUSY for every command, until it is killed; totals wait."""
    valkey.ask("CONFIG", "SET", "busy-reply-threshold", "10")
    async with opened(valkey.url) as store:
        totals = Totals(store, "w")
        blocking = asyncio.ensure_future(  # noqa: TID251
            asyncio.to_thread(valkey.ask, "EVAL", "while true do end", "0")
        )
        try:
            await until(store, StoreState.AWAY)
            assert store.reason in (ErrorKind.BUSY, ErrorKind.TIMEOUT)
            assert store.errors[ErrorKind.BUSY] > 0
            totals.row(DAY, "m", "u", "t").answers += 5
            assert not await totals.flush()
        finally:
            await asyncio.to_thread(valkey.ask, "SCRIPT", "KILL")
            await blocking
        await asyncio.wait_for(store.wait_available(), 30)
        await store.execute("SET", "k", "v")
        assert await flushed(totals, store) == [Sums(answers=5)]


SLOW_LOADING = ("--key-load-delay", "700", "--loading-process-events-interval-bytes", "1024")  # 2 s for 3,000 keys


async def test_a_server_that_loads_its_file_is_away_and_loses_no_totals() -> None:
    """Restarted, it answers LOADING to every command until it has read its file; totals wait."""
    with running("--enable-debug-command", "yes", "--appendonly", "yes") as valkey:
        async with opened(valkey.url) as store:
            totals = Totals(store, "w")
            valkey.ask("DEBUG", "POPULATE", "3000", "filler", "1000")
            valkey.ask("BGREWRITEAOF")

            def rewritten() -> bool:
                told = valkey.ask("INFO", "persistence")
                return b"aof_rewrite_in_progress:0" in told and b"aof_last_rewrite_time_sec:-1" not in told

            await eventually(rewritten)
            valkey.kill()
            starting = asyncio.ensure_future(asyncio.to_thread(valkey.start, *SLOW_LOADING))  # noqa: TID251
            await until(store, StoreState.AWAY)
            await eventually(lambda: store.reason is ErrorKind.LOADING)  # first nobody listened
            totals.row(DAY, "m", "u", "t").answers += 5
            assert not await totals.flush()
            await starting
            await asyncio.wait_for(store.wait_available(), 30)
            assert await flushed(totals, store) == [Sums(answers=5)]
            assert (totals.refused_batches, totals.lost_increments) == (0, 0)


async def test_connections_to_a_former_master_are_given_up(valkey: Valkey) -> None:
    """The address leads to a new master, but the pooled connections still lead to the old one, now read-only."""
    with running() as successor:
        async with Relay(valkey.port) as relay, opened(f"redis://127.0.0.1:{relay.port}/0") as store:
            await store.execute("SET", "k", "v")
            become_a_replica(valkey)
            relay.target_port = successor.port

            async def written() -> bool:
                with contextlib.suppress(CacheError):
                    await store.execute("SET", "k", "v")
                return successor.ask("EXISTS", "k") == b":1\r\n"

            await eventually(written)

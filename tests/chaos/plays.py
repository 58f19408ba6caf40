"""The scenarios: each is a few facts and a small play, which breaks something and mends it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import msgspec

from benchmarks.common import cpu
from proxy.fleet.health import FACTS_SECONDS
from proxy.fleet.silence import UNANSWERED_CHECKS
from proxy.supervisor import private_store
from proxy.supervisor.silence import SILENCE_LIMIT_SECONDS
from proxy.supervisor.worker_process import DEATHS_TO_REPORT
from tests.chaos import dialogue, scene, stack
from tests.chaos.load import Connection
from tests.chaos.scene import PASSWORD, Scene, Store
from tests.chaos.stack import Failed, until
from tests.support.valkey import free_port

Play = Callable[[Scene], Awaitable[None]]
OPEN_FILES = 256  # of each process, where descriptors are short
SMALL_DISK = "6m"
LOADED_KEYS, KEY_MICROSECONDS = "5000", "700"  # over three seconds
FOUND_FROZEN_SECONDS = FACTS_SECONDS + UNANSWERED_CHECKS * stack.CHECK_SECONDS + stack.SILENCE_SECONDS
DEATHS = DEATHS_TO_REPORT + 2  # of a worker that ends again and again
CONTEXTS, USES = 6, 5  # each use on a connection of its own, so at either worker


class Scenario(NamedTuple):
    """One fault under load.

    `shows` is a pattern that a reason of /readyz must match while the fault lasts. `refuses` allows errors of Cairn's
    own meanwhile. `restarts` is the number of workers that are replaced. With `starts_over` the supervisor is a new
    one, so that only the totals in Redis tell what was counted; without `keeps_totals` Redis loses them by itself.
    """

    name: str
    what: str
    play: Play
    store: Callable[[], AbstractContextManager[Store]] = scene.single
    proxies: int = 1
    shows: str = ""
    refuses: bool = False
    restarts: int = 0
    starts_over: bool = False
    keeps_totals: bool = True
    open_files: int = 0  # the limit of each process of Cairn, 0 for the machine's
    needs: str = ""  # "clock": a shifted clock; "disk": a small file system


# --- workers and the supervisor


async def kill_worker(on: Scene) -> None:
    on.signal_worker(signal.SIGKILL)
    on.mend()
    await on.hold()


async def end_worker_again_and_again(on: Scene) -> None:
    """The first worker ends while it serves, then twice as soon as it has started, and so on."""
    proxy = on.stack.proxy
    ended, others = proxy.worker_pids()[0], proxy.worker_pids()[1:]
    for deaths in range(1, DEATHS + 1):
        on.lose_workers([ended])
        os.kill(ended, signal.SIGKILL)
        if deaths == DEATHS:
            break
        following: list[int] = []
        await until(lambda: _started(on, [*others, ended], following), 30, "another worker has started")  # noqa: B023
        ended = following[0]
        if deaths % 3 == 0:
            await until(lambda: _serves(on, ended), 30, "it has clients")  # noqa: B023
    on.mend()
    await on.hold()


async def _started(on: Scene, known: list[int], found: list[int]) -> bool:
    found[:] = [pid for pid in on.stack.proxy.worker_pids() if pid not in known]
    return bool(found)


async def _serves(on: Scene, pid: int) -> bool:
    return bool(on.stack.proxy.client_ports([pid]))


async def freeze_worker(on: Scene) -> None:
    on.signal_worker(signal.SIGSTOP)
    on.mend()  # nobody wakes it: it must be found
    await on.hold(7.0)


async def kill_supervisor(on: Scene) -> None:
    proxy = on.stack.proxy
    on.lose_workers(proxy.worker_pids())
    workers = proxy.worker_pids()
    proxy.kill()
    proxy.start()
    await until(lambda: _gone(workers), 5, "the old workers have ended")
    on.lose_all_so_far()
    on.mend()
    await on.hold(2.0)


async def freeze_supervisor(on: Scene) -> None:
    """For longer than a worker may be silent."""
    on.stack.proxy.signal(signal.SIGSTOP)
    await on.hold(SILENCE_LIMIT_SECONDS + 2.0)
    on.stack.proxy.signal(signal.SIGCONT)
    on.mend()


async def _gone(pids: list[int]) -> bool:
    return stack.ended(pids)


async def end_with_open_streams(on: Scene) -> None:
    proxy = on.stack.proxy
    proxy.signal(signal.SIGTERM)
    code = await proxy.code()
    if code:
        raise Failed(f"SIGTERM ended it with {code}")
    proxy.start()
    on.mend()
    await on.hold()


async def reload_good_and_bad(on: Scene) -> None:
    proxy, tree = on.stack.proxy, on.stack.proxy.tree
    on.reload({**tree, "pools": [on.stack.pool(2)]})
    await on.hold()
    proxy.file.write_text("pools: 3")
    proxy.signal(signal.SIGHUP)
    await on.hold()
    page = await proxy.page()
    if page.get("cairn_config_reload_failures_total") != 1:
        raise Failed("the bad file was not counted as a failed reload")
    on.reload(tree)
    on.mend()
    await on.hold()


async def exhaust_descriptors(on: Scene) -> None:
    port = on.stack.proxy.port
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(OPEN_FILES)]
    await on.hold()
    for _, writer in idle:
        writer.close()
    on.mend()
    await on.hold()


async def step_clock(on: Scene) -> None:
    """Step from 23:30 across midnight, back, and across again, so that the report includes both days."""
    for seconds in (3600, -3600, 3600):
        on.step_clock(seconds)
        await on.hold()
    on.mend()
    await until(lambda: _has_totals_of(on, 2), 5, "there are totals of both days")


async def _has_totals_of(on: Scene, days: int) -> bool:
    return len((await on.stack.proxy.savings())["lines"]) == days


# --- Redis


async def freeze_private_valkey(on: Scene) -> None:
    family = cpu.tree(on.stack.proxy.pid)
    pid = next(process.pid for process in family if process.name.startswith("valkey-server"))
    os.kill(pid, signal.SIGSTOP)
    on.mend()  # nobody wakes it: it must be found
    await on.hold(private_store.SILENCE_LIMIT_SECONDS + 3.0)


async def kill_redis(on: Scene) -> None:
    on.store.server.kill()
    await on.hold()
    await asyncio.to_thread(on.store.server.start)
    on.mend()


async def freeze_redis(on: Scene) -> None:
    on.store.server.hang()
    await on.hold()
    on.store.server.go_on()
    on.mend()


async def flush_redis(on: Scene) -> None:
    on.store.server.flush()
    on.mend()
    await on.hold()


async def flush_and_kill_worker(on: Scene) -> None:
    """All workers must agree on the tenants' secret afterwards: each finds the contexts that another stored."""
    on.store.server.flush()
    await kill_worker(on)
    await until(on.stack.is_ready, 30, "both workers are ready")
    for number in range(CONTEXTS):
        stored: list[str] = []
        await until(lambda: _store_context(on, number, stored), 10, "a context can be stored")  # noqa: B023
        for use in range(USES):
            response = await on.probe(dialogue.ask_stored(number, stored[0], f"question {use}"))
            if response.status != 200:
                raise Failed(f"use {use} of context {number} was answered {response.status}")


async def _store_context(on: Scene, conversation: int, stored: list[str]) -> bool:
    """Store a context and append its id; False while Redis is away."""
    connection = Connection(0, *await asyncio.open_connection("127.0.0.1", on.stack.proxy.port))
    try:
        response = await connection.post(dialogue.upload(conversation), "/v1/caching")
    finally:
        connection.close()
    if response.status == 200:
        stored.append(msgspec.json.decode(response.body, type=_StoredContext).id)
    elif response.status != 503:
        raise Failed(f"storing a context was answered {response.status}: {response.body[:300]!r}")
    return response.status == 200


class _StoredContext(msgspec.Struct):
    id: str


async def fill_redis(on: Scene) -> None:
    await _configured(on, "maxmemory", "1", "0")


async def want_replicas(on: Scene) -> None:
    await _configured(on, "min-replicas-to-write", "1", "0")


async def _configured(on: Scene, name: str, broken: str, whole: str) -> None:
    on.store.server.ask("CONFIG", "SET", name, broken)
    await on.hold()
    on.store.server.ask("CONFIG", "SET", name, whole)
    on.mend()


async def make_read_only(on: Scene) -> None:
    on.store.server.ask("REPLICAOF", "127.0.0.1", str(free_port()))
    await on.hold()
    on.store.server.ask("REPLICAOF", "NO", "ONE")
    on.mend()


async def set_password(on: Scene) -> None:
    on.store.server.ask("CONFIG", "SET", "requirepass", PASSWORD)
    on.store.ask_with_password(b"CLIENT KILL TYPE normal SKIPME yes")
    await on.hold()
    on.store.ask_with_password(b"CONFIG SET requirepass ''")
    on.mend()


async def block_redis(on: Scene) -> None:
    server = on.store.server
    server.ask("CONFIG", "SET", "busy-reply-threshold", "10")
    script = asyncio.get_running_loop().create_task(asyncio.to_thread(server.ask, "EVAL", "while true do end", "0"))
    await on.hold()
    await asyncio.to_thread(server.ask, "SCRIPT", "KILL")
    await script
    on.mend()


async def load_slowly(on: Scene) -> None:
    """Kill it and let its start take long: each key costs `KEY_MICROSECONDS`."""
    server = on.store.server
    server.ask("DEBUG", "POPULATE", LOADED_KEYS, "filler", "1000")
    server.ask("BGREWRITEAOF")
    await until(lambda: _rewritten(on), 20, "Valkey has rewritten its file")
    server.kill()
    slow = ("--key-load-delay", KEY_MICROSECONDS, "--loading-process-events-interval-bytes", "1024")
    await asyncio.to_thread(server.start, *slow)
    on.mend()


async def _rewritten(on: Scene) -> bool:
    told = await asyncio.to_thread(on.store.server.ask, "INFO", "persistence")
    return b"aof_rewrite_in_progress:0" in told and b"aof_last_rewrite_time_sec:-1" not in told


async def fail_over(on: Scene) -> None:
    assert on.store.watched is not None
    on.store.watched.master.kill()
    on.mend()
    await on.hold()


async def lose_cluster_node(on: Scene) -> None:
    node = on.store.node_of_the_journal
    node.kill()
    await on.hold(5.0)  # the others notice after a second or two, and then serve nothing
    await asyncio.to_thread(node.start)
    on.mend()


async def fill_disk(on: Scene) -> None:
    filler = scene.fill(on.stack.folder / "valkey")
    await on.hold(3.0)
    filler.unlink()
    on.mend()


async def worst_redis(on: Scene) -> None:
    """Frozen, flushed, killed, one after the other; then both proxies must agree on where a prompt is."""
    for play in (freeze_redis, flush_redis, kill_redis):
        await play(on)
    await until(on.shares_again, 30, "the journal grows again")
    await until(on.stack.is_ready, 30, "both proxies are ready again")
    await until(lambda: _agree(on, os.urandom(4).hex()), 20, "a prompt of one proxy is known to the other")


async def _agree(on: Scene, turn: str) -> bool:
    """Send a new prompt through the first proxy; True if the second would send it to the same replica, warm."""
    two = on.stack.proxies[1]
    ask = dialogue.ask(1000 + int(turn, 16), turn, stream=False, asks_usage=False)
    response = await on.probe(ask)
    await asyncio.sleep(0.5)
    told = await _explain(two.admin_port, ask.body)
    return told.get("reason") == "warm" and told.get("choice") == response.headers.get("x-cairn-replica")


async def _explain(port: int, body: bytes) -> dict[str, object]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            f"POST /explain HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        _, _, told = (await reader.read(-1)).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return msgspec.json.decode(told, type=dict[str, object])


# --- upstreams


async def kill_replica(on: Scene) -> None:
    on.lose_replica(0)
    on.stack.replicas[0].kill()
    await on.hold()
    on.stack.replicas[0].start()
    on.mend()


async def freeze_replica(on: Scene) -> None:
    on.lose_replica(0)
    on.stack.replicas[0].signal(signal.SIGSTOP)
    await on.hold(FOUND_FROZEN_SECONDS)
    on.stack.replicas[0].signal(signal.SIGCONT)
    on.mend()


async def restart_replica(on: Scene) -> None:
    on.lose_replica(0)
    on.stack.replicas[0].kill()
    on.stack.replicas[0].start()
    on.mend()
    await on.hold()


async def delay_replica(on: Scene) -> None:
    on.stack.replicas[0].signal(signal.SIGUSR1)
    await on.hold()
    on.stack.replicas[0].signal(signal.SIGUSR2)
    on.mend()
    await on.hold()


# fmt: off
SCENARIOS = (
    Scenario("worker-killed", "SIGKILL of one of two workers", kill_worker, shows="1 of 2 workers", restarts=1),
    Scenario("worker-ends-again", "one of two workers ends again and again, soon after its start",
             end_worker_again_and_again, shows=f"has ended {DEATHS_TO_REPORT} times in a row", restarts=DEATHS),
    Scenario("worker-frozen", "SIGSTOP of one of two workers", freeze_worker, shows="has not responded", restarts=1),
    Scenario("supervisor-killed", "SIGKILL of the supervisor, started again at once, with the private Valkey",
             kill_supervisor, scene.embedded, shows="does not answer", starts_over=True),
    Scenario("supervisor-frozen", "SIGSTOP of the supervisor", freeze_supervisor, shows="does not answer"),
    Scenario("sigterm", "SIGTERM with open streams, then started again", end_with_open_streams,
             shows="draining", starts_over=True),
    Scenario("sighup", "SIGHUP with a good, a bad and a good file", reload_good_and_bad),
    Scenario("descriptors", "workers run out of file descriptors", exhaust_descriptors,
             refuses=True, open_files=OPEN_FILES),
    Scenario("clock", "the wall clock jumps by an hour and back, across midnight", step_clock, needs="clock"),
    Scenario("redis-killed", "Redis is killed and started again", kill_redis, shows="redis is away"),
    Scenario("redis-frozen", "SIGSTOP of Redis", freeze_redis, shows=r"redis is away \(timeout"),
    Scenario("redis-flushed", "FLUSHALL", flush_redis, keeps_totals=False),
    Scenario("redis-flushed-worker-killed", "FLUSHALL, then SIGKILL of a worker: stored contexts are found by all",
             flush_and_kill_worker, shows="1 of 2 workers", restarts=1, keeps_totals=False),
    Scenario("redis-full", "maxmemory reached, noeviction", fill_redis, shows=r"redis is refusing writes \(oom"),
    Scenario("redis-password", "a password is set while running", set_password, shows=r"redis is away \(auth"),
    Scenario("redis-busy", "an endless script of another client", block_redis, shows="redis is away"),
    Scenario("redis-loading", "Redis is restarted and loads its file slowly", load_slowly,
             shows=r"redis is away \(loading"),
    Scenario("redis-read-only", "Redis becomes a replica, and a master again", make_read_only,
             shows=r"redis is refusing writes \(readonly", keeps_totals=False),
    Scenario("redis-no-replicas", "min-replicas-to-write is not met", want_replicas,
             shows=r"redis is refusing writes \(noreplicas"),
    Scenario("redis-failover", "the master is killed, Sentinel promotes the replica", fail_over, scene.sentinel,
             shows="redis is away", keeps_totals=False),
    Scenario("cluster-node-lost", "the Cluster's node of the journal is killed and started again",
             lose_cluster_node, scene.cluster, shows="redis is away"),
    Scenario("private-valkey-frozen", "SIGSTOP of the private Valkey", freeze_private_valkey, scene.embedded,
             shows=r"redis is away \(timeout"),
    Scenario("disk-full", "the disk of the private Valkey is full", fill_disk, scene.embedded,
             shows=r"redis is refusing writes \(misconf", needs="disk"),
    Scenario("upstream-killed", "one of three replicas is killed, started later", kill_replica,
             shows="upstream r0 is down"),
    Scenario("upstream-frozen", "SIGSTOP of one of three replicas", freeze_replica, shows="upstream r0 is down"),
    Scenario("upstream-restarted", "one of three replicas is restarted", restart_replica),
    Scenario("upstream-late", "one of three replicas answers after 1.5 s", delay_replica),
    Scenario("two-proxies", "two proxies on one Redis that is frozen, flushed and killed", worst_redis, proxies=2,
             shows="redis is away", keeps_totals=False),
)
# fmt: on

"""The private socket between supervisor and worker."""

from __future__ import annotations

import asyncio
import socket
import struct

import pytest

from proxy.config.load import Config, ConfigError, Pool, Replica, Secret
from proxy.control import channel as control
from proxy.control.channel import Channel, ControlBroken, WorkerControl
from proxy.control.messages import (
    Configure,
    Drain,
    Explain,
    Explained,
    FromWorker,
    Heartbeat,
    NameModels,
    Ready,
    ReloadRefused,
    StatusReport,
    WorkerReport,
)
from proxy.metrics.definitions import REQUESTS, MetricsDelta
from proxy.metrics.recorder import Recorder
from proxy.tasks import Tasks
from tests.support.valkey import eventually

CONFIG = Config(pools=(Pool("p", (Replica("http://h", key=Secret("the-key")),)),))


@pytest.fixture
async def ends():
    """The supervisor's channel, and a worker's control that has its configuration."""
    ours, theirs = socket.socketpair()
    channel: Channel[FromWorker] = await Channel.open(ours, FromWorker)
    tasks = Tasks()
    await channel.send(Configure(CONFIG))
    worker, config = await WorkerControl.open(theirs, tasks)
    assert config == CONFIG
    yield channel, worker
    await tasks.close()
    channel.close()
    worker.close()


async def next_of(channel: Channel[FromWorker]):
    """The next message that is no heartbeat, in bounded time."""
    async with asyncio.timeout(20):
        while isinstance(message := await channel.receive(), Heartbeat):
            pass
        return message


async def test_a_worker_gets_its_configuration_with_secrets(ends) -> None:
    """Here and nowhere else a secret travels as it is."""
    assert CONFIG.pools[0].replicas[0].key == Secret("the-key")


async def test_a_worker_gets_the_models_that_have_a_label_also_while_it_starts(ends) -> None:
    """Those that were sent before it could use them, and each addition."""
    channel, worker = ends
    seen: list[tuple[str, ...]] = []
    await channel.send(NameModels(("a",)))
    await channel.send(Explain(1, "/v1/x", b""))
    await next_of(channel)  # both have arrived
    worker.on_models = seen.append
    assert seen == [("a",)]
    await channel.send(NameModels(("a", "b")))
    await eventually(lambda: seen == [("a",), ("a", "b")])


async def test_ready_and_reports_reach_the_supervisor(ends) -> None:
    """Counts arrive as they were counted."""
    channel, worker = ends
    recorder = Recorder()
    recorder.inc(REQUESTS, ("chat", "m", "u", "2xx", "hit", "true"), 3)
    report = WorkerReport(
        recorder.take(),
        in_flight=2,
        redis="up",
        upstreams={"u": True},
        failing_tasks=("totals",),
        page=StatusReport(budgets={"u": 5}),
    )
    await worker.send_ready()
    assert worker.report(report)
    assert await next_of(channel) == Ready()
    assert await next_of(channel) == report


async def test_drain_is_heard_once(ends) -> None:
    """The first deadline applies, and later callers get it as well."""
    channel, worker = ends
    assert not worker.draining
    await channel.send(Drain(3.5))
    await channel.send(Drain(9.0))
    async with asyncio.timeout(20):
        assert await worker.wait_for_drain() == 3.5
        assert await worker.wait_for_drain() == 3.5
    assert worker.draining


async def test_whoever_stops_waiting_for_the_drain_does_not_end_it_for_others(ends) -> None:
    """Cancelling one waiter leaves the others waiting."""
    channel, worker = ends
    waiter = asyncio.ensure_future(worker.wait_for_drain())  # noqa: TID251
    await asyncio.wait({waiter}, timeout=0)
    waiter.cancel()
    await asyncio.wait({waiter})
    await channel.send(Drain(1.0))
    async with asyncio.timeout(20):
        assert await worker.wait_for_drain() == 1.0


async def test_questions_are_answered_by_their_number(ends) -> None:
    """Two at a time, answered in the other order."""
    channel, worker = ends
    first_may_end = asyncio.Event()

    async def explain(question: Explain) -> tuple[int, bytes]:
        if question.id == 1:
            await first_may_end.wait()
        return 200, question.body

    worker.on_explain = explain
    await channel.send(Explain(1, "/v1/x", b"one"))
    await channel.send(Explain(2, "/v1/x", b"two"))
    assert await next_of(channel) == Explained(2, 200, b"two")
    first_may_end.set()
    assert await next_of(channel) == Explained(1, 200, b"one")


async def test_a_worker_that_explains_nothing_says_so(ends) -> None:
    """501, and no silence."""
    channel, _ = ends
    await channel.send(Explain(1, "/v1/x", b""))
    answer = await next_of(channel)
    assert (answer.id, answer.status) == (1, 501)


async def test_a_reload_is_taken_or_refused_with_its_reason(ends) -> None:
    """ConfigError is the way to say no."""
    channel, worker = ends
    taken: asyncio.Queue[Config] = asyncio.Queue()

    async def reload(config: Config) -> None:
        if not config.pools:
            raise ConfigError("$.pools: none")
        taken.put_nowait(config)

    worker.on_reload = reload
    await channel.send(Configure(CONFIG))
    async with asyncio.timeout(20):
        assert await taken.get() == CONFIG
    await channel.send(Configure(Config()))
    assert await next_of(channel) == ReloadRefused("$.pools: none")


async def test_a_reload_that_comes_while_a_worker_starts_waits_and_is_not_refused(ends) -> None:
    """A refusal would undo it in all workers. Only the last one counts."""
    channel, worker = ends
    first, last = (Config(pools=(Pool(name, (Replica("http://h"),)),)) for name in ("first", "last"))
    read, taken = asyncio.Event(), asyncio.Queue[Config]()
    worker.before_reload = lambda config: read.set() if config == last else None
    await channel.send(Configure(first))
    await channel.send(Configure(last))
    async with asyncio.timeout(20):
        await read.wait()

    async def reload(config: Config) -> None:
        taken.put_nowait(config)

    worker.on_reload = reload
    async with asyncio.timeout(20):
        assert await taken.get() == last
    assert taken.empty()


async def test_a_reload_that_waited_does_not_undo_a_later_one(ends) -> None:
    """That came just when the worker had started."""
    channel, worker = ends
    first, last = (Config(pools=(Pool(name, (Replica("http://h"),)),)) for name in ("first", "last"))
    taken = asyncio.Queue[Config]()

    async def reload(config: Config) -> None:
        taken.put_nowait(config)

    def before(config: Config) -> None:
        if config == last:
            worker.on_reload = reload

    worker.before_reload = before
    await channel.send(Configure(first))
    await channel.send(Configure(last))
    await channel.send(Explain(1, "/v1/x", b""))
    await next_of(channel)
    assert [taken.get_nowait() for _ in range(taken.qsize())] == [last]


async def test_a_reload_that_takes_its_time_holds_nothing_up_and_is_followed_by_the_newest(ends) -> None:
    """It may look names up for seconds; a drain that comes then does not wait."""
    channel, worker = ends
    configs = [Config(pools=(Pool(name, (Replica("http://h"),)),)) for name in ("first", "second", "last")]
    taken, go_on = list[Config](), asyncio.Event()

    async def reload(config: Config) -> None:
        taken.append(config)
        await go_on.wait()

    worker.on_reload = reload
    await channel.send(Configure(configs[0]))
    await eventually(lambda: taken == configs[:1])
    for config in configs[1:]:
        await channel.send(Configure(config))
    await channel.send(Drain(7.0))
    async with asyncio.timeout(20):
        assert await worker.wait_for_drain() == 7.0
    assert taken == [configs[0]]
    go_on.set()
    await eventually(lambda: len(taken) == 2)
    assert taken[1] == configs[2]


async def test_a_worker_in_which_a_reload_fails_ends(ends) -> None:
    """A new one has the whole configuration, and not half of it."""
    channel, worker = ends

    async def reload(_: Config) -> None:
        raise RuntimeError

    worker.on_reload = reload
    await channel.send(Configure(CONFIG))
    async with asyncio.timeout(20):
        await worker.orphaned.wait()


async def test_a_worker_without_a_supervisor_knows_it(ends) -> None:
    """The closed socket is an order to end at once."""
    channel, worker = ends
    channel.close()
    async with asyncio.timeout(20):
        await worker.orphaned.wait()
        assert await worker.wait_for_drain() == 0.0


async def test_a_supervisor_that_reads_nothing_costs_a_worker_no_memory(
    ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a bound reports are not sent, and the caller keeps its counts."""
    channel, worker = ends
    monkeypatch.setattr(control, "_REPORT_BACKLOG_BYTES", 10_000)
    big = WorkerReport(MetricsDelta(counters=[(0, ("x" * 1000,), 1.0)] * 500))
    sent = 0
    while worker.report(big):
        sent += 1
        assert sent < 100
    assert await next_of(channel) == big


async def test_a_supervisor_gone_first_is_told_to_whoever_waits_for_the_configuration() -> None:
    """No worker hangs there."""
    ours, theirs = socket.socketpair()
    ours.close()
    with pytest.raises(ControlBroken):
        await WorkerControl.open(theirs, Tasks())


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">I", control.MESSAGE_BYTES_AT_MOST + 1),
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 1) + b"\x01",
    ],
)
async def test_nonsense_is_an_error_and_no_allocation(sent: bytes) -> None:
    """A length over the bound is refused before anything is read."""
    ours, theirs = socket.socketpair()
    channel: Channel[FromWorker] = await Channel.open(ours, FromWorker)
    theirs.sendall(sent)
    with pytest.raises(ControlBroken):
        await next_of(channel)
    channel.close()
    theirs.close()


async def test_a_long_message_comes_whole_however_it_is_cut(ends) -> None:
    """A body to explain, which neither end joins or collects."""
    channel, worker = ends
    asked: list[Explain] = []

    async def explain(question: Explain) -> tuple[int, bytes]:
        asked.append(question)
        return 200, question.body[::-1]

    worker.on_explain = explain
    body = bytes(range(256)) * 8_000
    await channel.send(Explain(1, "/v1/completions", body))
    assert await next_of(channel) == Explained(1, 200, body[::-1])
    assert [each.body for each in asked] == [body]


@pytest.mark.parametrize("size", [100, 100_000])
async def test_a_message_cut_off_by_the_end_is_no_message(size: int) -> None:
    """The other end died while it wrote."""
    ours, theirs = socket.socketpair()
    channel: Channel[FromWorker] = await Channel.open(ours, FromWorker)
    theirs.sendall(struct.pack(">I", size) + b"half")
    theirs.close()
    assert await next_of(channel) is None
    channel.post(Drain(1.0))  # goes nowhere and raises nothing
    channel.close()


async def test_a_body_of_32_mib_can_be_asked_about(ends) -> None:
    """The largest body that is served can be explained too."""
    channel, worker = ends

    async def explain(question: Explain) -> tuple[int, bytes]:
        return 200, str(len(question.body)).encode()

    worker.on_explain = explain
    await channel.send(Explain(7, "/v1/x", bytes(32 * 1024 * 1024)))
    assert await next_of(channel) == Explained(7, 200, str(32 * 1024 * 1024).encode())


async def test_a_worker_sends_heartbeats_whatever_else_it_does(ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once, and another after each pause."""
    channel, _ = ends
    async with asyncio.timeout(20):
        assert [await channel.receive(), await channel.receive()] == [Heartbeat(), Heartbeat()]

"""One slot with processes that are no proper workers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from select import select

import pytest

from proxy.clock import Clock, SystemClock
from proxy.config.load import Config, Pool, Replica
from proxy.control.messages import Announced, Explain, WorkerReport
from proxy.supervisor import silence
from proxy.supervisor import worker_process as slot_module
from proxy.supervisor.relief import Heir
from proxy.supervisor.sockets import open_one
from proxy.supervisor.worker_process import (
    DEATHS_TO_REPORT,
    PAUSE_FIRST_SECONDS,
    STABLE_SECONDS,
    Program,
    WorkerProcess,
    WorkerUnavailable,
)
from tests.support.clock import FakeClock

LIMIT_SECONDS = 60.0  # bounds the time of a failure: on a busy machine a process takes many seconds to start

# what a worker gets: --control FD --listen FDS --parent PID
NONSENSE = "import os, sys, signal; os.write(int(sys.argv[2]), b'\\xff' * 8); signal.pause()"
SILENT = "import signal; signal.pause()"


class Heard:
    """A watcher that records its calls."""

    def __init__(self) -> None:
        self.deaths: asyncio.Queue[int] = asyncio.Queue()
        self.heir: Heir | None = None

    def worker_ready(self, number: int) -> None:
        raise AssertionError("none of these is ever ready")

    def worker_reported(self, number: int, report: WorkerReport) -> None:
        raise AssertionError("none of these reports")

    def reload_refused(self, number: int, why: str) -> None:
        raise AssertionError("none of these refuses")

    def worker_announced(self, number: int, line: Announced) -> None:
        raise AssertionError("none of these announces")

    def worker_died(self, number: int, starts: int) -> None:
        self.deaths.put_nowait(starts)

    def heir_of(self, number: int) -> Heir | None:
        return self.heir


async def dies_and_comes_back(command: Sequence[str]) -> WorkerProcess:
    """Run a slot with `command` until it saw two deaths, then end it."""
    heard = Heard()
    slot = WorkerProcess(0, Program(command, dict(os.environ)), [], Config(), heard, SystemClock())  # noqa: TID251
    running = asyncio.ensure_future(slot.run())  # noqa: TID251
    async with asyncio.timeout(LIMIT_SECONDS):
        assert [await heard.deaths.get(), await heard.deaths.get()] == [1, 2]
        slot.kill()
        await running
    return slot


async def test_a_worker_that_speaks_nonsense_is_ended_and_replaced() -> None:
    """A broken one must not stay."""
    await dies_and_comes_back([sys.executable, "-c", NONSENSE])


async def test_a_worker_that_is_never_ready_is_ended_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the limit for starts."""
    monkeypatch.setattr(slot_module, "START_LIMIT_SECONDS", 0.05)
    await dies_and_comes_back([sys.executable, "-c", SILENT])


async def test_a_worker_that_cannot_be_started_is_tried_again() -> None:
    """As when the machine is out of processes."""
    slot = await dies_and_comes_back(["/no/such/program"])
    assert slot.pid is None


async def test_nobody_explains_where_there_is_no_worker() -> None:
    """`WorkerUnavailable`, at once."""
    slot = WorkerProcess(0, Program(["/no/such/program"], {}), [], Config(), Heard(), SystemClock())
    with pytest.raises(WorkerUnavailable):
        await slot.explain(Explain(1, "/v1/x", b""), 10.0)


async def drained_in_silence(seconds: float) -> WorkerProcess:
    """Start a worker that says and hears nothing, drain it once its process is there, and wait for its end."""
    program = Program([sys.executable, "-c", SILENT], dict(os.environ))  # noqa: TID251
    slot = WorkerProcess(0, program, [], Config(), Heard(), SystemClock())
    running = asyncio.ensure_future(slot.run())  # noqa: TID251
    async with asyncio.timeout(LIMIT_SECONDS):
        while slot.pid is None:  # noqa: ASYNC110 - turns of the loop, until the process is there
            await asyncio.sleep(0)
        slot.drain(seconds)
        await running
    return slot


async def test_a_worker_that_hears_nothing_is_killed_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain ends even if the worker is frozen."""
    monkeypatch.setattr(slot_module, "KILL_MARGIN_SECONDS", 0.05)
    slot = await drained_in_silence(0.0)
    assert slot.pid is None


async def test_a_worker_that_is_frozen_before_it_is_ready_delays_no_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no requests that could finish within the time of the drain."""
    for module in (slot_module, silence):
        monkeypatch.setattr(module, "SILENCE_LIMIT_SECONDS", 0.1)
    slot = await drained_in_silence(10 * LIMIT_SECONDS)
    assert slot.pid is None


async def test_what_a_dead_worker_had_sent_is_read_to_its_end() -> None:
    """Its last counts may still be in the socket when its death is noticed."""
    slot = WorkerProcess(0, Program([], {}), [], Config(), Heard(), SystemClock())
    read = list[int]()

    async def read_reports() -> None:
        for number in range(3):
            await asyncio.sleep(0)
            read.append(number)

    reading = asyncio.ensure_future(read_reports())  # noqa: TID251
    await slot._clear_up(reading)  # noqa: SLF001 - through a process it would depend on which event the loop sees first
    assert read == [0, 1, 2]


async def test_a_socket_that_outlives_its_worker_is_read_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the worker started may have inherited it."""
    monkeypatch.setattr(slot_module, "FINAL_READ_SECONDS", 0.01)
    slot = WorkerProcess(0, Program([], {}), [], Config(), Heard(), SystemClock())

    async def read_reports() -> None:
        await asyncio.Event().wait()

    reading = asyncio.ensure_future(read_reports())  # noqa: TID251
    await slot._clear_up(reading)  # noqa: SLF001 - as above
    with pytest.raises(asyncio.CancelledError):
        await reading


class JumpingClock(FakeClock):
    """Moves on by `seconds` at each reading."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def monotonic(self) -> float:
        self.advance(self._seconds)
        return super().monotonic()


@pytest.mark.parametrize(
    ("uptime_seconds", "second_pause"), [(STABLE_SECONDS, PAUSE_FIRST_SECONDS), (0.0, 2 * PAUSE_FIRST_SECONDS)]
)
async def test_the_pause_grows_unless_the_worker_was_stable(
    uptime_seconds: float, second_pause: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that ran for long died of something new, so its successor starts at once."""
    watcher = Heard()
    program = Program(["/no/such/program"], {})
    slot = WorkerProcess(0, program, [], Config(), watcher, JumpingClock(uptime_seconds))
    running = asyncio.ensure_future(slot.run())  # noqa: TID251
    async with asyncio.timeout(LIMIT_SECONDS):
        assert [await watcher.deaths.get(), await watcher.deaths.get()] == [1, 2]
    slot.kill()
    await running
    pauses = re.findall(r"starting another in (\S+) s", caplog.text)
    assert pauses == [f"{PAUSE_FIRST_SECONDS:.1f}", f"{second_pause:.1f}"]


class Ready(Heard):
    """A watcher of proper workers."""

    def __init__(self) -> None:
        super().__init__()
        self.is_ready = asyncio.Event()
        self.address = ("", 0)

    def worker_ready(self, number: int) -> None:
        self.is_ready.set()

    def worker_reported(self, number: int, report: WorkerReport) -> None:
        pass


@contextlib.asynccontextmanager
async def tiny_worker(clock: Clock) -> AsyncIterator[tuple[WorkerProcess, Ready]]:
    """A worker that is ready, on a free port."""
    watcher = Ready()
    command = [sys.executable, "-m", "tests.support.tiny_worker", "serve"]
    program = Program(command, dict(os.environ))  # noqa: TID251
    with open_one(socket.AF_INET, ("127.0.0.1", 0), 128, shared=True) as listening:
        watcher.address = listening.getsockname()
        config = Config(pools=(Pool("p", (Replica("http://127.0.0.1:9"),)),))
        worker = WorkerProcess(0, program, [listening], config, watcher, clock)
        running = asyncio.ensure_future(worker.run())  # noqa: TID251
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                await watcher.is_ready.wait()
                yield worker, watcher
        finally:
            worker.kill()
            await running


async def test_a_frozen_worker_loses_its_connections_and_is_killed_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It sends no heartbeat: at first others get its new connections; when it is certainly frozen it is ended."""
    async with tiny_worker(SystemClock()) as (worker, watcher):
        assert worker.pid is not None
        frozen = worker.pid
        other = watcher.heir = OtherWorker(room=1)
        os.kill(frozen, signal.SIGSTOP)
        monkeypatch.setattr(silence, "SILENCE_LIMIT_SECONDS", LIMIT_SECONDS)
        with socket.create_connection(watcher.address):
            async with asyncio.timeout(LIMIT_SECONDS):
                await other.has_adopted.wait()
        assert worker.pid == frozen
        for module in (slot_module, silence):
            monkeypatch.setattr(module, "SILENCE_LIMIT_SECONDS", 0.5)
        watcher.is_ready.clear()
        await watcher.deaths.get()
        await watcher.is_ready.wait()
        assert worker.pid not in (None, frozen)
    assert re.search(r"worker 0 has not responded for \d+ s; killing it", caplog.text)


async def test_a_supervisor_that_was_stopped_itself_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages that came meanwhile are unread, which is not the worker's silence."""
    monkeypatch.setattr(slot_module, "SILENCE_CHECK_SECONDS", 0.05)
    clock = Offset()
    async with tiny_worker(clock) as (worker, _):
        pid = worker.pid
        clock.seconds = 1000.0
        while clock.readings < 20:  # noqa: ASYNC110 - until the check has come round several times
            await asyncio.sleep(0.01)
        assert (worker.pid, worker.ready) == (pid, True)


class Offset(SystemClock):
    """The system's clock, which a test may set forward; counts how often it was read since."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.readings = 0

    def monotonic(self) -> float:
        self.readings += bool(self.seconds)
        return SystemClock.monotonic() + self.seconds


def shared_sockets() -> list[socket.socket]:
    """The sockets of two workers on one port."""
    first = open_one(socket.AF_INET, ("127.0.0.1", 0), 128, shared=True)
    return [first, open_one(socket.AF_INET, first.getsockname(), 128, shared=True)]


def taken_by(end: socket.socket, port: int, connections: int = 40) -> int:
    """Open connections and count those that the kernel gives to `end`."""
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            end.accept()[0].close()
            taken += 1
    for client in clients:
        client.close()
    return taken


class OtherWorker:
    """Takes connections of a worker that ended, as many as it has `room` for."""

    def __init__(self, room: int) -> None:
        self.adopted: list[socket.socket] = []
        self.has_adopted = asyncio.Event()
        self._room = room

    def adopt(self, connection: socket.socket) -> bool:
        if len(self.adopted) == self._room:
            return False
        self.adopted.append(connection.dup())
        self.has_adopted.set()
        return True


async def test_connections_of_a_worker_that_ends_go_to_one_that_serves(caplog: pytest.LogCaptureFixture) -> None:
    """Those that wait for it and all new ones, from its first death on; those that no other can take are closed."""
    theirs, ours = shared_sockets()
    port = theirs.getsockname()[1]
    sockets, heard = [ours], Heard()
    other = heard.heir = OtherWorker(room=3)
    waiting = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    worker = WorkerProcess(0, Program(["/no/such/program"], {}), sockets, Config(), heard, SystemClock())
    running = asyncio.ensure_future(worker.run())  # noqa: TID251
    async with asyncio.timeout(LIMIT_SECONDS):
        await heard.deaths.get()
    assert sockets[0].getsockname()[1] == port
    for adopted in other.adopted:
        adopted.sendall(b"served")
    served = sum(client.recv(6) == b"served" for client in waiting if select([client], [], [], 0)[0])
    assert served == 3
    closed = 40 - served - taken_by(theirs, port, 0)
    assert f"worker 0: {closed} connections that waited for it were closed" in caplog.text
    assert taken_by(theirs, port) == 40, "new ones"
    worker.kill()
    await running
    for each in (theirs, *sockets, *waiting, *other.adopted):
        each.close()


async def test_connections_wait_for_a_successor_if_no_other_worker_serves() -> None:
    """Its socket goes on listening."""
    theirs, ours = shared_sockets()
    sockets, heard = [ours], Heard()
    worker = WorkerProcess(0, Program(["/no/such/program"], {}), sockets, Config(), heard, SystemClock())
    running = asyncio.ensure_future(worker.run())  # noqa: TID251
    async with asyncio.timeout(LIMIT_SECONDS):
        await heard.deaths.get()
    assert sockets == [ours]
    theirs.close()
    assert taken_by(ours, ours.getsockname()[1]) == 40
    worker.kill()
    await running
    ours.close()


async def test_a_worker_that_has_left_its_port_gets_connections_as_soon_as_it_listens() -> None:
    """Its successor inherits a socket at the same address, however often it ended."""
    theirs, ours = shared_sockets()
    port = theirs.getsockname()[1]
    sockets, heard = [ours], Heard()
    heard.heir = OtherWorker(room=0)
    worker = WorkerProcess(0, Program(["/no/such/program"], {}), sockets, Config(), heard, SystemClock())
    for _ in range(3):
        worker._leave_port()  # noqa: SLF001 - internal state that no public name shows
        taken_by(theirs, port, 0)
        assert taken_by(theirs, port) == 40
        sockets[0].listen(128)  # as the worker does when it serves
        assert taken_by(theirs, port) < 40
    for each in (theirs, *sockets):
        each.close()


async def test_a_worker_that_keeps_ending_is_reported_until_it_was_stable() -> None:
    """Two deaths may be chance; after the third, readiness says so in every state of the worker."""
    clock = FakeClock()
    worker = WorkerProcess(0, Program(["/no/such/program"], {}), [], Config(), Heard(), clock)
    for deaths, is_ready, uptime_seconds, told in (
        (DEATHS_TO_REPORT - 1, False, 0.0, 0),
        (DEATHS_TO_REPORT, False, 0.0, DEATHS_TO_REPORT),
        (7, True, STABLE_SECONDS - 0.1, 7),
        (7, False, STABLE_SECONDS, 7),
        (7, True, STABLE_SECONDS, 0),
    ):
        worker._deaths, worker.ready = deaths, is_ready  # noqa: SLF001 - internal state that no public name shows
        worker._started_seconds = clock.monotonic() - uptime_seconds  # noqa: SLF001 - as above
        assert worker.view().deaths == told


async def test_a_socket_that_all_workers_share_is_kept() -> None:
    """The others accept its connections."""
    with socket.create_server(("127.0.0.1", 0)) as only:
        sockets = [only]
        heard = Heard()
        heard.heir = OtherWorker(room=0)
        worker = WorkerProcess(0, Program(["/no/such/program"], {}), sockets, Config(), heard, SystemClock())
        worker._leave_port()  # noqa: SLF001 - internal state that no public name shows
        assert sockets == [only]

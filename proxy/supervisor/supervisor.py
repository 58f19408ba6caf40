"""The first process: it opens the ports, starts the private Valkey and the workers, and brings all of it to an end.

It answers the admin port by itself, adds up what the workers count, restarts those that die, drains on SIGTERM and
SIGINT (a second one ends at once) and reloads on SIGHUP. It sees no request. It must not know HTTP beyond the admin
port's own module, and nothing of what a worker does.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from proxy.accounting.savings import By
from proxy.accounting.savings import SavingsReport as Savings
from proxy.accounting.totals_reader import TotalsReader, Unreadable
from proxy.admin.port import AdminPort
from proxy.admin.status import StatusBoard
from proxy.clock import Clock
from proxy.config.load import Config, ConfigError, Loaded, SecretUrl
from proxy.config.reload import taken_over
from proxy.control.channel import MESSAGE_BYTES_AT_MOST, Explain, WorkerReport
from proxy.control.readiness import Readiness, Stage, judge
from proxy.metrics import definitions as metrics
from proxy.metrics.exposition import Exposition
from proxy.metrics.recorder import Recorder
from proxy.supervisor import sockets as listen
from proxy.supervisor.worker_process import WorkerProcess, WorkerUnavailable
from proxy.tasks import Tasks

OWN_TICK_SECONDS = 1.0  # how often the supervisor counts itself and looks after the Valkey
EXPLAIN_SECONDS = 5.0
DEATHS_BEFORE_GIVING_UP = 3  # in one slot, while no worker was ever ready: a start that cannot work
STORE_PAUSE_SECONDS = (1.0, 30.0)  # between two starts of a Valkey that does not live; doubled each time
TOTALS_SECONDS = 2.0  # between two readings of the totals for the status page
TOTALS_REST = 50  # times as long as a reading took: with many tenants it is a long one, and Redis has others to serve
_OWN = -1  # the number under which the supervisor's own gauges are added up

log = logging.getLogger("cairn.supervisor")


class PrivateStore(Protocol):
    """A store of our own: `start` and `stop` block, and `start` raises one of `Parts.store_errors`."""

    @property
    def url(self) -> str:
        """Where workers find it, known before it runs."""
        ...

    @property
    def running(self) -> bool:
        """False where it died."""
        ...

    def start(self) -> None:
        """Start it and wait until it answers."""

    def stop(self) -> None:
        """End it."""


class Parts(msgspec.Struct, frozen=True):
    """What the supervisor is handed from outside.

    `worker_command` starts a worker when the descriptors are appended; `reload` reads the configuration again and
    raises ConfigError; `private_store` makes a store in a folder with a bound in bytes.
    """

    worker_command: tuple[str, ...]
    environment: Mapping[str, str]
    reload: Callable[[], Loaded]
    private_store: Callable[[Path, int], PrivateStore] | None
    store_errors: tuple[type[Exception], ...]
    clock: Clock
    version: str
    started: Callable[[str, str], None]  # told the two addresses once the first worker is ready


class Supervisor:
    """See the module. `run` once."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self._stage = Stage.STARTING
        self._tasks = Tasks()
        self._exposition = Exposition()
        self._recorder = Recorder()
        self.board = StatusBoard(self._exposition, self.readiness, parts.clock, parts.version)
        self._slots: list[WorkerProcess] = []
        self._listening: list[list[socket.socket]] = []
        self._store: PrivateStore | None = None
        # one thread for as long as the process: on Linux the kernel ends the Valkey with the thread that started it
        self._store_thread = ThreadPoolExecutor(1, "private-store")
        self._totals: TotalsReader | None = None
        self._admin = AdminPort(self)
        self._addresses = ("", "")
        self._stop_signal: signal.Signals | None = None
        self._stop = asyncio.Event()
        self._now = asyncio.Event()
        self._was_ready = False
        self._questions = 0
        self._before_reload: Config | None = None

    # --- what the admin port shows

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self._config

    def readiness(self) -> Readiness:
        """Whether requests are welcome."""
        return judge(self._stage, [slot.view() for slot in self._slots])

    def scrape(self, accept: str) -> tuple[bytes, str]:
        """The metrics page."""
        self._count_self()
        return self._exposition.render(accept)

    async def savings(self, since: str, by: By) -> Savings:
        """What the totals in the store say; see `TotalsReader.read`."""
        if self._totals is None:
            url = self._config.redis.url
            self._totals = TotalsReader(None if url is None else url.reveal(), self._parts.clock, self._tasks)
        return await self._totals.read(since, by)

    async def explain(self, path: str, body: bytes, credential: bytes) -> tuple[int, bytes]:
        """Ask the workers in turn until one answers."""
        if len(body) + len(path) + len(credential) > MESSAGE_BYTES_AT_MOST // 2:
            return 413, b'{"error": "the body is too large to be explained"}'
        for slot in sorted(self._slots, key=lambda each: not each.view().serves):
            self._questions += 1
            with suppress(WorkerUnavailable, TimeoutError):
                answer = await slot.explain(Explain(self._questions, path, body, credential), EXPLAIN_SECONDS)
                return answer.status, answer.body
        return 503, b'{"error": "no worker answers"}'

    # --- what the slots tell

    def ready(self, number: int) -> None:
        """The first ready worker ends the start."""
        log.info("worker %d is ready (pid %s)", number, self._slots[number].pid)
        if not self._was_ready:
            self._was_ready = True
            if self._stage is Stage.STARTING:
                self._stage = Stage.SERVING
            self._parts.started(*self._addresses)

    def reported(self, number: int, report: WorkerReport) -> None:
        """Add what a worker counted."""
        self._exposition.apply(number, report.counts)
        self.board.heard(number, report)

    def refused(self, number: int, why: str) -> None:
        """A worker cannot take the new configuration over: all go back to the old one, or a restart would fail."""
        if self._before_reload is None:  # another refused it already
            return
        self._config, self._before_reload = self._before_reload, None
        self._recorder.inc(metrics.RELOADS_FAILED)
        log.error("the configuration stays as it was: worker %d: %s", number, why)
        for slot in self._slots:
            slot.configure(self._config)

    def died(self, number: int, lives: int) -> None:
        """Count it; give up where none ever was ready."""
        self._recorder.inc(metrics.WORKER_RESTARTS)
        self._exposition.forget(number)
        self.board.gone(number)
        if not self._was_ready and lives >= DEATHS_BEFORE_GIVING_UP:
            log.error("workers end before they are ready; giving up")
            self._stop.set()

    # --- from start to end

    async def run(self) -> int:
        """Serve until told to end; gives the exit code: 0 after a drain, 1 where it was cut short or never began.

        Raises:
            ListenError: a port cannot be had; nothing was started.
        """
        listen.raise_descriptor_limit()
        server, admin = self._config.server, self._config.admin
        self._listening = listen.open_for_workers(server.host, server.port, server.workers, server.backlog)
        try:
            admin_socket = listen.open_admin(admin.host, admin.port)
        except listen.ListenError:
            listen.close_all(self._listening)
            raise
        self._addresses = (_address(self._listening[0][0]), _address(admin_socket))
        self._handle_signals()
        try:
            await self._admin.start(admin_socket)
            await self._start_store()
            return await self._serve()
        finally:
            await self._end()

    async def _serve(self) -> int:
        self._recorder.set(metrics.RELOADED_AT, (), self._parts.clock.unix())
        self._slots = [self._new_slot(number) for number in range(len(self._listening))]
        running = [self._tasks.start(slot.run(), f"slot-{slot.number}") for slot in self._slots]
        self._tasks.start(self._tick(), "tick")
        self._tasks.start(self._read_totals(), "totals")
        await self._stop.wait()
        await self._drain(running)
        return 0 if self._stop_signal is not None and not self._now.is_set() else 1

    def _new_slot(self, number: int) -> WorkerProcess:
        parts = self._parts
        return WorkerProcess(
            number, parts.worker_command, parts.environment, self._listening[number], self._config, self, parts.clock
        )

    async def _drain(self, running: Sequence[asyncio.Task[None]]) -> None:
        """Not ready at once; a moment in which balancers notice; then what runs may end, until the deadline."""
        self._stage = Stage.DRAINING
        server = self._config.server
        if self._stop_signal is signal.SIGTERM and self._was_ready:
            log.info("draining: still accepting for %.1f s", server.drain_accept_seconds)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._now.wait(), server.drain_accept_seconds)
        listen.close_all(self._listening)  # ours; what queues there is the workers' to accept until they close theirs
        log.info("draining: what runs may end within %.0f s", server.drain_seconds)
        for slot in self._slots:
            slot.drain(server.drain_seconds)
        ended = self._tasks.start(_all_of(running), "all-workers")
        at_once = self._tasks.start(self._now.wait(), "second-signal")
        await asyncio.wait({ended, at_once}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            for slot in self._slots:
                slot.kill()
            await ended

    async def _end(self) -> None:
        await self._tasks.close()
        await self._admin.close()
        if self._totals is not None:
            await self._totals.close()
        listen.close_all(self._listening)
        if self._store is not None:
            await self._in_store_thread(self._store.stop)
        self._store_thread.shutdown(wait=False)

    # --- signals

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload)

    def _told_to_stop(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            self._now.set()
            return
        self._stop_signal = number
        self._stage = Stage.DRAINING
        self._stop.set()

    def _reload(self) -> None:
        """Take over the configuration as it is now on disk, but for what only a restart can change."""
        try:
            loaded = self._parts.reload()
        except ConfigError as error:
            self._recorder.inc(metrics.RELOADS_FAILED)
            log.error("the configuration stays as it was: %s", error.message)  # noqa: TRY400 - not a failure of ours
            return
        self._before_reload = self._config
        self._config, waiting = taken_over(self._config, loaded.config, own_store=self._store is not None)
        for path in waiting:
            log.warning("%s takes effect after a restart only", path)
        for slot in self._slots:
            slot.configure(self._config)
        self._recorder.set(metrics.RELOADED_AT, (), self._parts.clock.unix())
        log.info("the configuration was read again")

    # --- what it looks after

    async def _start_store(self) -> None:
        """Start the private Valkey where no Redis is configured. It may fail: Cairn works without, only worse."""
        redis = self._config.redis
        if redis.url is not None or redis.folder is None or self._parts.private_store is None:
            return
        self._store = self._parts.private_store(Path(redis.folder), redis.max_memory_bytes)
        await self._try_store(self._store)
        redis = msgspec.structs.replace(redis, url=SecretUrl(self._store.url))
        self._config = msgspec.structs.replace(self._config, redis=redis)

    async def _try_store(self, store: PrivateStore) -> bool:
        try:
            await self._in_store_thread(store.start)
        except self._parts.store_errors as error:
            log.warning("serving without a store: %s", error)
            return False
        return True

    async def _in_store_thread(self, call: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._store_thread, call)

    async def _tick(self) -> None:
        """Every second: own counts, the status page's reading, and the Valkey started again where it died."""
        pause, since = STORE_PAUSE_SECONDS[0], 0.0
        while True:
            await asyncio.sleep(OWN_TICK_SECONDS)
            self._count_self()
            self.board.tick()
            since += OWN_TICK_SECONDS
            if self._store is None or self._store.running or since < pause:
                continue
            since = 0.0
            log.warning("the private Valkey does not run; starting it")
            alive = await self._try_store(self._store)
            pause = STORE_PAUSE_SECONDS[0] if alive else min(pause * 2, STORE_PAUSE_SECONDS[1])

    async def _read_totals(self) -> None:
        """What the status page shows of today and of seven days, while someone looks at it."""
        clock = self._parts.clock
        while True:
            await self.board.watched()
            began = clock.monotonic()
            try:
                self.board.totalled(await self.savings("7d", By.DAY))
            except Unreadable:
                self.board.totalled(None)
            await asyncio.sleep(max(TOTALS_SECONDS, TOTALS_REST * (clock.monotonic() - began)))

    def _count_self(self) -> None:
        self._recorder.set(metrics.WORKERS, (), sum(slot.ready for slot in self._slots))
        self._recorder.set(metrics.BUILD, (self._parts.version,), 1)
        self._exposition.apply(_OWN, self._recorder.take())


async def _all_of(running: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(running)


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

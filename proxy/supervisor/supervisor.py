"""Run the first process: open the ports, start the private Valkey and the workers, and stop them all.

It answers the admin port, adds up the workers' counts, restarts workers that end, drains on SIGTERM and SIGINT (a
second signal ends at once) and reloads the configuration on SIGHUP. It handles no request of a client.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from proxy.accounting.savings import By, SavingsReport
from proxy.accounting.totals_reader import TotalsReader, Unreadable
from proxy.admin.port import AdminPort
from proxy.admin.status import StatusBoard
from proxy.clock import Clock
from proxy.config.load import Config, ConfigError, Loaded, SecretUrl
from proxy.config.reload import taken_over
from proxy.control.channel import MESSAGE_BYTES_AT_MOST
from proxy.control.messages import Announced, Explain, WorkerReport
from proxy.control.readiness import Readiness, Stage, judge
from proxy.metrics import definitions as metrics
from proxy.metrics.agreed_labels import AgreedLabels
from proxy.metrics.exposition import Exposition
from proxy.metrics.recorder import Recorder
from proxy.supervisor import sockets
from proxy.supervisor.announcements import Announcements
from proxy.supervisor.private_store import PrivateStore, StoreKeeper
from proxy.supervisor.worker_process import Program, WorkerProcess, WorkerUnavailable
from proxy.tasks import Tasks

TICK_SECONDS = 1.0  # how often the supervisor's own gauges and the history of the status page are updated
EXPLAIN_SECONDS = 5.0
STARTS_AT_MOST = 3  # starts of one worker while no worker has ever been ready; then the supervisor gives up
TOTALS_SECONDS = 2.0  # between two readings of the totals for the status page
TOTALS_REST = 50  # pause at least this many times as long as the reading took, to leave Redis to the requests
_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_OWN = -1  # the worker number of the supervisor's own gauges

log = logging.getLogger("cairn.supervisor")


class Parts(msgspec.Struct, frozen=True):
    """Dependencies of the supervisor.

    `worker_command` starts a worker once the descriptors are appended. `reload` reads the configuration again, in a
    thread, and raises ConfigError. `private_store` makes a store from a folder and a limit in bytes; its `start`
    raises one of `store_errors`. `started` is called with the two addresses once the first worker is ready. `file`
    is the configuration file, None without one.
    """

    worker_command: tuple[str, ...]
    environment: Mapping[str, str]
    reload: Callable[[], Loaded]
    private_store: Callable[[Path, int], PrivateStore] | None
    store_errors: tuple[type[Exception], ...]
    clock: Clock
    version: str
    started: Callable[[str, str], None]
    file: Path | None = None


class Supervisor:
    """The supervisor. Call `run` once."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self._stage = Stage.STARTING
        self._recorder = Recorder()
        self._tasks = Tasks(self._count_task_failure)
        self._exposition = Exposition()
        self._labels = AgreedLabels()
        self.board = StatusBoard(self._exposition, self.readiness, parts.clock, parts.version)
        self._workers: list[WorkerProcess] = []
        self._listening: list[list[socket.socket]] = []
        self._store: StoreKeeper | None = None
        self._totals: TotalsReader | None = None
        self._admin = AdminPort(self)
        self._addresses = ("", "")
        self._stop_signal: signal.Signals | None = None
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._reload_asked = asyncio.Event()
        self._was_ready = False
        self._questions = 0
        self._announcements = Announcements()
        self._before_reload: Config | None = None

    # --- for the admin port

    @property
    def config(self) -> Config:
        """The configuration in use."""
        return self._config

    def readiness(self) -> Readiness:
        """Return whether Cairn should receive requests, and the reasons if it should not."""
        views = [worker.view() for worker in self._workers]
        return judge(self._stage, views, sorted(self._tasks.restarting))

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics page and its content type. Other work has its turn between two pieces of the page."""
        self._update_own_gauges()
        pieces, content_type = self._exposition.render(accept)
        page = []
        for piece in pieces:
            page.append(piece)
            await asyncio.sleep(0)
        return b"".join(page), content_type

    async def savings(self, since: str, by: By) -> SavingsReport:
        """Read the totals in the store; see `TotalsReader.read`."""
        if self._totals is None:
            url = self._config.redis.url
            self._totals = TotalsReader(None if url is None else url.reveal(), self._parts.clock, self._tasks)
        return await self._totals.read(since, by)

    async def explain(
        self, path: str, body: bytes, credential: bytes, headers: tuple[tuple[bytes, bytes], ...]
    ) -> tuple[int, bytes]:
        """Ask the workers in turn until one answers; returns an HTTP status and JSON."""
        if len(body) + len(path) + len(credential) > MESSAGE_BYTES_AT_MOST // 2:
            return 413, b'{"error": "the body is too large to be explained"}'
        for worker in sorted(self._workers, key=lambda each: not each.view().serves):
            self._questions += 1
            question = Explain(self._questions, path, body, credential, headers)
            with suppress(WorkerUnavailable, TimeoutError):
                answer = await worker.explain(question, EXPLAIN_SECONDS)
                return answer.status, answer.body
        return 503, b'{"error": "no worker answers"}'

    # --- called by the workers' watchers

    def worker_ready(self, number: int) -> None:
        """Note that a worker is ready; the first one ends the start."""
        log.info("worker %d is ready (pid %s)", number, self._workers[number].pid)
        if not self._was_ready:
            self._was_ready = True
            if self._stage is Stage.STARTING:
                self._stage = Stage.SERVING
                self._parts.started(*self._addresses)

    def worker_reported(self, number: int, report: WorkerReport) -> None:
        """Add what a worker counted."""
        before = self._labels.models
        self._exposition.apply(number, self._labels.settle(report.counts))
        if (models := self._labels.models) != before:
            for worker in self._workers:
                worker.name_models(models)
        self.board.add_report(number, report)

    def reload_refused(self, number: int, why: str) -> None:
        """Go back to the old configuration in all workers: a restarted worker could not start with the new one."""
        if self._before_reload is None:  # another worker refused it already
            return
        self._config, self._before_reload = self._before_reload, None
        self._note_reload(succeeded=False)
        log.error("the configuration was not reloaded: worker %d: %s", number, why)
        for worker in self._workers:
            worker.configure(self._config)

    def worker_announced(self, number: int, line: Announced) -> None:
        """Log what a worker found at a replica, unless another worker found the same."""
        self._announcements.add(number, line, self._parts.clock.monotonic())

    def worker_died(self, number: int, starts: int) -> None:
        """Count the restart; give up if no worker was ever ready."""
        self._recorder.inc(metrics.WORKER_RESTARTS)
        self._exposition.forget(number)
        self.board.remove_worker(number)
        if not self._was_ready and starts >= STARTS_AT_MOST:
            log.error("workers end before they are ready; giving up")
            self._stop.set()

    def heir_of(self, number: int) -> WorkerProcess | None:
        """Return the least busy other worker that responds, for connections of one that ended or is silent."""
        views = [(worker.view(), worker) for worker in self._workers if worker.number != number]
        serving = [
            (view.report.in_flight if view.report else 0, worker) for view, worker in views if view.is_responsive
        ]
        return min(serving, key=lambda each: each[0])[1] if serving else None

    # --- from start to end

    async def run(self) -> int:
        """Serve until told to stop. Return the exit code: 0 after a drain, 1 if it was cut short or serving never
        began.

        Raises:
            ListenError: a port cannot be opened; nothing was started.
        """
        self._handle_signals()
        try:
            return await self._run()
        finally:
            # the loop will no longer handle them: one that comes now would end the process with another exit code
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    async def _run(self) -> int:
        sockets.raise_descriptor_limit()
        server, admin = self._config.server, self._config.admin
        clock = self._parts.clock
        self._listening = await sockets.when_free(
            partial(sockets.open_for_workers, server.host, server.port, server.workers, server.backlog), clock
        )
        try:
            admin_socket = await sockets.when_free(partial(sockets.open_admin, admin.host, admin.port), clock)
        except sockets.ListenError:
            sockets.close_all(self._listening)
            raise
        self._addresses = (_address(self._listening[0][0]), _address(admin_socket))
        self.board.base_url = f"{self._addresses[0]}/v1"
        self.board.example_model = _a_model(self._config)
        try:
            await self._admin.start(admin_socket)
            await self._start_store()
            return await self._serve()
        finally:
            await self._close()

    async def _serve(self) -> int:
        self._note_reload(succeeded=True)
        self._workers = [self._new_worker(number) for number in range(len(self._listening))]
        running = [self._tasks.start(worker.run(), f"worker-{worker.number}") for worker in self._workers]
        self._tasks.keep(self._tick, "tick")
        self._tasks.keep(self._reload_when_asked, "reload")
        self._tasks.keep(self._read_totals, "totals")
        if self._store is not None:
            self._tasks.keep(self._store.run, "private-store")
        await self._stop.wait()
        await self._drain(running)
        return 0 if self._stop_signal is not None and not self._stop_now.is_set() else 1

    def _new_worker(self, number: int) -> WorkerProcess:
        program = Program(self._parts.worker_command, self._parts.environment)
        return WorkerProcess(number, program, self._listening[number], self._config, self, self._parts.clock)

    async def _drain(self, running: Sequence[asyncio.Task[None]]) -> None:
        """Become not ready, keep accepting until load balancers notice, then let requests finish."""
        self._stage = Stage.DRAINING
        server = self._config.server
        if self._stop_signal is signal.SIGTERM and self._was_ready:
            log.info("draining: still accepting for %.1f s", server.drain_accept_seconds)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop_now.wait(), server.drain_accept_seconds)
        if not self._stop_now.is_set():
            log.info("draining: requests may finish within %.0f s", server.drain_seconds)
        for worker in self._workers:
            worker.drain(server.drain_seconds)
        # closes only this process's copies: the workers accept queued connections until they close theirs
        sockets.close_all(self._listening)
        ended = self._tasks.start(_all_of(running), "all-workers")
        at_once = self._tasks.start(self._stop_now.wait(), "second-signal")
        await asyncio.wait({ended, at_once}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            log.info("ending at once: a second signal came")
            for worker in self._workers:
                worker.kill()
            await ended

    async def _close(self) -> None:
        await self._tasks.close()
        await self._admin.close()
        if self._totals is not None:
            await self._totals.close()
        sockets.close_all(self._listening)
        if self._store is not None:
            await self._store.stop()

    # --- signals

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._handle_stop_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload_asked.set)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # those that came during the start have waited

    def _handle_stop_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            self._stop_now.set()
            return
        self._stop_signal = number
        self._stage = Stage.DRAINING
        self._stop.set()

    async def _reload_when_asked(self) -> None:
        while True:
            await self._reload_asked.wait()
            self._reload_asked.clear()  # a signal that comes from now on asks for another one
            await self._reload()

    async def _reload(self) -> None:
        """Read the configuration again and apply it, except for settings that only a restart can change.

        It is read in a thread: reading a thousand replicas takes half a second, in which probes would wait.
        """
        try:
            loaded = await asyncio.to_thread(self._parts.reload)
            config, waiting = taken_over(self._config, loaded.config, own_store=self._store is not None)
        except ConfigError as error:
            self._note_reload(succeeded=False)
            # an error without the path of a setting names the file itself, or a variable
            file = f"{self._parts.file}: " if self._parts.file is not None and error.is_in_file else ""
            log.error("the configuration was not reloaded: %s%s", file, error.message)  # noqa: TRY400 - no defect here
            return
        self._before_reload, self._config = self._config, config
        self.board.example_model = _a_model(config)
        for warning in loaded.warnings:
            log.warning("%s", warning)
        for path in waiting:
            log.warning("%s takes effect only after a restart", path)
        for worker in self._workers:
            worker.configure(self._config)
        self._note_reload(succeeded=True)
        log.info("the configuration was reloaded")

    def _note_reload(self, *, succeeded: bool) -> None:
        self._recorder.set(metrics.RELOAD_SUCCEEDED, (), float(succeeded))
        if succeeded:
            self._recorder.set(metrics.RELOADED_AT, (), self._parts.clock.unix())
        else:
            self._recorder.inc(metrics.RELOADS_FAILED)

    # --- background work

    async def _start_store(self) -> None:
        """Start the private Valkey if no Redis is configured. If that fails, Cairn serves without it, less well."""
        redis = self._config.redis
        if redis.url is not None or redis.folder is None or self._parts.private_store is None:
            return
        store = self._parts.private_store(Path(redis.folder), redis.max_memory_bytes)
        self._store = StoreKeeper(store, self._parts.store_errors, self._parts.clock)
        starting = self._tasks.start(self._store.start(), "private-store-start")
        stopped = self._tasks.start(self._stop.wait(), "stopped-early")
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if self._stop.is_set():
            self._store.give_up()
        await starting
        stopped.cancel()
        redis = msgspec.structs.replace(redis, url=SecretUrl(self._store.url))
        self._config = msgspec.structs.replace(self._config, redis=redis)

    async def _tick(self) -> None:
        """Update the supervisor's own gauges and the history of the status page every second."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._update_own_gauges()
            self._exposition.pass_time(self._parts.clock.monotonic())
            self.board.take_sample()

    async def _read_totals(self) -> None:
        """Read the totals of today and of seven days for the status page, while somebody is viewing it."""
        clock = self._parts.clock
        while True:
            if not self.board.viewers:
                self.board.forget_totals()
            await self.board.wait_for_viewer()
            started_seconds = clock.monotonic()
            try:
                self.board.set_totals(await self.savings("7d", By.DAY))
            except Unreadable:
                self.board.set_totals(None)
            await asyncio.sleep(max(TOTALS_SECONDS, TOTALS_REST * (clock.monotonic() - started_seconds)))

    def _update_own_gauges(self) -> None:
        self._recorder.set(metrics.WORKERS, (), sum(worker.ready for worker in self._workers))
        self._recorder.set(metrics.BUILD, (self._parts.version,), 1)
        self._exposition.apply(_OWN, self._recorder.take())

    def _count_task_failure(self, name: str) -> None:
        self._recorder.inc(metrics.TASK_FAILURES, (name,))


def _a_model(config: Config) -> str:
    """Return a model that the configuration names, or a placeholder."""
    names = (name for pool in config.pools for name in pool.models if not set(name) & set("*?["))
    return next(names, "MODEL")


async def _all_of(running: Sequence[asyncio.Task[None]]) -> None:
    await asyncio.wait(running)


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""Keep one worker process running: start it, read its reports, restart it when it ends, and stop it on request.

Everything that happens to the worker is passed on through `Watcher`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from asyncio.subprocess import DEVNULL, Process, create_subprocess_exec
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Protocol

import msgspec

from proxy.backoff import ExponentialBackoff
from proxy.clock import Clock
from proxy.config.schema import Config
from proxy.control.channel import Channel, ControlBroken
from proxy.control.handover import hand_over
from proxy.control.messages import (
    Announced,
    Configure,
    Drain,
    Explain,
    Explained,
    FromWorker,
    Heartbeat,
    NameModels,
    Ready,
    ReloadRefused,
    WorkerReport,
)
from proxy.control.readiness import RESPONSIVE_SECONDS, WorkerView
from proxy.supervisor.relief import Heir, Relief
from proxy.supervisor.silence import SILENCE_LIMIT_SECONDS, WorkerSilence, cpu_wait_seconds
from proxy.supervisor.sockets import ListenError, is_shared, renewed
from proxy.tasks import Tasks

START_LIMIT_SECONDS = 60.0  # a worker that is not ready by then is killed
STABLE_SECONDS = 10.0  # uptime after which the back-off starts over
DEATHS_TO_REPORT = 3  # in a row, each before the worker was stable; then readiness says so
PAUSE_FIRST_SECONDS = 0.1
PAUSE_MOST_SECONDS = 5.0
KILL_MARGIN_SECONDS = 2.0  # after the deadline of a drain, for the worker's own clean-up
FINAL_READ_SECONDS = 1.0  # to read what a worker had sent before it ended
SILENCE_CHECK_SECONDS = 0.25

log = logging.getLogger("cairn.supervisor")


class WorkerUnavailable(Exception):
    """There is no worker, or it ended before it answered."""


class Watcher(Protocol):
    """Receives the events of a worker; `number` identifies the worker."""

    def worker_ready(self, number: int) -> None:
        """Note that the worker accepts requests."""

    def worker_reported(self, number: int, report: WorkerReport) -> None:
        """Take a report of the worker."""

    def reload_refused(self, number: int, why: str) -> None:
        """Note that the worker cannot use a new configuration."""

    def worker_announced(self, number: int, line: Announced) -> None:
        """Take a log line of the worker, which others may send as well."""

    def worker_died(self, number: int, starts: int) -> None:
        """Note that the worker ended unexpectedly; it has been started `starts` times."""

    def heir_of(self, number: int) -> Heir | None:
        """Return another worker that serves, for connections of this one; None if there is none."""


class Program(msgspec.Struct, frozen=True):
    """The program of a worker; descriptors and the parent's process id are appended to `command`."""

    command: Sequence[str]
    environment: Mapping[str, str]


class WorkerProcess:
    """Worker number `number`, which listens on `sockets`; one process at a time.

    It replaces sockets in that list if its process ends while other workers serve.
    """

    def __init__(
        self,
        number: int,
        program: Program,
        sockets: list[socket.socket],
        config: Config,
        watcher: Watcher,
        clock: Clock,
    ) -> None:
        self.number = number
        self.ready = False
        self._program = program
        self._sockets = sockets
        self._config = config
        self._watcher = watcher
        self._clock = clock
        self._tasks = Tasks()
        self._backoff = ExponentialBackoff(PAUSE_FIRST_SECONDS, PAUSE_MOST_SECONDS)
        self._models: tuple[str, ...] = ()
        self._starts = 0
        self._deaths = 0  # in a row
        self._started_seconds = 0.0  # monotonic
        self._ending = asyncio.Event()
        self._drain_deadline_seconds = 0.0  # monotonic
        self._process: Process | None = None
        self._channel: Channel[FromWorker] | None = None
        self._handover: socket.socket | None = None
        self._relief = Relief(number, sockets, lambda: watcher.heir_of(number))
        self._report: WorkerReport | None = None
        self._message_seconds = 0.0  # monotonic; of the last message
        self._questions: dict[int, asyncio.Future[Explained]] = {}

    @property
    def pid(self) -> int | None:
        """The process id of the running worker."""
        return self._process.pid if self._process is not None else None

    def view(self) -> WorkerView:
        """Return the worker's current state."""
        now_seconds = self._clock.monotonic()
        silent_seconds = now_seconds - self._message_seconds if self.ready else 0.0
        is_stable = self.ready and now_seconds - self._started_seconds >= STABLE_SECONDS
        return WorkerView(
            self.number,
            self.ready,
            self._report,
            silent_seconds=silent_seconds,
            deaths=0 if is_stable or self._deaths < DEATHS_TO_REPORT else self._deaths,
        )

    async def run(self) -> None:
        """Keep a worker running until `drain` or `kill` has ended it."""
        try:
            while not self._ending.is_set():
                self._started_seconds = self._clock.monotonic()
                how = await self._run_once()
                if self._ending.is_set():
                    return
                was_stable = self._clock.monotonic() - self._started_seconds >= STABLE_SECONDS
                if was_stable:
                    self._backoff.reset()
                self._deaths = 1 if was_stable else self._deaths + 1
                if self._deaths == DEATHS_TO_REPORT:
                    log.error("worker %d keeps ending within %.0f s of its start", self.number, STABLE_SECONDS)
                self._leave_port()
                pause_seconds = self._backoff.next_seconds()
                log.warning("worker %d %s; starting another in %.1f s", self.number, how, pause_seconds)
                self._watcher.worker_died(self.number, self._starts)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), pause_seconds)
        finally:
            await self._tasks.close()

    def _leave_port(self) -> None:
        """While other workers serve, take no connections until the next process listens.

        The kernel gives connections to every socket that listens, whether or not its worker runs. They would wait for
        a successor, which takes a moment, or for ever if it keeps ending. Those that wait already go to the others.
        If no other worker serves, they wait for whichever starts first.
        """
        if self._watcher.heir_of(self.number) is None or not all(map(is_shared, self._sockets)):
            return
        lost = 0

        def pass_on(connection: socket.socket) -> None:
            nonlocal lost
            heir = self._watcher.heir_of(self.number)
            lost += heir is None or not heir.adopt(connection)
            connection.close()

        for at, end in enumerate(self._sockets):
            try:
                self._sockets[at] = renewed(end, pass_on)
            except ListenError as error:  # the old one is as good
                log.warning("worker %d: %s", self.number, error.message)
        if lost:
            log.warning("worker %d: %d connections that waited for it were closed", self.number, lost)

    def adopt(self, connection: socket.socket) -> bool:
        """Serve a connection that another worker should have accepted; see `Heir`."""
        return self._handover is not None and hand_over(self._handover, connection)

    def configure(self, config: Config) -> None:
        """Use `config` from now on, in the running worker and in its successors."""
        self._config = config
        if self._channel is not None:
            self._channel.post(Configure(config))

    def name_models(self, models: tuple[str, ...]) -> None:
        """Count `models` under their own names from now on, in the running worker and in its successors."""
        self._models = models
        if self._channel is not None:
            self._channel.post(NameModels(models))

    def drain(self, seconds: float) -> None:
        """Let running requests finish within `seconds` and start no other worker; `run` returns afterwards."""
        now_seconds = self._clock.monotonic()
        self._drain_deadline_seconds = now_seconds + seconds
        if not self.ready:
            self._message_seconds = now_seconds  # from now on it has nothing to do that takes long
        self._ending.set()
        self._relief.stop()
        if self._channel is not None:
            self._send_drain(self._channel)

    def kill(self) -> None:
        """End the worker now."""
        self._ending.set()
        self._kill()

    async def explain(self, question: Explain, limit_seconds: float) -> Explained:
        """Ask the worker.

        Raises:
            WorkerUnavailable: there is no worker, or it ended meanwhile.
            TimeoutError: no answer came within `limit_seconds`.
        """
        if self._channel is None or not self.ready:
            raise WorkerUnavailable
        answer: asyncio.Future[Explained] = asyncio.get_running_loop().create_future()
        self._questions[question.id] = answer
        try:
            async with asyncio.timeout(limit_seconds):
                await self._channel.send(question)
                return await answer
        except OSError as error:
            raise WorkerUnavailable from error
        finally:
            self._questions.pop(question.id, None)

    # --- one process

    async def _run_once(self) -> str:
        """Start a worker and wait for its end; return a description of how it ended."""
        self._starts += 1
        try:
            (ours, theirs), (handover, their_handover) = socket.socketpair(), socket.socketpair()
        except OSError as error:  # out of descriptors
            return f"could not be started: {error.strerror}"
        handover.setblocking(False)
        try:
            self._process = process = await self._spawn(theirs, their_handover)
        except OSError as error:  # out of processes, memory or descriptors
            ours.close()
            handover.close()
            return f"could not be started: {error.strerror}"
        finally:
            theirs.close()
            their_handover.close()
        self._handover = handover
        start_limit = asyncio.get_running_loop().call_later(START_LIMIT_SECONDS, self._kill_unless_ready, process)
        receiving: asyncio.Task[None] | None = None
        watching = self._tasks.start(self._watch_silence(process.pid), f"worker-{self.number}-silence")
        try:
            self._channel = await Channel.open(ours, FromWorker)
            receiving = self._tasks.start(self._receive(self._channel), f"worker-{self.number}")
            self._channel.post(Configure(self._config))
            if self._models:
                self._channel.post(NameModels(self._models))
            if self._ending.is_set():
                self._send_drain(self._channel)
            code = await process.wait()
        finally:
            start_limit.cancel()
            watching.cancel()
            self._relief.stop()
            self._kill()
            await self._clear_up(receiving)
        return f"(pid {process.pid}) ended with {code}"

    async def _spawn(self, control: socket.socket, handover: socket.socket) -> Process:
        listening = [each.fileno() for each in self._sockets]
        return await create_subprocess_exec(
            *self._program.command,
            *("--control", str(control.fileno())),
            *("--handover", str(handover.fileno())),
            *("--listen", ",".join(map(str, listening))),
            *("--parent", str(os.getpid())),
            pass_fds=[control.fileno(), handover.fileno(), *listening],
            env=dict(self._program.environment),
            stdin=DEVNULL,
            process_group=0,  # a terminal's Ctrl-C or end would kill a worker that does not ignore signals yet
        )

    async def _receive(self, channel: Channel[FromWorker]) -> None:
        try:
            while (message := await channel.receive()) is not None:
                self._message_seconds = self._clock.monotonic()
                self._handle(message)
        except ControlBroken as error:
            log.warning("worker %d sent an invalid message; killing it: %s", self.number, error)
            self._kill()

    def _handle(self, message: FromWorker) -> None:
        if isinstance(message, WorkerReport):
            self._report = message
            self._watcher.worker_reported(self.number, message)
        elif isinstance(message, Ready):
            self.ready = True
            self._watcher.worker_ready(self.number)
        elif isinstance(message, Heartbeat):
            pass  # only the time of the message matters
        elif isinstance(message, Explained):
            answer = self._questions.get(message.id)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif isinstance(message, Announced):
            self._watcher.worker_announced(self.number, message)
        else:
            assert isinstance(message, ReloadRefused)  # noqa: S101 - the union has no other
            self._watcher.reload_refused(self.number, message.why)

    async def _watch_silence(self, pid: int) -> None:
        """Kill a worker that is ready, or to end, and sends nothing: its loop is blocked, or the process is stopped.

        Long before that is certain, others get its new connections.
        """
        checked_seconds, silence = self._clock.monotonic(), WorkerSilence()
        while True:
            await asyncio.sleep(SILENCE_CHECK_SECONDS)
            now_seconds = self._clock.monotonic()
            if now_seconds - checked_seconds > 2 * SILENCE_CHECK_SECONDS:
                # this process was stopped or blocked itself: the worker's messages may still be unread
                self._message_seconds = now_seconds
            checked_seconds = now_seconds
            is_awaited = self.ready or self._ending.is_set()  # it may start for longer than it may be silent
            if silence.is_frozen(now_seconds, self._message_seconds, cpu_wait_seconds(pid)) and is_awaited:
                log.error("worker %d has not responded for %.0f s; killing it", self.number, SILENCE_LIMIT_SECONDS)
                self._kill()
                return
            if self.ready and now_seconds - self._message_seconds >= RESPONSIVE_SECONDS:
                if not self._ending.is_set():
                    self._relief.start()
            else:
                self._relief.stop()

    async def _clear_up(self, receiving: asyncio.Task[None] | None) -> None:
        if receiving is not None:
            await asyncio.wait({receiving}, timeout=FINAL_READ_SECONDS)
            receiving.cancel()
        if self._channel is not None:
            self._channel.close()
        if self._handover is not None:
            self._handover.close()
        self.ready, self._process, self._channel, self._handover, self._report = False, None, None, None, None
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(WorkerUnavailable())

    def _send_drain(self, channel: Channel[FromWorker]) -> None:
        left_seconds = max(0.0, self._drain_deadline_seconds - self._clock.monotonic())
        channel.post(Drain(left_seconds))
        asyncio.get_running_loop().call_later(left_seconds + KILL_MARGIN_SECONDS, self._kill)

    def _kill_unless_ready(self, process: Process) -> None:
        if not self.ready and process is self._process:
            log.error("worker %d is not ready after %.0f s; killing it", self.number, START_LIMIT_SECONDS)
            self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

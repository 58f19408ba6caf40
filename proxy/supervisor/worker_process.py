"""A place for one worker: started, listened to, started again when it dies, ended when told.

It must not know HTTP, signals or what is counted; whoever owns it hears of reports and deaths through `Watcher`.
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

from proxy.clock import Clock
from proxy.config.schema import Config
from proxy.control.channel import (
    Channel,
    Configure,
    ControlBroken,
    Drain,
    Explain,
    Explained,
    FromWorker,
    Ready,
    Refused,
    WorkerReport,
)
from proxy.control.readiness import WorkerView
from proxy.tasks import Tasks

START_LIMIT_SECONDS = 60.0  # a worker that is not ready by then is taken for stuck
STABLE_SECONDS = 10.0  # who lived this long died of something new: the back-off begins again
PAUSE_FIRST_SECONDS = 0.1
PAUSE_LAST_SECONDS = 5.0  # connections that the kernel gave to this slot wait this long at most
KILL_MARGIN_SECONDS = 2.0  # after the deadline of a drain, for the worker's own clean-up
LAST_WORDS_SECONDS = 1.0  # to read what a dead worker had sent

log = logging.getLogger("cairn.supervisor")


class WorkerUnavailable(Exception):
    """The worker went, or is not there, before it answered."""


class Backoff:
    """How long to wait before the next start: longer each time, from the beginning after a stable life."""

    def __init__(self) -> None:
        self._pause_seconds = PAUSE_FIRST_SECONDS

    def after(self, lived_seconds: float) -> float:
        """The pause after a life of `lived_seconds`."""
        if lived_seconds >= STABLE_SECONDS:
            self._pause_seconds = PAUSE_FIRST_SECONDS
        pause = self._pause_seconds
        self._pause_seconds = min(pause * 2, PAUSE_LAST_SECONDS)
        return pause


class Watcher(Protocol):
    """Who hears what happens in a slot."""

    def ready(self, number: int) -> None:
        """The worker accepts requests."""

    def reported(self, number: int, report: WorkerReport) -> None:
        """It counted this since the last time."""

    def refused(self, number: int, why: str) -> None:
        """It did not take over a new configuration."""

    def died(self, number: int, lives: int) -> None:
        """It ended unasked; `lives` is how many there were in this slot."""


class WorkerProcess:
    """One worker at a time, number `number`, listening on `sockets`."""

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        sockets: Sequence[socket.socket],
        config: Config,
        watcher: Watcher,
        clock: Clock,
    ) -> None:
        self.number = number
        self.ready = False
        self._command = command
        self._environment = environment
        self._sockets = sockets
        self._config = config
        self._watcher = watcher
        self._clock = clock
        self._tasks = Tasks()
        self._backoff = Backoff()
        self._lives = 0
        self._ending = asyncio.Event()
        self._deadline_seconds = 0.0  # monotonic; of the drain
        self._process: Process | None = None
        self._channel: Channel[FromWorker] | None = None
        self._report: WorkerReport | None = None
        self._reported_seconds = 0.0
        self._questions: dict[int, asyncio.Future[Explained]] = {}

    @property
    def pid(self) -> int | None:
        """The living worker's process id."""
        return self._process.pid if self._process is not None else None

    def view(self) -> WorkerView:
        """How the worker stands now."""
        age = None if self._report is None else self._clock.monotonic() - self._reported_seconds
        return WorkerView(self.number, self.ready, self._report, age)

    async def run(self) -> None:
        """Keep a worker alive until `drain` or `kill` ended it."""
        try:
            while not self._ending.is_set():
                born = self._clock.monotonic()
                how = await self._live_once()
                if self._ending.is_set():
                    return
                pause = self._backoff.after(self._clock.monotonic() - born)
                log.warning("worker %d %s; another starts in %.1f s", self.number, how, pause)
                self._watcher.died(self.number, self._lives)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), pause)
        finally:
            await self._tasks.close()

    def configure(self, config: Config) -> None:
        """From now on work by `config`; the living worker and its successors."""
        self._config = config
        if self._channel is not None:
            self._channel.post(Configure(config))

    def drain(self, seconds: float) -> None:
        """Let what runs end within `seconds`, and start no other worker; `run` returns when it is over."""
        self._deadline_seconds = self._clock.monotonic() + seconds
        self._ending.set()
        if self._channel is not None:
            self._tell_to_drain(self._channel)

    def kill(self) -> None:
        """End it now."""
        self._ending.set()
        self._kill()

    async def explain(self, question: Explain, limit_seconds: float) -> Explained:
        """Ask the worker; raises `WorkerUnavailable` where there is none, or TimeoutError."""
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

    # --- one life

    async def _live_once(self) -> str:
        """Start a worker and stay with it to its end; gives in words how it ended."""
        self._lives += 1
        ours, theirs = socket.socketpair()
        try:
            self._process = process = await self._spawn(theirs)
        except OSError as error:  # out of processes, memory or descriptors
            ours.close()
            return f"could not start: {error.strerror}"
        finally:
            theirs.close()
        stuck = asyncio.get_running_loop().call_later(START_LIMIT_SECONDS, self._kill_if_stuck, process)
        listening: asyncio.Task[None] | None = None
        try:
            self._channel = await Channel.open(ours, FromWorker)
            listening = self._tasks.start(self._listen(self._channel), f"worker-{self.number}")
            self._channel.post(Configure(self._config))
            if self._ending.is_set():
                self._tell_to_drain(self._channel)
            code = await process.wait()
        finally:
            stuck.cancel()
            self._kill()
            await self._clear_up(listening)
        return f"(pid {process.pid}) ended with {code}"

    async def _spawn(self, control: socket.socket) -> Process:
        listening = [each.fileno() for each in self._sockets]
        return await create_subprocess_exec(
            *self._command,
            *("--control", str(control.fileno())),
            *("--listen", ",".join(map(str, listening))),
            *("--parent", str(os.getpid())),
            pass_fds=[control.fileno(), *listening],
            env=dict(self._environment),
            stdin=DEVNULL,
        )

    async def _listen(self, channel: Channel[FromWorker]) -> None:
        try:
            while (message := await channel.receive()) is not None:
                self._hear(message)
        except ControlBroken as error:
            log.warning("worker %d speaks nonsense and is ended: %s", self.number, error)
            self._kill()

    def _hear(self, message: FromWorker) -> None:
        if isinstance(message, WorkerReport):
            self._report, self._reported_seconds = message, self._clock.monotonic()
            self._watcher.reported(self.number, message)
        elif isinstance(message, Ready):
            self.ready = True
            self._watcher.ready(self.number)
        elif isinstance(message, Explained):
            answer = self._questions.get(message.id)
            if answer is not None and not answer.done():
                answer.set_result(message)
        else:
            assert isinstance(message, Refused)  # noqa: S101 - the union has no other
            self._watcher.refused(self.number, message.why)

    async def _clear_up(self, listening: asyncio.Task[None] | None) -> None:
        if listening is not None:
            await asyncio.wait({listening}, timeout=LAST_WORDS_SECONDS)
            listening.cancel()
        if self._channel is not None:
            self._channel.close()
        self.ready, self._process, self._channel, self._report = False, None, None, None
        for answer in self._questions.values():
            if not answer.done():
                answer.set_exception(WorkerUnavailable())

    def _tell_to_drain(self, channel: Channel[FromWorker]) -> None:
        left = max(0.0, self._deadline_seconds - self._clock.monotonic())
        channel.post(Drain(left))
        asyncio.get_running_loop().call_later(left + KILL_MARGIN_SECONDS, self._kill)

    def _kill_if_stuck(self, process: Process) -> None:
        if not self.ready and process is self._process:
            log.error("worker %d is not ready after %.0f s and is ended", self.number, START_LIMIT_SECONDS)
            self._kill()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

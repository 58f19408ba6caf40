"""A supervisor in a process of its own, with tiny workers, and the means to watch it from a test."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import queue
import re
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 60.0  # bounds the time of a failure; nothing here takes a second on an idle machine


def main(file: str, mode: str, store: str) -> int:
    """The process itself: what `cairn serve` does, with the tiny worker."""
    from proxy.__main__ import hold_signals, leave_out_unused

    leave_out_unused()
    hold_signals(["serve"])
    from cache import EmbeddedError, EmbeddedValkey
    from proxy import logs
    from proxy.clock import SystemClock
    from proxy.config.load import Loaded, load, process_environment, secrets_of, worker_environment
    from proxy.supervisor.supervisor import Parts, Supervisor

    environ, clock = process_environment(), SystemClock()

    def read() -> Loaded:
        loaded = load(Path(file), environ)
        log.redact(secrets_of(loaded.config))
        return loaded

    def started(address: str, admin: str) -> None:
        os.write(1, f"started {address} {admin}\n".encode())  # in one piece, among the lines of the log

    config = load(Path(file), environ).config
    parts = Parts(
        worker_command=(sys.executable, "-m", "tests.support.tiny_worker", mode),
        environment=worker_environment(config, environ),
        reload=read,
        private_store=(lambda folder, size: EmbeddedValkey(folder, clock=clock)) if store == "store" else None,
        store_errors=(EmbeddedError,),
        clock=clock,
        version="9.9.9",
        started=started,
        file=Path(file),
    )
    log = logs.set_up(config.log.level.value, secrets_of(config))

    async def run() -> int:
        return await Supervisor(config, parts).run()

    try:
        return asyncio.run(run())
    finally:
        log.stop()


class Supervised:
    """That process, watched by the lines that it writes. Use as a context: it leaves nothing behind."""

    def __init__(
        self, file: Path, mode: str = "serve", store: str = "none", env: dict[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.supervised", str(file), mode, store],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},  # noqa: TID251
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self.seen: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.address = self.admin = ""

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Supervised:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait(LIMIT_SECONDS)
        if self._process.stdout is not None:
            self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line that `pattern` is found in."""
        while True:
            try:
                line = self._lines.get(timeout=LIMIT_SECONDS)
            except queue.Empty:
                line = ""
            self.seen.append(line)
            if found := re.search(pattern, line):
                return found
            assert line, f"no line like {pattern!r} came: {self.seen}"

    def workers_ready(self, count: int) -> None:
        """Wait until this many have reported that they are ready, before or after it printed where it serves."""
        while len(re.findall("worker . is ready", "".join(self.seen))) < count:
            self.line("worker . is ready")

    def started(self) -> Supervised:
        """Wait until it serves."""
        found = self.line(r"^started (\S+) (\S+)")
        self.address, self.admin = found[1], found[2]
        return self

    def get(self, path: str, admin: bool = False) -> tuple[int, str]:
        """Status and body of a GET."""
        return self.ask("GET", path, admin=admin)

    def ask(
        self, method: str, path: str, body: bytes | None = None, admin: bool = False, headers: dict | None = None
    ) -> tuple[int, str]:
        """Status and body of a request on a connection of its own."""
        connection = self.connect(admin)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def connect(self, admin: bool = False) -> http.client.HTTPConnection:
        """An open connection."""
        parts = urlsplit(self.admin if admin else self.address)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=LIMIT_SECONDS)
        connection.connect()
        return connection

    def hold(self) -> http.client.HTTPConnection:
        """A request that runs until it is released; comes back once it is known to run."""
        connection = self.connect()
        connection.request("GET", "/hold")
        while '"in_flight":1' not in self.get("/readyz", admin=True)[1]:
            pass  # bounded by the test's own time limit; each turn is a round trip
        return connection

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def code(self) -> int:
        """Wait for its end and give its exit code."""
        return self._process.wait(LIMIT_SECONDS)


def wait_gone(pid: int) -> None:
    """Wait until the process `pid`, no child of ours, has ended. Linux."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], LIMIT_SECONDS)[0], f"process {pid} lives on"
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""The system under test: replicas and proxies in separate processes, and a watch over each proxy's readiness."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.common import cpu, sockets
from benchmarks.common.metrics_page import parse
from benchmarks.common.processes import get
from tests.chaos.load import CLOCK
from tests.support.valkey import free_port

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.05
CLOCK_FILE = "clock"  # in the stack's folder: by how much the wall clock is shifted
DAY_SECONDS = 86_400
HALF_PAST_ELEVEN_SECONDS = DAY_SECONDS - 1800
WORKERS = 2
REPLICAS = 3
FIRST_BYTE_SECONDS = IDLE_SECONDS = 2.0
CHECK_SECONDS = SILENCE_SECONDS = 1.0


class Failed(Exception):
    """The stack did not do what the play depends on; the message describes it."""


class Program:
    """A process of this stack, with what it wrote in a file."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, changes: Mapping[str, str]) -> None:
        self.name = name
        self._command = list(command)
        self._log = folder / f"{name}.log"
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **changes}  # noqa: TID251 - children inherit
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the last start."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process; what it writes is appended."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once and wait for its end."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    async def code(self) -> int:
        """Wait for its end; returns the exit code."""
        assert self._process is not None
        return await asyncio.to_thread(self._process.wait, STOP_SECONDS)

    def written(self) -> str:
        """Everything that it wrote."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""


class Seen(NamedTuple):
    """One look at /readyz."""

    at: float  # monotonic seconds
    status: str
    reasons: tuple[str, ...]


class Surroundings(NamedTuple):
    """The environment of the proxies' processes: variables, and the limit of open files (0 for the machine's)."""

    environment: Mapping[str, str]
    open_files: int = 0


class Proxy(Program):
    """One Cairn with its supervisor and workers."""

    def __init__(self, name: str, folder: Path, tree: Mapping[str, Any], surroundings: Surroundings) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.file = folder / f"{name}.yaml"
        self.tree = dict(tree)
        self.seen: list[Seen] = []
        command = [sys.executable, "-m", "proxy", "serve", "--config", str(self.file)]
        if surroundings.open_files:
            command = ["sh", "-c", f'ulimit -n {surroundings.open_files} && exec "$@"', "sh", *command]
        super().__init__(name, command, folder, surroundings.environment)
        self.configure(self.tree)

    def configure(self, tree: Mapping[str, Any]) -> None:
        """Write the configuration file."""
        server = {
            "port": self.port,
            "workers": WORKERS,
            "drain_accept_seconds": 0.2,
            "drain_seconds": 10,
            **tree.get("server", {}),
        }
        sections = {**tree, "server": server, "admin": {"port": self.admin_port}, "log": {"access": False}}
        self.file.write_text(yaml.safe_dump(sections))

    def worker_pids(self) -> list[int]:
        """The workers that run now."""
        family = [process.pid for process in cpu.tree(self.pid)]
        return [pid for pid in family if b"--control" in _command_line(pid)]

    def client_ports(self, pids: Sequence[int]) -> set[int]:
        """The ports of the clients whose connections these workers have accepted."""
        found = (each for pid in pids for each in sockets.tcp_sockets(pid))
        return {each.remote_port for each in found if each.local_port == self.port and each.remote_port}

    async def watch(self) -> None:
        """Note the readiness until cancelled."""
        while True:
            self.seen.append(await self._look())
            await asyncio.sleep(POLL_SECONDS)

    async def _look(self) -> Seen:
        try:
            _, body = await get(self.admin_port, "/readyz", 2.0)
            told = json.loads(body)
            status, reasons = told["status"], tuple(told["reasons"])
        except (OSError, EOFError, TimeoutError, ValueError):
            status, reasons = "silent", ("the admin port does not answer",)
        return Seen(CLOCK.monotonic(), status, reasons)

    async def page(self) -> dict[str, float]:
        """Return the metrics by series."""
        return parse((await get(self.admin_port, "/metrics"))[1].decode())

    async def savings(self) -> dict[str, Any]:
        """Return the report of all totals in Redis, by day. Raises Failed if they cannot be read."""
        status, body = await get(self.admin_port, "/savings?by=day")
        if status != 200:
            raise Failed(f"{self.name}: /savings answers {status}: {body[:200]!r}")
        report: dict[str, Any] = json.loads(body)
        return report


class Stack:
    """Everything that runs in one scenario."""

    def __init__(self, folder: Path, redis: Mapping[str, Any], proxies: int, surroundings: Surroundings) -> None:
        self.folder = folder
        self.replica_ports = [free_port() for _ in range(REPLICAS)]
        self.replicas = [
            Program(f"replica-{n}", [sys.executable, "-m", "tests.chaos.replica", str(port)], folder, {})
            for n, port in enumerate(self.replica_ports)
        ]
        tree = {
            "redis": dict(redis),
            "pools": [self.pool(REPLICAS)],
            "contexts": {"warm_replicas": 0},  # so that only clients' requests are counted
            "upstream": {
                "first_byte_seconds": FIRST_BYTE_SECONDS,
                "idle_seconds": IDLE_SECONDS,
                "connect_seconds": 1,
                "check_seconds": CHECK_SECONDS,
                "silence_seconds": SILENCE_SECONDS,
                "comment_seconds": 0,
            },
        }
        names = [f"proxy-{n}" for n in range(proxies)]
        self.proxies = [Proxy(name, folder, tree, surroundings) for name in names]
        self._watches: list[asyncio.Task[None]] = []

    @property
    def proxy(self) -> Proxy:
        """The first proxy."""
        return self.proxies[0]

    def pool(self, replicas: int) -> dict[str, Any]:
        """Return the pool's configuration with the first `replicas` replicas."""
        named = [
            {"name": f"r{n}", "url": f"http://127.0.0.1:{port}"}
            for n, port in enumerate(self.replica_ports[:replicas])
        ]
        return {"name": "engines", "replicas": named}

    async def start(self) -> None:
        """Start everything and return once every proxy is ready. Raises Failed."""
        for replica in self.replicas:
            replica.start()
        for port in self.replica_ports:
            await until(lambda port=port: _answers(port), START_SECONDS, "a replica answers")  # type: ignore[misc]
        for proxy in self.proxies:
            proxy.start()
        loop = asyncio.get_running_loop()
        self._watches = [loop.create_task(proxy.watch()) for proxy in self.proxies]
        await until(self.is_ready, START_SECONDS, "every proxy is ready")

    async def is_ready(self) -> bool:
        """True if every proxy was ready when last looked at, with all of its workers."""
        return all(proxy.seen and proxy.seen[-1].status == "ready" for proxy in self.proxies)

    async def stop(self) -> None:
        """End all processes."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for proxy in self.proxies:
            with contextlib.suppress(AssertionError, ProcessLookupError):
                proxy.signal(signal.SIGTERM)
        for proxy in self.proxies:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                await proxy.code()
        for program in (*self.proxies, *self.replicas):
            program.kill()


async def until(holds: Callable[[], Any], seconds: float, what: str) -> None:
    """Return once the asynchronous condition `holds`. Raises Failed after `seconds`."""
    deadline = CLOCK.monotonic() + seconds
    while not await holds():
        if CLOCK.monotonic() > deadline:
            raise Failed(f"not within {seconds:.0f} s: {what}")
        await asyncio.sleep(POLL_SECONDS)


def clock_shift(file: Path) -> dict[str, str] | None:
    """Return the environment in which a process's wall clock is shifted by the seconds in `file`.

    None if that does not work here. libfaketime shifts CLOCK_REALTIME and leaves the monotonic clock alone. The file
    is left with the seconds until half past eleven at night (UTC), so that the time of day is the same in every run.
    """
    file.write_text("+0\n")
    spec = importlib.util.find_spec("libfaketime")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = [path for folder in folders for path in Path(folder).glob("vendor/libfaketime/src/libfaketime.so*")]
    if not found:
        return None
    changes = {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DISABLE_SHM": "1",
    }
    file.write_text("+7200\n")
    shifted = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env={**os.environ, **changes},  # noqa: TID251 - a child inherits
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    file.write_text(f"{seconds_until_half_past_eleven(CLOCK.unix()):+d}\n")
    works = re.fullmatch(r"[\d.]+\n", shifted) and float(shifted) - CLOCK.unix() > 7000
    return changes if works else None


def seconds_until_half_past_eleven(unix_seconds: float) -> int:
    """Return the seconds until the next 23:30 UTC, at least 0 and less than a day."""
    return int(HALF_PAST_ELEVEN_SECONDS - unix_seconds) % DAY_SECONDS


def ended(pids: Sequence[int]) -> bool:
    """Return whether none of these processes runs any more."""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def _answers(port: int) -> bool:
    with contextlib.suppress(OSError, EOFError, TimeoutError):
        return (await get(port, "/v1/models"))[0] == 200
    return False

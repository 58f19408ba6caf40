"""Real Valkeys for tests: a private one that can be hung, killed and flushed, a Cluster of three, a Sentinel."""

from __future__ import annotations

import asyncio
import itertools
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cache.store.embedded import find_server

LIMIT_SECONDS = 60.0  # bounds the time of a failure; on an idle machine no wait takes a second
PATIENT_SECONDS = 10.0  # the limit of an operation whose time is not tested: beyond any pause of the machine


async def eventually(holds: Callable[[], object | Awaitable[object]], within_seconds: float = LIMIT_SECONDS) -> None:
    """Come back as soon as `holds` is true; fail with its source where it never is."""
    deadline = time.monotonic() + within_seconds  # noqa: TID251
    while True:
        result = holds()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return
        assert time.monotonic() < deadline, f"never came true: {holds}"  # noqa: TID251
        await asyncio.sleep(0.002)


async def seconds_until(holds: Callable[[], object | Awaitable[object]]) -> float:
    """How long it takes until `holds` is true. On a busy machine only the least of several is a measure."""
    started = time.monotonic()  # noqa: TID251
    await eventually(holds)
    return time.monotonic() - started  # noqa: TID251


def _wait(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS  # noqa: TID251
    while not holds():
        assert time.monotonic() < deadline, "Valkey did not come up"  # noqa: TID251
        time.sleep(0.005)


def _own_ports() -> Iterator[int]:
    """Yield the ports of this process in turn: a hundred, of which it keeps the first bound as a sign to others.

    They lie below those that Linux gives to outgoing connections (32,768 and higher), as do the bus ports, which a
    Cluster adds 10,000 to. So nobody takes one between the choice and the start of a server, or while it restarts.
    """
    for first in random.sample(range(12_000, 22_000, 100), 100):
        with socket.socket() as sign:
            try:
                sign.bind(("127.0.0.1", first))
            except OSError:
                continue
            yield from itertools.cycle(range(first + 1, first + 100))


_ports = _own_ports()


def free_port() -> int:
    """Return a port of the loopback that nobody listens on, nor on its bus port, and that no other test gets."""
    for port in _ports:
        try:
            for each in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", each))
        except OSError:
            continue
        return port
    raise AssertionError("a hundred processes choose ports already")


class Valkey:
    """One server on a loopback port and a unix socket; `start` again after `kill` finds the same address."""

    def __init__(self, *arguments: str, as_sentinel: bool = False) -> None:
        self.folder = tempfile.mkdtemp(prefix="cairn-t-")
        self.port = free_port()
        self.socket = str(Path(self.folder) / "s")
        self._as_sentinel = as_sentinel
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket}"

    def start(self, *arguments: str) -> Valkey:
        """Start it with its own arguments and these; return once it answers."""
        base = ["--port", str(self.port), "--dir", self.folder, "--bind", "127.0.0.1"]
        if self._as_sentinel:
            configuration = Path(self.folder) / "sentinel.conf"
            configuration.write_text("\n".join(self._arguments) + "\n")
            base = [str(configuration), "--sentinel", *base]
        else:
            base += ["--save", "", "--loglevel", "warning", "--unixsocket", self.socket, *self._arguments, *arguments]
        self._process = subprocess.Popen([find_server(), *base], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _wait(lambda: self.ask("PING").startswith((b"+PONG", b"-NOAUTH")))
        return self

    def ask(self, *words: str | bytes) -> bytes:
        """One command over a connection of its own, blocking; the raw beginning of its answer."""
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        packed = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENT_SECONDS) as asking:
                asking.sendall(packed)
                return asking.recv(65_536)
        except OSError:
            return b""

    def flush(self) -> None:
        assert self.ask("FLUSHALL") == b"+OK\r\n"

    def hang(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)

    def end(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def running(*arguments: str) -> Iterator[Valkey]:
    """A Valkey for the time of a `with`."""
    valkey = Valkey(*arguments)
    try:
        yield valkey.start()
    finally:
        valkey.end()


@contextmanager
def cluster_of_three(*arguments: str) -> Iterator[Sequence[Valkey]]:
    """A Cluster of three masters, formed by plain commands: slots given, nodes introduced."""
    nodes = [Valkey("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *arguments) for _ in range(3)]
    try:
        for node, (first, last) in zip(nodes, ((0, 5460), (5461, 10922), (10923, 16383)), strict=True):
            node.start()
            assert node.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)) == b"+OK\r\n"
        for other in nodes[1:]:
            nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", str(other.port))
        for node in nodes:
            _wait(partial(_is_whole, node))
        yield nodes
    finally:
        for node in nodes:
            node.end()


def _is_whole(node: Valkey) -> bool:
    said = node.ask("CLUSTER", "INFO")
    return b"cluster_state:ok" in said and b"cluster_known_nodes:3" in said


class Watched:
    """A master, its replica and the Sentinel that watches them under the name `cairn`."""

    def __init__(self) -> None:
        self.master = Valkey("--repl-diskless-sync-delay", "0").start()
        self.replica = Valkey("--replicaof", "127.0.0.1", str(self.master.port)).start()
        self.sentinel = Valkey(
            f"sentinel monitor cairn 127.0.0.1 {self.master.port} 1",
            "sentinel down-after-milliseconds cairn 300",
            "sentinel failover-timeout cairn 2000",
            as_sentinel=True,
        ).start()
        _wait(lambda: b"master_link_status:up" in self.replica.ask("INFO", "replication"))
        _wait(lambda: str(self.replica.port).encode() in self.sentinel.ask("SENTINEL", "REPLICAS", "cairn"))

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self.sentinel.port}/cairn/0"


@contextmanager
def watched_by_sentinel() -> Iterator[Watched]:
    """See Watched."""
    watched = Watched()
    try:
        yield watched
    finally:
        for node in (watched.sentinel, watched.replica, watched.master):
            node.end()

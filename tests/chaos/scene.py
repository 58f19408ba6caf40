"""The objects of a play: the stack, the store outside it, and the marks that the verdict needs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache import keys
from tests.chaos.dialogue import Ask
from tests.chaos.load import CLOCK, Load, Response
from tests.chaos.stack import CLOCK_FILE, Failed, Stack
from tests.support import valkey
from tests.support.valkey import Valkey, Watched

DURABLE = ("--appendonly", "yes", "--appendfsync", "everysec", "--enable-debug-command", "yes")
PASSWORD = "a-password-of-the-test"


class Store:
    """The Valkey outside the stack: one server, three of a Cluster, or a master with its replica and Sentinel."""

    def __init__(self, url: str | None, nodes: Sequence[Valkey], watched: Watched | None = None) -> None:
        self.url = url
        self.nodes = list(nodes)
        self.watched = watched

    @property
    def server(self) -> Valkey:
        """The only server."""
        assert len(self.nodes) == 1
        return self.nodes[0]

    @property
    def node_of_the_journal(self) -> Valkey:
        """The node of a Cluster that holds the journal."""
        return next(node for node in self.nodes if node.ask("XLEN", keys.JOURNAL).startswith(b":"))

    def newest_entry(self) -> bytes:
        """Return the newest entry of the journal, empty if there is none or no server answers."""
        asked = [node.ask("XREVRANGE", keys.JOURNAL, "+", "-", "COUNT", "1") for node in self.nodes]
        return max((reply for reply in asked if reply.startswith(b"*1")), default=b"")

    def ask_with_password(self, *commands: bytes) -> None:
        """Send inline commands after the password."""
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=10) as asking:
            asking.sendall(b"AUTH %b\r\n" % PASSWORD.encode() + b"".join(each + b"\r\n" for each in commands))
            asking.recv(4096)


@contextlib.contextmanager
def single() -> Iterator[Store]:
    """One server that keeps what was written when it is killed."""
    with valkey.running(*DURABLE) as server:
        yield Store(server.url, [server])


@contextlib.contextmanager
def sentinel() -> Iterator[Store]:
    """A master, its replica and a Sentinel."""
    with valkey.watched_by_sentinel() as watched:
        yield Store(watched.url, [watched.master, watched.replica], watched)


@contextlib.contextmanager
def cluster() -> Iterator[Store]:
    """Three masters."""
    with valkey.cluster_of_three(*DURABLE) as nodes:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        yield Store(f"redis+cluster://{hosts}", nodes)


@contextlib.contextmanager
def embedded() -> Iterator[Store]:
    """No server outside: Cairn starts its own."""
    yield Store(None, [])


class Scene:
    """One scenario while it is played. `hold_seconds` is how long a fault lasts."""

    def __init__(self, stack: Stack, store: Store, load: Load, hold_seconds: float) -> None:
        self.stack = stack
        self.store = store
        self._load = load
        self.hold_seconds = hold_seconds
        self.begun = self.mended = 0.0  # monotonic seconds
        self.lost_until = 0.0  # monotonic: until then no process of Cairn could answer what was sent
        self.lost_ports: dict[int, set[int]] = {}  # by proxy: clients whose connection a killed process had
        self.lost_replicas: set[str] = set()
        self._clock_file = stack.folder / CLOCK_FILE
        self._entry_at_mend: bytes | None = None

    def begin(self) -> None:
        """Note that the fault begins now."""
        self.begun = CLOCK.monotonic()

    def mend(self) -> None:
        """Note that from now on nothing is in the way of healing."""
        self.mended = CLOCK.monotonic()
        self._entry_at_mend = self.store.newest_entry()

    async def hold(self, at_least_seconds: float = 0.0) -> None:
        """Let the fault last."""
        await asyncio.sleep(max(self.hold_seconds, at_least_seconds))

    async def probe(self, ask: Ask) -> Response:
        """Send a request of the play's own through the first proxy; it counts like all others."""
        return await self._load.probe(ask)

    async def shares_again(self) -> bool:
        """True once the workers have written to the journal since `mend`."""
        if not self.store.nodes:
            return True
        entry = await asyncio.to_thread(self.store.newest_entry)
        return entry not in (b"", self._entry_at_mend)

    # --- processes

    def lose_workers(self, pids: Sequence[int], proxy: int = 0) -> None:
        """Note whose requests are in flight in these workers, just before they are killed."""
        ports = self.stack.proxies[proxy].client_ports(pids)
        self.lost_ports.setdefault(proxy, set()).update(ports)

    def lose_all_so_far(self) -> None:
        """Note that everything sent until now went to processes that were killed."""
        self.lost_until = CLOCK.monotonic()

    def lose_replica(self, number: int) -> None:
        """Note that the requests in flight at a replica are lost."""
        self.lost_replicas.add(f"r{number}")

    def signal_worker(self, number: signal.Signals) -> None:
        """Send a signal to the first worker; its requests in flight are lost."""
        pid = self.stack.proxy.worker_pids()[0]
        self.lose_workers([pid])
        os.kill(pid, number)

    def step_clock(self, seconds: int) -> None:
        """Set the wall clock of Cairn's processes forward, or back, from what it is now."""
        following = self._clock_file.with_suffix(".new")
        following.write_text(f"{int(self._clock_file.read_text()) + seconds:+d}\n")
        following.replace(self._clock_file)  # at once: every reading of the clock reads the file

    def reload(self, tree: Mapping[str, Any]) -> None:
        """Write a configuration and send SIGHUP."""
        self.stack.proxy.configure(tree)
        self.stack.proxy.signal(signal.SIGHUP)


def mount_small(folder: Path, size: str) -> str:
    """Mount a small file system at `folder`; returns why that is not possible, or an empty text."""
    if os.geteuid() != 0:
        return "mounting a small file system needs root"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "cairn-chaos", str(folder)]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else ""


def unmount(folder: Path) -> None:
    """Undo `mount_small`."""
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def fill(folder: Path) -> Path:
    """Write a file until the file system is full; returns it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 65_536):
            pass
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 64):
            pass
    if not path.stat().st_size:
        raise Failed(f"{folder} could not be filled")
    return path

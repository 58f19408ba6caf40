"""Describe the measured proxies: how each is started, when it is ready, and the role of each process.

It builds command lines and measures nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import cpu
from benchmarks.common.processes import ROOT, Running, StartFailed, free_port

BARE = "bare aiohttp"
CAIRN = "cairn"
SGLANG = "sglang-router"
VLLM = "vllm-router"
DIRECT = "direct"

_CAIRN = (sys.executable, "-m", "proxy")  # found as `import proxy` finds it: compiled under `make bench-datapath`
_PEERS_PYTHON = ROOT / ".peers" / "bin" / "python"
_START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Parts of a command line."""

    upstreams: tuple[str, ...]
    port: int
    side_port: int  # Cairn's admin port, a router's Prometheus port
    workers: int
    quiet_peers: bool


@dataclass(frozen=True, slots=True)
class Contestant:
    """A proxy and how to start it. `needs` are files without which it is not installed."""

    name: str
    command: Callable[[Wanted], Sequence[str]]
    needs: tuple[Path, ...] = ()
    ready_path: str = "/v1/models"
    own_state: bool = False  # keeps files in the user's folder, so gets a separate one

    def installed(self) -> bool:
        """Return whether every file that it needs exists."""
        return all(path.exists() for path in self.needs)


def _urls(wanted: Wanted, flag: str) -> list[str]:
    return [part for url in wanted.upstreams for part in (flag, url)]


def _bare(wanted: Wanted) -> list[str]:
    return [
        sys.executable,
        "-m",
        "benchmarks.datapath.bare",
        "--port",
        str(wanted.port),
        *_urls(wanted, "--upstream"),
    ]


def cairn_command(wanted: Wanted) -> list[str]:
    """Return `cairn serve` with this interpreter, an embedded Valkey and every setting at its default."""
    where = ["--host", "127.0.0.1", "--port", str(wanted.port), "--admin-port", str(wanted.side_port)]
    return [*_CAIRN, "serve", *where, "--workers", str(wanted.workers), *_urls(wanted, "--upstream")]


def installed_cairn() -> str:
    """Return the version that a proxy reports, and whether it is compiled."""
    return subprocess.run([*_CAIRN, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def _router(module: str, quiet: str) -> Callable[[Wanted], Sequence[str]]:
    def command(wanted: Wanted) -> list[str]:
        where = ["--host", "127.0.0.1", "--port", str(wanted.port), "--prometheus-port", str(wanted.side_port)]
        start = [str(_PEERS_PYTHON), "-m", f"{module}.launch_router", "--policy", "cache_aware"]
        where += ["--log-level", quiet] if wanted.quiet_peers else []
        return [*start, *where, "--worker-urls", *wanted.upstreams]

    return command


def _peer_files(module: str) -> tuple[Path, ...]:
    found = list((ROOT / ".peers").glob(f"lib/python*/site-packages/{module}"))
    return tuple(found) or (ROOT / ".peers" / module,)


def contestants() -> list[Contestant]:
    """Return all known contestants, in the order of the table."""
    return [
        Contestant(BARE, _bare),
        Contestant(CAIRN, cairn_command, own_state=True),
        Contestant(SGLANG, _router("sglang_router", "warn"), needs=_peer_files("sglang_router")),
        Contestant(VLLM, _router("vllm_router", "warning"), needs=_peer_files("vllm_router")),
    ]


@dataclass(slots=True)
class Started:
    """A proxy that answers, and its ports."""

    name: str
    running: Running
    port: int
    side_port: int

    def roles(self) -> Mapping[str, list[int]]:
        """Its processes by role; see `assign_roles`."""
        return assign_roles(cpu.tree(self.running.pid))


def assign_roles(family: Sequence[cpu.Process]) -> dict[str, list[int]]:
    """Return process ids by role. A Valkey is "valkey"; the root is "supervisor" if other children remain, which
    are "proxy", and "proxy" itself if not. A child of Valkey, which rewrites its file and soon ends, has none.
    """
    if not family:
        return {"proxy": []}
    root, *others = family
    named = {process.pid for process in others if "valkey" in process.name}
    stores = [process.pid for process in others if process.pid in named and process.parent not in named]
    workers = [process.pid for process in others if process.pid not in named]
    roles = {"proxy": workers or [root.pid]}
    if workers:
        roles["supervisor"] = [root.pid]
    if stores:
        roles["valkey"] = stores
    return roles


async def start(
    contestant: Contestant, upstream_ports: Sequence[int], folder: Path, workers: int, quiet_peers: bool
) -> Started:
    """Start a proxy and wait until it relays a chat request. Raises `StartFailed`."""
    urls = tuple(f"http://127.0.0.1:{port}" for port in upstream_ports)
    wanted = Wanted(urls, free_port(), free_port(), workers, quiet_peers)
    changes: dict[str, str] = {}
    if contestant.own_state:
        home = folder / f"home-{contestant.name}"
        home.mkdir(exist_ok=True)
        changes = {"HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "XDG_STATE_HOME": str(home / "state")}
    running = Running(contestant.name, contestant.command(wanted), folder, changes)
    try:
        await running.answers(wanted.port, contestant.ready_path, _START_SECONDS)
    except StartFailed:
        running.stop()
        raise
    return Started(contestant.name, running, wanted.port, wanted.side_port)

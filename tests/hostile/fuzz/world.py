"""Start what is fuzzed: a Valkey, a recorded upstream and `cairn serve`; and measure what Cairn holds."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from benchmarks.common import cpu, sockets
from benchmarks.common.processes import Running, get
from tests.hostile.fuzz.upstream import Recorder
from tests.support.valkey import free_port
from tests.support.valkey import running as running_valkey

_START_SECONDS = 60.0
_REPLICAS = 2
MIB = 1 << 20
INDEX_BYTES = MIB
CONTEXT_BYTES = MIB // 2
"""Bounds of what Cairn keeps of requests, so small that they are reached after some thousand of them."""


@dataclass(frozen=True, slots=True)
class Held:
    """The resources that Cairn's processes hold at a quiet moment."""

    memory_bytes: int
    descriptors: Mapping[str, int]  # by what is at the other end
    index_bytes: int = 0
    context_bytes: int = 0  # of contents of stored contexts


class World:
    """A running Cairn. `ports` are those of clients and of administration."""

    def __init__(
        self, cairn: Running, ports: tuple[int, int], upstream_ports: Sequence[int], recorder: Recorder
    ) -> None:
        self.ports = ports
        self._upstream_ports = upstream_ports
        self.recorder = recorder
        self._cairn = cairn

    async def held_and_kept(self) -> Held:
        """Return what supervisor and workers hold now, with the sizes of their tables as Cairn reports them."""
        _, page = await get(self.ports[1], "/metrics")
        sizes = dict.fromkeys(("cairn_index_bytes", "cairn_context_memory_bytes"), 0)
        for line in page.decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name in sizes:
                sizes[name] = int(float(value))
        index_bytes, context_bytes = sizes.values()
        return replace(self.held(), index_bytes=index_bytes, context_bytes=context_bytes)

    def held(self) -> Held:
        """Return what supervisor and workers hold now."""
        pids = [process.pid for process in cpu.tree(self._cairn.pid)]
        counts: Counter[str] = Counter()
        for pid in pids:
            links = [link.partition(":[")[0] for link in (cpu.descriptors(pid) or {}).values()]
            counts.update(link if link.startswith(("socket", "pipe", "anon")) else "file" for link in links)
            for end in sockets.tcp_sockets(pid):
                kind = self._kind(end)
                counts[kind] += 1
                counts["socket"] -= 1
        return Held(sum(map(cpu.resident_bytes, pids)), counts)

    def _kind(self, end: sockets.Socket) -> str:
        if end.state == sockets.LISTENING:
            return "listening"
        if end.local_port in self.ports:
            return "client"
        return "upstream" if end.remote_port in self._upstream_ports else "redis"

    def complaints(self) -> list[str]:
        """Return the lines of the log that tell of defects, and a worker's death."""
        words = ("Traceback", "failed inside Cairn", "ERROR", "CRITICAL", "Exception", "ended with", "was killed")
        return [
            line for line in self._cairn.log.read_text(errors="replace").splitlines() if any(w in line for w in words)
        ]


def _configuration(ports: tuple[int, int], upstream_ports: list[int], redis_url: str) -> str:
    replicas = [{"url": f"http://127.0.0.1:{port}", "name": f"r{at}"} for at, port in enumerate(upstream_ports)]
    return yaml.safe_dump(
        {
            "server": {
                "port": ports[0],
                "workers": 1,
                "max_connections_per_address": 8192,  # all clients are on one here
                "engine_paths": ["/tokenize", "/version", "/openai/deployments/*"],
                "cors_origins": ["https://page.example"],
            },
            "admin": {"port": ports[1]},
            "redis": {"url": redis_url},
            "pools": [{"name": "engines", "replicas": replicas, "default": True}],
            # many responses here are empty or errors in spite of their status, for which others would be asked
            "upstream": {"max_retries": 0},
            "routing": {"index_bytes": INDEX_BYTES, "max_objects": 500},
            "contexts": {
                "total_bytes": 4 * MIB,
                "tenant_bytes": MIB,
                "pinned_bytes": MIB // 2,
                "memory_bytes": CONTEXT_BYTES,
            },
            "log": {"level": "warning", "access": False},
        }
    )


@asynccontextmanager
async def running_world(seed: int) -> AsyncIterator[World]:
    """Run everything for the time of a block."""
    recorder = Recorder(seed)
    with tempfile.TemporaryDirectory(prefix="cairn-fuzz-") as folder, running_valkey() as valkey:
        upstream_ports = await recorder.start(_REPLICAS)
        ports = free_port(), free_port()
        file = Path(folder, "cairn.yaml")
        await asyncio.to_thread(file.write_text, _configuration(ports, upstream_ports, valkey.url))
        changes = {"XDG_DATA_HOME": folder, "XDG_STATE_HOME": folder}
        cairn = Running(
            "cairn", [sys.executable, "-m", "proxy", "serve", "--config", str(file)], Path(folder), changes
        )
        try:
            await cairn.answers(ports[0], "/v1/models", _START_SECONDS)
            yield World(cairn, ports, upstream_ports, recorder)
        finally:
            await asyncio.to_thread(cairn.stop)
            recorder.close()

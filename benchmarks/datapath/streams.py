"""Measure what open, silent streams cost in CPU, and how much memory each takes.

The upstream sends a stream's first chunk and then is silent. CPU is read while all are silent; memory before the
first and after the last is opened.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Mapping, Sequence
from typing import cast

import msgspec
from rich.table import Table

from benchmarks.common import bodies, cpu
from benchmarks.datapath.contestants import Started
from benchmarks.datapath.measure import cpu_by_role

SILENT_SECONDS = 600.0  # between two chunks: longer than the measurement lasts
_PATH = "/v1/chat/completions"
_OPEN_SECONDS = 120.0
_AT_ONCE = 64  # opened together, so that no listen queue overflows
_SETTLE_SECONDS = 1.0
_WARM_STREAMS = 32  # opened and closed before memory is read: imports, pools and arenas are then paid for
_SPARE_DESCRIPTORS = 256


class Standing(msgspec.Struct, frozen=True):
    """One proxy with open streams."""

    proxy: str
    streams: int
    idle_milliseconds_per_second: float  # CPU of all its processes before the first stream
    cpu_milliseconds_per_second: float  # and with all of them open
    kilobytes_per_stream: float


class _Stream(asyncio.Protocol):
    """A client that has asked and reads; `begun` is done at the first chunk."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._seen = (self._seen + data)[-8192:]
        if b"data: " in self._seen and not self.begun.done():
            self.begun.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.begun.done():
            self.begun.set_exception(exc or ConnectionError(f"closed after {self._seen[:200]!r}"))


def allow_descriptors(wanted: int) -> int:
    """Raise this process's limit, which its children inherit; return how many streams fit within it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + _SPARE_DESCRIPTORS  # a proxy holds two ends of each
    limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if limit > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return min(wanted, (max(limit, soft) - _SPARE_DESCRIPTORS) // 2)


async def _open(port: int, count: int, size_bytes: int = 1024) -> list[_Stream]:
    content, offset = bodies.body(bodies.Shape(size_bytes, stream=True))
    head = bodies.request_head(_PATH, size_bytes)
    loop = asyncio.get_running_loop()
    found: list[_Stream] = []
    async with asyncio.timeout(_OPEN_SECONDS):
        while len(found) < count:
            batch: list[_Stream] = []
            for _ in range(min(_AT_ONCE, count - len(found))):
                bodies.stamp(content, offset, len(found) + len(batch))
                request = head + bytes(content)
                _, stream = await loop.create_connection(lambda request=request: _Stream(request), "127.0.0.1", port)  # type: ignore[misc]
                batch.append(stream)
            await asyncio.gather(*(stream.begun for stream in batch))
            found += batch
    return found


async def _close(streams: Sequence[_Stream]) -> None:
    for stream in streams:
        stream.transport.abort()
    await asyncio.sleep(_SETTLE_SECONDS)


async def stand(started: Started, count: int, seconds: float) -> Standing:
    """Open the streams, wait `seconds`, and close them."""
    await _close(await _open(started.port, _WARM_STREAMS))
    roles = started.roles()
    idle = await _spent(roles, seconds)
    before_bytes = sum(map(cpu.resident_bytes, roles["proxy"]))
    streams = await _open(started.port, count)
    await asyncio.sleep(_SETTLE_SECONDS)
    grown = sum(map(cpu.resident_bytes, roles["proxy"])) - before_bytes
    busy = await _spent(roles, seconds)
    await _close(streams)
    return Standing(started.name, count, idle * 1e3, busy * 1e3, grown / count / 1024)


async def _spent(roles: Mapping[str, Sequence[int]], seconds: float) -> float:
    """Return the CPU seconds spent per second."""
    before = sum(cpu_by_role(roles).values())
    await asyncio.sleep(seconds)
    return (sum(cpu_by_role(roles).values()) - before) / seconds


def table(standings: Sequence[Standing]) -> Table:
    """Return a table with one row per proxy."""
    found = Table(title="Open streams on which nothing happens")
    for title in ("proxy", "streams", "CPU without, ms per second", "CPU, ms per second", "memory, KB per stream"):
        found.add_column(title, justify="left" if title == "proxy" else "right")
    for standing in standings:
        figures = (
            standing.idle_milliseconds_per_second,
            standing.cpu_milliseconds_per_second,
            standing.kilobytes_per_stream,
        )
        found.add_row(standing.proxy, f"{standing.streams:,}", *(f"{figure:.1f}" for figure in figures))
    return found

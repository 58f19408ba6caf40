"""Cairn's own CPU per request, without a socket: one worker, driven in this process on transports that only count.

The cost of the system's network is left out, and the lowest of many batches is shown, so the figure hardly depends on
the machine's other load. It shows the effect of a change and cannot compare proxies (use `datapath`). The sources are
measured uncompiled; with -P, the installed and compiled Cairn.

python [-P] -m benchmarks.path [--sizes 1k,64k] [--chunks 200] [--seconds 2] [--profile 40] [--traced 1.0]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import logging
import os
import pstats
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import uvloop

from benchmarks.common.bodies import Shape, body, request_head, stamp
from benchmarks.common.figures import parse_size, size_label
from benchmarks.common.upstream import STREAM_HEAD, Manner, plain_answer, stream_writes
from cache import EmbeddedValkey
from proxy.clock import SystemClock
from proxy.config.load import SecretUrl, load
from proxy.control.channel import WorkerControl
from proxy.errors import ConnectFailed
from proxy.upstream import client as upstream_client
from proxy.worker.heap import keep_freed_memory
from proxy.worker.lifecycle import Worker, freeze_garbage

_CONNECTIONS = 16
_BATCH_SECONDS = 0.05
_READ_BYTES = 256 * 1024  # what uvloop reads from a socket at most
_SHARED = 0.5


class Wire:
    """A transport whose other end is a function that receives what is written."""

    def __init__(self, heard: Any) -> None:
        self._heard = heard
        self._closing = False
        self._protocol: Any = None

    def connect(self, protocol: Any) -> None:
        """Begin as the transport of `protocol`."""
        self._protocol = protocol
        protocol.connection_made(self)

    def set_protocol(self, protocol: Any) -> None:
        self._protocol = protocol

    def get_protocol(self) -> Any:
        return self._protocol

    def deliver(self, content: memoryview) -> int:
        """Hand over the bytes that a read from the socket would return; return how many were taken."""
        protocol = self._protocol
        if not isinstance(protocol, asyncio.BufferedProtocol):
            protocol.data_received(bytes(content[:_READ_BYTES]))
            return min(len(content), _READ_BYTES)
        room = memoryview(protocol.get_buffer(-1))
        taken = min(len(room), len(content))
        room[:taken] = content[:taken]
        protocol.buffer_updated(taken)
        return taken

    def write(self, content: bytes) -> None:
        self._heard((content,))

    def writelines(self, contents: Sequence[bytes]) -> None:
        self._heard(contents)

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ARG002
        return default

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    abort = write_eof = close

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Replica:
    """The upstream's end of one connection: answers as soon as a request is whole, one piece per turn of the loop."""

    def __init__(self, run: Run, make: Any) -> None:
        self._run = run
        self._got = 0
        self.connection = make()
        self.connection.connection_made(Wire(self._heard))

    def _heard(self, contents: Sequence[bytes]) -> None:
        self._got += sum(map(len, contents))
        head = bytes(contents[0])
        if head.startswith(b"GET"):
            self._got = 0
            answer = b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"
            self._run.loop.call_soon(self.connection.data_received, answer)
            return
        self._got = 0
        self._run.loop.call_soon(self._say, iter(self._run.pieces(contents)))

    def _say(self, pieces: Any) -> None:
        piece = next(pieces, None)
        if piece is not None:
            self.connection.data_received(piece)
            self._run.loop.call_soon(self._say, pieces)


class Client:
    """One keep-alive connection of a client: the next request as soon as the answer's end was written."""

    def __init__(self, run: Run, worker: Worker) -> None:
        self._run = run
        self.protocol = worker.http_server.connect()
        self._wire = Wire(self._heard)
        self._wire.connect(self.protocol)

    def next(self) -> None:
        self._feed(memoryview(self._run.request()))

    def _feed(self, left: memoryview) -> None:
        left = left[self._wire.deliver(left) :]
        if left:
            self._run.loop.call_soon(self._feed, left)

    def _heard(self, contents: Sequence[bytes]) -> None:
        if self._run.is_last(contents):
            self._run.answered(self)


class Run:
    """One kind of request, sent until the time is over."""

    def __init__(self, loop: asyncio.AbstractEventLoop, size_bytes: int, chunks: int) -> None:
        self.loop = loop
        self.chunks = chunks
        shape = Shape(size_bytes, _SHARED, stream=chunks > 0)
        self._body, self._offset = body(shape)
        self._head = request_head("/v1/chat/completions", size_bytes)
        self._size_bytes = size_bytes
        self._number = 0
        self._left = 0
        self._busy = 0
        self._done: asyncio.Future[None] | None = None

    def request(self) -> bytes:
        self._number += 1
        stamp(self._body, self._offset, self._number)
        return self._head + self._body

    def pieces(self, contents: Sequence[bytes]) -> list[bytes]:
        if not self.chunks:
            return [plain_answer(self._size_bytes, _SHARED)]
        asked = any(b'"include_usage":true' in content for content in contents)
        return [STREAM_HEAD, *stream_writes(self._size_bytes, Manner(self.chunks, 0.0, _SHARED), asked)]

    def is_last(self, contents: Sequence[bytes]) -> bool:
        if not self.chunks:
            return True
        return bytes(contents[-1]).endswith(b"0\r\n\r\n")

    def answered(self, client: Client) -> None:
        if self._left > 0:
            self._left -= 1
            self.loop.call_soon(client.next)
        else:
            self._busy -= 1
            if not self._busy and self._done is not None:
                self._done.set_result(None)

    async def batch(self, clients: Sequence[Client], requests: int) -> float:
        """Return the CPU seconds of this thread for `requests` requests."""
        self._left = requests - len(clients)
        self._busy = len(clients)
        self._done = self.loop.create_future()
        before = time.thread_time()
        for client in clients:
            client.next()
        await self._done
        return time.thread_time() - before


async def measure(worker: Worker, label: str, size_bytes: int, chunks: int, options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    run = Run(loop, size_bytes, chunks)

    async def dial(_loop: object, _lookups: object, _origin: object, _ssl: object, make: Any, _limit: float) -> Any:
        return Replica(run, make).connection

    setattr(upstream_client, "dial", dial)  # noqa: B010 - in place of a socket
    clients = [Client(run, worker) for _ in range(_CONNECTIONS)]
    await asyncio.sleep(0)
    await run.batch(clients, 3 * _CONNECTIONS)
    requests = _CONNECTIONS
    while await run.batch(clients, requests) < _BATCH_SECONDS:
        requests *= 2
    profile = cProfile.Profile() if options.profile else None
    figures = []
    ends_at = time.monotonic() + options.seconds  # noqa: TID251
    if profile:
        profile.enable()
    while time.monotonic() < ends_at:  # noqa: TID251
        figures.append(await run.batch(clients, requests) / requests)
        await asyncio.sleep(0.01)
    if profile:
        profile.disable()
        show(profile, options.profile, requests * len(figures))
    per = max(1, chunks)
    figures.sort()
    print(
        f"{label:>8}: least {figures[0] / per * 1e6:8.2f} us, median {figures[len(figures) // 2] / per * 1e6:8.2f} us"
    )
    for client in clients:
        client.protocol.connection_lost(None)
    for upstream in worker.replicas.client._upstreams.values():  # noqa: SLF001 - the benchmark closes what a run left open
        for connection in tuple(upstream.pool._idle):  # noqa: SLF001 - the benchmark closes what a run left open
            connection.connection_lost(None)
        for connection in tuple(upstream.pool._probation):  # noqa: SLF001 - the benchmark closes what a run left open
            connection.connection_lost(None)
    await asyncio.sleep(0.2)


def show(profile: cProfile.Profile, rows: int, requests: int) -> None:
    """Print the functions that took most time, with their calls and microseconds per request."""
    stats = cast(Any, pstats.Stats(profile)).stats
    order = sorted(stats.items(), key=lambda item: -item[1][2])
    total = sum(item[1][2] for item in order)
    print(f"{total / requests * 1e6:.1f} us under the profiler")
    for (path, line, name), (_, calls, own, whole, _) in order[:rows]:
        where = f"{Path(path).name}:{line}" if line else ""
        print(f"{own / requests * 1e6:8.2f} {whole / requests * 1e6:8.2f} {calls / requests:7.2f}  {name} {where}")
    files: dict[str, float] = defaultdict(float)
    for (path, _, name), (_, _, own, _, _) in order:
        files["/".join(Path(path).parts[-2:]) if path != "~" else name] += own
    for path, own in sorted(files.items(), key=lambda item: -item[1])[:rows]:
        print(f"{own / requests * 1e6:8.2f}  {path}")


class Deaf:
    """A control socket without another end."""

    def report(self, report: object) -> bool:  # noqa: ARG002
        return True


async def main(options: argparse.Namespace, folder: Path) -> None:
    valkey = EmbeddedValkey(folder / "valkey", clock=SystemClock())
    await asyncio.to_thread(valkey.start)
    try:
        environ = {"HOME": str(folder)}
        upstreams = ("http://127.0.0.1:9001", "http://127.0.0.1:9002")
        flags: dict[tuple[str, str], object] = {("redis", "url"): SecretUrl(valkey.url)}
        if options.traced is not None:  # nothing listens there: this measures making spans, not sending them
            flags |= {("telemetry", "endpoint"): "http://127.0.0.1:9", ("telemetry", "sample_ratio"): options.traced}
            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        config = load(None, environ, flags, upstreams).config
        log = os.open(folder / "access.log", os.O_WRONLY | os.O_CREAT)
        worker = await Worker.build(config, cast(WorkerControl, Deaf()), access_log_descriptor=log)

        async def refuse(*_: object) -> None:
            raise ConnectFailed("nobody is there yet")

        setattr(upstream_client, "dial", refuse)  # noqa: B010
        await worker.start(())
        for number in worker.replicas.pools.served:
            worker.replicas.fleet.responded(number)
        freeze_garbage()
        for size in options.sizes:
            await measure(worker, size_label(size), size, 0, options)
        if options.chunks:
            await measure(worker, "chunk", 1024, options.chunks, options)
        await worker.close()
    finally:
        valkey.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="1k,64k,512k,2m")
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--profile", type=int, default=0)
    parser.add_argument("--traced", type=float, help="trace this share of the requests")
    arguments = parser.parse_args()
    arguments.sizes = [parse_size(text) for text in arguments.sizes.split(",") if text]
    gc.enable()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as scratch, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(arguments, Path(scratch)))
    sys.exit(0)

"""A worker in place of Cairn's own: a few lines of HTTP by which tests see what the process side does.

GET /pid answers the process id, /pool the first pool's name, /hold nothing until /release was asked for.
Its mode is the first argument: `serve`, `crash` (ends before it is ready).
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from socket import socket

from proxy.config.load import Config, ConfigError
from proxy.control.channel import WorkerControl
from proxy.control.messages import Explain, WorkerReport
from proxy.metrics import definitions as metrics
from proxy.metrics.recorder import Recorder
from proxy.worker.process import run


class Tiny:
    """The state of one."""

    def __init__(self, config: Config, control: WorkerControl) -> None:
        self.config = config
        self.control = control
        self.released = asyncio.Event()
        self.running: set[asyncio.Task] = set()
        control.on_reload = self.reload
        control.on_explain = self.explain
        if control.handover is not None:
            control.handover.start(self.adopt)

    async def reload(self, config: Config) -> None:
        """Take any configuration but one whose pool is named `unfit`."""
        if config.pools[0].name == "unfit":
            raise ConfigError("$.pools[0].name: unfit")
        self.config = config

    async def explain(self, question: Explain) -> tuple[int, bytes]:
        """Echo."""
        return 200, b"%s %s %s" % (question.path.encode(), question.credential, question.body)

    def adopt(self, connection: socket) -> None:
        """Serve a connection that waited for another worker."""
        connection.setblocking(False)
        self.running.add(asyncio.get_running_loop().create_task(self._adopt(connection)))

    async def _adopt(self, connection: socket) -> None:
        await self.serve(*await asyncio.open_connection(sock=connection))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one answer."""
        task = asyncio.current_task()
        assert task is not None
        self.running.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            body = await self.answer(head.split(b" ")[1].decode())
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
            await writer.drain()
        finally:
            writer.close()
            self.running.discard(task)

    async def answer(self, path: str) -> bytes:
        """Return the object at `path`."""
        if path == "/hold":
            self.report(held=1)
            await self.released.wait()
        elif path == "/release":
            self.released.set()
        elif path == "/pool":
            return self.config.pools[0].name.encode()
        return str(os.getpid()).encode()

    def report(self, held: int = 0) -> None:
        """Count one request, and say how many are held."""
        recorder = Recorder()
        recorder.inc(metrics.REJECTED, ("tiny",))
        recorder.set(metrics.IN_FLIGHT, (), held)
        upstreams = {replica.label: True for pool in self.config.pools for replica in pool.replicas}
        self.control.report(WorkerReport(recorder.take(), in_flight=held, redis="up", upstreams=upstreams))


async def target(config: Config, sockets: Sequence[socket], control: WorkerControl) -> None:
    """Run the tiny worker, as `proxy.worker.lifecycle.run_worker` runs the real one."""
    if "crash" in sys.argv:
        raise SystemExit(3)
    tiny = Tiny(config, control)
    servers = [await asyncio.start_server(tiny.serve, sock=each) for each in sockets]
    await control.send_ready()
    tiny.report()
    seconds = await control.wait_for_drain()
    for server in servers:
        server.close()
    if tiny.running:
        await asyncio.wait(tiny.running, timeout=seconds)


if __name__ == "__main__":
    given = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    listening = [int(descriptor) for descriptor in given["--listen"].split(",")]
    handover = int(given["--handover"]) if "--handover" in given else None
    sys.exit(run(int(given["--control"]), listening, int(given["--parent"]), target, handover))

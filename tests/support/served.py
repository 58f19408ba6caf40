"""`cairn serve` as a user starts it: a supervisor and its workers in processes of their own, with what they print."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0


class Served:
    """A running `cairn serve`; `lines` are what it printed so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = self.admin = ""
        self._told = False
        self.killed = False

    def stop(self) -> None:
        """Tell it to end; once, since a second time means at once."""
        if not self._told:
            self._told = True
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole tree at once, with no time for a last word."""
        self.killed = self._told = True
        self.process.kill()
        for pid in self.worker_pids():
            os.kill(pid, signal.SIGKILL)

    async def read(self) -> None:
        """Collect lines until the end."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode())

    async def started(self) -> None:
        """Wait until it says where it serves."""
        async with asyncio.timeout(START_SECONDS):
            while not (found := re.search(r"(http://\S+)/v1, admin on (http://\S+)", "".join(self.lines))):
                assert self.process.returncode is None, "".join(self.lines)
                await asyncio.sleep(0.02)
        self.url, self.admin = found[1] + "/v1", found[2]

    def worker_pids(self) -> list[int]:
        """The workers, in the order in which they became ready; those that died are still in it."""
        return [int(pid) for pid in re.findall(r"worker \d+ is ready \(pid (\d+)\)", "".join(self.lines))]

    async def metric(self, http: aiohttp.ClientSession, name: str, **labels: str) -> float:
        """The sum of a metric's series that have `labels`."""
        async with http.get(f"{self.admin}/metrics") as answer:
            page = await answer.text()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        rows = [line for line in page.splitlines() if re.match(rf"{name}[ {{]", line)]
        return sum(float(row.rpartition(" ")[2]) for row in rows if all(label in row for label in wanted))

    def access_lines(self) -> list[dict[str, object]]:
        """The requests that were logged."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]


@asynccontextmanager
async def served(arguments: Sequence[str], folder: Path) -> AsyncIterator[Served]:
    """`cairn serve` with `arguments` on free ports, its data in `folder`; ended by SIGTERM, which must give 0,
    unless it was killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "proxy", "serve", "--port", "0", "--admin-port", "0", *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
        env={**os.environ, "XDG_DATA_HOME": str(folder), "CAIRN_SERVER__DRAIN_ACCEPT_SECONDS": "0"},  # noqa: TID251
    )  # fmt: skip
    running = Served(process)
    reading = asyncio.get_running_loop().create_task(running.read())
    try:
        await running.started()
        yield running
        running.stop()
        async with asyncio.timeout(60):
            assert await process.wait() == (-signal.SIGKILL if running.killed else 0), "".join(running.lines[-20:])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reading

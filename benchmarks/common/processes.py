"""Start the measured processes, wait until they answer, and end them with all their children."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import cpu

ROOT = Path(__file__).resolve().parents[2]
_STOP_SECONDS = 10.0  # a proxy drains; after that it is killed
_POLL_SECONDS = 0.05


class StartFailed(Exception):
    """A process ended, or did not answer in time; the message contains the end of its output."""


def free_port() -> int:
    """Return a port that was free on loopback a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `changes`, so that a child finds the same Cairn as its parent."""
    return {**os.environ, **changes}  # noqa: TID251 - a child must inherit PATH and HOME


class Running:
    """A started process. Its output goes to a file in `folder`."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, changes: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = folder / f"{name.replace(' ', '-')}.log"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env=environment(changes or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def last_words(self) -> str:
        """Return the end of its output."""
        return self.log.read_text(errors="replace")[-2000:]

    async def answers(self, port: int, path: str, seconds: float) -> None:
        """Return once GET `path` is answered with 200. Raises `StartFailed` if that takes too long."""
        for _ in range(int(seconds / _POLL_SECONDS)):
            if self._process.poll() is not None:
                raise StartFailed(f"{self.name} ended with {self._process.returncode}:\n{self.last_words()}")
            try:
                status, _ = await get(port, path)
            except (OSError, EOFError, TimeoutError, ValueError, IndexError):
                status = 0
            if status == 200:
                return
            await asyncio.sleep(_POLL_SECONDS)
        raise StartFailed(f"{self.name} did not answer {path} within {seconds:.0f} s:\n{self.last_words()}")

    def stop(self) -> None:
        """Send SIGTERM to the process, then SIGKILL to what is left of its tree. Can be called twice."""
        family = [process.pid for process in cpu.tree(self.pid)]
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for pid in family[1:]:
            try:
                if os.getsid(pid) == self.pid:  # the number may belong to another process by now
                    os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


async def get(port: int, path: str, seconds: float = 5.0) -> tuple[int, bytes]:
    """Return status and body of one GET on a new connection. Raises OSError, EOFError, TimeoutError or ValueError."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, length = head.partition(b"content-length:")
            rest = await (reader.readexactly(int(length.split()[0])) if length else reader.read(-1))
        finally:
            writer.close()
    if b"transfer-encoding: chunked" in head:
        rest = unchunk(rest)
    return int(head.split(b" ", 2)[1]), rest


def unchunk(framed: bytes) -> bytes:
    """Return the content of a whole chunked body."""
    pieces = []
    while framed:
        size_text, _, framed = framed.partition(b"\r\n")
        size = int(size_text.split(b";")[0], 16)
        if not size:
            break
        pieces.append(framed[:size])
        framed = framed[size + 2 :]
    return b"".join(pieces)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for logs and state, gone at the end of the run.

    A Valkey that was stopped while a child of it rewrote its file leaves that child alive for some milliseconds: it
    may still write while the folder is being removed.
    """
    return tempfile.TemporaryDirectory(prefix="cairn-bench-", ignore_cleanup_errors=True)


def end_on_signals() -> None:
    """Let SIGTERM end this process like an exception, so that the processes it started are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

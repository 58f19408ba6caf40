"""Child processes that the demo starts: how they begin, how one learns that they serve, and how they all end.

Each runs in a session of its own, so that Ctrl-C in the terminal reaches the demo alone, which then ends them in
order; and each dies with the demo where the kernel can see to that. It must not know what the children do.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 10.0  # for a clean end, after which a child and what it started is killed
LAST_LINES = 15  # of a failed child's log: enough for a traceback's end


class StartFailed(Exception):
    """A child did not come up, or ended by itself; the message can be shown to a person."""


class Child:
    """A running program; `log` gets what it writes, but for its standard output where that is `piped`."""

    def __init__(self, name: str, command: Sequence[str], log: Path, *, piped: bool = False) -> None:
        self.name = name
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else output,
                bufsize=0,  # a line still in a buffer would not wake a selector
                stderr=output,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """False once it has ended, however that came."""
        return self.process.poll() is None

    def next_line(self, timeout_seconds: float) -> str:
        """The next line of a piped child, nothing where it ended; raises `StartFailed` if it is silent."""
        assert self.process.stdout is not None  # noqa: S101 - piped
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_seconds):
                raise StartFailed(self.last_words(f"was silent for {timeout_seconds:.0f} s"))
        return self.process.stdout.readline().decode().strip()

    def served_at(self, timeout_seconds: float) -> str:
        """The first line of a piped child, which is its address; raises `StartFailed` where it does not come."""
        if line := self.next_line(timeout_seconds):
            return line
        self.process.wait()
        raise StartFailed(self.last_words("did not start"))

    def last_words(self, what_happened: str) -> str:
        """A message that says what happened and ends with the last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        code = self.process.poll()
        ended = "" if code is None else f" (exit code {code})"
        return "\n".join(
            [f"{self.name} {what_happened}{ended}; the end of {self.log}:", *(f"  {line}" for line in lines)]
        )

    def ask_to_stop(self) -> None:
        """Tell it to end; harmless where it has ended."""
        if self.running:
            self.process.terminate()

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """End it and wait; after `timeout_seconds` it is killed together with all that it started."""
        self.ask_to_stop()
        try:
            self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def start_replica(name: str, model: Path, log: Path, *arguments: str) -> Child:
    """Start llama.cpp on `model` at a free port of loopback; its first line is its base URL."""
    return Child(name, python("demo.engine", "--model", str(model), *arguments), log, piped=True)

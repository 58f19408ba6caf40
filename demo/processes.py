"""Start child processes, wait until they serve, and stop them.

Each has its own session, so that Ctrl-C in the terminal reaches only the demo, which then stops its children in
order.
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
STOP_SECONDS = 10.0  # for a clean end; after that a child and its own children are killed
LAST_LINES = 15  # of a failed child's log, enough for the end of a traceback


class StartFailed(Exception):
    """A child did not start, or ended by itself; the message can be shown to the user."""


class Child:
    """A running program whose output goes to the file `log`, except for its standard output if that is `piped`."""

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
                bufsize=0,  # a selector does not see a line that is still in a buffer
                stderr=output,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """True if the process has not ended yet."""
        return self.process.poll() is None

    def next_line(self, timeout_seconds: float) -> str:
        """Return the next line of a piped child, or nothing if it ended. Raises `StartFailed` after the timeout."""
        assert self.process.stdout is not None  # noqa: S101 - piped
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_seconds):
                raise StartFailed(self.report(f"printed nothing for {timeout_seconds:.0f} s"))
        return self.process.stdout.readline().decode().strip()

    def served_at(self, timeout_seconds: float) -> str:
        """Return the first line of a piped child, its address. Raises `StartFailed` if there is none in time."""
        if line := self.next_line(timeout_seconds):
            return line
        self.process.wait()
        raise StartFailed(self.report("did not start"))

    def report(self, what_happened: str) -> str:
        """Return a message with what happened and the last lines of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        code = self.process.poll()
        ended = "" if code is None else f" (exit code {code})"
        return "\n".join(
            [f"{self.name} {what_happened}{ended}; the end of {self.log}:", *(f"  {line}" for line in lines)]
        )

    def ask_to_stop(self) -> None:
        """Send SIGTERM, unless it has ended."""
        if self.running:
            self.process.terminate()

    def stop(self, timeout_seconds: float = STOP_SECONDS) -> None:
        """Stop it and wait; after `timeout_seconds` kill it and every process that it started."""
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
    """Return the command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def start_replica(name: str, model: Path, log: Path, *arguments: str) -> Child:
    """Start llama.cpp with `model` on a free port of loopback; its first line is its base URL."""
    return Child(name, python("demo.engine", "--model", str(model), *arguments), log, piped=True)

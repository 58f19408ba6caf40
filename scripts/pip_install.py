"""Installs a lock with this environment's pip and shows how far it is; pip's own words only where it fails.

    .venv/bin/python scripts/pip_install.py requirements/run.lock

Standard library alone: it runs before anything is installed.
"""

# ruff: noqa: S603, T201 - a command of our own, and its progress

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PLAIN_STEP = 16  # packages a line where the output is no terminal


def main(lock: str) -> int:
    """Run pip to its end and return its exit code."""
    total = len(re.findall(r"^[\w.-]+==", Path(lock).read_text(encoding="utf-8"), re.MULTILINE))
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--require-hashes", "-r", lock]
    said: list[str] = []
    done = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None  # noqa: S101 - piped
        for line in pip.stdout:
            said.append(line)
            first, _, rest = line.strip().partition(" ")
            if first == "Ignoring":  # for another platform
                total -= 1
            elif first in ("Collecting", "Processing", "Requirement"):
                done += 1
                name = Path(rest.removeprefix("already satisfied: ").split(" ")[0]).name
                show(f"  {done} of {total} packages: {re.split('==|-[0-9]', name)[0]}", whole=done % PLAIN_STEP == 0)
            elif first == "Installing":
                show(f"  installing {total} packages", whole=True)
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    if pip.returncode:
        print("".join(said))
    return pip.returncode


def show(text: str, *, whole: bool) -> None:
    """Replace the line on a terminal; elsewhere print the `whole` ones only."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif whole:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

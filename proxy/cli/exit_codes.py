"""End a command that cannot do what was asked: a line on standard error for each problem, and an exit code."""

from __future__ import annotations

from typing import NoReturn

from proxy.cli.terminal import print_sentence

FAILED = 1
"""The command failed."""

MISUSED = 2
"""The configuration or the command line is wrong; click's own code for that."""


def fail(*problems: str, code: int = FAILED) -> NoReturn:
    """Print each problem and exit with `code`."""
    for problem in problems:
        print_sentence(f"cairn: {problem}", indent="  ", err=True)
    raise SystemExit(code)

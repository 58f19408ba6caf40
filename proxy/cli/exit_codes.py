"""How every command ends where it could not do what was asked: one line on standard error, and a code.

It must not know any command.
"""

from __future__ import annotations

from typing import NoReturn

import click

FAILED = 1
"""It could not run."""

MISUSED = 2
"""The configuration or the command line is wrong; click's own code for that."""


def fail(text: str, code: int = FAILED) -> NoReturn:
    """Say what is wrong and exit."""
    click.echo(f"cairn: {text}", err=True)
    raise SystemExit(code)

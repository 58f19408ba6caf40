"""Print tables to standard output, with the layout that fits."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

import click

from proxy.cli.tables import Column, fold, lay_out


def terminal_width(*, err: bool = False) -> int | None:
    """Return the width of the terminal, or None if standard output (or `err`, standard error) is no terminal."""
    stream = sys.stderr if err else sys.stdout
    return shutil.get_terminal_size().columns if stream is not None and stream.isatty() else None


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table after its title."""
    if title:
        click.echo(click.style(title, bold=True))
    for line in lay_out(columns, rows, terminal_width()):
        click.echo(line)


def print_sentence(sentence: str, indent: str = "", *, err: bool = False) -> None:
    """Print a sentence, broken between words in a terminal; each line but the first begins with `indent`."""
    for line in fold(sentence, terminal_width(err=err), indent):
        click.echo(line, err=err)

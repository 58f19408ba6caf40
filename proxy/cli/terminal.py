"""Print tables to standard output, with the layout that fits."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

import click

from proxy.cli.tables import Column, fold, lay_out


def terminal_width() -> int | None:
    """Return the width of the terminal that standard output is, or None if it is a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table after its title."""
    if title:
        click.echo(click.style(title, bold=True))
    for line in lay_out(columns, rows, terminal_width()):
        click.echo(line)


def print_sentence(sentence: str, indent: str = "") -> None:
    """Print a sentence, broken between words in a terminal; each line but the first begins with `indent`."""
    for line in fold(sentence, terminal_width(), indent):
        click.echo(line)

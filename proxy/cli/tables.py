"""Lay out tables and sentences for a terminal or a pipe. Pure; no value is ever cut or broken.

In a terminal a table that is too wide is written as records, one line per value, and a sentence is broken between
words. A pipe gets both at their full width, whatever that is.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len

_GAP = "  "
_NO_BREAK_SPACE = "\u00a0"
_NARROWEST = 20  # a terminal that reports less, or nothing, gets lines of this width


class Column(NamedTuple):
    """A column's heading, and whether its values are numbers, which are aligned to the right."""

    heading: str
    is_number: bool = False


def text(heading: str) -> Column:
    """Return a column of texts."""
    return Column(heading)


def number(heading: str) -> Column:
    """Return a column of numbers."""
    return Column(heading, is_number=True)


def printable(sentence: str) -> str:
    """Return a text that may come from anywhere without what could control a terminal or cannot be written.

    >>> printable("a\\nb\\x1b[2J")
    'a b\ufffd[2J'
    """
    if sentence.isprintable():
        return sentence
    return "".join([each if each.isprintable() else " " if each.isspace() else "\ufffd" for each in sentence])


def lay_out(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Return the lines of a table, or of records if the table is wider than `width` (None: any width)."""
    rows = [[printable(cell) for cell in row] for row in rows]
    sizes = [max(map(cell_len, (column.heading, *(row[at] for row in rows)))) for at, column in enumerate(columns)]
    if width is not None and sum(sizes) + len(_GAP) * (len(columns) - 1) > width:
        return _records(columns, rows, width)
    headings = [column.heading for column in columns]
    return [_line(columns, sizes, row) for row in (headings, *rows)]


def _line(columns: Sequence[Column], sizes: Sequence[int], cells: Sequence[str]) -> str:
    padded = []
    for column, size, cell in zip(columns, sizes, cells, strict=True):
        space = " " * (size - cell_len(cell))
        padded.append(space + cell if column.is_number else cell + space)
    return _GAP.join(padded).rstrip()


def _records(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the rows one after another, under the first heading: the first value, then a line for each other column.

    A text that does not fit beside its heading is on a line of its own.
    """
    widest = max((cell_len(column.heading) for column in columns[1:]), default=0)
    numbers = max((cell_len(row[at]) for row in rows for at, each in enumerate(columns) if each.is_number), default=0)
    lines = [columns[0].heading]
    for row in rows:
        lines.append(f"  {row[0]}")
        for column, cell in zip(columns[1:], row[1:], strict=True):
            heading = column.heading + " " * (widest - cell_len(column.heading))
            line = f"    {heading}{_GAP}{cell.rjust(numbers) if column.is_number else cell}"
            fits = column.is_number or cell_len(line) <= width
            lines += [line] if fits else [f"    {column.heading}", *fold(f"      {cell}", width, "      ")]
    return lines


def fold(sentence: str, width: int | None, indent: str = "") -> list[str]:
    """Return the lines of `sentence`, broken between words, but not between a number and its unit.

    Args:
        sentence: spaces at its begin are kept.
        width: of the terminal, in characters; None for one line.
        indent: what each line but the first begins with.
    """
    sentence = printable(sentence)
    if width is None:
        return [sentence]
    words = re.sub(r"(?<=\d) (?=\S)", _NO_BREAK_SPACE, sentence.lstrip())
    lines = textwrap.wrap(
        words,
        max(width, _NARROWEST),
        initial_indent=sentence[: len(sentence) - len(sentence.lstrip())],
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK_SPACE, " ") for line in lines]

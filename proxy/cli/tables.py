"""Lay out tables for a terminal or a pipe. Pure; no value is ever cut or broken.

In a terminal a table that is too wide is written as records, one line per value. A pipe gets the table at its full
width, whatever that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len

_GAP = "  "


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


def lay_out(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Return the lines of a table, or of records if the table is wider than `width` (None: any width)."""
    sizes = [max(map(cell_len, (column.heading, *(row[at] for row in rows)))) for at, column in enumerate(columns)]
    if width is not None and sum(sizes) + len(_GAP) * (len(columns) - 1) > width:
        return _records(columns, rows)
    headings = [column.heading for column in columns]
    return [_line(columns, sizes, row) for row in (headings, *rows)]


def _line(columns: Sequence[Column], sizes: Sequence[int], cells: Sequence[str]) -> str:
    padded = []
    for column, size, cell in zip(columns, sizes, cells, strict=True):
        space = " " * (size - cell_len(cell))
        padded.append(space + cell if column.is_number else cell + space)
    return _GAP.join(padded).rstrip()


def _records(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows one after another: the first value as a title, then a line for each other column."""
    widest = max((cell_len(column.heading) for column in columns[1:]), default=0)
    numbers = max((cell_len(row[at]) for row in rows for at, each in enumerate(columns) if each.is_number), default=0)
    lines: list[str] = []
    for row in rows:
        lines.append(row[0])
        for column, cell in zip(columns[1:], row[1:], strict=True):
            heading = column.heading + " " * (widest - cell_len(column.heading))
            lines.append(f"  {heading}{_GAP}{cell.rjust(numbers) if column.is_number else cell}")
    return lines

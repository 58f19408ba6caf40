"""Print tables so that no figure is cut short."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_ANY_WIDTH: Final = 10_000  # characters


def print_table(table: Table) -> None:
    """Print a table at its full width, also into a file, and in a terminal that is narrower and breaks its lines."""
    console = Console()
    needed = Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum
    Console(width=max(console.width, needed)).print(table)

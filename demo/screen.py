"""Show progress: one line per step, with a spinner if the output is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console

from demo.report import shown_seconds
from proxy.clock import Clock

PLAIN_WIDTH = 120  # columns if the output is not a terminal, so that no address is cut


class Screen:
    """A console with steps. If the output is not a terminal, it has the same lines without colour or spinner."""

    def __init__(self, clock: Clock) -> None:
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that lacks a character shows "?"
        self.console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
        self._clock = clock

    def say(self, text: str = "", style: str | None = None) -> None:
        """Print text as it is: without markup, and without breaking long lines."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show `text` while the block runs, and how long it took when it ends without an exception."""
        started_seconds = self._clock.monotonic()
        with self.console.status(f"{text} ..."):
            yield
        took = shown_seconds(self._clock.monotonic() - started_seconds)
        self.console.print(f"[green]✓[/green] {text} [dim]({took})[/dim]", soft_wrap=True)

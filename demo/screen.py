"""What a person sees while things are set up: one line a step, with a spinner where the output is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console

from demo.report import shown_seconds
from proxy.clock import Clock

PLAIN_WIDTH = 120  # columns where the output is no terminal, so that no address is cut


class Screen:
    """A console that knows steps. Output that is not a terminal gets the same lines without colour or movement."""

    def __init__(self, clock: Clock) -> None:
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that lacks a sign shows "?"
        self.console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
        self._clock = clock

    def say(self, text: str = "", style: str | None = None) -> None:
        """Print text as it is: square brackets mean nothing, long lines are not broken."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Show that `text` is going on, and when it is done how long it took; nothing more where it fails."""
        started_seconds = self._clock.monotonic()
        with self.console.status(f"{text} ..."):
            yield
        took = shown_seconds(self._clock.monotonic() - started_seconds)
        self.console.print(f"[green]✓[/green] {text} [dim]({took})[/dim]", soft_wrap=True)

"""Event loops for tests: uvloop, which serves, and the standard one, whose reads and writes come otherwise."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

import uvloop

STANDARD_LOOP_PAUSES_WRITERS = not (
    (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2)
)
"""In the other versions a protocol that writes several pieces at once is never paused (CVE-2024-12254)."""


def both_loops() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return functions that make each loop, by its name; without the standard one where it pauses no writers."""
    standard = {"asyncio": asyncio.new_event_loop} if STANDARD_LOOP_PAUSES_WRITERS else {}
    return {**standard, "uvloop": uvloop.new_event_loop}

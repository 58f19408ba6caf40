"""Protocols that the cache needs from its surroundings; the proxy passes in the implementations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol


class Clock(Protocol):
    """Two clocks, both in seconds."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never jumps; only differences are meaningful."""
        ...

    def unix(self) -> float:
        """Return seconds since 1970, which can be compared between machines."""
        ...


class Tasks(Protocol):
    """Starts background tasks, keeps references to them, and logs and counts their failures."""

    def start(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `coroutine` in the background, once."""
        ...

    def keep(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> asyncio.Task[Any]:
        """Run `work()` in the background, and run it again, after a pause, each time it fails."""
        ...

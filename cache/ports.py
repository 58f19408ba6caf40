"""What the cache needs of its surroundings, as protocols: it imports nothing of the proxy, the proxy hands it in."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol


class Clock(Protocol):
    """Two clocks, in seconds."""

    def monotonic(self) -> float:
        """On a clock that never jumps; only differences mean anything."""
        ...

    def unix(self) -> float:
        """Since 1970; what is compared between machines."""
        ...


class Tasks(Protocol):
    """Who starts background tasks, keeps them referenced and reports their failure."""

    def start(self, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run it in the background."""
        ...

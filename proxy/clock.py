"""The only module that reads a clock; everything else is passed a `Clock`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Two clocks: one for durations, one for dates."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never jumps; only differences are meaningful."""
        ...

    def unix(self) -> float:
        """Return seconds since 1970, for dates that are shown or stored."""
        ...


class SystemClock:
    """The machine's clocks. Attributes, so that reading one costs a single C call."""

    monotonic = staticmethod(time.monotonic)  # noqa: TID251 - the one place
    unix = staticmethod(time.time)  # noqa: TID251


def utc_date(unix_seconds: float) -> str:
    """Return the day in UTC, as 2026-01-31."""
    return datetime.fromtimestamp(unix_seconds, UTC).date().isoformat()

"""The only place that reads a clock; everything else is handed a `Clock`."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Two clocks: one for durations, one for dates."""

    def monotonic(self) -> float:
        """Seconds on a clock that never jumps; only differences mean anything."""
        ...

    def unix(self) -> float:
        """Seconds since 1970, for dates shown to people and stored."""
        ...


class SystemClock:
    """The machine's clocks. Bound as attributes, so that a reading costs one C call."""

    monotonic = staticmethod(time.monotonic)  # noqa: TID251 - this module is where it may be
    unix = staticmethod(time.time)  # noqa: TID251


def utc_date(unix_seconds: float) -> str:
    """Return the day in UTC, as 2026-01-31."""
    return datetime.fromtimestamp(unix_seconds, UTC).date().isoformat()

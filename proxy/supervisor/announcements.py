"""Log lines that several workers announce only once. Pure except for the log.

Each worker examines the replicas by itself, and they mostly find the same at about the same time.
"""

from __future__ import annotations

import logging
from typing import Final

from proxy.control.messages import Announced
from proxy.logs import REPLICAS

SAME_SECONDS: Final = 60.0
"""Time within which the same line from another worker is taken for the same event."""

LINES_MOST: Final = 4096  # remembered; the oldest are forgotten

log = logging.getLogger(REPLICAS)


class Announcements:
    """The lines logged recently, each with the worker that announced it first."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[int, float]] = {}

    def add(self, worker: int, line: Announced, now_seconds: float) -> None:
        """Log a line, unless another worker announced the same a moment ago."""
        first, logged_seconds = self._logged.get(line.text, (worker, 0.0))
        if first != worker and now_seconds - logged_seconds < SAME_SECONDS:
            return
        self._logged.pop(line.text, None)
        self._logged[line.text] = (worker, now_seconds)
        if len(self._logged) > LINES_MOST:
            del self._logged[next(iter(self._logged))]
        log.log(line.level, "%s", line.text)

"""Log lines that several workers announce only once. Pure except for the log.

Each worker examines the replicas by itself, and they mostly find the same at about the same time.
"""

from __future__ import annotations

import logging
from typing import Final, TypeVar

from proxy.control.messages import Announced
from proxy.logs import REPLICAS

SAME_SECONDS: Final = 60.0
"""Time within which the same line from another worker is taken for the same event."""

LINES_MOST: Final = 4096  # remembered; the oldest are forgotten

log = logging.getLogger(REPLICAS)
_Value = TypeVar("_Value")


class Announcements:
    """The lines logged recently, each with the worker that announced it first, and the last line of each subject."""

    def __init__(self) -> None:
        self._logged: dict[str, tuple[int, float]] = {}
        self._last: dict[str, tuple[int, str]] = {}

    def add(self, worker: int, line: Announced, now_seconds: float) -> None:
        """Log a line, unless another worker announced the same a moment ago.

        A line that replaces this worker's own is logged in any case: the last one about a replica must be true.
        """
        subject = line.text.partition(")")[0]  # "replica NAME (pool POOL", with which such lines begin
        first, logged_seconds = self._logged.get(line.text, (worker, 0.0))
        last_worker, last_text = self._last.get(subject, (None, ""))
        replaces_own = last_worker == worker and last_text != line.text
        if first != worker and now_seconds - logged_seconds < SAME_SECONDS and not replaces_own:
            return
        _put(self._logged, line.text, (worker, now_seconds))
        _put(self._last, subject, (worker, line.text))
        log.log(line.level, "%s", line.text)


def _put(lines: dict[str, _Value], key: str, value: _Value) -> None:
    """Set an entry as the newest, and forget the oldest if there are too many."""
    lines.pop(key, None)
    lines[key] = value
    if len(lines) > LINES_MOST:
        del lines[next(iter(lines))]

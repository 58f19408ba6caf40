"""Small sums on measurements; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the nearest-rank percentile of values in ascending order; NaN if there are none."""
    if not ordered:
        return math.nan
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def size_label(size_bytes: int) -> str:
    """Format 1024 as "1 KB", 2097152 as "2 MB"."""
    for unit, factor in (("MB", 1 << 20), ("KB", 1 << 10)):
        if size_bytes >= factor and size_bytes % factor == 0:
            return f"{size_bytes // factor} {unit}"
    return f"{size_bytes} B"


def parse_size(text: str) -> int:
    """Return the bytes of "1k", "64K", "2m" or "300". Raises ValueError for anything else."""
    factor = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower(), 1)
    size_bytes = int(text[:-1] if factor > 1 else text) * factor
    if size_bytes <= 0:
        raise ValueError(f"not a size: {text}")
    return size_bytes

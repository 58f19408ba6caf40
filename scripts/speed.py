"""How quick this Python is: prints the microseconds that a fixed piece of work takes it, the best of a few.

An interpreter built without profile-guided optimisation takes half as long again, and nothing in it says so reliably.
Exits with 1 where Cairn could not be installed with it: too old, or without venv and pip.

Standard library alone: setup.sh asks each Python that it finds.
"""

from __future__ import annotations

import importlib.util
import sys
import time

LEAST = (3, 11)
ROUNDS = 9
STEPS = 4_000


class Stone:
    """Something with attributes and a method."""

    __slots__ = ("below", "height")

    def __init__(self, below: Stone | None, height: int) -> None:
        self.below = below
        self.height = height

    def over(self, other: Stone) -> bool:
        return self.height > other.height


def work() -> int:
    """Calls, attributes, dictionaries and small objects, as a proxy has them."""
    first = last = Stone(None, 0)
    known: dict[bytes, int] = {}
    for step in range(STEPS):
        last = Stone(last, step % 97)
        if last.over(first):
            known[b"%d" % last.height] = len(known)
    return len(known)


def main() -> int:
    """Print the figure; the exit code says whether this Python will do."""
    if sys.version_info < LEAST or not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
        return 1
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter_ns()
        work()
        times.append(time.perf_counter_ns() - began)
    print(min(times) // 1000)  # noqa: T201 - what setup.sh reads
    return 0


if __name__ == "__main__":
    sys.exit(main())

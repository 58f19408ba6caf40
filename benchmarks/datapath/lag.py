"""How long does an event loop stand still under 2 MB bodies? Seen from outside, by small requests that wait.

One generator sends 2 MB bodies at a steady pace, another small ones; the latency of the small ones beyond what they
take while nothing else runs is the time that they waited. The direct row is what the machine, the upstream and the
generators themselves cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import msgspec
from rich.table import Table

from benchmarks.common.load import Generator, Job
from benchmarks.datapath.contestants import DIRECT, Started

_SMALL = Job(port=0, size_bytes=1024, connections=1, interval_seconds=0.004, warm_requests=16)
_LARGE = Job(port=0, size_bytes=2 << 20, connections=4, interval_seconds=0.08, warm_requests=4)


class Lag(msgspec.Struct, frozen=True):
    """Milliseconds of small requests: alone, and beside 2 MB bodies."""

    proxy: str
    alone_p50: float
    alone_p99: float
    p50: float
    p99: float
    max: float
    large_per_second: float


def probe(name: str, port: int, seconds: float, small: Generator, large: Generator) -> Lag:
    """One proxy (or the upstream itself)."""
    small_job = msgspec.structs.replace(_SMALL, port=port, seconds=seconds)
    large_job = msgspec.structs.replace(_LARGE, port=port, seconds=seconds)
    alone = small.run(small_job)
    large.prepare(large_job)
    small.prepare(small_job)
    large.start()
    small.start()
    beside = small.finish()
    bodies = large.finish()
    return Lag(
        name,
        alone.p50_seconds * 1e3,
        alone.p99_seconds * 1e3,
        beside.p50_seconds * 1e3,
        beside.p99_seconds * 1e3,
        beside.max_seconds * 1e3,
        bodies.requests / bodies.seconds,
    )


def probe_all(started: Sequence[Started], direct_port: int, seconds: float, stack: ExitStack) -> list[Lag]:
    """The upstream itself, then each proxy."""
    small, large = Generator(0), Generator(1)
    stack.callback(small.stop)
    stack.callback(large.stop)
    targets = [(DIRECT, direct_port), *((proxy.name, proxy.port) for proxy in started)]
    return [probe(name, port, seconds, small, large) for name, port in targets]


def table(lags: Sequence[Lag]) -> Table:
    """One row per proxy."""
    found = Table(title="Small requests (1 KB every 4 ms) beside 50 bodies of 2 MB a second, milliseconds")
    for title in ("proxy", "alone p50", "alone p99", "beside p50", "beside p99", "beside max", "2 MB bodies/s"):
        found.add_column(title, justify="left" if title == "proxy" else "right")
    for lag in lags:
        figures = (lag.alone_p50, lag.alone_p99, lag.p50, lag.p99, lag.max, lag.large_per_second)
        found.add_row(lag.proxy, *(f"{figure:.2f}" for figure in figures))
    return found

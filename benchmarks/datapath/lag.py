"""Measure how long an event loop is blocked by 2 MB bodies, from outside, by small requests that wait.

One generator sends 2 MB bodies at a steady pace, another small ones; the latency of the small ones beyond what they
take while nothing else runs is the time that they waited. The direct row is what the machine, the upstream and the
generators themselves cost; on two busy cores that is most of it. If a proxy shows its loop's lag in its metrics
(`cairn_event_loop_lag_seconds`), the highest bucket reached is shown too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec
from rich.table import Table

from benchmarks.common import metrics_page
from benchmarks.common.load import Generator, Job
from benchmarks.common.processes import get
from benchmarks.datapath.contestants import CAIRN, DIRECT, Started

_LOOP_LAG = "cairn_event_loop_lag_seconds"
_SMALL = Job(port=0, size_bytes=1024, connections=1, interval_seconds=0.004, warm_requests=16)
_LARGE = Job(port=0, size_bytes=2 << 20, connections=4, interval_seconds=0.08, warm_requests=4)


class Lag(msgspec.Struct, frozen=True):
    """Milliseconds of small requests: alone, and together with 2 MB bodies."""

    proxy: str
    alone_p50: float
    alone_p99: float
    p50: float
    p99: float
    max: float
    large_per_second: float
    loop_at_most: float | None = None  # as the loop itself reports it, the bound of a histogram's bucket


def probe(name: str, port: int, seconds: float, small: Generator, large: Generator) -> Lag:
    """Measure one proxy (or the upstream itself)."""
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
    """Measure the upstream itself, then each proxy."""
    small, large = Generator(0), Generator(1)
    stack.callback(small.stop)
    stack.callback(large.stop)
    found = [probe(DIRECT, direct_port, seconds, small, large)]
    for proxy in started:
        before = _metrics(proxy)
        lag = probe(proxy.name, proxy.port, seconds, small, large)
        bound = metrics_page.longest_observed(before, _metrics(proxy), _LOOP_LAG)
        found.append(msgspec.structs.replace(lag, loop_at_most=None if bound is None else bound * 1e3))
    return found


def _metrics(proxy: Started) -> dict[str, float]:
    if proxy.name != CAIRN:
        return {}
    return metrics_page.parse(asyncio.run(get(proxy.side_port, "/metrics"))[1].decode())


def table(lags: Sequence[Lag]) -> Table:
    """Return a table with one row per proxy."""
    found = Table(title="Small requests (1 KB every 4 ms) together with 50 bodies of 2 MB a second, milliseconds")
    for title in (
        "proxy",
        "alone p50",
        "alone p99",
        "beside p50",
        "beside p99",
        "beside max",
        "2 MB bodies/s",
        "its loop",
    ):
        found.add_column(title, justify="left" if title == "proxy" else "right")
    for lag in lags:
        figures = (lag.alone_p50, lag.alone_p99, lag.p50, lag.p99, lag.max, lag.large_per_second)
        loop = "-" if lag.loop_at_most is None else f"at most {lag.loop_at_most:g}"
        found.add_row(lag.proxy, *(f"{figure:.2f}" for figure in figures), loop)
    return found

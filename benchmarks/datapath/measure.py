"""Measure: alternate the proxies within each round, and read CPU clocks exactly around the counted requests.

The result is one `Sample` per proxy, cell and round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from benchmarks.common import cpu
from benchmarks.common.figures import size_label
from benchmarks.common.load import Generator, Job, Result
from benchmarks.datapath.contestants import Started

STREAM = "chunk"  # the name of the cell whose unit is a streamed chunk
# A router files the new half of every body in its tree; without a bound, 2 MB bodies would fill memory instead of
# measuring anything. 512 MB allows about 250 requests of 2 MB, at least 0.3 s of CPU.
_BODY_BYTES_PER_SAMPLE = 512 << 20
_WARM_REQUESTS = 48  # three for each of 16 connections


class Cell(msgspec.Struct, frozen=True):
    """One column: what is sent, and how many units of work one request is."""

    name: str
    job: Job
    units_per_request: int = 1


class Sample(msgspec.Struct, frozen=True):
    """One proxy in one cell in one round. CPU seconds by role of the process."""

    proxy: str
    cell: str
    round: int
    cpu_seconds: dict[str, float]
    units: int
    result: Result

    def microseconds(self, role: str) -> float:
        """Return the CPU microseconds of one role per unit."""
        return self.cpu_seconds.get(role, 0.0) / self.units * 1e6


class WrongAnswer(Exception):
    """A proxy's answer differs from the upstream's."""


def cells(
    sizes: Sequence[int], chunks: int, seconds: float, connections: int, requests: int, shared_share: float
) -> list[Cell]:
    """Return the columns: one per size, and the stream if `chunks` is not zero."""
    found = []
    for size in sizes:
        limit = min(requests or 1_000_000, max(connections, _BODY_BYTES_PER_SAMPLE // size))
        job = Job(
            port=0,
            size_bytes=size,
            shared_share=shared_share,
            connections=connections,
            seconds=seconds,
            max_requests=limit,
            warm_requests=min(_WARM_REQUESTS, limit),
        )
        found.append(Cell(size_label(size), job))
    if chunks:
        job = Job(port=0, stream=True, connections=connections, seconds=seconds, warm_requests=connections)
        found.append(Cell(STREAM, job, chunks))
    return found


def cpu_by_role(roles: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return the CPU seconds so far of the processes of each role."""
    return {role: sum(map(cpu.cpu_seconds, pids)) for role, pids in roles.items()}


def sample(started: Started, cell: Cell, round_: int, generators: Sequence[Generator], answer_bytes: int) -> Sample:
    """Measure once. Raises `WrongAnswer` on any failure, and on an answer of another size than `answer_bytes`."""
    job = msgspec.structs.replace(cell.job, port=started.port)
    for generator in generators:
        generator.prepare(job)
    roles = started.roles()
    before = cpu_by_role(roles)
    for generator in generators:
        generator.start()
    results = [generator.finish() for generator in generators]
    after = cpu_by_role(roles)
    for result in results:
        if result.failures or set(result.answer_sizes) != {answer_bytes}:
            sizes = result.answer_sizes
            raise WrongAnswer(
                f"{started.name} at {cell.name}: {result.failures}, sizes {sizes} and not {answer_bytes}\n"
                f"{started.running.last_words()}"
            )
    spent = {role: after[role] - before[role] for role in roles}
    requests = sum(result.requests for result in results)
    return Sample(started.name, cell.name, round_, spent, requests * cell.units_per_request, results[0])


def check(started: Started, cell: Cell, direct_port: int, generator: Generator) -> int:
    """Send one body directly and one through the proxy, compare the answers byte for byte, and return their size.

    The two bodies differ in their stamp only, on which the upstream's answer does not depend.
    """
    once = msgspec.structs.replace(cell.job, connections=1, max_requests=1, warm_requests=0, capture=True)
    direct = generator.run(msgspec.structs.replace(once, port=direct_port))
    through = generator.run(msgspec.structs.replace(once, port=started.port))
    if through.failures or direct.answer_digest != through.answer_digest or not direct.answer_digest:
        raise WrongAnswer(
            f"{started.name} at {cell.name}: its answer differs from the upstream's "
            f"({through.failures}, {through.answer_bytes} bytes and not {direct.answer_bytes})\n"
            f"{started.running.last_words()}"
        )
    return direct.answer_bytes


def order(names: Sequence[str], round_: int) -> Iterator[str]:
    """Return the proxies of a round, each round beginning with another one, so that none is always the first."""
    shift = round_ % len(names)
    yield from names[shift:]
    yield from names[:shift]

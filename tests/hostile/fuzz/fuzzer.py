"""Run many sessions at once, and judge what is left when all have ended."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.hostile.fuzz.session import Session, Tally
from tests.hostile.fuzz.world import MIB, Held, World, running_world

REQUESTS_PER_SESSION = 25
AT_ONCE = 24  # sessions
FINDINGS_MOST = 25  # after which no further session begins
_WARMING_SHARE = 0.25  # of the requests, in which tables and caches fill
_QUIET_SECONDS = 2.0
_MEMORY_GROWTH_MOST = 0.10
_MEMORY_GROWTH_BYTES_LEAST = 24 * MIB  # what a short run may still add: tables that have a bound are not full yet
_MORE_DESCRIPTORS = {"upstream": 64, "redis": 16}  # connections that are kept for the next request, within a bound

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a run."""

    tally: Tally
    warm: Held
    end: Held
    seconds: float
    problems: list[str]


async def fuzz(
    requests: int, seed: int, progress: Progress = lambda done, findings: None, *, only: int | None = None
) -> Verdict:
    """Send a number of requests, made from `seed`, or those of the session `only`.

    `progress` gets the numbers of requests and of findings so far.
    """
    loop = asyncio.get_running_loop()
    tally = Tally()
    async with running_world(seed) as world:
        begin = loop.time()
        if only is not None:
            await Session(seed, only, world.ports, world.recorder, tally).run(REQUESTS_PER_SESSION)
            requests = 0
        sessions = itertools.count()
        warming = int(requests * _WARMING_SHARE)
        await _run(world, seed, sessions, tally, warming, progress)
        warm = await _quiet(world)
        await _run(world, seed, sessions, tally, requests, progress)
        end = await _quiet(world)
        seconds = loop.time() - begin
        problems = [*tally.findings, *world.complaints(), *growth(warm, end)]
    return Verdict(tally, warm, end, seconds, problems)


async def _run(
    world: World, seed: int, sessions: Iterator[int], tally: Tally, until: int, progress: Progress
) -> None:
    async def visit() -> None:
        while tally.requests < until and len(tally.findings) < FINDINGS_MOST:
            await Session(seed, next(sessions), world.ports, world.recorder, tally).run(REQUESTS_PER_SESSION)
            progress(tally.requests, len(tally.findings))

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(visit())


async def _quiet(world: World) -> Held:
    await asyncio.sleep(_QUIET_SECONDS)
    return world.held()


def growth(warm: Held, end: Held) -> list[str]:
    """Return what grew by more than it may."""
    problems = []
    allowed_bytes = max(_MEMORY_GROWTH_BYTES_LEAST, int(warm.memory_bytes * _MEMORY_GROWTH_MOST))
    if end.memory_bytes > warm.memory_bytes + allowed_bytes:
        problems.append(f"memory grew from {warm.memory_bytes / MIB:.1f} to {end.memory_bytes / MIB:.1f} MB")
    for kind in sorted({*warm.descriptors, *end.descriptors}):
        before, after = warm.descriptors.get(kind, 0), end.descriptors.get(kind, 0)
        if after > before + _MORE_DESCRIPTORS.get(kind, 0):
            problems.append(f"open descriptors ({kind}) grew from {before} to {after}")
    return problems

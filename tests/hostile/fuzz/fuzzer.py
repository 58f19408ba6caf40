"""Run many sessions at once, and judge what is left when all have ended."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proxy.worker.maintenance import TRIM_SECONDS
from tests.hostile.fuzz.session import Session, Tally
from tests.hostile.fuzz.world import CONTEXT_BYTES, INDEX_BYTES, MIB, Held, World, running_world

REQUESTS_PER_SESSION = 25
AT_ONCE = 24  # sessions
FINDINGS_MOST = 25  # after which no further session begins
_WARMING_SHARE = 0.25  # of the requests, in which tables and caches fill
_QUIET_SECONDS = 2.0
_TRIMMED_SECONDS = TRIM_SECONDS + _QUIET_SECONDS  # after which the freed memory of large bodies was returned
FULL_SHARE = 0.9  # of its bound, from which a table counts as full
OVER_SHARE = 1.05  # the next request makes room for what the last one added
FULL_REQUESTS = 15_000  # after which the tables must be full; in a shorter warming they still grow
MEMORY_GROWTH_MOST = 0.10  # of full tables: the allocators keep free memory between what lives
SHORT_MEMORY_GROWTH_MOST = 0.15  # in a short run the tables, of 2 MB in all, are not full yet
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
        are_full = warming >= FULL_REQUESTS
        quiet_seconds = _TRIMMED_SECONDS if are_full else _QUIET_SECONDS
        warm = await _quiet(world, quiet_seconds)
        await _run(world, seed, sessions, tally, requests, progress)
        seconds = loop.time() - begin
        end = await _quiet(world, quiet_seconds)
        problems = [*tally.findings, *world.complaints(), *growth(warm, end, are_full=are_full)]
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


async def _quiet(world: World, seconds: float) -> Held:
    await asyncio.sleep(seconds)
    return await world.held_and_kept()


def growth(warm: Held, end: Held, *, are_full: bool) -> list[str]:
    """Return what grew by more than it may. `are_full` tells whether all tables must have been full when warm."""
    problems = []
    for table, before, after, bound in (
        ("index", warm.index_bytes, end.index_bytes, INDEX_BYTES),
        ("contents", warm.context_bytes, end.context_bytes, CONTEXT_BYTES),
    ):
        if are_full and before < FULL_SHARE * bound:
            problems.append(f"the {table} was not full ({before} of {bound} bytes): memory proves nothing")
        if after > OVER_SHARE * bound:
            problems.append(f"the {table} has {after} bytes, at most {bound}")
    allowed_share = MEMORY_GROWTH_MOST if are_full else SHORT_MEMORY_GROWTH_MOST
    if end.memory_bytes > warm.memory_bytes * (1 + allowed_share):
        problems.append(f"memory grew from {warm.memory_bytes / MIB:.1f} to {end.memory_bytes / MIB:.1f} MB")
    for kind in sorted({*warm.descriptors, *end.descriptors}):
        before, after = warm.descriptors.get(kind, 0), end.descriptors.get(kind, 0)
        if after > before + _MORE_DESCRIPTORS.get(kind, 0):
            problems.append(f"open descriptors ({kind}) grew from {before} to {after}")
    return problems

"""`python -m benchmarks.agents.live [FILE]`: the closed loop over HTTP, against simulated engines in scaled time.

Some routers' results depend on which sessions meet at which engine, so several sets of sessions are made up, by seeds
that are fixed beforehand, and the mean over all sets is shown with the least and the most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from statistics import fmean

import aiohttp
import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.agents.loop import ARRIVAL_SECONDS, Loop, endless
from benchmarks.agents.sessions import Session, read_sessions, shared_blocks, synthetic, unshared_tokens
from benchmarks.common.processes import StartFailed, end_on_signals, scratch_folder
from benchmarks.common.tables import print_table
from benchmarks.datapath.contestants import SGLANG
from benchmarks.fleet.trace import Request
from benchmarks.replay.contestants import UNGATED, Entrant, Plan, cairn_name, enter
from benchmarks.replay.drive import Seen, ask
from benchmarks.replay.texts import Texts
from proxy.clock import SystemClock
from proxy.tasks import Tasks

_CLOCK = SystemClock()
ROWS = (cairn_name(1), cairn_name(2), UNGATED, SGLANG)
SESSIONS = 400


class Turns(msgspec.Struct, frozen=True):
    """Result of one router and set of sessions. Times are in the engines' seconds."""

    turns_per_hour: float
    hit_share: float
    mean_ttft_seconds: float
    p50_ttft_seconds: float
    p99_ttft_seconds: float
    max_ttft_seconds: float
    failed: int


class _Drive:
    """The active sessions before one router."""

    def __init__(self, entrant: Entrant, sessions: Iterator[Session], texts: Texts, loop: Loop, speed: float) -> None:
        self._entrant = entrant
        self._sessions = sessions
        self._texts = texts
        self._loop = loop
        self._speed = speed
        self._numbers = count()
        self._began = _CLOCK.monotonic()
        self.seen: list[tuple[float, Seen]] = []

    def now(self) -> float:
        """Return the engines' seconds since the start."""
        return (_CLOCK.monotonic() - self._began) * self._speed

    async def run(self) -> None:
        """Drive all sessions until the time is over; unfinished turns do not count."""
        connector = aiohttp.TCPConnector(limit=0)
        tasks = Tasks()
        async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 18) as http:
            for place in range(self._loop.active):
                tasks.start(self._keep_going(http, place), f"session {place}")
            await asyncio.sleep(self._loop.seconds / self._speed)
            await tasks.close()

    async def _keep_going(self, http: aiohttp.ClientSession, place: int) -> None:
        await asyncio.sleep(ARRIVAL_SECONDS * place / self._loop.active / self._speed)
        while True:
            for number, turn in enumerate(next(self._sessions)):
                if number:
                    await asyncio.sleep(turn.pause_seconds / self._speed)
                await self._turn(http, turn.request(next(self._numbers), self.now()))

    async def _turn(self, http: aiohttp.ClientSession, request: Request) -> None:
        port = self._entrant.ports[request.number % len(self._entrant.ports)]
        body = self._texts.body(request)
        try:
            seen = await ask(http, port, request, body, _CLOCK.monotonic(), 0.0)
        except (aiohttp.ClientError, OSError) as error:
            seen = Seen(0, 0.0, 0.0, error=type(error).__name__)
        self.seen.append((self.now(), seen))

    def turns(self) -> Turns:
        """Return the result after the warm-up."""
        warm_up, seconds = self._loop.warm_up_seconds, self._loop.seconds
        counted = [seen for ended, seen in self.seen if ended >= warm_up]
        answered = [seen for seen in counted if not seen.error]
        waits = sorted(seen.ttft_seconds * self._speed for seen in answered) or [0.0]
        return Turns(
            turns_per_hour=len(answered) * 3_600 / (seconds - warm_up),
            hit_share=sum(seen.cached_tokens for seen in answered)
            / max(sum(seen.prompt_tokens for seen in answered), 1),
            mean_ttft_seconds=sum(waits) / len(waits),
            p50_ttft_seconds=waits[len(waits) // 2],
            p99_ttft_seconds=waits[min(int(len(waits) * 0.99), len(waits) - 1)],
            max_ttft_seconds=waits[-1],
            failed=len(counted) - len(answered),
        )


@click.command()
@click.argument("sessions", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--x", default=2.0, show_default=True, help="context of all active sessions over cache")
@click.option("--engines", default=4, show_default=True)
@click.option("--capacity", default=1_000_000, show_default=True, help="tokens that each engine's cache holds")
@click.option("--speed", default=10.0, show_default=True, help="how much faster than the clock time runs")
@click.option("--seconds", default=2_400.0, show_default=True, help="of the engines, of which a third is warm-up")
@click.option("--seeds", default="1,2,3", show_default=True, help="of the sets of sessions that are made up")
@click.option("--only", default="", help="these rows, by semicolons")
def main(
    sessions: Path | None,
    x: float,
    engines: int,
    capacity: int,
    speed: float,
    seconds: float,
    seeds: str,
    only: str,
) -> None:
    """Compare routers on SESSIONS (.jsonl or .jsonl.gz), or on sets of sessions made up."""
    end_on_signals()
    if sessions is None:
        sets = {f"set {seed}": synthetic(SESSIONS, int(seed)) for seed in seeds.split(",")}
    else:
        sets = {sessions.name: read_sessions(sessions)}
    wanted = [part.strip() for part in only.split(";") if part.strip()]
    console, results = Console(), dict[str, dict[str, Turns]]()
    for set_name, made in sets.items():
        shared = shared_blocks(made)
        active = max(round(x * engines * capacity / unshared_tokens(made, shared)), 1)
        loop = Loop(active, engines, capacity, seconds, seconds / 3)
        for name in (row for row in ROWS if not wanted or row in wanted):
            turns = _run(name, made, loop, speed, console)
            if turns is not None:
                results.setdefault(name, {})[set_name] = turns
    title = f"{engines} engines of {capacity:,} tokens, sessions that need {x:g} x that, time x{speed:g}"
    print_table(_table(title, results))


def _run(name: str, made: list[Session], loop: Loop, speed: float, console: Console) -> Turns | None:
    """Run one set of sessions through one router; return None if it cannot be started."""
    with scratch_folder() as folder, ExitStack() as stack:
        plan = Plan(loop.replicas, loop.capacity_tokens, speed, Path(folder), pins=True)
        try:
            return asyncio.run(_measure(name, plan, endless(made, shared_blocks(made)), loop, stack))
        except StartFailed as failure:
            console.print(f"left out: {failure}", highlight=False)
            return None


async def _measure(name: str, plan: Plan, sessions: Iterator[Session], loop: Loop, stack: ExitStack) -> Turns:
    drive = _Drive(await enter(name, plan, stack), sessions, Texts(), loop, plan.speed)
    await drive.run()
    return drive.turns()


def _table(title: str, results: dict[str, dict[str, Turns]]) -> Table:
    """Show each router's mean over all sets, and below it the sets if there are several."""
    table = Table(title=title)
    for heading in ("router", "turns/h", "least - most", "hit %", "mean TTFT s", "p50", "p99", "max", "failed"):
        table.add_column(heading, justify="left" if heading == "router" else "right", no_wrap=True)
    for name, by_set in results.items():
        sets = list(by_set.values())
        counts = [turns.turns_per_hour for turns in sets]
        table.add_row(name, *_cells(mean_of(sets), f"{min(counts):,.0f} - {max(counts):,.0f}"))
        if len(sets) > 1:
            for set_name, turns in by_set.items():
                table.add_row(f"  {set_name}", *_cells(turns))
    return table


def mean_of(sets: Sequence[Turns]) -> Turns:
    """Return the means over several sets of sessions; of `max_ttft_seconds` the largest, of `failed` the sum."""
    return Turns(
        turns_per_hour=fmean(each.turns_per_hour for each in sets),
        hit_share=fmean(each.hit_share for each in sets),
        mean_ttft_seconds=fmean(each.mean_ttft_seconds for each in sets),
        p50_ttft_seconds=fmean(each.p50_ttft_seconds for each in sets),
        p99_ttft_seconds=fmean(each.p99_ttft_seconds for each in sets),
        max_ttft_seconds=max(each.max_ttft_seconds for each in sets),
        failed=sum(each.failed for each in sets),
    )


def _cells(turns: Turns, spread: str = "") -> tuple[str, ...]:
    return (
        f"{turns.turns_per_hour:,.0f}",
        spread,
        f"{100 * turns.hit_share:.1f}",
        f"{turns.mean_ttft_seconds:.2f}",
        f"{turns.p50_ttft_seconds:.2f}",
        f"{turns.p99_ttft_seconds:.1f}",
        f"{turns.max_ttft_seconds:.0f}",
        str(turns.failed),
    )


if __name__ == "__main__":
    main()

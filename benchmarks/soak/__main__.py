"""Send many mixed requests to Cairn (plain, streams, leaving clients, resets), then check that nothing is left over.

python -m benchmarks.soak [--requests 200000] [--clients 64] [--workers 1] [--proxy cairn]
Exit code 0: every answer was right and nothing is left over; 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.common.processes import Running, StartFailed, end_on_signals, free_port, scratch_folder
from benchmarks.common.tables import print_table
from benchmarks.datapath.contestants import BARE, CAIRN, Started, contestants, start
from benchmarks.soak.leftovers import Finding, Moment, compare, look
from benchmarks.soak.visits import SHARES, Visitors, wrong
from proxy.clock import SystemClock

_REPLICAS = 2
_CHUNKS = 20
_START_SECONDS = 20.0
_QUIET_SECONDS = 3.0  # after the last client left: cancellations, settlements and a tick of every timer
_SEED = 7


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exit with 2 if they are wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--clients", type=int, default=64, help="at a time")
    parser.add_argument("--workers", type=int, default=1, help="Cairn's worker processes")
    parser.add_argument("--growth", type=float, default=0.05, help="memory growth allowed after the first tenth")
    parser.add_argument("--refused", type=float, default=0.01, help="share of 503 allowed, after resets")
    parser.add_argument(
        "--proxy", default=CAIRN, help="another proxy of the data path benchmark, to try the soak itself"
    )
    return parser.parse_args(arguments)


async def _start(options: argparse.Namespace, folder: Path, stack: ExitStack) -> tuple[Started, list[int]]:
    ports = [free_port() for _ in range(_REPLICAS)]
    command = [sys.executable, "-m", "benchmarks.common.upstream", "--ports", ",".join(map(str, ports))]
    upstream = Running("upstream", [*command, "--chunks", str(_CHUNKS), "--chunk-seconds", "0.001"], folder)
    stack.callback(upstream.stop)
    await upstream.answers(ports[0], "/health", _START_SECONDS)
    chosen = next(contestant for contestant in contestants() if contestant.name == options.proxy)
    started = await start(chosen, ports, folder, options.workers, True)
    stack.callback(started.running.stop)
    return started, ports


async def soak(options: argparse.Namespace, console: Console, stack: ExitStack, folder: Path) -> bool:
    """Run the soak; return whether everything is right."""
    clock = SystemClock()
    started, ports = await _start(options, folder, stack)
    visitors = Visitors(started.port, _SEED)
    begin = clock.monotonic()
    moments = []
    with console.status("the first tenth") as status:
        for share in (0.1, 0.9):
            await visitors.visit(int(options.requests * share), options.clients)
            moments.append(await _quiet(started, ports))
            status.update(f"{sum(visitors.tally.values()):,} of {options.requests:,}")
    seconds = clock.monotonic() - begin
    mistakes = wrong(visitors.tally, options.refused)
    findings = compare(moments[0], moments[1], options.growth)
    print_table(_visits_table(visitors, seconds))
    print_table(_findings_table(findings))
    for mistake, count in mistakes.items():
        console.print(f"[red]wrong:[/red] {mistake} {count:,} times")
    if mistakes:
        console.print(started.running.last_words(), markup=False, highlight=False)
    return not mistakes and all(finding.right for finding in findings)


async def _quiet(started: Started, ports: Sequence[int]) -> Moment:
    await asyncio.sleep(_QUIET_SECONDS)
    side_port = None if started.name == BARE else started.side_port
    roles = started.roles()
    return await look(roles["proxy"], roles.get("valkey", ()), started.port, side_port, ports)


def _visits_table(visitors: Visitors, seconds: float) -> Table:
    total = sum(visitors.tally.values())
    table = Table(title=f"{total:,} requests in {seconds:.0f} s, {total / seconds:,.0f} a second")
    for title in ("visit", "ended", "times"):
        table.add_column(title, justify="right" if title == "times" else "left")
    for visit in SHARES:
        for (other, word), count in sorted(visitors.tally.items()):
            if other == visit:
                table.add_row(visit, word, f"{count:,}")
    return table


def _findings_table(findings: Sequence[Finding]) -> Table:
    table = Table(title="What is left when all clients are gone")
    for title in ("what", "after a tenth", "at the end", ""):
        table.add_column(title)
    for finding in findings:
        table.add_row(finding.what, finding.before, finding.after, "ok" if finding.right else "[red]LEFT OVER[/red]")
    return table


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    end_on_signals()
    console = Console()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(scratch_folder()))
        try:
            right = uvloop.run(soak(options, console, stack, folder))
        except StartFailed as failure:
            console.print(str(failure), style="red", highlight=False)
            return 1
    console.print("nothing is left over" if right else "[red]the soak failed[/red]")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Fuzz a running Cairn: `python -m tests.hostile.fuzz [--requests 1000000] [--seed 17]`.

A real worker, a real Valkey and a recorded upstream get requests to every endpoint of the client port and the admin
port, three quarters of them mutated: their JSON, bytes, targets, headers, framing, and when the client leaves. The
run fails on a 500, a hang, an upstream request that is lost or sent twice, an answer other than the upstream's, a
defect in the log, and on growth of memory or descriptors. The same seed makes the same requests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.common.processes import StartFailed, end_on_signals
from benchmarks.common.tables import print_table
from tests.hostile.fuzz.fuzzer import Verdict, fuzz
from tests.hostile.fuzz.world import MIB


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; ends the process with 2 for wrong ones."""
    parser = argparse.ArgumentParser(prog="tests.hostile.fuzz", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--requests", type=int, default=1_000_000, help="how many to send (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=17, help="from which they are made (default: %(default)s)")
    parser.add_argument("--session", type=int, help="send only the requests of this one, which a finding names")
    return parser.parse_args(arguments)


def outcomes_table(verdict: Verdict) -> Table:
    """The outcomes by kind of request."""
    outcomes = verdict.tally.outcomes
    columns = sorted({outcome for _, outcome in outcomes})
    rate = verdict.tally.requests / verdict.seconds
    table = Table(title=f"{verdict.tally.requests:,} requests in {verdict.seconds:.0f} s, {rate:,.0f} a second")
    table.add_column("kind")
    for column in columns:
        table.add_column(column, justify="right")
    for kind in sorted({kind for kind, _ in outcomes}):
        table.add_row(kind, *[f"{outcomes[kind, column]:,}" if outcomes[kind, column] else "" for column in columns])
    warm, end = verdict.warm, verdict.end
    table.caption = (
        f"memory {warm.memory_bytes / MIB:.1f} MB after a quarter, {end.memory_bytes / MIB:.1f} MB at the end; "
        f"index {warm.index_bytes / MIB:.2f}, {end.index_bytes / MIB:.2f} MB; "
        f"contents {warm.context_bytes / MIB:.2f}, {end.context_bytes / MIB:.2f} MB; "
        f"descriptors {sum(warm.descriptors.values())}, {sum(end.descriptors.values())}; "
        f"{len(verdict.problems)} problems"
    )
    return table


def main(arguments: Sequence[str]) -> int:
    """Return 0 if nothing was found, otherwise 1."""
    options = parse_arguments(arguments)
    end_on_signals()
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("fuzzing", total=options.requests)

            def progress(done: int, findings: int) -> None:
                bar.update(task, completed=done, description=f"fuzzing, {findings} findings")

            verdict = uvloop.run(fuzz(options.requests, options.seed, progress, only=options.session))
    except StartFailed as failure:
        console.print(str(failure), style="red", highlight=False)
        return 1
    print_table(outcomes_table(verdict))
    for problem in verdict.problems:
        console.print(problem, markup=False, highlight=False, soft_wrap=True)
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

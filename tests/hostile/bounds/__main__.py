"""Show that what Cairn holds is bounded: `python -m tests.hostile.bounds [--short]`.

10^5 requests with 10,000 prompts, 1,000 models, 1,000 keys and 10,000 header names and ids, of which an eighth store
contexts and make objects, each a new one, beyond the bounds that are configured for them; 5,000 silent connections;
1,000 that trickle a head; 500 bodies of 2 MB at once, of which those beyond `server.max_in_flight_bytes` are refused;
/explain with the largest body. Exit code 1 if anything grew by more than it may.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Sequence

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.common.processes import end_on_signals
from benchmarks.common.tables import print_table
from tests.hostile.bounds.loads import FULL, LOADS, SHORT, Measured, Scale
from tests.hostile.fuzz.world import MIB, Held, running_world


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; ends the process with 2 for wrong ones."""
    parser = argparse.ArgumentParser(prog="tests.hostile.bounds", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--short", action="store_true", help="the sizes of `make test`")
    return parser.parse_args(arguments)


async def measure(scale: Scale, console: Console) -> list[Measured]:
    """Send all loads to one Cairn."""
    results = []
    async with running_world(1) as world:
        for load in LOADS:
            console.print(f"{(load.__doc__ or '').strip()} ...", highlight=False)
            results.append(await load(world, scale))
    return results


def table_of(results: Sequence[Measured]) -> Table:
    """The figures of all loads."""
    table = Table(title="What Cairn holds: supervisor and one worker")
    for title in ("load", "before", "at most", "afterwards", "descriptors", "not served"):
        table.add_column(title, justify="left" if title == "load" else "right")
    for each in results:
        held = (each.before, each.during, each.after)
        counts = ", ".join(str(sum(one.descriptors.values())) for one in held)
        table.add_row(each.name, *[_shown(one) for one in held], counts, str(each.refused))
    return table


def _shown(held: Held) -> str:
    return f"{held.memory_bytes / MIB:.1f} MB"


def main(arguments: Sequence[str]) -> int:
    """Return 0 if everything stayed within its bounds, otherwise 1."""
    options = parse_arguments(arguments)
    end_on_signals()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each connection has an end in this process
    console = Console()
    results = uvloop.run(measure(SHORT if options.short else FULL, console))
    print_table(table_of(results))
    problems = [problem for each in results for problem in each.problems]
    for problem in problems:
        console.print(problem, highlight=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

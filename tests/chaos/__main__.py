"""Break Redis, replicas, workers and the machine under load, and count what clients lost.

Two workers, three replicas and a Valkey run on loopback while twelve clients send plain and streamed requests and
compare every byte of every answer. Exit code 0: no answer was lost but those in flight in a killed process, none was
wrong, everything healed, and the counters are right afterwards; 1: not so.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.common.processes import end_on_signals
from tests.chaos.plays import SCENARIOS, Scenario
from tests.chaos.run import Skipped, play
from tests.chaos.stack import Failed
from tests.chaos.verdict import Verdict

_NAMES = [scenario.name for scenario in SCENARIOS]


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; ends the process with 2 for wrong ones."""
    parser = argparse.ArgumentParser(
        prog="tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="scenarios:\n" + "\n".join(f"  {each.name:20}{each.what}" for each in SCENARIOS),
    )
    parser.add_argument("--only", action="append", choices=_NAMES, metavar="NAME", help="play this one; repeatable")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long a fault lasts (default: 2)")
    parser.add_argument("--seed", type=int, default=1, help="of the clients' choices (default: 1)")
    parser.add_argument("--keep", action="store_true", help="keep the logs of scenarios that failed")
    return parser.parse_args(arguments)


def table(verdicts: Sequence[Verdict], skipped: Sequence[tuple[str, str]]) -> Table:
    """Return the results as a table."""
    found = Table(title="Faults under load")
    found.add_column("scenario")
    for title in ("requests", "in flight in a killed process", "refused", "lost", "wrong", "healed after"):
        found.add_column(title, justify="right")
    found.add_column("/readyz")
    found.add_column("verdict")
    for each in verdicts:
        healed = "never" if each.heal_seconds is None else f"{each.heal_seconds:.1f} s"
        counts = (each.requests, each.in_flight, each.refused, each.lost, each.wrong)
        found.add_row(
            each.name, *map(str, counts), healed, each.shown or "ready", "FAILED" if each.problems else "ok"
        )
    for name, why in skipped:
        found.add_row(name, *["-"] * 6, why, "skipped")
    return found


async def chaos(scenarios: Sequence[Scenario], options: argparse.Namespace, console: Console) -> bool:
    """Play all scenarios, one after the other; returns whether all went well."""
    verdicts: list[Verdict] = []
    skipped: list[tuple[str, str]] = []
    for number, scenario in enumerate(scenarios, 1):
        console.print(f"{number}/{len(scenarios)} {scenario.name}: {scenario.what} ...", highlight=False)
        folder = Path(tempfile.mkdtemp(prefix="cairn-chaos-"))
        try:
            verdict = await play(scenario, folder, hold_seconds=options.seconds, seed=options.seed)
        except Skipped as why:
            skipped.append((scenario.name, str(why)))
            continue
        except Failed as failure:
            verdict = Verdict(scenario.name, 0, 0, 0, 0, 0, None, "", (str(failure),))
        finally:
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
        verdicts.append(verdict)
        for problem in verdict.problems:
            console.print(f"    {problem}", style="red", markup=False, highlight=False)
        if verdict.problems and options.keep:
            console.print(f"    logs: {folder}", highlight=False)
    console.print(table(verdicts, skipped))
    return not any(verdict.problems for verdict in verdicts)


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    end_on_signals()
    console = Console(width=None if sys.stdout.isatty() else 160)
    scenarios = [each for each in SCENARIOS if not options.only or each.name in options.only]
    return 0 if uvloop.run(chaos(scenarios, options, console)) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

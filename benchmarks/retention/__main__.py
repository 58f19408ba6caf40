"""Compare keeping what is worth most per byte with LRU and LFU, by tokens saved on a conversation trace.

python -m benchmarks.retention TRACE [--budgets 1,3,10] [--requests N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.common.tables import print_table
from benchmarks.fleet.trace import read_trace
from benchmarks.retention.policies import POLICIES, Outcome, run

OURS, YARDSTICK = "worth per byte", "LRU"


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exit with 2 if they are wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.retention", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("trace", type=Path, help="a .jsonl or .jsonl.gz in Mooncake's form")
    parser.add_argument("--budgets", default="1,3,10", help="room, in percent of the trace's segments, by commas")
    parser.add_argument("--requests", type=int, default=None, help="only the first N")
    options = parser.parse_args(arguments)
    options.budgets = [float(text) for text in options.budgets.split(",")]
    return options


def table(results: dict[float, dict[str, Outcome]], segments: int) -> Table:
    """Return a table with a row for each budget."""
    shown = Table(title=f"prompt tokens saved, of {segments:,} segments of 512 tokens")
    for name in ("room", *POLICIES, f"against {YARDSTICK}"):
        shown.add_column(name, justify="right")
    for budget, outcomes in results.items():
        gain = outcomes[OURS].saved_tokens / max(1, outcomes[YARDSTICK].saved_tokens) - 1
        shares = [f"{outcomes[name].share:.2%}" for name in POLICIES]
        shown.add_row(f"{budget:g} %", *shares, f"{gain:+.1%}")
    return shown


def main(arguments: Sequence[str]) -> int:
    """Return 0 if the rule saves more than LRU at every budget, else 1."""
    options = parse_arguments(arguments)
    requests = read_trace(options.trace, options.requests)
    segments = len({block for request in requests for block in request.blocks})
    results = {
        budget: {name: run(requests, rank, max(1, round(segments * budget / 100))) for name, rank in POLICIES.items()}
        for budget in options.budgets
    }
    print_table(table(results, segments))
    better = all(found[OURS].saved_tokens > found[YARDSTICK].saved_tokens for found in results.values())
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

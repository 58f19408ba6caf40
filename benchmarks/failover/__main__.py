"""Measure what clients see of a sick replica beside a well one, failure by failure.

    python -m benchmarks.failover [--requests 100]

Each cell is a separate pool with a sick and a well replica, behind one Cairn; requests are sent one after another.
The table is Markdown: errors that reached the client, and in brackets how many requests the sick replica saw.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path

import aiohttp

from benchmarks.common.processes import Running, end_on_signals, free_port, scratch_folder
from benchmarks.failover.table import ClosedLater, as_markdown, cells, measure_all, pools
from benchmarks.failover.upstreams import Upstreams

START_SECONDS = 40.0


async def run(requests: int, folder: Path) -> str:
    """Measure the whole table with a Cairn in a separate process."""
    closing = ClosedLater()
    await closing.open()
    async with Upstreams() as upstreams, aiohttp.ClientSession() as http:
        port, admin_port = free_port(), free_port()
        file = folder / "cairn.json"
        settings = {
            "server": {"port": port},
            "admin": {"port": admin_port},
            "log": {"access": False},
            "pools": pools(upstreams, closing.port),
        }
        file.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "proxy", "serve", "--config", str(file)]
        cairn = Running("cairn", command, folder, {"XDG_DATA_HOME": str(folder)})
        try:
            await cairn.answers(admin_port, "/readyz", START_SECONDS)
            await closing.close()
            results = await measure_all(http, f"http://127.0.0.1:{port}/v1", upstreams, requests, cells())
        finally:
            cairn.stop()
    return as_markdown(results, requests)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100, help="of each cell")
    chosen = parser.parse_args()
    end_on_signals()
    with scratch_folder() as folder:
        print(asyncio.run(run(chosen.requests, Path(folder))))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.agents.flood`: a tenant that floods the fleet, and how long another one's requests take.

One tenant sends everything at once. Another one sends short prompts, one after the other, through the same proxy and
to the same simulated engines, each as soon as the one before has ended.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import aiohttp
import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.common.processes import StartFailed, end_on_signals, scratch_folder
from benchmarks.common.tables import print_table
from benchmarks.fleet.trace import BYTES_PER_TOKEN
from benchmarks.replay.contestants import Entrant, Plan, cairn_name, enter
from proxy.clock import SystemClock
from proxy.tasks import Tasks

_CLOCK = SystemClock()
_FIRST_TOKEN = b'"content":"w'
_CAPACITY_TOKENS = 1_000_000
_BEFORE_SECONDS = 1.0
"""Engine time for which the flood runs alone."""


class Flood(msgspec.Struct, frozen=True):
    """`count` prompts of `tokens` each, sent at once."""

    count: int
    tokens: int


FLOODS = (Flood(24, 100_000), Flood(300, 4_000))


@click.command()
@click.option("--engines", default=4, show_default=True)
@click.option("--speed", default=1.0, show_default=True, help="how much faster than the clock the engines are")
@click.option("--prompts", default=15, show_default=True, help="short prompts")
@click.option("--tokens", default=1_000, show_default=True, help="of each short prompt")
def main(engines: int, speed: float, prompts: int, tokens: int) -> None:
    """Print the time to first token of a tenant's short prompts beside floods of another, in engine seconds."""
    end_on_signals()
    table = Table(title=f"{prompts} prompts of {tokens:,} tokens beside a flood, {engines} engines, time x{speed:g}")
    for heading in ("flood", "max_concurrent", "p50 s", "longest", "alone p50"):
        table.add_column(heading, justify="left" if heading == "flood" else "right", no_wrap=True)
    console = Console()
    for flood in FLOODS:
        for limit in (None, 2):
            with scratch_folder() as folder, ExitStack() as stack:
                plan = Plan(engines, _CAPACITY_TOKENS, speed, Path(folder), pins=True, max_concurrent=limit)
                try:
                    waits, alone = asyncio.run(_measure(plan, flood, prompts, tokens, stack))
                except StartFailed as failure:
                    console.print(f"left out: {failure}", highlight=False)
                    continue
            shown = (f"{median(waits):.2f}", f"{max(waits):.2f}", f"{median(alone):.2f}")
            table.add_row(f"{flood.count} x {flood.tokens:,} tokens", str(limit or "-"), *shown)
    print_table(table)


async def _measure(
    plan: Plan, flood: Flood, prompts: int, tokens: int, stack: ExitStack
) -> tuple[list[float], list[float]]:
    """Return the engine seconds to the first token beside the flood, and those before it."""
    entrant, flooding = await enter(cairn_name(1), plan, stack), Tasks()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        alone = [await _ask(http, entrant, "other", f"alone{n}", tokens) for n in range(prompts)]
        for number in range(flood.count):
            flooding.start(_ask(http, entrant, "flood", f"flood{number}", flood.tokens), f"flood {number}")
        await asyncio.sleep(_BEFORE_SECONDS / plan.speed)
        waits = [await _ask(http, entrant, "other", f"short{n}", tokens) for n in range(prompts)]
        await flooding.close()
    return [each * plan.speed for each in waits], [each * plan.speed for each in alone]


async def _ask(http: aiohttp.ClientSession, entrant: Entrant, tenant: str, name: str, tokens: int) -> float:
    """Send a prompt that shares nothing with others; return the seconds to its first token."""
    size = BYTES_PER_TOKEN * tokens
    text = (f"{name} " * (size // (len(name) + 1) + 1))[:size]
    body = {"model": "replay", "stream": True, "max_tokens": 4, "messages": [{"role": "user", "content": text}]}
    url, sent, first = f"http://127.0.0.1:{entrant.ports[0]}/v1/chat/completions", _CLOCK.monotonic(), 0.0
    async with http.post(url, json=body, headers={"authorization": f"Bearer {tenant}"}) as answer:
        answer.raise_for_status()
        async for piece in answer.content.iter_any():
            if not first and _FIRST_TOKEN in piece:
                first = _CLOCK.monotonic()
    return first - sent


if __name__ == "__main__":
    main()

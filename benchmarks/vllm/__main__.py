"""`python -m benchmarks.vllm`: sessions over and under the capacity of two real vLLM servers, by router."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.common.processes import Running, StartFailed, end_on_signals, free_port, scratch_folder
from benchmarks.common.tables import print_table
from benchmarks.vllm.engines import empty_caches, is_installed, start_engines
from benchmarks.vllm.sessions import Closed, Figures, Load
from proxy.clock import SystemClock

_START_SECONDS = 60.0
BLOCK_TOKENS = 32
BLOCKS = 1_500


class Case(msgspec.Struct, frozen=True):
    """A load, and what it is to show. With `ranks` it is one server with two data-parallel ranks."""

    title: str
    load: Load
    rows: tuple[str, ...]
    ranks: bool = False


ROUND_ROBIN, CAIRN, UNGATED = "round robin", "Cairn", "Cairn without the gate"
DIRECT, RANKS_UNKNOWN = "vLLM alone", "Cairn, ranks unknown"
CASES = {
    "room": Case("room: sessions need 0.6 of the cache", Load(20, 3_000, 2.0, 30, 90), (ROUND_ROBIN, CAIRN)),
    "pressure": Case(
        "pressure: sessions need 1.25 of the cache", Load(40, 3_000, 2.0, 30, 110), (ROUND_ROBIN, UNGATED, CAIRN)
    ),
    "thrash": Case(
        "thrash: sessions need 1.75 of the cache, think time 2 s", Load(56, 3_000, 2.0, 40, 120), (UNGATED, CAIRN)
    ),
    "calm": Case("the same, think time 10 s", Load(56, 3_000, 10.0, 40, 120), (UNGATED, CAIRN)),
    "ranks": Case(
        "room: sessions need 0.6 of the cache",
        Load(20, 3_000, 2.0, 30, 90),
        (DIRECT, RANKS_UNKNOWN, CAIRN),
        ranks=True,
    ),
}


class Row(msgspec.Struct, frozen=True):
    """Figures of one router; `budgets` is the most that Cairn believed of each engine."""

    name: str
    figures: Figures
    budgets: tuple[int, ...] = ()


@click.command()
@click.option("--only", default=",".join(CASES), show_default=True, help="cases, by commas")
@click.option("--seconds", default=0.0, help="measured time of each row in place of the case's own")
@click.option("--seed", default=1, show_default=True)
def main(only: str, seconds: float, seed: int) -> None:
    """Compare routers before two vLLM servers on the CPU."""
    end_on_signals()
    if not is_installed():
        raise click.UsageError("vLLM is not installed: run `make bench-vllm`, which installs it (3 GB)")
    unknown = set(only.split(",")) - set(CASES)
    if unknown:
        raise click.UsageError(f"unknown cases: {', '.join(sorted(unknown))}")
    cases = [_within(CASES[name], seconds) for name in only.split(",")]
    with scratch_folder() as folder:
        try:
            asyncio.run(_measure_all(cases, seed, Path(folder)))
        except StartFailed as failure:
            Console(stderr=True).print(f"given up: {failure}", highlight=False)
            sys.exit(1)


def _within(case: Case, seconds: float) -> Case:
    """Return the case with another measured time, if one is given."""
    if not seconds:
        return case
    load = msgspec.structs.replace(case.load, seconds=case.load.warm_up_seconds + seconds)
    return msgspec.structs.replace(case, load=load)


async def _measure_all(cases: Sequence[Case], seed: int, folder: Path) -> None:
    """Run the cases of two engines, then those of one engine with ranks."""
    options = ["--num-gpu-blocks-override", str(BLOCKS), "--block-size", str(BLOCK_TOKENS)]
    for count, more in ((2, []), (1, ["--data-parallel-size", "2"])):
        chosen = [case for case in cases if case.ranks == bool(more)]
        if chosen:
            with ExitStack() as engine_stack:
                engines = await start_engines(count, [*options, *more], folder, engine_stack)
                await _measure_cases(chosen, seed, engines, folder)


async def _measure_cases(cases: Sequence[Case], seed: int, engines: Sequence[int], folder: Path) -> None:
    """Run all rows before the same engines, whose caches are emptied before each."""
    for case in cases:
        rows = []
        for name in case.rows:
            await empty_caches(engines)
            with ExitStack() as row_stack:
                rows.append(await _measure(name, case.load, seed, engines, folder, row_stack))
        print_table(_table(case, rows))


async def _measure(name: str, load: Load, seed: int, engines: Sequence[int], folder: Path, stack: ExitStack) -> Row:
    """Run the load through one router."""
    if name in (ROUND_ROBIN, DIRECT):
        return Row(name, await Closed(load, lambda number: engines[number % len(engines)], seed).run())
    replica = {"ranks": 1} if name == RANKS_UNKNOWN else {}
    port, admin = await _start_cairn(engines, replica, gated=name != UNGATED, folder=folder, stack=stack)
    figures, believed = await asyncio.gather(
        Closed(load, lambda _: port, seed).run(), _most_believed(admin, load.seconds)
    )
    return Row(name, figures, believed)


async def _start_cairn(
    engines: Sequence[int], replica: Mapping[str, object], *, gated: bool, folder: Path, stack: ExitStack
) -> tuple[int, int]:
    """Start Cairn with its defaults and `replica` for each engine, and return its port and its admin port."""
    replicas = [{"url": f"http://127.0.0.1:{port}", **replica} for port in engines]
    config = {
        "pools": [{"name": "engines", "replicas": replicas}],
        "admission": {"enabled": "auto" if gated else "never"},
    }
    file, port, admin = folder / "cairn.yaml", free_port(), free_port()
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "proxy", "serve", "--config", str(file), "--host", "127.0.0.1"]
    running = Running("cairn", [*command, "--port", str(port), "--admin-port", str(admin)], folder)
    stack.callback(running.stop)
    await running.answers(port, "/v1/models", _START_SECONDS)
    return port, admin


async def _most_believed(admin_port: int, seconds: float) -> tuple[int, ...]:
    """Read the status page's stream for a time; return the most tokens that each engine was believed to hold."""
    most: dict[str, int] = {}
    until = SystemClock().monotonic() + seconds
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{admin_port}/events") as events:
        while SystemClock().monotonic() < until:
            line = await asyncio.wait_for(events.content.readline(), 30)
            if line.startswith(b"data:"):
                for replica in _replicas(json.loads(line[5:])):
                    budget = replica.get("budget_tokens") or 0
                    most[replica["name"]] = max(most.get(replica["name"], 0), budget)
    return tuple(most.values())


def _replicas(event: Any) -> list[dict[str, Any]]:
    replicas = event.get("replicas") if isinstance(event, dict) else None
    return replicas if isinstance(replicas, list) else []


def _table(case: Case, rows: Sequence[Row]) -> Table:
    load = case.load
    table = Table(
        title=f"{'2 ranks of one vLLM' if case.ranks else '2 vLLM'} of {BLOCKS * BLOCK_TOKENS:,} tokens, "
        f"{load.sessions} sessions of {load.prompt_tokens:,}: "
        f"{case.title}"
    )
    for heading in ("router", "turns", "cached", "computed/turn", "predicted/reported", "mean TTFT s", "p50", "p99"):
        table.add_column(heading, justify="left" if heading == "router" else "right", no_wrap=True)
    table.add_column("max")
    table.add_column("failed")
    table.add_column("believed at most")
    for row in rows:
        each = row.figures
        agreement = (
            "" if each.predicted_tokens is None else f"{each.predicted_tokens / max(each.cached_tokens, 1):.3f}"
        )
        table.add_row(
            row.name,
            str(each.turns),
            f"{each.cached_share:.1%}",
            f"{each.computed_per_turn:,.0f}",
            agreement,
            *(f"{value:.2f}" for value in each.ttft_seconds),
            str(each.failed),
            ", ".join(f"{budget:,}" for budget in row.budgets),
        )
    return table


if __name__ == "__main__":
    main()

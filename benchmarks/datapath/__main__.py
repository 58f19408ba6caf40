"""Compare CPU per request and latency of Cairn, a bare aiohttp pass-through and the Rust routers in one run.

python -m benchmarks.datapath [--sizes 1k,64k,512k,2m] [--rounds 3] [--seconds 2] [--only cairn,sglang-router] [--lag]
"""

from __future__ import annotations

import argparse
import asyncio
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from benchmarks.common.figures import parse_size
from benchmarks.common.load import Generator
from benchmarks.common.processes import ROOT, Running, StartFailed, end_on_signals, free_port, scratch_folder
from benchmarks.common.tables import print_table
from benchmarks.datapath import lag, report, streams
from benchmarks.datapath.contestants import BARE, CAIRN, Contestant, Started, contestants, installed_cairn, start
from benchmarks.datapath.measure import Cell, Sample, WrongAnswer, cells, check, order, sample

_REPLICAS = 2
_UPSTREAM_START_SECONDS = 20.0


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options; exit with 2 if they are wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.datapath", description=(__doc__ or "").split("\n", 1)[0])
    sizes = parser.add_argument("--sizes", default="1k,64k,512k,2m", help="body sizes, by commas")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the best is shown")
    parser.add_argument("--seconds", type=float, default=2.0, help="the length of one measurement")
    parser.add_argument("--requests", type=int, default=0, help="most requests per measurement")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--generators", type=int, default=1, help="load processes, each with all connections")
    parser.add_argument("--chunks", type=int, default=200, help="chunks of a streamed answer; 0 leaves streams out")
    parser.add_argument("--chunk-seconds", type=float, default=0.002, help="between two chunks of one stream")
    parser.add_argument("--shared", type=float, default=0.5, help="the share of each prompt that all have in common")
    parser.add_argument("--workers", type=int, default=1, help="Cairn's worker processes")
    parser.add_argument("--peers", default="all", choices=("all", "none"), help="none: only bare aiohttp and Cairn")
    parser.add_argument("--quiet-peers", action="store_true", help="routers log warnings only, not each request")
    parser.add_argument("--only", default="", help="names of proxies, by commas")
    parser.add_argument("--lag", action="store_true", help="instead: small requests while 2 MB bodies pass")
    parser.add_argument("--streams", type=int, default=0, help="measure this many open, silent streams instead")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "datapath.json")
    options = parser.parse_args(arguments)
    try:
        options.sizes = [parse_size(text) for text in options.sizes.split(",") if text]
    except ValueError as error:
        parser.error(f"argument {sizes.option_strings[0]}: {error}")
    return options


def chosen(options: argparse.Namespace, console: Console) -> list[Contestant]:
    """Return the proxies asked for, and print which are not installed."""
    wanted = [name.strip() for name in options.only.split(",") if name.strip()]
    if not wanted and options.peers == "none":
        wanted = [BARE, CAIRN]
    found = []
    for contestant in contestants():
        if wanted and contestant.name not in wanted:
            continue
        if contestant.installed():
            found.append(contestant)
            if contestant.name == CAIRN:
                console.print(installed_cairn(), highlight=False)
        else:
            console.print(f"{contestant.name} is not installed; `make bench-peers` installs the routers")
    return found


def upstream_command(ports: Sequence[int], options: argparse.Namespace) -> list[str]:
    """Return the static upstream's command line."""
    seconds = streams.SILENT_SECONDS if options.streams else options.chunk_seconds
    command = [sys.executable, "-m", "benchmarks.common.upstream", "--ports", ",".join(map(str, ports))]
    command += ["--chunks", str(options.chunks), "--chunk-seconds", str(seconds)]
    return [*command, "--cached-share", str(options.shared)]


async def start_all(
    found: Sequence[Contestant], ports: Sequence[int], options: argparse.Namespace, folder: Path, stack: ExitStack
) -> list[Started]:
    """Start the upstream and each proxy; one that does not start is shown and left out."""
    upstream = Running("upstream", upstream_command(ports, options), folder)
    stack.callback(upstream.stop)
    for port in ports:
        await upstream.answers(port, "/health", _UPSTREAM_START_SECONDS)
    started = []
    for contestant in found:
        try:
            proxy = await start(contestant, ports, folder, options.workers, options.quiet_peers)
        except StartFailed as failure:
            Console(stderr=True).print(f"[red]left out:[/red] {failure}", highlight=False)
            continue
        stack.callback(proxy.running.stop)
        started.append(proxy)
    return started


def measure_all(
    started: Sequence[Started],
    columns: Sequence[Cell],
    direct_port: int,
    options: argparse.Namespace,
    stack: ExitStack,
    console: Console,
) -> list[Sample]:
    """Run all rounds; first check that each proxy answers correctly in each cell."""
    generators = [Generator(number) for number in range(options.generators)]
    for generator in generators:
        stack.callback(generator.stop)
    by_name = {proxy.name: proxy for proxy in started}
    sizes = {}
    for cell in columns:
        for proxy in started:
            sizes[cell.name] = check(proxy, cell, direct_port, generators[0])
    samples = []
    with console.status("measuring") as status:
        for round_ in range(options.rounds):
            for cell in columns:
                for name in order(list(by_name), round_):
                    status.update(f"round {round_ + 1} of {options.rounds}: {cell.name}, {name}")
                    samples.append(sample(by_name[name], cell, round_, generators, sizes[cell.name]))
    return samples


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    end_on_signals()
    console = Console()
    if options.streams:
        options.streams = streams.allow_descriptors(options.streams)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(scratch_folder()))
        ports = [free_port() for _ in range(_REPLICAS)]
        try:
            started = asyncio.run(start_all(chosen(options, console), ports, options, folder, stack))
            if not started:
                console.print("nothing to measure")
                return 1
            if options.streams:
                standing = [asyncio.run(streams.stand(proxy, options.streams, options.seconds)) for proxy in started]
                print_table(streams.table(standing))
                return 0
            if options.lag:
                print_table(lag.table(lag.probe_all(started, ports[0], options.seconds, stack)))
                return 0
            columns = cells(
                options.sizes, options.chunks, options.seconds, options.connections, options.requests, options.shared
            )
            samples = measure_all(started, columns, ports[0], options, stack, console)
        except (WrongAnswer, StartFailed) as failure:
            Console(stderr=True).print(str(failure), style="red", highlight=False)
            return 1
    bests = report.summary(samples)
    names, titles = [proxy.name for proxy in started], [cell.name for cell in columns]
    print_table(report.cpu_table(bests, names, titles))
    print_table(report.latency_table(bests, names, titles))
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    report.store(
        options.json, {**settings, "machine": platform.machine(), "python": platform.python_version()}, samples
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`python -m benchmarks.fleet TRACE`: hit ratio and time to first token of every rule, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import click
import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.agents.ours import Gated
from benchmarks.common.tables import print_table
from benchmarks.fleet import rules
from benchmarks.fleet.engine import BlockCache
from benchmarks.fleet.ours import Cairn
from benchmarks.fleet.simulation import Calendar, Result, Router, Setup, simulate
from benchmarks.fleet.trace import NUDGE_SECONDS, Request, at_load, decode_heavy, read_trace, spread

Make = Callable[[Setup], Callable[[Calendar], Router]]


def _books(choice: Callable[[Setup], rules.Choice], *, endless_index: bool = False) -> Make:
    def make(setup: Setup) -> Callable[[Calendar], Router]:
        return lambda _: rules.Rule(choice(setup), setup.replicas, setup.capacity_tokens, endless_index=endless_index)

    return make


RULES: dict[str, tuple[str, Make]] = {
    "round-robin": ("round robin", _books(lambda _: rules.round_robin())),
    "least-in-flight": ("least requests in flight", _books(lambda _: rules.least_in_flight)),
    "least-pending": ("least pending uncached tokens", _books(lambda _: rules.least_pending)),
    "consistent-hash": ("consistent hash of two blocks", _books(lambda s: rules.consistent_hash(s.replicas))),
    "cache-aware": ("SGLang's cache_aware", _books(lambda _: rules.cache_aware(), endless_index=True)),
    "scorers": ("GIE / llm-d scorer 2:1:1", _books(lambda s: rules.scorers(s.capacity_tokens))),
    "dynamo": ("Dynamo's cost", _books(lambda _: rules.dynamo)),
    "token-aware": ("llm-d's token-aware rule", _books(lambda _: rules.token_aware())),
    "lmetric": ("LMetric", _books(lambda _: rules.lmetric)),
    "pending-own": ("pending + 2 x own uncached", _books(lambda _: rules.pending_and_own())),
}
"""The others, by the name of the command line."""


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--replicas", default=8, show_default=True)
@click.option("--capacity", default=500_000, show_default=True, help="tokens that each replica's cache holds")
@click.option("--rho", default=0.75, show_default=True, help="raw input tokens over what all replicas can compute")
@click.option("--rules", "names", default="", help=f"of {', '.join(RULES)}, cairn, cairn-queue; by commas; all")
@click.option("--spread", "is_spread", is_flag=True, help="each request at random in the 3 s after its stamp")
@click.option("--limit", type=int, help="use only this many requests, the first ones")
@click.option("--rates", default="", help="tokens per second by replica, by commas: mixed hardware")
@click.option("--proxies", default=1, show_default=True, help="number of Cairn proxies that share the fleet")
@click.option("--delay", default=0.1, show_default=True, help="seconds until they know each other's news; < 0: never")
@click.option("--skip", default=0, show_default=True, help="leave this many first requests out of the figures")
@click.option(
    "--pins", is_flag=True, help="engines keep the blocks of running requests, as vLLM does; no cairn-queue"
)
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="show the means of several runs; in all but the first each arrival is up to 50 ms later",
)
@click.option("--no-gate", is_flag=True, help="Cairn without its gate for cold turns (admission.enabled: never)")
@click.option("--decode-heavy", "is_decode_heavy", is_flag=True, help="no trace: one hot prompt, long answers")
def main(  # noqa: PLR0913 - click passes one parameter per option
    trace: Path | None,
    replicas: int,
    capacity: int,
    rho: float,
    names: str,
    is_spread: bool,
    limit: int | None,
    rates: str,
    proxies: int,
    delay: float,
    skip: int,
    pins: bool,
    runs: int,
    no_gate: bool,
    is_decode_heavy: bool,
) -> None:
    """Compare routing rules on TRACE (.jsonl or .jsonl.gz, a hash id per 512 tokens)."""
    per_replica = tuple(float(rate) for rate in rates.split(",") if rate)
    setup = Setup(replicas, capacity, rates=per_replica, skip=skip, pins=pins)
    total = sum(setup.rate(n) for n in range(replicas))
    requests = _requests(trace, limit, is_decode_heavy, is_spread)
    arrivals = [_arrivals(requests, run, 0.0 if is_decode_heavy else rho * total) for run in range(runs)]
    known = (
        [*RULES, "cairn"] if pins else [*RULES, "cairn", "cairn-queue"]
    )  # engines that pin are first in, first out
    wanted = [name.strip() for name in names.split(",") if name.strip()] or known
    unknown = set(wanted) - set(known)
    if unknown:
        raise click.UsageError(f"unknown rules: {', '.join(sorted(unknown))}")

    def cairn(calendar: Calendar, *, ordered: bool) -> Router:
        return (Cairn if no_gate else Gated)(
            [None] * replicas,
            capacity,
            calendar.at,
            proxies=proxies,
            delay_seconds=delay if delay >= 0 else None,
            ordered=ordered,
        )

    results: list[tuple[str, list[Result]]] = []
    for name in track(wanted, "simulating", console=Console(stderr=True)):
        if name in RULES:
            title, make = RULES[name]
            results.append((title, [simulate(each, setup, make(setup)) for each in arrivals]))
        else:
            ordered = name == "cairn-queue"
            chosen = msgspec.structs.replace(setup, ordered=ordered)
            title = "Cairn, queue in order of uncached work" if ordered else "Cairn"
            rule = partial(cairn, ordered=ordered)
            results.append((title, [simulate(each, chosen, rule) for each in arrivals]))
    print_table(_table(results, pooled_hit(requests, replicas * capacity)))


def _requests(trace: Path | None, limit: int | None, is_decode_heavy: bool, is_spread: bool) -> list[Request]:
    if is_decode_heavy:
        return decode_heavy(limit or 3_000)
    if trace is None:
        raise click.UsageError("name a TRACE, or --decode-heavy")
    requests = read_trace(trace, limit)
    return spread(requests) if is_spread else requests


def _arrivals(requests: list[Request], run: int, tokens_per_second: float) -> list[Request]:
    """Return the requests of one run, at the load of `tokens_per_second`, or as they come if that is 0."""
    moved = spread(requests, run, NUDGE_SECONDS) if run else requests
    return at_load(moved, tokens_per_second) if tokens_per_second else moved


def pooled_hit(requests: list[Request], capacity_tokens: int) -> float:
    """Return the hit share of one cache as large as all replicas' together: the bound for every rule."""
    cache, cached = BlockCache(capacity_tokens), 0
    for request in requests:
        cached += min(cache.matched_tokens(request), request.input_tokens - 1)
        cache.use(request.blocks)
    return cached / max(sum(request.input_tokens for request in requests), 1)


def _table(results: list[tuple[str, list[Result]]], bound: float) -> Table:
    """Return a row per rule: the means of its runs and, of several, the standard error of the mean TTFT."""
    table = Table(title=f"one pooled cache would hit {bound:.1%}")
    for heading in ("rule", "hit %", "mean TTFT s", "p50", "p99", "computed Mtok", "imbalance"):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for title, runs in results:
        ttfts = [run.mean_ttft_seconds for run in runs]
        error = f" ± {stdev(ttfts) / len(runs) ** 0.5:.2f}" if len(runs) > 1 else ""
        table.add_row(
            title,
            f"{100 * mean(run.hit_share for run in runs):.1f}",
            f"{mean(ttfts):.2f}{error}",
            f"{mean(run.p50_ttft_seconds for run in runs):.2f}",
            f"{mean(run.p99_ttft_seconds for run in runs):.2f}",
            f"{mean(run.computed_tokens for run in runs) / 1e6:.1f}",
            f"{mean(run.imbalance for run in runs):.2f}",
        )
    return table


if __name__ == "__main__":
    main()

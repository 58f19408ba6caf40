"""`python -m benchmarks.agents [FILE]`: sessions that need x times the cache, by rule: turns an hour and waits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import msgspec
from rich.table import Table

from benchmarks.agents import cpu
from benchmarks.agents.loop import ClosedLoop, Loop, Result, run
from benchmarks.agents.ours import Gated
from benchmarks.agents.programs import WholePrograms
from benchmarks.agents.sessions import Session, read_sessions, shared_blocks, synthetic, unshared_tokens
from benchmarks.common.tables import print_table
from benchmarks.fleet import rules
from benchmarks.fleet.ours import Cairn
from benchmarks.fleet.simulation import Calendar, Router

SYNTHETIC_SESSIONS = 1_200


class Fleet(msgspec.Struct, frozen=True):
    """Inputs of a contestant.

    `capacity_tokens` is its belief about each replica's cache; with `is_stated` the engines have stated it.
    """

    replicas: int
    capacity_tokens: int
    proxies: int
    delay_seconds: float
    is_stated: bool = False

    @property
    def rates(self) -> list[float | None]:
        """Prefill rates as configured: none, all are learned."""
        return [None] * self.replicas


Make = Callable[[Fleet, Calendar, ClosedLoop], Router]


def _books(choice: Callable[[Fleet], rules.Choice], *, endless_index: bool = False) -> Make:
    def make(fleet: Fleet, calendar: Calendar, loop: ClosedLoop) -> Router:
        del calendar, loop
        return rules.Rule(choice(fleet), fleet.replicas, fleet.capacity_tokens, endless_index=endless_index)

    return make


def _cairn(fleet: Fleet, calendar: Calendar, loop: ClosedLoop) -> Router:
    del loop
    return Gated(
        fleet.rates,
        fleet.capacity_tokens,
        calendar.at,
        proxies=fleet.proxies,
        delay_seconds=fleet.delay_seconds,
        is_stated=fleet.is_stated,
    )


def _ungated(fleet: Fleet, calendar: Calendar, loop: ClosedLoop) -> Router:
    del loop
    return Cairn(
        fleet.rates,
        fleet.capacity_tokens,
        calendar.at,
        proxies=fleet.proxies,
        delay_seconds=fleet.delay_seconds,
        is_stated=fleet.is_stated,
    )


def _programs(fleet: Fleet, calendar: Calendar, loop: ClosedLoop) -> Router:
    del calendar
    return WholePrograms(fleet.replicas, fleet.capacity_tokens, loop.program_of)


CONTESTANTS: dict[str, tuple[str, Make]] = {
    "cairn": ("Cairn", _cairn),
    "ungated": ("Cairn without the gate", _ungated),
    "cache-aware": ("SGLang's cache_aware", _books(lambda _: rules.cache_aware(), endless_index=True)),
    "scorers": ("GIE / llm-d scorer 2:1:1", _books(lambda fleet: rules.scorers(fleet.capacity_tokens))),
    "dynamo": ("Dynamo's cost", _books(lambda _: rules.dynamo)),
    "token-aware": ("llm-d's token-aware rule", _books(lambda _: rules.token_aware())),
    "lmetric": ("LMetric", _books(lambda _: rules.lmetric)),
    "programs": ("whole sessions, with known ids and ends", _programs),
}


@click.command()
@click.argument("sessions", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option(
    "--x", "loads", default="0.5,1,2,4", show_default=True, help="context of all active sessions over cache"
)
@click.option("--replicas", default=4, show_default=True)
@click.option("--capacity", default=1_000_000, show_default=True, help="tokens that each replica's cache holds")
@click.option("--believed", default=1.0, show_default=True, help="assumed capacity, divided by the true one")
@click.option("--rules", "names", default=",".join(CONTESTANTS), show_default=True)
@click.option("--proxies", default=1, show_default=True, help="Cairn proxies that share the fleet")
@click.option("--delay", default=0.01, show_default=True, help="seconds until they know each other's news")
@click.option("--seconds", default=7_200.0, show_default=True, help="simulated time, of which a sixth is warm-up")
@click.option("--seed", default=1, show_default=True)
@click.option("--like-vllm", is_flag=True, help="short prompts and engines on a CPU, as in `make bench-vllm`")
def main(  # noqa: PLR0913 - click passes one parameter per option
    sessions: Path | None,
    loads: str,
    replicas: int,
    capacity: int,
    believed: float,
    names: str,
    proxies: int,
    delay: float,
    seconds: float,
    seed: int,
    like_vllm: bool,
) -> None:
    """Compare rules on SESSIONS (.jsonl or .jsonl.gz, AIPerf's or Mooncake's form), or on sessions made up."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := set(wanted) - set(CONTESTANTS):
        raise click.UsageError(f"unknown rules: {', '.join(sorted(unknown))}")
    if like_vllm:
        for case in cpu.CASES:
            print_table(_table_like_vllm(case, wanted, proxies, delay))
        return
    made = read_sessions(sessions) if sessions is not None else synthetic(SYNTHETIC_SESSIONS, seed)
    shared = shared_blocks(made)
    each = unshared_tokens(made, shared)
    fleet = Fleet(replicas, round(believed * capacity), proxies, delay if proxies > 1 else 0.0)
    for x in (float(load) for load in loads.split(",")):
        active = max(round(x * replicas * capacity / each), 1)
        loop = Loop(active, replicas, capacity, seconds, seconds / 6)
        print_table(_table(x, active, [(CONTESTANTS[n][0], _row(made, shared, loop, n, fleet)) for n in wanted]))


def _row(sessions: list[Session], shared: frozenset[int], loop: Loop, name: str, fleet: Fleet) -> Result:
    return run(sessions, shared, loop, lambda calendar, closed: CONTESTANTS[name][1](fleet, calendar, closed))


def _table_like_vllm(case: cpu.Case, names: list[str], proxies: int, delay: float) -> Table:
    fleet = Fleet(cpu.REPLICAS, cpu.CAPACITY_TOKENS, proxies, delay if proxies > 1 else 0.0, is_stated=True)
    table = Table(
        title=f"{case.sessions} sessions of {cpu.FIRST_TOKENS:,} tokens, pauses of {case.pause_seconds:g} s"
    )
    for heading in ("rule", "turns", "cached %", "computed/turn", "mean TTFT s", "p50", "p99", "max"):
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=heading == "rule")
    for name in names:
        title, make = CONTESTANTS[name]
        means = cpu.measure(case, partial(make, fleet))
        table.add_row(
            title,
            f"{means.turns:,.0f}",
            f"{100 * means.hit_share:.1f}",
            f"{means.computed_tokens:,.0f}",
            f"{means.mean_ttft_seconds:.2f}",
            f"{means.p50_ttft_seconds:.2f}",
            f"{means.p99_ttft_seconds:.1f}",
            f"{means.max_ttft_seconds:.1f}",
        )
    return table


def _table(x: float, active: int, results: list[tuple[str, Result]]) -> Table:
    table = Table(title=f"sessions need {x:g} x the cache: {active} at once")
    headings = ("rule", "turns/h", "hit %", "mean TTFT s", "p50", "p99", "max", "session s", "worst slowdown")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=heading == "rule")
    for title, result in results:
        table.add_row(
            title,
            f"{result.turns_per_hour:,.0f}",
            f"{100 * result.hit_share:.1f}",
            f"{result.mean_ttft_seconds:.2f}",
            f"{result.p50_ttft_seconds:.2f}",
            f"{result.p99_ttft_seconds:.1f}",
            f"{result.max_ttft_seconds:.0f}",
            f"{result.session_seconds:.0f}",
            f"{result.worst_slowdown:.1f}",
        )
    return table


if __name__ == "__main__":
    main()

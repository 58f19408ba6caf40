"""`python -m benchmarks.replay TRACE`: a trace as text against simulated engines, through Cairn and other routers."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.processes import ROOT, StartFailed, end_on_signals, scratch_folder
from benchmarks.common.tables import print_table
from benchmarks.engines.scenarios import AgentLoad
from benchmarks.fleet.__main__ import pooled_hit
from benchmarks.fleet.engine import PREFILL_TOKENS_PER_SECOND
from benchmarks.fleet.trace import Request, at_load, decode_heavy, read_trace, spread
from benchmarks.replay import report
from benchmarks.replay.agents import agents
from benchmarks.replay.contestants import Entrant, Plan, enter, known
from benchmarks.replay.drive import Run, drive
from benchmarks.replay.engines import TEMPLATES
from benchmarks.replay.texts import Bodies, Texts

RESULTS = ROOT / "benchmarks" / "results"
_AGENTS_HELP = "no trace: 60 agents' sessions of 4 turns, before engines that render prompts by this template"
_TURN_SECONDS = 4.0  # of a session: an answer of a loaded fleet and a second's pause


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--engines", default=8, show_default=True)
@click.option("--capacity", default=500_000, show_default=True, help="tokens that each engine's cache holds")
@click.option("--rho", default=0.75, show_default=True, help="raw input tokens over what all engines can compute")
@click.option("--requests", "count", default=1_500, show_default=True)
@click.option("--speed", default=2.0, show_default=True, help="how much faster than the clock time runs")
@click.option("--proxies", default="1", show_default=True, help="numbers of Cairn proxies, a row for each, by commas")
@click.option("--peers", is_flag=True, help="haproxy, sglang-router and vllm-router too, where they are installed")
@click.option("--only", default="", help="rows whose name contains one of these, by commas")
@click.option("--one-by-one", is_flag=True, help="one after the other, each with separate engines")
@click.option("--spread", "is_spread", is_flag=True, help="each request at random in the 3 s after its stamp")
@click.option("--decode-heavy", "is_decode_heavy", is_flag=True, help="no trace: one hot prompt, long answers")
@click.option("--agents", "template", type=click.Choice(list(TEMPLATES)), help=_AGENTS_HELP)
@click.option("--restart", is_flag=True, help="half-way the first engine forgets everything")
@click.option("--name", default="", help="of the files in benchmarks/results")
def main(  # noqa: PLR0913 - click passes one parameter per option
    trace: Path | None,
    engines: int,
    capacity: int,
    rho: float,
    count: int,
    speed: float,
    proxies: str,
    peers: bool,
    only: str,
    one_by_one: bool,
    is_spread: bool,
    is_decode_heavy: bool,
    template: str | None,
    restart: bool,
    name: str,
) -> None:
    """Replay the first requests of TRACE (.jsonl or .jsonl.gz, a hash id per 512 tokens)."""
    settings = dict(click.get_current_context().params) | {"trace": trace.name if trace else None}
    end_on_signals()
    console = Console()
    texts: Bodies
    if template is None:
        texts = Texts()
        requests = _requests(trace, count, is_decode_heavy, is_spread, rho * engines * PREFILL_TOKENS_PER_SECOND)
    else:
        requests, texts = agents(AgentLoad(engines=engines), TEMPLATES[template], _TURN_SECONDS)
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    names = known([int(n) for n in proxies.split(",")], peers=peers)
    names = [each for each in names if not wanted or any(part in each for part in wanted)]
    bound = pooled_hit(requests, engines * capacity)
    with scratch_folder() as folder:
        plan = Plan(engines, capacity, speed, Path(folder), template=template or "")
        rows = _measure(names, requests, texts, plan, console, one_by_one=one_by_one, restart=restart)
    title = f"{engines} engines of {capacity:,} tokens, {len(requests)} requests, time x{speed:g}"
    print_table(report.table(f"{title}; one pooled cache would hit {bound:.1%}", rows))
    for remark in report.remarks(rows):
        console.print(remark, highlight=False)
    stem = name or (
        "replay-decode-heavy" if is_decode_heavy else f"replay-agents-{template}" if template else "replay"
    )
    report.store(RESULTS / f"{stem}.json", settings, bound, rows)
    report.draw(RESULTS / f"{stem}.svg", title, bound, rows)


def _requests(
    trace: Path | None, count: int, is_decode_heavy: bool, is_spread: bool, tokens_per_second: float
) -> list[Request]:
    if is_decode_heavy:
        return decode_heavy(count)
    if trace is None:
        raise click.UsageError("name a TRACE, or --decode-heavy, or --agents")
    requests = read_trace(trace, count)
    return at_load(spread(requests) if is_spread else requests, tokens_per_second)


def _measure(
    names: list[str],
    requests: list[Request],
    texts: Bodies,
    plan: Plan,
    console: Console,
    *,
    one_by_one: bool,
    restart: bool,
) -> list[report.Figures]:
    rows = []
    groups = [[name] for name in names] if one_by_one else [names]
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("replaying", total=len(groups))
        for group in groups:
            with ExitStack() as stack:
                runs = asyncio.run(_together(group, requests, texts, plan, stack, console, restart=restart))
            rows += [report.figures(name, run, plan.speed) for name, run in runs.items()]
            progress.advance(bar)
    return rows


async def _together(
    names: list[str],
    requests: list[Request],
    texts: Bodies,
    plan: Plan,
    stack: ExitStack,
    console: Console,
    *,
    restart: bool,
) -> dict[str, Run]:
    """Run all `names` at once, each with separate engines; one that does not start is shown and left out."""
    entrants: list[Entrant] = []
    for name in names:
        try:
            entrants.append(await enter(name, plan, stack))
        except StartFailed as failure:
            console.print(f"[red]left out:[/red] {failure}", highlight=False)
    runs = await asyncio.gather(
        *(drive(entrant, requests, texts, plan.speed, restart=restart) for entrant in entrants)
    )
    return {entrant.name: run for entrant, run in zip(entrants, runs, strict=True)}


if __name__ == "__main__":
    main()

"""`python -m benchmarks.load --url URL --model NAME --trace FILE | --shared-prefix N`: a load test of an endpoint."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common.processes import ROOT
from benchmarks.common.tables import print_table
from benchmarks.load import summary
from benchmarks.load.asking import Answer, ask
from benchmarks.load.workloads import Turn, conversations, of_trace
from proxy.clock import SystemClock
from proxy.tasks import Tasks

_CLOCK = SystemClock()
_GIVE_UP_SECONDS = 3_600.0


@click.command()
@click.option("--url", required=True, help="the base URL, with /v1")
@click.option("--model", required=True)
@click.option("--key", envvar="OPENAI_API_KEY", help="sent as a bearer token  [env: OPENAI_API_KEY]")
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="in Mooncake's form")
@click.option("--shared-prefix", type=int, help="tokens of a system prompt that all conversations share")
@click.option("--conversations", "conversation_count", default=20, show_default=True)
@click.option("--rate", type=float, help="requests a second; a trace has its own times without it")
@click.option("--requests", "count", type=int, help="most requests  [default: all of a trace, else 200]")
@click.option("--output-tokens", default=64, show_default=True, help="max_tokens, unless a trace has it")
@click.option("--price-input", type=float, help="US dollars per million input tokens")
@click.option("--price-cached", type=float, default=0.0, help="US dollars per million cached ones  [default: 0]")
@click.option("--seed", default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "load.json")
def main(  # noqa: PLR0913 - click passes one parameter per option
    url: str,
    model: str,
    key: str | None,
    trace: Path | None,
    shared_prefix: int | None,
    conversation_count: int,
    rate: float | None,
    count: int | None,
    output_tokens: int,
    price_input: float | None,
    price_cached: float,
    seed: int,
    output: Path,
) -> None:
    """Send streamed chat requests at their times, answered or not, and show what was cached."""
    if (trace is None) == (shared_prefix is None):
        raise click.UsageError("give --trace FILE or --shared-prefix TOKENS")
    if trace is not None:
        turns = list(of_trace(trace, count, rate))
    else:
        assert shared_prefix is not None  # noqa: S101 - narrows the type
        turns = list(conversations(shared_prefix, conversation_count, count or 200, rate or 2.0, output_tokens, seed))
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    answers, seconds = asyncio.run(_send(url.rstrip("/"), model, turns, headers))
    prices = None if price_input is None else summary.Prices(price_input, price_cached)
    found = summary.summarize(answers, seconds, prices)
    console = Console()
    for table in summary.tables(found):
        print_table(table)
    for error, times in found.errors.items():
        console.print(f"[red]{times} x[/red] {error}", highlight=False)
    settings: dict[str, object] = {
        "url": url,
        "model": model,
        "trace": trace.name if trace else None,
        "shared_prefix": shared_prefix,
    }
    settings |= {"conversations": conversation_count, "rate": rate, "seed": seed}
    summary.store(output, settings, found, answers)
    summary.draw(output.with_suffix(".svg"), answers)
    console.print(f"{output} and {output.with_suffix('.svg').name}", highlight=False)
    sys.exit(1 if found.errors else 0)


async def _send(url: str, model: str, turns: Sequence[Turn], headers: dict[str, str]) -> tuple[list[Answer], float]:
    """Send all turns at their times; return the answers as they ended, and the seconds from first to last."""
    answers: list[Answer] = []
    tasks = Tasks()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    timeout = aiohttp.ClientTimeout(total=_GIVE_UP_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as http:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("answers", total=len(turns))

            async def one(turn: Turn) -> None:
                answers.append(await ask(http, url, model, turn, headers, _CLOCK))
                cached = sum(answer.is_warm for answer in answers)
                progress.update(bar, advance=1, description=f"{cached} of {len(answers)} answers mostly cached")

            start = _CLOCK.monotonic()
            sent = []
            for turn in turns:
                await asyncio.sleep(max(start + turn.at_seconds - _CLOCK.monotonic(), 0.0))
                sent.append(tasks.start(one(turn), "request"))
            await asyncio.gather(*sent)
    return answers, _CLOCK.monotonic() - start


if __name__ == "__main__":
    main()

"""`cairn prices`: which rate card applies to a model, from where and since when, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.cli import exit_codes as exits
from proxy.errors import ConfigError
from proxy.patterns import matches_any

if TYPE_CHECKING:
    from rich.table import Table

    from proxy.accounting.pricing import Card, PriceBook, Rates
    from proxy.config.schema import Config

_FILE = click.Path(path_type=Path, dir_okay=False)
_NO_PRICE = {
    "no_card": "no card: neither the configuration nor the built-in data prices this model here",
    "no_exchange_rate": "the card is in another currency and has no usd_per_unit",
    "no_prefill_rate": "the replica's prefill rate is not learned yet",
}


@click.command("prices")
@click.argument("model")
@click.option("--upstream", metavar="URL", help="A replica's URL, or its name in the configuration.")
@click.option("--config", "file", type=_FILE, help="The YAML file.  [env: CAIRN_CONFIG]")
@click.option("--on", type=click.DateTime(["%Y-%m-%d"]), help="The day that counts.  [default: today]")
def prices(model: str, upstream: str | None, file: Path | None, on: datetime | None) -> None:
    """Show what MODEL costs at each upstream that serves it: the card, its source and its date."""
    from proxy.config.load import load, process_environment

    try:
        config = load(file, process_environment()).config
    except ConfigError as error:
        exits.fail(error.message, code=exits.MISUSED)
    day = (datetime.now(UTC) if on is None else on).date()
    _print(model, list(_upstreams(config, model, upstream)), _book(config), day)


def _book(config: Config) -> PriceBook:
    from proxy.accounting.builtin_prices import BuiltinPrices
    from proxy.accounting.pricing import PriceBook
    from proxy.accounting.rate_cards import rules_of

    return PriceBook(rules_of(config.prices), BuiltinPrices().card)


def _upstreams(config: Config, model: str, wanted: str | None) -> Iterator[tuple[str, str]]:
    """(name, URL) of the replicas that serve `model`, or of the one that is wanted, configured or not."""
    known = [(replica.label, replica.url, pool.models) for pool in config.pools for replica in pool.replicas]
    if wanted is not None:
        found = [(name, url) for name, url, _ in known if wanted.rstrip("/") in (name, url.rstrip("/"))]
        yield from found or [("", wanted)]
    elif known:
        yield from ((name, url) for name, url, models in known if matches_any(model, models))
    else:
        yield "", ""


def _print(model: str, upstreams: list[tuple[str, str]], book: PriceBook, day: date) -> None:
    from rich.console import Console

    from proxy.accounting.pricing import Unpriced

    console = Console()
    if not upstreams:
        console.print(f"No pool of the configuration serves {model}.", markup=False, highlight=False)
    for name, url in upstreams:
        card = book.card(model, url, day.isoformat(), name)
        place = " ".join(filter(None, (name, url))) or "its own provider"
        title = f"{model} at {place}"
        if isinstance(card, Unpriced):
            console.print(f"{title}: unpriced", markup=False, highlight=False, soft_wrap=True)
            console.print(f"  {_NO_PRICE[card.value]}", markup=False, highlight=False, soft_wrap=True)
            continue
        source = f"  from {card.source}" + (f", valid from {card.date}" if card.date else ", no date")
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        console.print(source, markup=False, highlight=False, soft_wrap=True)
        console.print(_table(card))


def _table(card: Card) -> Table:
    from rich import box
    from rich.table import Table

    from proxy.accounting.pricing import TokenCard

    table = Table(box=box.SIMPLE_HEAD)
    if not isinstance(card, TokenCard):
        for heading in ("USD per GPU-hour", "GPUs per replica", "USD per second of prefill"):
            table.add_column(heading, justify="right")
        table.add_row(f"{card.usd_per_gpu_hour:f}", f"{card.gpus_per_replica:f}", f"{card.usd_per_second:.6f}")
        return table
    table.add_column("USD per million tokens")
    for heading in ("input", "cached read", "write 5 m", "write 1 h", "output"):
        table.add_column(heading, justify="right")
    table.add_row("any prompt" if not card.tiers else "shorter prompts", *_shown(card.rates))
    for tier in card.tiers:
        table.add_row(f"over {tier.above_prompt_tokens:,} prompt tokens", *_shown(tier.rates))
    return table


def _shown(rates: Rates) -> tuple[str, ...]:
    each = (rates.input, rates.cached_read, rates.cache_write_5m, rates.cache_write_1h, rates.output)
    return tuple(f"{rate.normalize():f}" for rate in each)

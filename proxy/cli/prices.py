"""`cairn prices`: the price that applies to a model, its source and its date, or why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from proxy.cli import exit_codes as exits
from proxy.cli.tables import Column, number, text
from proxy.cli.terminal import print_sentence, print_table
from proxy.errors import ConfigError
from proxy.patterns import matches_any

if TYPE_CHECKING:
    from proxy.accounting.pricing import Card, PriceBook, Rates
    from proxy.config.schema import Config

_FILE = click.Path(path_type=Path, dir_okay=False)
_NO_PRICE = {
    "no_card": "neither the configuration nor the built-in data has a price for this model at this upstream; add one "
    "under prices",
    "no_exchange_rate": "the price is not in USD; set usd_per_unit",
    "no_prefill_rate": "the replica's prefill rate is not known; streams show it, or set prefill_tokens_per_second",
}


@click.command("prices", short_help="Show the price of MODEL at each upstream.")
@click.argument("model")
@click.option("--upstream", metavar="URL", help="A replica's URL, or its name in the configuration.")
@click.option("--config", "file", type=_FILE, help="The YAML file.  [env: CAIRN_CONFIG]")
@click.option("--on", type=click.DateTime(["%Y-%m-%d"]), help="The day of the price.  [default: today]")
def prices(model: str, upstream: str | None, file: Path | None, on: datetime | None) -> None:
    """Show the price of MODEL at each upstream that serves it, with its source and date."""
    from proxy.config.load import load, process_environment

    try:
        config = load(file, process_environment()).config
    except ConfigError as error:
        exits.fail(error.message, code=exits.MISUSED)
    moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M") if on is None else on.date().isoformat()
    _print(model, list(_upstreams(config, model, upstream)), _book(config), moment)


def _book(config: Config) -> PriceBook:
    from proxy.accounting.builtin_prices import BuiltinPrices
    from proxy.accounting.pricing import PriceBook
    from proxy.accounting.rate_cards import rules_of

    return PriceBook(rules_of(config.prices), BuiltinPrices().card)


def _upstreams(config: Config, model: str, wanted: str | None) -> Iterator[tuple[str, str]]:
    """Yield (name, URL) of the replicas that serve `model`, or of `wanted` only, which need not be configured."""
    known = [(replica.label, replica.url, pool.models) for pool in config.pools for replica in pool.replicas]
    if wanted is not None:
        found = [(name, url) for name, url, _ in known if wanted.rstrip("/") in (name, url.rstrip("/"))]
        yield from found or [("", wanted)]
    elif known:
        yield from ((name, url) for name, url, models in known if matches_any(model, models))
    else:
        yield "", ""


def _print(model: str, upstreams: list[tuple[str, str]], book: PriceBook, moment: str) -> None:
    from proxy.accounting.pricing import Unpriced

    if not upstreams:
        click.echo(f"No pool of the configuration serves {model}.")
    for number_shown, (name, url) in enumerate(upstreams):
        if number_shown:
            click.echo()
        card = book.card(model, url, moment, name)
        place = " ".join(filter(None, (name, url))) or "its own provider"
        if isinstance(card, Unpriced):
            click.echo(f"{model} at {place}: no price")
            print_sentence(f"  {_NO_PRICE[card.value]}", indent="  ")
            continue
        click.echo(f"{model} at {place}")
        click.echo(f"  from {card.source}" + (f", valid from {card.date}" if card.date else ", no date"))
        print_table(*_table(card))


def _table(card: Card) -> tuple[Sequence[Column], Sequence[Sequence[str]]]:
    from proxy.accounting.pricing import TokenCard

    if not isinstance(card, TokenCard):
        headings = ("USD per GPU hour", "GPUs per replica", "USD per second of prefill")
        cells = (f"{card.usd_per_gpu_hour:f}", f"{card.gpus_per_replica:f}", f"{card.usd_per_second:.6f}")
        return [number(heading) for heading in headings], [cells]
    kinds = ("input", "cached read", "write 5 m", "write 1 h", "output")
    rows = _rows("any prompt" if not card.tiers else "shorter prompts", card.rates)
    for tier in card.tiers:
        rows += _rows(f"over {tier.above_prompt_tokens:,} prompt tokens", tier.rates)
    return [text("USD per million tokens"), *map(number, kinds)], rows


def _rows(name: str, rates: Rates) -> list[tuple[str, ...]]:
    rows = [
        (name, rates.input, rates.cached_read, rates.cache_write_5m, rates.cache_write_1h, rates.output),
        *(
            (f"  {kind}", own.input, own.cached_read, None, None, own.output)
            for kind, own in (("audio", rates.audio), ("images", rates.images))
            if own is not None
        ),
    ]
    return [(row[0], *("-" if rate is None else f"{rate.normalize():f}" for rate in row[1:])) for row in rows]

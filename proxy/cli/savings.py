"""`cairn savings`: what caching saved, from the totals that are kept in Redis.

It reads Redis if one is configured; otherwise it asks the admin port of a running Cairn, which alone can reach its
private Valkey.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from proxy.cli import exit_codes as exits
from proxy.cli.admin_port import TOKEN_NEEDED, admin_client, admin_url
from proxy.cli.http_client import NoAnswer
from proxy.cli.tables import number, text
from proxy.cli.terminal import print_sentence, print_table
from proxy.errors import ConfigError

if TYPE_CHECKING:
    from proxy.accounting.savings import By, SavingsLine, SavingsReport
    from proxy.config.schema import Config

_FILE = click.Path(path_type=Path, dir_okay=False)
_ASK_SECONDS = 15.0
_PERCENT = Decimal(100)


@click.command("savings", short_help="Show what caching saved.")
@click.option(
    "--since", default="", metavar="DATE|7d", help="First day, or the number of days until today.  [default: all]"
)
@click.option("--by", type=click.Choice(["model", "upstream", "tenant", "day"]), default="day", show_default=True)
@click.option("--redis", metavar="URL", help="The Redis that holds the totals.")
@click.option("--url", metavar="URL", help="The admin port of a running Cairn.  [default: http://127.0.0.1:8090]")
@click.option("--config", "file", type=_FILE, help="The configuration file that names either.  [env: CAIRN_CONFIG]")
@click.option("--json", "as_json", is_flag=True, help="Exact figures as JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Exact figures as CSV.")
def savings(
    since: str, by: str, redis: str | None, url: str | None, file: Path | None, as_json: bool, as_csv: bool
) -> None:
    """Show what caching saved, in tokens, money and seconds of prefill. Days are in UTC."""
    from proxy.accounting import savings as words
    from proxy.config.load import load, process_environment

    if as_json and as_csv:
        exits.fail("give --json or --csv, not both", code=exits.MISUSED)
    try:
        words.first_day(since, datetime.now(UTC).date())
    except ValueError:
        exits.fail(_NO_DAY.format(since), code=exits.MISUSED)
    try:
        config = load(file, process_environment()).config
    except ConfigError as error:
        exits.fail(error.message, code=exits.MISUSED)
    found = _find(config, redis, url, since, words.By(by))
    if as_json:
        click.echo(words.as_json(found))
    elif as_csv:
        click.echo(words.as_csv(found), nl=False)
    else:
        _print(found)


def _find(config: Config, redis: str | None, url: str | None, since: str, by: By) -> SavingsReport:
    if redis is None and url is None and config.redis.url is not None:
        redis = config.redis.url.reveal()
    if redis is not None:
        return asyncio.run(_from_redis(redis, since, by))
    return _from_admin_port(config, url or admin_url(config), since, by)


async def _from_redis(url: str, since: str, by: By) -> SavingsReport:
    from cache import CacheError
    from proxy.accounting.totals_reader import TotalsReader, Unreadable
    from proxy.clock import SystemClock
    from proxy.tasks import Tasks

    tasks = Tasks()
    reader = TotalsReader(url, SystemClock(), tasks)
    try:
        return await reader.read(since, by)
    except (Unreadable, CacheError) as error:
        trouble = f"redis does not answer: {error}" if isinstance(error, CacheError) else str(error)
        exits.fail(f"{trouble}; check --redis or redis.url, its password and the network", code=exits.FAILED)
    finally:
        await reader.close()
        await tasks.close()


_NO_DAY = "--since {}: expected a date such as 2026-11-23, or a number of days such as 7d"


def _from_admin_port(config: Config, url: str, since: str, by: By) -> SavingsReport:
    import msgspec

    from proxy.accounting.savings import from_json

    try:
        status, body = admin_client(url, config, _ASK_SECONDS).request(
            "GET", f"/savings?since={quote(since)}&by={by.value}"
        )
    except NoAnswer:
        exits.fail(
            f"no Cairn answers at {url}. The totals of a Cairn without a shared Redis are in its private Valkey: "
            "start it, or give its admin port with --url, or a shared Redis with --redis"
        )
    if status == 401:
        exits.fail(f"the admin port {url} {TOKEN_NEEDED}")
    try:
        if status != 200:
            why = msgspec.json.decode(body, type=dict[str, str]).get("error", "")
            exits.fail(f"{url} answered {status}: {why}", code=exits.FAILED)
        return from_json(body)
    except msgspec.MsgspecError:
        exits.fail(f"{url} answered {status}, but is not the admin port of a Cairn", code=exits.FAILED)


# --- for people


def _print(report: SavingsReport) -> None:
    since = report.lines[0].name if report.by == "day" and report.lines else report.since
    print_sentence(f"Savings from {since} to {report.until} (UTC), by {report.by.value}")
    if not report.lines:
        click.echo("No request was answered in this time.")
        return
    lines = (*report.lines, report.total)
    click.echo()
    print_table([text(report.by.value), *_TOKEN_COLUMNS], [_token_cells(line) for line in lines], "Tokens")
    click.echo()
    print_table([text(report.by.value), *_MONEY_COLUMNS], [_money_cells(line) for line in lines], "USD")
    notes = _notes(report.total)
    if notes:
        click.echo()
    for note in notes:
        print_sentence(note)


_TOKEN_COLUMNS = [
    number(heading) for heading in ("responses", "prompt", "cached", "share", "written", "output", "prefill saved")
]
_MONEY_COLUMNS = [
    number(heading)
    for heading in ("uncached", "saving", "surcharge", "net saving", "cost", "of input", "of the bill")
]


def _token_cells(line: SavingsLine) -> tuple[str, ...]:
    return (
        line.name,
        f"{line.answers:,}",
        f"{line.prompt_tokens:,}",
        f"{line.cached_tokens:,}",
        _cached_share(line),
        f"{line.written_tokens:,}",
        f"{line.output_tokens:,}",
        f"{line.prefill_seconds_saved:,.1f} s",
    )


def _money_cells(line: SavingsLine) -> tuple[str, ...]:
    amounts = (line.uncached_cost_usd, line.saving_usd, line.surcharge_usd, line.net_usd, line.cost_usd)
    shares = (_share(line.input_saving_share), _share(line.bill_saving_share))
    return (line.name, *(f"{amount:,.4f}" for amount in amounts), *shares)


def _cached_share(line: SavingsLine) -> str:
    is_unknown = line.cached_share is None and line.prompt_tokens > 0
    return "?" if is_unknown else _share(line.cached_share)


def _share(share: Decimal | None) -> str:
    return "-" if share is None else f"{share * _PERCENT:.1f} %"


def _notes(total: SavingsLine) -> list[str]:
    notes = []
    if total.routing_gain_tokens:
        gain, share = total.routing_gain_tokens, Decimal(total.routing_gain_tokens) / max(total.cached_tokens, 1)
        notes.append(f"Due to routing: {gain:,} cached tokens ({_share(share)}) that round robin would have missed.")
    if total.unpriced:
        notes.append(
            f"Not in the USD table, for lack of a price: {_counted(total.unpriced, 'response')}; see cairn prices."
        )
    if total.unknown_tokens:
        notes.append(
            f"Not reported by the upstream as cached or not: {_counted(total.unknown_tokens, 'prompt token')}."
        )
    if total.missing_usage:
        notes.append(f"Not included, for lack of token counts: {_counted(total.missing_usage, 'response')}.")
    return notes


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"

"""`cairn savings`: what the shared prefixes saved, out of the totals that outlive every process.

It reads Redis where one is known, else it asks the admin port of the running Cairn, whose private Valkey nobody else
can reach.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import click

from proxy.cli import exit_codes as exits
from proxy.errors import ConfigError

if TYPE_CHECKING:
    from proxy.accounting.savings import By, SavingsLine, SavingsReport
    from proxy.config.schema import Config

_FILE = click.Path(path_type=Path, dir_okay=False)
_ASK_SECONDS = 15.0
_ANSWER_BYTES_AT_MOST = 64 * 1024 * 1024
_PERCENT = Decimal(100)


@click.command("savings")
@click.option("--since", default="", metavar="DATE|7d", help="From that day on, or so many days.  [default: all]")
@click.option("--by", type=click.Choice(["model", "upstream", "tenant", "day"]), default="day", show_default=True)
@click.option("--redis", metavar="URL", help="The Redis that holds the totals.")
@click.option("--url", metavar="URL", help="The admin port of a running Cairn.  [default: http://127.0.0.1:8090]")
@click.option("--config", "file", type=_FILE, help="The YAML file that names either.  [env: CAIRN_CONFIG]")
@click.option("--json", "as_json", is_flag=True, help="Exact figures as JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Exact figures as CSV.")
def savings(
    since: str, by: str, redis: str | None, url: str | None, file: Path | None, as_json: bool, as_csv: bool
) -> None:
    """Show what caching saved, in tokens, money and seconds of prefill. Days are UTC."""
    from proxy.accounting import savings as words
    from proxy.config.load import load, process_environment

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
    return _from_admin_port(config, url or _admin_url(config), since, by)


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
        exits.fail(str(error), code=exits.FAILED)
    except ValueError:
        exits.fail(_NO_DAY.format(since), code=exits.MISUSED)
    finally:
        await reader.close()
        await tasks.close()


_NO_DAY = "--since {}: expected a date such as 2026-11-23, or days such as 7d"


def _admin_url(config: Config) -> str:
    """Where the Cairn of this configuration answers; one that listens everywhere does so on loopback, too."""
    host = config.admin.host
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{config.admin.port}"
    if address.is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{config.admin.port}" if ":" in host else f"http://{host}:{config.admin.port}"


def _from_admin_port(config: Config, url: str, since: str, by: By) -> SavingsReport:
    import msgspec

    from proxy.accounting.savings import from_json

    status, body = _ask(url, f"/savings?since={quote(since)}&by={by.value}", config)
    if status == 400:
        exits.fail(_NO_DAY.format(since), code=exits.MISUSED)
    try:
        if status != 200:
            why = msgspec.json.decode(body, type=dict[str, str]).get("error", "")
            exits.fail(f"{url} answers {status}: {why}", code=exits.FAILED)
        return from_json(body)
    except msgspec.MsgspecError:
        exits.fail(f"{url} answers {status}, but is not Cairn's admin port", code=exits.FAILED)


def _ask(url: str, target: str, config: Config) -> tuple[int, bytes]:
    try:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=_ASK_SECONDS)
    except ValueError:
        exits.fail(f"--url {url}: is not a URL", code=exits.MISUSED)
    token = config.admin.token
    try:
        connection.request(
            "GET",
            parts.path.rstrip("/") + target,
            headers={} if token is None else {"Authorization": f"Bearer {token.reveal()}"},
        )
        answer = connection.getresponse()
        return answer.status, answer.read(_ANSWER_BYTES_AT_MOST)
    except (OSError, http.client.HTTPException):
        exits.fail(
            f"no Cairn answers at {url}. Its totals lie in its private Valkey while it runs; "
            "start it, or name its admin port with --url, or a shared Redis with --redis",
            code=exits.FAILED,
        )
    finally:
        connection.close()


# --- for people


def _print(found: SavingsReport) -> None:
    from rich.console import Console

    console = Console()
    since = found.lines[0].name if found.by == "day" and found.lines else found.since
    console.print(f"Savings from {since} to {found.until} (UTC), by {found.by.value}", highlight=False)
    if not found.lines:
        console.print("Nothing was answered in this time.", highlight=False)
        return
    lines = (*found.lines, found.total)
    tokens = [_token_cells(line) for line in lines]
    money = [_money_cells(line) for line in lines]
    heads = ("answers", "prompt", "cached", "share", "written", "output", "prefill s saved")
    console.print(_table("Tokens", found.by.value, heads, tokens))
    heads = ("uncached cost", "saving", "surcharge", "net", "cost", "of input", "of the bill")
    console.print(_table("USD", found.by.value, heads, money))
    for note in _notes(found.total):
        console.print(note, highlight=False)


def _table(title: str, by: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> object:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(by, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows[:-1]:
        table.add_row(*row)
    table.add_section()
    table.add_row(*rows[-1], style="bold")
    return table


def _token_cells(line: SavingsLine) -> tuple[str, ...]:
    counts = (line.prompt_tokens, line.cached_tokens)
    rest = (line.written_tokens, line.output_tokens)
    return (
        line.name,
        f"{line.answers:,}",
        *(f"{count:,}" for count in counts),
        _share(line.cached_share),
        *(f"{count:,}" for count in rest),
        f"{line.prefill_seconds_saved:,.1f}",
    )


def _money_cells(line: SavingsLine) -> tuple[str, ...]:
    amounts = (line.uncached_cost_usd, line.saving_usd, line.surcharge_usd, line.net_usd, line.cost_usd)
    shares = (_share(line.input_saving_share), _share(line.bill_saving_share))
    return (line.name, *(f"{amount:,.4f}" for amount in amounts), *shares)


def _share(share: Decimal | None) -> str:
    return "-" if share is None else f"{share * _PERCENT:.1f} %"


def _notes(total: SavingsLine) -> list[str]:
    notes = []
    if total.routing_gain_tokens:
        share = _share(Decimal(total.routing_gain_tokens) / max(total.cached_tokens, 1))
        notes.append(f"Routing's own part: {total.routing_gain_tokens:,} cached tokens ({share}) beyond round robin.")
    if total.unpriced:
        notes.append(f"{total.unpriced:,} answers had no price and are in no sum of money; see cairn prices.")
    if total.unknown_tokens:
        notes.append(f"Of {total.unknown_tokens:,} prompt tokens nobody said whether they were cached.")
    if total.missing_usage:
        notes.append(f"{total.missing_usage:,} answers ended before their usage and are in no sum.")
    return notes

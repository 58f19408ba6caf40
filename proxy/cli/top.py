"""`cairn top`: the main figures of the status page in a terminal, updated every second."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from proxy.cli import exit_codes as exits
from proxy.cli.admin_port import TOKEN_NEEDED, admin_client, admin_url
from proxy.cli.http_client import HttpClient, NoAnswer, TokenNeeded
from proxy.cli.tables import Column, fold, lay_out, number, printable, text
from proxy.cli.terminal import terminal_width
from proxy.errors import ConfigError

_FILE = click.Path(path_type=Path, dir_okay=False)
_TIMEOUT_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_ERRORS_SHOWN = 5
_PREFIXES_SHOWN = 5
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))

State = dict[str, Any]


@click.command("top", short_help="Show what a running Cairn does.")
@click.option("--url", metavar="URL", help="The admin port of a running Cairn.  [default: http://127.0.0.1:8090]")
@click.option("--config", "file", type=_FILE, help="The configuration file that names it.  [env: CAIRN_CONFIG]")
@click.option("--once", is_flag=True, help="Print the figures once and exit.")
def top(url: str | None, file: Path | None, once: bool) -> None:
    """Show what a running Cairn does: its status, failures, replicas and savings."""
    from proxy.config.load import load, process_environment

    try:
        config = load(file, process_environment()).config
    except ConfigError as error:
        exits.fail(error.message, code=exits.MISUSED)
    address = url or admin_url(config)
    client = admin_client(address, config, _TIMEOUT_SECONDS)
    try:
        if once:
            state = next(states(client), None)
            for line in lines(state or {}, terminal_width()) if state else ():
                click.echo(line)
        else:
            _watch(client)
    except TokenNeeded:
        exits.fail(f"the admin port {address} {TOKEN_NEEDED}")
    except NoAnswer as error:
        exits.fail(f"no Cairn answers at {address} ({error}); start it, or give its admin port with --url")
    except KeyboardInterrupt:
        return


def states(client: HttpClient) -> Iterator[State]:
    """Yield the states that the admin port sends. Raises NoAnswer."""
    for event, content in client.events("/events"):
        if event == "state":
            yield json.loads(content)


def _watch(client: HttpClient) -> None:
    """Redraw the screen with each state; raises NoAnswer if there was never one."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    shown: State | None = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                for shown in states(client):
                    live.update(Text("\n".join(lines(shown, console.width))), refresh=True)
            except NoAnswer:
                if shown is None:
                    raise
            live.update(
                Text("\n".join(["Disconnected; trying again", "", *lines(shown or {}, console.width)])), refresh=True
            )
            time.sleep(_RETRY_SECONDS)


def lines(state: State, width: int | None) -> list[str]:
    """Return the screen: the status and its reasons, failures, replicas, savings and prefixes. Pure."""
    if not state:
        return []
    shown = [
        *_head(state, width),
        "",
        *_failures(state, width),
        *_replicas(state, width),
        "",
        *_savings(state, width),
    ]
    return [*shown, "", *_prefixes(state, width)] if state["prefixes"] else shown


def _head(state: State, width: int | None) -> list[str]:
    up = sum(replica["up"] for replica in state["replicas"])
    facts = (
        f"{up} of {len(state['replicas'])} replicas up",
        f"{state['requests_per_second']:.1f} requests/s",
        f"{state['in_flight']:,} in flight",
        f"{state['waiting']:,} waiting",
        f"{state['requests']:,} requests in {_duration(state['now_unix_seconds'] - state['started_unix_seconds'])}",
    )
    head = [printable(f"Cairn {state['version']}: {state['status']}"), *_packed(facts, width)]
    remarks = [f"  now: {reason}" for reason in state["reasons"]] + [f"  note: {each}" for each in state["notices"]]
    return head + [line for remark in remarks for line in fold(remark, width, "    ")]


def _packed(facts: Sequence[str], width: int | None) -> list[str]:
    """Return the facts, separated by commas, in as few lines as fit in `width`; no fact is broken."""
    lines = [facts[0]]
    for fact in facts[1:]:
        longer = f"{lines[-1]}, {fact}"
        if width is None or len(longer) < width:  # a comma may follow
            lines[-1] = longer
        else:
            lines[-1] += ","
            lines.append(fact)
    return lines


def _failures(state: State, width: int | None) -> list[str]:
    errors = state["recent_errors"][:_ERRORS_SHOWN]
    if not errors:
        return ["No failed request in the last hour", ""]
    now = state["now_unix_seconds"]
    rows = [
        (
            each["client"] or "unknown",
            each["model"],
            each["reason"].replace("_", " "),
            f"{each['count']:,}",
            _duration(now - each["last_unix_seconds"]),
        )
        for each in errors
    ]
    columns = [
        text("client"),
        text("model"),
        text("failed in the last hour"),
        number("requests"),
        number("last, ago"),
    ]
    return [*lay_out(columns, rows, width), ""]


def _replicas(state: State, width: int | None) -> list[str]:
    now = state["now_unix_seconds"]
    rows = []
    for each in state["replicas"]:
        since = each["down_since_unix_seconds"]
        status = "up" if each["up"] else f"down{f' for {_duration(now - since)}' if since else ''}: {each['why']}"
        rows.append(
            (
                each["name"],
                status.removesuffix(": "),
                f"{each['in_flight']:,}",
                f"{each['queued']:,}",
                f"{each['pending_tokens']:,}",
                _share(each["cached_tokens"], each["prompt_tokens"]),
            )
        )
    columns: Sequence[Column] = [
        text("replica"),
        text("state"),
        *map(number, ("in flight", "waiting", "tokens to prefill", "cached")),
    ]
    return lay_out(columns, rows, width)


def _savings(state: State, width: int | None) -> list[str]:
    rows = [
        (
            period,
            f"${saved['usd']:,.2f}",
            f"{saved['prefill_seconds']:,.1f} s",
            f"{saved['cached_tokens']:,.0f}",
            _share(saved["cached_tokens"], saved["prompt_tokens"]),
        )
        for period, saved in state["saved"].items()
        if saved is not None
    ]
    return lay_out([text("saved"), *map(number, ("money", "prefill", "cached tokens", "share"))], rows, width)


def _prefixes(state: State, width: int | None) -> list[str]:
    rows = [
        (each["model"], f"{each['tokens']:,}", f"{each['hits']:,}", f"{each['saved_tokens']:,}")
        for each in state["prefixes"][:_PREFIXES_SHOWN]
    ]
    return lay_out([text("prefixes that saved most"), *map(number, ("tokens", "hits", "saved tokens"))], rows, width)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _duration(seconds: float) -> str:
    """Return a duration in its largest unit, such as `5 min`."""
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= size), _UNITS[-1])
    return f"{int(seconds // size)} {unit}"

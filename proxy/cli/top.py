"""`cairn top`: the main figures of the status page in a terminal, updated every second."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from proxy.cli import exit_codes as exits
from proxy.cli.admin_port import TOKEN_NEEDED, admin_client, admin_url
from proxy.cli.http_client import HttpClient, NoAnswer, TokenNeeded
from proxy.cli.tables import Column, fold, lay_out, number, printable, text
from proxy.cli.terminal import terminal_width
from proxy.errors import ConfigError
from proxy.version import own_version

_FILE = click.Path(path_type=Path, dir_okay=False)
_TIMEOUT_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_ERRORS_SHOWN = 5
_PREFIXES_SHOWN = 5
_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))

State = dict[str, Any]


class OtherVersion(Exception):
    """The program at that port sends other figures than this version shows."""


class _Failed(msgspec.Struct):
    client: str
    model: str
    reason: str
    count: int
    last_unix_seconds: float


class _Replica(msgspec.Struct):
    name: str
    up: bool
    down_since_unix_seconds: float | None
    why: str
    in_flight: int
    queued: int
    pending_tokens: int
    cached_tokens: int
    prompt_tokens: int
    unknown_tokens: int


class _Saved(msgspec.Struct):
    usd: float
    prefill_seconds: float
    cached_tokens: float
    prompt_tokens: float
    unknown_tokens: float


class _Prefix(msgspec.Struct):
    model: str
    tokens: int
    hits: int
    saved_tokens: int


class _Shown(msgspec.Struct):
    """The figures that are shown; a Cairn of another version may not send all of them."""

    version: str
    status: str
    reasons: list[str]
    notices: list[str]
    now_unix_seconds: float
    started_unix_seconds: float
    requests: int
    requests_per_second: float
    in_flight: int
    waiting: int
    recent_errors: list[_Failed]
    replicas: list[_Replica]
    saved: dict[str, _Saved | None]
    prefixes: list[_Prefix]


@click.command("top", short_help="Show what a running Cairn does.")
@click.option("--url", metavar="URL", help="The admin port of a running Cairn.  [default: http://127.0.0.1:8090]")
@click.option("--config", "file", type=_FILE, help="The configuration file that names it.  [env: CAIRN_CONFIG]")
@click.option("--once", is_flag=True, help="Print the figures once and exit, as is done without a terminal.")
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
        if once or not _can_redraw():
            state = next(states(client), None)
            for line in lines(state or {}, terminal_width()) if state else ():
                click.echo(line)
        else:
            _watch(client)
    except TokenNeeded:
        exits.fail(f"the admin port {address} {TOKEN_NEEDED}")
    except NoAnswer as error:
        exits.fail(f"no Cairn answers at {address} ({error}); start it, or give its admin port with --url")
    except OtherVersion:
        exits.fail(
            f"what runs at {address} sends figures of another version than this command's ({own_version()}); use the "
            "command that was installed with it"
        )
    except KeyboardInterrupt:
        return


def _can_redraw() -> bool:
    """Return whether standard output is a terminal whose screen can be drawn again and again."""
    from rich.console import Console

    console = Console()
    return console.is_terminal and not console.is_dumb_terminal


def states(client: HttpClient) -> Iterator[State]:
    """Yield the states that the admin port sends. Raises NoAnswer and OtherVersion."""
    for event, content in client.events("/events"):
        if event == "state":
            try:
                msgspec.json.decode(content, type=_Shown)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                raise OtherVersion from None
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
                _share(each),
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
            _share(saved),
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


def _share(tokens: State) -> str:
    """Return the cached share of prompt tokens; it is unknown if no upstream reported whether any was cached."""
    prompt = tokens["prompt_tokens"]
    if not prompt:
        return "-"
    return "?" if tokens["unknown_tokens"] >= prompt else f"{100 * tokens['cached_tokens'] / prompt:.1f} %"


def _duration(seconds: float) -> str:
    """Return a duration in its largest unit, such as `5 min`."""
    size, unit = next(((size, unit) for size, unit in _UNITS if seconds >= size), _UNITS[-1])
    return f"{int(seconds // size)} {unit}"

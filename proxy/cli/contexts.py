"""`cairn contexts`: upload documents to a running Cairn, and list, show, tag and delete them, over its HTTP API."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import click
import msgspec

from proxy.cli import exit_codes as exits
from proxy.cli.documents import Unreadable, read_documents
from proxy.cli.http_client import BadKey, BadUrl, HttpClient, NoAnswer
from proxy.cli.tables import number, printable, text
from proxy.cli.terminal import print_table
from proxy.clock import SystemClock

if TYPE_CHECKING:
    from rich.console import Console

USUAL_URL = "http://127.0.0.1:8080"
RESPONSE_SECONDS = 60.0
POLL_SECONDS = 0.25
PAGE = 100
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_ID = re.compile(r"cache-[0-9a-f]{32}")
_DURATION = re.compile(r"(\d{1,9})([smhdw]?)")

_url = click.option(
    "--url",
    envvar="OPENAI_BASE_URL",
    default=USUAL_URL,
    show_default=True,
    help="The running Cairn.  [env: OPENAI_BASE_URL]",
)
_key = click.option("--key", envvar="OPENAI_API_KEY", default="", help="Your API key.  [env: OPENAI_API_KEY]")
_as_json = click.option("--json", "as_json", is_flag=True, help="Print the response as JSON.")


class _Models(msgspec.Struct):
    """A list of models."""

    data: list[dict[str, Any]] = []


class _Row(msgspec.Struct):
    """The fields of a context that a list shows."""

    id: str
    name: str
    status: str
    tokens: int
    bytes: int
    worth_usd_per_hour: float
    expired_at: float


class _Tag(msgspec.Struct):
    """A tag and the context that has it."""

    tag: str
    cache_id: str


class _Message(msgspec.Struct):
    """The field that every message has."""

    role: str


class _Whole(msgspec.Struct):
    """The fields of a whole context that a command needs."""

    messages: list[_Message]


class _Why(msgspec.Struct):
    """Why a context could not be warmed."""

    message: str


class _Made(msgspec.Struct):
    """The fields of a stored context that a command needs."""

    id: str
    status: str
    error: _Why | None = None


class RequestFailed(Exception):
    """Cairn did not do what was asked; the message gives the reason."""


def _seconds(_: click.Context, __: click.Parameter, value: str) -> int:
    """Return the seconds of a duration such as `90`, `90s`, `30m`, `12h`, `7d` or `2w`."""
    found = _DURATION.fullmatch(value)
    if found is None or int(found[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a duration such as 90s, 30m, 12h or 7d")
    return int(found[1]) * _UNITS[found[2]]


class Cairn:
    """The client port of a running Cairn."""

    def __init__(self, url: str, key: str) -> None:
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        try:
            self._client = HttpClient(url, headers, RESPONSE_SECONDS)
        except BadUrl:
            raise RequestFailed(f"{url!r} is not the address of a Cairn, such as {USUAL_URL}") from None
        except BadKey:
            raise RequestFailed("the key contains a control character, such as a line end; remove it") from None
        self._client.path = self._client.path.removesuffix("/v1") + "/v1"
        self._url = url

    def call(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        on_sent: Callable[[int], object] = lambda _: None,
        form: Any = dict,
    ) -> Any:
        """Return the JSON of the response; `on_sent` is called with numbers of bytes sent.

        Raises RequestFailed, also if the response is not of the type `form`: another version may run there.
        """
        try:
            answer = self._client.request(method, path, body, on_sent)
        except NoAnswer as error:
            raise RequestFailed(
                f"no Cairn answers at {self._url} ({error}); start it, or give its address with --url"
            ) from None
        decoded = _decoded(self._url, answer.status, answer.body)
        self._check(decoded, form)
        return decoded

    def _check(self, decoded: Any, form: Any) -> None:
        try:
            msgspec.convert(decoded, form)
        except msgspec.ValidationError:
            raise _no_cairn(self._url, 200) from None

    def model(self) -> str:
        """Return the model that is served. Raises RequestFailed if there are several."""
        names = [str(model.get("id")) for model in self.call("GET", "/models", form=_Models).get("data", [])]
        if len(names) != 1:
            raise RequestFailed(f"choose a model with --model: {', '.join(names) or 'none is listed'}")
        return names[0]

    def find(self, name: str) -> dict[str, Any]:
        """Return the context with this id or tag."""
        path = f"/caching/{name}" if _ID.fullmatch(name) else f"/caching/refs/tags/{quote(name, safe='')}/content"
        found: dict[str, Any] = self.call("GET", path, form=_Whole)
        return found

    def all(self, path: str, cursor: str, form: type[msgspec.Struct]) -> list[dict[str, Any]]:
        """Return every row of a list, page by page; `cursor` is the field to which `after` refers, `form` a row's."""
        rows: list[dict[str, Any]] = []
        more = True
        while more:
            query = {"limit": PAGE, "order": "asc"} | ({"after": rows[-1][cursor]} if rows else {})
            page = self.call("GET", f"{path}?{urlencode(query)}")
            found = page.get("data")
            self._check(found, list[form])  # type: ignore[valid-type]
            rows += found
            more = bool(page.get("has_more"))
        return rows


@click.group("contexts", short_help="Store documents once, and refer to them by a tag.")
def contexts() -> None:
    """Store documents once, and refer to them in requests by a tag."""


@contexts.command("put", short_help="Store FILES as one context.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--tag", "tags", multiple=True, help="A tag for the context; if another context has the tag, it moves.")
@click.option(
    "--ttl",
    callback=_seconds,
    metavar="DURATION",
    default="1d",
    show_default=True,
    help="How long to keep the context.",
)
@click.option("--model", help="The model to warm it for.  [default: the one that is served]")
@click.option("--name", default="", help="The name in lists.  [default: the files' names]")
@click.option("--pin", is_flag=True, help="Never discard it to make room, within the quota.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until it is warm.")
@_url
@_key
@_as_json
def put(  # noqa: PLR0913 - click passes one parameter per option
    files: tuple[Path, ...],
    tags: tuple[str, ...],
    ttl: int,
    model: str | None,
    name: str,
    pin: bool,
    wait: bool,
    url: str,
    key: str,
    as_json: bool,
) -> None:
    """Store FILES (text, Markdown, PDF, or folders of these), each as a system message that starts with its name."""
    from rich.console import Console

    console = Console(stderr=True)
    try:
        cairn = Cairn(url, key)
        body = {
            "model": model or cairn.model(),
            "messages": _messages(files, console),
            "name": name or ", ".join(path.name for path in files)[:256],
            "ttl": ttl,
            "tags": list(tags),
        } | ({"metadata": {"pin": "true"}} if pin else {})
        made = _upload(cairn, json.dumps(body, ensure_ascii=False).encode(), console)
        if wait:
            made = _wait(cairn, made, console)
    except (RequestFailed, Unreadable) as error:
        exits.fail(str(error))
    made.pop("messages", None)
    if as_json:
        click.echo(json.dumps(made))
    else:
        click.echo(made["id"])
    if made["status"] == "error":
        exits.fail(f"the context is stored, but could not be warmed: {(made.get('error') or {}).get('message')}")


@contexts.command("list")
@_url
@_key
@_as_json
def list_(url: str, key: str, as_json: bool) -> None:
    """List the stored contexts, with what each of them saves."""
    try:
        cairn = Cairn(url, key)
        rows = cairn.all("/caching", "id", _Row)
        tags = cairn.all("/caching/refs/tags", "tag", _Tag)
    except RequestFailed as error:
        exits.fail(str(error))
    if as_json:
        click.echo(json.dumps(rows))
        return
    tags_of: dict[str, list[str]] = {}
    for tag in tags:
        tags_of.setdefault(tag["cache_id"], []).append(tag["tag"])
    print_table(_COLUMNS, [_cells(row, tags_of.get(row["id"], [])) for row in rows])


_COLUMNS = [
    *map(text, ("id", "name", "tags", "status")),
    *map(number, ("tokens", "bytes", "saves $/h", "expires in")),
]


def _cells(row: dict[str, Any], tags: Sequence[str]) -> tuple[str, ...]:
    return (
        row["id"],
        row["name"],
        ", ".join(tags),
        row["status"],
        f"{row['tokens']:,}",
        f"{row['bytes']:,}",
        f"{row['worth_usd_per_hour']:.4f}",
        _left(row["expired_at"]),
    )


@contexts.command("show", short_help="Show one context, by id or tag.")
@click.argument("name")
@_url
@_key
@_as_json
def show(name: str, url: str, key: str, as_json: bool) -> None:
    """Show one context, by id or tag; with --json including its messages."""
    try:
        found = Cairn(url, key).find(name)
    except RequestFailed as error:
        exits.fail(str(error))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    messages = found.pop("messages")
    for field, value in found.items():
        if value not in ("", {}, []):
            shown = value if isinstance(value, str | int | float) else json.dumps(value)
            click.echo(printable(f"{field}: {shown}"))
    for place, message in enumerate(messages):
        content = message.get("content")
        size = len(content) if isinstance(content, str) else len(json.dumps(content))
        first = content.partition("\n")[0][:80] if isinstance(content, str) else ""
        click.echo(printable(f"messages[{place}]: {message['role']}, {size:,} characters: {first}"))


@contexts.command("rm")
@click.argument("names", nargs=-1, required=True)
@_url
@_key
def rm(names: tuple[str, ...], url: str, key: str) -> None:
    """Delete contexts, by id or tag, and all their tags."""
    try:
        cairn = Cairn(url, key)
        for name in names:
            context_id = name
            if not _ID.fullmatch(name):
                context_id = cairn.call("GET", f"/caching/refs/tags/{quote(name, safe='')}", form=_Tag)["cache_id"]
            cairn.call("DELETE", f"/caching/{context_id}")
            click.echo(context_id)
    except RequestFailed as error:
        exits.fail(str(error))


@contexts.command("tag", short_help="Move, delete or look up a tag.")
@click.argument("tag")
@click.argument("context_id", required=False)
@click.option("--delete", "is_deletion", is_flag=True, help="Delete the tag; the context stays.")
@_url
@_key
def tag(tag: str, context_id: str | None, is_deletion: bool, url: str, key: str) -> None:
    """Move TAG to the context CONTEXT_ID, or, without an id, print which context has it."""
    path = f"/caching/refs/tags/{quote(tag, safe='')}"
    try:
        cairn = Cairn(url, key)
        if is_deletion:
            cairn.call("DELETE", path)
        elif context_id is None:
            click.echo(cairn.call("GET", path, form=_Tag)["cache_id"])
        else:
            body = json.dumps({"tag": tag, "cache_id": context_id}).encode()
            click.echo(cairn.call("POST", "/caching/refs/tags", body, form=_Tag)["cache_id"])
    except RequestFailed as error:
        exits.fail(str(error))


def _messages(files: Sequence[Path], console: Console) -> list[dict[str, str]]:
    from rich.text import Text

    with console.status("reading") as status:
        messages = []
        for document in read_documents(files):
            status.update(Text(f"reading {document.name}"))  # a name may contain what rich takes for markup
            messages.append(document.message)
    return messages


def _upload(cairn: Cairn, body: bytes, console: Console) -> dict[str, Any]:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(body))
        made: dict[str, Any] = cairn.call("POST", "/caching", body, lambda size: progress.advance(task, size), _Made)
    return made


def _wait(cairn: Cairn, made: dict[str, Any], console: Console) -> dict[str, Any]:
    with console.status("warming"):
        while made["status"] == "pending":
            time.sleep(POLL_SECONDS)
            made = cairn.call("GET", f"/caching/{made['id']}", form=_Made)
    return made


def _decoded(url: str, status: int, body: bytes) -> Any:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    error = answer.get("error") if isinstance(answer, dict) else None
    if status >= 400 and isinstance(error, dict) and isinstance(error.get("message"), str):
        raise RequestFailed(f"{error['param']}: {error['message']}" if error.get("param") else error["message"])
    if status >= 400 or not isinstance(answer, dict):
        raise _no_cairn(url, status)
    return answer


def _no_cairn(url: str, status: int) -> RequestFailed:
    return RequestFailed(f"{url} is not the client port of a Cairn (status {status}); give that with --url")


def _left(expired_at: int) -> str:
    seconds = int(expired_at - SystemClock().unix())
    if seconds <= 0:
        return "expired"
    for unit in "wdhm":
        if seconds >= _UNITS[unit]:
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"

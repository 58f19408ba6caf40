"""`cairn init`: write a commented configuration for endpoints, after asking them what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from proxy.cli import exit_codes as exits
from proxy.cli.endpoint import Endpoint, ask, key_headers
from proxy.cli.terminal import print_sentence

_LINE_LENGTH = 100
_HEAD = """# Configuration of Cairn, written by `cairn init`. All settings: `cairn config reference`.
# Check it against the endpoints with `cairn doctor --config {file}`, start with `cairn serve --config {file}`.

server:
  host: 127.0.0.1        # 0.0.0.0 to serve other machines
  port: 8080

# redis:
#   url: redis://cache:6379   # shared by all proxies; without it Cairn starts a private Valkey

pools:
"""
_TAIL = """
# clients:                     # only these may use Cairn; without a list anyone who reaches the port may
#   - name: web
#     key_sha256: ...          # printf %s KEY | sha256sum

# prices:                      # before the built-in prices; an engine of your own is priced by the hour of a GPU
#   - model: "*"
#     usd_per_gpu_hour: 2.5
"""


@click.command("init", short_help="Write a configuration for endpoints.")
@click.argument("urls", nargs=-1, required=True, metavar="URL...")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default="cairn.yaml", show_default=True)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--key", default="", envvar="OPENAI_API_KEY", help="The endpoints' API key.  [env: OPENAI_API_KEY]")
def init(urls: tuple[str, ...], output: Path, force: bool, key: str) -> None:
    """Ask the endpoints at URL... what they serve, and write a configuration for them.

    The key is used to ask and is not written to the file.
    """
    if output.exists() and not force:
        exits.fail(f"{output} exists; choose another --output, or replace it with --force", code=exits.MISUSED)
    urls = _distinct(urls)
    endpoints = [ask(url, key_headers(key.strip(), None, url) if key else {}) for url in urls]
    for endpoint in endpoints:
        if endpoint.problem is not None:
            print_sentence(f"cairn: {endpoint.url} {endpoint.problem}", indent="  ", err=True)
    try:
        output.write_text(configuration(endpoints, str(output), has_key=bool(key)))
    except OSError as error:
        exits.fail(f"cannot write {output}: {error.strerror}")
    print_sentence(f"{output} is written; start with: cairn serve --config {output}", indent="  ")


def _distinct(urls: Sequence[str]) -> tuple[str, ...]:
    """Return the URLs, each endpoint once; exits if a configuration could not contain one of them."""
    from proxy.config.checks import bad_url
    from proxy.config.schema import derived_name

    problems = [(url, problem) for url in urls if (problem := bad_url(url, "key", ("http", "https")))]
    if problems:
        exits.fail(*[f"{url}: {problem}" for url, problem in problems], code=exits.MISUSED)
    return tuple({derived_name(url): url for url in reversed(urls)}.values())[::-1]


def configuration(endpoints: Sequence[Endpoint], file: str, *, has_key: bool) -> str:
    """Return the file: a pool for each set of models, in the order of the endpoints. Pure."""
    from proxy.config.checks import implied_kind

    pools: dict[tuple[str, tuple[str, ...]], list[Endpoint]] = {}
    for endpoint in endpoints:
        pools.setdefault((implied_kind(endpoint.url).value, endpoint.models), []).append(endpoint)
    text = _HEAD.format(file=file)
    for number, ((kind, models), members) in enumerate(pools.items(), start=1):
        name = kind if len(pools) == 1 else f"{kind}-{number}"
        patterns = list(models) if len(pools) > 1 and models else ["*"]
        text += f"  - name: {name}\n    kind: {kind}\n{_list(patterns)}"
        text += "    default: true\n" if number == 1 else ""
        text += "    replicas:\n" + "".join(_replica(member, has_key=has_key) for member in members)
    return text + _TAIL


def _list(patterns: Sequence[str]) -> str:
    """Return the setting `models`, in one line if that is short."""
    line = f"    models: [{', '.join(map(_quoted, patterns))}]\n"
    return (
        line if len(line) < _LINE_LENGTH else "    models:\n" + "".join(f"      - {_quoted(p)}\n" for p in patterns)
    )


def _replica(endpoint: Endpoint, *, has_key: bool) -> str:
    count = len(endpoint.models)
    models = f"{count} model" if count == 1 else f"{count} models"
    found = endpoint.problem or ", ".join(filter(None, (endpoint.engine, models)))
    lines = [f"      - url: {_quoted(endpoint.url)}    # {found}"]
    lines += ["        key_env: OPENAI_API_KEY"] if has_key else ["        # key_env: OPENAI_API_KEY"]
    if not endpoint.engine and endpoint.problem is None:
        lines.append("        # capacity_tokens: 400000   # tokens in the engine's cache, if it does not report them")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

"""Endpoints, addresses and keys that are not what they should be: a line that explains, never a traceback."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import click
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from click.testing import CliRunner, Result

from proxy.cli.endpoint import key_headers
from proxy.cli.main import cli
from proxy.config.load import load
from proxy.config.schema import Auth
from tests.support.openai_upstream import OpenAIUpstream

MODELS = "/v1/models"
LONG_LABEL = "h" * 70 + ".example"
NO_LIST = "answers 200 without a list of models: is this an OpenAI API?"


@pytest.fixture
async def upstream() -> AsyncIterator[OpenAIUpstream]:
    async with OpenAIUpstream() as upstream:
        yield upstream


async def run(*arguments: str, **env: str) -> Result:
    """The command in a thread, since the upstream lives in this loop."""
    clean = {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": "", "CAIRN_CONFIG": ""}
    result = await asyncio.to_thread(CliRunner().invoke, cli, arguments, None, clean | env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", NO_LIST),
        (b'{"data":{"id":"x","owned_by":1}}', NO_LIST),
        (b"5", NO_LIST),
        (b"null", NO_LIST),
        (b"<html>", NO_LIST),
        (b'{"data":[{"id":"m","owned_by":' + b"9" * 5000 + b"}]}", NO_LIST),
        (b'{"data":[],"owned_by":1}', ""),
        (b'{"data":[null,5,{"id":null},{"id":["a"]},{"owned_by":7}]}', ""),
        (
            b'{"data":[{"id":"a\\n\\"]\\nclients: []"},{"id":"\\u001b[2J"},{"id":"\\ud800"},'
            b'{"id":"\\u0000"},{"id":" "}]}',
            "",
        ),
    ],
    ids=["deep", "mapping", "number", "null", "page", "digits", "empty", "no names", "no usable names"],
)
async def test_init_writes_a_valid_file_whatever_an_endpoint_lists(
    upstream: OpenAIUpstream, tmp_path: Path, answer: bytes, says: str
) -> None:
    """It says what is odd, and leaves out names that a configuration could not contain."""
    upstream.answers[MODELS] = answer
    file = tmp_path / "c.yaml"
    done = await run("init", upstream.url, "http://127.0.0.1:9", "--output", str(file))
    assert done.exit_code == 0
    assert says in done.stderr.replace("\n  ", " ")
    assert load(file, {"HOME": str(tmp_path)}).config.pools[0].models == ("*",)


async def test_init_writes_many_models_one_in_a_line(upstream: OpenAIUpstream, tmp_path: Path) -> None:
    """A list of a provider has thousands."""
    names = [f"provider/model-{n}" for n in range(500)]
    upstream.answers[MODELS] = json.dumps({"data": [{"id": name} for name in names]}).encode()
    file = tmp_path / "c.yaml"
    await run("init", upstream.url, "http://127.0.0.1:9", "--output", str(file))
    assert all(line.count("provider/") < 2 for line in file.read_text().splitlines())
    assert load(file, {"HOME": str(tmp_path)}).config.pools[0].models == tuple(names)


async def test_init_takes_an_endpoint_once_however_it_is_written(upstream: OpenAIUpstream, tmp_path: Path) -> None:
    """Two replicas of one name would be refused later."""
    file = tmp_path / "c.yaml"
    base = upstream.url.removesuffix("/v1")
    await run("init", upstream.url, base, f"{base}/", "--output", str(file))
    assert len(load(file, {"HOME": str(tmp_path)}).config.pools[0].replicas) == 1


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://h", "expected http:// or https://"),
        ("10.0.0.7:8000", "expected http:// or https://"),
        ("http://u:sk@h", "contains a user or password"),
        ("http://h/v1/chat/completions", "is the URL of an endpoint"),
        ("http://h?key=x", "has a query or fragment"),
        ("http://a b", "expected a host, and no white space"),
        ("http://[::1", "is not a URL"),
        ("http://h:99999", "is not a URL"),
    ],
)
async def test_init_refuses_an_address_that_no_configuration_may_have(tmp_path: Path, url: str, says: str) -> None:
    """Before it writes anything."""
    done = await run("init", url, "--output", str(tmp_path / "c.yaml"))
    assert done.exit_code == 2
    assert says in done.stderr.replace("\n  ", " ")
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize(
    "url", [f"http://{LONG_LABEL}", "http://a b", "http://[::1", "http://h:x", "ftp://h", "http://h\x1b"]
)
@pytest.mark.parametrize("command", [("top", "--once"), ("savings",), ("contexts", "list")])
async def test_an_address_that_is_none_is_named(command: tuple[str, ...], url: str) -> None:
    """By every command that talks to a running Cairn."""
    done = await run(*command, "--url", url)
    assert done.exit_code in (1, 2)
    assert "is not the address of" in done.stderr.replace("\n  ", " ")


async def test_a_host_name_that_cannot_be_one_is_explained_by_init(tmp_path: Path) -> None:
    """The codec for host names raises an error of another kind than the resolver."""
    done = await run("init", f"http://{LONG_LABEL}", "--output", str(tmp_path / "c.yaml"))
    assert "is not a URL of http or https" in done.stderr.replace("\n  ", " ")


async def test_a_key_that_no_header_can_carry_is_explained_and_not_shown(tmp_path: Path) -> None:
    """A line end in it comes from a file with the line ends of another system."""
    for command in (("init", "http://127.0.0.1:9", "--output", str(tmp_path / "c.yaml")), ("contexts", "list")):
        done = await run(*command, "--key", "sk-se\rcret")
        assert "control character" in done.stderr.replace("\n  ", " ")
        assert "cret" not in done.output
    done = await run("contexts", "list", "--key", "sk–\N{SNOWMAN}", "--url", "http://127.0.0.1:9")
    assert "no Cairn answers" in done.stderr.replace("\n  ", " ")


@pytest.mark.parametrize(
    ("auth", "url", "headers"),
    [
        (None, "http://10.0.0.7:8000", {"authorization": "Bearer k"}),
        (None, "https://api.anthropic.com", {"x-api-key": "k", "anthropic-version": "2023-06-01"}),
        (Auth.API_KEY, "https://gateway.example/x", {"api-key": "k"}),
    ],
)
def test_endpoints_are_asked_with_the_header_that_requests_will_have(
    auth: Auth | None, url: str, headers: dict[str, str]
) -> None:
    """Otherwise doctor would report that a provider refuses a right key."""
    assert key_headers("k", auth, url) == headers


async def test_doctor_explains_what_it_cannot_use(upstream: OpenAIUpstream, tmp_path: Path) -> None:
    """An address that cannot be bound is a failure, an engine that only Kubernetes knows is not."""
    file = tmp_path / "c.yaml"
    replicas = f'[{{url: "{upstream.url}"}}, {{url: "kubernetes+http://vllm.models:http"}}]'
    file.write_text(
        f'server: {{host: "{LONG_LABEL}"}}\nadmin: {{port: 0}}\npools: [{{name: p, replicas: {replicas}}}]\n'
    )
    done = await run("doctor", "--config", str(file))
    assert done.exit_code == 1
    assert f"FAIL  cannot listen on {LONG_LABEL} port 8080: " in done.output
    assert "check server.host and server.port" in done.output
    assert "warn  replica vllm.models:http is found through the Kubernetes API and is not checked here" in done.output


async def test_nothing_that_an_endpoint_lists_reaches_the_terminal_as_a_command(
    upstream: OpenAIUpstream, tmp_path: Path
) -> None:
    """Names of models can contain the sequences that control terminals, and what no terminal can show."""
    upstream.answers[MODELS] = b'{"data":[{"id":"a\\u001b]0;x\\u0007"},{"id":"b\\ud800"},{"id":"fine"}]}'
    file = tmp_path / "c.yaml"
    file.write_text(
        "admin: {port: 0}\nserver: {port: 0}\n"
        f'pools: [{{name: p, models: [fine], replicas: [{{url: "{upstream.url}"}}]}}]\n'
    )
    done = await run("doctor", "--config", str(file))
    assert "answers: fine" in done.output
    assert "\x1b" not in done.output


def test_no_summary_of_a_command_is_cut() -> None:
    """In a terminal of 80 columns."""
    groups: list[tuple[tuple[str, ...], click.Command]] = [((), cli)]
    for path, group in groups:
        if isinstance(group, click.Group):
            groups += [((*path, name), each) for name, each in group.commands.items()]
            shown = CliRunner().invoke(cli, [*path, "--help"], terminal_width=80).output
            assert "..." not in shown.partition("Commands:")[2], shown


@pytest.mark.parametrize(
    "answer",
    [b"null", b"5", b"[" * 20_000 + b"]" * 20_000, b"<html>", b'{"error":"not found"}', b'{"data":[null]}'],
    ids=["null", "number", "deep", "page", "error", "rows"],
)
async def test_a_server_that_is_no_cairn_is_named_as_one(upstream: OpenAIUpstream, answer: bytes) -> None:
    """For example the admin port, or an engine."""
    upstream.answers["/v1/caching"] = answer
    done = await run("contexts", "list", "--url", upstream.url)
    assert "is not the client port of a Cairn (status 200)" in done.stderr.replace("\n  ", " ")


@pytest.mark.parametrize("command", [("top", "--once"), ("savings",)])
async def test_an_admin_port_that_wants_its_token_is_not_called_absent(command: tuple[str, ...]) -> None:
    """It says where the token can be given."""

    async def refuse(_: web.BaseRequest) -> web.Response:
        return web.json_response({"error": "send the token"}, status=401)

    server = RawTestServer(refuse)
    await server.start_server()
    try:
        done = await run(*command, "--url", str(server.make_url("/")))
    finally:
        await server.close()
    assert "needs its token; set CAIRN_ADMIN_TOKEN" in done.stderr.replace("\n  ", " ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_explained() -> None:
    """The output is treated like the files that other commands write."""
    command = [sys.executable, "-m", "proxy", "config", "schema"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "cairn: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "it closed the connection"),
        (b"-ERR unknown command\r\n", "its response is not HTTP"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\n{", "it closed the connection"),
    ],
    ids=["nothing", "redis", "half"],
)
async def test_init_says_in_words_why_an_endpoint_gives_no_answer(tmp_path: Path, answer: bytes, says: str) -> None:
    """Not by the name of an exception."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        done = await run("init", url, "--output", str(tmp_path / "c.yaml"))
    assert f"does not answer ({says})" in done.stderr.replace("\n  ", " ")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://{host}", "the TLS handshake failed; does it speak http rather than https?"),
        ("http://no-such-host.invalid", "its host name does not resolve"),
    ],
)
async def test_init_explains_a_wrong_scheme_and_an_unknown_name(
    upstream: OpenAIUpstream, tmp_path: Path, url: str, says: str
) -> None:
    """These two have other causes than a server that does not run."""
    host = upstream.url.removeprefix("http://").removesuffix("/v1")
    done = await run("init", url.format(host=host), "--output", str(tmp_path / "c.yaml"))
    assert f"does not answer ({says})" in done.stderr.replace("\n  ", " ")


@pytest.mark.parametrize("command", [("show", "a"), ("tag", "a"), ("rm", "a"), ("list",), ("put", __file__)])
async def test_answers_of_another_version_are_no_tracebacks(command: tuple[str, ...]) -> None:
    """Fields may be missing, or have other types."""

    async def answer(request: web.BaseRequest) -> web.Response:
        rows = [{"id": "m", "tag": "t", "name": 5}]
        return web.json_response({"id": 5, "data": rows, "messages": ["x"], "error": {"message": 5}})

    async with RawTestServer(answer) as server:
        done = await run("contexts", *command, "--url", str(server.make_url("/")))
    assert done.exit_code == 1
    assert "is not the client port of a Cairn (status 200)" in done.stderr.replace("\n  ", " ")

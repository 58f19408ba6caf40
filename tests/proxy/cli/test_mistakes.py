"""Likely mistakes, each with the error that says what is wrong, where, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from proxy.cli.main import cli
from proxy.config.schema import Config, Section, types_of

ONE_POOL = {"name": "p", "replicas": [{"url": "http://10.0.0.7:8000"}]}


def pools(**replica: Any) -> dict[str, Any]:
    return {"pools": [{"name": "p", "replicas": [{"url": "http://10.0.0.7:8000", **replica}]}]}


FILES: list[tuple[str, dict[str, Any] | str, str]] = [
    ("a misspelt section", {"sever": {}}, "$.sever: there is no such setting; did you mean `server`?"),
    ("a misspelt setting", {"server": {"prot": 1}}, "$.server.prot: there is no such setting; did you mean `port`?"),
    (
        "a list where its plural is meant",
        {"pools": [{"name": "p", "replica": []}]},
        "$.pools[0].replica: there is no such setting; did you mean `replicas`?",
    ),
    ("a pool without replicas", {"pools": [{"name": "p"}]}, "$.pools[0]: the setting `replicas` is missing"),
    (
        "a number as text",
        {"server": {"port": "8080"}},
        "$.server.port: expected a whole number, got text; remove the quotes",
    ),
    ("a port out of range", {"server": {"port": 80800}}, "$.server.port: expected a whole number <= 65535"),
    (
        "a duration with a unit",
        {"upstream": {"first_byte_seconds": "10m"}},
        "$.upstream.first_byte_seconds: expected a number, got text; durations are in seconds: 600",
    ),
    ("a list for a value", {"server": {"port": [8080]}}, "$.server.port: expected a whole number, got a list"),
    (
        "a value for a list",
        {"pools": [ONE_POOL | {"models": "gpt-4"}]},
        "$.pools[0].models: expected a list, got text; write [a, b], or one `- ` a line",
    ),
    ("one pool without its dash", {"pools": ONE_POOL}, "$.pools: expected a list, got a mapping of settings"),
    (
        "a setting without a value",
        "server:\n  port:\n",
        "$.server.port: expected a whole number, got nothing; give a value, or remove the line",
    ),
    (
        "a word for true",
        {"server": {"open": "yes"}},
        "$.server.open: expected true or false, got text; write true or false, without quotes",
    ),
    ("a URL for a replica", {"pools": [{"name": "p", "replicas": ["http://h"]}]}, "expected a mapping of settings"),
    (
        "a date of another country",
        {"prices": [{"input": 1, "output": 1, "valid_from": "01.02.2026"}]},
        "$.prices[0].valid_from: expected a date such as 2026-01-31",
    ),
    (
        "a date that does not exist",
        "prices: [{input: 1, output: 1, valid_from: 2026-13-01}]\n",
        "it contains a date or a number that does not exist",
    ),
    (
        "an amount with its currency",
        {"prices": [{"input": "$1", "output": 1}]},
        "$.prices[0].input: expected an amount such as 1.25, without a currency",
    ),
    (
        "the URL of an endpoint",
        pools(url="http://h:1/v1/chat/completions"),
        "is the URL of an endpoint; give the base URL, which ends before /chat/completions",
    ),
    (
        "a variable in place of its value",
        pools(key="${OPENAI_API_KEY}"),
        "is the name of a variable, not its value; set key_env: OPENAI_API_KEY",
    ),
    (
        "a client's key instead of its hash",
        {"clients": [{"name": "c", "key": "sk"}]},
        "$.clients[0].key: there is no such setting; did you mean `key_sha256`?",
    ),
    ("a colon in a value", "log:\n  level: a: b\n", "(line 2, column 11); quote a value with a colon in it"),
    ("uneven indentation", "server:\n  port: 1\n   host: x\n", "indent settings of one section alike"),
    (
        "a star without quotes",
        'pools: [{name: p, models: [*], replicas: [{url: "http://h"}]}]',
        "; quote a value that begins with `*` or `&`",
    ),
    ("an open quote", 'server: {host: "127.0.0.1}\n', "; a quote is not closed"),
    ("another format", "[server]\nport = 8080\n", "; write settings as `name: value`, indented below their section"),
    ("two documents", "server: {port: 1}\n---\nserver: {port: 2}\n", "; a configuration is one document"),
    ("an anchor that is not there", "pools: [*gone]\n", "; quote a value that begins with `*`, or define the anchor"),
    ("a list as the file", "- server\n", "$: expected a mapping of settings"),
    (
        "a size without its form",
        {"server": {"max_body_bytes": "32 megs"}},
        "$.server.max_body_bytes: expected a number of bytes such as 33554432, 32MB or 32MiB",
    ),
    (
        "a misspelt choice",
        {"pools": [ONE_POOL | {"kind": "engin"}]},
        "$.pools[0].kind: expected one of engine, provider; did you mean `engine`?",
    ),
    (
        "a log level that is none",
        {"log": {"level": "trace"}},
        "$.log.level: expected one of debug, info, warning, error",
    ),
    (
        "an address without a scheme",
        pools(url="10.0.0.7:8000"),
        "replicas[0].url: expected http://, https://, dns+",
    ),
    ("a key in the URL", pools(url="https://u:sk@h"), "give the key in key_env or key_file"),
    ("a query in the URL", pools(url="https://h/v1?key=x"), "has a query or fragment; remove it"),
    (
        "a variable that is not set",
        pools(key_env="NO_SUCH_KEY"),
        "key_env: the environment has no variable NO_SUCH_KEY",
    ),
    ("a key file that is not there", pools(key_file="no.key"), "key_file: cannot read"),
    (
        "two replicas with one name",
        {"pools": [{"name": "p", "replicas": [{"url": "http://h:1"}, {"url": "http://h:1/v1"}]}]},
        "give each replica a different name",
    ),
    (
        "two default pools",
        {"pools": [ONE_POOL | {"default": True}, ONE_POOL | {"name": "q", "default": True}]},
        "$.pools[0] is the default pool already",
    ),
    ("an open admin port", {"admin": {"host": "0.0.0.0"}}, "set admin.token, token_env or token_file"),
    (
        "replicas' keys for everyone",
        pools(key="sk") | {"server": {"host": "0.0.0.0"}},
        "list clients, listen on loopback, or allow it with --open",
    ),
    ("one port for both", {"server": {"port": 8090}}, "$.admin.port: 8090 is also the port of the server"),
    ("a database URL", {"redis": {"url": "mysql://h"}}, "$.redis.url: expected redis://"),
    (
        "a key that is no hash",
        {"clients": [{"name": "c", "key_sha256": "sk-1"}]},
        "$.clients[0].key_sha256: expected 64 hexadecimal digits, from: printf",
    ),
    (
        "a price without its output",
        {"prices": [{"model": "m", "input": 1}]},
        "$.prices[0].output: is needed with input; use 0 if nothing is generated",
    ),
    ("a setting given twice", "server: {port: 1}\nserver: {port: 2}\n", "'server' is given twice (line 2, column 1)"),
    ("a list as a name", "server:\n  ? [a, b]\n  : 1\n", "is not YAML: a name is expected here (line 2, column 5)"),
    (
        "a null character in a path",
        'redis: {folder: "/var/lib/a\\0b"}\n',
        "$.redis.folder: contains a null character",
    ),
    (
        "a null character in a list",
        'pools: [{name: p, models: ["a\\0"], replicas: [{url: "http://h"}]}]',
        "$.pools[0].models[0]: contains a null character",
    ),
    (
        "a host for an origin",
        {"server": {"cors_origins": ["chat.example.com"]}},
        "$.server.cors_origins[0]: expected a scheme and a host, such as https://chat.example.com, or *",
    ),
    (
        "a page for an origin",
        {"server": {"cors_origins": ["https://chat.example.com/app"]}},
        "$.server.cors_origins[0]: expected a scheme and a host",
    ),
    (
        "a path without its slash, behind a right one",
        {"server": {"engine_paths": ["/tokenize", "rerank"]}},
        "$.server.engine_paths[1]: expected a path that begins with /, without spaces",
    ),
    (
        "a header with its colon",
        {"routing": {"session_headers": ["x-session:"]}},
        "$.routing.session_headers[0]: expected the name of a header, without a colon",
    ),
    (
        "a currency by its sign",
        {"prices": [{"input": 1, "output": 1, "currency": "$"}]},
        "$.prices[0].currency: expected three capital letters, such as USD",
    ),
    ("a key as a list", pools(key=["sk"]), "replicas[0].key: expected text, got a list"),
    ("a key as a mapping", pools(key={"a": "sk"}), "replicas[0].key: expected text, got a mapping of settings"),
    (
        "a number with an exponent",
        pools(capacity_tokens="5e5"),
        "replicas[0].capacity_tokens: expected a whole number, got text; write it as 500000",
    ),
    (
        "a number with a unit",
        pools(capacity_tokens="500k"),
        "replicas[0].capacity_tokens: expected a whole number, got text; write it as 500000",
    ),
    (
        "a number with commas",
        pools(capacity_tokens="1,500,000"),
        "replicas[0].capacity_tokens: expected a whole number, got text; write it as 1500000",
    ),
    (
        "a name that YAML reads as false",
        "clients: [{name: no, key_sha256: x}]\n",
        "$.clients[0].name: expected text, got true or false; put it in quotes",
    ),
    (
        "a version for a model",
        {"pools": [ONE_POOL | {"models": [4]}]},
        "$.pools[0].models[0]: expected text, got a whole number; put it in quotes",
    ),
    (
        "a section of comments",
        "redis:\n  # url: redis://cache\n",
        "$.redis: expected a mapping of settings, got nothing; give its settings, or remove the line",
    ),
    (
        "a misspelt setting of a template",
        {"pools": [ONE_POOL | {"template": {"drops_thougths": True}}]},
        "$.pools[0].template.drops_thougths: there is no such setting; did you mean `drops_thoughts`?",
    ),
    (
        "the name of a template",
        {"pools": [ONE_POOL | {"template": "chatml"}]},
        "$.pools[0].template: expected a mapping of settings, got text",
    ),
    (
        "a word for true in a template",
        {"pools": [ONE_POOL | {"template": {"dated": "yes"}}]},
        "$.pools[0].template.dated: expected true or false, got text; write true or false, without quotes",
    ),
    ("a tab in YAML", "server:\n\tport: 1\n", "; indent with spaces, not with tabs"),
]


@pytest.mark.parametrize(("content", "says"), [each[1:] for each in FILES], ids=[each[0] for each in FILES])
def test_a_mistake_in_the_file_is_explained(tmp_path: Path, content: dict[str, Any] | str, says: str) -> None:
    """In a line with the file and the path of the setting, exit 2, without a traceback."""
    file = tmp_path / "cairn.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    result = CliRunner().invoke(cli, ["serve", "--config", str(file)])
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert says in result.stderr, result.stderr
    assert all(line.startswith("cairn: ") for line in result.stderr.splitlines())


def test_every_mistake_in_a_list_is_named(tmp_path: Path) -> None:
    """Not only its first."""
    file = tmp_path / "cairn.yaml"
    file.write_text('server: {allowed_paths: ["v1/files", "/v1/batches", ""]}\n')
    found = CliRunner().invoke(cli, ["serve", "--config", str(file)]).stderr
    assert "allowed_paths[0]" in found
    assert "allowed_paths[1]" not in found
    assert "allowed_paths[2]" in found


def test_no_form_of_a_setting_is_explained_by_a_regular_expression() -> None:
    """Every pattern in the schema has a description for people."""
    types: list[Any] = [Config]
    checked = 0
    while types:
        kind = types.pop()
        patterns = [part.pattern for part in getattr(kind, "__metadata__", ()) if getattr(part, "pattern", None)]
        if patterns:
            checked += 1
            assert any((part.extra or {}).get("form") for part in kind.__metadata__ if part.pattern), patterns
        types += getattr(kind, "__args__", ())
        if hasattr(kind, "__metadata__"):
            types.append(kind.__origin__)
        if isinstance(kind, type) and issubclass(kind, Section):
            types += types_of(kind).values()
    assert checked > 5


@pytest.mark.parametrize(
    ("arguments", "env", "says"),
    [
        (("serve",), {}, "nothing to serve: give --upstream URL, or a file with pools by --config"),
        (("serve", "--upsteam", "http://h"), {}, "Did you mean '--upstream'?"),
        (("srve",), {}, "No such command 'srve'"),
        (("serve", "--config", "/no/such/file"), {}, "cannot read /no/such/file: No such file or directory"),
        (
            ("serve", "--upstream", "http://h", "--upstream", "https://api.openai.com"),
            {},
            "put them into separate pools in a file",
        ),
        (
            ("serve", "--upstream", "http://h"),
            {"CAIRN_SERVER__WORKRES": "4"},
            "CAIRN_SERVER__WORKRES: there is no such setting; did you mean `CAIRN_SERVER__WORKERS`?",
        ),
        (("savings", "--since", "soon", "--redis", "redis://127.0.0.1:9"), {}, "expected a date such as 2026-11-23"),
        (("contexts", "put", "/no/such/file"), {}, "'/no/such/file' does not exist"),
        (
            ("contexts", "list", "--url", "ftp://h"),
            {},
            "is not the address of a Cairn, such as http://127.0.0.1:8080",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(
    arguments: tuple[str, ...], env: dict[str, str], says: str
) -> None:
    """With the flag or variable, and the near miss."""
    clean = {"CAIRN_CONFIG": "", "CAIRN_UPSTREAM": "", "OPENAI_BASE_URL": "http://127.0.0.1:9"}
    result = CliRunner().invoke(cli, arguments, env=clean | env)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code != 0
    assert says in result.stderr, result.stderr

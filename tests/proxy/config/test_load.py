"""The configuration: what beats what, and errors that name the path."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.checks import implied_kind, is_loopback
from proxy.config.load import (
    Config,
    ConfigError,
    Loaded,
    PoolKind,
    Secret,
    SecretUrl,
    Tenancy,
    as_yaml,
    load,
    secrets_of,
    worker_environment,
)
from proxy.config.schema import derived_name, make_secret, redact, reveal
from proxy.config.validate import problems
from tests.support import settings
from tests.support.operations import operations

SHA = "ab" * 32


@pytest.fixture
def write(tmp_path: Path):
    """Writes a tree or a text as the configuration file."""

    def writer(content: object) -> Path:
        file = tmp_path / "cairn.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return file

    return writer


def pool(*urls: str, **settings: object) -> dict:
    """A pool of the file."""
    return {"name": "a", "replicas": [{"url": url} for url in urls or ("http://h:1",)]} | settings


# --- precedence


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(write) -> None:
    """Each layer overrides the one below and nothing else."""
    file = write({"server": {"port": 1, "host": "127.0.0.2", "workers": 5}})
    environ = {"CAIRN_PORT": "2", "CAIRN_HOST": "127.0.0.3"}
    assert load(None, {}).config.server.port == 8080
    assert load(file, {}).config.server.port == 1
    assert load(file, environ).config.server.port == 2
    config = load(file, environ, {("server", "port"): 3, ("server", "host"): None}).config
    assert (config.server.port, config.server.host, config.server.workers) == (3, "127.0.0.3", 5)


@pytest.mark.parametrize(
    ("name", "text", "path", "value"),
    [
        ("CAIRN_ADMIN_PORT", "7", ("admin", "port"), 7),
        ("CAIRN_WORKERS", "4", ("server", "workers"), 4),
        ("CAIRN_OPEN", "true", ("server", "open"), True),
        ("CAIRN_SERVER__DRAIN_SECONDS", "1.5", ("server", "drain_seconds"), 1.5),
        ("CAIRN_ROUTING__PREFILL_TOKENS_PER_SECOND", "0.1", ("routing", "prefill_tokens_per_second"), 0.1),
        ("CAIRN_LOG__LEVEL", "debug", ("log", "level"), "debug"),
        ("CAIRN_REDIS", "redis://:pw@h/0", ("redis", "url"), SecretUrl("redis://:pw@h/0")),
        ("CAIRN_ADMIN_TOKEN", "12345", ("admin", "token"), Secret("12345")),
        ("CAIRN_SERVER__ENGINE_PATHS", "/tokenize, /rerank", ("server", "engine_paths"), ("/tokenize", "/rerank")),
        ("CAIRN_SERVER__CORS_ORIGINS", "", ("server", "cors_origins"), ()),
        ("CAIRN_UPSTREAM__RETRY_STATUSES", "500,503", ("upstream", "retry_statuses"), (500, 503)),
    ],
)
def test_variables_set_what_they_name(name: str, text: str, path: tuple[str, str], value: object) -> None:
    """Short names, and CAIRN_SECTION__SETTING for every other setting of a section, lists included."""
    config = load(None, {name: text}).config
    assert getattr(getattr(config, path[0]), path[1]) == value


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"CAIRN_WORKERS": "many"}, "CAIRN_WORKERS: expected a whole number"),
        ({"CAIRN_WORKERS": "0"}, "CAIRN_WORKERS: expected a whole number >= 1"),
        ({"CAIRN_SERVER__PROT": "1"}, "CAIRN_SERVER__PROT: there is no such setting"),
        ({"CAIRN_POOLS__NAME": "1"}, "CAIRN_POOLS__NAME: there is no such setting$"),
        (
            {"CAIRN_SERVER__MAX_BODY_BYTES": "32mb"},
            "CAIRN_SERVER__MAX_BODY_BYTES: expected a number of bytes such as",
        ),
        ({"CAIRN_LOG__FORMAT": "xml"}, "CAIRN_LOG__FORMAT: expected one of json, logfmt"),
        (
            {"CAIRN_SERVER__ENGINE_PATHS": "/a,rerank"},
            "CAIRN_SERVER__ENGINE_PATHS: expected a path that begins with /",
        ),
        ({"CAIRN_UPSTREAM__RETRY_STATUSES": "5xx"}, "CAIRN_UPSTREAM__RETRY_STATUSES: expected a whole number"),
        ({"CAIRN_REDIS": ""}, "^CAIRN_REDIS: is empty; give it a value, or remove the variable$"),
        ({"CAIRN_WORKERS": " "}, "^CAIRN_WORKERS: is empty; give it a value, or remove the variable$"),
        (
            {"CAIRN_WORKERS": "1", "CAIRN_SERVER__WORKERS": "1"},
            "^CAIRN_WORKERS: CAIRN_SERVER__WORKERS is set too and means the same; set one of them only$",
        ),
        ({"CAIRN_LOG__LEVEL": "info", "CAIRN_log__level": "info"}, "^CAIRN_log__level: CAIRN_LOG__LEVEL is set too"),
    ],
)
def test_a_bad_variable_is_named(environ: dict[str, str], message: str) -> None:
    """The message tells the variable, not a place in a file that has nothing to do with it."""
    with pytest.raises(ConfigError, match=message):
        load(None, environ)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("CAIRN_UPSTREAMS", "; did you mean `CAIRN_UPSTREAM`?"),
        ("CAIRN_CLIENTS", "; `clients` is set in the file"),
        ("CAIRN_TENANCY", "; `tenancy` is set in the file"),
        ("CAIRN_SERVER_PORT", "; did you mean `CAIRN_SERVER__PORT`?"),
        ("CAIRN_TELEMETRY_ENDPOINT", "; did you mean `CAIRN_TELEMETRY__ENDPOINT`?"),
        ("CAIRN_SOMETHING", ""),
    ],
)
def test_an_unknown_variable_is_compared_without_what_all_have_in_common(name: str, near: str) -> None:
    """Otherwise every name is like every other."""
    assert f"{name} is not a setting and is ignored{near}" in load(None, {name: "x"}).warnings


def test_kubernetes_service_variables_configure_nothing() -> None:
    """A service named cairn puts CAIRN_PORT=tcp://... into every pod; a misspelt name is told."""
    environ = {
        "CAIRN_PORT": "tcp://10.0.0.1:80",
        "CAIRN_PORT_80_TCP_ADDR": "10.0.0.1",
        "CAIRN_SERVICE_HOST": "10.0.0.1",
        "CAIRN_WORKRES": "4",
        "XDG_DATA_HOME": "/d",
    }
    loaded = load(None, environ)
    assert loaded.config.server.port == 8080
    assert {warning.split()[0] for warning in loaded.warnings} == {"CAIRN_PORT", "CAIRN_WORKRES"}


def test_the_environment_may_name_the_file_and_the_upstreams(write) -> None:
    """CAIRN_CONFIG and CAIRN_UPSTREAM; the latter replaces the file's pools, a flag replaces both."""
    file = write({"pools": [pool("http://from-file:1")]})
    environ = {"CAIRN_CONFIG": str(file)}
    assert load(None, environ).config.pools[0].name == "a"
    environ["CAIRN_UPSTREAM"] = "http://x:1/v1, http://y:2"
    (default,) = load(None, environ).config.pools
    assert (default.name, default.default, default.models) == ("default", True, ("*",))
    assert [replica.name for replica in default.replicas] == ["x:1", "y:2"]
    assert load(None, environ, upstreams=["http://z:3"]).config.pools[0].replicas[0].url == "http://z:3"


# --- errors with paths


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sever": {}}, r"\$\.sever: there is no such setting"),
        ({"server": {"port": "8080"}}, r"\$\.server\.port: expected a whole number, got text; remove the quotes"),
        ({"server": {"port": 70000}}, r"\$\.server\.port: expected a whole number <= 65535"),
        ({"pools": [pool(), {"name": "b"}]}, r"\$\.pools\[1\]: the setting `replicas` is missing"),
        ({"pools": [{"name": "a", "replicas": []}]}, r"\$\.pools\[0\]\.replicas: "),
        (
            {"pools": [{"name": "a", "replicas": [{"url": "http://h"}, {"url": 5}]}]},
            r"\$\.pools\[0\]\.replicas\[1\]\.url: expected text, got a whole number",
        ),
        ({"pools": [pool("http://h:1", "ftp://h")]}, r"\$\.pools\[0\]\.replicas\[1\]\.url: expected http"),
        ({"pools": [pool("http://")]}, r"\$\.pools\[0\]\.replicas\[0\]\.url: expected a host"),
        ({"pools": [pool("http://h:0")]}, r"replicas\[0\]\.url: port 0"),
        ({"pools": [pool("http://h:99999")]}, r"replicas\[0\]\.url: is not a URL"),
        ({"pools": [pool("http://[::1")]}, r"replicas\[0\]\.url: is not a URL"),
        ({"pools": [pool("http://h/v1?key=x")]}, r"replicas\[0\]\.url: has a query"),
        ({"pools": [pool("http://h\r\nx: y/")]}, r"replicas\[0\]\.url: "),
        ({"pools": [pool("http://h:1", "http://h:1/v1")]}, r"\$\.pools\[0\]\.replicas\[1\]\.name: .*replicas\[0\]"),
        ({"pools": [pool(), pool("http://i")]}, r"\$\.pools\[1\]\.name: \$\.pools\[0\] already has the name a"),
        (
            {"pools": [pool(default=True), pool("http://i", name="b", default=True)]},
            r"\$\.pools\[1\]\.default: \$\.pools\[0\] is the default",
        ),
        ({"pools": [pool(models=["ok", " x"])]}, r"\$\.pools\[0\]\.models\[1\]: "),
        ({"pools": [pool(models=[""])]}, r"\$\.pools\[0\]\.models\[0\]: "),
        ({"pools": [pool(kind="magic")]}, r"\$\.pools\[0\]\.kind: "),
        (
            {"pools": [{"name": "a", "kind": "provider", "replicas": [{"url": "http://h", "capacity_tokens": 9}]}]},
            r"\$\.pools\[0\]\.replicas\[0\]\.capacity_tokens: ",
        ),
        (
            {"pools": [{"name": "a", "replicas": [{"url": "http://h", "ranks": 2}, {"url": "http://h/rank-1"}]}]},
            r"\$\.pools\[0\]\.replicas\[1\]\.name: \$\.pools\[0\]\.replicas\[0\] has the name h/rank-1 too",
        ),
        ({"clients": [{"name": "other", "key_sha256": SHA}]}, r"\$\.clients\[0\]\.name: is what metrics call"),
        ({"clients": [{"name": "c", "key_sha256": "zz"}]}, r"\$\.clients\[0\]\.key_sha256: "),
        (
            {"clients": [{"name": "c", "key_sha256": SHA}, {"name": "d", "key_sha256": SHA.upper()}]},
            r"\$\.clients\[1\]\.key_sha256: \$\.clients\[0\] already has the same key",
        ),
        ({"admin": {"host": "0.0.0.0"}}, r"\$\.admin\.host: .*token"),
        ({"server": {"port": 8090}}, r"\$\.admin\.port: 8090 is also the port of the server"),
        ({"redis": {"url": "http://h"}}, r"\$\.redis\.url: expected redis://"),
        ({"redis": {"url": 5}}, r"\$\.redis\.url: expected text"),
        ([1], r"\$: expected a mapping"),
        ({"server": None}, r"\$\.server: expected a mapping"),
    ],
)
def test_what_is_wrong_is_named_by_its_path(write, tree: object, message: str) -> None:
    """The path is that of the offending setting, in the message and in `param`."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(write(tree), {})
    assert caught.value.param is not None
    assert caught.value.param.startswith("$")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("path", settings.paths())
def test_no_number_is_larger_than_what_uses_it_can_bear(path: str, tmp_path: Path) -> None:
    """A worker could not be sent a larger whole number, and costs with an infinite one cannot be compared."""
    kinds = settings.kinds(path)
    for kind, value in ((int, 2**64), (float, math.inf), (float, 1e300)):
        if kind in kinds:
            with pytest.raises(ConfigError, match=r"expected (a (whole )?number <=|one)"):
                settings.changed(path, tmp_path, value)


def test_all_problems_are_reported_at_once(write) -> None:
    """Each with its path, in the order of the file; what is expected is said without the rest of the file."""
    tree = {
        "server": {"port": "8080", "hots": "x"},
        "pools": [{"name": "a", "replica": []}, {"name": "b", "kind": "engin", "replicas": [{"url": 5, "nam": "x"}]}],
        "log": {"level": "loud"},
        "sever": {},
    }
    with pytest.raises(ConfigError) as caught:
        load(write(tree), {"CAIRN_SERVER__WORKRES": "1"})
    assert sorted(f"{path}: {text}" for path, text in caught.value.problems) == sorted(
        [
            "$.server.port: expected a whole number, got text; remove the quotes",
            "$.server.hots: there is no such setting; did you mean `host`?",
            "$.pools[0].replica: there is no such setting; did you mean `replicas`?",
            "$.pools[0]: the setting `replicas` is missing",
            "$.pools[1].kind: expected one of engine, provider; did you mean `engine`?",
            "$.pools[1].replicas[0].url: expected text, got a whole number; put it in quotes",
            "$.pools[1].replicas[0].nam: there is no such setting; did you mean `name`?",
            "$.log.level: expected one of debug, info, warning, error",
            "$.sever: there is no such setting; did you mean `server`?",
            "CAIRN_SERVER__WORKRES: there is no such setting; did you mean `CAIRN_SERVER__WORKERS`?",
        ]
    )


def test_all_contradictions_are_reported_at_once(write) -> None:
    """Of a file whose settings have the right types."""
    tree = {
        "server": {"port": 8090},
        "admin": {"host": "0.0.0.0"},
        "pools": [pool("ftp://h"), {"name": "a", "replicas": [{"url": "http://h:0", "key_env": "NONE"}]}],
    }
    with pytest.raises(ConfigError) as caught:
        load(write(tree), {})
    assert {path for path, _ in caught.value.problems} == {
        "$.admin.host",
        "$.admin.port",
        "$.pools[0].replicas[0].url",
        "$.pools[1].name",
        "$.pools[1].replicas[0].key_env",
        "$.pools[1].replicas[0].url",
    }


@pytest.mark.parametrize(
    ("text", "size"),
    [(4096, 4096), ("32MB", 32_000_000), ("32MiB", 32 << 20), ("1.5 GiB", 3 << 29), ("64kB", 64_000)],
)
def test_sizes_may_have_a_unit(write, text: object, size: int) -> None:
    """In a file and in a variable."""
    assert load(write({"server": {"max_body_bytes": text}}), {}).config.server.max_body_bytes == size
    assert load(None, {"CAIRN_SERVER__MAX_BODY_BYTES": str(text)}).config.server.max_body_bytes == size


@pytest.mark.parametrize("text", ["much", "32", "-1MB", "32 MB/s"])
def test_a_size_that_is_none_is_refused(write, text: str) -> None:
    """With the forms that are valid."""
    with pytest.raises(ConfigError, match=r"\$\.server\.max_body_bytes: expected a number of bytes such as"):
        load(write({"server": {"max_body_bytes": text}}), {})


def test_a_size_out_of_bounds_is_refused(write) -> None:
    """With a unit as without."""
    with pytest.raises(ConfigError, match=r"\$\.contexts\.max_context_bytes: expected a whole number <= "):
        load(write({"contexts": {"max_context_bytes": "1GiB"}}), {})


def test_a_former_setting_is_ignored_with_a_warning(write) -> None:
    """A file of an older version still starts Cairn."""
    loaded = load(
        write({"server": {"request_seconds": 5, "port": 1}}),
        {"CAIRN_SERVER__REQUEST_SECONDS": "5", "XDG_DATA_HOME": "/d"},
    )
    assert loaded.config.server.port == 1
    assert [warning.partition(": ")[0] for warning in loaded.warnings] == [
        "$.server.request_seconds is ignored",
        "CAIRN_SERVER__REQUEST_SECONDS is ignored",
    ]


def test_a_password_in_a_url_is_refused_without_showing_it(write) -> None:
    """The key belongs into the environment or a file, and the error must not repeat it."""
    with pytest.raises(ConfigError, match="user or password") as caught:
        load(write({"pools": [pool("https://u:hunter2@h")]}), {})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {port: 1}\nserver: {port: 2}\n", r"'server' is given twice \(line 2, column 1\)"),
        ("server: [", "is not YAML"),
        ("host: a\x00b", "is not YAML: it contains the control character 0x00"),
        ("key: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("a: " + "[" * 1000, "is not YAML|nested too deep"),
    ],
)
def test_what_is_not_yaml_is_said_in_one_line(write, text: str, message: str) -> None:
    """It names the problem and its place, without a piece of the file, which may contain a key."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(write(text), {})
    assert "\n" not in caught.value.message


def test_a_broken_file_does_not_show_what_stands_in_it(write) -> None:
    """YAML's own error has the offending line; ours does not."""
    with pytest.raises(ConfigError) as caught:
        load(write("key: sk-very-secret: [\n"), {})
    assert "very-secret" not in caught.value.message


def test_of_very_many_mistakes_the_first_are_shown_and_the_others_counted(write) -> None:
    """Each line may have the same one, and the message of a reload is one line of the log."""
    clients = [{"name": f"c{number}", "key_sha265": "x"} for number in range(4_000)]
    with pytest.raises(ConfigError) as caught:
        load(write({"clients": clients}), {})
    assert len(caught.value.message) < 2_500
    assert caught.value.message.endswith("; and 7,980 more problems")
    assert len(caught.value.problems) == len(caught.value.lines) - 1 == 20


@pytest.mark.parametrize("text", ["? {0}\n: 1\n", "? {0}\n: 1\n? {0}\n: 2\n", "a: *{0}\n"])
def test_a_name_of_any_length_is_shown_in_part(write, text: str) -> None:
    """A file that is no configuration may have a megabyte without a space."""
    with pytest.raises(ConfigError) as caught:
        load(write(text.format("x" * 500_000)), {})
    assert len(caught.value.message) < 2_500


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    """So is one that is not text."""
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        load(tmp_path / "none.yaml", {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary", {})


def test_an_empty_file_is_the_default(write) -> None:
    """All settings have defaults."""
    assert load(write(""), {"HOME": "/h"}) == load(None, {"HOME": "/h"})


# --- keys


def test_keys_come_from_the_environment_or_a_file_beside_the_configuration(write, tmp_path: Path) -> None:
    """Resolved once; a relative file is beside the configuration; the end of the line is no part of the key."""
    (tmp_path / "key").write_text("from-file\n")
    replicas = [{"url": "http://a", "key_env": "K"}, {"url": "http://b", "key_file": "key"}, {"url": "http://c"}]
    config = load(write({"pools": [{"name": "p", "replicas": replicas}]}), {"K": "from-env"}).config
    keys = [replica.key and replica.key.reveal() for replica in config.pools[0].replicas]
    assert keys == ["from-env", "from-file", None]
    assert config.has_replica_keys


@pytest.mark.parametrize(
    ("replica", "message"),
    [
        ({"key_env": "NONE"}, r"replicas\[0\]\.key_env: the environment has no variable NONE"),
        ({"key_env": "EMPTY"}, r"replicas\[0\]\.key_env: is empty"),
        ({"key_env": "SPLIT"}, r"replicas\[0\]\.key_env: is empty or contains control characters"),
        ({"key_file": "none"}, r"replicas\[0\]\.key_file: cannot read .*none"),
        ({"key": "x", "key_env": "K"}, r"replicas\[0\]\.key_env: key is set too"),
    ],
)
def test_a_key_that_is_not_there_is_an_error(write, replica: dict, message: str) -> None:
    """Nothing starts with a key missing or one that would break a header."""
    tree = {"pools": [{"name": "p", "replicas": [{"url": "http://a"} | replica]}]}
    with pytest.raises(ConfigError, match=message):
        load(write(tree), {"EMPTY": "", "SPLIT": "a\r\nb", "K": "k"})


SECRET_TEXT = "sk_live-Aa0123456789abcdefghij0123456789"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"pools": [{"name": "p", "replicas": [{"url": "http://a", "key_env": SECRET_TEXT}]}]},
            r"key_env: the environment has no variable of this name; the key itself belongs in `key`",
        ),
        (
            {"pools": [{"name": "p", "replicas": [{"url": "http://a", "key_file": SECRET_TEXT}]}]},
            r"key_file: cannot read the file: No such file or directory; the key itself belongs in `key`",
        ),
        ({"admin": {"token_env": SECRET_TEXT}}, r"token_env: the environment has no variable of this name"),
        ({"admin": {"token_file": SECRET_TEXT}}, r"token_file: cannot read the file"),
        ({"redis": {"url_env": f"redis://:{SECRET_TEXT}@h"}}, r"url_env: the environment has no variable of this"),
        ({"redis": {"url_file": f"redis://:{SECRET_TEXT}@h"}}, r"url_file: cannot read the file"),
        ({"tenants": {"secret_env": SECRET_TEXT}}, r"secret_env: the environment has no variable of this name"),
    ],
)
def test_a_secret_in_place_of_its_variable_or_file_is_not_shown(write, tree: dict, message: str) -> None:
    """It is the likeliest mistake in these settings, and the message of a reload is in the log."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(write(tree), {})
    assert SECRET_TEXT not in str(caught.value)


@pytest.mark.parametrize("text", ["Bearer sk-1", "bearer sk-1"])
def test_a_key_with_the_scheme_of_its_header_is_refused(write, text: str) -> None:
    """The replica would get `Bearer Bearer`."""
    replica = {"url": "http://a", "key_env": "KEY"}
    tree = {"admin": {"token": text}, "pools": [{"name": "p", "replicas": [replica]}]}
    with pytest.raises(ConfigError) as caught:
        load(write(tree), {"KEY": text})
    assert [path for path, problem in caught.value.problems if "begins with Bearer" in problem] == [
        "$.admin.token",
        "$.pools[0].replicas[0].key_env",
    ]
    assert "sk-1" not in str(caught.value)


def test_replica_keys_are_not_lent_to_the_world(write) -> None:
    """With keys of ours only loopback, unless clients are listed or --open says that it is meant."""
    tree: dict[str, Any] = {
        "server": {"host": "0.0.0.0"},
        "pools": [{"name": "p", "replicas": [{"url": "http://a", "key": "k"}]}],
    }
    with pytest.raises(ConfigError, match=r"\$\.server\.host: .*--open"):
        load(write(tree), {})
    assert load(write(tree), {}, {("server", "open"): True}).config.server.open
    assert load(write(tree), {}, {("server", "host"): "::1"}).config
    assert load(write(tree | {"clients": [{"name": "c", "key_sha256": SHA}]}), {}).config
    del tree["pools"][0]["replicas"][0]["key"]
    assert load(write(tree), {}).config


def test_an_admin_port_for_the_world_needs_a_token(write) -> None:
    """The token may come from the environment as well."""
    tree = {"admin": {"host": "::", "token_env": "T"}}
    assert load(write(tree), {"T": "t"}).config.admin.token == Secret("t")


def test_a_workers_environment_holds_no_secret_and_no_setting(write) -> None:
    """Settings from the supervisor's variables reach a worker only through its socket."""
    config = load(write({"pools": [pool()], "admin": {"token_env": "T"}}), {"T": "t"}).config
    environ = {"T": "t", "CAIRN_REDIS": "redis://:pw@h", "PATH": "/bin"}
    assert worker_environment(config, environ) == {"PATH": "/bin"}


# --- secrets


SECRETS = [Secret("hunter2"), SecretUrl("redis://user:hunter2@h:1/0?password=hunter2&db=1")]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_shows_itself_nowhere(secret: Secret) -> None:
    """str, repr, format, containers, encoders, pickle."""
    shown = [
        str(secret),
        repr(secret),
        f"{secret}",
        f"{[secret]}",
        repr(Config),
        str(msgspec.to_builtins(secret, enc_hook=redact)),
    ]
    assert not any("hunter2" in text for text in shown)
    with pytest.raises((NotImplementedError, TypeError)):
        json.dumps(secret)
    with pytest.raises((NotImplementedError, TypeError)):
        msgspec.json.encode(secret)
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.copy(secret)


def test_a_secret_url_shows_its_host() -> None:
    """A reader of the effective configuration must see where Redis is."""
    assert str(SECRETS[1]) == "redis://***@h:1/0?password=***&db=1"
    assert str(SecretUrl("unix:///run/valkey.sock")) == "unix:///run/valkey.sock"


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://:hunter2@h,h2:1/m?sentinel_password=hunter2&sentinel_username=hunter2",
        "rediss://h?ssl_password=hunter2&PASSWORD=hunter2&pass%77ord=hunter2&hunter2",
        "redis://:#hunter2@h/0",
        "redis://:x/hunter2@h/0",
        "redis://:x?hunter2@h",
        "redis://:hunter2@x@h",
        "redis://h/0?password=x@hunter2",
        "redis://h#hunter2",
        "unix://user:hunter2@/run/x.sock",
        "hunter2:x@h",
        "hunter2",
    ],
)
def test_no_part_of_a_password_is_shown_however_a_url_is_written(url: str) -> None:
    """Neither in the effective configuration nor in the error about a URL that cannot be read."""
    assert "hunter2" not in str(SecretUrl(url))
    message = ""
    try:
        load(None, {"CAIRN_REDIS": url, "XDG_DATA_HOME": "/d"})
    except ConfigError as error:
        message = error.message
    assert "hunter2" not in message


def test_options_that_hold_no_secret_are_shown() -> None:
    """And where Redis is."""
    url = "rediss+sentinel://:pw@h,h2:1/m/2?ssl_cert_reqs=none&db=1"
    assert str(SecretUrl(url)) == "rediss+sentinel://***@h,h2:1/m/2?ssl_cert_reqs=none&db=1"


@given(st.text(min_size=1))
def test_no_url_makes_redaction_fail(text: str) -> None:
    """Showing any text as a URL raises nothing."""
    str(SecretUrl(text))


def test_the_effective_configuration_is_whole_and_redacted(write) -> None:
    """It can be read again to the same configuration but for its secrets, and shows every default."""
    tree = {
        "redis": {"url": "redis://:hunter2@h"},
        "admin": {"token": "hunter2"},
        "pools": [{"name": "p", "replicas": [{"url": "http://a", "key": "hunter2"}]}],
        "clients": [{"name": "c", "key_sha256": SHA}],
    }
    loaded = load(write(tree), {})
    text = as_yaml(loaded.config)
    assert "hunter2" not in text
    shown = yaml.safe_load(text)
    assert set(shown) == set(Config.__struct_fields__)
    assert shown["pools"][0]["replicas"][0] | {"key": "***", "name": "a"} == shown["pools"][0]["replicas"][0]
    again = msgspec.convert(shown, Config, dec_hook=make_secret)
    assert again.server == loaded.config.server
    assert again.clients == loaded.config.clients


@pytest.mark.parametrize(
    "replica",
    [
        {"url": "http://a", "key": "k"},
        {"url": "http://[::1]:8000/v1"},
        {"url": "http://[fe80::1%25eth0]:8000"},
        {"url": "http://h/~user/v1"},
        {"url": f"http://h/{'a' * 200}"},
        {"url": f"http://{'h' * 60}.{'h' * 60}.{'h' * 60}"},
        {"url": "dns+http://h.:1/a%20b"},
        {"url": "kubernetes+http://vllm.models:http/a(b)/v1"},
        {"url": "kubernetes+http://*.models:8000", "selector": "app=vllm"},
    ],
    ids=lambda replica: replica["url"][:40],
)
def test_a_configuration_survives_the_way_to_a_worker(write, replica: dict) -> None:
    """Encoded with its secrets and decoded, it is the same, with the names that are derived from URLs."""
    tree = {
        "pools": [{"name": "p", "replicas": [replica]}],
        "redis": {"url": "redis://h"},
        "clients": [{"name": "c", "key_sha256": "a" * 64}],
    }
    config = load(write(tree), {}).config
    encoded = msgspec.msgpack.Encoder(enc_hook=reveal).encode(config)
    assert msgspec.msgpack.Decoder(Config, dec_hook=make_secret).decode(encoded) == config


@given(st.sampled_from(["http", "https", "dns+http"]), st.text(st.characters(codec="ascii"), max_size=300))
def test_every_url_that_is_accepted_gives_a_name_that_a_worker_accepts(scheme: str, rest: str) -> None:
    """Otherwise every worker would end as it starts, or upon a reload."""
    try:
        config = load(None, {}, None, [f"{scheme}://{rest}"]).config
    except ConfigError:
        return
    encoded = msgspec.msgpack.Encoder(enc_hook=reveal).encode(config)
    assert msgspec.msgpack.Decoder(Config, dec_hook=make_secret).decode(encoded) == config


@pytest.mark.parametrize(
    "host", ["a,http://b", "a,b", "<host>:8000", "{host}", "$HOST:8000", "h*", "-h", "..", "a..b", "h'", 'h"']
)
def test_a_url_without_one_host_is_refused(write, host: str) -> None:
    """A list of URLs, or the placeholder of an example, is the likeliest of these."""
    with pytest.raises(ConfigError, match=r"replicas\[0\]\.url: expected one host"):
        load(write({"pools": [{"name": "p", "replicas": [{"url": f"http://{host}"}]}]}), {})


# --- what is derived


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://api.openai.com/v1", PoolKind.PROVIDER),
        ("https://8.8.8.8", PoolKind.PROVIDER),
        ("http://api.openai.com", PoolKind.ENGINE),
        ("https://10.0.0.1", PoolKind.ENGINE),
        ("https://vllm", PoolKind.ENGINE),
        ("https://vllm.models.svc", PoolKind.ENGINE),
        ("https://[::1]:8000", PoolKind.ENGINE),
        ("nonsense", PoolKind.ENGINE),
        ("http://[", PoolKind.ENGINE),
    ],
)
def test_a_bare_url_is_a_provider_only_behind_https_and_a_public_name(url: str, kind: PoolKind) -> None:
    """The mistake that remains errs on the side of sharing less."""
    assert implied_kind(url) is kind


def test_engines_and_providers_are_not_one_pool() -> None:
    """Bare URLs of both kinds need a file."""
    with pytest.raises(ConfigError, match="separate pools"):
        load(None, {}, upstreams=["http://h", "https://api.openai.com"])


def test_tenancy_is_the_pools_else_the_common_one_and_isolated_where_clients_pay_a_provider(write) -> None:
    """A prefix that one client pays for at a provider is never shared with another."""
    tree = {
        "tenancy": "isolated",
        "pools": [
            pool("http://a"),
            pool("http://b", name="b", tenancy="shared"),
            pool("http://c", name="c", kind="provider", tenancy="shared"),
            {"name": "d", "kind": "provider", "tenancy": "shared", "replicas": [{"url": "http://d", "key": "k"}]},
        ],
    }
    config = load(write(tree), {}).config
    isolated, shared = Tenancy.ISOLATED, Tenancy.SHARED
    assert [p.tenancy for p in config.pools] == [isolated, shared, isolated, shared]


def test_the_default_pool_is_the_marked_or_the_only_one(write) -> None:
    """Of several unmarked ones none is."""
    only = load(write({"pools": [pool()]}), {}).config
    assert only.default_pool is only.pools[0]
    assert load(write({"pools": [pool(), pool("http://i", name="b")]}), {}).config.default_pool is None
    marked = load(write({"pools": [pool(), pool("http://i", name="b", default=True)]}), {}).config
    assert marked.default_pool is marked.pools[1]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://10.0.0.7:8000/v1", "10.0.0.7:8000"),
        ("http://10.0.0.7:8000/", "10.0.0.7:8000"),
        ("https://api.openai.com/v1", "api.openai.com"),
        ("http://[::1]:9/api", "[::1]:9/api"),
        ("https://h/v1beta/openai", "h/v1beta/openai"),
        ("https://h/api/paas/v4", "h/api/paas/v4"),
    ],
)
def test_the_name_follows_from_the_url(url: str, name: str) -> None:
    """Host and port without a default port, and the path without /v1."""
    assert derived_name(url) == name


def test_loopback_is_known_by_name_and_address() -> None:
    """An address that others can reach is not."""
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", ""]))


@pytest.mark.parametrize(
    ("replica", "message"),
    [
        ({"url": "kubernetes+http://a.b:"}, "expected kubernetes.http://service.namespace:port"),
        ({"url": "kubernetes+http://a.b.c:80"}, "expected kubernetes.http://service.namespace:port"),
        ({"url": "kubernetes+http://user:pw@a.b:80"}, "expected kubernetes.http://service.namespace:port"),
        ({"url": "kubernetes+https://a.b:443"}, "expected http://, https://"),
        ({"url": "kubernetes+http://*.b:80"}, "set selector to the labels"),
        ({"url": "kubernetes+http://a.b:70000"}, "a port from 1 to 65535"),
        ({"url": "http://a", "selector": "app=a"}, "selector: is for a url of kubernetes"),
    ],
)
def test_a_service_that_cannot_be_followed_is_refused(write, replica: dict[str, str], message: str) -> None:
    """The error says which form is expected."""
    with pytest.raises(ConfigError, match=message):
        load(write({"pools": [{"name": "p", "replicas": [replica]}]}), {})


def test_a_pod_knows_its_api_server() -> None:
    """From the environment that every pod has; elsewhere a warning says what to set."""
    service = ("kubernetes+http://vllm.models:http",)
    pod = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443", "XDG_DATA_HOME": "/d"}
    inside = load(None, pod, None, service)
    assert inside.config.kubernetes.api_url == "https://[fd00::1]:6443"
    assert inside.config.kubernetes.token_file == "/var/run/secrets/kubernetes.io/serviceaccount/token"
    assert inside.config.kubernetes.ca_file == "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
    assert inside.warnings == ()
    assert "kubernetes.api_url is needed" in load(None, {}, None, service).warnings[0]
    own = load(None, {"KUBERNETES_SERVICE_HOST": "h", "CAIRN_KUBERNETES__API_URL": "http://127.0.0.1:8001"}).config
    assert (own.kubernetes.api_url, own.kubernetes.token_file) == ("http://127.0.0.1:8001", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"endpoint": "grpc://h:4317"}, r"\$\.telemetry\.endpoint: expected http:// or https://"),
        ({"endpoint": "http://me:pw@h:4318"}, r"give the token in token_env or token_file"),
        ({"endpoint": "http://h:4318", "token_env": "NONE"}, "the environment has no variable NONE"),
        ({"sample_ratio": 50}, r"\$\.telemetry\.sample_ratio"),
    ],
)
def test_where_traces_go_is_checked(write, settings: dict[str, object], message: str) -> None:
    """Each mistake names its setting and what is expected there."""
    with pytest.raises(ConfigError, match=message):
        load(write({"telemetry": settings}), {})


def test_the_collectors_token_is_read_like_every_secret(write) -> None:
    """It comes from a variable, and the log redacts it."""
    file = write({"telemetry": {"endpoint": "http://h:4318", "token_env": "TOKEN"}})
    config = load(file, {"TOKEN": "hunter2"}).config
    assert config.telemetry.token == Secret("hunter2")
    assert "hunter2" in secrets_of(config)
    assert "hunter2" not in as_yaml(config)


def test_traces_without_their_packages_name_the_extra(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is there when the configuration is checked, not when a worker starts."""
    monkeypatch.setattr("proxy.config.load.find_spec", not_found)
    with pytest.raises(ConfigError, match=r"pip install 'cairn-proxy\[otel\]'"):
        load(write({"telemetry": {"endpoint": "http://h:4318"}}), {})
    assert load(write({}), {}).config.telemetry.endpoint is None


def not_found(name: str) -> None:
    """As find_spec, if the package around a module is not there."""
    raise ModuleNotFoundError(name)


def test_a_loaded_configuration_is_frozen() -> None:
    """Nobody changes it on the way."""
    loaded: Loaded = load(None, {})
    with pytest.raises(AttributeError):
        loaded.config.server.port = 1  # type: ignore[misc]


def test_a_pool_that_no_request_reaches_is_told(write) -> None:
    """The first pool that matches is used, and a pool without `models` matches all of them."""

    def warnings(*pools: dict[str, object]) -> list[str]:
        tree = [pool | {"replicas": [{"url": f"http://h:{n + 1}"}]} for n, pool in enumerate(pools)]
        return [each for each in load(write({"pools": tree}), {}).warnings if "no request reaches" in each]

    assert [each.split()[0] for each in warnings({"name": "a"}, {"name": "b"})] == ["$.pools[1].models:"]
    narrow: list[dict[str, object]] = [{"name": "a", "models": ["gpt-*"]}, {"name": "b", "models": ["o1"]}]
    assert warnings(*narrow, {"name": "c", "models": ["gpt-4", "o1"]}) == [
        "$.pools[2].models: no request reaches this pool: its models match $.pools[0] and $.pools[1] before it; "
        "put it before them, or narrow their models"
    ]
    assert not warnings({"name": "a"}, {"name": "b", "default": True}), "requests without a model reach it"
    assert not warnings({"name": "a", "models": ["gpt-?"]}, {"name": "b", "models": ["gpt-*"]})
    assert not warnings({"name": "a", "models": ["gpt-4*"]}, {"name": "b", "models": ["gpt-*"]}, {"name": "c"})


# --- what only shows when it is used


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            {"upstream": {"ca_file": "/no/such.pem"}},
            r"\$\.upstream\.ca_file: cannot read /no/such\.pem: No such file",
        ),
        ({"upstream": {"ca_file": __file__}}, r"\$\.upstream\.ca_file: .* contains no certificate"),
        ({"kubernetes": {"ca_file": "/no/such.pem"}}, r"\$\.kubernetes\.ca_file: cannot read"),
        (
            {"redis": {"url": "redis://h:99999"}},
            r"\$\.redis\.url: the URL of Redis cannot be read: check host and port",
        ),
        ({"redis": {"url": "redis://h/x"}}, r"\$\.redis\.url: the database in the URL of Redis is not a number"),
        ({"redis": {"url": "redis+sentinel://"}}, r"\$\.redis\.url: the URL of Redis names an empty host"),
        ({"redis": {"url": "redis://h?timeout=5"}}, r"\$\.redis\.url: .* unknown option, timeout"),
    ],
)
def test_what_would_fail_in_every_worker_is_refused_before_one_starts(write, section: dict, says: str) -> None:
    """Workers would end again and again, or answer each request with an error."""
    with pytest.raises(ConfigError, match=says):
        load(write(section), {})


def test_what_is_known_of_a_type_is_not_found_again_for_each_of_a_thousand_replicas() -> None:
    """That took three quarters of the time of a start and of a reload."""

    def cost(number: int) -> int:
        tree = {"pools": [{"name": "p", "replicas": [{"url": f"http://r{each}:9"} for each in range(number)]}]}
        return operations(lambda: list(problems(tree)))

    cost(1)
    assert cost(101) - cost(1) < 100 * 1_000

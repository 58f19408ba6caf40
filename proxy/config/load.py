"""From file, environment and flags to one frozen `Config`, or to an error that names the path of what is wrong.

A flag beats the environment, which beats the file, which beats the default. Everything is read, resolved and
checked once, so that nothing starts on a configuration that cannot work. This is the only module that reads the
environment. The shape itself is `proxy.config.schema`, whose names are offered here too.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import yaml

from proxy.config.checks import implied_kind, problems
from proxy.config.schema import (
    Admin,
    Client,
    Config,
    Log,
    Pool,
    PoolKind,
    Price,
    PriceTier,
    Queueing,
    Redis,
    Replica,
    Routing,
    Secret,
    SecretUrl,
    Section,
    Server,
    Tenancy,
    Tenants,
    Upstream,
    make_secret,
    redact,
    reveal,
)
from proxy.errors import ConfigError

__all__ = [
    "Admin", "Client", "Config", "ConfigError", "Loaded", "Log", "Pool", "PoolKind", "Price", "PriceTier", "Queueing",
    "Redis", "Replica", "Routing",
    "Secret", "SecretUrl", "Server", "Tenancy", "Tenants", "Upstream", "as_yaml", "load", "process_environment",
    "worker_environment",
]  # fmt: skip

_FILE_BYTES_AT_MOST = 4 * 1024 * 1024  # a configuration is read whole
_KEY_BYTES_AT_MOST = 64 * 1024
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")
_MESSAGE_WITH_PATH = re.compile(r"(?P<text>.*) - at `(?:key` in `)?(?P<path>\$[^`]*)`", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")

_SHORT_NAMES = {
    "CAIRN_HOST": ("server", "host"),
    "CAIRN_PORT": ("server", "port"),
    "CAIRN_WORKERS": ("server", "workers"),
    "CAIRN_OPEN": ("server", "open"),
    "CAIRN_ADMIN_HOST": ("admin", "host"),
    "CAIRN_ADMIN_PORT": ("admin", "port"),
    "CAIRN_ADMIN_TOKEN": ("admin", "token"),
    "CAIRN_REDIS": ("redis", "url"),
    "CAIRN_LOG_LEVEL": ("log", "level"),
}
_ELSEWHERE = frozenset({"CAIRN_CONFIG", "CAIRN_UPSTREAM"})
# a Kubernetes service named `cairn` puts these into every pod beside it, CAIRN_PORT=tcp://10.0.0.1:80 included
_KUBERNETES_NAME = re.compile(r"CAIRN_(SERVICE_(HOST|PORT)|PORT_\d).*")

_Any = TypeVar("_Any", bound=msgspec.Struct)


class Loaded(msgspec.Struct, frozen=True):
    """A configuration that can be served, and what a person should hear about it."""

    config: Config
    warnings: tuple[str, ...] = ()


def process_environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)  # noqa: TID251 - the one place


def load(
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[tuple[str, str], object] | None = None,
    upstreams: Sequence[str] = (),
) -> Loaded:
    """Read the configuration.

    Args:
        file: the YAML file, or None; then `CAIRN_CONFIG` may name one.
        environ: the environment, usually of `process_environment`.
        flags: values by (section, field), of the right types already.
        upstreams: URLs that stand in place of the file's pools, as `CAIRN_UPSTREAM` does.

    Raises:
        ConfigError: with the path of the offending setting in `param` and in the message.
    """
    if file is None and environ.get("CAIRN_CONFIG"):
        file = Path(environ["CAIRN_CONFIG"])
    tree = _read_file(file) if file is not None else {}
    overrides, warnings = _from_environment(environ)
    overrides.update({path: value for path, value in (flags or {}).items() if value is not None})
    _typed(tree, Config)  # the file by itself, so that nothing wrong in it is hidden by what overrides it
    upstreams = upstreams or [url for url in re.split(r"[,\s]+", environ.get("CAIRN_UPSTREAM", "")) if url]
    if upstreams:
        tree["pools"] = _pools_of(upstreams)
    for (section, field), value in overrides.items():
        tree.setdefault(section, {})[field] = msgspec.to_builtins(value, enc_hook=reveal)
    config = _typed(tree, Config)
    folder = file.parent if file is not None else Path()
    config = _resolved(config, environ, folder)
    for path, text in problems(config):
        _fail(path, text)
    return Loaded(config, tuple(warnings))


def as_yaml(config: Config) -> str:
    """The whole configuration as YAML, defaults included, secrets as `***`."""
    tree = msgspec.to_builtins(config, enc_hook=redact)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def worker_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what configures Cairn and without the variables that hold secrets."""
    secret_names = {value for _, section in _secret_holders(config) for _, value in _names_of_variables(section)}
    return {k: v for k, v in environ.items() if not k.startswith("CAIRN_") and k not in secret_names}


def _fail(path: str, text: str) -> NoReturn:
    raise ConfigError(f"{path}: {text}", param=path)


# --- the file


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key given twice; by itself it would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen and isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


def _read_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = stream.read(_FILE_BYTES_AT_MOST + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or type(error).__name__}") from None
    if len(content) > _FILE_BYTES_AT_MOST:
        raise ConfigError(f"{file} is larger than {_FILE_BYTES_AT_MOST} bytes")
    try:
        tree = yaml.load(content.decode(), Loader=_Loader)  # noqa: S506 - a subclass of the safe loader
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{file} is not YAML: {_yaml_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{file} is nested too deep") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        _fail("$", "expected a mapping of settings")
    return tree


def _yaml_problem(error: Exception) -> str:
    """What and where, without the snippet of the file that YAML's own text has: it may show a secret."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or type(error).__name__
    return f"{what} (line {mark.line + 1}, column {mark.column + 1})" if mark else str(what)


def _typed(tree: Any, kind: type[_Any]) -> _Any:
    try:
        return msgspec.convert(tree, kind, dec_hook=make_secret)
    except msgspec.ValidationError as error:
        _fail(*_path_and_text(str(error)))


def _path_and_text(message: str) -> tuple[str, str]:
    """Split msgspec's message; the name of an unknown field is made part of the path."""
    match = _MESSAGE_WITH_PATH.fullmatch(message)
    path, text = (match["path"], match["text"]) if match else ("$", message)
    if unknown := _UNKNOWN_FIELD.fullmatch(text):
        return f"{path}.{unknown['name']}", "there is no such setting"
    return path, text[:1].lower() + text[1:]


def _pools_of(upstreams: Sequence[str]) -> list[dict[str, Any]]:
    """The one pool that stands for a bare list of URLs."""
    kinds = {implied_kind(url) for url in upstreams}
    if len(kinds) > 1:
        raise ConfigError("the upstreams are engines and providers; name them in pools of their own in a file")
    return [
        {"name": "default", "kind": kinds.pop().value, "default": True, "replicas": [{"url": u} for u in upstreams]}
    ]


# --- the environment and the flags


def _from_environment(environ: Mapping[str, str]) -> tuple[dict[tuple[str, str], object], list[str]]:
    """Settings by (section, field), typed; and warnings about variables that mean nothing."""
    values: dict[tuple[str, str], object] = {}
    warnings: list[str] = []
    for name, text in sorted(environ.items(), key=lambda item: item[0] in _SHORT_NAMES):  # short names win
        if not name.startswith("CAIRN_") or name in _ELSEWHERE or _KUBERNETES_NAME.fullmatch(name):
            continue
        if name == "CAIRN_PORT" and "://" in text:
            warnings.append("CAIRN_PORT is a Kubernetes service link and is ignored; set CAIRN_SERVER__PORT")
        elif name in _SHORT_NAMES:
            values[_SHORT_NAMES[name]] = _scalar(name, text, _SHORT_NAMES[name])
        elif "__" in name:
            section, _, field = name.removeprefix("CAIRN_").lower().partition("__")
            values[section, field] = _scalar(name, text, (section, field))
        else:
            warnings.append(f"{name} is not a setting and is ignored")
    return values, warnings


def _scalar(name: str, text: str, path: tuple[str, str]) -> object:
    """The text of variable `name` as the type of the setting at `path`."""
    sections = {field.name: field.type for field in msgspec.structs.fields(Config)}
    section = sections.get(path[0])
    if not (isinstance(section, type) and issubclass(section, Section)):
        _fail(name, "there is no such setting")
    fields = {field.name: field.type for field in msgspec.structs.fields(section)}
    if path[1] not in fields:
        _fail(name, "there is no such setting")
    try:
        return msgspec.convert(text, fields[path[1]], strict=False, dec_hook=make_secret)
    except msgspec.ValidationError as error:
        _fail(name, _path_and_text(str(error))[1])


# --- what the values refer to


def _secret_holders(config: Config) -> Iterator[tuple[str, Section]]:
    """Every section that may name a secret, with its path."""
    yield "$.admin", config.admin
    yield "$.redis", config.redis
    yield "$.tenants", config.tenants
    for p, pool in enumerate(config.pools):
        for r, replica in enumerate(pool.replicas):
            yield f"$.pools[{p}].replicas[{r}]", replica


def _names_of_variables(section: Section) -> Iterator[tuple[str, str]]:
    """The fields `NAME_env` of `section` that are set: (NAME, variable)."""
    for field in section.__struct_fields__:
        if field.endswith("_env") and (variable := getattr(section, field)):
            yield field.removesuffix("_env"), variable


def _resolved(config: Config, environ: Mapping[str, str], folder: Path) -> Config:
    """Secrets read from where the file says, names derived, defaults filled that depend on others."""
    found = {path: _with_secret(path, section, environ, folder) for path, section in _secret_holders(config)}
    pools = []
    for p, pool in enumerate(config.pools):
        replicas = (found[f"$.pools[{p}].replicas[{r}]"] for r in range(len(pool.replicas)))
        named = tuple(_with_name(replica) for replica in replicas if isinstance(replica, Replica))
        pools.append(msgspec.structs.replace(pool, replicas=named, tenancy=_tenancy(pool, named, config)))
    redis = found["$.redis"]
    if isinstance(redis, Redis) and redis.url is None and redis.folder is None:
        redis = msgspec.structs.replace(redis, folder=str(_own_folder(environ) / f"valkey-{config.server.port}"))
    return msgspec.structs.replace(
        config, admin=found["$.admin"], redis=redis, tenants=found["$.tenants"], pools=tuple(pools)
    )


def _with_name(replica: Replica) -> Replica:
    try:
        return msgspec.structs.replace(replica, name=replica.label, url=replica.url.rstrip("/"))
    except ValueError:  # a URL that cannot be taken apart; the checks will say so
        return replica


def _tenancy(pool: Pool, replicas: Sequence[Replica], config: Config) -> Tenancy:
    """Before a provider whose keys the clients bring, what one pays for is never shared with another."""
    keyless_provider = pool.kind is PoolKind.PROVIDER and any(replica.key is None for replica in replicas)
    return Tenancy.ISOLATED if keyless_provider else pool.tenancy or config.tenancy


def _with_secret(path: str, section: Section, environ: Mapping[str, str], folder: Path) -> Section:
    """`section` with the secret that its `_env` or `_file` names, read."""
    for field in section.__struct_fields__:
        if not field.endswith("_env"):
            continue
        name = field.removesuffix("_env")
        variable, file = getattr(section, field), getattr(section, f"{name}_file")
        given = [n for n in (name, field, f"{name}_file") if getattr(section, n) is not None]
        if len(given) > 1 and not (name == "url" or name == "token"):
            _fail(f"{path}.{given[1]}", f"{given[0]} is given too; one of them is enough")
        if getattr(section, name) is not None:
            text, origin = getattr(section, name).reveal(), f"{path}.{name}"
        elif variable is not None:
            text, origin = _variable(environ, variable, f"{path}.{field}"), f"{path}.{field}"
        elif file is not None:
            text, origin = _key_file(folder / file, f"{path}.{name}_file"), f"{path}.{name}_file"
        else:
            return section
        if not text or _CONTROL_CHARACTERS.search(text):
            _fail(origin, "is empty or holds control characters")
        kind = SecretUrl if name == "url" else Secret
        return msgspec.structs.replace(section, **{name: kind(text)})
    return section


def _variable(environ: Mapping[str, str], variable: str, path: str) -> str:
    if variable not in environ:
        _fail(path, f"the environment has no variable {variable}")
    return environ[variable].strip()


def _key_file(file: Path, path: str) -> str:
    try:
        with file.expanduser().open("rb") as stream:
            return stream.read(_KEY_BYTES_AT_MOST).decode().strip()
    except OSError as error:
        _fail(path, f"cannot read {file}: {error.strerror or type(error).__name__}")
    except UnicodeDecodeError:
        _fail(path, f"{file} is not UTF-8 text")


def _own_folder(environ: Mapping[str, str]) -> Path:
    """Where this user's programs keep their files."""
    if given := environ.get("XDG_DATA_HOME"):
        return Path(given) / "cairn"
    home = Path(environ.get("HOME") or "/tmp")  # noqa: S108 - a user without a home still gets a running Cairn
    if sys.platform == "darwin":
        return home / "Library" / "Application Support" / "Cairn"
    return home / ".local" / "share" / "cairn"


def secrets_of(config: Config) -> set[str]:
    """Return every secret text in `config`, so that the log can redact them."""
    held: list[Secret | None] = [config.admin.token, config.redis.url, config.tenants.secret]
    held += [replica.key for pool in config.pools for replica in pool.replicas]
    return {secret.reveal() for secret in held if secret is not None}

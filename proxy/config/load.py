"""Read the configuration from file, environment and flags into one frozen `Config`.

A flag beats the environment, which beats the file, which beats the default. Everything is read, resolved and checked
once, so that nothing starts with a configuration that cannot work. Every problem is reported, each with its path.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import yaml

from proxy.config import checks, environment, validate, yaml_file
from proxy.config.data_folder import data_folder
from proxy.config.environment import process_environment
from proxy.config.files import read_at_most
from proxy.config.schema import (
    RETIRED,
    Admin,
    Client,
    Config,
    Kubernetes,
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
    redact,
    reveal,
)
from proxy.config.validate import Problem
from proxy.errors import ConfigError

__all__ = [
    "Admin", "Client", "Config", "ConfigError", "Loaded", "Log", "Pool", "PoolKind", "Price", "PriceTier", "Queueing",
    "Redis", "Replica", "Routing",
    "Secret", "SecretUrl", "Server", "Tenancy", "Tenants", "Upstream", "as_yaml", "load", "process_environment",
    "worker_environment",
]  # fmt: skip

_SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"  # where Kubernetes puts the token of a pod
_KEY_BYTES_AT_MOST = 64 * 1024
_VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?")  # no shell expands these in a file
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")
_VARIABLE_TO_SHOW = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")  # as variables are called, and keys are not
_PATH_TO_SHOW = re.compile(r"~?(/|\.{1,2}/).*|.{1,24}")  # a key has no such beginning, and is longer
_SCHEME_OF_A_HEADER = re.compile(r"bearer\s", re.IGNORECASE)


class Loaded(msgspec.Struct, frozen=True):
    """A configuration that can be served, and warnings about it."""

    config: Config
    warnings: tuple[str, ...] = ()


def load(
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[tuple[str, str], object] | None = None,
    upstreams: Sequence[str] = (),
) -> Loaded:
    """Read the configuration.

    Args:
        file: the YAML file, or None; then `CAIRN_CONFIG` may name one.
        environ: the environment, usually that of `process_environment`.
        flags: values by (section, field), already of the right types.
        upstreams: URLs that replace the file's pools, as `CAIRN_UPSTREAM` does.

    Raises:
        ConfigError: with every problem found; each has the path of the setting.
    """
    if file is None and environ.get("CAIRN_CONFIG"):
        file = Path(environ["CAIRN_CONFIG"])
    tree = yaml_file.read(file) if file is not None else {}
    warnings = _without_retired(tree)
    from_environment = environment.read(environ)
    # the file is checked by itself, so that an override does not hide a mistake in it
    _raise_if_any([*validate.problems(tree), *from_environment.problems])
    upstreams = upstreams or [url for url in re.split(r"[,\s]+", environ.get("CAIRN_UPSTREAM", "")) if url]
    if upstreams:
        tree["pools"] = _pools_of(upstreams)
    overrides = from_environment.values | {path: value for path, value in (flags or {}).items() if value is not None}
    for (section, field), value in overrides.items():
        tree.setdefault(section, {})[field] = msgspec.to_builtins(value, enc_hook=reveal)
    _raise_if_any(validate.problems(tree))
    config = validate.convert(tree, Config)
    secrets = _Secrets(environ, file.parent if file is not None else Path())
    named = config
    config = _resolved(config, secrets, environ)
    found = [*secrets.problems, *checks.problems(config), *_missing_extras(config), *_bad_authorities(named)]
    _raise_if_any([*found, *_bad_redis(config.redis.url)])
    warnings = [*warnings, *from_environment.warnings, *_unreachable(config), *checks.unreached_pools(config)]
    if config.redis.folder is not None and named.redis.folder is None:
        warnings += filter(None, [data_folder(environ, config.server.port).warning])
    return Loaded(config, tuple(warnings))


def as_yaml(config: Config) -> str:
    """Return the whole configuration as YAML, including defaults, with secrets as `***`."""
    tree = msgspec.to_builtins(config, enc_hook=redact)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def worker_environment(config: Config, environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` without Cairn's settings and without the variables that contain secrets."""
    secret_names = {value for _, section in _secret_holders(config) for _, value in _names_of_variables(section)}
    return {k: v for k, v in environ.items() if not k.startswith("CAIRN_") and k not in secret_names}


def secrets_of(config: Config) -> set[str]:
    """Return every secret text in `config`, so that the log can redact them."""
    held: list[Secret | None] = [config.admin.token, config.redis.url, config.tenants.secret, config.telemetry.token]
    held += [replica.key for pool in config.pools for replica in pool.replicas]
    return {secret.reveal() for secret in held if secret is not None}


def _raise_if_any(found: Iterator[Problem] | Sequence[Problem]) -> None:
    problems = tuple(dict.fromkeys(found))
    if problems:
        raise ConfigError.of(problems)


def _without_retired(tree: dict[str, Any]) -> list[str]:
    """Remove former settings from `tree`; returns a warning for each."""
    warnings = []
    for (section, field), why in RETIRED.items():
        settings = tree.get(section)
        if isinstance(settings, dict) and field in settings:
            del settings[field]
            warnings.append(f"$.{section}.{field} is ignored: {why}")
    return warnings


def _pools_of(upstreams: Sequence[str]) -> list[dict[str, Any]]:
    """Return the one pool that a list of URLs describes."""
    kinds = {checks.implied_kind(url) for url in upstreams}
    if len(kinds) > 1:
        raise ConfigError("the upstreams are both engines and providers; put them into separate pools in a file")
    return [
        {"name": "default", "kind": kinds.pop().value, "default": True, "replicas": [{"url": u} for u in upstreams]}
    ]


def _unreachable(config: Config) -> Iterator[str]:
    """Yield a warning if replicas are to be found through the Kubernetes API and its URL is not known."""
    if config.kubernetes.api_url is None and any(r.is_service for pool in config.pools for r in pool.replicas):
        yield "$.kubernetes.api_url is needed outside a pod: a pool finds its replicas through the Kubernetes API"


def _missing_extras(config: Config) -> Iterator[Problem]:
    """Yield the settings that need packages which are not installed."""
    if config.telemetry.endpoint is not None and not _is_installed("opentelemetry.exporter.otlp.proto.http"):
        yield "$.telemetry.endpoint", "needs packages that are not installed: pip install 'cairn-proxy[otel]'"


def _bad_authorities(config: Config) -> Iterator[Problem]:
    """Yield the files of certificate authorities that cannot be used; otherwise each request would fail for them."""
    for section in ("upstream", "kubernetes", "telemetry"):
        file = getattr(config, section).ca_file
        if file is None:
            continue
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
        except ssl.SSLError:
            yield f"$.{section}.ca_file", f"{file} contains no certificate; expected certificates in the form of PEM"
        except OSError as error:
            yield f"$.{section}.ca_file", f"cannot read {file}: {error.strerror or type(error).__name__}"


def _bad_redis(url: SecretUrl | None) -> Iterator[Problem]:
    """Yield what the URL of Redis has that no client can be made of; only its beginning is checked before."""
    if url is None or not checks.is_redis(url):
        return
    from cache import CacheError, check_store_url  # takes as long to load as everything else here

    try:
        check_store_url(url.reveal())
    except CacheError as error:
        yield "$.redis.url", str(error)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package that contains it is missing
        return False


# --- secrets and derived values


class _Secrets:
    """Reads secrets from environment variables and files, and collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str], folder: Path) -> None:
        self._environ = environ
        self._folder = folder  # of the configuration file
        self.problems: list[Problem] = []

    def resolve(self, path: str, section: Section) -> Section:
        """Return `section` with the secret that its `_env` or `_file` names."""
        for field in section.__struct_fields__:
            if field.endswith("_env"):
                return self._with_secret(path, section, field.removesuffix("_env"))
        return section

    def _with_secret(self, path: str, section: Section, name: str) -> Section:
        sources = [n for n in (name, f"{name}_env", f"{name}_file") if getattr(section, n) is not None]
        if not sources:
            return section
        if len(sources) > 1 and name not in ("url", "token"):
            self.problems.append((f"{path}.{sources[1]}", f"{sources[0]} is set too; set one of them only"))
        text = self._text(f"{path}.{sources[0]}", sources[0], getattr(section, sources[0]))
        if text is None:
            return section
        if sources[0] == name and (variable := _VARIABLE.fullmatch(text)):
            problem = f"is the name of a variable, not its value; set {name}_env: {variable[1]}"
            self.problems.append((f"{path}.{name}", problem))
            return section
        if not text or _CONTROL_CHARACTERS.search(text):
            self.problems.append((f"{path}.{sources[0]}", "is empty or contains control characters"))
            return section
        if name in ("key", "token") and _SCHEME_OF_A_HEADER.match(text):
            problem = f"begins with Bearer, which Cairn adds by itself; give the {name} alone"
            self.problems.append((f"{path}.{sources[0]}", problem))
            return section
        return msgspec.structs.replace(section, **{name: SecretUrl(text) if name == "url" else Secret(text)})

    def _text(self, path: str, field: str, value: Secret | str) -> str | None:
        """Return the secret that `field` contains or names; None after a problem."""
        if isinstance(value, Secret):
            return value.reveal()
        name = field.removesuffix("_env").removesuffix("_file")
        if field.endswith("_env"):
            if value not in self._environ:
                shown = value if _VARIABLE_TO_SHOW.fullmatch(value) else f"of this name; {_belongs(name)}"
                self.problems.append((path, f"the environment has no variable {shown}"))
                return None
            return self._environ[value].strip()
        file = self._folder / value
        try:
            content = read_at_most(file.expanduser(), _KEY_BYTES_AT_MOST + 1)
            if len(content) <= _KEY_BYTES_AT_MOST:
                return content.decode().strip()
            self.problems.append((path, f"{file} is larger than {_KEY_BYTES_AT_MOST} bytes"))
        except OSError as error:
            why = error.strerror or type(error).__name__
            if _PATH_TO_SHOW.fullmatch(value):
                self.problems.append((path, f"cannot read {file}: {why}"))
            else:  # it may be the secret itself, which belongs into no log
                self.problems.append((path, f"cannot read the file: {why}; {_belongs(name)}"))
        except UnicodeDecodeError:
            self.problems.append((path, f"{file} is not UTF-8 text"))
        return None


def _belongs(name: str) -> str:
    return f"the {name} itself belongs in `{name}`"


def _secret_holders(config: Config) -> Iterator[tuple[str, Section]]:
    """Yield every section that may name a secret, with its path."""
    yield "$.admin", config.admin
    yield "$.redis", config.redis
    yield "$.tenants", config.tenants
    yield "$.telemetry", config.telemetry
    for p, pool in enumerate(config.pools):
        for r, replica in enumerate(pool.replicas):
            yield f"$.pools[{p}].replicas[{r}]", replica


def _names_of_variables(section: Section) -> Iterator[tuple[str, str]]:
    """Yield the fields `NAME_env` of `section` that are set: (NAME, variable)."""
    for field in section.__struct_fields__:
        if field.endswith("_env") and (variable := getattr(section, field)):
            yield field.removesuffix("_env"), variable


def _resolved(config: Config, secrets: _Secrets, environ: Mapping[str, str]) -> Config:
    """Return `config` with secrets read, names derived, and defaults filled in that depend on other settings."""
    found = {path: secrets.resolve(path, section) for path, section in _secret_holders(config)}
    pools = []
    for p, pool in enumerate(config.pools):
        replicas = (found[f"$.pools[{p}].replicas[{r}]"] for r in range(len(pool.replicas)))
        named = tuple(_with_name(replica) for replica in replicas if isinstance(replica, Replica))
        pools.append(msgspec.structs.replace(pool, replicas=named, tenancy=_tenancy(pool, named, config)))
    redis = found["$.redis"]
    if isinstance(redis, Redis) and redis.url is None and redis.folder is None:
        redis = msgspec.structs.replace(redis, folder=str(data_folder(environ, config.server.port).path))
    return msgspec.structs.replace(
        config,
        admin=found["$.admin"],
        redis=redis,
        tenants=found["$.tenants"],
        telemetry=found["$.telemetry"],
        kubernetes=_kubernetes(config.kubernetes, environ),
        pools=tuple(pools),
    )


def _kubernetes(given: Kubernetes, environ: Mapping[str, str]) -> Kubernetes:
    """Return the settings of the API with those of the pod filled in, if Cairn runs in one."""
    host = environ.get("KUBERNETES_SERVICE_HOST")
    if given.api_url is not None or not host:
        return given
    port = environ.get("KUBERNETES_SERVICE_PORT", "443")
    return msgspec.structs.replace(
        given,
        api_url=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        token_file=given.token_file or f"{_SERVICE_ACCOUNT}/token",
        ca_file=given.ca_file or f"{_SERVICE_ACCOUNT}/ca.crt",
    )


def _with_name(replica: Replica) -> Replica:
    try:
        return msgspec.structs.replace(replica, name=replica.label, url=replica.url.rstrip("/"))
    except ValueError:  # an invalid URL, which the checks report
        return replica


def _tenancy(pool: Pool, replicas: Sequence[Replica], config: Config) -> Tenancy:
    """Return the pool's tenancy. If clients use their own keys at a provider, they never share what they pay for."""
    keyless_provider = pool.kind is PoolKind.PROVIDER and any(replica.key is None for replica in replicas)
    return Tenancy.ISOLATED if keyless_provider else pool.tenancy or config.tenancy

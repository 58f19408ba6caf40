"""Check what the types of a configuration cannot express. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal
from urllib.parse import urlsplit

from proxy.config.schema import (
    FOLLOWED_SCHEME,
    KUBERNETES_SCHEME,
    Config,
    Pool,
    PoolKind,
    Price,
    PriceTier,
    Replica,
    SecretUrl,
    ServiceUrl,
    rank_name,
)
from proxy.config.validate import Problem
from proxy.model import ORDINARY_TIERS, OTHER_CLIENTS
from proxy.patterns import matches

_REDIS_SCHEMES = frozenset(
    {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"}
)
_ENDPOINT = re.compile(r"/(chat/completions|completions|responses|messages|embeddings|models)/?$")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*\.?")
_PORT = re.compile(r":[0-9]{0,5}")  # in a `Host` header, where it may be empty (RFC 3986, 3.2.3)
_UPSTREAM_SCHEMES = ("http", "https", FOLLOWED_SCHEME, KUBERNETES_SCHEME)
_AMOUNT_MOST = Decimal(1_000_000)  # largest amount in a price; more is in the wrong unit
_TOKEN_AMOUNTS = ("input", "output", "cached_read", "cache_write_5m", "cache_write_1h")
_GPU_AMOUNTS = ("usd_per_gpu_hour", "gpus_per_replica")
# domains that are never public: RFC 6762, 8375, 9476 and those of clusters
_PRIVATE_SUFFIXES = (".local", ".internal", ".lan", ".svc", ".home.arpa", ".test", ".localhost", ".cluster.local")


def problems(config: Config) -> Iterator[Problem]:
    """Yield everything that is wrong with `config`, in the order of the tree."""
    yield from exposure(config)
    yield from _redis(config.redis.url)
    yield from _pools(config)
    yield from _clients(config)
    yield from _prices(config)
    if (api_url := config.kubernetes.api_url) is not None and (text := bad_url(api_url, "token", ("https", "http"))):
        yield "$.kubernetes.api_url", text
    if (endpoint := config.telemetry.endpoint) is not None and (
        text := bad_url(endpoint, "token", ("http", "https"))
    ):
        yield "$.telemetry.endpoint", text


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a port on `host`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str:
    """Return the host of a `Host` header, without the port.

    Return "" if what follows the host is not a port, and for an address with a zone: no browser sends one, and a zone
    may be any text.
    """
    if header.startswith("["):
        host, _, rest = header[1:].partition("]")
        if "%" in host:
            return ""
    else:
        host, colon, port = header.partition(":")
        rest = colon + port
    return host if not rest or _PORT.fullmatch(rest) else ""


def implied_kind(url: str) -> PoolKind:
    """Guess the kind of an upstream from its URL: https to a public name is a provider, everything else an engine.

    An engine with a public name loses little if it is mistaken for a provider: its prefixes expire by time, and
    clients with different keys share none. The opposite mistake would let tenants infer each other's prompts.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return PoolKind.ENGINE
    return PoolKind.PROVIDER if parts.scheme == "https" and not _is_private(host) else PoolKind.ENGINE


def _is_private(host: str) -> bool:
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(_PRIVATE_SUFFIXES)


def exposure(config: Config) -> Iterator[Problem]:
    """Yield the settings that would let strangers use replicas' keys or the admin port."""
    server, admin = config.server, config.admin
    if config.has_replica_keys and not config.clients and not server.open and not is_loopback(server.host):
        yield (
            "$.server.host",
            f"anyone who reaches {server.host} could use the replicas' keys: "
            "list clients, listen on loopback, or allow it with --open",
        )
    if admin.token is None and not is_loopback(admin.host):
        yield (
            "$.admin.host",
            f"{admin.host} is not a loopback address: set admin.token, token_env or token_file",
        )
    if server.port and server.port == admin.port:
        yield "$.admin.port", f"{admin.port} is also the port of the server"


def is_redis(url: SecretUrl) -> bool:
    """Return whether the URL begins like one of Redis."""
    return url.reveal().partition("://")[0] in _REDIS_SCHEMES


def _redis(url: SecretUrl | None) -> Iterator[Problem]:
    if url is not None and not is_redis(url):
        yield "$.redis.url", "expected redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"


def _pools(config: Config) -> Iterator[Problem]:
    pools: dict[str, str] = {}
    replicas: dict[str, str] = {}
    defaults: list[str] = []
    for p, pool in enumerate(config.pools):
        path = f"$.pools[{p}]"
        yield from _twice(pools.setdefault(pool.name, path), path, "name", f"the name {pool.name}")
        defaults += [path] if pool.default else []
        if len(defaults) > 1 and pool.default:
            yield f"{path}.default", f"{defaults[0]} is the default pool already"
        yield from _models(path, pool.models)
        for r, replica in enumerate(pool.replicas):
            yield from _replica(f"{path}.replicas[{r}]", replica, pool, replicas)


def _replica(path: str, replica: Replica, pool: Pool, seen: dict[str, str]) -> Iterator[Problem]:
    if text := _bad_service(replica) if replica.is_service else bad_url(replica.url):
        yield f"{path}.url", text
        return
    if replica.selector is not None and not replica.is_service:
        yield f"{path}.selector", "is for a url of kubernetes+http://"
    ranks = replica.ranks or 1
    for name in (replica.label, *(rank_name(replica.label, rank) for rank in range(ranks if ranks > 1 else 0))):
        first = seen.setdefault(name, path)
        if first != path:
            yield f"{path}.name", f"{first} has the name {name} too; give each replica a different name"
            break
    if pool.kind is PoolKind.PROVIDER and replica.capacity_tokens is not None:
        yield f"{path}.capacity_tokens", "is for engines; a provider keeps prefixes for a time (ttl_seconds)"


def _bad_service(replica: Replica) -> str | None:
    """Return what is wrong with a URL of Kubernetes endpoints, or None."""
    url = ServiceUrl.parse(replica.url)
    if url is None:
        return "expected kubernetes+http://service.namespace:port; the port is a number or a name"
    if url.service == "*" and not replica.selector:
        return "names no Service; set selector to the labels of the wanted Services"
    if url.port.isdigit() and not 0 < int(url.port) <= 65_535:
        return "expected a port from 1 to 65535"
    return None


def bad_url(url: str, field: str = "key", schemes: Sequence[str] = _UPSTREAM_SCHEMES) -> str | None:
    """Return what is wrong with a URL, or None, without repeating it: it may hold a password."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        return "is not a URL"
    if parts.scheme not in schemes:
        *most, last = [f"{scheme}://" for scheme in schemes]
        return f"expected {', '.join(most)} or {last}"
    if not host or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        return "expected a host, and no white space"
    if ":" not in host and not _HOST.fullmatch(host):
        return "expected one host: a name of letters, digits, hyphens, dots and underscores, or an address"
    if port == 0:
        return "port 0 cannot be connected to"
    if parts.username is not None or parts.password is not None:
        return f"contains a user or password; give the {field} in {field}_env or {field}_file"
    if parts.query or parts.fragment:
        return "has a query or fragment; remove it"
    if found := _ENDPOINT.search(parts.path):
        return f"is the URL of an endpoint; give the base URL, which ends before {found[0]}"
    return None


def _models(path: str, models: tuple[str, ...]) -> Iterator[Problem]:
    for m, pattern in enumerate(models):
        if not pattern.isprintable() or pattern != pattern.strip():
            yield f"{path}.models[{m}]", "is not a model name or a pattern; remove spaces and control characters"


def unreached_pools(config: Config) -> Iterator[str]:
    """Yield a warning for each pool of which earlier ones serve all models: requests go to the first that matches."""
    earlier: list[tuple[str, str]] = []  # the patterns of the pools before it, with the place of each pool
    for p, pool in enumerate(config.pools):
        places = [next((at for at, other in earlier if _covers(other, each)), None) for each in pool.models]
        if not pool.default and all(places):
            first = " and ".join(dict.fromkeys(filter(None, places)))
            yield (
                f"$.pools[{p}].models: no request reaches this pool: its models match {first} before it; put it "
                "before them, or narrow their models"
            )
        earlier += [(f"$.pools[{p}]", pattern) for pattern in pool.models]


def _covers(pattern: str, other: str) -> bool:
    """Return whether `pattern` matches every name that the pattern `other` matches; False if that is not clear."""
    return matches(other, pattern) and ("?" not in pattern or "*" not in other)


def _clients(config: Config) -> Iterator[Problem]:
    names: dict[str, str] = {}
    keys: dict[str, str] = {}
    for c, client in enumerate(config.clients):
        path = f"$.clients[{c}]"
        if client.name == OTHER_CLIENTS:
            yield f"{path}.name", "is what metrics call all clients without a label of their own; give another name"
        yield from _twice(names.setdefault(client.name, path), path, "name", f"the name {client.name}")
        yield from _twice(keys.setdefault(client.key_sha256.lower(), path), path, "key_sha256", "the same key")
        yield from _models(path, client.models)


def _prices(config: Config) -> Iterator[Problem]:
    seen: dict[tuple[str, ...], str] = {}
    for p, price in enumerate(config.prices):
        path = f"$.prices[{p}]"
        key = (price.model, price.upstream, price.service_tier or "", str(price.valid_from or ""))
        yield from _twice(seen.setdefault(key, path), path, "valid_from", "a price for the same models and date")
        yield from _amounts(path, price, (*_TOKEN_AMOUNTS, *_GPU_AMOUNTS, "usd_per_unit"))
        if price.service_tier in ORDINARY_TIERS:
            yield f"{path}.service_tier", "is the ordinary tier: prices without a service tier apply to it; remove it"
        if price.usd_per_unit is not None and price.currency == "USD":
            yield f"{path}.usd_per_unit", "is for prices that are not in USD"
        yield from (_engine_card if price.usd_per_gpu_hour is not None else _token_card)(path, price)


def _token_card(path: str, price: Price) -> Iterator[Problem]:
    if price.input is None:
        yield path, "needs either input and output (per million tokens) or usd_per_gpu_hour"
        return
    if price.output is None:
        yield f"{path}.output", "is needed with input; use 0 if nothing is generated"
    if price.gpus_per_replica is not None:
        yield f"{path}.gpus_per_replica", "is for prices with usd_per_gpu_hour"
    reached = 0
    for t, tier in enumerate(price.tiers):
        yield from _amounts(f"{path}.tiers[{t}]", tier, _TOKEN_AMOUNTS)
        if tier.above_prompt_tokens <= reached:
            yield f"{path}.tiers[{t}].above_prompt_tokens", "must be greater than that of the previous tier"
        reached = tier.above_prompt_tokens


def _engine_card(path: str, price: Price) -> Iterator[Problem]:
    for field in (*_TOKEN_AMOUNTS, "tiers"):
        if getattr(price, field) not in (None, ()):
            yield f"{path}.{field}", "is a price per token, and usd_per_gpu_hour a price per hour; remove one of them"
    if price.gpus_per_replica == 0:
        yield f"{path}.gpus_per_replica", "must not be 0"
    if price.currency != "USD":
        yield f"{path}.currency", "must be USD with usd_per_gpu_hour"


def _amounts(path: str, card: Price | PriceTier, fields: tuple[str, ...]) -> Iterator[Problem]:
    for field in fields:
        amount: Decimal | None = getattr(card, field)
        if amount is not None and not (amount.is_finite() and 0 <= amount <= _AMOUNT_MOST):
            yield f"{path}.{field}", f"expected a number from 0 to {_AMOUNT_MOST:,}"


def _twice(first: str, path: str, field: str, what: str) -> Iterator[Problem]:
    if first != path:
        yield f"{path}.{field}", f"{first} already has {what}"

"""What a configuration must hold beyond the types of its values. Pure: a `Config` in, problems out."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from decimal import Decimal
from urllib.parse import urlsplit

from proxy.config.schema import FOLLOWED_SCHEME, Config, Pool, PoolKind, Price, PriceTier, Replica, SecretUrl

Problem = tuple[str, str]  # path, text

_REDIS_SCHEMES = frozenset(
    {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"}
)
_AMOUNT_MOST = Decimal(1_000_000)  # of anything in a rate card; more is a slip of the unit
_TOKEN_AMOUNTS = ("input", "output", "cached_read", "cache_write_5m", "cache_write_1h")
_GPU_AMOUNTS = ("usd_per_gpu_hour", "gpus_per_replica")
# names that public resolvers do not know: RFC 6762, 8375, 9476 and what clusters use
_PRIVATE_SUFFIXES = (".local", ".internal", ".lan", ".svc", ".home.arpa", ".test", ".localhost", ".cluster.local")


def problems(config: Config) -> Iterator[Problem]:
    """Everything wrong with `config`, each with its path, in the order of the tree."""
    yield from _exposure(config)
    yield from _redis(config.redis.url)
    yield from _pools(config)
    yield from _clients(config)
    yield from _prices(config)


def is_loopback(host: str) -> bool:
    """True where only this machine can reach what is bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def implied_kind(url: str) -> PoolKind:
    """What a bare URL stands for: https to a public name is a provider, all else an engine of one's own.

    An engine behind a public name loses little by the mistake: its placements end by time instead of by budget, and
    who brings another key shares no prefix. The other mistake would let tenants infer each other's prompts.
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


def _exposure(config: Config) -> Iterator[Problem]:
    server, admin = config.server, config.admin
    if config.has_replica_keys and not config.clients and not server.open and not is_loopback(server.host):
        yield (
            "$.server.host",
            f"{server.host} lets anyone use the replicas' keys: list clients, bind to loopback, or say --open",
        )
    if admin.token is None and not is_loopback(admin.host):
        yield (
            "$.admin.host",
            f"{admin.host} is not loopback, so the admin port needs admin.token, token_env or token_file",
        )
    if server.port and server.port == admin.port:
        yield "$.admin.port", f"{admin.port} is the port of the server too"


def _redis(url: SecretUrl | None) -> Iterator[Problem]:
    if url is None:
        return
    scheme = url.reveal().partition("://")[0]
    if scheme not in _REDIS_SCHEMES:
        yield "$.redis.url", "expected redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"


def _pools(config: Config) -> Iterator[Problem]:
    pools: dict[str, str] = {}
    replicas: dict[str, str] = {}
    defaults: list[str] = []
    for p, pool in enumerate(config.pools):
        path = f"$.pools[{p}]"
        yield from _twice(pools.setdefault(pool.name, path), path, "name", pool.name)
        defaults += [path] if pool.default else []
        if len(defaults) > 1 and pool.default:
            yield f"{path}.default", f"{defaults[0]} is the default pool already"
        yield from _models(path, pool.models)
        for r, replica in enumerate(pool.replicas):
            yield from _replica(f"{path}.replicas[{r}]", replica, pool, replicas)


def _replica(path: str, replica: Replica, pool: Pool, seen: dict[str, str]) -> Iterator[Problem]:
    if text := _bad_url(replica.url):
        yield f"{path}.url", text
        return
    first = seen.setdefault(replica.label, path)
    if first != path:
        yield f"{path}.name", f"{first} is named {replica.label} too; give each a name of its own"
    if pool.kind is PoolKind.PROVIDER and replica.capacity_tokens is not None:
        yield f"{path}.capacity_tokens", "a provider's prefixes end by time (ttl_seconds), not by capacity"


def _bad_url(url: str) -> str | None:
    """Why `url` is no base of an upstream, or None. Never shows the URL: it may hold a password."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https", FOLLOWED_SCHEME):
        return "expected http://, https:// or dns+http://"
    if not host or not url.isascii() or any(c <= " " or c == "\x7f" for c in url):
        return "expected a host, and no white space"
    if port == 0:
        return "port 0 cannot be connected to"
    if parts.username is not None or parts.password is not None:
        return "holds a user or password; give the key in key_env or key_file"
    if parts.query or parts.fragment:
        return "has a query or fragment; a base URL has none"
    return None


def _models(path: str, models: tuple[str, ...]) -> Iterator[Problem]:
    for m, pattern in enumerate(models):
        if not pattern.isprintable() or pattern != pattern.strip():
            yield f"{path}.models[{m}]", "is not the name of a model or a pattern of names"


def _clients(config: Config) -> Iterator[Problem]:
    names: dict[str, str] = {}
    keys: dict[str, str] = {}
    for c, client in enumerate(config.clients):
        path = f"$.clients[{c}]"
        yield from _twice(names.setdefault(client.name, path), path, "name", client.name)
        yield from _twice(keys.setdefault(client.key_sha256.lower(), path), path, "key_sha256", "the same key")
        yield from _models(path, client.models)


def _prices(config: Config) -> Iterator[Problem]:
    seen: dict[tuple[str, str, str], str] = {}
    for p, price in enumerate(config.prices):
        path = f"$.prices[{p}]"
        key = (price.model, price.upstream, str(price.valid_from or ""))
        yield from _twice(seen.setdefault(key, path), path, "valid_from", "a card for the same models and date")
        yield from _amounts(path, price, (*_TOKEN_AMOUNTS, *_GPU_AMOUNTS, "usd_per_unit"))
        if price.usd_per_unit is not None and price.currency == "USD":
            yield f"{path}.usd_per_unit", "is for a card in another currency"
        yield from (_engine_card if price.usd_per_gpu_hour is not None else _token_card)(path, price)


def _token_card(path: str, price: Price) -> Iterator[Problem]:
    if price.input is None:
        yield path, "has neither input and output (per million tokens) nor usd_per_gpu_hour"
        return
    if price.output is None:
        yield f"{path}.output", "is needed beside input; 0 where nothing is generated"
    if price.gpus_per_replica is not None:
        yield f"{path}.gpus_per_replica", "is for a card with usd_per_gpu_hour"
    reached = 0
    for t, tier in enumerate(price.tiers):
        yield from _amounts(f"{path}.tiers[{t}]", tier, _TOKEN_AMOUNTS)
        if tier.above_prompt_tokens <= reached:
            yield f"{path}.tiers[{t}].above_prompt_tokens", "is not above the tier before"
        reached = tier.above_prompt_tokens


def _engine_card(path: str, price: Price) -> Iterator[Problem]:
    for field in (*_TOKEN_AMOUNTS, "tiers"):
        if getattr(price, field) not in (None, ()):
            yield f"{path}.{field}", "prices tokens, and usd_per_gpu_hour prices seconds; one of them is enough"
    if price.gpus_per_replica == 0:
        yield f"{path}.gpus_per_replica", "is zero"
    if price.currency != "USD":
        yield f"{path}.currency", "a price of GPUs is in USD"


def _amounts(path: str, card: Price | PriceTier, fields: tuple[str, ...]) -> Iterator[Problem]:
    for field in fields:
        amount: Decimal | None = getattr(card, field)
        if amount is not None and not (amount.is_finite() and 0 <= amount <= _AMOUNT_MOST):
            yield f"{path}.{field}", f"expected a number from 0 to {_AMOUNT_MOST:,}"


def _twice(first: str, path: str, field: str, what: str) -> Iterator[Problem]:
    if first != path:
        yield f"{path}.{field}", f"{first} has {what} already"

"""Which replicas there are: those that the configuration names, and those behind the names that it says to follow.

A URL `dns+http://name:port` stands for all addresses of the name, as a headless Kubernetes service lists its pods: it
is looked up every few seconds, an address that is new becomes a replica, one that is gone gets no new request and
ends what it has. A look-up that fails or finds nothing changes nothing: a name server's trouble is not the engines'.

It fills the fleet, the pools and the index's budgets. It must not know how a replica is chosen.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from urllib.parse import urlsplit

import msgspec

from cache import PrefixIndex
from proxy.clock import Clock
from proxy.config.schema import Config, Pool, PoolKind, Replica, Tenancy
from proxy.fleet import Fleet, ReplicaSpec
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.upstream import Origin

log = logging.getLogger("cairn.membership")

LOOK_SECONDS = 5.0
"""Between two look-ups: Kubernetes itself keeps its records for 5 s or more (CoreDNS's ttl)."""

RESOLVE_SECONDS = 4.0
"""A look-up that takes longer counts as failed."""

FORGET_SECONDS = 60.0
"""A replica that comes back within this time (a probe failed once) still has what the index says it holds."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a name and a port to its addresses. Raises OSError."""


async def resolve(name: str, port: int) -> Sequence[str]:
    """By the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Discovery:
    """One per worker. `added` hears of replicas that came from a name; `changed` of any change at all."""

    def __init__(
        self, config: Config, fleet: Fleet, index: PrefixIndex, clock: Clock, resolve: Resolve = resolve
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._index = index
        self._clock = clock
        self._resolve = resolve
        self._addresses: dict[str, tuple[str, ...]] = {}  # by URL, sorted
        self._gone: dict[int, float] = {}  # replicas out of force, since when
        self._told_tokens: dict[int, int] = {}  # capacities as configured: once told, the index learns from there
        self.added: Callable[[int], object] = lambda _: None
        self.changed: Callable[[], None] = lambda: None
        self.pools = self._enter()

    def adopt(self, config: Config) -> None:
        """Work by a new configuration: replicas that it does not have get no new request."""
        self._config = config
        self._apply()

    async def look(self) -> None:
        """Look all names up, once, and take over what changed."""
        urls = {replica.url for pool in self._config.pools for replica in pool.replicas if replica.is_followed}
        found = await asyncio.gather(*(self._look_up(url) for url in urls))
        fresh = {url: addresses for url, addresses in zip(urls, found, strict=True) if addresses}
        news = {url: each for url, each in fresh.items() if each != self._addresses.get(url)}
        if news:
            self._addresses.update(news)
            self._apply()

    async def run(self) -> None:
        """Look every few seconds until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()
            self._forget()

    async def _look_up(self, url: str) -> tuple[str, ...]:
        parts = urlsplit(url)
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = await self._resolve(parts.hostname or "", parts.port or 80)
        except OSError as error:  # TimeoutError too
            log.warning("the name %s is not resolved: %s", parts.hostname, error or type(error).__name__)
            return ()
        return tuple(sorted(set(found)))

    def _apply(self) -> None:
        before = self._fleet.members()
        self.pools.adopt(self._enter())
        for name in before.keys() - {backend.name for backend in self._in_force()}:
            log.info("replica %s is gone", name)
            self._fleet.remove(before[name])
            self._gone.setdefault(before[name], self._clock.monotonic())
        self.changed()
        for number in self.pools.served:
            self._gone.pop(number, None)
            if self.pools.backends[number].name not in before:
                self.added(number)

    def _forget(self) -> None:
        """Let go of what those held that are gone for good."""
        oldest = self._clock.monotonic() - FORGET_SECONDS
        for number in [number for number, since in self._gone.items() if since <= oldest]:
            del self._gone[number]
            self._told_tokens.pop(number, None)
            self._index.remove(number)

    def _in_force(self) -> Iterator[ReplicaEndpoint]:
        return (self.pools.backends[number] for number in self.pools.served)

    def _enter(self) -> Pools:
        """Enter every replica into the fleet; the numbers that it gives name them in the index, too."""
        config = self._config
        backends: dict[int, ReplicaEndpoint] = {}
        for pool, replica in self._replicas():
            spec = ReplicaSpec(replica.label, pool.name, replica.prefill_tokens_per_second, replica.max_concurrent)
            number = self._fleet.add(spec)
            backends[number] = _backend(pool, replica, knows_clients=bool(config.clients))
            if pool.kind is PoolKind.PROVIDER:
                self._index.set_ttl(number, pool.ttl_seconds)
            else:
                self._tell_capacity(number, replica.capacity_tokens)
        default = config.default_pool
        knows_clients = bool(config.clients)
        served = [_served(pool, config.tenancy, knows_clients=knows_clients) for pool in config.pools]
        return Pools(served, None if default is None else default.name, backends)

    def _tell_capacity(self, number: int, tokens: int | None) -> None:
        if tokens is not None and self._told_tokens.get(number) != tokens:
            self._told_tokens[number] = tokens
            self._index.set_capacity(number, tokens)
            self._index.set_budget(number, tokens)

    def _replicas(self) -> Iterator[tuple[Pool, Replica]]:
        """All that are in force, each name once: an address that two names have belongs to the first."""
        seen = set()
        for pool in self._config.pools:
            for replica in pool.replicas:
                for each in self._behind(replica):
                    if each.label not in seen:
                        seen.add(each.label)
                        yield pool, each

    def _behind(self, replica: Replica) -> Iterator[Replica]:
        if not replica.is_followed:
            yield replica
            return
        parts = urlsplit(replica.url)
        for address in self._addresses.get(replica.url, ()):
            host = f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
            url = f"http://{host}:{parts.port or 80}{parts.path}"
            # named by its address, so that all proxies call it the same
            yield msgspec.structs.replace(replica, url=url, name=None)


def _served(pool: Pool, tenancy: Tenancy, *, knows_clients: bool) -> ServedPool:
    is_provider = pool.kind is PoolKind.PROVIDER
    brings_keys = is_provider and all(replica.key is None for replica in pool.replicas)
    isolated = brings_keys or (pool.tenancy or tenancy) is Tenancy.ISOLATED
    return ServedPool(
        pool.name,
        pool.models,
        is_provider=is_provider,
        isolated=isolated,
        sends_cache_salt=pool.cache_salt,
        shares_key=knows_clients or any(replica.key is not None for replica in pool.replicas),
    )


def _backend(pool: Pool, replica: Replica, *, knows_clients: bool) -> ReplicaEndpoint:
    key = replica.key
    return ReplicaEndpoint(
        replica.label,
        pool.name,
        replica.url,
        Origin.parse(replica.url),
        None if key is None else (b"authorization", b"Bearer " + key.reveal().encode()),
        knows_clients,
        pool.kind is PoolKind.PROVIDER,
        replica.capacity_tokens,
    )

"""Keep the list of replicas: those in the configuration, and those behind names that it follows.

A URL `dns+http://name:port` means all addresses of the name, as a headless Kubernetes service lists its pods. The
name is resolved every few seconds: a new address becomes a replica, a replica whose address is gone gets no new
request, and once it has been gone for a while everything kept for it is dropped. A look-up that fails or finds
nothing changes nothing: a failing name server does not mean failing engines.

A URL `kubernetes+http://service.namespace:port` means the ready endpoints of a Service. `Endpoints` follows them and
reports each change; an empty list from it is believed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence, Set
from typing import Final, NamedTuple, Protocol
from urllib.parse import urlsplit

import msgspec

from cache import UNLIMITED_TOKENS, PrefixIndex
from proxy.clock import Clock
from proxy.config.credentials import credential_of, default_headers_of
from proxy.config.schema import Config, Pool, PoolKind, Replica, ServiceUrl, Tenancy, rank_name
from proxy.fleet.endpoint_slices import Endpoint
from proxy.fleet.fleet import Fleet
from proxy.fleet.kubernetes import Service
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.fleet.replica import ReplicaSpec
from proxy.upstream import Origin

log = logging.getLogger("cairn.discovery")

LOOK_SECONDS = 5.0
"""Interval of look-ups: Kubernetes itself keeps its records for 5 s or more (CoreDNS's ttl)."""

RESOLVE_SECONDS = 4.0
"""A look-up that takes longer has failed."""

FORGET_SECONDS = 60.0
"""A replica that comes back within this time (a probe failed once) is assumed to have kept its cache."""

MAX_RANKS: Final = 256
"""Largest number of ranks that is believed; the configuration allows no more either."""

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the addresses of a name and port. Raises OSError."""


async def resolve(name: str, port: int) -> Sequence[str]:
    """Resolve with the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Listener(Protocol):
    """Something that keeps an object per replica."""

    def replicas_changed(self, joined: Sequence[int]) -> None:
        """Take over the replicas in force; `joined` are those that are new or have another address or key."""
        ...

    def replica_forgotten(self, number: int, endpoint: ReplicaEndpoint) -> None:
        """Drop everything kept for a replica that is gone for good. Its number may be given to another one."""
        ...


class Endpoints(Protocol):
    """Follows Services: `proxy.fleet.kubernetes.KubernetesEndpoints`."""

    def follow(self, services: Set[Service], found: Callable[[Service, tuple[Endpoint, ...]], None]) -> None:
        """Follow `services` and no others; call `found` whenever the endpoints of one changed."""
        ...

    async def listed(self, within_seconds: float) -> None:
        """Return when the endpoints of all of them are known, or after `within_seconds`."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


class _Keeping(NamedTuple):
    """How a replica keeps prefixes, as configured: a provider's for a time, an engine's while it has room."""

    ttl_seconds: float | None
    tokens: int | None

    @classmethod
    def of(cls, pool: Pool, replica: Replica) -> _Keeping:
        """Return what the configuration says of a replica."""
        is_provider = pool.kind is PoolKind.PROVIDER
        return cls(pool.ttl_seconds if is_provider else None, None if is_provider else replica.capacity_tokens)

    def has_room_of(self, other: _Keeping) -> bool:
        """Return whether what is known of the room counts for both."""
        return self.tokens == other.tokens and (self.ttl_seconds is None) == (other.ttl_seconds is None)


class Discovery:
    """Fills the fleet, the pools and the index's budgets. One per worker.

    Without `endpoints` no Service is followed.
    """

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        index: PrefixIndex,
        clock: Clock,
        resolve: Resolve = resolve,
        endpoints: Endpoints | None = None,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._index = index
        self._clock = clock
        self._resolve = resolve
        self._endpoints = endpoints
        self._found: dict[Service, tuple[Endpoint, ...]] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}  # by URL, sorted
        self._gone: dict[int, float] = {}  # replicas that were removed, and when
        self._ranks: dict[str, int] = {}  # by the label of a replica for which none are configured
        self._told: dict[int, _Keeping] = {}  # what the index was told of each replica
        self._listeners: list[Listener] = []
        self.pools = self._enter()

    def subscribe(self, listener: Listener) -> None:
        """Call `listener` about every change from now on."""
        self._listeners.append(listener)

    async def look_ahead(self, config: Config) -> Mapping[str, tuple[str, ...]]:
        """Find the replicas behind what a configuration follows that is new, within a few seconds.

        Return the addresses by URL, for `adopt`. Without them it would remove the replicas in force and only the next
        look-up would bring others.
        """
        urls = _followed(config) - _followed(self._config)
        services = _services(config) - _services(self._config)
        if services and self._endpoints is not None:
            self._endpoints.follow(services | _services(self._config), self.found)
            await self._endpoints.listed(RESOLVE_SECONDS)
        return await self._look_up_all(urls)

    def adopt(self, config: Config, addresses: Mapping[str, tuple[str, ...]] | None = None) -> None:
        """Use a new configuration: replicas that it does not contain get no new request.

        `addresses` are those that `look_ahead` found.
        """
        self._config = config
        self._addresses.update(addresses or {})
        self._follow()
        self._apply()

    async def begin(self) -> None:
        """Find the first replicas, within a few seconds."""
        self._follow()
        await self.look()
        if self._endpoints is not None:
            await self._endpoints.listed(RESOLVE_SECONDS)

    async def close(self) -> None:
        """Close the connections to the Kubernetes API."""
        if self._endpoints is not None:
            await self._endpoints.close()

    def found(self, service: Service, endpoints: tuple[Endpoint, ...]) -> None:
        """Use the endpoints that a Service has now."""
        self._found[service] = endpoints
        self._apply()

    def ranks_found(self, endpoint: ReplicaEndpoint, ranks: int) -> bool:
        """Treat an engine as `ranks` replicas from now on, unless the configuration sets the number of ranks.

        Return True if its replicas have changed; `endpoint` is then none of them any more.
        """
        name = endpoint.engine_name
        if not 1 <= ranks <= MAX_RANKS or ranks == self._ranks.get(name, 1):
            return False
        self._ranks[name] = ranks
        before = self.pools.served
        self._apply()
        if before == self.pools.served:
            return False
        log.info("%s has %d data-parallel ranks: each is a replica", name, ranks)
        return True

    async def look(self) -> None:
        """Resolve all names once and apply what changed."""
        fresh = await self._look_up_all(_followed(self._config))
        urls = _followed(self._config)  # a reload may have changed it meanwhile
        news = {url: each for url, each in fresh.items() if url in urls and each != self._addresses.get(url)}
        self._addresses = {url: each for url, each in self._addresses.items() if url in urls}
        if news:
            self._addresses.update(news)
            self._apply()

    async def run(self) -> None:
        """Look every few seconds until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()
            self.forget()

    def forget(self) -> None:
        """Drop what is kept for replicas that have been gone for a while and have no request left."""
        oldest = self._clock.monotonic() - FORGET_SECONDS
        for number in [number for number, since in self._gone.items() if since <= oldest]:
            if number not in self._fleet or not self._fleet.forget(number):
                continue
            del self._gone[number]
            self._told.pop(number, None)
            self._index.remove(number)
            endpoint = self.pools.forget(number)
            for listener in self._listeners:
                listener.replica_forgotten(number, endpoint)

    def _follow(self) -> None:
        services = _services(self._config)
        self._found = {service: found for service, found in self._found.items() if service in services}
        if self._endpoints is not None:
            self._endpoints.follow(services, self.found)

    async def _look_up_all(self, urls: Set[str]) -> dict[str, tuple[str, ...]]:
        """Return the addresses of each URL of which any were found."""
        found = await asyncio.gather(*(self._look_up(url) for url in urls))
        return {url: addresses for url, addresses in zip(urls, found, strict=True) if addresses}

    async def _look_up(self, url: str) -> tuple[str, ...]:
        parts = urlsplit(url)
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                found = await self._resolve(parts.hostname or "", parts.port or 80)
        except (OSError, UnicodeError) as error:  # TimeoutError too; UnicodeError for a label that is too long
            log.warning("cannot resolve %s: %s", parts.hostname, error or type(error).__name__)
            return ()
        return tuple(sorted(set(found)))

    def _apply(self) -> None:
        before = self._fleet.members()
        endpoints = {number: self.pools.backends[number] for number in before.values()}
        self.pools.adopt(self._enter())
        for name in before.keys() - {endpoint.name for endpoint in self._in_force()}:
            self._fleet.remove(before[name])
            self._gone.setdefault(before[name], self._clock.monotonic())
        for number in self.pools.served:
            self._gone.pop(number, None)
        joined = [number for number in self.pools.served if self.pools.backends[number] != endpoints.get(number)]
        for listener in self._listeners:
            listener.replicas_changed(joined)

    def _in_force(self) -> Iterator[ReplicaEndpoint]:
        return (self.pools.backends[number] for number in self.pools.served)

    def _enter(self) -> Pools:
        """Add every replica to the fleet, whose numbers identify them in the index too."""
        config = self._config
        backends: dict[int, ReplicaEndpoint] = {}
        for pool, replica, rank, is_far in self._replicas():
            spec = ReplicaSpec(
                replica.label, pool.name, replica.prefill_tokens_per_second, replica.max_concurrent, is_far
            )
            number = self._fleet.add(spec)
            backends[number] = _backend(pool, replica, rank, knows_clients=bool(config.clients))
            self._tell_index(number, _Keeping.of(pool, replica))
        default = config.default_pool
        knows_clients = bool(config.clients)
        is_open = config.server.open and not knows_clients
        served = [
            _served(pool, config.tenancy, knows_clients=knows_clients, is_open=is_open) for pool in config.pools
        ]
        return Pools(served, None if default is None else default.name, backends)

    def _tell_index(self, number: int, keeping: _Keeping) -> None:
        """Tell the index how a replica keeps prefixes, where that is new.

        A configured capacity is a first value, which responses correct; it may be wrong, so unlike an engine's report
        it is no bound. Without one, or if the kind has changed, what was known before no longer counts.
        """
        before = self._told.get(number)
        if keeping == before:
            return
        self._told[number] = keeping
        if before is not None or keeping.ttl_seconds is not None:
            self._index.set_ttl(number, keeping.ttl_seconds)
        if keeping.tokens is not None or (before is not None and not keeping.has_room_of(before)):
            self._index.set_capacity(number, None)
            self._index.set_budget(number, UNLIMITED_TOKENS if keeping.tokens is None else keeping.tokens)

    def _replicas(self) -> Iterator[tuple[Pool, Replica, int | None, bool]]:
        """Yield the replicas in force, their ranks, and whether they are in another zone.

        Each replica is yielded once: an address that two names have belongs to the first.
        """
        seen = set()
        for pool in self._config.pools:
            for replica in pool.replicas:
                for each, is_far in self._behind(replica):
                    if each.label not in seen:
                        seen.add(each.label)
                        ranks = each.ranks or self._ranks.get(each.label, 1)
                        yield from ((pool, ranked, rank, is_far) for ranked, rank in _ranked(each, ranks))

    def _behind(self, replica: Replica) -> Iterator[tuple[Replica, bool]]:
        if replica.is_service:
            service, url = _service(replica), ServiceUrl.parse(replica.url)
            own_zone, path = self._config.kubernetes.zone, "" if url is None else url.path
            for address, port, zone in self._found.get(service, ()):
                yield _at(replica, address, port, path), bool(own_zone and zone and zone != own_zone)
        elif replica.is_followed:
            parts = urlsplit(replica.url)
            for address in self._addresses.get(replica.url, ()):
                yield _at(replica, address, parts.port or 80, parts.path), False
        else:
            yield replica, False


def _followed(config: Config) -> set[str]:
    """Return the URLs that stand for every address of their host names."""
    return {replica.url for pool in config.pools for replica in pool.replicas if replica.is_followed}


def _services(config: Config) -> set[Service]:
    """Return the Services that the URLs of replicas name."""
    return {_service(replica) for pool in config.pools for replica in pool.replicas if replica.is_service}


def _service(replica: Replica) -> Service:
    """Return the Service that a replica's URL names; the configuration was checked."""
    url = ServiceUrl.parse(replica.url)
    assert url is not None  # noqa: S101
    return Service(url.service, url.namespace, url.port, replica.selector or "")


def _at(replica: Replica, address: str, port: int, path: str) -> Replica:
    """Return the replica at an address. It is named after the address, so that all proxies use the same name."""
    host = f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    return msgspec.structs.replace(replica, url=f"http://{host}:{port}{path}", name=None, selector=None)


def _served(pool: Pool, tenancy: Tenancy, *, knows_clients: bool, is_open: bool) -> ServedPool:
    is_provider = pool.kind is PoolKind.PROVIDER
    has_own_key = any(replica.key is not None for replica in pool.replicas)
    isolated = (is_provider and not has_own_key) or (pool.tenancy or tenancy) is Tenancy.ISOLATED
    return ServedPool(
        pool.name,
        pool.models,
        is_provider=is_provider,
        isolated=isolated,
        sends_cache_salt=pool.cache_salt,
        shares_key=knows_clients or has_own_key,
        has_own_key=has_own_key,
        accepts_any_key=has_own_key and is_open,
        optional=pool.optional,
    )


def _ranked(replica: Replica, ranks: int) -> Iterator[tuple[Replica, int | None]]:
    """Yield a replica, or one for each of its ranks: an engine keeps a cache for each."""
    if ranks == 1:
        yield replica, None
    else:
        for rank in range(ranks):
            yield msgspec.structs.replace(replica, name=rank_name(replica.label, rank), ranks=ranks), rank


def _backend(pool: Pool, replica: Replica, rank: int | None, *, knows_clients: bool) -> ReplicaEndpoint:
    origin = Origin.parse(replica.url)
    return ReplicaEndpoint(
        name=replica.label,
        pool=pool.name,
        url=replica.url,
        origin=origin,
        credential=None if replica.key is None else credential_of(replica.key.reveal(), replica.auth, origin.host),
        drops_credentials=knows_clients,
        is_provider=pool.kind is PoolKind.PROVIDER,
        capacity_tokens=replica.capacity_tokens,
        default_headers=default_headers_of(replica.auth, origin.host),
        rank=rank,
        ranks=replica.ranks or 1,
        engine_name=replica.label if rank is None else replica.label.rpartition("/")[0],
    )

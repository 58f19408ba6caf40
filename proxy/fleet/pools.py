"""Find the pool that serves a model, and the endpoint of each replica: the configuration as requests need it.

All phases share one object; a reload replaces its contents at once (`adopt`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from proxy.errors import NotFound
from proxy.patterns import matches_any
from proxy.upstream import Origin

_MODELS_REMEMBERED_AT_MOST = 1024


class ServedPool(msgspec.Struct, frozen=True):
    """A pool as requests see it.

    `isolated` means that every prefix chain is salted by the client's tenant. `sends_cache_salt` adds the field of
    that name to bodies. `shares_key` means that clients are served with a key of the operator's, or with none, and
    not with their own. `has_own_key` means that a replica's key is configured, so that the upstream cannot tell
    clients apart. `accepts_any_key` means that in addition anyone may use it: a key of a client is checked nowhere.
    `is_provider` means that placements end by time and that no prefix is warmed.
    """

    name: str
    models: tuple[str, ...]
    is_provider: bool = False
    isolated: bool = False
    sends_cache_salt: bool = False
    shares_key: bool = False
    has_own_key: bool = False
    accepts_any_key: bool = False
    optional: bool = False  # Cairn is ready without it


class ReplicaEndpoint(msgspec.Struct, frozen=True):
    """Address of a replica. `credential` is the header that replaces the client's own; None passes that on."""

    name: str
    pool: str
    url: str
    origin: Origin
    credential: tuple[bytes, bytes] | None = None
    drops_credentials: bool = False  # the client's key is for Cairn only
    is_provider: bool = False
    capacity_tokens: int | None = None  # as configured
    default_headers: tuple[tuple[bytes, bytes], ...] = ()  # sent unless the client sends one of that name
    rank: int | None = None  # the data-parallel rank, of `ranks` behind one URL
    ranks: int = 1
    engine_name: str = ""  # common to all ranks


class Pools:
    """Pools by model, and endpoints by replica number.

    `backends` is keyed by the fleet's numbers and may contain removed replicas; `served` are those in force.
    """

    def __init__(
        self, pools: Sequence[ServedPool], default: str | None, backends: Mapping[int, ReplicaEndpoint]
    ) -> None:
        self.all = tuple(pools)
        self.backends = dict(backends)
        self.served = frozenset(backends)
        self.default = next((pool for pool in pools if pool.name == default), None)
        self._found: dict[str, ServedPool] = {}

    def adopt(self, other: Pools) -> None:
        """Take over the contents of `other`; requests under way keep the pool that they have."""
        self.all, self.default, self._found = other.all, other.default, {}
        # removed replicas are kept until `forget`: requests under way may still need them
        self.backends.update(other.backends)
        self.served = other.served

    def forget(self, number: int) -> ReplicaEndpoint:
        """Remove and return the endpoint of a replica that is gone for good."""
        return self.backends.pop(number)

    def serving(self, model: str) -> ServedPool:
        """Return the first pool one of whose patterns matches `model`.

        Raises:
            NotFound: no pool serves the model.
        """
        pool = self._found.get(model)
        if pool is None:
            pool = self._search(model)
            if len(self._found) >= _MODELS_REMEMBERED_AT_MOST:
                self._found.clear()
            self._found[model] = pool
        return pool

    def successor(self, gone: ServedPool, model: str | None) -> ServedPool | None:
        """Return the pool that serves `model` in place of `gone`, which a reload has removed.

        None if `gone` is still there, or if no pool treats a request as that one did: it was read and checked so.
        """
        if any(pool.name == gone.name for pool in self.all):
            return None
        try:
            found = self.default if model is None else self.serving(model)
        except NotFound:
            return None
        if found is None:
            return None
        alike = msgspec.structs.replace(found, name=gone.name, models=gone.models, optional=gone.optional)
        return found if alike == gone else None

    def _search(self, model: str) -> ServedPool:
        for pool in self.all:
            if matches_any(model, pool.models):
                return pool
        raise NotFound("No such model is served here; GET /v1/models lists those that are.", param="model")

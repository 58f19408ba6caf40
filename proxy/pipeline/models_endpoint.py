"""`GET /v1/models` of all pools as one list.

One replica of each pool is asked, all at the same time. Each list is narrowed to what the pool's patterns serve and
the client may use; a model that several pools serve is taken from the first of them.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from proxy.clock import Clock
from proxy.downstream.response import Downstream
from proxy.errors import UpstreamError
from proxy.fleet import Fleet
from proxy.fleet.model_list import fetch_models
from proxy.fleet.pools import Pools, ServedPool
from proxy.model import Ending
from proxy.patterns import matches_any
from proxy.pipeline.exchange import Exchange
from proxy.records import Call, Tenant
from proxy.upstream import UpstreamClient

_JSON = (b"content-type", b"application/json")


class ModelsEndpoint:
    """Answers requests for the list of models. One per worker."""

    def __init__(self, client: UpstreamClient, pools: Pools, fleet: Fleet, clock: Clock) -> None:
        self._client = client
        self._pools = pools
        self._fleet = fleet
        self._clock = clock

    def merges_for(self, tenant: Tenant) -> bool:
        """Return True if the list must be merged here, False if the only replica's response may pass unchanged."""
        return tenant.is_limited or len(self._pools.all) > 1

    async def answer(self, exchange: Exchange, client: Downstream) -> None:
        """Write the merged list. Raises UpstreamError if no pool answered."""
        call = exchange.call
        asked = await asyncio.gather(*[self._of_pool(pool, call) for pool in self._pools.all], return_exceptions=True)
        merged: dict[str, dict[str, Any]] = {}
        failed: list[UpstreamError] = []
        for listed in asked:
            if isinstance(listed, UpstreamError):
                failed.append(listed)
            elif isinstance(listed, BaseException):
                raise listed
            else:
                for model in listed:
                    merged.setdefault(str(model.get("id")), model)
        if failed and not merged:
            raise failed[0]
        body = msgspec.json.encode({"object": "list", "data": list(merged.values())})
        exchange.status, exchange.ending = 200, Ending.COMPLETE
        client.send(200, b"OK", (_JSON, (b"x-request-id", call.request_id.encode())), body)

    async def _of_pool(self, pool: ServedPool, call: Call) -> list[dict[str, Any]]:
        """Return the models of one pool that the client may use, from its least busy replica."""
        views = self._fleet.snapshot(pool.name, self._clock.monotonic())
        usable = [view for view in views if view.available] or list(views)
        if not usable:
            return []
        least_busy = min(usable, key=lambda view: view.in_flight)
        listed = await fetch_models(self._client, self._pools.backends[least_busy.id], call)
        return [model for model in listed if _is_shown(str(model.get("id")), pool, call.tenant)]


def _is_shown(model: str, pool: ServedPool, tenant: Tenant) -> bool:
    return matches_any(model, pool.models) and matches_any(model, tenant.models)

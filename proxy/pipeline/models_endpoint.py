"""The models that all pools serve, as one list.

One replica of each pool is asked, all at once; each pool's list is narrowed to what its patterns serve, and the first
pool that has a model keeps it. It must not know prompts.
"""

from __future__ import annotations

import asyncio
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from proxy.clock import Clock
from proxy.downstream.response import Downstream
from proxy.errors import UpstreamError
from proxy.fleet import Fleet
from proxy.fleet.model_list import fetch_models
from proxy.fleet.pools import Pools, ServedPool
from proxy.model import Call, Ending
from proxy.pipeline.exchange import Exchange
from proxy.upstream import UpstreamClient

_JSON = (b"content-type", b"application/json")


class ModelsEndpoint:
    """Asks replicas what they serve."""

    def __init__(self, client: UpstreamClient, pools: Pools, fleet: Fleet, clock: Clock) -> None:
        self._client = client
        self._fleet = fleet
        self._clock = clock
        self.pools = pools

    async def answer(self, exchange: Exchange, client: Downstream) -> None:
        """Write the merged list. Raises UpstreamError where no pool answered."""
        call = exchange.call
        asked = await asyncio.gather(*[self._of_pool(pool, call) for pool in self.pools.all], return_exceptions=True)
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
        views = self._fleet.snapshot(pool.name, self._clock.monotonic())
        usable = [view for view in views if view.available] or list(views)
        least_busy = min(usable, key=lambda view: view.in_flight)
        listed = await fetch_models(self._client, self.pools.backends[least_busy.id], call)
        return [model for model in listed if _serves(pool, str(model.get("id"))) and _allowed(call, model)]


def _serves(pool: ServedPool, model: str) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in pool.models)


def _allowed(call: Call, model: dict[str, Any]) -> bool:
    return any(fnmatchcase(str(model.get("id")), pattern) for pattern in call.tenant.models)

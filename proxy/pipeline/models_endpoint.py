"""`GET /v1/models` of all pools as one list.

One replica of each pool is asked, all at the same time, and another one if it does not answer; where the replicas of
a pool are known to list different models, as many as list all of them. Each list is narrowed to what the pool's
patterns serve and the client may use; a model that several pools serve is taken from the first of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from proxy.clock import Clock
from proxy.downstream.response import Downstream
from proxy.errors import FirstByteTimeout, UpstreamError
from proxy.fleet import Fleet
from proxy.fleet.model_list import fetch_models
from proxy.fleet.pools import Pools, ReplicaEndpoint, ServedPool
from proxy.model import Ending
from proxy.patterns import matches_any
from proxy.pipeline.exchange import Exchange
from proxy.records import Call, Tenant
from proxy.upstream import UpstreamClient

_JSON = (b"content-type", b"application/json")
_MOST_ASKED: Final = 3  # replicas of one pool, as for other requests by default
_MOST_LISTS: Final = 16  # replicas of one pool with different lists

LIST_SECONDS: Final = 5.0
"""Time in which a replica must send its list, which engines have in memory. One that hangs must not hide the models
of all others for as long as a prompt may take."""


class ModelsEndpoint:
    """Answers requests for the list of models. One per worker. A replica has `list_seconds` to send its list."""

    def __init__(
        self, client: UpstreamClient, pools: Pools, fleet: Fleet, clock: Clock, *, list_seconds: float = LIST_SECONDS
    ) -> None:
        self._client = client
        self._pools = pools
        self._fleet = fleet
        self._clock = clock
        self._list_seconds = list_seconds

    def merges_for(self, tenant: Tenant) -> bool:
        """Return True if the list must be merged here, False if the only replica's response may pass unchanged."""
        pools = self._pools.all
        return (
            tenant.is_limited or len(pools) > 1 or any(self._fleet.models.lists_differ(each.name) for each in pools)
        )

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
        """Return the models of one pool that the client may use, from the least busy replicas that answer.

        Raises UpstreamError if none does.
        """
        views = self._fleet.snapshot(pool.name, self._clock.monotonic())
        usable = [view for view in views if view.available] or list(views)
        numbers = [view.id for view in sorted(usable, key=lambda view: view.in_flight)]
        models = self._fleet.models
        needed = models.listing_all(pool.name, numbers)[:_MOST_LISTS] if models.lists_differ(pool.name) else []
        if len(needed) > 1:
            listed = await self._of_all(needed, call)
        else:
            listed = await self._of_first(numbers[:_MOST_ASKED], call)
        return [model for model in listed if _is_shown(str(model.get("id")), pool, call.tenant)]

    async def _of_first(self, numbers: Sequence[int], call: Call) -> list[dict[str, Any]]:
        """Return the list of the first replica that answers. Raises UpstreamError if none does."""
        failed: UpstreamError | None = None
        for number in numbers:
            try:
                return await self._of_replica(self._pools.backends[number], call)
            except UpstreamError as error:
                failed = failed or error
        if failed is not None:
            raise failed
        return []

    async def _of_all(self, numbers: Sequence[int], call: Call) -> list[dict[str, Any]]:
        """Return what any of the replicas lists. Raises UpstreamError if none answers."""
        lists = await asyncio.gather(*[self._of_first((number,), call) for number in numbers], return_exceptions=True)
        found: list[dict[str, Any]] = []
        failed: list[BaseException] = []
        for listed in lists:
            if isinstance(listed, BaseException):
                failed.append(listed)
            else:
                found += listed
        if len(failed) == len(lists) or not all(isinstance(error, UpstreamError) for error in failed):
            raise failed[0]
        return found

    async def _of_replica(self, endpoint: ReplicaEndpoint, call: Call) -> list[dict[str, Any]]:
        try:
            async with asyncio.timeout(self._list_seconds):
                return await fetch_models(self._client, endpoint, call)
        except TimeoutError:
            raise FirstByteTimeout("The upstream did not send its list of models in time.") from None


def _is_shown(model: str, pool: ServedPool, tenant: Tenant) -> bool:
    return matches_any(model, pool.models) and matches_any(model, tenant.models)

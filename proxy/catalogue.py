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
from proxy.downstream import Downstream
from proxy.errors import BadAnswer, UpstreamError
from proxy.fleet import Fleet
from proxy.journey import Journey
from proxy.model import Call, Ending
from proxy.pools import Backend, Pools, ServedPool
from proxy.upstream import UpstreamClient
from proxy.wire.headers import upstream_head

_LIST_AT_MOST_BYTES = 8 * 1024 * 1024
_JSON = (b"content-type", b"application/json")


class _Listing(msgspec.Struct):
    data: list[dict[str, Any]] = []


_decode_listing = msgspec.json.Decoder(_Listing).decode


class Catalogue:
    """Asks replicas what they serve."""

    def __init__(self, client: UpstreamClient, pools: Pools, fleet: Fleet, clock: Clock) -> None:
        self._client = client
        self._fleet = fleet
        self._clock = clock
        self.pools = pools

    async def answer(self, journey: Journey, client: Downstream) -> None:
        """Write the merged list. Raises UpstreamError where no pool answered."""
        call = journey.call
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
        journey.status, journey.ending = 200, Ending.COMPLETE
        client.send(200, b"OK", (_JSON, (b"x-request-id", call.request_id.encode())), body)

    async def listed_by(self, backend: Backend, call: Call | None = None) -> list[dict[str, Any]]:
        """What one replica lists, asked with its own key or the caller's.

        Raises:
            UpstreamError: it did not answer, or with something that is no list.
        """
        head = upstream_head(
            call.headers if call is not None else (),
            request_id=call.request_id if call is not None else "models",
            credential=backend.credential,
            drop_credentials=backend.drops_credentials,
            identity=True,
        )
        answer = await self._client.request(backend.origin, b"GET", b"/v1/models", head, retry_reused=True)
        try:
            body = await answer.read(_LIST_AT_MOST_BYTES)
        finally:
            answer.abort()
        if answer.status != 200:
            raise BadAnswer(f"The upstream answered the list of models with status {answer.status}.")
        try:
            return _decode_listing(body).data
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise BadAnswer("The upstream's list of models cannot be read.") from None

    async def _of_pool(self, pool: ServedPool, call: Call) -> list[dict[str, Any]]:
        views = self._fleet.snapshot(pool.name, self._clock.monotonic())
        usable = [view for view in views if view.available] or list(views)
        least_busy = min(usable, key=lambda view: view.in_flight)
        listed = await self.listed_by(self.pools.backends[least_busy.id], call)
        return [model for model in listed if _serves(pool, str(model.get("id"))) and _allowed(call, model)]


def _serves(pool: ServedPool, model: str) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in pool.models)


def _allowed(call: Call, model: dict[str, Any]) -> bool:
    return any(fnmatchcase(str(model.get("id")), pattern) for pattern in call.tenant.models)

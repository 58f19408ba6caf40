"""One tenant's calls about stored contexts to a whole worker before one scripted engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp

from proxy.config.schema import Contexts
from proxy.metrics import definitions as metrics
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import Valkey, eventually

DOCUMENT = "Waymarks stand where paths part. " * 2000
STORED: list[Any] = [{"role": "system", "content": DOCUMENT}]
QUESTION: dict[str, Any] = {"role": "user", "content": "Where do waymarks stand?"}
MODEL = "test-model"


class Client:
    """One tenant's calls to one Cairn."""

    def __init__(self, http: aiohttp.ClientSession, cairn: Cairn, key: str = "sk-one") -> None:
        self.http = http
        self.cairn = cairn
        self.headers = {"authorization": f"Bearer {key}"}

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, JSON and headers."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        async with self.http.request(
            method, self.cairn.url + path, data=data, headers={**self.headers, **headers}
        ) as answer:
            text = await answer.read()
            kind = answer.headers.get("content-type", "")
            return answer.status, json.loads(text) if kind.startswith("application/json") else text, answer.headers

    async def put(self, messages: Any = STORED, **fields: Any) -> Any:
        """A new context. Asks again as long as Redis is too slow for it, as on a busy machine."""
        asked = {"model": MODEL, "messages": messages, "ttl": 600, **fields}
        last: list[tuple[int, Any]] = []

        async def is_decided() -> bool:
            status, made, _ = await self.call("POST", "/caching", asked)
            last[:] = [(status, made)]
            return status != HTTPStatus.SERVICE_UNAVAILABLE

        await eventually(is_decided)
        status, made = last[0]
        assert status == HTTPStatus.OK, made
        return made

    async def ready(self, context_id: str) -> Any:
        """The context once it is warmed."""
        found: dict[str, Any] = {}

        async def is_ready() -> bool:
            found.update((await self.call("GET", f"/caching/{context_id}"))[1])
            return bool(found["status"] != "pending")

        await eventually(is_ready)
        return found

    async def ask(self, reference: str, **fields: Any) -> tuple[int, Any, Any]:
        """A question on a context."""
        messages = [{"role": "cache", "content": reference}, QUESTION]
        return await self.call("POST", "/chat/completions", {"model": MODEL, "messages": messages, **fields})


def gauge(cairn: Cairn, spec: metrics.Spec) -> float:
    """A gauge's value by now."""
    cairn.worker.reporter.report()
    assert cairn.heard.last is not None
    return next(value for number, _, value in cairn.heard.last.counts.gauges if number == spec.number)


@asynccontextmanager
async def serving(redis: Valkey, **contexts: Any) -> AsyncIterator[tuple[Client, OpenAIUpstream]]:
    """One Cairn before one engine, and a client of it."""
    redis.flush()
    async with OpenAIUpstream() as upstream:
        config = config_for([upstream.url], redis.url, contexts=Contexts(**contexts))
        async with running(config) as cairn, aiohttp.ClientSession() as http:
            yield Client(http, cairn), upstream


@asynccontextmanager
async def two_proxies(redis: Valkey) -> AsyncIterator[tuple[Client, Client, OpenAIUpstream]]:
    """Two Cairns that share a Redis and an engine, and a client of each."""
    redis.flush()
    async with OpenAIUpstream() as upstream:
        config = config_for([upstream.url], redis.url, contexts=Contexts(warm_replicas=0))
        async with running(config) as one, running(config) as two, aiohttp.ClientSession() as http:
            yield Client(http, one), Client(http, two), upstream

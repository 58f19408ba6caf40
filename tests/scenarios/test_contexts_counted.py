"""Counts about stored contexts: tokens of parts without text, and only requests that really used one."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import msgspec
import pytest

from proxy.config.schema import Contexts
from proxy.control.messages import Explain
from proxy.metrics import definitions as metrics
from proxy.routing.token_estimate import FIRST_MEDIA_TOKENS, FIRST_TOKENS_PER_BYTE
from tests.support.context_client import MODEL, QUESTION, STORED, Client, serving
from tests.support.valkey import Valkey


async def explained(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of `/explain` for a chat."""
    worker = client.cairn.worker
    question = Explain(1, "/v1/chat/completions", json.dumps(body).encode(), b"sk-one")
    _, told = await worker.explainer.explain(question, worker.http_server.authenticator)
    found: dict[str, Any] = json.loads(told)
    return found


async def test_a_stored_picture_is_counted_by_its_kind_and_not_by_its_bytes(redis: Valkey) -> None:
    """When it is stored, when it is used by its id, and what is learned of text meanwhile."""
    picture = "data:image/png;base64," + base64.b64encode(random.Random(3).randbytes(300_000)).decode()
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": picture}}]
    async with serving(redis, warm_replicas=0) as (client, _):
        made = await client.put([*STORED, {"role": "user", "content": parts}])
        text_tokens = len(json.dumps(STORED)) * FIRST_TOKENS_PER_BYTE
        assert made["tokens"] == pytest.approx(text_tokens + FIRST_MEDIA_TOKENS["image"], rel=0.1)
        named = {"model": MODEL, "messages": [{"role": "cache", "content": f"cache_id={made['id']}"}, QUESTION]}
        assert (await explained(client, named))["prompt_tokens"] == pytest.approx(made["tokens"], rel=0.1)
        assert (await client.ask(f"cache_id={made['id']}"))[0] == 200
        assert client.cairn.worker.accounting.token_counts.tokens_per_byte(MODEL) == FIRST_TOKENS_PER_BYTE


async def test_what_is_only_explained_is_no_use(redis: Valkey) -> None:
    """This holds for a context that exists and for one that does not; a question that is asked counts once."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        made = await client.put()
        named = {"model": MODEL, "messages": [{"role": "cache", "content": f"cache_id={made['id']}"}, QUESTION]}
        unknown = named | {"messages": [{"role": "cache", "content": "tag=nothing"}, QUESTION]}
        assert (await explained(client, named))["reason"] == "only"
        assert "error" in await explained(client, unknown)
        assert client.cairn.count(metrics.CONTEXT_USES) == 0
        assert upstream.generations == []
        assert (await client.call("POST", "/chat/completions", named))[0] == 200
        assert (await client.call("POST", "/chat/completions", unknown))[0] == 404
        assert client.cairn.count(metrics.CONTEXT_USES, ("used",)) == 1
        assert client.cairn.count(metrics.CONTEXT_USES, ("unknown",)) == 1


async def test_a_reload_changes_what_contexts_may_take_and_how_they_are_made(redis: Valkey) -> None:
    """Budgets, quotas, the usual time to live and the warming follow at once; what is stored stays."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        made = await client.put()
        worker = client.cairn.worker

        async def reload(**contexts: Any) -> None:
            await worker.live.reconfigure(msgspec.structs.replace(worker.live.config, contexts=Contexts(**contexts)))

        await reload(max_contexts=1)
        body = {"model": MODEL, "messages": [QUESTION]}
        assert (await client.call("POST", "/caching", body))[0] == 429
        await reload(max_contexts=2, default_ttl_seconds=50, warm_replicas=1)
        status, second, _ = await client.call("POST", "/caching", body)
        assert status == 200, second
        assert second["status"] == "pending"
        assert second["expired_at"] - second["created_at"] == 50
        assert (await client.ready(second["id"]))["status"] == "ready"
        assert len(upstream.generations) == 1
        assert (await client.ask(f"cache_id={made['id']}"))[0] == 200

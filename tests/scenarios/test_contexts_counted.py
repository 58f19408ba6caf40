"""What is counted of stored contexts: tokens of what is no text, and only what really used one."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import pytest

from proxy.control import Explain
from proxy.tokens import FIRST_MEDIA_TOKENS, FIRST_TOKENS_PER_BYTE
from tests.support.context_client import MODEL, QUESTION, STORED, Client, serving
from tests.support.valkey import Valkey


async def explained(client: Client, body: dict[str, Any]) -> dict[str, Any]:
    """What `/explain` says of a chat."""
    worker = client.cairn.worker
    question = Explain(1, "/v1/chat/completions", json.dumps(body).encode(), b"sk-one")
    status, told = await worker.explainer.explain(question, worker.front.doorkeeper)
    assert status == 200, told
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
        assert client.cairn.worker.tokens.tokens_per_byte(MODEL) == FIRST_TOKENS_PER_BYTE

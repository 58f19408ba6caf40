"""What a tenant stored gives it no more than it may send: files, models and objects of others stay out of reach."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from proxy.config.schema import Config, Pool, Replica, Secret, Server
from tests.scenarios.test_rules import CHEAP, CLIENTS, FREE, OTHER, status_of
from tests.support.cairn import Cairn, config_for, running
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import Valkey

USER = {"role": "user", "content": "q"}
TOOL = {"type": "file_search", "vector_store_ids": ["file-1"]}


def shared(url: str, redis: Valkey, **server: Any) -> Config:
    """One pool whose replica has a key of the operator's, for three clients, and a store."""
    pool = Pool(name="p", replicas=(Replica(url, key=Secret("sk-operator")),))
    return config_for((), redis.url, pools=(pool,), clients=CLIENTS, server=Server(port=0, **server))


@asynccontextmanager
async def proxied(redis: Valkey, **server: Any) -> AsyncIterator[tuple[OpenAIUpstream, Cairn]]:
    """An upstream behind such a proxy."""
    models = ("cheap", "dear")
    async with OpenAIUpstream(models=models) as upstream, running(shared(upstream.url, redis, **server)) as cairn:
        yield upstream, cairn


async def stored(http: aiohttp.ClientSession, cairn: Cairn, headers: dict[str, str], **fields: Any) -> str:
    """The id of a new context."""
    body = {"model": "cheap", "messages": [USER], "ttl": 60, **fields}
    async with http.post(f"{cairn.url}/caching", json=body, headers=headers) as answer:
        assert answer.status == 200
        made: str = (await answer.json())["id"]
        return made


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "ms://file-1"}}]}]},
        {"messages": [{"role": "user", "content": "x" * 300_000}], "tools": [TOOL]},
    ],
)
async def test_a_stored_context_brings_nobody_anothers_object(http, redis: Valkey, fields: dict[str, Any]) -> None:
    """Neither where it is used nor where it is warmed: what is inserted is checked like what is sent."""
    async with proxied(redis) as (upstream, cairn):
        upstream.answers["/v1/files"] = b'{"id":"file-1"}'
        assert await status_of(http, cairn, "POST", "/v1/files", data=b"", headers=FREE) == 200
        for headers, status in ((OTHER, 404), (FREE, 200)):
            before = len([asked for asked in upstream.generations if b"file-1" in asked.body])
            context_id = await stored(http, cairn, headers, **fields)
            chat = {"model": "cheap", "messages": [{"role": "cache", "content": f"cache_id={context_id}"}, USER]}
            assert await status_of(http, cairn, "POST", "/v1/chat/completions", json=chat, headers=headers) == status
            reached = [asked for asked in upstream.generations if b"file-1" in asked.body]
            assert (len(reached) > before) is (status == 200)


async def test_a_stored_context_runs_no_model_that_its_user_may_not_use(http, redis: Valkey) -> None:
    """A hosted tool may name one, or leave the choice to the upstream; another client may use the same tool."""
    async with proxied(redis) as (upstream, cairn):
        for tool in ({"type": "image_generation", "model": "dear"}, {"type": "image_generation"}):
            for headers, status in ((CHEAP, 403), (FREE, 200)):
                context_id = await stored(http, cairn, headers, tools=[tool])
                chat = {"model": "cheap", "messages": [{"role": "cache", "content": f"cache_id={context_id}"}, USER]}
                asked = {"json": chat, "headers": headers}
                assert await status_of(http, cairn, "POST", "/v1/chat/completions", **asked) == status
            drawn = [b"image_generation" in asked.body for asked in upstream.generations]
            assert any(drawn)
            upstream.requests.clear()


@pytest.mark.parametrize(
    "sent",
    [
        ("x-goog-api-key", ""),
        ("ocp-apim-subscription-key", ""),
        ("x-litellm-api-key", ""),
        ("accept", "?key="),
        ("accept", "?api-key="),
    ],
)
async def test_clients_whose_keys_come_in_another_header_or_the_query_are_not_one(http, redis: Valkey, sent) -> None:
    """Without listed clients, each key is a tenant, wherever the upstream takes it from."""
    name, parameter = sent
    async with OpenAIUpstream() as upstream, running(config_for((upstream.url,), redis.url)) as cairn:

        async def status(method: str, path: str, key: str, **kwargs: Any) -> int:
            path += f"{parameter}{key}" if parameter else ""
            return await status_of(http, cairn, method, path, headers={name: key}, **kwargs)

        body = {"model": "test-model", "messages": [USER], "ttl": 60, "tags": ["mine"]}
        assert await status("POST", "/v1/caching", "K1", json=body) == 200
        assert await status("GET", "/v1/caching/refs/tags/mine", "K1") == 200
        assert await status("GET", "/v1/caching/refs/tags/mine", "K2") == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("fine_tuning/jobs", {"model": "m", "training_file": "file-1"}),
        ("fine_tuning/jobs", {"model": "m", "training_file": "file-2", "Validation_File": "file-1"}),
        ("vector_stores", {"file_ids": ["file-1"]}),
        ("vector_stores/vs/files", {"file_id": "file-1"}),
        ("evals/e/runs", {"data_source": {"type": "jsonl", "source": {"type": "file_id", "id": "file-1"}}}),
    ],
)
async def test_a_path_that_is_open_to_all_opens_nobody_anothers_file(
    http, redis: Valkey, path: str, body: Any
) -> None:
    """The operator opened the path and not the files: those of others are as unknown there as elsewhere."""
    allowed = ("/v1/fine_tuning/*", "/v1/vector_stores*", "/v1/evals/*")
    async with proxied(redis, allowed_paths=allowed) as (upstream, cairn):
        for file_id, headers in (("file-1", FREE), ("file-2", FREE), ("file-2", OTHER)):
            upstream.answers["/v1/files"] = b'{"id":"%b"}' % file_id.encode()
            assert await status_of(http, cairn, "POST", "/v1/files", data=b"", headers=headers) == 200
        upstream.answers[f"/v1/{path}"] = b'{"id":"file-1"}'
        for headers, status in ((OTHER, 404), (FREE, 200)):
            assert await status_of(http, cairn, "POST", f"/v1/{path}", json=body, headers=headers) == status
        assert await status_of(http, cairn, "POST", f"/v1/{path}", json={"model": "m"}, headers=OTHER) == 200
    async with proxied(redis, allowed_paths=(*allowed, "/v1/files/*")) as (_, cairn):
        assert await status_of(http, cairn, "POST", f"/v1/{path}", json=body, headers=OTHER) == 200

"""Stored contexts through whole workers: made, found, used, moved, and every way in which they can be refused."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from proxy.config.schema import Contexts, Pool, PoolKind, Replica
from proxy.metrics import definitions as metrics
from tests.support.cairn import config_for, running
from tests.support.context_client import DOCUMENT, MODEL, QUESTION, STORED, Client, gauge, serving, two_proxies
from tests.support.openai_upstream import Failure, OpenAIUpstream
from tests.support.valkey import Valkey, eventually, seconds_until

SOON_SECONDS = 0.1

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


async def test_the_upstream_gets_what_a_client_would_have_sent(redis: Valkey) -> None:
    """Stored bytes as uploaded, white space and all, and the stored tools; the rest as it was sent."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        upload = (
            b'{"model":"test-model", "messages" : [ {"content":"h\\u00e9 \xc3\xa9 1.0e0","role":"system"} ,\n'
            b'{"role":"user","content":"a"} ] , "tools": [ {"type":"function","function":{"name":"find"}} ],"ttl":60}'
        )
        status, made, _ = await client.call("POST", "/caching", upload)
        assert status == 200
        question = (
            b'{"model":"test-model", "messages": [{"role":"cache","content":"cache_id=%b"} , '
            b'{"role":"user","content":"q"}], "temperature":1.00}' % made["id"].encode()
        )
        status, _, headers = await client.call("POST", "/chat/completions", question)
        assert status == 200
        assert upstream.generations[-1].body == (
            b'{"tools":[ {"type":"function","function":{"name":"find"}} ],"model":"test-model", "messages": '
            b'[{"content":"h\\u00e9 \xc3\xa9 1.0e0","role":"system"} ,\n{"role":"user","content":"a"} , '
            b'{"role":"user","content":"q"}], "temperature":1.00}'
        )
        assert headers["msh-context-cache-id"] == made["id"]
        assert abs(int(headers["msh-context-cache-token-exp"]) - made["expired_at"]) <= 1


async def test_a_new_context_is_warmed_and_its_tokens_are_the_upstreams(redis: Valkey) -> None:
    """Pending at first, usable at once; then ready with the count of the context alone."""
    async with serving(redis) as (client, upstream):
        upstream.gate = asyncio.Event()
        made = await client.put()
        assert made["status"] == "pending"
        assert made["messages"] == STORED
        asked = asyncio.ensure_future(client.ask(f"cache_id={made['id']}"))  # noqa: TID251
        upstream.gate.set()
        assert (await asked)[0] == 200
        ready = await client.ready(made["id"])
        assert ready["status"] == "ready"
        assert abs(ready["tokens"] - len(json.dumps(STORED)) / 4) < 0.02 * ready["tokens"]
        warming = next(asked.json() for asked in upstream.generations if asked.json().get("max_tokens") == 1)
        assert warming["messages"] == [*STORED, {"role": "user", "content": "."}]
        status, answer, headers = await client.ask(f"cache_id={made['id']}")
        assert status == 200
        saved = int(headers["msh-context-cache-token-saved"])
        assert saved == answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert abs(saved - ready["tokens"]) < 0.02 * ready["tokens"]


async def test_the_saving_of_a_stream_is_said_by_its_usage_and_not_by_a_header(redis: Valkey) -> None:
    """The headers go out before the upstream has said anything."""
    async with serving(redis, warm_replicas=0) as (client, _):
        made = await client.put()
        await client.ask(f"cache_id={made['id']}")
        status, text, headers = await client.ask(
            f"cache_id={made['id']}", stream=True, stream_options={"include_usage": True}
        )
        assert status == 200
        assert headers["msh-context-cache-id"] == made["id"]
        assert "msh-context-cache-token-saved" not in headers
        assert b'"cached_tokens": ' in text


async def test_the_flow_of_create_list_get_change_and_delete(redis: Valkey) -> None:
    """Paging both ways, the filter by metadata, the object's fields, and 404 after the end."""
    async with serving(redis, warm_replicas=0) as (client, _):
        made = [await client.put(name=f"n{n}", metadata={"n": str(n), "all": "yes"}) for n in range(5)]
        ids = [one["id"] for one in made]
        assert all(re.fullmatch("cache-[0-9a-f]{32}", one) for one in ids)
        assert made[0]["object"] == "context_cache_object"
        assert made[0]["status"] == "ready"

        async def page(query: str) -> list[str]:
            status, listed, _ = await client.call("GET", f"/caching?{query}")
            assert status == 200
            assert listed["object"] == "list"
            return [row["id"] for row in listed["data"]]

        assert await page("") == ids[::-1]
        assert await page("order=asc&limit=2") == ids[:2]
        assert await page(f"order=asc&limit=2&after={ids[1]}") == ids[2:4]
        assert await page(f"order=asc&limit=2&before={ids[4]}") == ids[2:4]
        assert await page("metadata[n]=3&metadata[all]=yes") == [ids[3]]
        status, changed, _ = await client.call("PUT", f"/caching/{ids[0]}", {"metadata": {"x": "y"}, "ttl": 5000})
        assert status == 200
        assert changed["metadata"] == {"x": "y"}
        assert 4900 < changed["expired_at"] - changed["created_at"] < 5100
        status, gone, _ = await client.call("DELETE", f"/caching/{ids[0]}")
        assert gone == {"deleted": True, "id": ids[0], "object": "context_cache_object.deleted"}
        for method in ("GET", "PUT", "DELETE"):
            status, error, _ = await client.call(method, f"/caching/{ids[0]}", {} if method == "PUT" else None)
            assert status == 404
            assert error["error"]["type"] == "resource_not_found_error"
        assert client.cairn.count(metrics.CONTEXTS_EVICTED, ("deleted",)) == 1
        assert gauge(client.cairn, metrics.CONTEXTS) == 4
        assert gauge(client.cairn, metrics.CONTEXTS_BYTES) > 0


async def test_tags_are_made_moved_listed_and_deleted(redis: Valkey) -> None:
    """A tag posted again names another context; the content behind it is that one's."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        one, two = await client.put(tags=["first"]), await client.put([{"role": "system", "content": "two"}])
        for made in (one, two):
            status, tag, _ = await client.call(
                "POST", "/caching/refs/tags", {"tag": "book.v-1_x", "cache_id": made["id"]}
            )
            assert status == 200
            assert (tag["cache_id"], tag["object"], tag["tag"]) == (made["id"], "cache_object.tag", "book.v-1_x")
            assert {"created_at", "owned_by"} <= tag.keys()
            status, content, _ = await client.call("GET", "/caching/refs/tags/book.v-1_x/content")
            assert content["messages"] == made["messages"]
            assert (await client.ask("tag=book.v-1_x"))[0] == 200
            assert upstream.generations[-1].json()["messages"] == [*made["messages"], QUESTION]
        _, listed, _ = await client.call("GET", "/caching/refs/tags?order=asc")
        assert [tag["tag"] for tag in listed["data"]] == ["first", "book.v-1_x"]
        assert (await client.call("GET", "/caching/refs/tags/first"))[1]["cache_id"] == one["id"]
        for _ in range(2):
            status, gone, _ = await client.call("DELETE", "/caching/refs/tags/first")
            assert (status, gone) == (200, {"deleted": True, "object": "cache_object.tag.deleted", "tag": "first"})
        assert (await client.call("GET", "/caching/refs/tags/first"))[0] == 404
        await client.call("DELETE", f"/caching/{two['id']}")
        assert (await client.ask("tag=book.v-1_x"))[0] == 404


async def test_what_is_not_there_and_what_is_anothers_look_the_same(redis: Valkey) -> None:
    """Ids and tags, in the API and in a chat, byte for byte."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        made = await client.put(tags=["mine"])
        other = Client(client.http, client.cairn, "sk-two")
        unknown = "cache-" + "0" * 32
        for theirs, nothing in (
            (f"/caching/{made['id']}", f"/caching/{unknown}"),
            ("/caching/refs/tags/mine", "/caching/refs/tags/none"),
            ("/caching/refs/tags/mine/content", "/caching/refs/tags/none/content"),
        ):
            seen = [await other.call("GET", path) for path in (theirs, nothing)]
            assert seen[0][0] == seen[1][0] == 404
            assert seen[0][1] == seen[1][1]
        for theirs, nothing in ((f"cache_id={made['id']}", f"cache_id={unknown}"), ("tag=mine", "tag=none")):
            asked = [await other.ask(reference) for reference in (theirs, nothing)]
            assert asked[0][0] == asked[1][0] == 404
            assert asked[0][1] == asked[1][1]
        for cache_id in (made["id"], unknown, "nonsense"):
            body = {"tag": "x", "cache_id": cache_id}
            assert (await other.call("POST", "/caching/refs/tags", body))[0] == 404
        assert (await other.call("GET", "/caching"))[1]["data"] == []
        assert upstream.generations == []


CACHE = {"role": "cache", "content": "tag=t"}
CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "find", "arguments": "{}"}}]}  # fmt: skip
ANSWER = {"role": "tool", "tool_call_id": "c1", "content": "found"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": STORED}, "model"),
        ({"model": 7, "messages": STORED}, "model"),
        ({"model": MODEL}, "messages"),
        ({"model": MODEL, "messages": []}, "messages"),
        ({"model": MODEL, "messages": {}}, "messages"),
        ({"model": MODEL, "messages": ["x"]}, "messages[0]"),
        ({"model": MODEL, "messages": [{"role": "cache", "content": "x"}]}, "messages[0].role"),
        ({"model": MODEL, "messages": [{"role": "user"}]}, "messages[0].content"),
        ({"model": MODEL, "messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"model": MODEL, "messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content"),
        ({"model": MODEL, "messages": [ANSWER]}, "messages[0].tool_call_id"),
        ({"model": MODEL, "messages": [CALL, ANSWER]}, "tools"),
        ({"model": MODEL, "messages": STORED, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"model": MODEL, "messages": STORED, "tools": {}}, "tools"),
        ({"model": MODEL, "messages": STORED, "name": "x" * 257}, "name"),
        ({"model": MODEL, "messages": STORED, "description": "x" * 513}, "description"),
        ({"model": MODEL, "messages": STORED, "metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"model": MODEL, "messages": STORED, "metadata": {"k" * 65: ""}}, "metadata"),
        ({"model": MODEL, "messages": STORED, "metadata": {"k": "v" * 513}}, "metadata"),
        ({"model": MODEL, "messages": STORED, "metadata": {"k": 1}}, "metadata"),
        ({"model": MODEL, "messages": STORED, "tags": ["ok", "1st"]}, "tags[1]"),
        ({"model": MODEL, "messages": STORED, "tags": "x"}, "tags"),
        ({"model": MODEL, "messages": STORED, "ttl": 60, "expired_at": 4_000_000_000}, "expired_at"),
        ({"model": MODEL, "messages": STORED, "expired_at": 1_000_000_000}, "expired_at"),
        ({"model": MODEL, "messages": STORED, "ttl": 0}, "ttl"),
        ({"model": MODEL, "messages": STORED, "ttl": "60"}, "ttl"),
    ],
)
async def test_an_upload_that_chat_would_refuse_names_its_field(redis: Valkey, body: Any, param: str) -> None:
    """400 `invalid_request_error`, and nothing is stored."""
    async with serving(redis, warm_replicas=0) as (client, _):
        status, answer, _ = await client.call("POST", "/caching", body)
        assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "invalid_request_error", param)
        assert (await client.call("GET", "/caching"))[1]["data"] == []


async def test_a_tool_answer_with_its_call_and_tool_is_taken(redis: Valkey) -> None:
    """A whole exchange can be stored, and content in parts."""
    async with serving(redis, warm_replicas=0) as (client, _):
        parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
        made = await client.put([parts, CALL, ANSWER], tools=[TOOL])
        assert made["tools"] == [TOOL]
        assert made["messages"] == [parts, CALL, ANSWER]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": [QUESTION, CACHE]}, "messages[1].role"),
        ({"messages": [CACHE, CACHE]}, "messages[1].role"),
        ({"messages": [CACHE, QUESTION], "tools": [TOOL]}, "tools"),
        ({"messages": [CACHE, QUESTION], "functions": []}, "functions"),
        *[
            ({"messages": [{"role": "cache", "content": content}, QUESTION]}, "messages[0].content")
            for content in (
                "",
                "tag=",
                "tag=t;",
                "tag=t;tag=u",
                "cache_id=c;tag=t",
                "reset_ttl=5",
                "tag=t;x=1",
                "tag=t;reset_ttl=0",
                "tag=t;reset_ttl=-1",
                "tag=t;reset_ttl=1e3",
                "tag=t;dry_run=yes",
                None,
                [{"type": "text", "text": "tag=t"}],
            )
        ],
    ],
)
async def test_a_malformed_use_names_its_field(redis: Valkey, change: Any, param: str) -> None:
    """400, and the upstream receives nothing."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        await client.put(tags=["t"])
        status, answer, _ = await client.call("POST", "/chat/completions", {"model": MODEL, **change})
        assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "invalid_request_error", param)
        assert upstream.generations == []


@pytest.mark.parametrize("tag", ["1st", "a" * 129, "", "a b", "é", "-a", 5])
async def test_a_tag_that_is_none_is_refused(redis: Valkey, tag: Any) -> None:
    """First a letter, then letters, digits and three signs, 128 at most."""
    async with serving(redis, warm_replicas=0) as (client, _):
        made = await client.put()
        status, answer, _ = await client.call("POST", "/caching/refs/tags", {"tag": tag, "cache_id": made["id"]})
        assert (status, answer["error"]["param"]) == (400, "tag")
        body = {"tag": "a" * 128, "cache_id": made["id"]}
        assert (await client.call("POST", "/caching/refs/tags", body))[0] == 200


async def test_null_tools_give_way_to_the_stored_ones(redis: Valkey) -> None:
    """`tools: null` is as good as none."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        await client.put(tags=["t"], tools=[TOOL])
        assert (await client.ask("tag=t", tools=None))[0] == 200
        assert upstream.generations[-1].json()["tools"] == [TOOL]


async def test_a_dry_run_asks_no_upstream_and_counts_no_token(redis: Valkey) -> None:
    """It says whether the context could be used, plain and streamed, and resets nothing."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        made = await client.put(tags=["t"])
        status, answer, headers = await client.ask("tag=t;dry_run=1;reset_ttl=9999")
        assert (status, answer["choices"], answer["usage"]["total_tokens"]) == (200, [], 0)
        assert headers["msh-context-cache-id"] == made["id"]
        status, text, _ = await client.ask("tag=t;dry_run=1", stream=True)
        assert (status, text[-14:]) == (200, b"data: [DONE]\n\n")
        assert (await client.ask("tag=none;dry_run=1"))[0] == 404
        assert upstream.generations == []
        assert (await client.call("GET", f"/caching/{made['id']}"))[1]["expired_at"] == made["expired_at"]


async def test_reset_ttl_moves_the_end_on_success_only(redis: Valkey) -> None:
    """It becomes now plus this many seconds; a failed response leaves it unchanged."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        made = await client.put()
        upstream.failures.append(Failure(400))
        assert (await client.ask(f"cache_id={made['id']};reset_ttl=9000"))[0] == 400
        status, _, headers = await client.ask(f"cache_id={made['id']};reset_ttl=5000")
        assert status == 200
        end = int(headers["msh-context-cache-token-exp"])
        assert abs(end - made["created_at"] - 5000) < 20

        async def is_moved() -> bool:
            shown = (await client.call("GET", f"/caching/{made['id']}"))[1]
            return abs(int(shown["expired_at"]) - end) <= 1

        await eventually(is_moved)


async def test_an_expired_context_is_inactive_until_it_is_revived(redis: Valkey) -> None:
    """By Redis's clock: shown as inactive and not used, then revived by PUT, or by a use that resets its end."""
    async with serving(redis, warm_replicas=0) as (client, _):
        for revive in ("put", "reset"):
            made = await client.put(ttl=1)

            async def shown(context_id: str = made["id"]) -> Any:
                return (await client.call("GET", f"/caching/{context_id}"))[1]

            async def is_over() -> bool:
                return bool((await shown())["status"] == "inactive")

            await eventually(is_over)
            status, answer, _ = await client.ask(f"cache_id={made['id']}")
            assert (status, answer["error"]["code"]) == (404, "context_inactive")
            if revive == "put":
                status, changed, _ = await client.call("PUT", f"/caching/{made['id']}", {"ttl": 60})
                assert (status, changed["status"]) == (200, "ready")
            else:
                assert (await client.ask(f"cache_id={made['id']};reset_ttl=60"))[0] == 200
            assert (await client.ask(f"cache_id={made['id']}"))[0] == 200


async def test_a_context_goes_after_its_grace_time(redis: Valkey) -> None:
    """Without anybody asking, and with all that was stored of it."""
    async with serving(redis, warm_replicas=0, grace_seconds=0) as (client, _):
        made = await client.put(ttl=1)

        async def is_gone() -> bool:
            return (await client.call("GET", f"/caching/{made['id']}"))[0] == 404

        await eventually(is_gone)
        await client.cairn.worker.contexts.store.sweep()
        assert gauge(client.cairn, metrics.CONTEXTS) == 0
        assert b"segment" not in redis.ask("KEYS", "*segment*")


async def test_the_header_form_compares_by_meaning(redis: Valkey) -> None:
    """Other white space, escapes and order of keys are the same; the stored bytes are what is sent."""
    stored = (
        b'{"model":"test-model","messages":[{"role":"system","content":"h\\u00e9llo"},{"role":"user","content":"a"}],'
    )
    stored += b'"tools":[{"type":"function","function":{"name":"find","strict":true}}],"ttl":60}'
    async with serving(redis, warm_replicas=0) as (client, upstream):
        _, made, _ = await client.call("POST", "/caching", stored)
        sent = (
            '{"model":"test-model","tools":[{"function":{"strict":true,"name":"find"},"type":"function"}],'
            '"messages":[ {"content" : "héllo", "role":"system"},{"role":"user","content":"a"}, '
            + json.dumps(QUESTION)
            + "]}"
        ).encode()
        headers = {"X-Msh-Context-Cache": made["id"], "X-Msh-Context-Cache-Reset-TTL": "777"}
        status, _, answered = await client.call("POST", "/chat/completions", sent, **headers)
        assert status == 200
        assert answered["msh-context-cache-id"] == made["id"]
        got = upstream.generations[-1].body
        assert b'"messages":[ {"role":"system","content":"h\\u00e9llo"},{"role":"user","content":"a"}, {' in got
        assert b'"tools":[{"type":"function","function":{"name":"find","strict":true}}]' in got
        for old, new, where in (
            (b'"strict":true', b'"strict":1', "tools"),
            ("héllo".encode(), b"hello", "messages[0]"),
            (b'"role":"user","content":"a"', b'"role":"user","content":"b"', "messages[1]"),
        ):
            other = sent.replace(old, new, 1)
            status, _, answered = await client.call("POST", "/chat/completions", other, **headers)
            assert status == 200
            assert answered["x-cairn-context"] == f"differs;{where}"
            assert "msh-context-cache-id" not in answered
            assert upstream.generations[-1].body == other
        headers["X-Msh-Context-Cache"] = "cache-" + "0" * 32
        assert (await client.call("POST", "/chat/completions", sent, **headers))[0] == 404
        dry = {"X-Msh-Context-Cache": made["id"], "X-Msh-Context-Cache-DryRun": "1"}
        asked = len(upstream.generations)
        assert (await client.call("POST", "/chat/completions", sent, **dry))[1]["choices"] == []
        assert len(upstream.generations) == asked


async def test_a_failed_warming_says_why_without_the_prompt(redis: Valkey) -> None:
    """Status error with the upstream's type and code; its text, which may quote the prompt, is left out."""
    async with serving(redis) as (client, upstream):
        refusal = {
            "error": {"message": f"too long: {DOCUMENT[:999]}", "type": "bad_length", "code": "context_length"}
        }
        upstream.failures.append(Failure(400, body=json.dumps(refusal).encode()))
        failed = await client.ready((await client.put())["id"])
        assert failed["status"] == "error"
        assert failed["error"] == {
            "type": "bad_length",
            "message": "The upstream answered the warming request with status 400 (context_length).",
        }


async def test_a_body_over_the_limit_is_refused_before_it_is_read(redis: Valkey) -> None:
    """413 by its announced length, in pieces, and for a content over the limit in a body under it."""
    async with serving(redis, warm_replicas=0, max_context_bytes=100_000) as (client, _):
        big = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 400_000}]}
        assert (await client.call("POST", "/caching", big))[0] == 413

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 65536

        async with client.http.post(f"{client.cairn.url}/caching", data=pieces(), headers=client.headers) as answer:
            assert answer.status == 413
        big["messages"][0]["content"] = "x" * 150_000  # type: ignore[index]
        assert (await client.call("POST", "/caching", big))[0] == 413


async def test_with_redis_away_what_is_in_memory_goes_on(redis: Valkey) -> None:
    """Known contexts and tags are served; creation and unknown ones are 503 with a time to come back."""
    own = await asyncio.to_thread(Valkey().start)
    try:
        async with serving(own, warm_replicas=0) as (client, _):
            made = await client.put(tags=["t"])
            assert (await client.ask("tag=t"))[0] == 200
            await asyncio.to_thread(own.kill)
            for reference in (f"cache_id={made['id']}", "tag=t"):
                assert (await client.ask(reference))[0] == 200
            for status, answer, headers in (
                await client.ask("tag=other"),
                await client.ask("cache_id=cache-" + "0" * 32),
                await client.call("POST", "/caching", {"model": MODEL, "messages": STORED}),
                await client.call("GET", "/caching"),
            ):
                assert (status, answer["error"]["type"]) == (503, "server_error")
                assert int(headers["retry-after"]) > 0
            repeated = {"model": MODEL, "messages": [*STORED, QUESTION]}
            unknown = {"X-Msh-Context-Cache": "cache-" + "0" * 32}
            status, _, headers = await client.call("POST", "/chat/completions", repeated, **unknown)
            assert (status, headers["x-cairn-context"]) == (200, "unavailable")
            await asyncio.to_thread(own.start)
            await client.cairn.worker.memory.store.wait_available()
            assert (await client.ask("tag=t"))[0] in (200, 404)  # this Redis came back empty
    finally:
        await asyncio.to_thread(own.end)


async def test_a_damaged_segment_is_500_and_never_a_partial_prompt(redis: Valkey) -> None:
    """Another worker, with nothing in memory, finds a flipped byte, a cut one, another's bytes and a missing one."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        made = await client.put()
        keys = re.findall(rb"cairn:\S*segment\S*", redis.ask("KEYS", "*:segment:*"))
        assert len(keys) == 1
        for damage in ("flip", "cut", "swap", "gone"):
            if damage == "flip":
                redis.ask("SETRANGE", keys[0], "30", b"\x00\xff\x00\xff")
            elif damage == "cut":
                redis.ask("SET", keys[0], b"\x01(\xb5/\xfd")
            elif damage == "swap":
                redis.ask("SET", keys[0], _compressed(b"y" * 66_000))
            else:
                redis.ask("DEL", keys[0])
            async with running(config_for([upstream.url], redis.url)) as other:
                fresh = Client(client.http, other)
                status, answer, _ = await fresh.ask(f"cache_id={made['id']}")
                assert (status, answer["error"]["type"], answer["error"]["code"]) == (
                    404,
                    "resource_not_found_error",
                    "context_damaged",
                )
                assert other.count(metrics.CONTEXTS_DAMAGED) == 1
                repeated = {"model": MODEL, "messages": [*STORED, QUESTION]}
                header = {"X-Msh-Context-Cache": made["id"]}
                upstream.requests.clear()
                status, _, headers = await fresh.call("POST", "/chat/completions", repeated, **header)
                assert (status, headers["x-cairn-context"]) == (200, "damaged")
                assert len(upstream.generations) == 1


def _compressed(raw: bytes) -> bytes:
    from cache.contexts.segments import compress

    return compress(memoryview(raw))


async def test_a_tag_moved_at_another_proxy_is_followed_within_100_ms_and_never_seen_half(redis: Valkey) -> None:
    """Under load every request gets the old or the new context, whole; deleting the old one breaks nothing."""
    async with two_proxies(redis) as (here, there, upstream):
        texts = [f"{n} " * 3000 for n in range(20)]
        last = await here.put([{"role": "system", "content": texts[0]}], tags=["t"])
        seen: set[str] = set()
        taken: list[float] = []
        moving = True

        async def load() -> None:
            while moving:
                status, _, _ = await there.ask("tag=t")
                assert status == 200
                seen.add(upstream.generations[-1].json()["messages"][0]["content"])

        asking = [asyncio.ensure_future(load()) for _ in range(4)]  # noqa: TID251
        for text in texts[1:]:
            made = await here.put([{"role": "system", "content": text}])
            await here.call("POST", "/caching/refs/tags", {"tag": "t", "cache_id": made["id"]})
            await here.call("DELETE", f"/caching/{last['id']}")
            last = made

            async def follows(expected: str = made["id"]) -> bool:
                return bool((await there.ask("tag=t"))[2]["msh-context-cache-id"] == expected)

            taken.append(await seconds_until(follows))
            if len(taken) >= 3 and min(taken) < SOON_SECONDS:  # on a busy machine only the least is a measure
                break
        moving = False
        await asyncio.gather(*asking)
        assert min(taken) < SOON_SECONDS
        assert seen <= set(texts)
        assert len(seen) > 1


async def test_a_deletion_and_a_change_reach_the_other_proxy_within_100_ms(redis: Valkey) -> None:
    """Its contents in memory are dropped."""
    changes, deletions = list[float](), list[float]()
    async with two_proxies(redis) as (here, there, _):
        while not changes or (max(min(changes), min(deletions)) >= SOON_SECONDS and len(changes) < 20):
            made = await here.put()
            reference = f"cache_id={made['id']}"
            assert (await there.ask(reference))[0] == 200
            await here.call("PUT", f"/caching/{made['id']}", {"ttl": 9000})

            async def is_changed(reference: str = reference, created: int = made["created_at"]) -> bool:
                end = int((await there.ask(reference))[2]["msh-context-cache-token-exp"])
                return bool(end - created > 8000)

            changes.append(await seconds_until(is_changed))
            await here.call("DELETE", f"/caching/{made['id']}")

            async def is_gone(reference: str = reference) -> bool:
                return (await there.ask(reference))[0] == 404

            deletions.append(await seconds_until(is_gone))
    assert min(changes) < SOON_SECONDS
    assert min(deletions) < SOON_SECONDS


async def test_the_page_is_told_what_contexts_are_worth_and_not_what_they_are(redis: Valkey) -> None:
    """Those worth most first, in a report without ids, names and tenants; and the list says each one's worth."""
    async with serving(redis, warm_replicas=0) as (client, _):
        first = await client.put(name="secretname")
        await client.ask(f"cache_id={first['id']}")  # the upstream accepts the key
        used = await client.put([{"role": "system", "content": "another " * 9000}], metadata={"pin": "true"})
        for _ in range(3):
            await client.ask(f"cache_id={used['id']}")
        contexts = client.cairn.worker.contexts.store
        await contexts.flush()
        await contexts.survey()
        client.cairn.worker.reporter.report()
        assert client.cairn.heard.last is not None
        shown = client.cairn.heard.last.page.contexts
        assert [row.pinned for row in shown] == [True, False]
        assert shown[0].worth_usd_per_hour > shown[1].worth_usd_per_hour > 0
        assert "secretname" not in str(shown)
        assert used["id"] not in str(shown)
        rows = (await client.call("GET", "/caching"))[1]["data"]
        assert rows[0]["worth"] > rows[1]["worth"] > 0


async def test_a_context_can_be_pinned_once_the_upstream_accepted_the_key(redis: Valkey) -> None:
    """Before that a made-up key could fill the store; a refused request proves nothing."""
    async with serving(redis, warm_replicas=0) as (client, upstream):
        made = await client.put()
        pin = {"metadata": {"pin": "true"}}
        refused = [
            await client.call("POST", "/caching", {"model": MODEL, "messages": STORED, **pin}),
            await client.call("PUT", f"/caching/{made['id']}", pin),
        ]
        upstream.failures.append(Failure(401))
        await client.ask(f"cache_id={made['id']}")
        refused.append(await client.call("PUT", f"/caching/{made['id']}", pin))
        assert [(status, body["error"]["code"]) for status, body, _ in refused] == [(403, "pin_refused")] * 3
        assert (await client.ask(f"cache_id={made['id']}"))[0] == 200
        assert (await client.call("PUT", f"/caching/{made['id']}", pin))[0] == 200


async def test_eight_made_up_keys_can_neither_push_out_nor_refuse_an_honest_client(redis: Valkey) -> None:
    """They cannot pin, and share a part of the room; the client whose key works keeps and adds contexts."""
    text = "".join(f"{n:x}" for n in range(30_000))
    async with serving(redis, warm_replicas=0, total_bytes=400_000, unchecked_bytes=150_000) as (honest, _):
        made = await honest.put([{"role": "user", "content": text}])
        assert (await honest.ask(f"cache_id={made['id']}"))[0] == 200
        await honest.call("PUT", f"/caching/{made['id']}", {"metadata": {"pin": "true"}})
        for number in range(8):
            stranger = Client(honest.http, honest.cairn, f"made-up-{number}")
            body = {"model": MODEL, "messages": [{"role": "user", "content": f"{number}{text[::-1]}"}]}
            assert (await stranger.call("POST", "/caching", {**body, "metadata": {"pin": "true"}}))[0] == 403
            assert (await stranger.call("POST", "/caching", body))[0] == 200
        contexts = honest.cairn.worker.contexts.store
        assert contexts.total_bytes - 100_000 < 150_000
        assert (await honest.ask(f"cache_id={made['id']}"))[0] == 200
        await honest.put([{"role": "user", "content": f"another {text}"}])


async def test_no_text_of_a_context_is_logged_or_measured(redis: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    """Not when it is stored, used, refused, or damaged; nor is its id, tag or tenant."""
    caplog.set_level("DEBUG")
    async with serving(redis) as (client, upstream):
        made = await client.put(tags=["sometag"])
        await client.ready(made["id"])
        upstream.failures.append(Failure(400))
        await client.ask("tag=sometag")
        await client.ask("tag=sometag")
        client.cairn.worker.reporter.report()
        labels = str(client.cairn.heard.last)
        for secret in ("Waymarks", made["id"], "sometag"):
            assert secret not in caplog.text
            assert secret not in labels


async def test_two_million_characters_reach_the_upstream_byte_for_byte(redis: Valkey) -> None:
    """Uploaded at one proxy, used through another; a question of 300 bytes sends 99.9 % less than the prompt."""
    text = "".join(f'{n} päth \\ "stone" ' for n in range(110_000))[:2_000_000]
    messages = [{"role": "system", "content": text}, {"role": "user", "content": "Read it."}]
    upload = json.dumps({"model": MODEL, "messages": messages}, ensure_ascii=False).encode()
    body = (
        b'{"model":"test-model","messages":[{"role":"cache","content":"tag=big"},%b]}' % json.dumps(QUESTION).encode()
    )
    async with two_proxies(redis) as (here, there, upstream):
        status, made, _ = await here.call("POST", "/caching", upload)
        assert status == 200
        await here.call("POST", "/caching/refs/tags", {"tag": "big", "cache_id": made["id"]})
        inner = upload[upload.index(b"[") + 1 : upload.rindex(b"]")]
        for client in (here, there, there):
            status, _, _ = await client.call("POST", "/chat/completions", body)
            assert status == 200
            expected = body.replace(b'{"role":"cache","content":"tag=big"}', inner)
            assert upstream.generations[-1].body == expected
        assert len(body) < 0.001 * len(expected)


async def test_as_many_replicas_are_warmed_as_are_asked_for_and_each_once(redis: Valkey) -> None:
    """Two of three get the context; one that ends with a user's message gets no other behind it."""
    redis.flush()
    async with OpenAIUpstream() as one, OpenAIUpstream() as two, OpenAIUpstream() as three:
        upstreams = (one, two, three)
        config = config_for([each.url for each in upstreams], redis.url, contexts=Contexts(warm_replicas=2))
        async with running(config) as cairn, aiohttp.ClientSession() as http:
            client = Client(http, cairn)
            made = await client.ready((await client.put([*STORED, QUESTION]))["id"])
            assert made["status"] == "ready"
            warmed = [[asked.json()["messages"] for asked in each.generations] for each in upstreams]
            assert sorted(map(len, warmed)) == [0, 1, 1]
            assert all(messages == [*STORED, QUESTION] for asked in warmed for messages in asked)
            assert cairn.count(metrics.CONTEXT_USES) == 0, "a warming is no use"


async def test_a_providers_context_is_ready_at_once_and_not_warmed(redis: Valkey) -> None:
    """Nobody pays for a question that nobody asked; its tokens are estimated."""
    redis.flush()
    async with OpenAIUpstream() as upstream:
        pool = Pool(name="far", kind=PoolKind.PROVIDER, replicas=(Replica(upstream.url),))
        config = config_for([], redis.url, pools=[pool])
        async with running(config) as cairn, aiohttp.ClientSession() as http:
            made = await Client(http, cairn).put()
            assert (made["status"], upstream.generations) == ("ready", [])
            assert made["tokens"] > 1000


async def test_a_client_that_leaves_while_it_uploads_leaves_nothing(redis: Valkey) -> None:
    """The connection ends in the middle of the body."""
    async with serving(redis, warm_replicas=0) as (client, _):
        room = client.cairn.worker.requests.in_flight_limit
        reader, writer = await asyncio.open_connection("127.0.0.1", client.cairn.port)
        head = (
            b"POST /v1/caching HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sk-one\r\ncontent-length: 100000\r\n\r\n"
        )
        writer.write(head + b'{"model":"test-model","messages":[{"role":"system","content":"' + b"x" * 50_000)
        await writer.drain()
        await eventually(lambda: room.requests == 1)
        writer.close()
        await eventually(lambda: room.requests == 0)
        assert b"segment" not in redis.ask("KEYS", "*segment*")
        assert b"context:" not in redis.ask("KEYS", "*context:*")
        assert (await client.call("GET", "/caching"))[1]["data"] == []
        del reader


async def test_where_only_pinned_contexts_are_left_a_creation_is_429(redis: Valkey) -> None:
    """`exceeded_current_quota_error`; what is there stays."""
    text = "".join(f"{n:x}" for n in range(20_000))
    async with serving(redis, warm_replicas=0, tenant_bytes=70_000) as (client, _):
        plain = {"model": MODEL, "messages": [QUESTION]}
        assert (await client.call("POST", "/chat/completions", plain))[0] == 200  # the upstream accepts the key
        made = await client.put([{"role": "user", "content": text}], metadata={"pin": "true"})
        body = {"model": MODEL, "messages": [{"role": "user", "content": text[::-1]}]}
        status, answer, _ = await client.call("POST", "/caching", body)
        assert (status, answer["error"]["type"]) == (429, "exceeded_current_quota_error")
        assert [row["id"] for row in (await client.call("GET", "/caching"))[1]["data"]] == [made["id"]]

"""Whole workers on a Redis that holds damage: requests are answered, sharing goes on, no background task ends."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import msgspec
import pytest

from cache import JournalState, keys
from cache.replication import codec
from proxy.config.schema import Contexts, Secret, Tenants
from tests.support.cairn import Cairn, config_for, running
from tests.support.context_client import MODEL, QUESTION, Client, serving, two_proxies
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import Valkey, eventually

LONG = {"model": MODEL, "messages": [{"role": "user", "content": "waymark " * 2000}]}


def entry(names: dict[int, str], *deltas: list[Any]) -> bytes:
    return codec.own_head(codec.JOURNAL_VERSION, "evil") + msgspec.msgpack.encode([names, list(deltas)])


def vector(number: int, *figures: float) -> bytes:
    rows = {"http://127.0.0.1:1": figures}
    return codec.own_head(codec.VECTOR_VERSION, "evil") + msgspec.msgpack.encode([number, rows, False])


def poison(redis: Valkey, replica: str) -> None:
    """Everything that was ever found to end a task or to make a request fail, and its kin."""
    names = {0: replica}
    for delta in (
        [5, 0, None, -1],
        [5, 0, None, 2**62],
        [3, 0, 2**40],
        [0, 0, 1, 0, b"h" * 8, b"\0\0\0\0", 10, 0.0],
        [0, 0, 1, 0, b"h" * 16, b"\x09\0\0\0\x05\0\0\0", 10, float("nan")],
        [2, 1, -5, -5, -5],
    ):
        redis.ask("XADD", keys.JOURNAL, "*", "d", entry(names, delta))
    redis.ask("XADD", keys.JOURNAL, "*", "other", "x")
    for figure in (float("nan"), float("inf"), -1e300):
        rows = {replica: (figure,) * 7}
        payload = codec.own_head(codec.VECTOR_VERSION, "evil") + msgspec.msgpack.encode([2**62, rows, False])
        redis.ask("PUBLISH", keys.INFLIGHT_CHANNEL, payload)
    redis.ask("HSET", keys.SNAPSHOT, "id", "x", "stream_id", "nonsense", "trimmed", "9" * 5000, "parts", "1000000000")
    redis.ask("ZADD", keys.WRITERS, "9999999999", "from-the-future")
    redis.ask("SET", keys.LEASE, "nobody")
    redis.ask("PUBLISH", keys.CONTEXTS_CHANNEL, b"\xff\xfe")
    redis.ask("HSET", keys.CONTEXTS_TOTALS, "{}", "x", b"\xff", "1:1", "a", "nan:nan")
    redis.ask("HSET", keys.CONTEXTS_UNLISTED, "{}", "x", b"\xff", "1:1:1:1", "a", "-1:0:0:0")
    redis.ask("SET", keys.totals_day("2026-11-26"), "not a hash")


def tasks_failed(cairn: Cairn) -> dict[str, int]:
    basics = cairn.worker.basics
    return {**basics.tasks.failures, **basics.loops.failures}


async def test_damage_in_redis_costs_no_request_and_no_sharing(redis: Valkey) -> None:
    """Both proxies answer, learn from each other afterwards, and store contexts; none of their tasks failed."""
    async with two_proxies(redis) as (here, there, upstream):
        journals = [client.cairn.worker.sharing.journal for client in (here, there)]
        await eventually(lambda: all(journal.state is JournalState.LIVE for journal in journals))
        poison(redis, upstream.url)
        for client in (here, there):
            assert (await client.call("POST", "/chat/completions", LONG))[0] == 200
        await eventually(lambda: all(journal.stats.dropped_corrupt >= 4 for journal in journals))
        applied = journals[1].stats.applied_deltas
        assert (await here.call("POST", "/chat/completions", LONG))[0] == 200
        await eventually(lambda: journals[1].stats.applied_deltas > applied)
        await eventually(lambda: any(journal.holds_lease for journal in journals))
        await eventually(lambda: all(journal.others == 1 for journal in journals))
        made = await here.put()
        assert (await there.ask(f"cache_id={made['id']}"))[0] == 200
        assert (await there.call("GET", "/caching"))[1]["data"][0]["id"] == made["id"]
        for client in (here, there):
            assert tasks_failed(client.cairn) == {}


async def test_a_proxy_that_starts_on_damage_becomes_live(redis: Valkey) -> None:
    """A damaged snapshot is no snapshot: the stream is replayed, and the next snapshot replaces it."""
    redis.flush()
    poison(redis, "http://127.0.0.1:1")
    async with OpenAIUpstream() as upstream:
        config = config_for([upstream.url], redis.url, contexts=Contexts(warm_replicas=0))
        async with running(config) as cairn, aiohttp.ClientSession() as http:
            journal = cairn.worker.sharing.journal
            assert journal.state is JournalState.LIVE
            client = Client(http, cairn)
            assert (await client.call("POST", "/chat/completions", LONG))[0] == 200
            await eventually(lambda: journal.stats.snapshots >= 1)
            assert b"nonsense" not in redis.ask("HGET", keys.SNAPSHOT, "stream_id")
            assert tasks_failed(cairn) == {}


@pytest.mark.parametrize("wrong", [keys.JOURNAL, keys.SNAPSHOT, keys.LEASE, keys.WRITERS, keys.GENERATION])
async def test_a_key_of_the_wrong_type_is_replaced(redis: Valkey, wrong: str) -> None:
    """And the index is shared again by itself."""
    async with serving(redis, warm_replicas=0) as (client, _):
        journal = client.cairn.worker.sharing.journal
        await eventually(lambda: journal.holds_lease)
        redis.ask("DEL", wrong)
        redis.ask("SADD", wrong, "x")
        assert (await client.call("POST", "/chat/completions", LONG))[0] == 200

        def is_right() -> bool:
            return redis.ask("TYPE", wrong) not in (b"+set\r\n", b"+none\r\n") and journal.state is JournalState.LIVE

        await eventually(is_right)


async def test_contexts_with_damaged_rows_cost_only_themselves(redis: Valkey) -> None:
    """A list leaves them out, asking for one says what to do, and room is made of them first."""
    async with serving(redis, warm_replicas=0) as (client, _):
        good, bad = await client.put(), await client.put([{"role": "system", "content": "x" * 5000}])
        tenant = next(
            word.split(b"}")[0].split(b"{")[1].decode()
            for word in redis.ask("KEYS", "*:ids").split(b"\r\n")
            if b"{" in word
        )
        key = keys.tenant(tenant, "context", bad["id"])
        for field, value in (("uses", "nan"), ("expires", "1e999"), ("head", b"\xff"), ("tokens", "-1")):
            kept = redis.ask("HGET", key, field).split(b"\r\n")[1]
            redis.ask("HSET", key, field, value)
            status, body, _ = await client.call("GET", f"/caching/{bad['id']}")
            assert (status, body["error"]["code"]) == (404, "context_damaged")
            listed = (await client.call("GET", "/caching"))[1]["data"]
            assert [row["id"] for row in listed] == [good["id"]]
            if field != "head":
                redis.ask("HSET", key, field, kept)
        redis.ask("ZADD", keys.tenant(tenant, "ids"), "1", b"\xff\xfe")
        redis.ask("HSET", keys.tenant(tenant, "tags"), b"\xff", "x", "t", "no number")
        assert (await client.call("GET", "/caching"))[0] == 200
        assert (await client.call("GET", "/caching/refs/tags"))[1]["data"] == []
        assert (await client.ask(f"cache_id={good['id']}"))[0] == 200
        assert (await client.call("DELETE", f"/caching/{bad['id']}"))[0] == 200
        assert tasks_failed(client.cairn) == {}


async def test_after_a_flush_a_new_worker_and_an_old_one_find_each_others_contexts(redis: Valkey) -> None:
    """They agree on the tenants' secret again, whichever of them wrote it."""
    async with serving(redis, warm_replicas=0) as (old, upstream):
        redis.flush()
        config = config_for([upstream.url], redis.url, contexts=Contexts(warm_replicas=0))
        async with running(config) as cairn:
            new = Client(old.http, cairn)

            async def agree() -> bool:
                made = await old.put()
                return (await new.ask(f"cache_id={made['id']}"))[0] == 200

            await eventually(agree)
            for _ in range(10):
                made = await new.put()
                assert (await old.ask(f"cache_id={made['id']}"))[0] == 200
                made = await old.put()
                assert (await new.ask(f"cache_id={made['id']}"))[0] == 200


@pytest.mark.parametrize("secret", ["s" * 65, "s" * 5000])
async def test_a_long_secret_serves_from_the_configuration_and_from_redis(redis: Valkey, secret: str) -> None:
    """BLAKE2b takes keys of 64 bytes; longer ones are hashed first, by every worker alike."""
    redis.flush()
    redis.ask("SET", keys.SECRET, secret)
    async with OpenAIUpstream() as upstream:
        from_redis = config_for([upstream.url], redis.url, contexts=Contexts(warm_replicas=0))
        configured = msgspec.structs.replace(from_redis, tenants=Tenants(secret=Secret(secret)))
        async with running(from_redis) as one, running(configured) as two, aiohttp.ClientSession() as http:
            here, there = Client(http, one), Client(http, two)
            made = await here.put()
            assert (await there.ask(f"cache_id={made['id']}"))[0] == 200


async def test_null_messages_and_invalid_text_with_a_context_are_never_a_500(redis: Valkey) -> None:
    """By message and by header."""
    async with serving(redis, warm_replicas=0) as (client, _):
        made = await client.put()
        header = {"X-Msh-Context-Cache": made["id"]}
        question = msgspec.json.encode(QUESTION)
        reference = b'{"role":"cache","content":"cache_id=%b"}' % made["id"].encode()
        for body in (
            b'{"model":"test-model","messages":null}',
            b'{"model":"test-model","messages":null,"user":"cache"}',
            b'{"model":"test-model","messages":[{"role":"cache","content":"cache_id=\xff"}]}',
            b'{"model":"test-model","messages":[%b,{"role":"user","content":"\xff"}]}' % reference,
            b'{"model":"test-model","messages":[%b,%b],"user":"\xff"}' % (reference, question),
            b'{"model":"test-model","messages":[{"role":"system","content":"\xff"}]}',
        ):
            for headers in ({}, header):
                status, _, _ = await client.call("POST", "/chat/completions", body, **headers)
                assert status != 500, (body, headers)
        assert (await client.call("POST", "/caching", b'{"model":"m","messages":null,"name":"\xff"}'))[0] == 400
        await asyncio.sleep(0)

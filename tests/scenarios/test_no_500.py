"""A 500 of Cairn's own is a defect: malformed requests are a 4xx, whatever is wrong with them and wherever."""

from __future__ import annotations

import json

import pytest

from proxy.config.schema import Secret, Tenants
from tests.support.cairn import config_for, running
from tests.support.context_client import STORED, serving
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.valkey import Valkey

REFERENCE = b'{"role":"cache","content":"cache_id=%b"}'
USER = b'{"role":"user","content":"q"}'


def chat(messages: bytes, beside: bytes = b"") -> bytes:
    """A chat body."""
    return b'{"model":"test-model","messages":%b%b}' % (messages, beside)


def bodies(context_id: bytes) -> list[bytes]:
    """Malformed uses of a stored context."""
    named = REFERENCE % context_id
    return [
        chat(b"[" + REFERENCE % (context_id + b"\xff") + b"," + USER + b"]"),
        chat(b"[" + named.replace(b'"role"', b'"x\xff":1,"role"') + b"," + USER + b"]"),
        chat(b"[" + named.replace(b'"role"', b'"x":"\xff","role"') + b"," + USER + b"]"),
        chat(b"[" + named + b',{"role":"user","content":"\xff"}]'),
        chat(b"[" + named + b"," + USER + b"]", b',"tools":"\xff"'),
        chat(b"[" + named + b"," + USER + b"]", b',"x":"\xff"'),
        chat(b"[" + REFERENCE % b"\\ud800" + b"," + USER + b"]"),
        chat(b"[" + named.replace(b'"cache"', b'"cache","role":NaN') + b"]"),
        chat(b"[" + named.replace(b'"content"', b'"content":null,"content"') + b"," + USER + b"]"),
        chat(b"[" + REFERENCE % (b"x" * 900) + b"]"),
        chat(b"[" + named + b"]", b',"messages":null'),
        chat(b"[" + named + b"]", b',"messages":[7]'),
        chat(b"null", b',"x":"cache"'),
        chat(b'[{"role":"cache"}]'),
        chat(b'[{"role":"cache","content":7}]'),
        chat(b'[{"role":"cache","content":"tag=%ff"}]'),
        chat(b'[{"role":"cache","content":"cache_id=a;cache_id=b"}]'),
        chat(b'[{"role":"cache","content":"tag=a;reset_ttl=99999999999999999999"}]'),
        chat(b'[{"role":"cache","content":"tag=a;reset_ttl=\\u0661"}]'),
    ]


async def test_no_use_of_a_context_is_a_500(http, redis: Valkey) -> None:
    """By a message or by headers, with bytes that are not UTF-8 in the reference, beside it or anywhere else."""
    async with serving(redis, warm_replicas=0) as (client, _):
        made = await client.put()
        context_id = made["id"].encode()
        sent_again = json.dumps({"model": "test-model", "messages": [*STORED, {"role": "user", "content": "q"}]})
        for body in [*bodies(context_id), sent_again.encode()]:
            for headers in ({}, {"x-msh-context-cache": made["id"]}, {"x-msh-context-cache": "\u00ff"}):
                status, answer, told = await client.call("POST", "/chat/completions", body, **headers)
                assert status < 500 or "x-cairn-replica" in told, (body, headers, answer)
        for path in (
            "/caching",
            "/caching/refs/tags",
            f"/caching/{made['id']}",
            "/caching/%ff",
            "/caching/refs/tags/%ff",
        ):
            for body in (
                b"",
                b"null",
                b"\xff",
                b"[]",
                b'{"messages":null}',
                b'{"model":"m","messages":["\xff"]}',
                b"NaN",
            ):
                for method in ("POST", "PUT", "GET", "DELETE"):
                    if method == "DELETE" and path.endswith(made["id"]):
                        continue
                    status, answer, _ = await client.call(method, path, body)
                    assert status < 500, (method, path, body, answer)


PATHS = ("chat/completions", "completions", "responses", "messages", "embeddings", "rerank", "images/edits", "files")


@pytest.mark.parametrize("path", PATHS)
async def test_no_malformed_body_is_a_500(http, path: str) -> None:
    """This holds on every path that reads a body, for JSON, forms and compressed bodies."""
    shapes = [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b'{"model":null}',
        b'{"model":"\xff"}',
        b'{"model":"\\ud800"}',
    ]
    shapes += [b'{"model":"m","messages":null,"input":null,"prompt":null}', b'{"model":"m","input":{"a":1}}']
    shapes += [b'{"model":"m","previous_response_id":7,"conversation":[1],"input":"x"}']
    shapes += [b'{"model":"m","messages":[],"stream_options":"\xff","stream":true}', b"[" * 200_000]
    shapes += [b'{"model":"m","messages":[],"tools":' + b"[" * 200_000 + b"]" * 200_000 + b"}"]
    kinds: tuple[dict[str, str], ...] = (
        {},
        {"content-type": "multipart/form-data; boundary=\xff"},
        {"content-encoding": "zstd"},
    )
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        for body in shapes:
            for headers in kinds:
                async with http.post(f"{cairn.url}/{path}", data=body, headers=headers) as answer:
                    await answer.read()
                    is_own = "x-cairn-replica" not in answer.headers
                    assert not (answer.status >= 500 and is_own), (body[:60], headers)


@pytest.mark.parametrize("length", [1, 64, 65, 500])
async def test_a_tenants_secret_of_any_length_serves(http, length: int) -> None:
    """The hash that names tenants takes 64 bytes; a longer secret is no reason to fail every request."""
    async with OpenAIUpstream() as upstream:
        config = config_for([upstream.url], tenants=Tenants(secret=Secret("s" * length)))
        async with running(config) as cairn:
            body = {"model": "test-model", "messages": []}
            headers = {"authorization": "Bearer k"}
            async with http.post(f"{cairn.url}/chat/completions", json=body, headers=headers) as answer:
                assert answer.status == 200

"""Clients that mean no good: smuggling, trickling, flooding, spoofing, made-up names."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

import aiohttp
import pytest

from proxy.config.schema import Pool, Replica, Server, Tenancy
from proxy.metrics import definitions as metrics
from tests.scenarios.test_conversations import words
from tests.support.cairn import config_for, running
from tests.support.openai_upstream import Failure, OpenAIUpstream
from tests.support.valkey import eventually

BODY = b'{"model":"test-model","messages":[]}'
START = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
CHAT = {"model": "test-model", "messages": [{"role": "user", "content": "hi"}]}


async def talk(port: int, raw: bytes) -> bytes:
    """Send raw bytes, and give what comes until the server closes or twenty seconds are over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        writer.write(raw)
        async with asyncio.timeout(20):
            while piece := await reader.read(65_536):
                got += piece
    except TimeoutError:
        got += b"<still open>"
    finally:
        writer.close()
    return got


@pytest.mark.parametrize(
    "raw",
    [
        START + b"content-length: 36\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        START + b"content-length: 36\r\ncontent-length: 37\r\n\r\n" + BODY,
        START + b"content-length: +36\r\n\r\n" + BODY,
        START + b"content-length: 3 6\r\n\r\n" + BODY,
        START + b"content-length: -1\r\n\r\n" + BODY,
        START + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        START + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        START + b"content-length : 36\r\n\r\n" + BODY,
        START + b"x-folded: a\r\n b\r\ncontent-length: 36\r\n\r\n" + BODY,
        b"POST /v1/chat/completions HTTP/1.1\nhost: x\ncontent-length: 36\n\n" + BODY,
        START + b"x-nul: a\x00b\r\ncontent-length: 36\r\n\r\n" + BODY,
    ],
)
async def test_a_request_whose_framing_is_ambiguous_reaches_no_upstream(raw: bytes) -> None:
    """400 and the connection is closed: what follows it is nobody's second request."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        got = await talk(cairn.port, raw + START + b"content-length: 36\r\n\r\n" + BODY)
        assert got.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400")), got
        assert b"<still open>" not in got
        assert upstream.generations == []


async def test_a_host_that_the_client_names_is_never_asked(http: aiohttp.ClientSession) -> None:
    """An absolute target, a Host header, a forwarded host: the replica gets its own name and no hearsay."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        got = await talk(
            cairn.port, b"GET http://169.254.169.254/v1/models HTTP/1.1\r\nhost: evil\r\nconnection: close\r\n\r\n"
        )
        assert b" 200 " in got.split(b"\r\n")[0]
        assert b"test-model" in got
        spoofed = {"host": "evil", "x-forwarded-for": "1.2.3.4", "forwarded": "for=x", "connection": "x-drop-me"}
        spoofed |= {"x-drop-me": "1", "x-cairn-replica": "evil", "cookie": "a=b"}
        async with http.post(f"{cairn.url}/chat/completions", json=CHAT, headers=spoofed) as answer:
            assert answer.headers["x-cairn-replica"] == upstream.url[7:-3]
        names = {name.lower() for name, _ in upstream.generations[0].headers}
        assert upstream.generations[0].header(b"host") == upstream.url[7:-3].encode()
        assert not names & {b"x-forwarded-for", b"forwarded", b"x-drop-me", b"x-cairn-replica", b"cookie"}


async def test_a_redirect_is_passed_on_and_never_followed(http: aiohttp.ClientSession) -> None:
    """Nobody's credential goes where an upstream points."""
    failure = Failure(307, (("location", "http://127.0.0.1:9/steal"),), b"")
    async with OpenAIUpstream(failures=[failure]) as upstream, running(config_for([upstream.url])) as cairn:
        url = f"{cairn.url}/chat/completions"
        async with http.post(url, json=CHAT, allow_redirects=False) as answer:
            assert answer.status == 307
            assert answer.headers["location"] == "http://127.0.0.1:9/steal"


async def test_a_head_that_trickles_is_ended() -> None:
    """A connection without a whole head does not stay."""
    config = config_for(["http://127.0.0.1:9"], server=Server(port=0, keepalive_seconds=0.2))
    async with running(config) as cairn:
        _, writer = await asyncio.open_connection("127.0.0.1", cairn.port)
        reader, second = await asyncio.open_connection("127.0.0.1", cairn.port)
        second.write(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n")
        second.write(b"GET /v1/mod")
        async with asyncio.timeout(20):
            with suppress(ConnectionError):  # on a slow machine the time ended before the first request
                while await reader.read(1024):
                    pass
        writer.close()
        second.close()


async def test_a_body_that_trickles_is_a_408(http: aiohttp.ClientSession) -> None:
    """It is answered, counted and closed."""
    config = config_for(["http://127.0.0.1:9"], server=Server(port=0, body_seconds=0.1))
    async with running(config) as cairn:
        got = await talk(cairn.port, START + b"content-length: 36\r\n\r\n{")
        assert got.startswith(b"HTTP/1.1 408")
        assert cairn.count(metrics.REJECTED) == 1


async def test_many_large_bodies_at_once_are_refused_beyond_the_bound(http: aiohttp.ClientSession) -> None:
    """503 with Retry-After for those that do not fit; memory holds what was let in."""
    gate = asyncio.Event()
    server = Server(port=0, max_in_flight_bytes=3_000_000)
    async with (
        OpenAIUpstream(gate=gate) as upstream,
        running(config_for([upstream.url], server=server)) as cairn,
    ):

        async def ask(letter: str = "x") -> tuple[int, str | None]:
            # siblings would wait for each other at the cold gate
            body = json.dumps(CHAT | {"messages": [{"role": "user", "content": letter * 1_000_000}]})
            async with http.post(f"{cairn.url}/chat/completions", data=body) as answer:
                return answer.status, answer.headers.get("retry-after")

        first = [asyncio.get_running_loop().create_task(ask(letter)) for letter in "ab"]
        bodies = cairn.worker.requests.http_server.clients.bodies
        await eventually(lambda: bodies.used > 2_000_000)  # one of them may wait before its replica
        refused = await asyncio.gather(*[ask() for _ in range(10)])
        assert refused == [(503, "1")] * 10
        gate.set()
        assert [status for status, _ in await asyncio.gather(*first)] == [200, 200]
        await eventually(lambda: bodies.used == 0)


async def test_ten_thousand_made_up_models_add_one_series(http: aiohttp.ClientSession) -> None:
    """A name that nobody configured or listed is `other`."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        for number in range(300):  # each name is new; the rest would be more of the same
            async with http.post(f"{cairn.url}/chat/completions", json=CHAT | {"model": f"m{number}"}) as answer:
                assert answer.status == 200
        cairn.worker.reporter.report()
        series = {labels[1] for labels in cairn.heard.exposition.labels(metrics.REQUESTS)}
        assert series == {"other"}
        names = cairn.worker.replicas.model_names
        for number in range(10_000):
            assert names.label(f"made-up-{number}") == "other"


@pytest.mark.parametrize("own", [{}, {"cache_salt": "user-1"}])
async def test_isolated_tenants_never_match_each_others_prefixes(
    http: aiohttp.ClientSession, own: dict[str, str]
) -> None:
    """The same prompt under two keys is cold twice, and engines that know the field get a salt of each.

    So they do if both tenants have chosen the same salt for users of their own.
    """
    body = {"model": "test-model", "messages": [{"role": "user", "content": words("shared", 900)}], **own}
    async with OpenAIUpstream() as upstream:
        pool = Pool(name="p", replicas=(Replica(upstream.url),), tenancy=Tenancy.ISOLATED, cache_salt=True)
        async with running(config_for([], pools=[pool])) as cairn:
            matched = []
            for key in ("one", "two", "one", "two"):
                headers = {"authorization": f"Bearer {key}"}
                async with http.post(f"{cairn.url}/chat/completions", json=body, headers=headers) as answer:
                    matched.append(int(answer.headers["x-cairn-matched-tokens"]))
        salts = [asked.json()["cache_salt"] for asked in upstream.generations]
        assert matched[:2] == [0, 0]
        assert min(matched[2:]) > 1000
        assert salts[0] == salts[2] != salts[1] == salts[3]

"""A request through a whole worker: bytes there and back, endpoints, errors."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest

from proxy.config.schema import Client, Pool, Replica, Server
from proxy.metrics import definitions as metrics
from tests.support.cairn import config_for, running
from tests.support.openai_upstream import Failure, OpenAIUpstream
from tests.support.valkey import eventually

CHAT = {"model": "test-model", "messages": [{"role": "user", "content": "hi"}]}
STREAM = CHAT | {"stream": True}


async def test_the_upstream_gets_the_clients_bytes_and_the_client_the_upstreams(http: aiohttp.ClientSession) -> None:
    """White space, key order and number forms pass both ways unchanged."""
    body = (
        b' {"messages" :[{"content":"h\\u00e9 \xc3\xa9","role":"user"}],"temperature":1.0e0, "model":"test-model"}\n'
    )
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{upstream.url}/chat/completions", data=body) as direct:
            expected = await direct.read()
        async with http.post(f"{cairn.url}/chat/completions", data=body) as answer:
            assert answer.status == 200
            got = await answer.read()
        assert upstream.generations[-1].body == body
        assert got.replace(b"chatcmpl-2", b"chatcmpl-1") == expected


async def test_usage_is_asked_for_on_a_stream_and_kept_from_a_client_that_did_not_ask(
    http: aiohttp.ClientSession,
) -> None:
    """The splice adds one member, the extra chunk is withheld, and the tokens are counted all the same."""
    body = json.dumps(STREAM).encode()
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{cairn.url}/chat/completions", data=body) as answer:
            text = await answer.text()
        sent = upstream.generations[0].body
        assert sent == b'{"stream_options":{"include_usage":true},' + body[1:]
        assert '"choices": []' not in text
        assert text.endswith("data: [DONE]\n\n")
        assert cairn.tokens("output") == 3


async def test_a_client_that_asked_for_usage_gets_it(http: aiohttp.ClientSession) -> None:
    """Nothing is spliced and nothing withheld."""
    body = json.dumps(STREAM | {"stream_options": {"include_usage": True}}).encode()
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{cairn.url}/chat/completions", data=body) as answer:
            text = await answer.text()
        assert upstream.generations[0].body == body
        assert '"choices": []' in text


async def test_an_upstream_that_refuses_stream_options_is_remembered(http: aiohttp.ClientSession) -> None:
    """One resend without the field, and never the field again."""
    async with OpenAIUpstream(refuses_stream_options=True) as upstream, running(config_for([upstream.url])) as cairn:
        for _ in range(2):
            async with http.post(f"{cairn.url}/chat/completions", json=STREAM) as answer:
                assert answer.status == 200
                assert (await answer.text()).endswith("data: [DONE]\n\n")
        asked = [b"stream_options" in request.body for request in upstream.generations]
        assert asked == [True, False, False]


@pytest.mark.parametrize("status", [400, 415, 422])
async def test_a_refusal_that_names_no_field_is_tried_without_stream_options_and_proves_nothing_if_that_fails_too(
    http: aiohttp.ClientSession, status: int
) -> None:
    """The client gets the upstream's own refusal of what it sent, and its next stream is counted again."""
    failure = Failure(status, body=b'{"error": {"message": "too long", "type": "x"}}')
    failures: list[Failure | None] = [failure, failure]
    async with OpenAIUpstream(failures=failures) as upstream, running(config_for([upstream.url])) as cairn:
        for expected in (status, 200):
            async with http.post(f"{cairn.url}/chat/completions", json=STREAM) as answer:
                assert answer.status == expected
                text = await answer.read()
                assert text == failure.body if expected != 200 else text.endswith(b"data: [DONE]\n\n")
        asked = [b"stream_options" in request.body for request in upstream.generations]
        assert asked == [True, False, True]
        assert cairn.tokens("output") == 3


async def test_a_refusal_that_goes_away_without_stream_options_is_remembered_whatever_it_says(
    http: aiohttp.ClientSession,
) -> None:
    """The second request succeeded, which is the proof."""
    failure = Failure(422, body=b'{"message": "Extra inputs are not permitted"}')
    async with OpenAIUpstream(failures=[failure]) as upstream, running(config_for([upstream.url])) as cairn:
        for _ in range(2):
            async with http.post(f"{cairn.url}/chat/completions", json=STREAM) as answer:
                assert answer.status == 200
        asked = [b"stream_options" in request.body for request in upstream.generations]
        assert asked == [True, False, False]


@pytest.mark.parametrize("status", [400, 422])
async def test_a_long_refusal_of_a_stream_is_passed_on_unchanged(http: aiohttp.ClientSession, status: int) -> None:
    """It is about more than a field, so nothing is sent again."""
    body = json.dumps({"error": {"message": "x" * 200_000}}).encode()
    failure = Failure(status, (("content-type", "application/json"),), body)
    async with OpenAIUpstream(failures=[failure]) as upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{cairn.url}/chat/completions", json=STREAM) as answer:
            assert (answer.status, await answer.read()) == (status, body)
        assert len(upstream.generations) == 1


async def test_stream_options_that_are_not_utf8_are_left_to_the_upstream(http: aiohttp.ClientSession) -> None:
    """They could not be written anew."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        for options in (b'{"a\xed\xa0\x80":[[]]}', b'{"a":"\xff"}', b'{"\\ud800":1}'):
            body = b'{"model":"m","stream":true,"messages":[],"stream_options":%b}' % options
            async with http.post(f"{cairn.url}/chat/completions", data=body) as answer:
                await answer.read()
                assert answer.status < 500 or "x-cairn-replica" in answer.headers
        assert upstream.requests[-2].body != b""


async def test_once_stream_options_were_accepted_another_400_is_passed_on_at_once(
    http: aiohttp.ClientSession,
) -> None:
    """It cannot be due to them, unless it names them."""
    failure = Failure(400, body=b'{"error": {"message": "too long", "type": "x"}}')
    async with OpenAIUpstream(failures=[None, failure]) as upstream, running(config_for([upstream.url])) as cairn:
        for expected in (200, 400):
            async with http.post(f"{cairn.url}/chat/completions", json=STREAM) as answer:
                assert answer.status == expected
        assert len(upstream.generations) == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"   ", None),
        (b"{", None),
        (b"[]", None),
        (b"null", None),
        (b'{"model": 3, "messages": []}', "model"),
        (b'{"model": "a", "model": "b", "messages": []}', "model"),
        (b'{"model": "m", "messages": 3}', "messages"),
        (b"[" * 100_000, None),
        (b'{"model": "m", "messages": [' + b"[" * 100_000, None),
        (b'\xef\xbb\xbf{"model": "m", "messages": []}', None),
        (b'{"model": "m", "messages": []} trailing', None),
    ],
)
async def test_bad_input_is_a_4xx_that_names_the_field(
    body: bytes, param: str | None, http: aiohttp.ClientSession
) -> None:
    """Never a crash, never an answer of the upstream to something else; the next request is served."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        async with http.post(f"{cairn.url}/chat/completions", data=body) as answer:
            assert answer.status == 400
            error = (await answer.json())["error"]
            assert error["type"] == "invalid_request_error"
            assert error["param"] == param
        assert upstream.generations == []
        async with http.post(f"{cairn.url}/chat/completions", json=CHAT) as answer:
            assert answer.status == 200


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_a_413_before_it_is_read(declared: bool, http: aiohttp.ClientSession) -> None:
    """Declared or chunked, no more than the limit is taken in."""

    async def pieces():
        for _ in range(64):
            yield b"x" * 1024

    config = config_for(["http://127.0.0.1:9"], server=Server(port=0, max_body_bytes=16 * 1024))
    async with running(config) as cairn:
        data = b"x" * 65_536 if declared else pieces()
        async with http.post(f"{cairn.url}/chat/completions", data=data) as answer:
            assert answer.status == 413


async def test_a_model_that_no_pool_serves_is_a_404(http: aiohttp.ClientSession) -> None:
    """The field is named, and nothing is sent."""
    async with OpenAIUpstream() as upstream:
        pool = Pool(name="p", models=("llama-*",), replicas=(Replica(upstream.url),))
        async with running(config_for([], pools=[pool])) as cairn:
            async with http.post(f"{cairn.url}/chat/completions", json=CHAT) as answer:
                assert answer.status == 404
                assert (await answer.json())["error"]["param"] == "model"
            assert upstream.generations == []


async def test_a_listed_client_enters_with_its_key_and_its_models_only(http: aiohttp.ClientSession) -> None:
    """401 without a key, 403 for another model, and the replica's key goes upstream in place of the client's."""
    import hashlib

    from proxy.config.schema import Secret

    clients = (Client("red", hashlib.sha256(b"sk-red").hexdigest(), models=("test-*",)),)
    async with OpenAIUpstream() as upstream:
        pool = Pool(name="p", replicas=(Replica(upstream.url, key=Secret("sk-upstream")),))
        async with running(config_for([], pools=[pool], clients=clients)) as cairn:
            url = f"{cairn.url}/chat/completions"
            async with http.post(url, json=CHAT) as answer:
                assert answer.status == 401
            key = {"authorization": "Bearer sk-red"}
            async with http.post(url, json=CHAT | {"model": "other"}, headers=key) as answer:
                assert answer.status == 403
            async with http.post(url, json=CHAT, headers=key) as answer:
                assert answer.status == 200
        assert upstream.generations[0].header(b"authorization") == b"Bearer sk-upstream"


async def test_without_replica_keys_the_clients_key_is_passed_through(http: aiohttp.ClientSession) -> None:
    """The upstream judges it."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        headers = {"authorization": "Bearer sk-mine", "x-request-id": "mine-1", "traceparent": "00-ab-cd-01"}
        async with http.post(f"{cairn.url}/chat/completions", json=CHAT, headers=headers) as answer:
            assert answer.headers["x-request-id"] == "mine-1"
        asked = upstream.generations[0]
        assert asked.header(b"authorization") == b"Bearer sk-mine"
        assert asked.header(b"x-request-id") == b"mine-1"
        assert asked.header(b"traceparent") == b"00-ab-cd-01"


async def test_models_of_all_pools_are_one_list(http: aiohttp.ClientSession) -> None:
    """Each pool lists what it serves; a model that two have is listed once."""
    async with OpenAIUpstream(models=("a", "b")) as first, OpenAIUpstream(models=("b", "c", "d")) as second:
        pools = [
            Pool(name="one", models=("a", "b"), replicas=(Replica(first.url),)),
            Pool(name="two", models=("b", "c"), replicas=(Replica(second.url),)),
        ]
        async with running(config_for([], pools=pools)) as cairn, http.get(f"{cairn.url}/models") as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["a", "b", "c"]


async def test_any_other_path_passes_to_the_default_pool_and_its_body_is_streamed(
    http: aiohttp.ClientSession,
) -> None:
    """Method, query, content type and 40 MB arrive as sent, far over the limit of bodies that are read."""
    piece = b"x" * 65_536

    async def pieces():
        for _ in range(640):
            yield piece

    config = None
    async with OpenAIUpstream() as upstream:
        config = config_for([upstream.url], server=Server(port=0, max_body_bytes=1024 * 1024))
        async with running(config) as cairn:
            headers = {"content-type": "application/x-thing", "content-length": str(640 * 65_536)}
            async with http.put(f"{cairn.url}/files/abc?x=1", data=pieces(), headers=headers) as answer:
                await answer.read()
        asked = next(request for request in upstream.requests if request.method == "PUT")
        assert asked.target == "/v1/files/abc?x=1"
        assert asked.header(b"content-type") == b"application/x-thing"
        assert len(asked.body) == 640 * 65_536


async def test_a_client_that_leaves_cancels_the_upstream_and_nothing_stays_charged(
    http: aiohttp.ClientSession,
) -> None:
    """The upstream's request is gone before it is answered, and no place is held."""
    gate = asyncio.Event()
    async with OpenAIUpstream(gate=gate) as upstream, running(config_for([upstream.url])) as cairn:
        for body in (CHAT, STREAM):
            task = asyncio.ensure_future(http.post(f"{cairn.url}/chat/completions", json=body))  # noqa: TID251
            await eventually(lambda: upstream.in_flight == 1)
            task.cancel()
            await eventually(lambda: upstream.in_flight == 0)  # the gate stays closed: nothing else ends it
        await eventually(lambda: cairn.worker.requests.in_flight_limit.requests == 0)
        assert cairn.worker.replicas.fleet.own_in_flight(0) == 0
        assert upstream.abandoned == 2


async def test_a_stream_that_breaks_ends_broken(http: aiohttp.ClientSession) -> None:
    """An error event, then the connection ends without the body's end; no finish reason is invented."""
    async with (
        OpenAIUpstream(failures=[Failure(cut_after_chunks=2)]) as upstream,
        running(config_for([upstream.url])) as cairn,
        http.post(f"{cairn.url}/chat/completions", json=STREAM) as answer,
    ):
        assert answer.status == 200
        got = b""
        broken = False
        try:
            async for piece in answer.content.iter_any():
                got += piece
        except aiohttp.ClientPayloadError:
            broken = True
        assert broken
        last = got.strip().rpartition(b"\n\n")[2]
        assert b"[DONE]" not in got
        assert b'"finish_reason": "stop"' not in got
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "upstream_reset"
        await eventually(lambda: cairn.count(metrics.STREAM_ABORTS) == 1)


async def test_a_request_that_dies_before_its_answer_is_tried_at_the_next_replica(
    http: aiohttp.ClientSession,
) -> None:
    """The client sees one good answer. Which of two idle replicas is tried first is decided by the request's id."""
    async with OpenAIUpstream() as good, OpenAIUpstream() as bad:
        bad.failures = [Failure(cut_after_chunks=0)] * 64
        async with running(config_for([bad.url, good.url])) as cairn:
            for _ in range(64):
                async with http.post(f"{cairn.url}/chat/completions", json=CHAT) as answer:
                    assert answer.status == 200
                if cairn.count(metrics.UPSTREAM_RETRIES):
                    break
            assert cairn.count(metrics.UPSTREAM_RETRIES) == 1


async def test_a_replica_that_cannot_be_reached_is_down_from_the_start_and_the_503_says_so(
    http: aiohttp.ClientSession,
) -> None:
    """OpenAI's shape, with Retry-After, the pool and the reason; and it heals when the replica is back."""
    upstream = OpenAIUpstream()
    async with upstream:
        port = upstream.port
    async with running(config_for([f"http://127.0.0.1:{port}"])) as cairn:
        url = f"{cairn.url}/chat/completions"
        async with http.post(url, json=CHAT) as answer:
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) >= 1
            error = (await answer.json())["error"]
            assert error["code"] == "no_upstream_available"
            assert f"pool 'engines' can take this request now: 127.0.0.1:{port} is unreachable" in error["message"]
        async with OpenAIUpstream(port=port):

            async def served() -> bool:
                async with http.post(url, json=CHAT) as answer:
                    return answer.status == 200

            await eventually(served)


async def test_a_replica_that_closes_every_stream_costs_no_request(http: aiohttp.ClientSession) -> None:
    """llama.cpp's habit: sixty streams one after another, all whole."""
    async with OpenAIUpstream(closes_streams=True) as upstream, running(config_for([upstream.url])) as cairn:
        for _ in range(60):
            async with http.post(f"{cairn.url}/chat/completions", json=STREAM) as answer:
                assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert len(upstream.generations) == 60


async def test_what_lives_on_one_replica_is_asked_for_there(http: aiohttp.ClientSession) -> None:
    """A response is followed up where it was made, whatever the load says."""
    async with OpenAIUpstream() as one, OpenAIUpstream() as two, running(config_for([one.url, two.url])) as cairn:
        url = f"{cairn.url}/responses"
        for stream in (False, True):
            async with http.post(url, json={"model": "test-model", "input": "hi", "stream": stream}) as answer:
                made_at = answer.headers["x-cairn-replica"]
                text = await answer.text()
            made_id = text.partition('"id": "')[2].partition('"')[0]
            for _ in range(4):
                body = {"model": "test-model", "input": "more", "previous_response_id": made_id}
                async with http.post(url, json=body) as answer:
                    assert answer.headers["x-cairn-replica"] == made_at
                    assert answer.headers["x-cairn-reason"] == "pinned"


async def test_answers_carry_what_was_decided(http: aiohttp.ClientSession) -> None:
    """The headers of the decision, by their names."""
    async with OpenAIUpstream() as upstream, running(config_for([upstream.url])) as cairn:
        body = CHAT | {"messages": [{"role": "user", "content": "long " * 2000}]}
        for status in ("Cairn; fwd=miss; detail=cold", "Cairn; hit"):
            async with http.post(f"{cairn.url}/chat/completions", json=body) as answer:
                assert answer.headers["cache-status"] == status
                assert answer.headers["x-cairn-replica"] == upstream.url[7:-3]
                assert answer.headers["server-timing"].startswith("cairn;dur=")
                matched = int(answer.headers["x-cairn-matched-tokens"])
        assert matched > 2000

"""Traces of a whole worker, as a collector receives them over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from hashlib import sha256
from typing import Any

import aiohttp
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from proxy.config.schema import Client, Config, Secret, Telemetry
from proxy.control.messages import Explain
from tests.support.cairn import config_for, running
from tests.support.collector import Collector, collector, values
from tests.support.openai_upstream import Failure, OpenAIUpstream

PROMPT = "a sentence that nobody but the client and the engine may read. " * 40
KEY = "sk-very-secret-key"
CHAT: dict[str, Any] = {
    "model": "test-model",
    "messages": [{"role": "user", "content": PROMPT}],
    "stream": True,
    "max_tokens": 32,
}
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
UNSAMPLED = f"00-{TRACE_ID}-00f067aa0ba902b7-00"
PHASES = ["admit", "read", "fingerprint", "look up", "plan", "chat test-model", "settle"]


def traced(upstreams: list[str], received: Collector, **settings: Any) -> Config:
    """A configuration with two clients that sends its traces to `received`."""
    client = Client(name="alice", key_sha256=sha256(KEY.encode()).hexdigest(), tenant="acme-tenant")
    telemetry = Telemetry(endpoint=received.url, **settings)
    return config_for(upstreams, clients=(client,), telemetry=telemetry)


async def ask(http: aiohttp.ClientSession, url: str, headers: dict[str, str] | None = None) -> int:
    """Ask for a chat, and read the whole answer."""
    sent = {"authorization": f"Bearer {KEY}", **(headers or {})}
    async with http.post(f"{url}/chat/completions", json=CHAT, headers=sent) as answer:
        await answer.read()
        return answer.status


def is_sampled(traceparent: bytes) -> bool:
    """The lowest bit of the flags."""
    return bool(int(traceparent.rpartition(b"-")[2], 16) & 1)


async def test_the_phases_of_a_request_arrive_as_one_trace_of_its_caller(http: aiohttp.ClientSession) -> None:
    """The request's span continues the caller's, its phases lie inside it in their order, and the upstream continues
    the relay's."""
    with collector() as received:
        async with OpenAIUpstream() as upstream, running(traced([upstream.url], received)) as cairn:
            assert await ask(http, cairn.url, {"traceparent": PARENT, "tracestate": "vendor=1"}) == 200
            sent = upstream.generations[0]
        assert {span.trace_id.hex() for span in received.spans} == {TRACE_ID}
        root = received.named("POST /v1/chat/completions")
        assert (root.parent_span_id.hex(), root.kind) == ("00f067aa0ba902b7", Span.SPAN_KIND_SERVER)
        inside = sorted((span for span in received.spans if span is not root), key=lambda s: s.start_time_unix_nano)
        assert [span.name for span in inside] == PHASES
        for span in inside:
            assert span.parent_span_id == root.span_id
            assert root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
        relay = received.named("chat test-model")
        assert sent.header(b"traceparent") == f"00-{TRACE_ID}-{relay.span_id.hex()}-01".encode()
        assert sent.header(b"tracestate") == b"vendor=1"
        assert received.paths == {"/v1/traces"}


async def test_the_relay_has_the_attributes_of_generative_ai(http: aiohttp.ClientSession) -> None:
    """Operation, model, tokens and times have the conventions' names; the decision has Cairn's."""
    with collector() as received:
        async with OpenAIUpstream() as upstream, running(traced([upstream.url], received)) as cairn:
            assert await ask(http, cairn.url) == 200
            await ask(http, cairn.url)
            host, port = upstream.url.removeprefix("http://").removesuffix("/v1").split(":")
        first, second = [values(s.attributes) for s in received.spans if s.name == "chat test-model"]
        assert first["gen_ai.operation.name"] == "chat"
        assert first["gen_ai.provider.name"] == "openai"
        assert first["gen_ai.request.model"] == "test-model"
        assert first["gen_ai.request.max_tokens"] == 32
        assert first["gen_ai.request.stream"] is True
        assert first["gen_ai.usage.output_tokens"] == 3
        assert first["gen_ai.response.time_to_first_chunk"] > 0  # type: ignore[operator]
        assert (first["server.address"], first["server.port"]) == (host, int(port))
        assert (first["cairn.cache"], second["cairn.cache"]) == ("miss", "hit")
        assert "gen_ai.usage.cache_read.input_tokens" not in first  # the engine did not report any
        assert 0 < second["gen_ai.usage.cache_read.input_tokens"] <= second["gen_ai.usage.input_tokens"]  # type: ignore[operator]
        (resource, *_) = received.resources
        assert resource["service.name"] == "cairn"


async def test_a_trace_holds_no_prompt_no_key_and_no_tenant(http: aiohttp.ClientSession) -> None:
    """None of them is anywhere in the bytes that the collector got, nor is the client's name or address."""
    with collector() as received:
        settings: dict[str, Any] = {"token": Secret("collector-token")}
        async with OpenAIUpstream() as upstream, running(traced([upstream.url], received, **settings)) as cairn:
            await ask(http, f"{cairn.url}", {"traceparent": PARENT})
            tenant = cairn.worker.http_server.authenticator.tenant_of(KEY.encode())
        assert received.tokens == {"Bearer collector-token"}
        sent = b"".join(received.raw)
        assert b"test-model" in sent
        for secret in (b"nobody but", KEY.encode(), b"acme-tenant", b"alice", tenant.id.encode(), b"collector-token"):
            assert secret not in sent


async def test_the_caller_decides_whether_its_request_is_traced(http: aiohttp.ClientSession) -> None:
    """An unsampled request leaves no span and keeps its parent; one without a parent is told not to be sampled."""
    with collector() as received:
        async with OpenAIUpstream() as upstream:
            config = traced([upstream.url], received, sample_ratio=0.0)
            async with running(config) as cairn:
                await ask(http, cairn.url, {"traceparent": UNSAMPLED})
                await ask(http, cairn.url)
                await ask(http, cairn.url, {"traceparent": PARENT})
        kept, fresh, sampled = [asked.header(b"traceparent") or b"" for asked in upstream.generations]
        assert kept == UNSAMPLED.encode()
        assert not is_sampled(fresh)
        assert TRACE_ID.encode() not in fresh
        assert is_sampled(sampled)
        assert len([span for span in received.spans if span.kind == Span.SPAN_KIND_SERVER]) == 1


async def test_an_invalid_context_begins_a_new_trace(http: aiohttp.ClientSession) -> None:
    """The upstream gets a valid context in its place, and no tracestate of a trace that is none."""
    with collector() as received:
        async with OpenAIUpstream() as upstream, running(traced([upstream.url], received)) as cairn:
            await ask(http, cairn.url, {"traceparent": "00-xyz-1-01", "tracestate": "vendor=1"})
        root = received.named("POST /v1/chat/completions")
        assert root.parent_span_id == b""
        parents = [value for name, value in upstream.generations[0].headers if name == b"traceparent"]
        assert len(parents) == 1
        assert root.trace_id.hex().encode() in parents[0]
        assert upstream.generations[0].header(b"tracestate") is None


async def test_a_retry_is_an_event_and_a_failure_an_error(http: aiohttp.ClientSession) -> None:
    """The relay's span names each replica that failed; if none succeeds, both spans say why."""
    with collector() as received:
        async with (
            OpenAIUpstream() as one,
            OpenAIUpstream() as two,
            running(traced([one.url, two.url], received)) as c,
        ):
            one.failures = [Failure(503)] * 9
            two.failures = [Failure(503)] * 9
            assert await ask(http, c.url) == 503
        relay, root = received.named("chat test-model"), received.named("POST /v1/chat/completions")
        assert [event.name for event in relay.events] == ["cairn.retry"]
        assert values(relay.events[0].attributes)["error.type"] == "503"
        assert relay.status.code == root.status.code == Status.STATUS_CODE_ERROR
        assert values(relay.attributes)["error.type"] == "503"


async def test_what_is_answered_without_an_upstream_is_traced_too(http: aiohttp.ClientSession) -> None:
    """A refused key and an unreadable body give a span with the status, and no request stays in memory."""
    with collector() as received:
        async with OpenAIUpstream() as upstream, running(traced([upstream.url], received)) as cairn:
            async with http.post(f"{cairn.url}/chat/completions", json=CHAT) as answer:
                assert answer.status == 401
            sent = {"authorization": f"Bearer {KEY}"}
            async with http.post(f"{cairn.url}/chat/completions", data=b"{", headers=sent) as answer:
                assert answer.status == 400
            traces = cairn.worker.requests.traces
            assert traces is not None
            assert traces.running == 0
        statuses = [values(s.attributes)["http.response.status_code"] for s in received.spans if not s.parent_span_id]
        assert statuses == [401, 400]


async def test_an_explanation_leaves_no_trace(http: aiohttp.ClientSession) -> None:
    """It runs the same phases, but it is no request."""
    with collector() as received:
        async with OpenAIUpstream() as upstream, running(traced([upstream.url], received)) as cairn:
            question = Explain(1, "/v1/chat/completions", json.dumps(CHAT).encode(), KEY.encode())
            status, _ = await cairn.worker.explainer.explain(question, cairn.worker.http_server.authenticator)
            assert status == 200
            traces = cairn.worker.requests.traces
            assert traces is not None
            assert traces.running == 0
        assert received.spans == []


async def test_a_collector_that_is_away_or_redirects_costs_no_request(http: aiohttp.ClientSession) -> None:
    """Requests are served, the worker ends in time, and no other host receives a span."""
    with collector() as other, collector(307, f"{other.url}/v1/traces") as received:
        async with OpenAIUpstream() as upstream, running(traced([upstream.url], received)) as cairn:
            assert await ask(http, cairn.url) == 200
        assert received.paths == {"/v1/traces"}
        assert other.paths == set()
        away = Telemetry(endpoint="http://127.0.0.1:9")
        async with OpenAIUpstream() as upstream, running(config_for([upstream.url], telemetry=away)) as cairn:
            assert await ask(http, cairn.url) == 200


def test_nothing_of_it_is_imported_while_it_is_off() -> None:
    """A worker without an endpoint loads neither the SDK nor the module that would use it."""
    code = (
        "import asyncio, sys\n"
        "from tests.support.cairn import config_for, running\n"
        "async def main():\n"
        "    async with running(config_for(['http://127.0.0.1:9'])): pass\n"
        "asyncio.run(main())\n"
        # redis-py imports the rest of the SDK by itself if that is installed
        "parts = ('proxy.telemetry', 'opentelemetry.exporter', 'opentelemetry.sdk.trace')\n"
        "print([name for name in sys.modules if name.startswith(parts)])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"

"""The headers that an exchange gives to the client, and the outcome that it gives to settlement."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import msgspec
import pytest

from cache import Match
from cache.index.prefix_index import Held
from proxy.model import CacheStatus, Ending, Endpoint, MissReason, RouteReason
from proxy.pipeline.exchange import MEDIA, TOOLS, Exchange
from proxy.pipeline.retries import AttemptFailure, FailureKind
from proxy.records import Usage
from proxy.routing.fair_shares import Priority
from proxy.wire import request as wire_request
from tests.proxy.pipeline.bench import Bench, Upstream


def test_gaps_between_tokens_are_counted_per_bucket() -> None:
    """The first token begins no gap."""
    exchange = Bench().exchange(stream=True)
    assert exchange.token_came(10.0)
    for now_seconds in (10.01, 10.02, 10.52):
        assert not exchange.token_came(now_seconds)
    outcome = exchange.outcome(11.0)
    assert sorted(outcome.inter_token_counts)[-2:] == [1, 2]
    assert sum(outcome.inter_token_counts) == 3
    assert outcome.inter_token_seconds == pytest.approx(0.52)
    assert (outcome.times.first_token_seconds, outcome.times.ended_seconds) == (10.0, 11.0)


def test_an_exchange_that_never_came_far_has_an_outcome_too() -> None:
    exchange = Exchange(Bench().exchange().call)
    outcome = exchange.outcome(1.0)
    assert (outcome.ending, outcome.replica, outcome.usage, outcome.retries) == (Ending.INTERNAL, None, None, 0)
    assert (outcome.model, outcome.plan, outcome.error_code, outcome.stream) == (None, None, None, False)
    assert (outcome.status, outcome.response_bytes, outcome.tried, outcome.inter_token_counts) == (0, 0, (), ())
    assert (outcome.head_sent_early, outcome.is_background, outcome.inter_token_seconds) == (False, False, 0.0)
    times = outcome.times
    assert (times.sent_seconds, times.first_byte_seconds, times.first_token_seconds) == (None, None, None)
    assert (times.waited_seconds, times.ended_seconds) == (0.0, 1.0)


def test_a_request_begins_with_nothing_known_decided_or_asked_for() -> None:
    exchange = Exchange(Bench().exchange().call)
    for name in (
        "prompt",
        "fingerprint",
        "match",
        "pool",
        "own_blocks",
        "session",
        "pinned_replica",
        "plan",
        "noted",
    ):
        assert getattr(exchange, name) is None
    for name in (
        "cold_pass",
        "background_id",
        "stored",
        "attempt",
        "waiting",
        "usage",
        "priority",
        "deadline_seconds",
    ):
        assert getattr(exchange, name) is None
    for name in ("only_explained", "is_counted", "is_warming", "only_checked", "asked_usage", "head_sent"):
        assert getattr(exchange, name) is False
    assert (exchange.avoid, exchange.context_notes, exchange.edits, exchange.tried) == (frozenset(), (), (), ())
    assert (exchange.context_result, exchange.replica_name) == ("", "")
    assert (exchange.known_tokens, exchange.progress_seconds, exchange.last_token_seconds) == (0.0, 0.0, 0.0)


async def test_what_was_tried_is_told_in_the_headers_the_outcome_and_the_reason() -> None:
    bench = Bench()
    exchange = bench.exchange()
    assert exchange.notes() == ()
    assert exchange.tried_note() == ()
    exchange.tried = (
        AttemptFailure(0, "r0", FailureKind.STATUS, "503"),
        AttemptFailure(1, "r1", FailureKind.UNSENT, "connect"),
    )
    assert exchange.tried_note() == ((b"x-cairn-tried", b"r0;503, r1;connect"),)
    outcome = exchange.outcome(1.0)
    assert (outcome.retries, outcome.tried) == (2, ("r0;503", "r1;connect"))
    assert outcome.plan is exchange.plan is not None


def test_a_429_is_about_the_clients_key_unless_the_replicas_own_is_sent() -> None:
    bench = Bench()
    exchange = bench.exchange()
    assert exchange.throttle_key == ("tenant", "m")
    exchange.pool = msgspec.structs.replace(bench.pool, has_own_key=True)
    assert exchange.throttle_key == ("", "m")


@pytest.mark.parametrize("media", ["image", "audio", "video", ""])
@pytest.mark.parametrize("tools", [True, False])
def test_a_request_needs_its_model_its_path_and_what_is_in_its_prompt(media: str, tools: bool) -> None:
    """Media are looked for only if somebody has refused them."""
    exchange = Bench().exchange()
    part = {"type": f"{media}_url"} if media else {"type": "text"}
    body = {"model": "m", "messages": [{"role": "user", "content": [part]}], "tools": [{"a": 1}] if tools else []}
    text = msgspec.json.encode(body)
    exchange.call = dataclasses.replace(exchange.call, body=text, target="/v1/chat/completions?tools=1")
    exchange.prompt = wire_request.read(text, exchange.call.endpoint)
    kinds = ["", "/v1/chat/completions", *([TOOLS] if tools else [])]
    assert [kind for _, _, kind in exchange.needs(lambda need: False)] == kinds
    refused = exchange.needs(lambda need: need == exchange.need(MEDIA))
    assert refused == tuple(exchange.need(kind) for kind in (*kinds, *([MEDIA] if media else ())))


def test_what_is_no_prompt_needs_its_model_and_its_path() -> None:
    """The first 128 characters of it."""
    exchange = Bench().exchange()
    exchange.prompt = None
    exchange.call = dataclasses.replace(exchange.call, target="/v1/" + "x" * 200, body=b"")
    assert [kind for _, _, kind in exchange.needs(lambda need: True)] == ["", "/v1/" + "x" * 124]


def test_saved_tokens_are_told_if_a_stored_context_was_used_and_they_were_reported() -> None:
    exchange = Bench().exchange()
    exchange.usage = Usage(10, 1, 7)
    assert exchange.saved_note() == ()
    exchange.stored = cast("Any", object())  # any stored context
    assert exchange.saved_note() == ((b"msh-context-cache-token-saved", b"7"),)
    exchange.usage = Usage(10, 1, 0)
    assert exchange.saved_note() == ((b"msh-context-cache-token-saved", b"0"),)
    for exchange.usage in (Usage(10, 1), None):
        assert exchange.saved_note() == ()


async def test_the_times_in_the_headers_are_those_before_the_upstream_and_at_it() -> None:
    """In milliseconds; none at the upstream before its first byte."""
    bench = Bench()
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    exchange = bench.exchange()
    await bench.run(exchange)
    exchange.sent_seconds = exchange.call.read_seconds + 0.002
    for first_byte_seconds, upstream_ms in ((None, b"0.000"), (exchange.sent_seconds + 0.25, b"250.000")):
        exchange.first_byte_seconds = first_byte_seconds
        assert dict(exchange.notes())[b"server-timing"] == b"cairn;dur=2.000, upstream;dur=" + upstream_ms
    exchange.waited_seconds = 0.0015
    assert dict(exchange.notes())[b"server-timing"] == b"cairn;dur=0.500, queue;dur=1.500, upstream;dur=250.000"


async def test_a_client_is_told_of_its_own_prefixes_only_and_no_times_if_others_are_hidden_from_it() -> None:
    bench = Bench()
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    exchange = bench.exchange()
    assert exchange.plan is not None
    assert exchange.fingerprint is not None
    warm = dataclasses.replace(exchange.plan.candidates[0], matched_bytes=8_192, matched_tokens=2_000.0)
    exchange.plan = dataclasses.replace(
        exchange.plan, candidates=(warm,), reason=RouteReason.WARM, cache=CacheStatus.HIT, miss=MissReason.NONE
    )
    exchange.match = Match({0: Held(1, 8_192, 2_000)}, known_blocks=1, known_bytes=8_192, known_tokens=2_000)
    await bench.run(exchange)
    seen = dict(exchange.notes())
    exchange.own_blocks = 0
    told = dict(exchange.notes())
    assert (seen[b"x-cairn-matched-tokens"], told[b"x-cairn-matched-tokens"]) == (b"2000", b"0")
    assert b"hit" in seen[b"cache-status"]
    assert b"hit" not in told[b"cache-status"]
    assert b"server-timing" in seen
    assert b"server-timing" not in told


@pytest.mark.parametrize("endpoint", [Endpoint.EMBEDDINGS, Endpoint.INFERENCE])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m","input":"x","priority":5}', Priority.LOW),
        (b'{"model":"m","input":"x","service_tier":"priority"}', Priority.HIGH),
        (b'{"model":"m","input":"x","priority":-1}', Priority.HIGH),
        (b'{"model":"m","input":["priority"]}', Priority.NORMAL),
        (b"--form, not JSON", Priority.NORMAL),
    ],
)
def test_what_is_no_prompt_waits_by_the_priority_in_its_body(endpoint, body, expected):
    """As vLLM takes it with embeddings, rerank and the like, within what the client may ask for."""
    call = Bench().exchange().call
    for highest in (Priority.HIGH, Priority.NORMAL):
        tenant = dataclasses.replace(call.tenant, highest_priority=highest)
        exchange = Exchange(dataclasses.replace(call, endpoint=endpoint, body=body, tenant=tenant))
        assert exchange.priority_to_wait_by() is max(expected, highest)

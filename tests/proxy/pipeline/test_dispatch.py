"""What reaches a replica, and the effect of a response's status on what the fleet knows about it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from proxy.errors import (
    BadResponse,
    ConnectFailed,
    Overloaded,
    PoolTimeout,
    ResetBeforeResponse,
    ResetMidResponse,
    UpstreamError,
)
from proxy.fleet import Failure, Fleet
from proxy.fleet.replica import ThrottleKey
from proxy.fleet.served_models import Listing
from proxy.model import Ending, Endpoint
from proxy.pipeline import dispatch
from proxy.pipeline.dispatch import Upload
from proxy.pipeline.exchange import Exchange
from proxy.records import ReplicaView, Tenant
from proxy.wire.refusals import REFUSALS_AT_MOST_BYTES
from tests.proxy.pipeline.bench import DONE, POOL, SSE, TOKEN, Bench, Downstream, Upstream, turns


def views(bench: Bench, key: ThrottleKey | None = None) -> tuple[ReplicaView, ...]:
    return tuple(bench.fleet.snapshot(POOL, bench.clock.monotonic(), key))


async def answered_first(bench: Bench, status: int, *headers: tuple[bytes, bytes]) -> ThrottleKey:
    """Let replica 0 answer `status` and replica 1 answer 200. Return the key under which a 429 is noted."""
    bench.client.script += [Upstream(bench.clock, status, headers, b"{}"), Upstream(bench.clock, 200, (), b"{}")]
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert (client.status, client.headers[b"x-cairn-tried"]) == (200, b"r0;%d" % status)
    return exchange.throttle_key


@pytest.mark.parametrize("status", [503, 529])
@pytest.mark.parametrize(
    "headers",
    [[(b"retry-after", b"7")], [(b"retry-after", b"7.0")], [(b"retry-after", b"1"), (b"retry-after-ms", b"7000")]],
)
async def test_a_full_replica_is_left_alone_for_as_long_as_it_asks(status: int, headers: list) -> None:
    """For every key and model, and no longer."""
    bench = Bench()
    await answered_first(bench, status, *headers)
    assert [view.available for view in views(bench)] == [False, True]
    bench.clock.advance(6.9)
    assert [view.available for view in views(bench)] == [False, True]
    bench.clock.advance(0.2)
    assert [view.available for view in views(bench)] == [True, True]


@pytest.mark.parametrize("header", [(), ((b"retry-after", b"soon"),)])
async def test_a_full_replica_that_names_no_time_is_left_alone_for_a_second(header: tuple) -> None:
    """A malformed Retry-After is a missing one."""
    bench = Bench()
    await answered_first(bench, 503, *header)
    assert [view.available for view in views(bench)] == [False, True]
    bench.clock.advance(1.1)
    assert [view.available for view in views(bench)] == [True, True]


async def test_a_rate_limit_holds_for_its_key_and_model_alone() -> None:
    """Others may still be served there."""
    bench = Bench()
    key = await answered_first(bench, 429, (b"retry-after", b"7"))
    assert [view.available for view in views(bench, key)] == [False, True]
    assert [view.available for view in views(bench)] == [True, True]
    bench.clock.advance(7.1)
    assert [view.available for view in views(bench, key)] == [True, True]


@pytest.mark.parametrize("status", [408, 500, 502, 504])
async def test_failures_of_three_prompts_of_two_clients_open_the_breaker(status: int) -> None:
    """Fewer may be the prompts' or a client's fault, and the Retry-After of a failure is not heeded."""
    bench = Bench(max_retries=0)
    available = []
    for prompt, client in (("a", "one"), ("b", "one"), ("c", "other")):
        bench.client.script.append(Upstream(bench.clock, status, ((b"retry-after", b"7"),), b"{}"))
        exchange = bench.exchange(prompt=prompt * 9_000)
        exchange.call = dataclasses.replace(exchange.call, tenant=Tenant(client))
        assert (await bench.run(exchange)).status == status
        bench.downstream = type(bench.downstream)()
        available.append([view.available for view in views(bench)])
    assert available == [[True, True], [True, True], [False, True]]


async def test_a_refusal_of_the_request_says_nothing_about_the_replica() -> None:
    """However many prompts are refused."""
    bench = Bench()
    for prompt in "abcdefgh":
        bench.client.script.append(Upstream(bench.clock, 400, (), b"{}"))
        assert (await bench.run(bench.exchange(prompt=prompt * 9_000))).status == 400
        bench.downstream = type(bench.downstream)()
    assert bench.fleet.cause(0) is None


@pytest.mark.parametrize("own_key", [None, (b"authorization", b"Bearer replica")])
@pytest.mark.parametrize("drops", [True, False])
async def test_a_client_s_key_reaches_a_replica_only_if_nothing_replaces_or_drops_it(
    drops: bool, own_key: tuple[bytes, bytes] | None
) -> None:
    """In whichever header or parameter it is sent."""
    bench = Bench()
    bench.pools.backends[0] = msgspec.structs.replace(
        bench.pools.backends[0], drops_credentials=drops, credential=own_key
    )
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    exchange = bench.exchange()
    exchange.call = dataclasses.replace(
        exchange.call,
        target="/v1/chat/completions?a=1&key=client",
        headers=((b"authorization", b"Bearer client"), (b"x-api-key", b"client")),
    )
    await bench.run(exchange)
    sent = {name: value for name, value in bench.client.sent[0][2].items() if name != b"x-request-id"}
    if drops or own_key is not None:
        assert bench.client.targets == [b"/v1/chat/completions?a=1"]
        assert sent == (dict([own_key]) if own_key else {})
    else:
        assert bench.client.targets == [b"/v1/chat/completions?a=1&key=client"]
        assert sent == {b"authorization": b"Bearer client", b"x-api-key": b"client"}


# -- the body


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@pytest.mark.parametrize("length", [None, 6])
async def test_a_body_that_is_passed_through_reaches_the_replica_in_pieces_with_the_length_that_was_declared(
    length: int | None,
) -> None:
    bench = Bench(replicas=1)
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    exchange = bench.exchange(endpoint=Endpoint.OTHER)
    assert (await bench.run(exchange, Upload(pieces(b"abc", b"def"), length))).status == 200
    assert bench.client.sent[0][1] == b"abcdef"
    assert bench.client.lengths == [length]


@pytest.mark.parametrize("first", [ResetBeforeResponse("reset"), 503])
async def test_a_body_that_is_passed_through_is_sent_to_one_replica_only(first: UpstreamError | int) -> None:
    """Its pieces are gone once they were sent."""
    bench = Bench()
    failed = Upstream(bench.clock, first, (), b"{}") if isinstance(first, int) else first
    bench.client.script += [failed, Upstream(bench.clock, 200, (), b"{}")]
    exchange = bench.exchange(endpoint=Endpoint.OTHER)
    upload = Upload(pieces(b"abc"), 3)
    if isinstance(first, int):
        assert (await bench.run(exchange, upload)).status == first
    else:
        with pytest.raises(ResetBeforeResponse):
            await bench.run(exchange, upload)
    assert len(bench.client.sent) == 1
    assert bench.nothing_is_claimed()


async def test_a_body_that_is_passed_through_goes_elsewhere_if_a_replica_cannot_be_reached() -> None:
    """Nothing of it was read by then."""
    bench = Bench()
    bench.client.script += [ConnectFailed("refused"), Upstream(bench.clock, 200, (), b"{}")]
    exchange = bench.exchange(endpoint=Endpoint.OTHER)
    assert (await bench.run(exchange, Upload(pieces(b"abc"), 3))).status == 200
    assert [sent[1] for sent in bench.client.sent] == [b"", b"abc"]


def compressed(bench: Bench, *, stream: bool) -> Any:
    """A request whose body the client sent compressed."""
    exchange = bench.exchange(stream=stream)
    exchange.call = dataclasses.replace(
        exchange.call, encoded_body=b"compressed", headers=((b"content-encoding", b"gzip"),)
    )
    return exchange


async def test_a_compressed_body_that_needs_no_edit_is_sent_as_it_came() -> None:
    bench = Bench()
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    await bench.run(compressed(bench, stream=False))
    assert (bench.client.sent[0][1], bench.client.lengths) == (b"compressed", [10])
    assert bench.client.sent[0][2][b"content-encoding"] == b"gzip"


async def test_a_compressed_body_that_is_edited_is_sent_decoded() -> None:
    """And its encoding is not named any more."""
    bench = Bench()
    bench.client.script.append(Upstream(bench.clock, 200, SSE, TOKEN + DONE))
    exchange = compressed(bench, stream=True)
    await bench.run(exchange)
    sent = bench.client.sent[0]
    assert msgspec.json.decode(sent[1]) == {
        **msgspec.json.decode(exchange.call.body),
        "stream_options": {"include_usage": True},
    }
    assert bench.client.lengths == [len(sent[1])]
    assert b"content-encoding" not in sent[2]


async def test_configured_headers_are_sent_unless_the_client_sends_its_own() -> None:
    """The rank is Cairn's choice alone."""
    bench = Bench()
    bench.pools.backends[0] = msgspec.structs.replace(
        bench.pools.backends[0],
        default_headers=((b"anthropic-version", b"default"), (b"x-extra", b"default")),
        rank=3,
    )
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    exchange = bench.exchange()
    exchange.call = dataclasses.replace(
        exchange.call, headers=((b"anthropic-version", b"client"), (b"x-data-parallel-rank", b"7"))
    )
    await bench.run(exchange)
    sent = {name: value for name, value in bench.client.sent[0][2].items() if name != b"x-request-id"}
    assert sent == {b"anthropic-version": b"client", b"x-extra": b"default", b"x-data-parallel-rank": b"3"}


@pytest.mark.parametrize(
    ("method", "endpoint", "repeatable"),
    [
        ("POST", Endpoint.CHAT, True),
        ("GET", Endpoint.OTHER, True),
        ("HEAD", Endpoint.OTHER, True),
        ("POST", Endpoint.OTHER, False),
        ("DELETE", Endpoint.OTHER, False),
    ],
)
async def test_only_what_may_be_done_twice_is_sent_again_if_a_pooled_connection_has_died(
    method: str, endpoint: Endpoint, repeatable: bool
) -> None:
    """Running a model or reading something; another request may have been carried out."""
    bench = Bench()
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    exchange = bench.exchange()
    exchange.call = dataclasses.replace(exchange.call, method=method, endpoint=endpoint)
    await bench.run(exchange)
    assert bench.client.repeatable == [repeatable]


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (ResetBeforeResponse("reset"), False),
        (ResetMidResponse("reset"), False),
        (503, False),
        (ConnectFailed("refused"), True),
        (429, True),
    ],
)
@pytest.mark.parametrize("why", ["prompt", "path"])
async def test_what_has_effects_is_sent_again_only_if_it_cannot_have_begun(
    why: str, first: UpstreamError | int, again: bool
) -> None:
    """Such as a background response, which goes on without its client, or a path of which nothing is known."""
    bench = Bench()
    failed = Upstream(bench.clock, first, (), b"{}") if isinstance(first, int) else first
    bench.client.script += [failed, Upstream(bench.clock, 200, (), b"{}")]
    exchange = bench.exchange()
    assert exchange.prompt is not None
    if why == "prompt":
        exchange.prompt = dataclasses.replace(exchange.prompt, has_effects=True)
    else:
        exchange.call = dataclasses.replace(exchange.call, endpoint=Endpoint.INFERENCE, may_have_effects=True)
    with contextlib.suppress(UpstreamError):
        await bench.run(exchange)
    assert bench.client.repeatable == [False] * (1 + again)


class Told:
    """Keeps what the fleet is told about a response."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[Any, ...]] = []
        for name in ("failed", "rate_limited", "throttled", "responded", "unreachable"):
            monkeypatch.setattr(Fleet, name, self._noting(name))

    def _noting(self, name: str) -> Any:
        def note(_: Fleet, *arguments: Any) -> None:
            plain = [each for each in arguments if isinstance(each, str)]
            self.events.append((name, arguments[0], *plain))

        return note


@pytest.mark.parametrize(
    ("status", "event", "ending"),
    [
        (200, ("responded", 0), Ending.COMPLETE),
        (299, ("responded", 0), Ending.COMPLETE),
        (300, ("responded", 0), Ending.COMPLETE),
        (399, ("responded", 0), Ending.COMPLETE),
        (400, ("responded", 0), Ending.UPSTREAM_STATUS),
        (408, ("failed", 0, "status 408"), Ending.UPSTREAM_STATUS),
        (429, ("rate_limited", 0), Ending.UPSTREAM_STATUS),
        (499, ("responded", 0), Ending.UPSTREAM_STATUS),
        (500, ("failed", 0, "status 500"), Ending.UPSTREAM_STATUS),
        (503, ("throttled", 0, "status 503"), Ending.UPSTREAM_STATUS),
        (529, ("throttled", 0, "status 529"), Ending.UPSTREAM_STATUS),
        (599, ("failed", 0, "status 599"), Ending.UPSTREAM_STATUS),
    ],
)
async def test_each_status_has_its_meaning_for_the_fleet_and_for_the_prompts_placement(
    monkeypatch: pytest.MonkeyPatch, status: int, event: tuple[Any, ...], ending: Ending
) -> None:
    """A prompt was computed for a success alone, and certainly not for an error."""
    told = Told(monkeypatch)
    body = b'{"choices":[{"message":{"content":"a"}}],"usage":{"prompt_tokens":9,"completion_tokens":1}}'
    bench = Bench(max_retries=0)
    bench.client.script.append(Upstream(bench.clock, status, (), body))
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert told.events[0] == event
    assert (client.status, client.body, exchange.ending) == (status, body, ending)
    done = bench.placements.done
    assert ("computed" in done, "taken back" in done) == (status < 300, status >= 300)
    assert (exchange.usage is not None) is (status < 300)


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (ConnectFailed("refused"), ("unreachable", 0, "refused")),
        (BadResponse("not HTTP"), ("failed", 0, "not HTTP")),
        (PoolTimeout("all in use"), None),
    ],
)
async def test_each_failure_has_its_meaning_for_the_fleet(
    monkeypatch: pytest.MonkeyPatch, error: UpstreamError, event: tuple[Any, ...] | None
) -> None:
    """A replica is not judged by connections that are all in use."""
    told = Told(monkeypatch)
    with pytest.raises(type(error)):
        await Bench(error, max_retries=0).run(Bench().exchange())
    assert told.events == ([] if event is None else [event])


@pytest.mark.parametrize("status", [200, 299, 300])
async def test_only_a_success_shows_that_a_replica_takes_the_field_for_usage(status: int) -> None:
    """A refusal that does not name it may then have another reason."""
    bench = Bench(replicas=1, max_retries=0)
    await streamed(bench, (status, TOKEN + DONE))
    assert bench.dispatcher._usage_options.may_have_caused(0, b"no") is (status >= 300)  # noqa: SLF001


# -- stream_options


async def streamed(bench: Bench, *script: tuple[int, bytes]) -> tuple[Downstream, list[bool]]:
    """Send one stream to responses of these statuses. Return the client, and which requests asked for usage."""
    bench.client.script += [
        Upstream(bench.clock, status, SSE if status == 200 else (), body) for status, body in script
    ]
    bench.client.sent.clear()
    client = bench.downstream = Downstream()
    await bench.run(bench.exchange(stream=True))
    return client, [b"stream_options" in body for _, body, _ in bench.client.sent]


OK = (200, TOKEN + DONE)


async def test_a_replica_that_refuses_the_field_is_asked_no_more_until_it_is_forgotten() -> None:
    """Another replica may get its number."""
    bench = Bench(replicas=1)
    assert (await streamed(bench, (400, b"unknown field"), OK))[1] == [True, False]
    assert (await streamed(bench, OK))[1] == [False]
    bench.dispatcher.forget(0)
    assert (await streamed(bench, OK))[1] == [True]


async def test_a_request_that_is_refused_without_the_field_too_proves_nothing() -> None:
    """The client gets the answer to its own bytes."""
    bench = Bench(replicas=1)
    client, asked = await streamed(bench, (400, b"with the field"), (400, b"the model is unknown"))
    assert (client.status, client.body, asked) == (400, b"the model is unknown", [True, False])
    assert (await streamed(bench, OK))[1] == [True]


@pytest.mark.parametrize(
    ("refusal", "asked"),
    [
        ((400, b"the prompt is too long"), [True]),
        ((400, b"stream_options is unknown"), [True, False]),
        ((400, b"include_usage is unknown"), [True, False]),
        ((401, b"stream_options is unknown"), [True]),
    ],
)
async def test_a_replica_that_took_the_field_before_is_sent_a_second_request_only_if_its_refusal_names_it(
    refusal: tuple[int, bytes], asked: list[bool]
) -> None:
    bench = Bench(replicas=1)
    await streamed(bench, OK)
    script = (refusal, OK)[: len(asked)]
    client, sent = await streamed(bench, *script)
    assert sent == asked
    assert client.status == (200 if len(asked) == 2 else refusal[0])
    assert len(asked) == 2 or client.body == refusal[1]


async def test_a_refusal_that_is_long_and_not_complete_is_passed_on_since_it_is_about_more_than_a_field() -> None:
    """Even of a replica that never took the field: no client waits for the rest of it."""
    bench = Bench(replicas=1)
    refusal = Upstream(bench.clock, 400)
    refusal.send(b"x" * (64 * 1024 + 1))
    bench.client.script.append(refusal)
    task = bench.start(bench.exchange(stream=True))
    await turns()
    assert (bench.downstream.status, len(bench.downstream.body)) == (400, 64 * 1024 + 1)
    refusal.send(b"y")
    refusal.end()
    assert (await task).body.endswith(b"xy")
    assert len(bench.client.sent) == 1


# -- a wait for a replica that goes down


async def test_a_request_that_waits_for_a_replica_goes_elsewhere_when_that_is_full_or_down() -> None:
    """It is no retry: nothing was sent, and no replica is blamed."""
    bench = Bench(None, limit=1)
    first = bench.start(bench.exchange())
    await bench.client.asked.wait()
    exchange = bench.exchange(prompt="y" * 9_000)
    second = bench.start(exchange)
    await turns()
    assert len(bench.queues[0]) == 1
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    bench.fleet.throttled(0, bench.clock.monotonic(), 7.0, "503")
    bench.attempts.turn_away(0)
    client = await second
    assert (client.status, exchange.tried, exchange.replica_name) == (200, (), "r1")
    assert bench.placements.done["taken back"] == 1
    first.cancel()
    await turns()


async def test_a_request_that_waits_in_its_second_attempt_is_not_sent_where_it_failed_before() -> None:
    """Unless only that replica is left."""
    bench = Bench(None, replicas=3, limit=1)
    bench.client.script.append(Upstream(bench.clock, 500, (), b"{}"))
    at_one = bench.start(begun_at(bench, 1))
    await bench.client.asked.wait()
    exchange = bench.exchange(prompt="y" * 9_000)
    task = bench.start(exchange)
    await turns()
    assert len(bench.queues[1]) == 1
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    bench.fleet.unreachable(1, bench.clock.monotonic(), "refused")
    bench.attempts.turn_away(1)
    assert (await task).status == 200
    assert (exchange.replica_name, [each.name for each in exchange.tried]) == ("r2", ["r0"])
    at_one.cancel()
    await turns()


def begun_at(bench: Bench, replica: int) -> Any:
    """A request whose plan has one replica alone."""
    exchange = bench.exchange()
    assert exchange.plan is not None
    only = tuple(each for each in exchange.plan.candidates if each.replica.id == replica)
    exchange.plan = dataclasses.replace(exchange.plan, candidates=only)
    return exchange


async def test_the_place_of_a_request_that_finds_a_replica_down_goes_to_nobody_who_waits_there() -> None:
    """They would find the same."""
    bench = Bench(limit=1)
    bench.client.hold.clear()
    first = bench.start(bench.exchange())
    await bench.client.asked.wait()
    second = bench.start(bench.exchange(prompt="y" * 9_000))
    await turns()
    bench.client.script += [ConnectFailed("refused"), *(Upstream(bench.clock, 200, (), b"{}") for _ in range(2))]
    bench.client.hold.set()
    await asyncio.gather(first, second)
    assert [sent[0].host for sent in bench.client.sent] == ["10.0.0.0", "10.0.0.1", "10.0.0.1"]
    assert bench.nothing_is_claimed()


# -- what a replica lacks


def failed(bench: Bench, status: int, message: str | None, *headers: tuple[bytes, bytes]) -> Upstream:
    """An error with this message, or the one of a web framework that does not have the path."""
    body: dict[str, Any] = {"detail": "Not Found"} if message is None else {"error": {"message": message}}
    return Upstream(bench.clock, status, headers, msgspec.json.encode(body))


def ok(bench: Bench) -> Upstream:
    return Upstream(bench.clock, 200, (), b"{}")


def hosts(bench: Bench) -> list[int]:
    """The replicas that were asked, in this order."""
    return [int(origin.host.rpartition(".")[2]) for origin, _, _ in bench.client.sent]


def rooms(bench: Bench, *tokens: int | None) -> None:
    """Let each replica list the model with this many tokens, or list nothing."""
    for number, room in enumerate(tokens):
        if room is not None:
            entry = {"id": "m", "aliases": None, "owned_by": "vllm", "parent": None, "max_model_len": room}
            bench.fleet.listed(number, Listing([SimpleNamespace(**entry)]))


NO_MODEL = "The model `m` does not exist."
TOO_LONG = "This model's maximum context length is 2000 tokens."
KINDS = ("", "/v1/chat/completions", "tools", "media")


@pytest.mark.parametrize(
    ("status", "message", "kind", "reason"),
    [
        (404, NO_MODEL, "", "model_not_found"),
        (404, None, "/v1/chat/completions", "not_supported"),
        (400, "tools param requires --jinja flag", "tools", "no_tools"),
        (500, "image input is not supported", "media", "no_media"),
    ],
)
async def test_what_a_replica_lacks_is_tried_at_another_and_remembered(
    status: int, message: str | None, kind: str, reason: str
) -> None:
    """For half a minute, and of this kind alone; the replica is well, and no retry is used up."""
    bench = Bench()
    bench.client.script += [failed(bench, status, message), ok(bench)]
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert (client.status, client.headers[b"x-cairn-tried"]) == (200, f"r0;{reason}".encode())
    refused = [each for each in KINDS if bench.fleet.models.is_refused(POOL, exchange.need(each))]
    assert refused == [kind]
    for seconds, remembered in ((29.9, True), (0.2, False)):
        bench.clock.advance(seconds)
        now_seconds = bench.clock.monotonic()
        assert bench.fleet.models.refuses(POOL, 0, [exchange.need(kind)], now_seconds) is remembered
        assert not bench.fleet.models.refuses(POOL, 1, [exchange.need(kind)], now_seconds)
    assert [view.available for view in views(bench)] == [True, True]
    assert bench.fleet.cause(0) is None
    assert bench.nothing_is_claimed()


async def test_refusals_of_as_many_replicas_as_there_are_use_up_no_retries() -> None:
    """Each takes no time, and the next request asks none of them again."""
    bench = Bench(replicas=6)
    bench.client.script += [*(failed(bench, 404, NO_MODEL) for _ in range(5)), ok(bench)]
    assert (await bench.run(bench.exchange())).status == 200
    assert hosts(bench) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", [(2, 1, 3), (1, 2, 3)])
async def test_neither_a_replica_that_has_refused_the_same_nor_one_that_failed_this_request_is_asked(
    monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
    """Nor one that is down, wherever they stand in the new plan."""
    bench = Bench(replicas=4)
    exchange = bench.exchange()
    plan = exchange.plan
    assert plan is not None
    candidates = {each.replica.id: each for each in plan.candidates}
    bench.fleet.refused(1, exchange.need(), bench.clock.monotonic())
    bench.fleet.unreachable(2, bench.clock.monotonic(), "refused")
    again = dataclasses.replace(plan, candidates=tuple(candidates[number] for number in (0, *order)))

    def plan_again(exchange: Exchange) -> None:
        exchange.plan = again

    monkeypatch.setattr(bench, "plan_again", plan_again)
    bench.client.script += [failed(bench, 404, NO_MODEL), ok(bench)]
    assert (await bench.run(exchange)).status == 200
    assert hosts(bench) == [0, 3]


@pytest.mark.parametrize("overloaded", [True, False])
async def test_if_nobody_else_may_have_it_the_client_gets_the_refusal_and_the_plan_stays(
    monkeypatch: pytest.MonkeyPatch, overloaded: bool
) -> None:
    """Whether the new plan has the same replica only, or there is none."""
    bench = Bench(replicas=1)
    exchange = bench.exchange()
    plan = exchange.plan
    assert plan is not None

    def plan_again(exchange: Exchange) -> None:
        exchange.plan = dataclasses.replace(plan)
        if overloaded:
            raise Overloaded("no replica is left")

    monkeypatch.setattr(bench, "plan_again", plan_again)
    bench.client.script.append(failed(bench, 404, NO_MODEL))
    client = await bench.run(exchange)
    assert (client.status, NO_MODEL.encode() in client.body) == (404, True)
    assert exchange.plan is plan
    assert bench.nothing_is_claimed()


async def test_if_the_last_replica_lacks_what_one_that_failed_may_have_the_client_is_told_to_come_back() -> None:
    """The refusal would say that there is no such model."""
    bench = Bench(replicas=3)
    bench.client.script += [failed(bench, 500, "sick"), failed(bench, 502, "sick"), failed(bench, 404, NO_MODEL)]
    exchange = bench.exchange()
    with pytest.raises(Overloaded) as told:
        await bench.run(exchange)
    assert told.value.message == "The replicas that may serve this request have failed: r0 (500), r1 (502)."
    assert [each.reason for each in exchange.tried] == ["500", "502", "model_not_found"]
    assert hosts(bench) == [0, 1, 2]
    assert bench.nothing_is_claimed()


@pytest.mark.parametrize(
    ("tokens", "asked"),
    [
        ((1_000, 1_000, None, 4_000), [0, 3]),
        ((None, 1_000, 1_000, 4_000), [0, 1]),
        ((1_000, 1_000, None, 500), [0]),
        ((1_000, 1_000, 1_000, 1_000), [0]),
        ((None, None, None, None), [0]),
    ],
)
async def test_a_prompt_that_is_too_long_is_tried_where_there_is_known_to_be_more_room(
    tokens: tuple[int | None, ...], asked: list[int]
) -> None:
    """Where all are equal, or nothing is known, one refusal is enough. The next prompt may be shorter."""
    bench = Bench(replicas=4)
    rooms(bench, *tokens)
    bench.client.script += [failed(bench, 400, TOO_LONG), ok(bench)]
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert (hosts(bench), client.status) == (asked, 200 if len(asked) == 2 else 400)
    assert client.headers.get(b"x-cairn-tried") == (b"r0;context_length" if len(asked) == 2 else None)
    assert not any(bench.fleet.models.is_refused(POOL, exchange.need(each)) for each in KINDS)


OWN_KEY = {"credential": (b"authorization", b"Bearer replica")}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize(
    ("status", "message", "backend", "tried"),
    [
        (401, "Incorrect API key provided", OWN_KEY, b"r0;401"),
        (403, "Incorrect API key provided", {"drops_credentials": True}, b"r0;403"),
        (401, "Incorrect API key provided", {}, None),
        (400, OUT_OF_MEMORY, {}, b"r0;400"),
    ],
)
async def test_a_replica_that_refuses_the_operator_s_key_or_has_no_memory_fails(
    status: int, message: str, backend: dict[str, Any], tried: bytes | None
) -> None:
    """The refusal of a client's own key is for the client."""
    bench = Bench()
    bench.pools.backends[0] = msgspec.structs.replace(bench.pools.backends[0], **backend)
    bench.client.script += [failed(bench, status, message), ok(bench)]
    client = await bench.run(bench.exchange())
    assert (client.status, client.headers.get(b"x-cairn-tried")) == (200 if tried else status, tried)
    assert [view.available for view in views(bench)] == [tried is None, True]  # another replica has proven it
    assert bench.nothing_is_claimed()


async def test_a_lack_of_memory_without_proof_opens_the_breaker_after_three_prompts_of_two_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Like any failure by status; the log says what the replica answered."""
    bench = Bench(max_retries=0)
    reasons: list[str] = []
    weigh = bench.fleet.failed

    def noting(number: int, failure: Failure, now_seconds: float, reason: str) -> bool:
        reasons.append(reason)
        return weigh(number, failure, now_seconds, reason)

    monkeypatch.setattr(bench.fleet, "failed", noting)
    available = []
    for prompt, client in (("a", "one"), ("b", "one"), ("c", "one"), ("c", "other")):
        bench.client.script.append(failed(bench, 400, OUT_OF_MEMORY))
        exchange = bench.exchange(prompt=prompt * 9_000)
        exchange.call = dataclasses.replace(exchange.call, tenant=Tenant(client))
        assert (await bench.run(exchange)).status == 400
        bench.downstream = Downstream()
        available.append(views(bench)[0].available)
    assert available == [True, True, True, False]
    assert set(reasons) == {"status 400: out_of_memory"}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ((), 120.0),
        (((b"retry-after", b"7"),), 7.0),
        (((b"retry-after", b"Tue, 14 Nov 2023 22:13:27 GMT"),), 7.0),
    ],
)
async def test_an_account_that_has_nothing_left_is_left_alone_for_as_long_as_it_asks(
    headers: tuple[tuple[bytes, bytes], ...], seconds: float
) -> None:
    """Else for the longest time that is honoured; other keys and models may still be served there."""
    bench = Bench()
    bench.client.script += [failed(bench, 402, "Insufficient Balance", *headers), ok(bench)]
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert (client.status, client.headers[b"x-cairn-tried"]) == (200, b"r0;quota")
    for wait_seconds, is_available in ((seconds - 0.1, False), (0.2, True)):
        bench.clock.advance(wait_seconds)
        assert [view.available for view in views(bench, exchange.throttle_key)] == [is_available, True]
    assert bench.fleet.cause(0) is None
    assert not any(bench.fleet.models.is_refused(POOL, exchange.need(each)) for each in KINDS)


@pytest.mark.parametrize(("status", "withdraws"), [(200, True), (299, True), (300, False), (422, False)])
async def test_a_success_withdraws_what_the_replica_had_refused(status: int, withdraws: bool) -> None:
    """Nothing else does, as long as it is remembered."""
    bench = Bench(max_retries=0)
    exchange = bench.exchange()
    bench.fleet.refused(0, exchange.need(), bench.clock.monotonic())
    bench.client.script.append(Upstream(bench.clock, status, (), b"{}"))
    assert (await bench.run(exchange)).status == status
    refuses = bench.fleet.models.refuses(POOL, 0, [exchange.need()], bench.clock.monotonic())
    assert refuses is not withdraws


@pytest.mark.parametrize(("padding", "is_read"), [(0, True), (REFUSALS_AT_MOST_BYTES, False)])
@pytest.mark.parametrize("encoded", [True, False])
async def test_a_refusal_is_read_when_all_of_it_has_come_unless_it_is_long(
    padding: int, is_read: bool, encoded: bool
) -> None:
    """Compressed or not: a long one is passed on at once."""
    bench = Bench()
    body = msgspec.json.encode({"error": {"message": NO_MODEL, "more": random.Random(1).randbytes(padding).hex()}})
    headers = ((b"content-encoding", b"gzip"),) if encoded else ()
    if encoded:
        body = gzip.compress(body)
    refusal = Upstream(bench.clock, 404, headers)
    bench.client.script += [refusal, ok(bench)]
    exchange = bench.exchange()
    exchange.call = dataclasses.replace(exchange.call, headers=((b"accept-encoding", b"gzip"),))
    task = bench.start(exchange)
    for at in (0, 20):
        refusal.send(body[at:] if at else body[:20])
        await turns()
    assert bench.downstream.status == (0 if is_read else 404)
    refusal.end()
    assert (await task).status == (200 if is_read else 404)


async def test_a_refusal_of_just_the_longest_size_is_waited_for() -> None:
    body = msgspec.json.encode({"error": {"message": NO_MODEL}})
    bench = Bench()
    longest = Upstream(bench.clock, 404)
    bench.client.script += [longest, ok(bench)]
    task = bench.start(bench.exchange())
    longest.send(body.ljust(REFUSALS_AT_MOST_BYTES))
    await turns()
    assert bench.downstream.status == 0
    longest.end()
    assert (await task).status == 200


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        (b"gzip", gzip.compress(NO_MODEL.encode().ljust(REFUSALS_AT_MOST_BYTES + 1))),
        (b"gzip", NO_MODEL.encode()),
        (b"unknown", NO_MODEL.encode()),
    ],
    ids=["too long", "broken", "unknown"],
)
async def test_a_refusal_that_cannot_be_decompressed_or_is_too_long_then_is_passed_on(
    coding: bytes, body: bytes
) -> None:
    """It is not taken for the empty one of a framework that has no such path."""
    bench = Bench()
    bench.client.script.append(Upstream(bench.clock, 404, ((b"content-encoding", coding),), body))
    exchange = bench.exchange()
    client = await bench.run(exchange)
    assert (client.status, client.body) == (404, body)
    assert not any(bench.fleet.models.is_refused(POOL, exchange.need(each)) for each in KINDS)


async def test_a_page_with_a_redirect_is_tried_elsewhere_for_its_status() -> None:
    """It is no successful status behind which there is a page."""
    bench = Bench()
    bench.client.script += [Upstream(bench.clock, 300, (), b"<html>Sign in</html>"), ok(bench)]
    client = await bench.run(bench.exchange())
    assert (client.status, client.headers[b"x-cairn-tried"]) == (200, b"r0;300")


async def test_a_refusal_that_does_not_end_is_passed_on_after_a_short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "REFUSAL_SECONDS", 0.01)
    bench = Bench()
    refusal = Upstream(bench.clock, 404)
    refusal.send(NO_MODEL.encode())
    bench.client.script.append(refusal)
    task = bench.start(bench.exchange())
    bench.downstream.full = True  # so that it tells when something came
    await bench.downstream.waiting.wait()
    assert (bench.downstream.status, bench.downstream.body) == (404, NO_MODEL.encode())
    bench.downstream.read.set()
    refusal.end()
    await task


@pytest.mark.parametrize(("model", "tried"), [("m", True), (None, False)])
async def test_a_refusal_of_what_runs_no_model_is_read_if_it_is_for_one(model: str | None, tried: bool) -> None:
    """Such as for the description of a model; else it may be about anything."""
    bench = Bench()
    bench.client.script += [Upstream(bench.clock, 404, (), b'{"detail":"Not Found"}'), ok(bench)]
    exchange = bench.exchange(endpoint=Endpoint.OTHER)
    exchange.call = dataclasses.replace(exchange.call, method="GET", target="/v1/models/m")
    exchange.model = model
    assert (await bench.run(exchange)).status == (200 if tried else 404)

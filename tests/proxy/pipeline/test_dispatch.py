"""What reaches a replica, and the effect of a response's status on what the fleet knows about it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from proxy.errors import BadResponse, ConnectFailed, PoolTimeout, UpstreamError
from proxy.fleet import Fleet
from proxy.fleet.replica import ThrottleKey
from proxy.model import Ending, Endpoint
from proxy.pipeline.dispatch import Upload
from proxy.records import ReplicaView, Tenant
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


@pytest.mark.parametrize("first", [ConnectFailed("refused"), 503])
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
        with pytest.raises(ConnectFailed):
            await bench.run(exchange, upload)
    assert len(bench.client.sent) == 1
    assert bench.nothing_is_claimed()


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
    ("method", "endpoint", "retries"),
    [
        ("POST", Endpoint.CHAT, True),
        ("GET", Endpoint.OTHER, True),
        ("HEAD", Endpoint.OTHER, True),
        ("POST", Endpoint.OTHER, False),
        ("DELETE", Endpoint.OTHER, False),
    ],
)
async def test_only_what_may_be_done_twice_is_sent_again_if_a_pooled_connection_has_died(
    method: str, endpoint: Endpoint, retries: bool
) -> None:
    """Running a model or reading something; another request may have been carried out."""
    bench = Bench()
    bench.client.script.append(Upstream(bench.clock, 200, (), b"{}"))
    exchange = bench.exchange()
    exchange.call = dataclasses.replace(exchange.call, method=method, endpoint=endpoint)
    await bench.run(exchange)
    assert bench.client.retries_reused == [retries]


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

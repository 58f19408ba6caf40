"""The effect of a response's status on what the fleet knows about the replica."""

from __future__ import annotations

import msgspec
import pytest

from proxy.fleet.replica import ThrottleKey
from proxy.model import ReplicaView, Tenant
from tests.proxy.pipeline.bench import POOL, Bench, Upstream


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
async def test_a_full_replica_is_left_alone_for_as_long_as_it_asks(status: int) -> None:
    """For every key and model, and no longer."""
    bench = Bench()
    await answered_first(bench, status, (b"retry-after", b"7"))
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
        exchange.call = msgspec.structs.replace(exchange.call, tenant=Tenant(client))
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
    exchange.call = msgspec.structs.replace(
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

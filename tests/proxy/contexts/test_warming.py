"""Warming by itself: what is sent, how many replicas, which tokens count, and what a failure says."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proxy.accounting.pricing import GpuCard, PriceBook, Rates, TokenCard
from proxy.contexts.valuing import ASSUMED_USD_PER_SECOND, ASSUMED_USD_PER_TOKEN, Valuing
from proxy.contexts.warming import ResponseToNobody, Warming, WarmingFailed
from proxy.downstream.response import Downstream
from proxy.errors import InternalError
from proxy.fleet.pools import Pools, ServedPool
from proxy.model import Ending
from proxy.pipeline.exchange import Exchange
from proxy.records import Usage
from proxy.wire.contexts import Reference
from tests.support.clock import FakeClock
from tests.support.fake_contexts import LISTED

HEADERS = ((b"authorization", b"Bearer k"), (b"user-agent", b"x"), (b"x-api-key", b"k2"), (b"x-goog-api-key", b"k3"))
REFERENCE = Reference("cache-1")


class Upstream:
    """Serves exchanges as scripted: each answer is a count of tokens, or what to do instead."""

    def __init__(self, *answers: int | Callable[[Downstream], None]) -> None:
        self.answers = list(answers)
        self.exchanges: list[Exchange] = []

    async def run(self, exchange: Exchange, client: Downstream) -> None:
        self.exchanges.append(exchange)
        answer = self.answers.pop(0)
        if callable(answer):
            answer(client)
            return
        candidate = SimpleNamespace(replica=SimpleNamespace(name=f"replica{len(self.exchanges)}"))
        exchange.attempt = cast(Any, SimpleNamespace(candidate=candidate))
        exchange.ending = Ending.COMPLETE
        exchange.usage = Usage(answer, 1) if answer else None


async def warm(upstream: Upstream, *, ends_with_user: bool = True, replicas: int = 1) -> int:
    warming = Warming(upstream.run, lambda: "id", FakeClock())
    return await warming.warm(LISTED, HEADERS, "m", REFERENCE, ends_with_user=ends_with_user, replicas=replicas)


async def test_a_context_is_asked_for_one_token_with_the_clients_own_key() -> None:
    """No other header of the client goes along."""
    upstream = Upstream(100)
    assert await warm(upstream) == 100
    (exchange,) = upstream.exchanges
    assert exchange.is_warming
    assert [name for name, _ in exchange.call.headers] == [
        b"content-type",
        b"authorization",
        b"x-api-key",
        b"x-goog-api-key",
    ]
    assert json.loads(bytes(exchange.call.body)) == {
        "model": "m",
        "max_tokens": 1,
        "messages": [{"role": "cache", "content": "cache_id=cache-1"}],
    }


async def test_a_minimal_message_is_appended_and_its_tokens_are_asked_for_once() -> None:
    """Per tenant and model."""
    upstream = Upstream(107, 7, 108)
    warming = Warming(upstream.run, lambda: "id", FakeClock())
    for expected in (100, 101):
        tokens = await warming.warm(LISTED, (), "m", REFERENCE, ends_with_user=False, replicas=1)
        assert tokens == expected
    assert len(upstream.exchanges) == 3


async def test_several_replicas_are_warmed_one_after_another() -> None:
    """Each avoids those before; one that fails ends it without an error."""
    upstream = Upstream(100, 100, lambda client: client.send(500, b"", (), b""))
    assert await warm(upstream, replicas=3) == 100
    assert [sorted(each.avoid) for each in upstream.exchanges] == [[], ["replica1"], ["replica1", "replica2"]]


async def test_without_usage_the_count_is_zero() -> None:
    """Also if the minimal message cannot be asked for."""
    assert await warm(Upstream(0), ends_with_user=False) == 0
    assert await warm(Upstream(9, lambda client: client.send(500, b"", (), b"")), ends_with_user=False) == 9


def fail(error: BaseException) -> Callable[[Downstream], None]:
    def act(client: Downstream) -> None:
        del client
        raise error

    return act


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (lambda client: client.send(400, b"", (), b'{"error":{"type":"bad","code":"long"}}'), "bad", "400 (long)"),
        (lambda client: client.send(404, b"", (), b"<html>"), "invalid_request_error", "404."),
        (
            lambda client: client.send(400, b"", (), b'{"x":' + b"[" * 20_000 + b"]" * 20_000 + b"}"),
            "invalid_request_error",
            "400.",
        ),
        (
            lambda client: client.send(503, b"", (), b'{"error":{"type":"Has Spaces","code":7}}'),
            "server_error",
            "503.",
        ),
        (fail(InternalError("x")), "server_error", "failed inside Cairn"),
        (fail(ConnectionError()), "server_error", "failed inside Cairn"),
    ],
)
async def test_a_failure_says_status_type_and_code_and_no_text_of_the_upstream(
    answer: Callable[[Downstream], None], kind: str, text: str
) -> None:
    """Which may quote the prompt."""
    with pytest.raises(WarmingFailed) as failed:
        await warm(Upstream(answer))
    assert failed.value.kind == kind
    assert text in failed.value.message


async def test_the_response_to_nobody_keeps_the_beginning_of_a_stream() -> None:
    """And takes everything that a client would."""
    response = ResponseToNobody()
    response.begin(200, b"OK", ())
    await response.write(memoryview(b"abc"))
    assert response.offer(b"d" * 70_000)
    assert response.offer(b"e")
    await response.drained()
    response.write_last(b"f")
    response.end()
    response.break_off()
    assert (response.begun, response.status, response.body[:4], b"e" in response.body) == (True, 200, b"abcd", False)


# --- what a token is worth


class Prices:
    def __init__(self, card: TokenCard | GpuCard | None) -> None:
        self._card = card

    def card(self, model: str, url: str, day: str) -> TokenCard | GpuCard | None:
        del model, url, day
        return self._card


def value(card: Any, *, is_provider: bool = False, replicas: bool = True) -> float:
    pool = SimpleNamespace(name="p", is_provider=is_provider)
    backends = {0: SimpleNamespace(pool="p", url="http://one")}
    pools = SimpleNamespace(backends=backends, served=[0] if replicas else [])
    valuing = Valuing(cast(PriceBook, Prices(card)), cast(Pools, pools), lambda number: 1000.0, FakeClock())
    return valuing.usd_per_token("m", cast(ServedPool, pool))


def test_a_token_is_worth_its_price_or_the_time_to_compute_it() -> None:
    """With an assumption for each where no card tells."""
    three = Decimal(3)
    token_card = TokenCard(
        Rates(input=three, output=three, cached_read=three, cache_write_5m=three, cache_write_1h=three)
    )
    assert value(token_card, is_provider=True) == pytest.approx(3e-6)
    assert value(GpuCard(Decimal(3600))) == pytest.approx(1 / 1000)
    assert value(None, replicas=False) == ASSUMED_USD_PER_TOKEN
    assert value(None, is_provider=True) == ASSUMED_USD_PER_TOKEN
    assert value(None) == pytest.approx(ASSUMED_USD_PER_SECOND / 1000)

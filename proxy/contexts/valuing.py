"""Value the tokens of stored contexts, so that the context that saves least can be discarded first."""

from __future__ import annotations

from collections.abc import Callable

from proxy.accounting.pricing import GpuCard, PriceBook, TokenCard, moment_of
from proxy.clock import Clock
from proxy.fleet.pools import Pools, ServedPool

ASSUMED_USD_PER_SECOND = 2.0 / 3600
"""For an engine without a rate card: two dollars per GPU hour. Only the order of contexts depends on it."""

ASSUMED_USD_PER_TOKEN = 1e-6
"""For a provider without a rate card: one dollar per million input tokens."""


class Valuing:
    """`rate_of` returns a replica's prefill rate in tokens per second, by its number."""

    def __init__(self, prices: PriceBook, pools: Pools, rate_of: Callable[[int], float], clock: Clock) -> None:
        self._prices = prices
        self._pools = pools
        self._rate_of = rate_of
        self._clock = clock

    def usd_per_token(self, model: str, pool: ServedPool) -> float:
        """Return the cost of computing one prompt token at the pool's first replica: its price, or prefill time."""
        backends = self._pools.backends
        number = next((number for number in self._pools.served if backends[number].pool == pool.name), None)
        if number is None:
            return ASSUMED_USD_PER_TOKEN
        card = self._prices.card(model, backends[number].url, moment_of(self._clock.unix()))
        if isinstance(card, TokenCard):
            return float(card.rates_for(0).input) / 1e6
        if pool.is_provider:
            return ASSUMED_USD_PER_TOKEN
        per_second = float(card.usd_per_second) if isinstance(card, GpuCard) else ASSUMED_USD_PER_SECOND
        return per_second / max(1.0, self._rate_of(number))

"""Translate the configuration's `prices` to the rules of `proxy.accounting.pricing`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from proxy.accounting.pricing import Card, GpuCard, Rates, Rule, Tier, TokenCard, Unpriced, rates_of
from proxy.config.schema import Price, PriceTier

_ZERO = Decimal(0)
_ONE = Decimal(1)


def rules_of(prices: Sequence[Price]) -> list[Rule]:
    """Return one rule per price, in the file's order; the source of a card is its path in the configuration."""
    return [
        Rule(
            price.model,
            price.upstream,
            _day(price),
            _card(price, f"configuration, prices[{number}]"),
            price.service_tier or "",
        )
        for number, price in enumerate(prices)
    ]


def _day(price: Price) -> str:
    return "" if price.valid_from is None else price.valid_from.isoformat()


def _card(price: Price, source: str) -> Card | Unpriced:
    if price.usd_per_gpu_hour is not None:
        gpus = _ONE if price.gpus_per_replica is None else price.gpus_per_replica
        return GpuCard(price.usd_per_gpu_hour, gpus, source, _day(price))
    if price.currency != "USD" and price.usd_per_unit is None:
        return Unpriced.NO_EXCHANGE_RATE
    usd = _ONE if price.usd_per_unit is None else price.usd_per_unit
    tiers = tuple(Tier(tier.above_prompt_tokens, _rates(tier, usd)) for tier in price.tiers)
    return TokenCard(_rates(price, usd), tiers, source, _day(price))


def _rates(card: Price | PriceTier, usd: Decimal) -> Rates:
    """Return the rates of `card`, where one unit of its currency is worth `usd`."""

    def worth(amount: Decimal | None) -> Decimal | None:
        return None if amount is None else amount * usd

    return rates_of(
        (card.input or _ZERO) * usd,
        (card.output or _ZERO) * usd,
        worth(card.cached_read),
        worth(card.cache_write_5m),
        worth(card.cache_write_1h),
    )

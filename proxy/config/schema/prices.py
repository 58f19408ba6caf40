"""The section `prices`. Pure."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Annotated

from msgspec import Meta

from proxy.config.schema.values import Count, Section


class PriceTier(Section, frozen=True):
    """Prices of every token of a request whose prompt is longer than a limit. Fields are those of a price."""

    above_prompt_tokens: Count
    """Prompt length above which the tier applies."""

    input: Decimal
    """Price per million input tokens."""

    output: Decimal
    """Price per million output tokens."""

    cached_read: Decimal | None = None
    """Price per million cached input tokens; by default `input`."""

    cache_write_5m: Decimal | None = None
    """Price per million tokens written to a cache for five minutes; by default `input`."""

    cache_write_1h: Decimal | None = None
    """Price per million tokens written to a cache for an hour; by default `cache_write_5m`."""


class Price(Section, frozen=True):
    """A price and the requests to which it applies.

    Either a provider's price per million tokens, or an engine's price per hour of a GPU. The first price that matches
    a request is used; of those with the same patterns, the one with the latest `valid_from` that has passed.
    """

    model: Annotated[str, Meta(min_length=1, max_length=256)] = "*"
    """Pattern of model names."""

    upstream: Annotated[str, Meta(min_length=1, max_length=1024)] = "*"
    """Pattern of the replica's name or URL."""

    service_tier: (
        Annotated[
            str, Meta(pattern=r"^[a-z0-9_-]+$", max_length=32, extra={"form": "lower-case letters, digits, _ and -"})
        ]
        | None
    ) = None
    """Service tier, as the response names it, to which the price applies: `flex`, `priority`, `fast` or `batch`. A
    price without it applies to every tier without its own price."""

    valid_from: date | None = None
    """First day (UTC) on which the price applies."""

    currency: Annotated[str, Meta(pattern=r"^[A-Z]{3}$", extra={"form": "three capital letters, such as USD"})] = (
        "USD"
    )
    """Currency of the amounts."""

    usd_per_unit: Decimal | None = None
    """Value in USD of one unit of another currency; without it the price is not used."""

    input: Decimal | None = None
    """Price per million input tokens."""

    output: Decimal | None = None
    """Price per million output tokens."""

    cached_read: Decimal | None = None
    """Price per million cached input tokens; by default `input`."""

    cache_write_5m: Decimal | None = None
    """Price per million tokens written to a cache for five minutes; by default `input`."""

    cache_write_1h: Decimal | None = None
    """Price per million tokens written to a cache for an hour; by default `cache_write_5m`."""

    tiers: Annotated[tuple[PriceTier, ...], Meta(max_length=16)] = ()
    """Prices for longer prompts, in ascending order."""

    usd_per_gpu_hour: Decimal | None = None
    """Price of one GPU for an hour, for an engine of your own."""

    gpus_per_replica: Decimal | None = None
    """GPUs of one replica; by default 1."""

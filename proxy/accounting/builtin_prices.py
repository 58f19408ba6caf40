"""Look prices up in the built-in data: genai-prices, offline.

The only importer of genai_prices. The import takes 0.4 s and 40 MB, so the composition root makes one `BuiltinPrices`
in a thread before it serves.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal, DecimalException
from importlib.metadata import version

import msgspec
from genai_prices import Usage
from genai_prices.data import providers
from genai_prices.data_snapshot import DataSnapshot
from genai_prices.types import ModelPrice, TieredPrices

from proxy.accounting.pricing import MODELS_REMEMBERED_AT_MOST, KindRates, Rates, Tier, TokenCard, rates_of

_GOOGLES_PREFIX = re.compile(r"^(models|google)/")
"""Before the names in Gemini's list of models, and in those that Vertex AI takes. The data does not know them."""

_TIER_NAMES = ("service_tier", "processing", "speed")  # where the data has flex and priority, batch, and fast


class BuiltinPrices:
    """Looks models up. The data has no date, so a card names the package's version.

    A snapshot remembers every name that it was asked for, so it is replaced from time to time.
    """

    def __init__(self) -> None:
        self._source = f"genai-prices {version('genai-prices')}"
        self._asked = 0
        self._snapshot = DataSnapshot(providers, from_auto_update=False)

    def card(self, model: str, upstream: str, moment: str, service_tier: str = "") -> TokenCard | None:
        """Return the card of `model` at the API whose URL is `upstream`, or None if the data has none.

        With an empty `upstream` the provider is derived from the model's name. `moment` is in UTC, in ISO format.
        Where the data has no price of the service tier, the card is that of the ordinary one.
        """
        found = self._found(model, upstream, moment, service_tier)
        if found is None and (name := _GOOGLES_PREFIX.sub("", model, count=1)) != model:
            found = self._found(name, upstream, moment, service_tier)
        return found

    def _found(self, model: str, upstream: str, moment: str, service_tier: str) -> TokenCard | None:
        self._asked += 1
        if self._asked % MODELS_REMEMBERED_AT_MOST == 0:
            self._snapshot = DataSnapshot(providers, from_auto_update=False)
        try:
            when = datetime.fromisoformat(moment).replace(tzinfo=UTC)
            about = dict.fromkeys(_TIER_NAMES, service_tier) if service_tier else None
            found = self._snapshot.calc(Usage(input_tokens=0), model, None, upstream or None, when, about)
        # raised for unknown models and providers, and for unusual data
        except (LookupError, ValueError, TypeError, AttributeError, DecimalException):
            return None
        return _card(found.model_price, self._source)


def _card(price: ModelPrice, source: str) -> TokenCard | None:
    starts = sorted(
        {tier.start for field in _fields(price) if isinstance(field, TieredPrices) for tier in field.tiers}
    )
    base = _rates(price, 0)
    if base is None:
        return None
    tiers = [Tier(start, rates) for start in starts if (rates := _rates(price, start + 1)) is not None]
    return TokenCard(base, tuple(tiers), source, "")


def _rates(price: ModelPrice, prompt_tokens: int) -> Rates | None:
    fields = [_at(field, prompt_tokens) for field in _fields(price)]
    input_usd, output_usd, read, write, write_1h = fields[:5]
    if input_usd is None:
        return None
    plain = rates_of(input_usd, output_usd or Decimal(0), read, write, write_1h)
    return msgspec.structs.replace(plain, audio=_of_kind(plain, *fields[5:8]), images=_of_kind(plain, *fields[8:]))


def _of_kind(plain: Rates, own: Decimal | None, output: Decimal | None, read: Decimal | None) -> KindRates | None:
    """Return the rates of audio or images, None if they are those of text."""
    if own is output is read is None:
        return None
    input_usd = plain.input if own is None else own
    cached = read
    if cached is None:  # nothing is saved unless the price says so
        cached = plain.cached_read if own is None else own
    return KindRates(input_usd, plain.output if output is None else output, cached)


_FIELDS = (
    *("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok"),
    *("input_audio_mtok", "output_audio_mtok", "cache_audio_read_mtok"),
    *("input_image_mtok", "output_image_mtok", "cache_image_read_mtok"),
)


def _fields(price: ModelPrice) -> tuple[Decimal | TieredPrices | None, ...]:
    return tuple(getattr(price, name, None) for name in _FIELDS)


def _at(field: Decimal | TieredPrices | None, prompt_tokens: int) -> Decimal | None:
    if not isinstance(field, TieredPrices):
        return field
    applicable = field.base
    for tier in field.tiers:
        if prompt_tokens > tier.start:
            applicable = tier.price
    return applicable

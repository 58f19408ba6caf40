"""Calculate what a response cost, what it would have cost without caching, and the difference. Pure.

The price is the first that matches: one of the operator's, else that of the built-in data
(`proxy.accounting.builtin_prices`), else none. A provider's price is per token. An engine's price is per second of
its GPUs, so that a cached token saves the prefill time that it avoids. All amounts are Decimal.

    uncached cost = prompt x input + output x output rate
    saving        = cached x (input - cached rate)
    surcharge     = written x (write rate - input)
    cost          = uncached cost - saving + surcharge

Only tokens that the upstream reported as cached count as saved.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from heapq import merge
from operator import itemgetter
from typing import NamedTuple

import msgspec

from proxy.patterns import is_pattern, matches
from proxy.records import Usage

ZERO = Decimal(0)
_PER_MILLION = Decimal(1_000_000)
_SECONDS_PER_HOUR = Decimal(3600)
MODELS_REMEMBERED_AT_MOST = 1024  # remembered prices; clients may make up model names
PRICE_SECONDS = 900  # prices that depend on the time of day change at quarters of an hour


class Unpriced(enum.StrEnum):
    """Why a response has no price; the metric label."""

    NO_CARD = "no_card"  # neither the operator nor the built-in data has a price
    NO_EXCHANGE_RATE = "no_exchange_rate"  # a price in another currency without `usd_per_unit`
    NO_PREFILL_RATE = "no_prefill_rate"  # an engine's price, and the prefill rate is not known yet


class KindRates(msgspec.Struct, frozen=True, gc=False):
    """USD per million tokens of audio or images."""

    input: Decimal
    output: Decimal
    cached_read: Decimal


class Rates(msgspec.Struct, frozen=True, gc=False):
    """USD per million tokens. A rate that a card omits equals `input`, so that nothing is saved or added.

    Audio and images without rates of their own cost the same as text.
    """

    input: Decimal
    output: Decimal
    cached_read: Decimal
    cache_write_5m: Decimal
    cache_write_1h: Decimal
    audio: KindRates | None = None
    images: KindRates | None = None


class Tier(msgspec.Struct, frozen=True, gc=False):
    """Rates for every token of a request whose prompt is longer than `above_prompt_tokens`."""

    above_prompt_tokens: int
    rates: Rates


class TokenCard(msgspec.Struct, frozen=True):
    """A provider's prices; `tiers` are ascending. `source` and `date` are only shown."""

    rates: Rates
    tiers: tuple[Tier, ...] = ()
    source: str = ""
    date: str = ""

    def rates_for(self, prompt_tokens: int) -> Rates:
        """Return the rates of the highest tier that the prompt reaches."""
        for tier in reversed(self.tiers):
            if prompt_tokens > tier.above_prompt_tokens:
                return tier.rates
        return self.rates


class GpuCard(msgspec.Struct, frozen=True):
    """An engine's price: USD per hour of one GPU, and the number of GPUs of a replica."""

    usd_per_gpu_hour: Decimal
    gpus_per_replica: Decimal = Decimal(1)
    source: str = ""
    date: str = ""

    @property
    def usd_per_second(self) -> Decimal:
        """The price of a replica's computing time."""
        return self.usd_per_gpu_hour * self.gpus_per_replica / _SECONDS_PER_HOUR


Card = TokenCard | GpuCard


class Rule(msgspec.Struct, frozen=True):
    """An operator's card and its scope: patterns of the model and of the upstream's URL or name, from a date
    on (ISO; empty: always)."""

    model: str
    upstream: str
    valid_from: str
    card: Card | Unpriced
    service_tier: str = ""  # applies to responses of this tier only; empty: to those of every other


class Bill(msgspec.Struct, frozen=True, gc=False):
    """The cost of one response in USD. Saving and surcharge are never negative; `cost` is what is paid."""

    uncached_input: Decimal
    output: Decimal
    saving: Decimal
    surcharge: Decimal

    @property
    def uncached_cost(self) -> Decimal:
        """The cost without any caching."""
        return self.uncached_input + self.output

    @property
    def cost(self) -> Decimal:
        """The actual cost."""
        return self.uncached_cost - self.saving + self.surcharge


Builtin = Callable[[str, str, str, str], TokenCard | None]
"""Returns the built-in card for (model, upstream URL, moment, service tier), or None; never raises."""


def moment_of(unix_seconds: float) -> str:
    """Return the quarter of an hour (UTC) for which a card is looked up. It sorts behind its day, before the next."""
    begin = unix_seconds // PRICE_SECONDS * PRICE_SECONDS
    return datetime.fromtimestamp(begin, UTC).strftime("%Y-%m-%dT%H:%M")


class PriceBook:
    """Finds the price of a model at an upstream, and remembers it in a bounded table.

    Rules are tried in their order; of those with the same patterns, the one with the latest date that has passed is
    used.
    """

    def __init__(self, rules: Sequence[Rule], builtin: Builtin) -> None:
        self._rules = _RulesByModel(_newest_of_equals_first(rules))
        self._builtin = builtin
        self._resolved: dict[tuple[str, ...], Card | Unpriced] = {}

    def adopt(self, rules: Sequence[Rule]) -> None:
        """Replace the rules."""
        self._rules = _RulesByModel(_newest_of_equals_first(rules))
        self._resolved.clear()

    def card(self, model: str, upstream: str, moment: str, name: str = "", service_tier: str = "") -> Card | Unpriced:
        """Return the card for `model` (as sent) at `upstream` (its URL) at `moment`, or why there is none.

        `moment` is an ISO date or what `moment_of` returns.

        `name` is the upstream's name in the configuration, which a rule may refer to as well. A rule that names the
        service tier comes before one that does not.
        """
        key = (model, upstream, moment, name, service_tier)
        card = self._resolved.get(key)
        if card is None:
            card = self._resolve(model, (upstream, name), moment, service_tier)
            if len(self._resolved) >= MODELS_REMEMBERED_AT_MOST:
                self._resolved.clear()
            self._resolved[key] = card
        return card

    def _resolve(self, model: str, upstream: tuple[str, str], moment: str, service_tier: str) -> Card | Unpriced:
        for tier in (service_tier, "") if service_tier else ("",):
            if (card := self._ruled(model, upstream, moment, tier)) is not None:
                return card
        return self._builtin(model, upstream[0], moment, service_tier) or Unpriced.NO_CARD

    def _ruled(self, model: str, upstream: tuple[str, str], moment: str, service_tier: str) -> Card | Unpriced | None:
        for rule in self._rules.for_model(model):
            if (
                rule.valid_from <= moment
                and rule.service_tier == service_tier
                and any(matches(address, rule.upstream) for address in upstream)
            ):
                return rule.card
        return None


class _RulesByModel:
    """Rules in order, found by model: those for one model are looked up, and only those with a pattern are tried.

    There may be a price for each of a thousand models, and more pairs of model and upstream than are remembered.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._named: dict[str, list[tuple[int, Rule]]] = {}
        self._patterns: list[tuple[int, Rule]] = []
        for place, rule in enumerate(rules):
            is_one = not is_pattern(rule.model)
            (self._named.setdefault(rule.model, []) if is_one else self._patterns).append((place, rule))

    def for_model(self, model: str) -> Iterator[Rule]:
        """Yield the rules whose pattern of the model fits, in order."""
        named = self._named.get(model, [])
        for _, rule in merge(named, self._patterns, key=itemgetter(0)):
            if rule.model == model or matches(model, rule.model):
                yield rule


def _newest_of_equals_first(rules: Sequence[Rule]) -> list[Rule]:
    groups: dict[tuple[str, str, str], list[Rule]] = {}
    for rule in rules:
        groups.setdefault((rule.model, rule.upstream, rule.service_tier), []).append(rule)
    return [
        rule for group in groups.values() for rule in sorted(group, key=lambda rule: rule.valid_from, reverse=True)
    ]


def bill(usage: Usage, card: Card, prefill_tokens_per_second: float | None) -> Bill | Unpriced:
    """Calculate the cost of one response. Unknown cached tokens save nothing; a GPU card needs the prefill rate."""
    if isinstance(card, TokenCard):
        return _token_bill(usage, card.rates_for(usage.longest_call_tokens or usage.prompt_tokens))
    if not prefill_tokens_per_second:
        return Unpriced.NO_PREFILL_RATE
    usd_per_token = card.usd_per_second / Decimal(str(prefill_tokens_per_second))
    return Bill(usage.prompt_tokens * usd_per_token, ZERO, (usage.cached_tokens or 0) * usd_per_token, ZERO)


def _token_bill(usage: Usage, rates: Rates) -> Bill:
    saving = surcharge = ZERO
    extra = _extra(usage, rates)
    # a card may have a cached rate above its input rate, or cheaper writes
    if usage.cached_tokens:
        gained = (usage.cached_tokens * (rates.input - rates.cached_read) + extra.saving) / _PER_MILLION
        saving, surcharge = (gained, ZERO) if gained >= 0 else (ZERO, -gained)
    if usage.cache_write_5m_tokens or usage.cache_write_1h_tokens:
        added = usage.cache_write_5m_tokens * (rates.cache_write_5m - rates.input)
        added += usage.cache_write_1h_tokens * (rates.cache_write_1h - rates.input)
        added /= _PER_MILLION
        saving, surcharge = (saving, surcharge + added) if added >= 0 else (saving - added, surcharge)
    return Bill(
        (usage.prompt_tokens * rates.input + extra.uncached_input) / _PER_MILLION,
        (usage.output_tokens * rates.output + extra.output) / _PER_MILLION,
        saving,
        surcharge,
    )


class _Extra(NamedTuple):
    """The extra cost and saving of audio and images beside as much text, in 1e-6 USD; either may be negative."""

    uncached_input: Decimal = ZERO
    output: Decimal = ZERO
    saving: Decimal = ZERO


_NO_EXTRA = _Extra()


def _extra(usage: Usage, rates: Rates) -> _Extra:
    extra = _NO_EXTRA
    prompt_left, output_left, cached_left = usage.prompt_tokens, usage.output_tokens, usage.cached_tokens or 0
    for tokens, own in ((usage.audio, rates.audio), (usage.images, rates.images)):
        if tokens is not None and own is not None:
            prompt, output, cached = (
                min(tokens.prompt, prompt_left),
                min(tokens.output, output_left),
                min(tokens.cached, cached_left),
            )
            prompt_left, output_left, cached_left = prompt_left - prompt, output_left - output, cached_left - cached
            extra = _Extra(
                extra.uncached_input + prompt * (own.input - rates.input),
                extra.output + output * (own.output - rates.output),
                extra.saving + cached * (own.input - own.cached_read - rates.input + rates.cached_read),
            )
    return extra


def rates_of(
    input_usd: Decimal,
    output_usd: Decimal,
    cached_read_usd: Decimal | None = None,
    cache_write_5m_usd: Decimal | None = None,
    cache_write_1h_usd: Decimal | None = None,
) -> Rates:
    """Return rates in USD per million tokens with the defaults filled in; a 1 h write falls back to the 5 m one."""
    write = input_usd if cache_write_5m_usd is None else cache_write_5m_usd
    return Rates(
        input_usd,
        output_usd,
        input_usd if cached_read_usd is None else cached_read_usd,
        write,
        write if cache_write_1h_usd is None else cache_write_1h_usd,
    )

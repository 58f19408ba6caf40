"""Rate cards: exact from the file to the bill, chosen by model, upstream and day, and refused with a path."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import msgspec
import pytest
import yaml

from proxy.accounting.pricing import Bill, GpuCard, PriceBook, Rule, TokenCard, Unpriced, bill, rates_of
from proxy.accounting.rate_cards import rules_of
from proxy.config.load import Config, ConfigError, as_yaml, load
from proxy.config.schema import make_secret, reveal
from proxy.records import Usage

D = Decimal
TOKENS = {"input": 0.15, "output": "0.6"}


@pytest.fixture
def cards(tmp_path: Path):
    """The configuration whose `prices` are these."""

    def loaded(*prices: dict) -> Config:
        file = tmp_path / "cairn.yaml"
        file.write_text(yaml.safe_dump({"prices": list(prices)}))
        return load(file, {}).config

    return loaded


def book_of(config: Config) -> PriceBook:
    return PriceBook(rules_of(config.prices), lambda *about: None)


def test_numbers_are_taken_as_written_and_not_as_floats_are_stored(cards) -> None:
    """0.1 is a tenth, number or text, and stays so on its way to a worker and back to a file."""
    config = cards({"input": 0.1, "output": "0.30", "cached_read": 1e-3, "cache_write_5m": 2})
    card = book_of(config).card("m", "u", "2026-01-01")
    assert isinstance(card, TokenCard)
    assert card.rates == rates_of(D("0.1"), D("0.30"), D("0.001"), D(2))
    packed = msgspec.msgpack.encode(config, enc_hook=reveal)
    assert msgspec.msgpack.decode(packed, type=Config, dec_hook=make_secret) == config
    assert yaml.safe_load(as_yaml(config))["prices"][0]["input"] == "0.1"


def test_a_card_says_where_it_stands_and_from_when(cards) -> None:
    """As `cairn prices` shows them."""
    card = book_of(cards({"model": "x"} | TOKENS, {"model": "gpt-*", "valid_from": "2026-02-01"} | TOKENS)).card(
        "gpt-5", "u", "2026-03-01"
    )
    assert isinstance(card, TokenCard)
    assert (card.source, card.date) == ("configuration, prices[1]", "2026-02-01")


def test_a_card_names_the_upstream_by_its_url_or_by_its_name(cards) -> None:
    """Globs over both."""
    book = book_of(cards({"upstream": "https://a/*"} | TOKENS, {"upstream": "east-*", "input": 2, "output": 2}))
    by_url, by_name = (
        book.card("m", "https://a/v1", "2026", "west-1"),
        book.card("m", "https://b/v1", "2026", "east-1"),
    )
    assert isinstance(by_url, TokenCard)
    assert isinstance(by_name, TokenCard)
    assert (by_url.rates.input, by_name.rates.input) == (D("0.15"), D(2))
    assert book.card("m", "https://b/v1", "2026", "west-1") is Unpriced.NO_CARD


def test_the_first_card_that_fits_stands_whatever_the_date_of_a_wider_one(cards) -> None:
    """A newer price for everything does not hide an older one for this model."""
    wide = {"model": "*", "valid_from": "2026-06-01", "input": 9, "output": 9}
    card = book_of(cards({"model": "gpt-5"} | TOKENS, wide)).card("gpt-5", "u", "2026-11-23")
    assert isinstance(card, TokenCard)
    assert card.rates.input == D("0.15")


def test_a_card_can_name_a_service_tier(cards) -> None:
    """Flex and priority have separate prices, at any place in the list; other tiers cost the plain price."""
    flex, priority = (
        {"service_tier": name, "input": usd, "output": usd} for name, usd in (("flex", 1), ("priority", 9))
    )
    book = book_of(cards({"input": 4, "output": 4}, flex, priority))
    for tier, usd in (("flex", 1), ("priority", 9), ("", 4), ("batch", 4)):
        card = book.card("m", "u", "2026", service_tier=tier)
        assert isinstance(card, TokenCard)
        assert card.rates.input == usd
    assert book_of(cards(flex)).card("m", "u", "2026") is Unpriced.NO_CARD


def test_another_currency_is_turned_into_dollars_or_is_unpriced(cards) -> None:
    """All rates of all tiers; without a rate of exchange it is told and not guessed."""
    tier = {"above_prompt_tokens": 1000, "input": 20, "output": 40}
    yuan = {"currency": "CNY", "input": 10, "output": 20, "cached_read": 1, "tiers": [tier]}
    card = book_of(cards(yuan | {"usd_per_unit": "0.14"})).card("m", "u", "2026")
    assert isinstance(card, TokenCard)
    assert (card.rates.input, card.rates.cached_read) == (D("1.40"), D("0.14"))
    assert card.rates_for(1001).output == D("5.60")
    assert book_of(cards(yuan)).card("m", "u", "2026") is Unpriced.NO_EXCHANGE_RATE


def test_an_engine_is_priced_by_its_gpus(cards) -> None:
    """One GPU unless told otherwise."""
    card = book_of(cards({"usd_per_gpu_hour": 3.6})).card("m", "u", "2026")
    assert isinstance(card, GpuCard)
    assert card.usd_per_second == D("0.001")
    made = bill(Usage(4000, 10, 2000), card, 2000.0)
    assert isinstance(made, Bill)
    assert made.saving == D("0.001")


@pytest.mark.parametrize(
    ("price", "path"),
    [
        ({}, "$.prices[0]"),
        ({"input": 1}, "$.prices[0].output"),
        ({"input": -1, "output": 1}, "$.prices[0].input"),
        ({"input": "nan", "output": 1}, "$.prices[0].input"),
        ({"input": "1,5", "output": 1}, "$.prices[0].input"),
        ({"input": 1, "output": True}, "$.prices[0].output"),
        (TOKENS | {"cached_raed": 1}, "$.prices[0].cached_raed"),
        (TOKENS | {"usd_per_unit": 2}, "$.prices[0].usd_per_unit"),
        (TOKENS | {"service_tier": "default"}, "$.prices[0].service_tier"),
        (TOKENS | {"service_tier": "standard"}, "$.prices[0].service_tier"),
        (TOKENS | {"currency": "yuan"}, "$.prices[0].currency"),
        (TOKENS | {"valid_from": "soon"}, "$.prices[0].valid_from"),
        (TOKENS | {"gpus_per_replica": 2}, "$.prices[0].gpus_per_replica"),
        (TOKENS | {"usd_per_gpu_hour": 2}, "$.prices[0].input"),
        ({"usd_per_gpu_hour": 2, "gpus_per_replica": 0}, "$.prices[0].gpus_per_replica"),
        ({"usd_per_gpu_hour": 2, "currency": "EUR"}, "$.prices[0].currency"),
        (TOKENS | {"tiers": [{"above_prompt_tokens": 0} | TOKENS]}, "$.prices[0].tiers[0].above_prompt_tokens"),
        (TOKENS | {"tiers": [{"above_prompt_tokens": 5} | TOKENS] * 2}, "$.prices[0].tiers[1].above_prompt_tokens"),
        (TOKENS | {"tiers": [{"above_prompt_tokens": 5, "input": 1}]}, "$.prices[0].tiers[0]"),
    ],
)
def test_what_cannot_be_a_price_is_an_error_with_its_path(cards, price: dict, path: str) -> None:
    """Before anything is served."""
    with pytest.raises(ConfigError) as raised:
        cards(price)
    assert raised.value.param == path


def test_the_same_card_twice_is_an_error(cards) -> None:
    """Which one counts would be chance."""
    with pytest.raises(ConfigError, match=r"\$\.prices\[1\]\.valid_from"):
        cards(TOKENS, TOKENS)


def test_of_cards_with_the_same_globs_the_newest_that_has_come_stands() -> None:
    """However they are ordered."""
    old, new = (TokenCard(rates_of(D(n), D(n))) for n in (1, 2))
    for rules in ([Rule("*", "*", "", old), Rule("*", "*", "2026", new)], [Rule("*", "*", "2026", new)]):
        assert PriceBook(rules, lambda *about: None).card("m", "u", "2026-05-05") is new


def test_new_rules_count_from_then_on(cards) -> None:
    """Prices that were found under the old rules are forgotten."""
    book = book_of(cards(TOKENS))
    before = book.card("m", "u", "2026")
    book.adopt(rules_of(cards({"input": 7, "output": 7}).prices))
    after = book.card("m", "u", "2026")
    assert isinstance(before, TokenCard)
    assert isinstance(after, TokenCard)
    assert (before.rates.input, after.rates.input) == (D("0.15"), D(7))

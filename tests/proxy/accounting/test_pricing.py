"""Bills: what is saved is what was reported, at the rates that apply."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from fnmatch import fnmatchcase

import msgspec
import pytest
from genai_prices import Usage as RawUsage
from genai_prices.data import providers
from genai_prices.data_snapshot import DataSnapshot
from hypothesis import given
from hypothesis import strategies as st

from proxy.accounting.builtin_prices import BuiltinPrices
from proxy.accounting.pricing import (
    MODELS_REMEMBERED_AT_MOST,
    Bill,
    GpuCard,
    KindRates,
    PriceBook,
    Rule,
    Tier,
    TokenCard,
    Unpriced,
    bill,
    moment_of,
    rates_of,
)
from proxy.records import KindTokens, Usage
from tests.support.operations import operations

D = Decimal
SONNET = TokenCard(rates_of(D(3), D(15), D("0.3"), D("3.75"), D(6)))


def priced(usage: Usage, card: TokenCard = SONNET) -> Bill:
    made = bill(usage, card, None)
    assert isinstance(made, Bill)
    return made


def test_cached_tokens_are_saved_at_the_difference_of_two_rates() -> None:
    """A million prompt tokens of which 900,000 were cached cost 0.3 + 0.27 dollars instead of 3."""
    made = priced(Usage(1_000_000, 0, 900_000))
    assert (made.uncached_cost, made.saving, made.cost) == (D(3), D("2.43"), D("0.57"))


def test_both_kinds_of_write_are_a_surcharge_of_their_own() -> None:
    """Five-minute and one-hour writes keep their own prices."""
    made = priced(Usage(300_000, 0, 0, cache_write_5m_tokens=100_000, cache_write_1h_tokens=100_000))
    assert made.surcharge == D("0.075") + D("0.3")
    assert made.saving == 0
    assert made.cost == D("0.3") + D("0.375") + D("0.6")


def test_calls_that_were_added_up_are_each_below_the_price_of_long_prompts() -> None:
    """203,000 tokens in two calls are not one prompt of over 200,000."""
    card = TokenCard(rates_of(D(3), D(15)), (Tier(200_000, rates_of(D(6), D(15))),))
    assert priced(Usage(203_000, longest_call_tokens=180_000), card).cost == 203_000 * D(3) / 1_000_000


def test_a_cached_count_that_is_unknown_saves_nothing() -> None:
    """None is not zero, and is never money."""
    assert priced(Usage(1_000, 10, None)).saving == 0


def test_a_card_without_a_cached_rate_saves_nothing() -> None:
    """Such tokens are billed in full."""
    assert priced(Usage(1_000, 10, 900), TokenCard(rates_of(D(3), D(15)))).saving == 0


def test_a_tier_applies_to_every_token_of_a_longer_prompt() -> None:
    """The threshold is a cliff, as the providers have it."""
    card = TokenCard(rates_of(D(3), D(15)), (Tier(200_000, rates_of(D(6), D("22.5"))),))
    assert priced(Usage(200_000), card).cost == D("0.6")
    assert priced(Usage(200_001), card).cost == 200_001 * D(6) / 1_000_000


def test_an_engine_is_priced_by_the_seconds_that_it_did_not_compute() -> None:
    """3.6 dollars an hour on two GPUs is 0.002 a second; 4,000 cached tokens at 2,000 a second are two of them."""
    made = bill(Usage(5_000, 10, 4_000), GpuCard(D("3.6"), D(2)), 2_000.0)
    assert isinstance(made, Bill)
    assert made.saving == D("0.004")
    assert made.cost == D("0.001")


def test_an_engine_without_a_learned_rate_is_unpriced() -> None:
    """No rate, no figure; never a zero."""
    assert bill(Usage(10), GpuCard(D(1)), None) is Unpriced.NO_PREFILL_RATE


@given(
    prompt=st.integers(0, 10**7), cached=st.integers(0, 10**7), write=st.integers(0, 10**7),
    rates=st.tuples(*[st.decimals(0, 1000, places=3)] * 4),
)  # fmt: skip
def test_the_bill_always_adds_up(
    prompt: int, cached: int, write: int, rates: tuple[Decimal, Decimal, Decimal, Decimal]
) -> None:
    """Cost is uncached cost less saving plus surcharge, and equals the sum over the parts, for any rates."""
    cached = min(cached, prompt)
    write = min(write, prompt - cached)
    card = TokenCard(rates_of(*rates))
    made = priced(Usage(prompt, 7, cached, write), card)
    assert made.saving >= 0
    assert made.surcharge >= 0
    parts = (prompt - cached - write) * rates[0] + cached * rates[2] + write * rates[3] + 7 * rates[1]
    assert made.cost == pytest.approx(parts / 1_000_000, abs=D("1e-12"))


def test_the_operators_card_comes_before_the_built_in_and_the_newest_before_older() -> None:
    """Rules are tried from the newest date that has come."""
    old, new, future = (TokenCard(rates_of(D(n), D(n))) for n in (1, 2, 3))
    built_in = TokenCard(rates_of(D(9), D(9)))
    rules = [Rule("gpt-*", "*", day, card) for day, card in (("2025", old), ("2026-01-01", new), ("2030", future))]
    book = PriceBook(rules, lambda *about: built_in)
    assert book.card("gpt-5", "https://a", "2026-11-23") is new
    assert book.card("gpt-5", "https://a", "2025-06-01") is old
    assert book.card("llama", "https://a", "2026-11-23") is built_in


def test_a_price_is_found_among_those_of_very_many_models_in_the_same_time() -> None:
    """All rules were tried for each pair of model and upstream that is not remembered: 0.12 ms of a thousand."""

    def work(models: int) -> int:
        card = TokenCard(rates_of(D(1), D(1)))
        book = PriceBook([Rule(f"m{n}", "*", "", card) for n in range(models)], lambda *about: None)
        assert book.card("m1", "https://a", "2026") is card
        return operations(lambda: book.card(f"m{models - 1}", "https://b", "2026"))

    assert work(1_000) == work(10)


@given(
    st.lists(st.sampled_from(["a", "ab", "a*", "?b", "*", "b"]), max_size=8), st.sampled_from(["a", "ab", "b", "c"])
)
def test_the_first_rule_that_fits_is_used_whether_it_has_a_pattern_or_not(patterns: list[str], model: str) -> None:
    """In the order of the configuration."""
    cards = [TokenCard(rates_of(D(n), D(n)), source=pattern) for n, pattern in enumerate(patterns)]
    rules = [
        Rule(pattern, "*", f"20{n:02}", card) for n, (pattern, card) in enumerate(zip(patterns, cards, strict=True))
    ]
    first = next((pattern for pattern in patterns if fnmatchcase(model, pattern)), None)
    found = PriceBook(rules, lambda *about: None).card(model, "https://a", "2026")
    assert found is Unpriced.NO_CARD if first is None else isinstance(found, TokenCard) and found.source == first


def test_a_model_that_nobody_knows_is_unpriced_and_never_zero() -> None:
    """The reason is told."""
    assert PriceBook([], lambda *about: None).card("x", "y", "2026") is Unpriced.NO_CARD


def test_made_up_names_do_not_grow_the_table() -> None:
    """Resolved cards are bounded."""
    book = PriceBook([], lambda *about: None)
    for number in range(5 * MODELS_REMEMBERED_AT_MOST):
        book.card(f"m{number}", "u", "2026")
    assert len(book._resolved) <= MODELS_REMEMBERED_AT_MOST  # noqa: SLF001 - internal state that no public name shows


def test_the_built_in_data_has_rates_and_tiers_and_says_where_from() -> None:
    """A known model at its provider's URL; the reading of tiers is the package's own."""
    card = BuiltinPrices().card("claude-sonnet-4-5", "https://api.anthropic.com/v1", "2026-11-27")
    assert card is not None
    assert card.rates.cached_read * 10 == card.rates.input
    assert card.tiers[0].rates.input == 2 * card.rates.input
    assert card.source.startswith("genai-prices")


@pytest.mark.parametrize(
    "upstream", ["http://127.0.0.1:8000/v1", "not a url", "https://dashscope.aliyuncs.com/v1", ""]
)
def test_what_the_built_in_data_cannot_find_is_none_and_never_raised(upstream: str) -> None:
    """Self-hosted and unknown upstreams have no built-in price."""
    assert BuiltinPrices().card("no-such-model", upstream, "2026-11-27") is None


def test_made_up_names_do_not_grow_the_built_in_data() -> None:
    """The package remembers each name that it was ever asked for; its snapshot is made anew now and then."""
    prices = BuiltinPrices()
    for number in range(3 * MODELS_REMEMBERED_AT_MOST):
        assert prices.card(f"m{number}", "http://127.0.0.1:8000/v1", "2026-11-27") is None
    snapshot = prices._snapshot  # noqa: SLF001 - internal state that no public name shows
    assert len(snapshot._provider_misses) + len(snapshot._lookup_cache) <= MODELS_REMEMBERED_AT_MOST  # noqa: SLF001 - internal state that no public name shows
    assert len(snapshot._provider_cache) <= MODELS_REMEMBERED_AT_MOST  # noqa: SLF001 - internal state that no public name shows
    assert prices.card("claude-sonnet-4-5", "https://api.anthropic.com/v1", "2026-11-27") is not None


@pytest.mark.parametrize(
    ("model", "url", "tier", "share"),
    [
        ("gpt-5", "https://api.openai.com/v1", "flex", "0.5"),
        ("gpt-5", "https://api.openai.com/v1", "priority", "2"),
        ("gpt-5", "https://api.openai.com/v1", "batch", "0.5"),
        ("claude-opus-5", "https://api.anthropic.com", "batch", "0.5"),
        ("claude-opus-5", "https://api.anthropic.com", "fast", "2"),
        ("gpt-5", "https://api.openai.com/v1", "no-such-tier", "1"),
        ("gpt-4o-mini", "https://api.openai.com/v1", "flex", "1"),  # not offered
    ],
)
def test_a_service_tier_has_its_own_built_in_price(model: str, url: str, tier: str, share: str) -> None:
    """Of input, output and cached input alike; the ordinary one if the data has none for the tier."""
    built_in = BuiltinPrices()
    book = PriceBook([], built_in.card)
    plain, special = book.card(model, url, "2026-11-27"), book.card(model, url, "2026-11-27", service_tier=tier)
    assert isinstance(plain, TokenCard)
    assert isinstance(special, TokenCard)
    for kind in ("input", "output", "cached_read"):
        assert getattr(special.rates, kind) == D(share) * getattr(plain.rates, kind)


def test_a_built_in_price_that_depends_on_the_time_of_day_is_looked_up_again() -> None:
    """DeepSeek's hours of peak and off-peak prices begin and end within a day."""
    book = PriceBook([], BuiltinPrices().card)
    prices = []
    for hour in (0.5, 1.0, 3.75, 4.0, 24.5, 25.0):
        card = book.card("deepseek-v4-flash", "https://api.deepseek.com/v1", moment_of(1_795_737_600 + 3600 * hour))
        assert isinstance(card, TokenCard)
        prices.append(card.rates.input)
    assert prices == [D("0.15"), D("0.3"), D("0.3"), D("0.15"), D("0.15"), D("0.3")]


def test_the_moment_of_a_price_lies_within_its_day() -> None:
    """A rule's date has passed from midnight on."""
    midnight = 1_795_737_600.0
    assert [moment_of(midnight + seconds) for seconds in (-1.0, 0.0, 899.0, 900.0)] == [
        "2026-11-26T23:45",
        "2026-11-27T00:00",
        "2026-11-27T00:00",
        "2026-11-27T00:15",
    ]
    tomorrow, today = (Rule("*", "*", day, TokenCard(rates_of(D(1), D(1)))) for day in ("2026-11-27", "2026-11-26"))
    book = PriceBook([tomorrow, today], lambda *about: None)
    assert book.card("m", "u", moment_of(midnight - 1)) is today.card
    assert book.card("m", "u", moment_of(midnight)) is tomorrow.card


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("gpt-4o-mini-realtime-preview", "https://api.openai.com/v1"),
        ("gpt-audio", "https://api.openai.com/v1"),
        ("gpt-image-1.5", "https://api.openai.com/v1"),
        ("gpt-realtime", "https://api.openai.com/v1"),
        ("gemini-2.5-flash", "https://generativelanguage.googleapis.com/v1beta/openai"),
        ("gpt-5.4", "https://api.openai.com/v1"),
        ("claude-sonnet-4-5", "https://api.anthropic.com"),
    ],
)
@pytest.mark.parametrize("tier", ["", "flex", "priority", "batch"])
@pytest.mark.parametrize("text", [1_000, 190_000, 400_000])
def test_a_bill_by_the_built_in_data_is_the_packages_own(model: str, url: str, tier: str, text: int) -> None:
    """For text, audio and images, cached, fresh and made, at each tier and length of the prompt."""
    card = PriceBook([], BuiltinPrices().card).card(model, url, "2026-11-27", service_tier=tier)
    assert isinstance(card, TokenCard)
    usage = Usage(
        text + 700,
        330,
        text // 2 + 150,
        audio=KindTokens(300, 100, 20),
        images=KindTokens(400, 50, 10),
        service_tier=tier,
    )
    expected = DataSnapshot(providers, from_auto_update=False).calc(
        RawUsage(
            input_tokens=text + 700,
            output_tokens=330,
            cache_read_tokens=text // 2 + 150,
            input_audio_tokens=300,
            cache_audio_read_tokens=100,
            output_audio_tokens=20,
            input_image_tokens=400,
            cache_image_read_tokens=50,
            output_image_tokens=10,
        ),
        model,
        None,
        url,
        datetime(2026, 11, 27, tzinfo=UTC),
        {"service_tier": tier, "processing": tier},
    )
    assert priced(usage, card).cost == expected.total_price


def test_kinds_of_tokens_that_exceed_the_whole_never_make_a_bill_negative() -> None:
    """Whatever an upstream reports, counters only grow."""
    free = KindRates(D(0), D(0), D(0))
    card = TokenCard(msgspec.structs.replace(SONNET.rates, audio=free, images=free))
    many = KindTokens(1_000, 1_000, 1_000)
    made = priced(Usage(1_000, 1_000, 1_000, audio=many, images=many), card)
    assert made == Bill(D(0), D(0), D(0), D(0))


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("models/gemini-2.5-flash", "https://generativelanguage.googleapis.com/v1beta/openai"),
        (
            "google/gemini-2.5-flash",
            "https://us-central1-aiplatform.googleapis.com/v1/projects/p/locations/l/endpoints/x",
        ),
        ("google/gemini-2.5-flash", "https://openrouter.ai/api/v1"),
    ],
)
def test_a_model_of_google_is_priced_by_each_of_its_names(name: str, url: str) -> None:
    """As its list of models has it, and as Vertex AI and OpenRouter want it."""
    prices = BuiltinPrices()
    card, plain = (prices.card(each, url, "2026-11-27") for each in (name, "gemini-2.5-flash"))
    assert card is not None
    assert card.rates.input == D("0.3")
    assert plain is None or card.rates == plain.rates
    assert prices.card("models/no-such-model", url, "2026-11-27") is None


def test_audio_that_is_not_believed_to_be_cached_saves_nothing() -> None:
    """The count of the whole decides."""
    card = TokenCard(msgspec.structs.replace(SONNET.rates, audio=KindRates(D(30), D(60), D(3))))
    usage = Usage(1_000_000, 0, None, audio=KindTokens(1_000_000, 1_000_000))
    assert (priced(usage, card).cost, priced(usage, card).saving) == (D(30), D(0))
    believed = Usage(1_000_000, 0, 1_000_000, audio=KindTokens(1_000_000, 1_000_000))
    assert (priced(believed, card).cost, priced(believed, card).saving) == (D(3), D(27))

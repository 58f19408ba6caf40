"""How fast a replica prefills, for routing and for accounts."""

from __future__ import annotations

from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.fleet.rate import ENOUGH, MOST_UNCONFIRMED, PoolRates, PrefillRate

DEFAULT = 4_000.0


def pooled(rate: PrefillRate) -> float:
    rates = PoolRates(DEFAULT)
    rates.put(0, rate)
    return rates.fallback


def test_accounts_use_what_was_measured_once_and_never_a_guess() -> None:
    """Nothing shown yet: none; then the median of what was shown, then what routing has learned."""
    assert PrefillRate().measured is None
    rate = PrefillRate()
    rate.observe(1000, 10.0)
    assert (rate.measured, rate.learned) == (100, None)
    for _ in range(8):
        rate.observe(1000, 5.0)
    assert rate.measured == rate.learned == 200


def test_a_configured_rate_stands_until_something_is_measured() -> None:
    """The operator's word is better than nothing."""
    rate = PrefillRate(configured=500.0)
    assert rate.measured == 500
    rate.observe(1000, 10.0)
    assert rate.measured == 100


def test_one_outlier_moves_nothing_however_few_observations_there_are() -> None:
    """An answer whose counts are wrong shows millions of tokens a second; its neighbours are believed."""
    for count in (2, 3, 7, 8, 20, 64):
        rate = PrefillRate()
        for _ in range(count - 1):
            assert rate.observe(13_500.0, 1.0)
        assert rate.observe(34_000.0, 0.01)
        assert rate.measured == pytest.approx(13_500.0)
        assert pooled(rate) == pytest.approx(13_500.0)
        assert rate.learned in (None, pytest.approx(13_500.0))


def test_a_single_observation_is_believed_up_to_a_bound() -> None:
    """No accelerator is as fast as the answer claims."""
    rate = PrefillRate()
    rate.observe(34_000.0, 0.01)
    assert rate.measured == MOST_UNCONFIRMED
    assert pooled(rate) == MOST_UNCONFIRMED


def test_what_computed_too_little_teaches_nothing() -> None:
    """Few tokens show the fixed cost of a request, a short time the grain of a clock."""
    rate = PrefillRate()
    assert not rate.observe(255.0, 1.0)
    assert not rate.observe(10_000.0, 0.004)
    assert not rate.guess(255.0, 1.0)
    assert rate.measured is None


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(("observe", "observe", "observe", "guess", "forget", "configure", "drop")),
        st.integers(0, 2),
        st.sampled_from((300.0, 900.0, 5_000.0, 9_000.0, 90_000.0)),
    ),
    max_size=60,
)


@given(CHANGES)
def test_the_rate_of_a_pool_is_that_of_all_that_is_known_of_its_replicas_now(changes) -> None:
    """However they changed: as computed anew from the replicas that are left."""
    pool = PoolRates(DEFAULT)
    rates: dict[int, PrefillRate] = {}
    for what, number, tokens in changes:
        rate = rates.setdefault(number, PrefillRate())
        if what == "drop":
            del rates[number]
            pool.drop(number)
            continue
        if what == "observe":
            rate.observe(tokens, 1.0)
        elif what == "guess" and not rate.seen:
            rate.guess(tokens, 1.0)
        elif what == "forget":
            rate.forget()
        elif what == "configure":
            rate.configured = tokens
        pool.put(number, rate)
    own = [rate.own for rate in rates.values() if rate.own is not None]
    seen = sorted(each for rate in rates.values() for each in rate.seen)
    guesses = [rate.guessed for rate in rates.values() if rate.guessed is not None]
    if own:
        expected = median(own)
    elif len(seen) >= ENOUGH:
        expected = seen[min(int(len(seen) * 0.9), len(seen) - 2)]
    elif seen:
        expected = max(DEFAULT, min(seen[0], MOST_UNCONFIRMED) if len(seen) == 1 else seen[(len(seen) - 1) // 2])
    else:
        expected = max(DEFAULT, min([MOST_UNCONFIRMED, *guesses])) if guesses else DEFAULT
    assert pool.fallback == expected

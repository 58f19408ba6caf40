"""How fast a replica prefills, for routing and for accounts."""

from __future__ import annotations

import pytest

from proxy.fleet.rate import MOST_UNCONFIRMED, PrefillRate, pooled


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
        assert pooled([rate], 4_000.0) == pytest.approx(13_500.0)
        assert rate.learned in (None, pytest.approx(13_500.0))


def test_a_single_observation_is_believed_up_to_a_bound() -> None:
    """No accelerator is as fast as the answer claims."""
    rate = PrefillRate()
    rate.observe(34_000.0, 0.01)
    assert rate.measured == MOST_UNCONFIRMED
    assert pooled([rate], 4_000.0) == MOST_UNCONFIRMED


def test_what_computed_too_little_teaches_nothing() -> None:
    """Few tokens show the fixed cost of a request, a short time the grain of a clock."""
    rate = PrefillRate()
    assert not rate.observe(255.0, 1.0)
    assert not rate.observe(10_000.0, 0.004)
    assert not rate.guess(255.0, 1.0)
    assert rate.measured is None

"""How fast a replica prefills, for routing and for accounts."""

from __future__ import annotations

from proxy.fleet.rate import PrefillRate


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

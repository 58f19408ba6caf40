"""The rate at which what waits is taken."""

from __future__ import annotations

import pytest

from proxy.routing.waiting_rate import WaitingRate


def test_the_rate_is_that_at_which_waiting_turns_were_taken():
    """Before any was, a first guess; time in which none waited does not count."""
    rate = WaitingRate()
    assert rate.seconds_for(8_000.0, 4_000.0) == 2.0
    rate.began(100.0)
    rate.took(50_000.0, 110.0)
    rate.took(50_000.0, 120.0)
    assert rate.seconds_for(10_000.0, 1.0) == pytest.approx(2.0)
    rate.began(5_000.0)
    rate.took(50_000.0, 5_010.0)
    assert rate.seconds_for(10_000.0, 1.0) == pytest.approx(2.0)

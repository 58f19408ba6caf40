"""Exponential back-off."""

from __future__ import annotations

import pytest

from cache.backoff import ExponentialBackoff


def test_pauses_double_up_to_the_limit_and_start_over_after_a_success() -> None:
    """0.1, 0.2, 0.4, 0.5, 0.5; after `reset` 0.1 again."""
    backoff = ExponentialBackoff(0.1, 0.5)
    assert [backoff.next_seconds() for _ in range(5)] == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])
    backoff.reset()
    assert backoff.next_seconds() == pytest.approx(0.1)


def test_jitter_spreads_a_pause_by_a_fifth_either_way() -> None:
    """The lowest and the highest random number give the bounds."""
    assert ExponentialBackoff(1.0, 1.0).next_seconds(0.0) == pytest.approx(0.8)
    assert ExponentialBackoff(1.0, 1.0).next_seconds(1.0) == pytest.approx(1.2)

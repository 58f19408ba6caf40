"""The limit of concurrent requests that an engine's gauges of running and waiting requests show."""

from __future__ import annotations

from proxy.fleet.learned_limit import LEAST_LIMIT, PEAK_SECONDS, LearnedLimit


def test_nothing_is_learned_while_nothing_waits_in_the_engine():
    """However many run: more might."""
    limit = LearnedLimit()
    assert limit.observe(200, 0, 0.0) is None


def test_while_requests_wait_those_that_run_are_the_limit():
    """As many as were seen to run at once, also if fewer do at the moment."""
    limit = LearnedLimit()
    assert limit.observe(256, 44, 0.0) == 256
    assert limit.observe(230, 10, 2.0) == 256


def test_a_few_requests_show_no_limit():
    """A long prompt takes all of a step's tokens, so others wait though the engine could run them."""
    limit = LearnedLimit()
    assert limit.observe(LEAST_LIMIT - 1, 5, 0.0) is None


def test_a_limit_that_is_reached_while_nothing_waits_grows():
    """And one that is not reached stays."""
    limit = LearnedLimit()
    limit.observe(20, 1, 0.0)
    assert limit.observe(19, 0, 2.0) == 20
    assert limit.observe(20, 0, 4.0) == 30
    assert limit.observe(30, 0, 6.0) == 45


def test_a_peak_of_long_ago_counts_no_more():
    """Longer prompts leave room for fewer of them."""
    limit = LearnedLimit()
    assert limit.observe(100, 3, 0.0) == 100
    assert limit.observe(40, 3, PEAK_SECONDS) == 100
    assert limit.observe(40, 3, PEAK_SECONDS + 1.0) == 40

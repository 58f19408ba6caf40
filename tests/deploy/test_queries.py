"""The check of queries finds what it is there to find."""

from __future__ import annotations

import pytest

from tests.deploy.queries import names_in, problems_of


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("rate(cairn_requests[5m])", "no metric cairn_requests"),
        ('rate(cairn_requests_total{status="5xx"}[5m])', "cairn_requests_total has no label status"),
        ("sum by (tenant) (cairn_requests_total)", "nothing here has a label tenant"),
        ("sum by (le) (rate(cairn_overhead_seconds_sum[5m]))", "nothing here has a label le"),
        ('up{model="m"}', "up has no label model"),
        ("cairn:share:rate1h > 0", "no metric cairn:share:rate1h"),
    ],
)
def test_it_finds(query: str, problem: str) -> None:
    """A name, a matched label and a grouping that no scrape has are found."""
    assert list(problems_of(query)) == [problem]


def test_it_bears_what_is_right() -> None:
    """Functions, words, values, durations and recorded names are no metrics."""
    query = (
        'histogram_quantile(0.95, sum by (le, model) (rate(cairn_time_to_first_token_seconds_bucket{job=~"$job", '
        'cache!="a or b{c}"}[$__rate_interval]))) > 0 and on (job) cairn:share:rate1h offset 1d or 0 * vector(1)'
    )
    assert list(problems_of(query, {"cairn:share:rate1h"})) == []
    assert [name for name, _ in names_in(query)] == [
        "cairn_time_to_first_token_seconds_bucket",
        "cairn:share:rate1h",
    ]

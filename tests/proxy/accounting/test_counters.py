"""The counts of one response under OpenTelemetry's names; `tests.scenarios.test_truth` checks sums over many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from cache import Store, Sums, Totals
from proxy.accounting.counters import RequestCounters
from proxy.accounting.error_stats import ErrorStats
from proxy.accounting.pricing import PriceBook
from proxy.fleet.pools import Pools, ReplicaEndpoint
from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import Spec
from proxy.metrics.exposition import Exposition
from proxy.metrics.model_labels import ModelNames
from proxy.metrics.recorder import Recorder
from proxy.model import Ending, Endpoint
from proxy.records import Outcome, ReplicaView, Times, Usage
from proxy.upstream import Origin

REPLICA = ReplicaView(0, "one", True, 1.0, 0.0, 0, None, 0.0, 0.05)
STREAMED = Outcome(
    "id",
    Endpoint.CHAT,
    "m",
    True,
    Ending.COMPLETE,
    200,
    Times(10.0, first_token_seconds=10.25, ended_seconds=12.5),
    replica=REPLICA,
    usage=Usage(1000, 21, 990),
    inter_token_counts=(10, *[0] * len(metrics.INTER_TOKEN.buckets)),
    inter_token_seconds=2.0,
)


def counters(recorder: Recorder, totals: Totals | None = None, unix_at: float = 0.0) -> RequestCounters:
    """Return counters of one replica, "one". `unix_at` is the Unix time at which the monotonic clock was zero."""
    pools = Pools((), None, {0: ReplicaEndpoint("one", "p", "http://h", Origin.parse("http://h"))})
    return RequestCounters(
        recorder,
        totals or Totals(cast(Store, None), "writer"),  # written by nobody here
        ModelNames(["m"]),
        PriceBook([], lambda *about: None),
        pools,
        lambda number: None,
        lambda seconds: unix_at + seconds,
        ErrorStats(lambda: 0.0),
    )


def counted(outcome: Outcome) -> Exposition:
    """Return the counts of one response."""
    recorder, exposition = Recorder(), Exposition()
    counters(recorder).count(outcome, outcome.usage, None)
    exposition.apply(0, recorder.take())
    return exposition


def sums(exposition: Exposition, spec: Spec) -> dict[tuple[str, ...], float]:
    return {labels: observed.total for labels, observed in exposition.observed(spec).items()}


@pytest.mark.parametrize(
    ("endpoint", "operation"),
    [
        (Endpoint.CHAT, "chat"),
        (Endpoint.MESSAGES, "chat"),
        (Endpoint.RESPONSES, "chat"),
        (Endpoint.COMPLETIONS, "text_completion"),
    ],
)
def test_an_answer_is_counted_under_the_names_that_other_dashboards_know(endpoint: Endpoint, operation: str) -> None:
    """First token, time per token after it (of ten chunks with twenty tokens), and tokens by their type."""
    exposition, labels = counted(replace(STREAMED, endpoint=endpoint)), (operation, "m", "one")
    assert sums(exposition, metrics.GEN_AI_TTFT) == {labels: 0.25}
    assert sums(exposition, metrics.GEN_AI_PER_TOKEN) == {labels: 0.1}
    assert sums(exposition, metrics.GEN_AI_USAGE) == {(*labels, "input"): 1000, (*labels, "output"): 21}


def test_an_answer_of_one_token_has_no_time_per_token_and_one_without_usage_no_tokens() -> None:
    """Nothing is divided by zero, and what is unknown is not zero."""
    short = counted(replace(STREAMED, usage=Usage(1000, 1), inter_token_counts=(), inter_token_seconds=0.0))
    assert sums(short, metrics.GEN_AI_PER_TOKEN) == {}
    mute = counted(replace(STREAMED, usage=None))
    assert sums(mute, metrics.GEN_AI_USAGE) == sums(mute, metrics.GEN_AI_PER_TOKEN) == {}


def test_a_request_counts_for_the_day_in_which_it_ended() -> None:
    """It is counted with others up to a quarter of a second later, maybe after midnight; its access line is not."""
    days: list[str] = []

    class Days:
        def row(self, day: str, *key: str) -> Sums:
            days.append(day)
            return Sums()

    midnight = 1_795_824_000.0  # 2026-11-28, UTC
    accounts = counters(Recorder(), cast(Totals, Days()), midnight - 12.6)
    for ended_seconds in (12.5, 12.7):
        outcome = replace(STREAMED, times=Times(10.0, ended_seconds=ended_seconds))
        accounts.count(outcome, outcome.usage, None)
        accounts.count(outcome, None, None)
        accounts.count_routing_gain(outcome, 5)
    assert days == ["2026-11-27"] * 3 + ["2026-11-28"] * 3


def test_only_predictions_that_can_be_compared_with_a_report_are_counted() -> None:
    """None of a response that does not report cached tokens, and no more than the prompt had."""
    recorder, exposition = Recorder(), Exposition()
    accounts = counters(recorder)
    accounts.count(STREAMED, Usage(1000, 21, 990), 1200)
    accounts.count(STREAMED, Usage(1000, 21, None), 900)
    exposition.apply(0, recorder.take())
    assert exposition.value(metrics.PREDICTED_CACHED) == 1000
    assert sums(exposition, metrics.PREDICTION_ERROR) == {("m", "one"): -10}


@pytest.mark.parametrize("other", [{"endpoint": Endpoint.MESSAGES}, {"stream": False}])
def test_cached_tokens_that_a_dialect_never_reports_are_not_zero_because_another_reports_them(
    other: dict[str, Any],
) -> None:
    """Engines report them in some dialects, or in streams only; a zero would count as an eviction or a restart."""
    accounts, mute = counters(Recorder()), replace(STREAMED, usage=Usage(1000, 21))
    assert accounts.known_usage(STREAMED) == Usage(1000, 21, 990)
    assert accounts.known_usage(mute) == Usage(1000, 21, 0)
    assert accounts.known_usage(replace(mute, **other)) == Usage(1000, 21, None)
    accounts.forget(0, "one")
    assert accounts.known_usage(mute) == Usage(1000, 21, None)

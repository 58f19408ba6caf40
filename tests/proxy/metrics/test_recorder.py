"""What a worker counts between two reports."""

from __future__ import annotations

from proxy.metrics import definitions as metrics
from proxy.metrics.recorder import Recorder
from tests.support.operations import operations


def test_replacing_a_gauge_costs_no_more_where_there_are_many_others() -> None:
    """A thousand replicas have eight gauges each, and all of them are replaced four times a second."""

    def cost(others: int) -> int:
        recorder = Recorder()
        recorder.replace_gauges(metrics.UPSTREAM_UP, {(f"r{number}",): 1.0 for number in range(others)})
        recorder.set(metrics.INDEX_BYTES, (), 1.0)
        return operations(lambda: recorder.replace_gauges(metrics.UPSTREAM_QUEUED, {("r0",): 1.0}))

    assert cost(200) == cost(2)


def test_a_replaced_gauge_has_only_the_new_series() -> None:
    """A replica that is gone is not shown with its last value; the other gauges stay."""
    recorder = Recorder()
    recorder.set(metrics.INDEX_BYTES, (), 3.0)
    recorder.replace_gauges(metrics.UPSTREAM_UP, {("old",): 1.0})
    recorder.replace_gauges(metrics.UPSTREAM_UP, {("new",): 0.0})
    assert sorted(recorder.take().gauges) == sorted(
        [(metrics.INDEX_BYTES.number, (), 3.0), (metrics.UPSTREAM_UP.number, ("new",), 0.0)]
    )

"""The page of a scrape: the reference client's, byte for byte, and in a fraction of its time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.utils import floatToGoString

from proxy.metrics import definitions as metrics
from proxy.metrics.definitions import SPECS, Kind, MetricsDelta
from proxy.metrics.exposition import Exposition
from proxy.metrics.model_labels import ModelNames
from proxy.metrics.recorder import Recorder
from proxy.metrics.text_format import number

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
LABEL_VALUES = ("", "plain", 'quote " and \\ and\nline', "ä€", "a,b={c}")


class Reference:
    """prometheus_client's own families of what a worker counted."""

    def __init__(self, delta: MetricsDelta) -> None:
        self._delta = delta

    def page(self, accept: str) -> bytes:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return choose_encoder(accept)[0](registry)

    def collect(self) -> Iterator[Metric]:
        for spec in SPECS:
            name, labels = spec.name, spec.labels
            if spec.kind is Kind.HISTOGRAM:
                histogram = HistogramMetricFamily(name, spec.help, labels=labels)
                bounds = [f"{float(bound)}" for bound in spec.buckets] + ["+Inf"]
                for n, values, counts, total in self._delta.histograms:
                    if n == spec.number:
                        cumulated = [sum(counts[: place + 1]) for place in range(len(counts))]
                        histogram.add_metric(values, list(zip(bounds, cumulated, strict=True)), total)
                yield histogram
                continue
            counter = spec.kind is Kind.COUNTER
            family = (CounterMetricFamily if counter else GaugeMetricFamily)(name, spec.help, labels=labels)
            rows = self._delta.counters if counter else self._delta.gauges
            found = [(values, value) for n, values, value in rows if n == spec.number]
            for values, value in found or ([] if labels or not counter else [((), 0.0)]):
                family.add_metric(values, value)
            yield family


def page_of(exposition: Exposition, accept: str = "") -> tuple[bytes, str]:
    pieces, content_type = exposition.render(accept)
    return b"".join(pieces), content_type


def everything(seed: int, series: int) -> MetricsDelta:
    """So many series of each metric that has labels, with odd label values and figures of all sizes."""
    chosen, recorder = random.Random(seed), Recorder()
    for spec in SPECS:
        for place in range(series if spec.labels else 1):
            labels = tuple(f"{chosen.choice(LABEL_VALUES)}{place}" for _ in spec.labels)
            value = chosen.choice((0, 1, 0.1, 3e-7, 123456.75, 1e6, 98765432.1, 2**53, 1e15, 1e22))
            if spec.kind is Kind.COUNTER:
                recorder.inc(spec, labels, value)
            elif spec.kind is Kind.HISTOGRAM:
                for _ in range(5):
                    recorder.observe(spec, labels, chosen.uniform(-1, 200))
            else:
                recorder.set(spec, labels, value)
    return recorder.take()


@pytest.mark.parametrize("accept", ["", "text/plain", "text/plain; version=1.0.0", OPENMETRICS])
@pytest.mark.parametrize("series", [0, 3])
def test_the_page_is_the_reference_clients(accept: str, series: int) -> None:
    """In both formats, empty and full, a second time as well as the first."""
    delta, exposition = everything(7, series), Exposition()
    exposition.apply(0, delta)
    expected = Reference(delta).page(accept)
    assert page_of(exposition, accept) == (expected, choose_encoder(accept)[1])
    assert page_of(exposition, accept)[0] == expected


@given(st.floats() | st.integers(0, 2**60))
def test_numbers_are_written_as_the_reference_writes_them(value: float) -> None:
    """All floats."""
    assert number(value) == floatToGoString(value)


def test_a_scrape_of_eight_thousand_series_takes_under_a_tenth_of_a_second() -> None:
    """Of CPU time, and the best of ten, since the machine is shared; four workers at full load have no more."""
    exposition = Exposition()
    exposition.apply(0, everything(1, 64))
    page, _ = page_of(exposition)
    assert sum(not line.startswith(b"#") for line in page.splitlines()) > 8_000

    def cpu_seconds() -> float:
        began = time.thread_time()
        page_of(exposition)
        return time.thread_time() - began

    assert any(cpu_seconds() < 0.1 for _ in range(10))


def test_ten_thousand_made_up_models_add_one_series() -> None:
    """The label is `other` for all of them."""
    names, recorder, exposition = ModelNames(["known"]), Recorder(), Exposition()
    for number_ in range(10_000):
        recorder.inc(metrics.TOKENS, (names.label(f"made-up-{number_}"), "u", "output"), 1)
    exposition.apply(0, recorder.take())
    assert page_of(exposition)[0].count(b"cairn_tokens_total{") == 1
    assert exposition.value(metrics.TOKENS, ("other", "u", "output")) == 10_000


def test_a_long_list_of_models_leaves_room_for_those_that_are_used() -> None:
    """A provider lists hundreds, of which few are used; names become labels in the order of their use."""
    names = ModelNames(["configured", "gpt-*"])
    names.add(["m" * 10_000, "gpt-*", *(f"listed-{number_}" for number_ in range(1_000))])
    assert names.label("m" * 10_000) == metrics.OTHER
    assert names.label("listed-999") == "listed-999"
    assert names.label("configured") == "configured"
    assert names.label("gpt-*") == names.label("not-listed") == names.label(None) == metrics.OTHER
    labels = {names.label(f"listed-{number_}") for number_ in range(1_000)}
    assert len(labels - {metrics.OTHER}) == metrics.MODEL_NAMES_AT_MOST - 1
    assert names.label("listed-999") == "listed-999"

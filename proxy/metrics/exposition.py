"""Sum the workers' figures and write the metrics page. Runs in the supervisor.

The figures survive a worker, a worker that is gone leaves no gauge behind, and a scrape waits for no worker. The only
importer of prometheus_client, which chooses the format that a scraper accepts; its multiprocess mode is not used,
because its memory-mapped files cost 0.8 to 1.8 us an update and allow no live gauge per worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from prometheus_client.exposition import choose_encoder

from proxy.metrics.definitions import GONE, SPECS, Kind, Labels, MetricsDelta, Observed, Spec
from proxy.metrics.text_format import END, Family

SHOWN_SECONDS = 300.0
"""For how long the series of a replica that is gone stay on the page: every scraper must get their last values."""

LINES_AT_ONCE = 1_000
"""Lines of a metrics page in one piece: some milliseconds' work."""

_Value = TypeVar("_Value")
_ZERO: Mapping[Labels, float] = {(): 0.0}
_TYPES = {Kind.COUNTER: "counter", Kind.GAUGE_SUM: "gauge", Kind.GAUGE_MAX: "gauge", Kind.HISTOGRAM: "histogram"}


class Exposition:
    """The figures of all workers, added up.

    Counts of replicas that are gone for good stay part of all sums, but the page does not show them: added to another
    series, Prometheus would take what was counted long ago for counted now.
    """

    def __init__(self) -> None:
        self._counters: list[dict[Labels, float]] = [{} for _ in SPECS]
        self._histograms: list[dict[Labels, Observed]] = [{} for _ in SPECS]
        self._gauges: dict[int, list[tuple[int, Labels, float]]] = {}
        self._leaving: dict[str, float | None] = {}  # replicas that are gone, and since when the page shows them yet
        self._joined: list[dict[Labels, float]] | None = None  # the gauges of all workers, until one changes
        self._families = [
            Family(spec.name, _TYPES[spec.kind], spec.help, spec.labels, spec.buckets) for spec in SPECS
        ]

    def apply(self, worker: int, delta: MetricsDelta) -> None:
        """Add the counts of `worker`, and replace its gauges."""
        leaving = self._leaving
        for number, labels, value in delta.counters:
            series = self._counters[number]
            series[labels] = series.get(labels, 0) + value
            if leaving:
                self._stay(number, labels)
        for number, labels, counts, total in delta.histograms:
            observed = self._histograms[number].setdefault(labels, Observed([0] * len(counts)))
            observed.counts = [old + new for old, new in zip(observed.counts, counts, strict=True)]
            observed.total += total
            if leaving:
                self._stay(number, labels)
        self._gauges[worker], self._joined = delta.gauges, None
        if leaving:
            for number, labels, _ in delta.gauges:
                self._stay(number, labels)
        leaving.update(dict.fromkeys(delta.forgotten))

    def pass_time(self, now_seconds: float) -> None:
        """Show replicas no more that have been gone for SHOWN_SECONDS; call it from time to time."""
        gone: set[str] = set()
        for name, since_seconds in self._leaving.items():
            if since_seconds is None:
                self._leaving[name] = now_seconds
            elif now_seconds - since_seconds >= SHOWN_SECONDS:
                gone.add(name)
        if gone:
            for name in gone:
                del self._leaving[name]
            self._fold(gone)

    def _stay(self, number: int, labels: Labels) -> None:
        """Note that a replica is reported on again: it is back, or another worker still uses it."""
        at = SPECS[number].replica_at
        if at is not None:
            self._leaving.pop(labels[at], None)

    def _fold(self, upstreams: set[str]) -> None:
        """Add the counts of replicas that are gone to those of `GONE`, so that sums stay the same."""
        for spec in SPECS:
            at = spec.replica_at
            if at is None:
                continue
            counters, histograms = self._counters[spec.number], self._histograms[spec.number]
            for labels in [labels for labels in counters if labels[at] in upstreams]:
                folded = _renamed(labels, at)
                counters[folded] = counters.get(folded, 0) + counters.pop(labels)
            for labels in [labels for labels in histograms if labels[at] in upstreams]:
                gone = histograms.pop(labels)
                observed = histograms.setdefault(_renamed(labels, at), Observed([0] * len(gone.counts)))
                observed.counts = [old + new for old, new in zip(observed.counts, gone.counts, strict=True)]
                observed.total += gone.total

    def forget(self, worker: int) -> None:
        """Drop the gauges of a worker that has ended; its counts stay."""
        self._gauges.pop(worker, None)
        self._joined = None

    def value(self, spec: Spec, labels: Labels | None = None) -> float:
        """Return the sum of a counter's series, or the value of one of them."""
        series = self._counters[spec.number]
        return sum(series.values()) if labels is None else series.get(labels, 0)

    def labels(self, spec: Spec) -> list[Labels]:
        """Return the label values of a counter's series."""
        return list(self._counters[spec.number])

    def total(self, spec: Spec, label: int, value: str) -> float:
        """Return the sum of those series of a counter whose label number `label` has `value`."""
        return sum(amount for labels, amount in self._counters[spec.number].items() if labels[label] == value)

    def series(self, spec: Spec) -> Mapping[Labels, float]:
        """Return the series of a counter, or those of a gauge combined over the workers."""
        if spec.kind is Kind.COUNTER:
            return self._counters[spec.number]
        if self._joined is None:
            self._joined = [{} for _ in SPECS]
            for number, labels, value in _rows(self._gauges.values()):
                _join(SPECS[number], self._joined[number], labels, value)
        return self._joined[spec.number]

    def observed(self, spec: Spec) -> Mapping[Labels, Observed]:
        """Return the series of a histogram."""
        return self._histograms[spec.number]

    def render(self, accept: str) -> tuple[Iterator[bytes], str]:
        """Write the metrics page for a scraper that sent `accept`.

        Returns:
            The body in pieces, each some milliseconds' work, and its content type: OpenMetrics if the scraper asks
            for it, else Prometheus text. Figures may change between two pieces: gauges are those of the first piece,
            and counts those of the moment when their metric begins, so that each metric is consistent in itself.
        """
        content_type = _content_type(accept)
        openmetrics = content_type.startswith("application/openmetrics-text")
        return self._pieces(openmetrics=openmetrics), content_type

    def _pieces(self, *, openmetrics: bool) -> Iterator[bytes]:
        """Yield the page in pieces; the first ones may be empty."""
        gauges: list[dict[Labels, float]] = [{} for _ in SPECS]
        rows = _rows(list(self._gauges.values()))  # a report replaces a worker's rows and changes none
        while some := list(islice(rows, LINES_AT_ONCE)):
            for number, labels, value in some:
                _join(SPECS[number], gauges[number], labels, value)
            yield b""
        lines: list[str] = []
        for line in self._lines(gauges, openmetrics=openmetrics):
            lines.append(line)
            if len(lines) >= LINES_AT_ONCE:
                yield "".join(lines).encode()
                lines.clear()
        yield "".join(lines).encode()

    def _lines(self, gauges: list[dict[Labels, float]], *, openmetrics: bool) -> Iterator[str]:
        for spec, family in zip(SPECS, self._families, strict=True):
            yield family.describe(openmetrics=openmetrics)
            if spec.kind is Kind.HISTOGRAM:
                histograms = _shown(spec, self._histograms[spec.number])
                for labels, counts, total in [(key, each.counts, each.total) for key, each in histograms.items()]:
                    yield from family.histogram(labels, counts, total)
                family.keep_only(histograms)
            elif spec.kind is Kind.COUNTER:
                series = _shown(spec, self._counters[spec.number])
                # a counter without labels is shown from the start, so that a rate includes its first increase
                has_none = not series and not spec.labels
                yield from family.values(_ZERO if has_none else dict(series))
                family.keep_only(_ZERO if has_none else series)
            else:
                yield from family.values(gauges[spec.number])
                family.keep_only(gauges[spec.number])
        if openmetrics:
            yield END


def _renamed(labels: Labels, at: int) -> Labels:
    return (*labels[:at], GONE, *labels[at + 1 :])


def _shown(spec: Spec, series: Mapping[Labels, _Value]) -> Mapping[Labels, _Value]:
    """Return the series without those of replicas that are gone."""
    at = spec.replica_at
    if at is None:
        return series
    return {labels: value for labels, value in series.items() if labels[at] != GONE}


def _content_type(accept: str) -> str:
    """Return the format for a scraper; the usual one if it asks for a version that is not a number."""
    try:
        return choose_encoder(accept)[1]
    except (TypeError, ValueError):  # prometheus_client compares versions without checking them
        return choose_encoder("")[1]


def _join(spec: Spec, series: dict[Labels, float], labels: Labels, value: float) -> None:
    """Combine one worker's value with the value of a gauge's series."""
    if spec.kind is Kind.GAUGE_SUM:
        series[labels] = series.get(labels, 0) + value
    else:
        series[labels] = max(series.get(labels, value), value)


def _rows(workers: Iterable[list[tuple[int, Labels, float]]]) -> Iterator[tuple[int, Labels, float]]:
    for rows in workers:
        yield from rows

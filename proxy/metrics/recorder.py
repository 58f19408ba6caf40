"""What a worker counts, in plain memory, until it is handed over; the metrics themselves stand in
`proxy.metrics.definitions`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from proxy.metrics.definitions import SPECS, Labels, MetricsDelta, Spec


class Counter:
    """One series of a counter. Add to `value` what is not negative; `seen` tells that it has happened at all."""

    __slots__ = ("seen", "value")

    def __init__(self) -> None:
        self.value = 0.0
        self.seen = False


class Histogram:
    """One series of a histogram."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        """Count `value`."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def add_counts(self, counts: Sequence[int], total: float) -> None:
        """Add values that were sorted into the buckets already, and their sum."""
        self._counts = [old + new for old, new in zip(self._counts, counts, strict=True)]
        self._total += total

    def take(self) -> tuple[list[int], float] | None:
        """What came since the last call, None where nothing did."""
        counts, total = self._counts, self._total
        if not any(counts):
            return None
        self._counts, self._total = [0] * len(counts), 0.0
        return counts, total


class Recorder:
    """Counts in plain memory; nothing here does I/O.

    `inc` and `observe` find their series by its labels, which is most of their 0.3 us. Who counts for every request
    keeps the series themselves, from `counter` and `histogram`: they are good for as long as this is.
    """

    def __init__(self) -> None:
        self._counters: list[dict[Labels, Counter]] = [{} for _ in SPECS]
        self._histograms: list[dict[Labels, Histogram]] = [{} for _ in SPECS]
        self._gauges: dict[tuple[int, Labels], float] = {}

    def counter(self, spec: Spec, labels: Labels = ()) -> Counter:
        """A series of a counter, to be kept. It is not shown before something was added to it."""
        series = self._counters[spec.number]
        tally = series.get(labels)
        if tally is None:
            tally = series[labels] = Counter()
        return tally

    def histogram(self, spec: Spec, labels: Labels = ()) -> Histogram:
        """A series of a histogram, to be kept. It is not shown before something was added to it."""
        series = self._histograms[spec.number]
        buckets = series.get(labels)
        if buckets is None:
            buckets = series[labels] = Histogram(spec.buckets)
        return buckets

    def inc(self, spec: Spec, labels: Labels = (), amount: float = 1) -> None:
        """Add `amount`, not negative, to a counter; also a zero makes it be shown."""
        tally = self.counter(spec, labels)
        tally.value += amount
        tally.seen = True

    def observe(self, spec: Spec, labels: Labels, value: float) -> None:
        """Count `value` into a histogram."""
        self.histogram(spec, labels).add(value)

    def set(self, spec: Spec, labels: Labels, value: float) -> None:
        """Set a gauge of this worker."""
        self._gauges[spec.number, labels] = value

    def replace_gauges(self, spec: Spec, values: Mapping[Labels, float]) -> None:
        """Set all series of a gauge at once; those that are not in `values` go."""
        for key in [key for key in self._gauges if key[0] == spec.number]:
            del self._gauges[key]
        for labels, value in values.items():
            self._gauges[spec.number, labels] = value

    def take(self) -> MetricsDelta:
        """What was counted since the last call."""
        delta = MetricsDelta(gauges=[(number, labels, value) for (number, labels), value in self._gauges.items()])
        for number, series in enumerate(self._counters):
            for labels, tally in series.items():
                if tally.value or tally.seen:
                    delta.counters.append((number, labels, tally.value))
                    tally.value, tally.seen = 0.0, False
        for number, histograms in enumerate(self._histograms):
            for labels, buckets in histograms.items():
                if (taken := buckets.take()) is not None:
                    delta.histograms.append((number, labels, *taken))
        return delta

    def put_back(self, delta: MetricsDelta) -> None:
        """Count again what was taken and could not be handed over."""
        for number, labels, value in delta.counters:
            self.inc(SPECS[number], labels, value)
        for number, labels, counts, total in delta.histograms:
            self.histogram(SPECS[number], labels).add_counts(counts, total)

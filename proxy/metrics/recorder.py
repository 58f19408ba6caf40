"""Count in plain memory until the figures are sent to the supervisor. Does no I/O."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

from proxy.metrics.definitions import SPECS, Labels, MetricsDelta, Spec


class Counter:
    """One series of a counter. Add non-negative amounts to `value`; set `seen` to show a zero."""

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
        """Add values that are already sorted into buckets; `total` is their sum."""
        self._counts = [old + new for old, new in zip(self._counts, counts, strict=True)]
        self._total += total

    def take(self) -> tuple[list[int], float] | None:
        """Return (counts, sum) since the last call, or None if nothing was counted."""
        counts, total = self._counts, self._total
        if not any(counts):
            return None
        self._counts, self._total = [0] * len(counts), 0.0
        return counts, total


class Recorder:
    """The counts of one process since the last `take`.

    `inc` and `observe` look up the series by its labels, which takes most of their 0.3 us. Code that counts for every
    request should keep the series returned by `counter` and `histogram`; they stay valid.
    """

    def __init__(self) -> None:
        self._counters: list[dict[Labels, Counter]] = [{} for _ in SPECS]
        self._histograms: list[dict[Labels, Histogram]] = [{} for _ in SPECS]
        self._gauges: list[dict[Labels, float]] = [{} for _ in SPECS]
        self._last = MetricsDelta()  # the last counts of replicas that are gone, and their names

    def counter(self, spec: Spec, labels: Labels = ()) -> Counter:
        """Return a counter's series. It is not shown until something is added to it."""
        series = self._counters[spec.number]
        found = series.get(labels)
        if found is None:
            found = series[labels] = Counter()
        return found

    def histogram(self, spec: Spec, labels: Labels = ()) -> Histogram:
        """Return a histogram's series. It is not shown until something is added to it."""
        series = self._histograms[spec.number]
        found = series.get(labels)
        if found is None:
            found = series[labels] = Histogram(spec.buckets)
        return found

    def inc(self, spec: Spec, labels: Labels = (), amount: float = 1) -> None:
        """Add `amount`, at least 0, to a counter; even 0 makes the series visible."""
        counter = self.counter(spec, labels)
        counter.value += amount
        counter.seen = True

    def observe(self, spec: Spec, labels: Labels, value: float) -> None:
        """Count `value` in a histogram."""
        self.histogram(spec, labels).add(value)

    def set(self, spec: Spec, labels: Labels, value: float) -> None:
        """Set a gauge of this worker."""
        self._gauges[spec.number][labels] = value

    def replace_gauges(self, spec: Spec, values: Mapping[Labels, float]) -> None:
        """Set all series of a gauge at once; series that are not in `values` are removed."""
        self._gauges[spec.number] = dict(values)

    def take(self) -> MetricsDelta:
        """Return what was counted since the last call, and all gauges."""
        gauges = [
            (number, labels, value) for number, series in enumerate(self._gauges) for labels, value in series.items()
        ]
        delta, self._last = self._last, MetricsDelta()
        delta.gauges = gauges
        for number, series in enumerate(self._counters):
            for labels, counter in series.items():
                if counter.value or counter.seen:
                    delta.counters.append((number, labels, counter.value))
                    counter.value, counter.seen = 0.0, False
        for number, histograms in enumerate(self._histograms):
            for labels, histogram in histograms.items():
                if (taken := histogram.take()) is not None:
                    delta.histograms.append((number, labels, *taken))
        return delta

    def forget(self, upstream: str) -> None:
        """Drop all series of a replica that is gone for good, after the next `take`.

        Series that were returned for it must not be used any more.
        """
        for spec in SPECS:
            at = spec.replica_at
            if at is None:
                continue
            counters, histograms = self._counters[spec.number], self._histograms[spec.number]
            for labels in [labels for labels in counters if labels[at] == upstream]:
                counter = counters.pop(labels)
                if counter.value or counter.seen:
                    self._last.counters.append((spec.number, labels, counter.value))
            for labels in [labels for labels in histograms if labels[at] == upstream]:
                if (taken := histograms.pop(labels).take()) is not None:
                    self._last.histograms.append((spec.number, labels, *taken))
        self._last.forgotten.append(upstream)

    def put_back(self, delta: MetricsDelta) -> None:
        """Count again a delta that could not be sent."""
        gone = frozenset(delta.forgotten)
        self._last.forgotten += delta.forgotten
        for counted in delta.counters:
            number, labels, value = counted
            if _is_of(SPECS[number], labels, gone):  # a series would stay for good
                self._last.counters.append(counted)
            else:
                self.inc(SPECS[number], labels, value)
        for observed in delta.histograms:
            number, labels, counts, total = observed
            if _is_of(SPECS[number], labels, gone):
                self._last.histograms.append(observed)
            else:
                self.histogram(SPECS[number], labels).add_counts(counts, total)


def _is_of(spec: Spec, labels: Labels, replicas: frozenset[str]) -> bool:
    return bool(replicas) and spec.replica_at is not None and labels[spec.replica_at] in replicas

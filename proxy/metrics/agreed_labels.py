"""Agree on the models that all workers count under their own names, so that no figure is split. Pure.

Each worker meets models in another order. If each chose its labels by itself, a model's requests would be counted
under its name by some workers and as `other` by the rest, and with every restart of a worker further names would
follow.
"""

from __future__ import annotations

from msgspec.structs import replace

from proxy.metrics.definitions import MODEL_NAMES_AT_MOST, OTHER, SPECS, Labels, MetricsDelta


class AgreedLabels:
    """The labels of a proxy, in the order of their first use. One per supervisor."""

    def __init__(self) -> None:
        self._models: dict[str, None] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The models that have a label of their own."""
        return tuple(self._models)

    def settle(self, counts: MetricsDelta) -> MetricsDelta:
        """Agree to the models in a worker's counts while there is room; return them with the others as `other`."""
        return replace(
            counts,
            counters=[(number, self._settled(number, labels), value) for number, labels, value in counts.counters],
            histograms=[
                (number, self._settled(number, labels), found, total)
                for number, labels, found, total in counts.histograms
            ],
        )

    def _settled(self, number: int, labels: Labels) -> Labels:
        at = _MODEL_AT[number]
        if at is None or labels[at] == OTHER or self._agrees(labels[at]):
            return labels
        return (*labels[:at], OTHER, *labels[at + 1 :])

    def _agrees(self, model: str) -> bool:
        if model not in self._models:
            if len(self._models) >= MODEL_NAMES_AT_MOST:
                return False
            self._models[model] = None
        return True


_MODEL_AT = [spec.model_at for spec in SPECS]

"""Bound the model names that become metric labels, so that clients cannot create series. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.metrics.definitions import MODEL_NAMES_AT_MOST, OTHER
from proxy.patterns import is_pattern


class ModelNames:
    """The model names allowed as labels: those of the configuration and of the upstreams' lists, at most 64."""

    def __init__(self, configured: Iterable[str]) -> None:
        self._names: dict[str, str] = {}
        self.add(name for name in configured if not is_pattern(name))

    def add(self, names: Iterable[str]) -> None:
        """Allow `names`, for example those of an upstream's model list, while there is room."""
        for name in names:
            if len(self._names) < MODEL_NAMES_AT_MOST:
                self._names.setdefault(name, name)

    def label(self, model: str | None) -> str:
        """Return `model` if it is allowed as a label, else `other`."""
        return OTHER if model is None else self._names.get(model, OTHER)

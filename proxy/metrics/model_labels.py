"""The model names that may become metric labels: a bounded set, so that clients cannot create series."""

from __future__ import annotations

from collections.abc import Iterable

from proxy.metrics.definitions import MODEL_NAMES_AT_MOST, OTHER


class ModelNames:
    """The names that may be labels: those of the configuration and of the upstreams' own lists, at most 64."""

    def __init__(self, configured: Iterable[str]) -> None:
        self._names: dict[str, str] = {}
        self.add(name for name in configured if not set(name) & set("*?["))

    def add(self, names: Iterable[str]) -> None:
        """Take in names that an upstream lists."""
        for name in names:
            if len(self._names) < MODEL_NAMES_AT_MOST:
                self._names.setdefault(name, name)

    def label(self, model: str | None) -> str:
        """`model` where it is known, else `other`."""
        return OTHER if model is None else self._names.get(model, OTHER)

"""Bound the model names that become metric labels, so that clients cannot create series. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from proxy.metrics.definitions import MODEL_NAMES_AT_MOST, OTHER
from proxy.patterns import is_pattern

LISTED_AT_MOST: Final = 8192  # names that may become labels; the longest lists of providers have a thousand
_NAME_CHARACTERS_MOST: Final = 256


class ModelNames:
    """The model names that may be labels: those of the configuration and of the upstreams' lists.

    The first 64 of them that are used in any worker are labels: those that the supervisor has agreed to (`adopt`),
    and until it knows of them, those that this worker uses first. A provider's list alone has more names than that.
    """

    def __init__(self, configured: Iterable[str]) -> None:
        self._listed: dict[str, str] = {}
        self._labels: dict[str, str] = {}
        self.add(configured)

    def add(self, names: Iterable[str]) -> None:
        """Allow `names`, such as those of an upstream's model list, while there is room. Patterns are left out."""
        for name in names:
            is_name = len(name) <= _NAME_CHARACTERS_MOST and not is_pattern(name)
            if is_name and len(self._listed) < LISTED_AT_MOST:
                self._listed.setdefault(name, name)

    def label(self, model: str | None) -> str:
        """Return `model` if it is allowed as a label, else `other`."""
        if model is None:
            return OTHER
        found = self._labels.get(model)
        if found is not None:
            return found
        listed = self._listed.get(model)
        if listed is None or len(self._labels) >= MODEL_NAMES_AT_MOST:
            return OTHER
        self._labels[model] = listed
        return listed

    def adopt(self, agreed: Iterable[str]) -> None:
        """Use the labels of all workers. Names that only this worker has used stay labels while there is room."""
        labels = {name: self._listed.get(name, name) for name in agreed}
        for name, listed in self._labels.items():
            if len(labels) < MODEL_NAMES_AT_MOST:
                labels[name] = listed
        self._labels = labels

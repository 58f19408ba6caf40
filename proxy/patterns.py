"""Match model names against the patterns of the configuration.

Only `*` (any characters) and `?` (one character) are special. Square brackets are ordinary letters, since names of
models contain them.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final

ANY: Final = "*"


def is_pattern(text: str) -> bool:
    """Return True if `text` can match more than one name."""
    return "*" in text or "?" in text


def matches(name: str, pattern: str) -> bool:
    """Return True if `name` is `pattern`, or fits its `*` and `?`. Case matters."""
    if pattern == ANY:
        return True
    if not is_pattern(pattern):
        return name == pattern
    return fnmatchcase(name, pattern.replace("[", "[[]"))


def matches_any(name: str, patterns: Iterable[str]) -> bool:
    """Return True if `name` fits at least one of `patterns`."""
    for pattern in patterns:  # noqa: SIM110 - a generator costs more than the comparisons
        if matches(name, pattern):
            return True
    return False

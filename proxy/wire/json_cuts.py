"""Shorten JSON text for its decoder by cutting the inside out of long strings, which nobody decodes. Pure.

A decoder finds the end of a string byte by byte: half of the time that a body of 512 KB takes. The pass in C
(`json_cuts.c`, compiled with the data path) takes a quarter of that. Where it is not compiled, nothing is shortened.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.model import Body

SHORTENED_FROM_BYTES: Final = 16 * 1024
"""Least length of a text that is shortened; from here on it pays."""

Shorten = Callable[[Body], tuple[bytes, bytes] | None]
"""Return the short text and its cuts; None if nothing is worth cutting, or the text is no valid JSON."""

Whole = Callable[[memoryview, bytes, bytes, Raw], memoryview]
"""Return the slice of a whole text whose short form is a part of the short text."""


def _compiled() -> tuple[Shorten | None, Whole | None]:
    try:
        library = importlib.import_module("cairn_json_cuts")
    except ImportError:
        return None, None
    return library.shorten, library.whole


_shorten, _whole = _compiled()


@functools.cache
def _members(kind: type[msgspec.Struct]) -> tuple[tuple[str, ...], Callable[[msgspec.Struct], tuple[Any, ...]]]:
    """Return the names of a struct's members, and a function that returns all their values."""
    names = kind.__struct_fields__
    return names, operator.attrgetter(*names)


class ShortText:
    """A text without the inside of its long strings.

    A long string that is a member of the outermost object keeps its first KB, since such a member may be decoded.
    """

    __slots__ = ("_body", "_cuts", "text")

    def __init__(self, body: Body, text: bytes, cuts: bytes) -> None:
        self.text = text
        self._body = memoryview(body).toreadonly()
        self._cuts = cuts

    def restore(self, fields: msgspec.Struct, absent: Raw) -> None:
        """Replace the raw values of `fields`, which were decoded from `text`, by those of the whole text."""
        names, values_of = _members(type(fields))
        for name, value in zip(names, values_of(fields), strict=True):
            if value is absent:  # most of them are
                continue
            if type(value) is Raw:
                setattr(fields, name, self.whole(value))
            elif type(value) is list and value and type(value[0]) is Raw:
                value[:] = [self.whole(item) for item in value]

    def whole(self, part: Raw) -> Raw:
        """Return the part of the whole text whose short form is `part`."""
        assert _whole is not None  # noqa: S101 - it made `text`
        return Raw(_whole(self._body, self.text, self._cuts, part))


def text_with_keys(body: Body) -> Body:
    """Return text with all keys of `body`: the inside of long strings, where no key is, may be left out."""
    short = shortened(body)
    return body if short is None else short.text


def shortened(body: Body) -> ShortText | None:
    """Return `body` without the inside of its long strings; None if it is not worth it or not valid JSON."""
    if _shorten is None or len(body) < SHORTENED_FROM_BYTES:
        return None
    found = _shorten(body)
    return None if found is None else ShortText(body, *found)

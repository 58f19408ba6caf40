"""What two graphs of objects have in common: every plain value that can be reached, by its path."""

from __future__ import annotations

import asyncio
import enum
import functools
import logging
import random
import ssl
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path

from proxy.config.schema import Secret, Section

_PLAIN = (str, bytes, bytearray, int, float, enum.Enum, Decimal, date, Path, Secret, Section, types.NoneType)
_OPAQUE = (
    *(asyncio.AbstractEventLoop, asyncio.Future, asyncio.Handle, asyncio.Event, asyncio.Lock),
    *(logging.Logger, random.Random, ssl.SSLContext, types.ModuleType, type, weakref.ref),
)


def values(root: object, left_out: Collection[str] = ()) -> dict[str, object]:
    """Every value below `root` by path, except what is below an attribute whose name is in `left_out`.

    An object that can be reached in several ways has the path by which it is reached first.
    """
    found: dict[str, object] = {}
    seen: dict[int, object] = {}  # kept, so that no identity is used again
    todo: list[tuple[str, object]] = [("", root)]
    while todo:
        path, thing = todo.pop()
        if isinstance(thing, _PLAIN):
            found[path] = thing
        elif isinstance(thing, _OPAQUE):
            found[path] = type(thing).__name__
        elif id(thing) not in seen:
            if not isinstance(thing, tuple | frozenset):  # equal ones may or may not be one object
                seen[id(thing)] = thing
            found[f"{path} is"] = type(thing).__qualname__
            parts = sorted(_parts(thing), key=lambda part: part[0], reverse=True)
            todo += [(f"{path}.{name}", part) for name, part in parts if name not in left_out]
    return found


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """The paths at which two graphs differ, with both values."""
    rows = [(path, one.get(path, "nothing"), other.get(path, "nothing")) for path in one.keys() | other.keys()]
    return sorted([row for row in rows if row[1] != row[2]], key=lambda row: row[0])


def _parts(thing: object) -> Iterator[tuple[str, object]]:
    if isinstance(thing, Mapping):
        yield from ((_name(key), value) for key, value in thing.items())
    elif isinstance(thing, set | frozenset):
        yield "members", repr(sorted(map(_name, thing)))
    elif isinstance(thing, Sequence | deque):
        yield from ((f"{number:06}", value) for number, value in enumerate(thing))
    elif isinstance(thing, types.MethodType):
        yield from (("self", thing.__self__), ("function", thing.__func__.__qualname__))
    elif isinstance(thing, functools.partial):
        yield from (("function", thing.func), ("arguments", thing.args), ("keywords", thing.keywords))
    elif isinstance(thing, types.FunctionType):
        yield "function", thing.__qualname__
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        yield from ((name, cell.cell_contents) for name, cell in cells)
    else:
        yield from _attributes(thing)


def _attributes(thing: object) -> Iterator[tuple[str, object]]:
    yield from getattr(thing, "__dict__", {}).items()
    for kind in type(thing).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(thing, name):
                yield name, getattr(thing, name)
    for name in getattr(thing, "__struct_fields__", ()):
        yield name, getattr(thing, name)


def _name(key: object) -> str:
    """A key as a part of a path; for one without a text of its own, its type."""
    text = repr(key)
    return type(key).__name__ if " at 0x" in text else text

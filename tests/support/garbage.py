"""Find objects that only the garbage collector can free: Cairn lets it run so rarely that they stay for hours."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

_OURS = ("proxy.", "cache.", "aiohttp.")


@pytest.fixture
def uncollected() -> Iterator[None]:
    """The collector rests, so that what only it could free is still there to be found."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def held_by_itself() -> set[str]:
    """Kinds of objects and exceptions that only the collector can free."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    return {
        kind
        for each in gc.garbage
        if (kind := f"{type(each).__module__}.{type(each).__qualname__}").startswith(_OURS)
        or isinstance(each, BaseException)
    }

"""Refuse bodies that would take the event loop too long to decode. Pure.

30 MB hold 15 million items, of which Python objects take a second and a gigabyte. Short bodies, and those with few
commas, cannot hold that many and are not looked at any further.
"""

from __future__ import annotations

import functools
import re
from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body

CHECKED_BYTES: Final = 3 * 1024 * 1024
"""Least length of a body that is checked: shorter ones hold at most 1.5 million items, which take 0.1 s."""

COMMAS_HARMLESS: Final = 250_000
"""Number of commas up to which decoding takes at most 20 ms."""

VALUES_MOST: Final = 1_000_000
"""Most values of a body that must be decoded whole. They take 0.2 s; a batch of 100,000 requests has fewer."""

_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_ABSENT: Final = Raw()
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class TooManyItems(BadRequest):
    """An array has too many items."""


def may_hold_many(body: Body) -> bool:
    """Return True if `body` may hold too many values, so that its arrays must be counted before they are decoded."""
    return len(body) >= CHECKED_BYTES and body.count(b",") > COMMAS_HARMLESS


def check_array(array: Raw, member: str, items_most: int) -> None:
    """Raise TooManyItems if `array`, the value of `member`, is an array of more than `items_most` items.

    Other defects are left for its reader to find.
    """
    if len(memoryview(array)) <= items_most:  # an item takes more than a byte
        return
    try:
        _array_decoder(items_most).decode(array)
    except msgspec.ValidationError as error:
        if "of at most length" in str(error):
            raise TooManyItems(f"{member} has more than {items_most} items.", param=member) from None
    except _UNREADABLE:
        pass


def check_values(body: Body) -> None:
    """Raise BadRequest if `body` has too many values to be decoded whole."""
    if len(body) < CHECKED_BYTES or _structure_of(body) <= VALUES_MOST:
        return
    outside, strings = _STRING.subn(b"", body, VALUES_MOST)
    if strings == VALUES_MOST or _structure_of(outside) > VALUES_MOST:
        raise BadRequest(f"the body has more than {VALUES_MOST:,} values.")


def _structure_of(text: Body) -> int:
    """Return an upper bound of the number of values in JSON text; signs inside strings count too."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


@functools.cache
def _array_decoder(items_most: int) -> msgspec.json.Decoder[Any]:
    """Return the decoder of a structure as an array; unlike a list's, it stops at the first item too many."""
    members = [(f"item_{place}", Raw, _ABSENT) for place in range(items_most)]
    return msgspec.json.Decoder(
        msgspec.defstruct("Items", members, array_like=True, forbid_unknown_fields=True, gc=False)
    )

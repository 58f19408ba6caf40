"""Refuse bodies that would take the event loop too long to decode. Pure.

30 MB hold 15 million items, of which Python objects take a second and a gigabyte, and even to skip 10 million empty
objects takes the decoder 0.15 s. Short bodies, and those with few commas, cannot hold that many and are not looked at
any further.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body

CHECKED_BYTES: Final = 128 * 1024
"""Least length of a text that is checked: shorter ones hold at most 60,000 items, which are listed in 10 ms."""

COMMAS_HARMLESS: Final = 20_000
"""Number of commas up to which decoding takes at most 10 ms, whatever is between them."""

VALUES_MOST: Final = 250_000
"""Most values of a body that must be decoded whole, during which no other thread runs: 40 ms."""

NESTED_MOST: Final = 500_000
"""Most arrays, objects and members of a body that is read in part. To skip them takes 20 ms each time. Numbers and
strings in arrays do not count, since they are skipped ten times as fast, and prompts of token ids have millions."""

_STRUCTURE: Final = b",[{"
_NESTING: Final = b":[{"
_STEP_BYTES: Final = 512 * 1024  # other threads can run between two steps
_EVERY_BYTE: Final = bytes(range(256))
_ABSENT: Final = Raw()
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


class TooManyItems(BadRequest):
    """An array has too many items."""


def may_hold_many(text: Body) -> bool:
    """Return True if `text` may hold too many values, so that its arrays must be counted before they are decoded."""
    return len(text) >= CHECKED_BYTES and text.count(b",") > COMMAS_HARMLESS


def check_nesting(text: Body) -> None:
    """Raise BadRequest if `text`, which may hold many values, has too many arrays, objects and members to skip."""
    if is_nested_beyond(text, NESTED_MOST):
        raise BadRequest(f"the body has more than {NESTED_MOST:,} objects, arrays and members.")


def is_nested_beyond(text: Body, most: int) -> bool:
    """Return True if JSON text has more than `most` arrays, objects and members."""
    return _exceeds(text, _NESTING, most)


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
    if len(body) >= CHECKED_BYTES and _exceeds(body, _STRUCTURE, VALUES_MOST):
        raise BadRequest(f"the body has more than {VALUES_MOST:,} values.")


def _exceeds(text: Body, signs: bytes, most: int) -> bool:
    """Return True if JSON text has more than `most` of `signs` outside its strings.

    First the signs inside strings are counted too, which is enough for nearly all texts. Else the text is reduced to
    these signs and quotes, some hundred KB at a time; a regular expression would take a second for 30 MB.
    """
    others = _EVERY_BYTE.translate(None, signs)
    steps = range(0, len(text), _STEP_BYTES)
    if sum([len(text[at : at + _STEP_BYTES].translate(None, others)) for at in steps]) <= most:
        return False
    others = _EVERY_BYTE.translate(None, signs + b'"')
    count = at = 0
    in_string = False
    while at < len(text) and count <= most:
        step = text[at : at + _STEP_BYTES]
        if (len(step) - len(step.rstrip(b"\\"))) % 2:
            step = text[at : at + len(step) + 1]  # an escape is not cut in two
        at += len(step)
        reduced = step.replace(b"\\\\", b"").replace(b'\\"', b"")  # the escapes that end in a backslash or a quote
        reduced = reduced.translate(None, others)
        if in_string:
            reduced = b'"' + reduced
        pieces = reduced.replace(b'""', b"").split(b'"')  # strings without signs need not be split off
        count += sum(map(len, pieces[::2]))
        in_string = len(pieces) % 2 == 0
    return count > most


@functools.cache
def _array_decoder(items_most: int) -> msgspec.json.Decoder[Any]:
    """Return the decoder of a structure as an array; unlike a list's, it stops at the first item too many."""
    members = [(f"item_{place}", Raw, _ABSENT) for place in range(items_most)]
    return msgspec.json.Decoder(
        msgspec.defstruct("Items", members, array_like=True, forbid_unknown_fields=True, gc=False)
    )

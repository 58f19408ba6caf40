"""Find the ids of the items of a response, so that a later request that names one can be checked. Pure.

Only items that the upstream created count: a response also repeats the client's tools and metadata, in which a client
could write the ids of others.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Raw

from proxy.wire.bounds import TooManyItems, check_array
from proxy.wire.schemas import DECODE_ERRORS, NONE, short_text

LINE_BYTES_MOST: Final = 256 * 1024
"""Longest event that is held until it is complete; the items of a longer one are lost."""

ITEMS_MOST: Final = 2_000  # of one response; honest ones have some hundreds

_KIND: Final = "response.output_item.added"
_CODE: Final = "code_interpreter_call"
_MARK: Final = b"output_item.added"


class _Item(msgspec.Struct, gc=False):
    id: Raw = NONE
    type: Raw = NONE
    container_id: Raw = NONE

    def ids(self) -> list[str]:
        """Return the id of the item, and that of the container which the upstream made to run the item's code in."""
        made_container = short_text(self.type) == _CODE
        found = [short_text(self.id), short_text(self.container_id) if made_container else None]
        return [each for each in found if each is not None]


class _Added(msgspec.Struct, gc=False):
    type: Raw = NONE
    item: _Item | None = None


class _Response(msgspec.Struct, gc=False):
    output: Raw = NONE


_decode_added = msgspec.json.Decoder(_Added).decode
_decode_response = msgspec.json.Decoder(_Response).decode
_decode_items = msgspec.json.Decoder(list[_Item] | None).decode


def item_ids(body: bytes | memoryview) -> list[str]:
    """Return the ids of the items in the output of a whole response, and of the containers for their code."""
    try:
        output = _decode_response(body).output
        check_array(output, "output", ITEMS_MOST)
        items = None if output is NONE else _decode_items(output)
    except (*DECODE_ERRORS, TooManyItems):
        return []
    return [found for item in items or () for found in item.ids()]


class StreamedItemIds:
    """Finds the ids in a stream of the Responses API, in pieces cut anywhere."""

    __slots__ = ("_line",)

    def __init__(self) -> None:
        self._line = b""  # the beginning of a line, until its end has arrived

    def feed(self, piece: bytes) -> list[str]:
        """Take the next bytes and return the ids of the items that they complete, and of the containers in them."""
        if not self._line and piece.endswith(b"\n") and piece.find(_MARK) < 0:
            return []  # nearly all pieces
        text = self._line + piece
        whole, newline, rest = text.rpartition(b"\n")
        self._line = rest if len(rest) <= LINE_BYTES_MOST else b""
        if not newline or whole.find(_MARK) < 0:
            return []
        return [found for line in whole.splitlines() for found in _added(line)]


def _added(line: bytes) -> list[str]:
    if not line.startswith(b"data:") or line.find(_MARK) < 0:
        return []
    try:
        event = _decode_added(line[5:])
    except DECODE_ERRORS:
        return []
    return [] if event.item is None or short_text(event.type) != _KIND else event.item.ids()

"""Find the ids of the items of a response, so that a later request that names one can be checked. Pure.

Only items that the upstream created count: a response also repeats the client's tools and metadata, in which a client
could write the ids of others.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from proxy.wire.schemas import DECODE_ERRORS

LINE_BYTES_MOST: Final = (
    256 * 1024
)  # of an event that is held until it is complete; the items of a longer one are lost
_KIND: Final = "response.output_item.added"
_CODE: Final = "code_interpreter_call"
_MARK: Final = b"output_item.added"


class _Item(msgspec.Struct, gc=False):
    id: Any = None
    type: Any = None
    container_id: Any = None

    def ids(self) -> list[str]:
        """Return the id of the item, and that of the container which the upstream made to run the item's code in."""
        found = [self.id, self.container_id if self.type == _CODE else None]
        return [each for each in found if isinstance(each, str)]


class _Added(msgspec.Struct, gc=False):
    type: Any = None
    item: _Item | None = None


class _Response(msgspec.Struct, gc=False):
    output: list[_Item] | None = None


_decode_added = msgspec.json.Decoder(_Added).decode
_decode_response = msgspec.json.Decoder(_Response).decode


def item_ids(body: bytes | memoryview) -> list[str]:
    """Return the ids of the items in the output of a whole response, and of the containers for their code."""
    try:
        output = _decode_response(body).output
    except DECODE_ERRORS:
        return []
    return [found for item in output or () for found in item.ids()]


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
    return [] if event.type != _KIND or event.item is None else event.item.ids()

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
_MARK: Final = b"output_item.added"


class _Item(msgspec.Struct, gc=False):
    id: Any = None


class _Added(msgspec.Struct, gc=False):
    type: Any = None
    item: _Item | None = None


class _Response(msgspec.Struct, gc=False):
    output: list[_Item] | None = None


_decode_added = msgspec.json.Decoder(_Added).decode
_decode_response = msgspec.json.Decoder(_Response).decode


def item_ids(body: bytes | memoryview) -> list[str]:
    """Return the ids of the items in the output of a whole response."""
    try:
        output = _decode_response(body).output
    except DECODE_ERRORS:
        return []
    return [item.id for item in output or () if isinstance(item.id, str)]


class StreamedItemIds:
    """Finds the ids in a stream of the Responses API, in pieces cut anywhere."""

    __slots__ = ("_line",)

    def __init__(self) -> None:
        self._line = b""  # the beginning of a line, until its end has arrived

    def feed(self, piece: bytes) -> list[str]:
        """Take the next bytes and return the ids of the items that they complete."""
        if not self._line and piece.endswith(b"\n") and piece.find(_MARK) < 0:
            return []  # nearly all pieces
        text = self._line + piece
        whole, newline, rest = text.rpartition(b"\n")
        self._line = rest if len(rest) <= LINE_BYTES_MOST else b""
        if not newline or whole.find(_MARK) < 0:
            return []
        return [found for line in whole.splitlines() if (found := _added(line)) is not None]


def _added(line: bytes) -> str | None:
    if not line.startswith(b"data:") or line.find(_MARK) < 0:
        return None
    try:
        event = _decode_added(line[5:])
    except DECODE_ERRORS:
        return None
    if event.type != _KIND or event.item is None or not isinstance(event.item.id, str):
        return None
    return event.item.id

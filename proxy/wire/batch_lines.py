"""Read the lines of a batch's input file, each of which is a request that the upstream sends to itself later. Pure.

A line is judged without its `url`: which of url and the batch's own `endpoint` counts depends on the upstream. So all
that any kind of request may name is looked for, anywhere in the line.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from proxy.model import Body
from proxy.wire.bounds import check_values
from proxy.wire.named_models import models_of_request
from proxy.wire.references import Reference, item_references, listed_items, references
from proxy.wire.schemas import DECODE_ERRORS, NONE, TooManyMembers, decode_members, seen, short_text

LINE_BYTES_MOST: Final = 32 * 1024 * 1024
"""Longest line that is read; as much as a request may have unless configured."""

_BOM: Final = b"\xef\xbb\xbf"
_MEMBERS: Final = frozenset({"body", "method", "url"})
_OBJECT: Final = 0x7B  # {
_PATH = re.compile(
    r"(?:/[a-z-]+)?(?:/v\d+)?/(?:audio/speech|audio/transcriptions|audio/translations|chat/completions|classify"
    r"|completions|embeddings|fim/completions|images/edits|images/generations|images/variations|messages"
    r"|moderations|ocr|rerank|responses|score|videos)"
)
"""Paths that run a model, behind a prefix and a version, as providers name them in batches. None names an object."""


class LineReader:
    """Cuts a file that comes in pieces into lines. `held_bytes` are those of the line that has not ended."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self._held: list[bytes] = []
        self._at_start = True

    def feed(self, piece: Body | memoryview) -> list[bytes]:
        """Return the lines that end in the next piece of the file, without those that are blank."""
        *ended, rest = bytes(piece).split(b"\n")
        if ended:
            ended[0] = self._joined(ended[0])
        if rest:
            self._held.append(rest)
            self.held_bytes += len(rest)
        return list(filter(bytes.strip, ended))

    def close(self) -> list[bytes]:
        """Return the last line of a file that does not end in a line end."""
        last = self._joined(b"")
        self._at_start = True
        return [last] if last.strip() else []

    def drop(self) -> None:
        """Forget the line that has not ended."""
        self._held, self.held_bytes = [], 0

    def _joined(self, end: bytes) -> bytes:
        line = b"".join([*self._held, end])
        self.drop()
        if self._at_start:
            line = line.removeprefix(_BOM)
            self._at_start = False
        return line


def line_references(line: Body) -> list[Reference] | None:
    """Return the objects that a line's request refers to; None if they are unknown.

    They are unknown if the line is not one JSON object with a request in its `body`, if one of its members is given
    twice or in another letter case, if it is sent to a path that runs no model, and if `references` finds too many.
    Raises BadRequest for a line with too many values.
    """
    try:
        members = decode_members(line)
        is_clear = seen.members == len(members) and not any(
            key not in _MEMBERS and key.casefold() in _MEMBERS for key in members
        )
        if not is_clear or not _is_object(members.get("body", NONE)) or not _runs_model(members):
            return None
    except (*DECODE_ERRORS, TooManyMembers):
        return None
    found = references(line, (line,))
    if found is None:
        return None
    return [*found, *[each for value in members.values() if _is_object(value) for each in _items(value)]]


def line_models(line: Body) -> set[str] | None:
    """Return every model that a line's request names; None if it names none or cannot be read. Raises BadRequest."""
    check_values(line)
    try:
        request = msgspec.json.decode(line)
    except DECODE_ERRORS:
        return None
    return models_of_request(request.get("body")) if isinstance(request, dict) else None


def _items(value: msgspec.Raw) -> list[Reference]:
    return item_references(listed_items(value))


def _is_object(value: msgspec.Raw) -> bool:
    return value is not NONE and memoryview(value)[0] == _OBJECT


def _runs_model(members: dict[str, Any]) -> bool:
    """Return True if a line's request, as far as it says so, is a POST to a path that runs a model."""
    method, url = members.get("method", NONE), members.get("url", NONE)
    if method is not NONE and (short_text(method) or "").upper() != "POST":
        return False
    return url is NONE or _PATH.fullmatch(short_text(url) or "") is not None

"""Edit a body by replacing bytes at known offsets; a client's bytes are changed in no other way.

Parsing and re-encoding would change numbers and the order of keys, and with them the upstream's own cache. The body
is not copied: the result is a list of slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from proxy.model import Body, Edit, UsageRequest
from proxy.records import Prompt

_ABSENT: Final = UsageRequest.ABSENT  # constants, since looking up a member of an enum takes 70 ns
_REPLACE: Final = UsageRequest.REPLACE
_ASK = b'{"include_usage":true}'
_ASK_MEMBER = b'"stream_options":{"include_usage":true},'


def apply(body: Body, edits: Sequence[Edit]) -> tuple[list[Body | memoryview], int]:
    """Return the edited body as buffers to be written in order, and their total length in bytes.

    Edits may be given in any order; several insertions at one offset keep theirs. Without edits the body is the only
    buffer. Raises ValueError if two edits overlap or one is outside the body.
    """
    if not edits:
        return [body], len(body)
    view = memoryview(body)
    parts: list[Body | memoryview] = []
    length = at = 0
    for edit in edits if len(edits) == 1 else sorted(edits, key=_place):
        if not at <= edit.start <= edit.end <= len(body):
            raise ValueError("edits overlap or lie outside the body")
        for part in (view[at : edit.start], edit.insert):
            if part:
                parts.append(part)
                length += len(part)
        at = edit.end
    if at < len(body):
        parts.append(view[at:])
    return parts, length + len(body) - at


def _place(edit: Edit) -> tuple[int, int]:
    return edit.start, edit.end


def ask_usage(prompt: Prompt) -> Edit | None:
    """Return the edit that makes the stream report usage; None if it does already, or cannot."""
    if prompt.usage_request is _ABSENT:
        start = prompt.body.index(b"{") + 1
        return Edit(start, start, _ASK_MEMBER)
    if prompt.usage_request is _REPLACE:
        start, end = prompt.stream_options_span
        return Edit(start, end, _with_usage(prompt.body[start:end]))
    return None


def _with_usage(options: Body) -> bytes:
    """Return `options` (null or an object) with include_usage true; its other members keep their bytes."""
    members = msgspec.json.decode(options, type=dict[str, msgspec.Raw] | None)
    if not members:
        return _ASK
    members["include_usage"] = msgspec.Raw(b"true")
    return msgspec.json.encode(members)

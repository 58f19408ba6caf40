"""Find pictures, sounds and files inside a prompt, so that their megabytes are not counted as text.

Searching two megabytes for a marker takes as long as reading the whole body. Therefore plain text is recognised by
its beginning, and any other body is sampled first: base64 contains no spaces, quotes or escapes, and only a run of
samples without any is examined closely. Media that are missed by this are short compared with the body, and counting
them as text is nearly right. A picture that is named by a URL has no bytes in the body and does not count as
media.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from msgspec import Raw

from proxy.model import Body
from proxy.records import Media
from proxy.wire.schemas import DECODE_ERRORS, Part, decode_parts, decode_parts_message
from proxy.wire.spans import span_of

SHORT_BODY_BYTES: Final = 4_096
"""Longest body that is searched as a whole, which is faster than searching each message."""

MEDIA_BYTES_LEAST: Final = 1024  # bytes; a shorter picture has no more tokens than text of the same length
PARTS_MOST: Final = 50_000
"""Objects of a message that is decoded to find its media; nobody sends more parts than a thousand."""

_PARTS_LEAST_BYTES: Final = 100_000  # two bytes for each of so many parts
_SAMPLES: Final = 2048  # of one body: 3 us
_FEW: Final = 8  # messages whose beginnings are examined; with more of them, sampling is cheaper
_TEXT = re.compile(rb'\s*\{\s*(?:"role"\s*:\s*"\w+"\s*,\s*)?"content"\s*:\s*"')  # a message whose content is a string
_STRIDE_LEAST: Final = 61  # bytes; no multiple of an escape's six characters, which would always hit the same one
_RUN = b"b" * 64  # samples in a row that are base64; in prose one byte in five is not: one body in 500 has such
_BASE64 = bytes(
    98 if chr(byte).isascii() and (chr(byte).isalnum() or chr(byte) in "+/=_-") else 32 for byte in range(256)
)
_EXACT_TYPES = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "input_audio": "audio",
    "audio_url": "audio",
    "document": "file",
    "file": "file",
    "input_file": "file",
    "video_url": "video",
}


def find_media(body: Body, content: Iterable[Raw]) -> tuple[Media, ...]:
    """Return the media in the messages or input items `content` of `body`, in order; never raises.

    Takes 1 us for a few messages of text, and otherwise under 10 us at 2 MB if there are none.
    """
    size = len(body)
    if size < MEDIA_BYTES_LEAST:
        return ()
    long = [message for message in content if len(memoryview(message)) >= MEDIA_BYTES_LEAST]
    if len(long) <= _FEW:
        long = [message for message in long if not is_plain_text(message)]
    if not long:
        return ()
    stride = max(_STRIDE_LEAST, size // _SAMPLES) | 1
    if body[::stride].translate(_BASE64).find(_RUN) < 0:  # `in` raises and catches an error internally
        return ()
    found: list[Media] = []
    for message in long:
        found += _in_parts(body, _parts(message), nested=False)
    return tuple(found)


def locate_media(
    media: Sequence[Media], body: Body, spans: Sequence[memoryview | bytes], tokens_of: Callable[[str], float]
) -> tuple[tuple[int, int, int], ...]:
    """Return start and end of each of `media` in the concatenated `spans`, and its tokens, which its kind determines.

    Spans are views of `body`, or copies that were rewritten. Media that are in none of them, or in another order, are
    left out.
    """
    wanted = [item for item in media if item.start >= 0]
    found: list[tuple[int, int, int]] = []
    base = 0
    for span in spans:
        cursor = 0
        while wanted and len(span) - cursor >= wanted[0].size_bytes:
            at = _place_in(span, body, wanted[0], cursor)
            if at < 0:
                break
            item = wanted.pop(0)
            cursor = at + item.size_bytes
            found.append((base + at, base + cursor, round(tokens_of(item.kind))))
        base += len(span)
    return tuple(found)


def _place_in(span: memoryview | bytes, body: Body, item: Media, cursor: int) -> int:
    """Return the offset of `item` in a span, from `cursor` on; -1 if it is not there."""
    if isinstance(span, bytes):
        return span.find(bytes(memoryview(body)[item.start : item.start + item.size_bytes]), cursor)
    try:
        start, end = span_of(body, span)
    except ValueError:
        return -1
    return item.start - start if start <= item.start and item.start + item.size_bytes <= end else -1


def are_plain_text(body: Body, content: Sequence[Raw]) -> bool:
    """Return True if the contents of all of a few messages begin as strings, so that none has parts.

    False for many messages, and for a short body, which is faster to search as a whole.
    """
    if len(body) <= SHORT_BODY_BYTES or not 0 < len(content) <= _FEW:
        return False
    return not [message for message in content if not is_plain_text(message)]


def is_plain_text(message: Raw | memoryview | bytes) -> bool:
    """Return True if a message's content begins as a string, so that it has no parts."""
    return _TEXT.match(message) is not None


def _parts(message: Raw | bytes) -> list[Part]:
    if _has_too_many_parts(message):
        return []
    try:
        return decode_parts_message(message).content or []
    except DECODE_ERRORS:
        return []


def _in_parts(body: Body, parts: list[Part], *, nested: bool) -> list[Media]:
    found: list[Media] = []
    for part in parts:
        kind = _EXACT_TYPES.get(part.type)
        if kind is not None:
            values = (part.image_url, part.input_audio, part.audio_url, part.video_url)
            longest = max((*values, part.file, part.file_data, part.source), key=_size)
            size = _size(longest)
            if size >= MEDIA_BYTES_LEAST:
                found.append(Media(kind, size, _start(body, longest)))
        elif not nested and len(memoryview(part.content)) >= MEDIA_BYTES_LEAST:
            found += _in_parts(body, _nested_parts(part.content), nested=True)
    return found


def _has_too_many_parts(value: Raw | bytes) -> bool:
    """Return True if decoding the parts in `value` could take long. Braces inside texts are counted too."""
    return len(memoryview(value)) > _PARTS_LEAST_BYTES and bytes(value).count(b"{") > PARTS_MOST


def _size(value: Raw) -> int:
    return len(memoryview(value))


def _start(body: Body, value: Raw) -> int:
    """Return the offset of a value in the body, -1 if it is no part of it."""
    try:
        return span_of(body, value)[0]
    except ValueError:
        return -1


def _nested_parts(value: Raw) -> list[Part]:
    if _has_too_many_parts(value):
        return []
    try:
        return decode_parts(value)
    except DECODE_ERRORS:
        return []

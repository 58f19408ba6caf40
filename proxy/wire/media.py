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
from proxy.wire.schemas import DECODE_ERRORS, NONE, Part, decode_parts, decode_parts_message
from proxy.wire.spans import Offsets

SHORT_BODY_BYTES: Final = 4_096
"""Longest body that is searched as a whole, which is faster than searching each message."""

MEDIA_BYTES_LEAST: Final = 1024  # bytes; a shorter picture has no more tokens than text of the same length
PARTS_MOST: Final = 20_000
"""Objects of a message that is decoded to find its media; nobody sends more parts than a thousand."""

MEDIA_MOST: Final = 4096
"""Most media of one prompt that are found; with their places, this takes 30 ms. Others count as text. Providers allow
up to 3,600."""

_PARTS_LEAST_BYTES: Final = 100_000  # two bytes for each of so many parts
_STEP_BYTES: Final = 1024 * 1024  # of a text that is counted
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
    """Return the media in the messages or input items `content` of `body`, in order, up to MEDIA_MOST; never raises.

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
    offsets = Offsets(body)
    for message in long:
        _add_media(found, offsets, _parts(message), nested=False)
        if len(found) == MEDIA_MOST:
            break
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
    offsets = Offsets(body)
    tokens = {kind: round(tokens_of(kind)) for kind in {item.kind for item in wanted}}
    base = 0
    for span in spans:
        cursor = start = -1  # the offset of the span is looked up only if it may contain one of them
        while len(found) < len(wanted) and len(span) >= wanted[len(found)].size_bytes:
            item = wanted[len(found)]
            if isinstance(span, bytes):
                text = bytes(memoryview(body)[item.start : item.start + item.size_bytes])
                at = span.find(text, max(cursor, 0))
            else:
                start = offsets.of(span) if start < 0 else start
                at = item.start - start
                if start < 0 or at < 0 or at + item.size_bytes > len(span):
                    at = -1
            if at < 0:
                break
            cursor = at + item.size_bytes
            found.append((base + at, base + cursor, tokens[item.kind]))
        base += len(span)
    return tuple(found)


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


def _add_media(found: list[Media], offsets: Offsets, parts: list[Part], *, nested: bool) -> None:
    """Append the media in `parts` to `found`, up to MEDIA_MOST."""
    for part in parts:
        if len(found) == MEDIA_MOST:
            return
        kind = _EXACT_TYPES.get(part.type)
        if kind is not None:
            longest, size = _longest(part)
            if size >= MEDIA_BYTES_LEAST:
                found.append(Media(kind, size, offsets.of(longest)))
        elif not nested and _size(part.content) >= MEDIA_BYTES_LEAST:
            _add_media(found, offsets, _nested_parts(part.content), nested=True)


def _longest(part: Part) -> tuple[Raw, int]:
    """Return the longest value of a part and its size."""
    longest, longest_size = NONE, 0
    for value in (
        part.image_url,
        part.input_audio,
        part.audio_url,
        part.video_url,
        part.file,
        part.file_data,
        part.source,
    ):
        if value is not NONE and (size := _size(value)) > longest_size:
            longest, longest_size = value, size
    return longest, longest_size


def _has_too_many_parts(value: Raw | bytes) -> bool:
    """Return True if decoding the parts in `value` could take long. Braces inside texts are counted too."""
    text = memoryview(value)
    if len(text) <= _PARTS_LEAST_BYTES:
        return False
    steps = range(0, len(text), _STEP_BYTES)  # other threads can run between two of them
    return sum([bytes(text[at : at + _STEP_BYTES]).count(b"{") for at in steps]) > PARTS_MOST


def _size(value: Raw) -> int:
    return len(memoryview(value))


def _nested_parts(value: Raw) -> list[Part]:
    if _has_too_many_parts(value):
        return []
    try:
        return decode_parts(value)
    except DECODE_ERRORS:
        return []

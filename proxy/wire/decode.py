"""Decode compressed bodies up to a limit: responses as they pass, to read their usage, and whole requests.

A response that cannot be decoded (bad data, an unknown coding, too large) is passed on all the same, and its usage is
unknown. A request that cannot be decoded is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Final

import brotli
import zstandard

from proxy.errors import BadRequest, TooLarge
from proxy.model import Body

DECODED_BYTES_MOST = 64 * 1024 * 1024  # of one response; a longer one is a decompression bomb, or has no usage
_STEP_BYTES_MOST = 4 * 1024 * 1024  # decoded in one step, so that a bomb is noticed before it fills the memory
_TOO_MUCH: Final = "too much from one chunk"
_NO_CODINGS: Final = (b"", b"identity", b"utf-8", b"utf8")  # a character set is a common mistake, and harmless
_CODINGS_MOST: Final = 3  # of one response, one within the other; each makes a bomb worse
_GZIP_BEGIN: Final = 0x1F
_GZIP_FEED_BYTES: Final = 16 * 1024
_MEMBERS_MOST: Final = 4096  # of a request, or in one piece of a response; each takes 3 us, and 20 bytes
_ZSTD_FEED_BYTES: Final = 128  # zstandard's decoder has no output limit: four bytes may become 128 KiB
_ZSTD_HEADER_BYTES_MOST: Final = 18
_ZSTD_PARTS_MOST: Final = 20_000  # frames and blocks of a request; each takes 1 us, and three bytes
_ZSTD_SKIPPABLE: Final = b"\x2a\x4d\x18"  # the magic number of a frame without data, except for its first byte
_ZSTD_REPEATED_BYTE: Final = 2  # the type of a block, in bits 1 and 2 of its header
_ZSTD_WINDOW_BYTES = 8 * 1024 * 1024  # the largest window that RFC 9659 allows


def content_encoding(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the codings of a body as listed, in the order in which they were applied; b"" if there are none."""
    return b",".join([value for name, value in headers if name == b"content-encoding"])


class ResponseDecoder:
    """Incremental decoder of one response. `alive` is false once it has given up; then `feed` returns b"".

    `is_too_large` tells a decompression bomb from bad data.
    """

    def __init__(self, encoding: bytes, decoded_bytes_most: int = DECODED_BYTES_MOST) -> None:
        """Create a decoder for the value of `content_encoding`: any of gzip, deflate, br, zstd and identity."""
        codings = [coding for each in encoding.split(b",") if (coding := each.strip().lower()) not in _NO_CODINGS]
        makes = [_STEPS.get(coding) for coding in codings[: _CODINGS_MOST + 1]]
        self.alive = len(makes) <= _CODINGS_MOST and None not in makes
        self.is_too_large = False
        self._steps = [make() for make in reversed(makes) if make is not None] if self.alive else []
        self._left_bytes = decoded_bytes_most

    def feed(self, chunk: bytes) -> bytes:
        """Return the decoded bytes of `chunk`, or b"" if there are none or the decoder has given up."""
        if not self.alive:
            return b""
        decoded = chunk
        try:
            for step in self._steps:
                decoded = step(decoded, min(self._left_bytes + 1, _STEP_BYTES_MOST))
        except (zlib.error, brotli.error, zstandard.ZstdError) as error:
            self.is_too_large = error.args == (_TOO_MUCH,)
            return self._give_up()
        self._left_bytes -= len(decoded)
        if self._left_bytes >= 0:
            return decoded
        self.is_too_large = True
        return self._give_up()

    def _give_up(self) -> bytes:
        self._steps = []
        self.alive = False
        return b""


_Step = Callable[[bytes, int], bytes]


class _Gzip:
    """Decoder of gzip, whose members follow each other (RFC 1952, 2.2).

    zlib copies what follows the end of a member, so it is given a little at a time.
    """

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self._is_over = False  # what follows is padding

    def step(self, chunk: bytes, most: int) -> bytes:
        parts: list[bytes] = []
        at = members = 0
        while at < len(chunk) and not self._is_over:
            if self._stream.eof:
                members += 1
                if members > _MEMBERS_MOST:
                    raise zlib.error(_TOO_MUCH)
                self._is_over = chunk[at] != _GZIP_BEGIN
                self._stream = zlib.decompressobj(wbits=31)
                continue
            fed = chunk[at : at + _GZIP_FEED_BYTES]
            part = self._stream.decompress(fed, max(1, most))
            if self._stream.unconsumed_tail:
                raise zlib.error(_TOO_MUCH)
            parts.append(part)
            most -= len(part)
            at += len(fed) - len(self._stream.unused_data)
        return b"".join(parts)


def _gzip() -> _Step:
    return _Gzip().step


def _inflate(stream: zlib._Decompress) -> _Step:
    def step(chunk: bytes, most: int) -> bytes:
        decoded = stream.decompress(chunk, most)
        if stream.unconsumed_tail:
            raise zlib.error(_TOO_MUCH)
        return decoded

    return step


def _deflate() -> _Step:
    """Return the decoder of `deflate`, which means zlib's format; some peers send raw deflate, as byte 1 shows."""
    chosen: list[_Step] = []

    def step(chunk: bytes, most: int) -> bytes:
        if not chunk:
            return b""
        if not chosen:
            chosen.append(_inflate(zlib.decompressobj(wbits=15 if chunk[0] & 0x0F == 8 else -15)))
        return chosen[0](chunk, most)

    return step


def _brotli() -> _Step:
    stream = brotli.Decompressor()

    def step(chunk: bytes, most: int) -> bytes:
        decoded: bytes = stream.process(chunk, output_buffer_limit=most)
        if not stream.can_accept_more_data() and not stream.is_finished():
            raise zlib.error(_TOO_MUCH)
        return decoded

    return step


def _zstd() -> _Step:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    stream = decompressor.decompressobj(read_across_frames=True)

    def step(chunk: bytes, most: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        for start in range(0, len(chunk), _ZSTD_FEED_BYTES):
            part = stream.decompress(chunk[start : start + _ZSTD_FEED_BYTES])
            parts.append(part)
            size += len(part)
            if size > most:
                raise zlib.error(_TOO_MUCH)
        return b"".join(parts)

    return step


_STEPS: dict[bytes, Callable[[], _Step]] = {
    b"gzip": _gzip,
    b"x-gzip": _gzip,
    b"deflate": _deflate,
    b"br": _brotli,
    b"zstd": _zstd,
}


# --- requests


def request_encoding(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the coding of a request's body (gzip, deflate, br or zstd), empty if it is not compressed.

    Raises:
        BadRequest: the coding is unknown, or there are several.
    """
    listed = content_encoding(headers)
    codings = [coding for each in listed.split(b",") if (coding := each.strip().lower()) not in _NO_CODINGS]
    if not codings:
        return b""
    if len(codings) > 1 or codings[0] not in _WHOLE:
        raise BadRequest(
            "The body's content-encoding is not one of gzip, deflate, br and zstd.",
            code="unsupported_content_encoding",
        )
    return codings[0]


def decode_request(body: Body, encoding: bytes, limit_bytes: int) -> bytes:
    """Return the decoded body of a request.

    Args:
        body: the whole body as it was sent.
        encoding: the coding that `request_encoding` returned.
        limit_bytes: the largest decoded size. At most one byte more is ever decoded.

    Raises:
        TooLarge: the decoded body is longer than `limit_bytes`.
        BadRequest: the body is cut short, damaged, or followed by other bytes.
    """
    try:
        decoded = _WHOLE[encoding](bytes(body), limit_bytes + 1) if body else None
    except (zlib.error, brotli.error, zstandard.ZstdError, MemoryError):
        decoded = None
    if decoded is None:
        raise BadRequest(f"The body is not valid {encoding.decode()}.", code="bad_content_encoding")
    if len(decoded) > limit_bytes:
        raise TooLarge(f"The decoded body has more than {limit_bytes} bytes, the most that is read.")
    return decoded


def _whole_gzip(body: bytes, most: int) -> bytes | None:
    """Decode all members of a gzip file, which may be several."""
    parts: list[bytes] = []
    at = members = 0
    while at < len(body) and most:
        members += 1
        if members > _MEMBERS_MOST:
            return None
        stream = zlib.decompressobj(wbits=31)
        while not stream.eof and most:
            fed = body[at : at + _GZIP_FEED_BYTES]
            if not fed:
                return None
            part = stream.decompress(fed, most)
            parts.append(part)
            most -= len(part)
            at += len(fed) - len(stream.unused_data)
    return b"".join(parts)


def _whole_deflate(body: bytes, most: int) -> bytes | None:
    stream = zlib.decompressobj(wbits=15 if body[:1] and body[0] & 0x0F == 8 else -15)
    decoded = stream.decompress(body, most)
    complete = stream.eof and not stream.unused_data
    return decoded if complete or len(decoded) >= most else None


def _whole_brotli(body: bytes, most: int) -> bytes | None:
    stream = brotli.Decompressor()
    decoded: bytes = stream.process(body, output_buffer_limit=most)
    while len(decoded) < most and not stream.is_finished() and not stream.can_accept_more_data():
        decoded += stream.process(b"", output_buffer_limit=most - len(decoded))
    return decoded if stream.is_finished() or len(decoded) >= most else None


def _whole_zstd(body: bytes, most: int) -> bytes | None:
    is_whole = _zstd_is_whole(body)
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    with decompressor.stream_reader(body, read_across_frames=True) as reader:
        pieces: list[bytes] = []
        size = 0
        while size < most and (piece := reader.read(min(most - size, _STEP_BYTES_MOST))):
            pieces.append(piece)
            size += len(piece)
    return b"".join(pieces) if size >= most or is_whole else None


def _zstd_is_whole(body: bytes) -> bool:
    """Return True if `body` ends where its last frame ends; the decoder itself accepts less (RFC 8878, 3.1).

    Raises ZstdError if it is no frame, or has too many frames and blocks.
    """
    at = parts = 0
    while at < len(body):
        parts += 1
        if parts > _ZSTD_PARTS_MOST:
            raise zstandard.ZstdError
        if body[at + 1 : at + 4] == _ZSTD_SKIPPABLE:
            at += 8 + int.from_bytes(body[at + 4 : at + 8], "little")
            continue
        start = body[at : at + _ZSTD_HEADER_BYTES_MOST]
        at += zstandard.frame_header_size(start)
        is_last = 0
        while not is_last and at < len(body) and parts <= _ZSTD_PARTS_MOST:
            parts += 1
            block = int.from_bytes(body[at : at + 3], "little")
            is_last = block & 1
            at += 3 + (1 if block & 6 == _ZSTD_REPEATED_BYTE else block >> 3)
        if not is_last:
            return False
        at += 4 if zstandard.get_frame_parameters(start).has_checksum else 0
    return at == len(body)


_WHOLE: dict[bytes, Callable[[bytes, int], bytes | None]] = {
    b"gzip": _whole_gzip,
    b"x-gzip": _whole_gzip,
    b"deflate": _whole_deflate,
    b"br": _whole_brotli,
    b"zstd": _whole_zstd,
}

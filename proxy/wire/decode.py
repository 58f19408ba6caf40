"""Decode a compressed answer for the tap's eyes only, under a cap; the client gets the bytes as they came.

Whatever goes wrong (bad data, an unknown coding, a bomb) ends the decoding and nothing else.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

import brotli
import zstandard

DECODED_BYTES_MOST = 64 * 1024 * 1024  # of one answer; more is a bomb, or no concern of the usage
_STEP_BYTES_MOST = 4 * 1024 * 1024  # decoded at once, so that a bomb is noticed before it fills the memory
_ZSTD_FEED_BYTES: Final = 128  # zstandard's decoder has no limit of its own: four bytes may become 128 KiB
_ZSTD_WINDOW_BYTES = 8 * 1024 * 1024  # what RFC 9659 lets a sender ask of HTTP clients


class ResponseDecoder:
    """Incremental decoder of one answer. `alive` is false once it has given up; then `feed` gives b""."""

    def __init__(self, encoding: bytes, decoded_bytes_most: int = DECODED_BYTES_MOST) -> None:
        """`encoding` is the value of `content-encoding`; one coding of gzip, deflate, br, zstd, or identity."""
        make = _STEPS.get(encoding.strip().lower())
        self._step = make() if make else None
        self._left_bytes = decoded_bytes_most
        self.alive = self._step is not None

    def feed(self, chunk: bytes) -> bytes:
        """The decoded bytes of `chunk`, or b"" where there are none, or no more are wanted."""
        if self._step is None:
            return b""
        try:
            decoded = self._step(chunk, min(self._left_bytes + 1, _STEP_BYTES_MOST))
        except (zlib.error, brotli.error, zstandard.ZstdError):
            return self._give_up()
        self._left_bytes -= len(decoded)
        return self._give_up() if self._left_bytes < 0 else decoded

    def _give_up(self) -> bytes:
        self._step = None
        self.alive = False
        return b""


_Step = Callable[[bytes, int], bytes]


def _identity() -> _Step:
    return lambda chunk, _most: chunk


def _gzip() -> _Step:
    return _inflate(zlib.decompressobj(wbits=31))


def _inflate(stream: zlib._Decompress) -> _Step:
    def step(chunk: bytes, most: int) -> bytes:
        decoded = stream.decompress(chunk, most)
        if stream.unconsumed_tail:
            raise zlib.error("too much from one chunk")
        return decoded

    return step


def _deflate() -> _Step:
    """`deflate` means zlib's format, but some servers send it bare: the first byte tells."""
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
            raise zlib.error("too much from one chunk")
        return decoded

    return step


def _zstd() -> _Step:
    stream = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()

    def step(chunk: bytes, most: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        for start in range(0, len(chunk), _ZSTD_FEED_BYTES):
            if stream.eof:
                break
            part = stream.decompress(chunk[start : start + _ZSTD_FEED_BYTES])
            parts.append(part)
            size += len(part)
            if size > most:
                raise zlib.error("too much from one chunk")
        return b"".join(parts)

    return step


_STEPS: dict[bytes, Callable[[], _Step]] = {
    b"": _identity,
    b"identity": _identity,
    b"gzip": _gzip,
    b"x-gzip": _gzip,
    b"deflate": _deflate,
    b"br": _brotli,
    b"zstd": _zstd,
}

"""Compressed answers are read under a cap, and what cannot be read harms nothing."""

from __future__ import annotations

import functools
import gzip
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest, TooLarge
from proxy.wire.decode import ResponseDecoder, decode_request, request_encoding

SKIPPED = b"\x50\x2a\x4d\x18\0\0\0\0"  # a frame of zstd that has no content
TEXT = b'data: {"choices":[{"delta":{"content":"stones"}}]}\n\n' * 400


def bare_deflate(body: bytes) -> bytes:
    """Deflate without zlib's frame, as some servers send it."""
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


CODED: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"deflate": zlib.compress,
    b" Deflate": bare_deflate,
    b"br": functools.partial(brotli.compress, quality=1),
    b"zstd": zstandard.compress,
    b"identity": bytes,
    b"": bytes,
    b"gzip,": lambda text: gzip.compress(text[:9]) + gzip.compress(text[9:]) + bytes(4),
    b"zstd,identity": lambda text: zstandard.compress(text[:9]) + zstandard.compress(text[9:]),
    b"gzip, br": lambda text: brotli.compress(gzip.compress(text), quality=1),
    b"deflate,gzip,zstd": lambda text: zstandard.compress(gzip.compress(zlib.compress(text))),
}


@pytest.mark.parametrize("encoding", CODED)
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_each_coding_is_decoded_however_it_is_cut(encoding, step) -> None:
    """The tap sees what the client will see."""
    coded = CODED[encoding](TEXT)
    decoder = ResponseDecoder(encoding)
    assert b"".join([decoder.feed(coded[i : i + step]) for i in range(0, len(coded), step)]) == TEXT
    assert decoder.alive


@pytest.mark.parametrize("encoding", CODED)
def test_a_bomb_ends_the_decoding_within_the_cap(encoding) -> None:
    """A hundred megabytes of zeros never come to be."""
    coded = CODED[encoding](bytes(30_000_000))
    decoder = ResponseDecoder(encoding, decoded_bytes_most=1_000_000)
    seen = 0
    tracemalloc.start()
    try:
        for start in range(0, len(coded), 65536):
            seen += len(decoder.feed(coded[start : start + 65536]))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert seen <= 1_000_000
    assert not decoder.alive


@pytest.mark.parametrize("encoding", [b"compress", b"gzip, compress", b"dcz", b"x", b"gzip,gzip,gzip,gzip"])
def test_an_unknown_coding_is_not_decoded(encoding) -> None:
    """The answer is relayed, its usage counts as missing."""
    decoder = ResponseDecoder(encoding)
    assert not decoder.alive
    assert decoder.feed(b"abc") == b""


@given(st.sampled_from([name for name in CODED if name != b"identity"]), st.lists(st.binary(max_size=50)))
def test_any_bytes_are_survived(encoding, chunks) -> None:
    """Bad data ends the decoding and nothing else."""
    decoder = ResponseDecoder(encoding)
    for chunk in chunks:
        decoder.feed(chunk)


# --- requests

CODINGS = {
    b"gzip": gzip.compress,
    b"x-gzip": lambda text: gzip.compress(text[:100]) + gzip.compress(text[100:]),
    b"deflate": zlib.compress,
    b"br": brotli.compress,
    b"zstd": lambda text: zstandard.ZstdCompressor(write_checksum=True).compress(text),
}
BODY = bytes(range(256)) * 400


@pytest.mark.parametrize("coding", CODINGS)
def test_a_compressed_request_is_decoded_within_its_limit(coding: bytes) -> None:
    """To the byte; one byte more is too large, and damage, a cut and bytes behind it are refused."""
    packed = CODINGS[coding](BODY)
    assert decode_request(bytearray(packed), coding, len(BODY)) == BODY
    with pytest.raises(TooLarge) as large:
        decode_request(packed, coding, len(BODY) - 1)
    assert large.value.message == f"The decoded body has more than {len(BODY) - 1} bytes, the most that is read."
    for broken in (b"", packed[:-1], packed[:1], packed[: len(packed) // 2], packed + b"junk", b"\x00" + packed):
        with pytest.raises(BadRequest) as caught:
            decode_request(broken, coding, len(BODY))
        assert caught.value.message == f"The body is not valid {coding.decode()}."
        assert caught.value.code == "bad_content_encoding"


@pytest.mark.parametrize("coding", CODINGS)
def test_a_bomb_is_too_large_and_never_held(coding: bytes) -> None:
    """Fifty megabytes out of a few hundred bytes stop at the limit."""
    bomb = CODINGS[coding](bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decode_request(bomb, coding, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_a_bomb_behind_a_member_that_fills_the_limit_is_never_held() -> None:
    """A gzip body may have several members, and zlib takes a limit of 0 for none."""
    bomb = gzip.compress(bytes(100_001)) + gzip.compress(bytes(50_000_000), 1)
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decode_request(bomb, b"gzip", 100_000)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_raw_deflate_and_frames_of_zstd_are_read_as_senders_write_them() -> None:
    """Without zlib's head; several frames, skippable ones, repeated bytes, and no size in the head."""
    raw = zlib.compressobj(wbits=-15)
    assert decode_request(raw.compress(BODY) + raw.flush(), b"deflate", len(BODY)) == BODY
    skippable = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    stream = zstandard.ZstdCompressor().compressobj()
    unsized = stream.compress(bytes(300_000)) + stream.flush()
    packed = CODINGS[b"zstd"](BODY) + skippable + unsized
    assert decode_request(packed, b"zstd", 10**6) == BODY + bytes(300_000)


@pytest.mark.parametrize(
    ("values", "coding"),
    [((), b""), ((b"identity",), b""), ((b"",), b""), ((b" ZSTD ",), b"zstd"), ((b"identity", b"br"), b"br")],
)
def test_the_coding_of_a_request_is_told_by_its_header(values, coding) -> None:
    """In any letter case; identity is none."""
    assert request_encoding([(b"content-encoding", value) for value in values]) == coding


@pytest.mark.parametrize("values", [(b"lzma",), (b"gzip, br",), (b"gzip", b"br")])
def test_an_unknown_coding_and_several_are_refused(values) -> None:
    """Nothing is guessed about a body that must be checked."""
    with pytest.raises(BadRequest) as caught:
        request_encoding([(b"content-encoding", value) for value in values])
    assert caught.value.code == "unsupported_content_encoding"
    assert caught.value.message == "The body's content-encoding is not one of gzip, deflate, br and zstd."


@pytest.mark.parametrize("value", [b"", b"identity", b"utf-8", b"UTF8"])
def test_a_coding_that_compresses_nothing_is_none(value: bytes) -> None:
    """Some clients name their character set there."""
    assert request_encoding([(b"content-encoding", value)]) == b""


class CountedStream:
    """A decompressor of zlib that adds up the bytes given to it; it copies those behind the end of a member."""

    given_bytes = 0

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def decompress(self, piece: bytes, most: int) -> bytes:
        type(self).given_bytes += len(piece)
        decoded: bytes = self._stream.decompress(piece, most)
        return decoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@pytest.mark.parametrize(
    "reads", [lambda body: ResponseDecoder(b"gzip").feed(body), lambda body: decode_request(body, b"gzip", 9_000)]
)
def test_each_byte_of_many_small_members_of_gzip_is_looked_at_a_bounded_number_of_times(
    reads: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the rest was copied for every member: 16,000 of them took 0.4 s, and those of 32 MB hours."""
    made = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", lambda wbits: CountedStream(made(wbits=wbits)))
    for count in (500, 4_000):
        body = gzip.compress(b"x") * count
        CountedStream.given_bytes = 0
        assert reads(body) == b"x" * count
        assert CountedStream.given_bytes <= count * 16_384


def test_bytes_behind_the_members_of_gzip_stay_padding_whatever_follows() -> None:
    """What comes later is no member again."""
    decoder = ResponseDecoder(b"gzip")
    packed = gzip.compress(b"x")
    assert [decoder.feed(piece) for piece in (packed, b"\0\0", packed, b"\x1f")] == [b"x", b"", b"", b""]
    assert decoder.alive


@pytest.mark.parametrize(
    ("coding", "part"),
    [(b"gzip", gzip.compress(b"", mtime=0)), (b"zstd", zstandard.compress(b"")), (b"zstd", SKIPPED)],
    ids=["gzip", "zstd", "skipped"],
)
def test_very_many_empty_parts_of_a_compressed_body_are_not_decoded(coding: bytes, part: bytes) -> None:
    """Each takes as long as a kilobyte of text. A response is passed on, but not read."""
    with pytest.raises(BadRequest):
        decode_request(part * 25_000, coding, 1_000)
    if coding == b"gzip":
        decoder = ResponseDecoder(coding)
        assert (decoder.feed(part * 25_000), decoder.alive) == (b"", False)


def test_very_many_blocks_of_one_frame_of_zstd_are_not_decoded() -> None:
    """A block without content has three bytes."""
    head = b"\x28\xb5\x2f\xfd\0\x58"  # its magic number, and a window of 2 MB
    empty, last = b"\0\0\0", b"\1\0\0"
    assert decode_request(head + empty * 1_000 + last, b"zstd", 1_000) == b""
    with pytest.raises(BadRequest):
        decode_request(head + empty * 25_000 + last, b"zstd", 1_000)

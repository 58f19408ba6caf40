"""Compressed answers are read under a cap, and what cannot be read harms nothing."""

from __future__ import annotations

import functools
import gzip
import zlib
from collections.abc import Callable

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from proxy.wire.decode import ResponseDecoder

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
    for start in range(0, len(coded), 65536):
        seen += len(decoder.feed(coded[start : start + 65536]))
    assert seen <= 1_000_000
    assert not decoder.alive


@pytest.mark.parametrize("encoding", [b"compress", b"gzip, br", b"dcz", b"x"])
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

"""A secret in a body that passes in pieces, compressed or not."""

from __future__ import annotations

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadResponse
from proxy.wire.concealing import Concealer, concealed, concealed_headers
from proxy.wire.decode import ResponseDecoder

SECRET = b"aabaac"


@given(st.lists(st.text("abc", max_size=8)))
def test_a_secret_is_concealed_wherever_the_pieces_are_cut(texts: list[str]) -> None:
    """Nothing is lost or changed besides, and nothing is held back that the secret does not begin with."""
    pieces = [text.encode() for text in texts]
    concealer = Concealer(SECRET)
    passed = b""
    for number, piece in enumerate(pieces):
        passed += concealer.feed(piece, is_last=False)
        came = b"".join(pieces[: number + 1])
        assert len(came) - len(passed) < len(SECRET)
        assert SECRET.startswith(came[len(passed) :])
    passed += concealer.feed(b"", is_last=True)
    assert passed == concealed(b"".join(pieces), SECRET)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_compressed_body_passes_decoded(size: int) -> None:
    """However it is cut."""
    packed = gzip.compress(b"the key is aabaac.")
    concealer = Concealer(SECRET, ResponseDecoder(b"gzip"))
    passed = [
        concealer.feed(packed[at : at + size], is_last=at + size >= len(packed)) for at in range(0, len(packed), size)
    ]
    assert b"".join(passed) == b"the key is ******."


def test_what_cannot_be_decoded_is_an_error() -> None:
    """Its head has said by then that it is not compressed."""
    with pytest.raises(BadResponse):
        Concealer(SECRET, ResponseDecoder(b"gzip")).feed(b"no gzip", is_last=True)


def test_the_headers_of_a_coding_leave_with_it() -> None:
    headers = ((b"content-encoding", b"gzip"), (b"content-length", b"5"), (b"www-authenticate", b'realm="aabaac"'))
    assert concealed_headers(headers, SECRET, is_decoded=True) == ((b"www-authenticate", b'realm="******"'),)
    assert concealed_headers(headers, SECRET, is_decoded=False)[:2] == headers[:2]

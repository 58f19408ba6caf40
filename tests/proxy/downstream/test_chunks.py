"""Chunked bodies: decoded however they are cut, refused as soon as they cannot become valid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from httptools import HttpParserError, HttpRequestParser
from hypothesis import given
from hypothesis import strategies as st

from proxy.downstream.chunks import ChunkDecoder
from proxy.downstream.errors import BadHttp, ProtocolError
from proxy.errors import TooLarge


def decode(pieces: Sequence[bytes], limit_bytes: int = 10_000) -> tuple[bytes, bool, bytes]:
    """The content, whether the body is whole, and what came behind it."""
    decoder, out, rest = ChunkDecoder(limit_bytes), bytearray(), b""
    for piece in pieces:
        at = decoder.decode(piece, 0, len(piece), out)
        rest += piece[at:]
    return bytes(out), decoder.is_done, rest


def cut(message: bytes, places: Sequence[int]) -> list[bytes]:
    inside = sorted({place % (len(message) + 1) for place in places} | {0, len(message)})
    return [message[begin:end] for begin, end in pairwise(inside)]


CHUNK = st.tuples(st.binary(min_size=1, max_size=40), st.sampled_from([b"", b";a", b";a=b;c", b';q="x y"']))
TRAILERS = st.lists(st.sampled_from([b"x: y\r\n", b"Digest: \xff\r\n", b"a:\r\n"]), max_size=3)


@given(
    chunks=st.lists(CHUNK, max_size=5), trailers=TRAILERS, places=st.lists(st.integers(0, 10_000), max_size=8),
    behind=st.binary(max_size=20),
)  # fmt: skip
def test_a_body_is_the_same_however_it_is_cut_and_what_follows_is_left(
    chunks: list[tuple[bytes, bytes]], trailers: list[bytes], places: list[int], behind: bytes
) -> None:
    """Extensions and trailers are dropped."""
    message = b"".join(b"%X%b\r\n%b\r\n" % (len(content), extension, content) for content, extension in chunks)
    message += b"0\r\n" + b"".join(trailers) + b"\r\n"
    assert decode(cut(message + behind, places)) == (b"".join(content for content, _ in chunks), True, behind)


class Body:
    """Return llhttp's reading of a body."""

    def __init__(self) -> None:
        self.content = b""
        self.is_whole = False

    def on_body(self, piece: bytes) -> None:
        self.content += piece

    def on_message_complete(self) -> None:
        self.is_whole = True


@given(
    st.lists(
        st.sampled_from(
            [
                b"0",
                b"1",
                b"a",
                b"F",
                b"x",
                b";",
                b"=",
                b" ",
                b"\r\n",
                b"\r",
                b"\n",
                b"\0",
                b"0\r\n\r\n",
                b"1\r\na\r\n",
            ]
        ),
        max_size=12,
    )
)
def test_what_llhttp_refuses_is_refused(pieces: list[bytes]) -> None:
    """And what is accepted means the same to both: no other server can see another body in it."""
    message = b"".join(pieces)
    try:
        content, is_whole, rest = decode([message])
    except (ProtocolError, TooLarge):
        return
    if not is_whole:
        return  # the beginning of a line is only looked at, not yet judged
    body = Body()
    parser = HttpRequestParser(body)
    parser.feed_data(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    try:
        parser.feed_data(message[: len(message) - len(rest)])
    except HttpParserError as error:
        raise AssertionError(f"{message!r} is not valid: {error}") from None
    assert (body.content, body.is_whole) == (content, True)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"x", BadHttp.CHUNK),
        (b"-1\r\n", BadHttp.CHUNK),
        (b"+1\r\n", BadHttp.CHUNK),
        (b"0x1\r\n", BadHttp.CHUNK),
        (b"\r\n", BadHttp.CHUNK),
        (b" 1\r\n", BadHttp.CHUNK),
        (b"1 \r\n", BadHttp.CHUNK),
        (b"1\n", BadHttp.CHUNK),
        (b"1\r\nab", BadHttp.CHUNK),
        (b"1\r\na\n", BadHttp.CHUNK),
        (b"1\r\na\r\nx", BadHttp.CHUNK),
        (b"1;\x00", BadHttp.CHUNK),
        (b"1;\r\n", BadHttp.CHUNK),
        (b"1; a\r\n", BadHttp.CHUNK),
        (b"1;a\r\rb", BadHttp.CHUNK),
        (b"0" * 17, BadHttp.CHUNK),
        (b"1;" + b"a" * 300, BadHttp.CHUNK),
        (b"1;" + b"a" * 200 + b"\r\nx\r\n" + (b"1;" + b"a" * 200 + b"\r\nx\r\n") * 100, BadHttp.CHUNK),
        (b"0\r\nno colon", BadHttp.TRAILER),
        (b"0\r\n: a\r\n", BadHttp.TRAILER),
        (b"0\r\na : b\r\n", BadHttp.TRAILER),
        (b"0\r\na: b\n", BadHttp.TRAILER),
        (b"0\r\n" + b"a: b\r\n" * 2000, BadHttp.TRAILER),
        (b"0\r\na: " + b"b" * 9000, BadHttp.TRAILER),
    ],
)
def test_a_broken_body_is_refused_before_more_of_it_comes(message: bytes, reason: BadHttp) -> None:
    """Nobody waits for the end of what cannot have one."""
    with pytest.raises(ProtocolError) as refusal:
        decode([message])
    assert refusal.value.reason is reason


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"x", "The chunks of the body are not valid."),
        (b"1\r\nab", "The chunks of the body are not valid."),
        ((b"1;" + b"a" * 200 + b"\r\nx\r\n") * 100, "The body has too many chunk extensions."),
        (b"0\r\n: a\r\n", "The trailer of the body is not valid."),
        (b"0\r\n" + b"a: b\r\n" * 2000, "The trailer of the body is too large."),
    ],
)
def test_the_error_for_a_broken_body_says_which_part_of_it_is_wrong(sent: bytes, message: str) -> None:
    with pytest.raises(ProtocolError) as refusal:
        decode([sent])
    assert refusal.value.message == message
    assert refusal.value.status == (431 if "large" in message else 400)


def test_a_chunk_over_the_limit_is_refused_by_its_size() -> None:
    """Not a byte of it is waited for; neither of one that the chunks before it make too large."""
    with pytest.raises(TooLarge):
        decode([b"FFFFFFFFFFFFFFF\r\n"])
    with pytest.raises(TooLarge, match=r"^The body has more than 10 bytes, the most that is read\.$"):
        decode([b"6\r\nabcdef\r\n5\r\n"], limit_bytes=10)
    assert decode([b"6\r\nabcdef\r\n4\r\nabcd\r\n0\r\n\r\n"], limit_bytes=10)[1]


def test_many_small_chunks_have_no_extension_and_no_long_line() -> None:
    """The bounds count what is beside the content, and not where in a read it is."""
    assert decode([b"1\r\nx\r\n" * 5_000 + b"0\r\n\r\n"]) == (b"x" * 5_000, True, b"")


def test_each_bound_is_kept_to_the_byte() -> None:
    """A value just within the limit passes, and one more does not."""
    line = b"1;" + b"a" * 252
    assert decode([line + b"\r\nx\r\n0\r\n\r\n"])[1]
    with pytest.raises(ProtocolError):
        decode([line + b"a\r\nx\r\n0\r\n\r\n"])
    trailer = b"a: " + b"b" * (8 * 1024 - 7)
    assert decode([b"0\r\n" + trailer + b"\r\n\r\n"])[1]
    with pytest.raises(ProtocolError):
        decode([b"0\r\n" + trailer + b"b\r\n\r\n"])
    extended = b"1;" + b"a" * 127 + b"\r\nx\r\n"
    assert decode([extended * 128 + b"0\r\n\r\n"])[1]
    with pytest.raises(ProtocolError):
        decode([extended * 128 + b"1;a\r\nx\r\n"])

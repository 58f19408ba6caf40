"""Heads of requests: what is accepted, and what is refused for which reason."""

from __future__ import annotations

import pytest
from httptools import HttpRequestParser

from proxy.downstream.errors import BadHttp, ProtocolError
from proxy.downstream.request import HeadReader, IncomingRequest, feed_head, lower_names

LINE = b"GET /v1/models HTTP/1.1\r\n"
HOST = b"host: x\r\n"


def read(head: bytes) -> IncomingRequest:
    reader = HeadReader()
    parser = HttpRequestParser(reader)
    feed_head(parser, head)
    return reader.take(parser.get_method(), head.partition(b"\r\n")[0], 1000)


def test_a_head_is_read_with_lower_case_names_in_their_order() -> None:
    """Values stay as they are, and what comes twice comes twice."""
    request = read(
        b"POST /a?b=c HTTP/1.1\r\nHost: x:1\r\nX-A: 1\r\nX-B: \xff\r\nx-a: 2\r\nContent-Length: 5 \r\n\r\n"
    )
    assert (request.method, request.target) == ("POST", "/a?b=c")
    assert request.headers == [
        (b"host", b"x:1"), (b"x-a", b"1"), (b"x-b", b"\xff"), (b"x-a", b"2"), (b"content-length", b"5 "),
    ]  # fmt: skip
    assert (request.content_length, request.has_body, request.is_chunked) == (5, True, False)


@pytest.mark.parametrize(
    ("version", "connection", "stays"),
    [
        (b"1", b"", True),
        (b"1", b"connection: close\r\n", False),
        (b"1", b"connection: keep-alive, Close\r\n", False),
        (b"1", b"connection: keep-alive\r\nconnection: close\r\n", False),
        (b"1", b"connection: closed\r\n", True),
        (b"1", b"connection: XcloseX\r\n", True),
        (b"1", b"connection: te ,\tclose\t\r\n", False),
        (b"0", b"connection: te\r\nconnection: keep-alive\r\n", True),
        (b"0", b"connection: keep-alive\r\nconnection: te\r\n", True),
        (b"0", b"", False),
        (b"0", b"connection: Keep-Alive\r\n", True),
        (b"0", b"connection: te\r\n", False),
        (b"0", b"connection: keep-alive, close\r\n", False),
    ],
)
def test_a_connection_stays_as_its_version_and_its_options_say(
    version: bytes, connection: bytes, stays: bool
) -> None:
    """Options are words of a list, over all headers of that name."""
    assert read(b"GET / HTTP/1.%b\r\nhost: x\r\n%b\r\n" % (version, connection)).keep_alive is stays


def test_only_a_body_that_is_to_come_is_expected() -> None:
    """HTTP/1.0 knows no expectation, and without a body there is nothing to wait for."""
    expect = b"expect: 100-Continue\r\n"
    assert read(LINE + HOST + expect + b"content-length: 5\r\n\r\n").expects_continue
    assert not read(LINE + HOST + expect + b"\r\n").expects_continue
    assert not read(b"GET / HTTP/1.0\r\n" + expect + b"content-length: 5\r\n\r\n").expects_continue


def test_a_switch_of_protocols_is_not_taken_up() -> None:
    """The request is read like any other, its body too."""
    request = read(LINE + HOST + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 3\r\n\r\n")
    assert (request.upgrade, request.content_length, request.keep_alive) == (b"h2c", 3, True)


@pytest.mark.parametrize(
    ("head", "reason", "status"),
    [
        (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET /  HTTP/1.1\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET / HTTP/1.1 \r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET / HTTP/1.1\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET / http/1.1\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET /\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET / RTSP/1.0\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"SOURCE / ICE/1.0\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"get / HTTP/1.1\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n", BadHttp.REQUEST_LINE, 400),
        (b"GET / HTTP/0.9\r\n" + HOST + b"\r\n", BadHttp.VERSION, 505),
        (b"GET / HTTP/1.2\r\n" + HOST + b"\r\n", BadHttp.VERSION, 505),
        (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", BadHttp.VERSION, 505),
        (b"PRI * HTTP/2.0\r\n\r\n", BadHttp.VERSION, 505),
        (b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n", BadHttp.TUNNEL, 501),
        (LINE + b"\r\n", BadHttp.HOST, 400),
        (LINE + HOST + HOST + b"\r\n", BadHttp.HOST, 400),
        (LINE + b"host: a b\r\n\r\n", BadHttp.HOST, 400),
        (LINE + b"host: a/b\r\n\r\n", BadHttp.HOST, 400),
        (b"GET / HTTP/1.0\r\n" + HOST + HOST + b"\r\n", BadHttp.HOST, 400),
        (LINE + HOST + b"content-length: 3\r\ncontent-length: 3\r\n\r\n", BadHttp.CONTENT_LENGTH, 400),
        (LINE + HOST + b"content-length: +3\r\n\r\n", BadHttp.CONTENT_LENGTH, 400),
        (LINE + HOST + b"content-length: 1000000000000000\r\n\r\n", BadHttp.CONTENT_LENGTH, 400),
        (LINE + HOST + b"transfer-encoding: gzip, chunked\r\n\r\n", BadHttp.TRANSFER_ENCODING, 400),
        (LINE + HOST + b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n",
         BadHttp.TRANSFER_ENCODING, 400),
        (b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n", BadHttp.TRANSFER_ENCODING, 400),
        (LINE + HOST + b"expect: 200-ok\r\ncontent-length: 1\r\n\r\n", BadHttp.EXPECT, 417),
        (LINE + HOST + b"expect: X100-continueX\r\ncontent-length: 1\r\n\r\n", BadHttp.EXPECT, 417),
        (LINE + HOST + b"x-folded: a\r\n b\r\n\r\n", BadHttp.HEADER, 400),
        (LINE + HOST + b"x : a\r\n\r\n", BadHttp.HEADER, 400),
        (LINE + HOST + b"x: a\nb: c\r\n\r\n", BadHttp.HEADER, 400),
        (LINE + HOST + b"x: a\x00\r\n\r\n", BadHttp.HEADER, 400),
        (LINE + HOST + b"x: " + b"a" * 1000 + b"\r\n\r\n", BadHttp.HEAD_SIZE, 431),
        (LINE + HOST + b"x: a\r\n" * 256 + b"\r\n", BadHttp.HEAD_SIZE, 431),
    ],
)  # fmt: skip
def test_a_head_that_can_be_read_in_two_ways_is_refused_with_its_reason(
    head: bytes, reason: BadHttp, status: int
) -> None:
    """The reason is a metric label; the message never holds what was sent."""
    with pytest.raises(ProtocolError) as refusal:
        read(head)
    assert (refusal.value.reason, refusal.value.status) == (reason, status)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", "The request line is not valid."),
        (b"GET /a#b HTTP/1.1\r\n" + HOST + b"\r\n", "The request target has a fragment."),
        (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", "The version of the request is not HTTP/1.0 or HTTP/1.1."),
        (b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n", "This proxy does not open tunnels."),
        (LINE + b"\r\n", "A request must have exactly one Host header."),
        (LINE + b"host: a b\r\n\r\n", "The Host header is not a valid host."),
        (LINE + HOST + b"content-length: x\r\n\r\n", "The length of the body is not declared in a valid way."),
        (LINE + HOST + b"transfer-encoding: gzip\r\n\r\n", "The transfer encoding of the request is not valid."),
        (LINE + HOST + b"transfer-encoding: gzip, chunked\r\n\r\n",
         "The only transfer encoding that a request may have is chunked, in HTTP/1.1."),
        (LINE + HOST + b"expect: 200-ok\r\n\r\n", "Only the expectation 100-continue is supported."),
        (LINE + HOST + b"x : a\r\n\r\n", "A header of the request is not valid."),
        (LINE + HOST + b"x: a\r\n" * 256 + b"\r\n", "The head of the request is too large."),
    ],
)  # fmt: skip
def test_the_error_for_a_head_says_which_part_of_it_is_wrong(head: bytes, message: str) -> None:
    """It is the body of the answer, the only thing that its author sees."""
    with pytest.raises(ProtocolError) as refusal:
        read(head)
    assert refusal.value.message == message


def test_a_chunked_request_with_a_length_is_refused_whoever_notices() -> None:
    """llhttp does; the check behind it is for the day on which it does not."""
    headers = [(b"host", b"x"), (b"transfer-encoding", b"chunked"), (b"content-length", b"3")]
    with pytest.raises(ProtocolError) as refusal:
        IncomingRequest(b"POST", b"/", headers, b"POST / HTTP/1.1", 1_000)
    assert refusal.value.reason is BadHttp.CONTENT_LENGTH


@pytest.mark.parametrize("space", [b"\x0b", b"\x0c", b"\x85", b"\xa0"])
def test_only_spaces_and_tabs_around_an_encoding_are_ignored(space: bytes) -> None:
    """Other servers may take the rest for a part of its name, and find no encoding that they know."""
    for value in (space + b"chunked", b"chunked" + space):
        with pytest.raises(ProtocolError) as refused:
            IncomingRequest(b"POST", b"/", [(b"host", b"x"), (b"transfer-encoding", value)], b"POST / HTTP/1.1", 99)
        assert refused.value.reason is BadHttp.TRANSFER_ENCODING
    headers = [(b"host", b"x"), (b"transfer-encoding", b" \tChunked\t ")]
    assert IncomingRequest(b"POST", b"/", headers, b"POST / HTTP/1.1", 99).is_chunked


def test_made_up_names_are_not_remembered_for_ever() -> None:
    """Common ones are, once."""
    for number in range(30):
        read(LINE + HOST + b"".join(b"x-%d-%d: 1\r\n" % (number, each) for each in range(100)) + b"\r\n")
    assert len(lower_names) <= 1024
    before = len(lower_names)
    read(LINE + HOST + b"X" * 100 + b": 1\r\n\r\n")
    assert len(lower_names) == before
    one, two = (read(LINE + HOST + b"\r\n").headers[0][0] for _ in range(2))
    assert one is two


def test_a_length_has_at_most_fifteen_digits() -> None:
    """Enough for anything, and no number that a language might round."""
    assert read(LINE + HOST + b"content-length: 999999999999999\r\n\r\n").content_length == 10**15 - 1
    with pytest.raises(ProtocolError):
        read(LINE + HOST + b"content-length: 0999999999999999\r\n\r\n")


def test_a_parser_that_llhttp_changed_is_not_used_again() -> None:
    """Behind an upgrade it reads no HTTP, and behind the close of a Proxy-Connection header nothing."""
    assert not read(LINE + HOST + b"connection: x\r\n\r\n").is_parser_spent
    assert read(LINE + HOST + b"proxy-connection: close\r\n\r\n").is_parser_spent
    assert read(LINE + HOST + b"upgrade: x\r\n\r\n").is_parser_spent

"""Responses that an upstream should never send, as data: a name, the bytes, and what must become of them.

Each is sent in place of the first response of a connection. Whatever it is, the next request gets the response that
was made for it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Result(enum.Enum):
    """The result that the client sees."""

    WHOLE = "whole"  # the response with its own body and nothing else
    REFUSED = "refused"  # 502: nothing of the response can be trusted
    BROKEN = "broken"  # 502, or the head and a part of the body and then a visibly incomplete end


@dataclass(frozen=True)
class Case:
    """`pieces` are sent one after the other; after a None the upstream waits until the client has its response."""

    pieces: tuple[bytes | None, ...]
    result: Result
    body: bytes = b"own"
    status: int = 200
    method: str = "POST"
    ends: bool = False  # the upstream closes its connection after the last piece


OK = b"HTTP/1.1 200 OK\r\n"
OWN = OK + b"Content-Length: 3\r\n\r\nown"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nown\r\n"
POISON = OK + b"Content-Length: 8\r\n\r\nPOISONED"
SIZED = b"Content-Length: 3\r\n\r\nown"
LAST_CHUNKS = b"3\r\nown\r\n0\r\n\r\n"
HEAD_ONLY = OK + b"Content-Length: 3\r\n\r\n"


def whole(*pieces: bytes | None, body: bytes = b"own", status: int = 200, method: str = "POST") -> Case:
    return Case(pieces, Result.WHOLE, body, status, method)


def ended(*pieces: bytes | None, body: bytes = b"own") -> Case:
    return Case(pieces, Result.WHOLE, body, ends=True)


def refused(*pieces: bytes | None, ends: bool = False) -> Case:
    return Case(pieces, Result.REFUSED, b"", 502, ends=ends)


def broken(*pieces: bytes | None, ends: bool = False) -> Case:
    return Case(pieces, Result.BROKEN, ends=ends)


CASES: dict[str, Case] = {
    # bytes beyond the end of a response
    "a second response in the same segment": whole(OWN + POISON),
    "a second response in the next segment": whole(OWN, POISON),
    "a second response while the connection is idle": whole(OWN, None, POISON),
    "half of a second response while idle": whole(OWN, None, POISON[:20]),
    "one byte beyond the end": whole(OWN + b"X"),
    "one byte while idle": whole(OWN, None, b"\n"),
    "a second response behind the last chunk": whole(CHUNKED + b"0\r\n\r\n" + POISON),
    "a second response behind the last chunk, later": whole(CHUNKED + b"0\r\n\r\n", POISON),
    "an interim response behind the end": whole(OWN + b"HTTP/1.1 100 Continue\r\n\r\n"),
    "garbage behind the end": whole(OWN + b"\0\xff" * 40),
    "an endless tail": whole(OWN + POISON * 4_000),
    "a body longer than its length": whole(OK + b"Content-Length: 3\r\n\r\nownPOISONED"),
    "a body in the response to HEAD": whole(HEAD_ONLY + b"own" + POISON, body=b"", method="HEAD"),
    "a body in the response to HEAD, later": whole(HEAD_ONLY, b"own", POISON, body=b"", method="HEAD"),
    "a body in the response to HEAD, while idle": whole(HEAD_ONLY, None, POISON, body=b"", method="HEAD"),
    "chunks in the response to HEAD": whole(CHUNKED + b"0\r\n\r\n", body=b"", method="HEAD"),
    "a body behind 204": whole(
        b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n", b"own" + POISON, body=b"", status=204
    ),
    "a body behind 304": whole(
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", b"own", body=b"", status=304
    ),
    "a response behind 204": whole(b"HTTP/1.1 204 No Content\r\n\r\n" + POISON, body=b"", status=204),
    "a chunked body behind 204": whole(
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST_CHUNKS, body=b"", status=204
    ),
    "chunks in the response to HEAD, while idle": whole(
        OK + b"Transfer-Encoding: chunked\r\n\r\n", None, LAST_CHUNKS, body=b"", method="HEAD"
    ),
    "a second response behind one that closes": whole(OK + b"Connection: close\r\n" + SIZED + POISON),
    "a second response behind one that closes, later": whole(OK + b"Connection: close\r\n" + SIZED, POISON),
    "a second response behind chunks that close": whole(
        OK + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST_CHUNKS + POISON
    ),
    "a second response behind one of HTTP/1.0": whole(b"HTTP/1.0 200 OK\r\n" + SIZED + POISON),
    "a second response behind a kept one of HTTP/1.0": whole(
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + SIZED + POISON
    ),
    "a second response behind chunks of HTTP/1.0": whole(
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n" + LAST_CHUNKS + POISON
    ),
    "a second response behind an upgrade": whole(OK + b"Connection: upgrade\r\nUpgrade: h2c\r\n" + SIZED + POISON),
    # framing
    "spaces around the length": whole(OK + b"Content-Length:   3  \r\n\r\nown"),
    "a tab around the length": whole(OK + b"Content-Length:\t3\t\r\n\r\nown"),
    "spaces around the length, body cut short": broken(OK + b"Content-Length: 9  \r\n\r\nown", ends=True),
    "a length with leading zeros": whole(OK + b"Content-Length: 0003\r\n\r\nown"),
    "an empty length": refused(OK + b"Content-Length: \r\n\r\nown", ends=True),
    "a negative length": refused(OK + b"Content-Length: -3\r\n\r\nown"),
    "a signed length": refused(OK + b"Content-Length: +3\r\n\r\nown"),
    "a hexadecimal length": refused(OK + b"Content-Length: 0x3\r\n\r\nown"),
    "a length list": refused(OK + b"Content-Length: 3, 3\r\n\r\nown"),
    "two equal lengths": refused(OK + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nown"),
    "two lengths": refused(OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nown"),
    "a length beyond 64 bits": refused(OK + b"Content-Length: 99999999999999999999\r\n\r\nown"),
    "length and chunked": refused(
        OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nown\r\n0\r\n\r\n"
    ),
    "chunked and length": refused(
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nown\r\n0\r\n\r\n"
    ),
    "chunked twice": refused(OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n3\r\nown\r\n0\r\n\r\n"),
    "gzip as a transfer encoding": refused(OK + b"Transfer-Encoding: gzip\r\n\r\nown", ends=True),
    "an unknown transfer encoding": refused(OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", ends=True),
    "a space before the colon": refused(OK + b"Content-Length : 3\r\n\r\nown"),
    "a folded header": refused(OK + b"X-A: a\r\n b\r\nContent-Length: 3\r\n\r\nown"),
    "no length, then the end": ended(OK + b"\r\nown"),
    "cut inside a body of known length": broken(OK + b"Content-Length: 9\r\n\r\nown", ends=True),
    "cut inside a chunk": broken(OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nown", ends=True),
    "cut before the last chunk": broken(CHUNKED, ends=True),
    "a connection header that lists the length": whole(OK + b"Connection: content-length, x\r\n" + SIZED),
    "identity as a transfer encoding": refused(OK + b"Transfer-Encoding: identity\r\n" + SIZED, ends=True),
    "no length in HTTP/1.0, then the end": ended(b"HTTP/1.0 200 OK\r\n\r\nown"),
    "bare LFs": refused(b"HTTP/1.1 200 OK\nContent-Length: 3\n\nown"),
    "cut inside the head": refused(OK + b"Content-Le", ends=True),
    # chunks and trailers
    "a chunk size that is no number": broken(CHUNKED, b"zz\r\nPOISONED\r\n0\r\n\r\n"),
    "a negative chunk size": broken(CHUNKED, b"-8\r\nPOISONED\r\n0\r\n\r\n"),
    "a chunk size beyond 64 bits": broken(CHUNKED, b"fffffffffffffffff\r\nPOISONED\r\n"),
    "a chunk longer than its size": broken(CHUNKED, b"3\r\nPOISONED\r\n0\r\n\r\n"),
    "a chunk size before a space": broken(CHUNKED, b"8 \r\nPOISONED\r\n0\r\n\r\n"),
    "a chunk size before a bare LF": broken(CHUNKED, b"8\nPOISONED\r\n0\r\n\r\n"),
    "a chunk extension without end": broken(CHUNKED, b"3;" + b"x" * 1_000_000),
    "a trailer without end": broken(CHUNKED, b"0\r\n" + b"X-T: y\r\n" * 100_000),
    "a trailer that repeats the length": broken(CHUNKED + b"0\r\nContent-Length: 8\r\n\r\n", POISON),
    "a trailer that repeats the transfer encoding": whole(
        CHUNKED + b"0\r\nTransfer-Encoding: chunked\r\n\r\n", POISON
    ),
    "a harmless trailer": whole(CHUNKED + b"0\r\nX-Checksum: 1\r\n\r\n"),
    # heads
    "not HTTP": refused(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "HTTP/2 preface": refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/0.9": refused(b"own", ends=True),
    "a status of four digits": refused(b"HTTP/1.1 2000 OK\r\nContent-Length: 3\r\n\r\nown"),
    "status 0": refused(b"HTTP/1.1 000 Odd\r\nContent-Length: 3\r\n\r\nown"),
    "a head over the limit": refused(OK + b"X-A: " + b"a" * 100_000 + b"\r\nContent-Length: 3\r\n\r\nown"),
    "a reason over the limit": refused(b"HTTP/1.1 200 " + b"x" * 100_000 + b"\r\n" + SIZED),
    "a reason without end": refused(b"HTTP/1.1 200 " + b"x" * 1_000_000),
    "no reason": whole(b"HTTP/1.1 200\r\n" + SIZED),
    "a reason that is not ASCII": whole(b"HTTP/1.1 200 \xff\xfe\r\n" + SIZED),
    "many headers": refused(OK + b"X-A: a\r\n" * 20_000 + b"Content-Length: 3\r\n\r\nown"),
    "NUL in a header": refused(OK + b"X-A: a\0b\r\nContent-Length: 3\r\n\r\nown"),
    "a bare CR in a header": refused(OK + b"X-A: a\rContent-Length: 9\r\nContent-Length: 3\r\n\r\nown"),
    # interim responses
    "one 100 before the response": whole(b"HTTP/1.1 100 Continue\r\n\r\n" + OWN),
    "several 103 before the response": whole(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 5, OWN),
    "a flood of 102": refused(b"HTTP/1.1 102 Processing\r\n\r\n" * 100, OWN),
    "a flood of 102 in one segment": refused(b"HTTP/1.1 102 Processing\r\n\r\n" * 100 + OWN),
    "a large flood of 100": refused(*[b"HTTP/1.1 100 Continue\r\n\r\n" * 1_000] * 5),
    "100 with a length": whole(b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\n" + OWN),
    "100 with a body": refused(b"HTTP/1.1 100 Continue\r\nContent-Length: 5\r\n\r\nhello" + OWN),
    "large heads of 103": refused(*[b"HTTP/1.1 103 Early\r\n" + b"Link: %b\r\n" % (b"x" * 3_000) * 8 + b"\r\n"] * 5),
    "101 without an upgrade": refused(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
    # statuses with a time
    "429 with an absurd Retry-After": whole(
        b"HTTP/1.1 429 Slow\r\nRetry-After: 99999999999\r\nContent-Length: 3\r\n\r\nown", status=429
    ),
    "429 with a malformed Retry-After": whole(
        b"HTTP/1.1 429 Slow\r\nRetry-After: soon\r\nContent-Length: 3\r\n\r\nown", status=429
    ),
    "429 with a Retry-After of superscripts": whole(
        b"HTTP/1.1 429 Slow\r\nRetry-After: \xb2\xb2\r\nContent-Length: 3\r\n\r\nown", status=429
    ),
    "503 with a date that has no year": whole(
        b"HTTP/1.1 503 Busy\r\nRetry-After: Mon, 99 Foo 0000\r\nContent-Length: 3\r\n\r\nown", status=503
    ),
}  # fmt: skip

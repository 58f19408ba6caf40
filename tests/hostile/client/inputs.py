"""Input that a client should never send, or seldom does, as data: a name, the bytes, and what must become of them.

`SMUGGLED` is where another server might see a request that is none: it must never reach the handler. If a case ends
well, the connection must still be in step afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_BYTES_MOST = 8 * 1024
LINE_BYTES_MOST = 4 * 1024
BODY_BYTES_MOST = 100_000

Pieces = tuple[bytes, ...]


@dataclass(frozen=True)
class Case:
    """`pieces` are sent one after the other, each in a segment of its own.

    `served` are the requests that reach the handler, as method, target and body; `statuses` those of all answers.
    `ends`: the server closes the connection. `leaves`: the client closes it behind the last piece.
    """

    pieces: Pieces
    served: Pieces = ()
    statuses: tuple[int, ...] = ()
    ends: bool = False
    leaves: bool = False


HOST = b"host: x\r\n"
GET = b"GET /a HTTP/1.1\r\n" + HOST
POST = b"POST /a HTTP/1.1\r\n" + HOST
PUT_10 = b"POST /a HTTP/1.0\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nhost: x\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n"
LAST = b"0\r\n\r\n"


def sized(body: bytes, more: bytes = b"", head: bytes = POST) -> bytes:
    """A request whose body has a declared length."""
    return b"%b%bcontent-length: %d\r\n\r\n%b" % (head, more, len(body), body)


def chunk(content: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(content), extension, content)


def bytewise(message: bytes) -> Pieces:
    return tuple(message[at : at + 1] for at in range(len(message)))


def good(*pieces: bytes, served: Pieces = (b"POST /a abc",), statuses: tuple[int, ...] = ()) -> Case:
    """It is answered, and the connection goes on."""
    return Case(pieces, served, statuses or (200,) * len(served))


def last(*pieces: bytes, served: Pieces = (b"POST /a abc",)) -> Case:
    """It is answered, and the connection ends."""
    return Case(pieces, served, (200,) * len(served), ends=True)


def bad(status: int, *pieces: bytes, before: Pieces = ()) -> Case:
    """It is refused, and the connection ends; `before` was served before it."""
    return Case(pieces, before, (200,) * len(before) + (status,), ends=True)


def gone(*pieces: bytes) -> Case:
    """The client leaves in the middle: nobody is served or answered."""
    return Case(pieces, leaves=True)


TWO_WAYS: dict[str, Case] = {
    # a body that two servers would end in different places
    "length and chunked": bad(
        400, POST + b"content-length: 6\r\ntransfer-encoding: chunked\r\n\r\n" + LAST + SMUGGLED
    ),
    "chunked and length": bad(
        400, POST + b"transfer-encoding: chunked\r\ncontent-length: 6\r\n\r\n" + LAST + SMUGGLED
    ),
    "two lengths": bad(400, POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc" + SMUGGLED),
    "the same length twice": bad(400, POST + b"content-length: 3\r\ncontent-length: 3\r\n\r\nabc" + SMUGGLED),
    "a list of lengths": bad(400, POST + b"content-length: 3, 3\r\n\r\nabc" + SMUGGLED),
    "a length with a sign": bad(400, POST + b"content-length: +3\r\n\r\nabc" + SMUGGLED),
    "a negative length": bad(400, POST + b"content-length: -3\r\n\r\nabc" + SMUGGLED),
    "a length with a space inside": bad(400, POST + b"content-length: 3 3\r\n\r\nabc" + SMUGGLED),
    "a length in hexadecimal": bad(400, POST + b"content-length: 0x3\r\n\r\nabc" + SMUGGLED),
    "a length with a fraction": bad(400, POST + b"content-length: 3.0\r\n\r\nabc" + SMUGGLED),
    "a length with an underscore": bad(400, POST + b"content-length: 1_0\r\n\r\nabc" + SMUGGLED),
    "a length of other digits": bad(400, POST + "content-length: ٣\r\n\r\nabc".encode() + SMUGGLED),
    "a length in exponents": bad(400, POST + b"content-length: 3e0\r\n\r\nabc" + SMUGGLED),
    "an empty length": bad(400, POST + b"content-length:\r\n\r\nabc" + SMUGGLED),
    "a length of spaces": bad(400, POST + b"content-length:   \r\n\r\nabc" + SMUGGLED),
    "a length with NUL": bad(400, POST + b"content-length: 3\x00\r\n\r\nabc" + SMUGGLED),
    "a length with a vertical tab": bad(400, POST + b"content-length: \x0b3\r\n\r\nabc" + SMUGGLED),
    "a length beyond 64 bits": bad(400, POST + b"content-length: 18446744073709551619\r\n\r\nabc" + SMUGGLED),
    "a length of a thousand digits": bad(400, POST + b"content-length: " + b"0" * 999 + b"3\r\n\r\nabc" + SMUGGLED),
    "a length with a space before its colon": bad(400, POST + b"content-length : 3\r\n\r\nabc" + SMUGGLED),
    "a length with a tab before its colon": bad(400, POST + b"content-length\t: 3\r\n\r\nabc" + SMUGGLED),
    "a length on a folded line": bad(400, POST + b"content-length:\r\n 3\r\n\r\nabc" + SMUGGLED),
    "a length inside a folded line": bad(400, POST + b"x: y\r\n content-length: 3\r\n\r\nabc" + SMUGGLED),
    "a length behind a bare LF": bad(400, POST + b"x: y\ncontent-length: 3\r\n\r\nabc" + SMUGGLED),
    "a length behind a bare CR": bad(400, POST + b"x: y\rcontent-length: 3\r\n\r\nabc" + SMUGGLED),
    "a length behind NUL": bad(400, POST + b"x: y\x00content-length: 3\r\n\r\nabc" + SMUGGLED),
    "an unknown encoding": bad(400, POST + b"transfer-encoding: xchunked\r\n\r\n" + LAST + SMUGGLED),
    "an encoding behind chunked": bad(400, POST + b"transfer-encoding: chunked, identity\r\n\r\n" + LAST + SMUGGLED),
    "an encoding before chunked": bad(400, POST + b"transfer-encoding: gzip, chunked\r\n\r\n" + LAST + SMUGGLED),
    "chunked twice": bad(400, POST + b"transfer-encoding: chunked, chunked\r\n\r\n" + LAST + SMUGGLED),
    "chunked in two headers": bad(400, POST + b"transfer-encoding: chunked\r\n" * 2 + b"\r\n" + LAST + SMUGGLED),
    "an encoding in each of two headers": bad(
        400, POST + b"transfer-encoding: identity\r\ntransfer-encoding: chunked\r\n\r\n" + LAST + SMUGGLED
    ),
    "identity": bad(400, POST + b"transfer-encoding: identity\r\n\r\n" + SMUGGLED),
    "an empty encoding": bad(400, POST + b"transfer-encoding:\r\n\r\n" + SMUGGLED),
    "quoted chunked": bad(400, POST + b'transfer-encoding: "chunked"\r\n\r\n' + LAST + SMUGGLED),
    "chunked with a parameter": bad(400, POST + b"transfer-encoding: chunked;q=1\r\n\r\n" + LAST + SMUGGLED),
    "chunked behind a vertical tab": bad(400, POST + b"transfer-encoding: \x0bchunked\r\n\r\n" + LAST + SMUGGLED),
    "chunked before NUL": bad(400, POST + b"transfer-encoding: chunked\x00\r\n\r\n" + LAST + SMUGGLED),
    "chunked on a folded line": bad(400, POST + b"transfer-encoding:\r\n chunked\r\n\r\n" + LAST + SMUGGLED),
    "chunked with a space before its colon": bad(
        400, POST + b"transfer-encoding : chunked\r\n\r\n" + LAST + SMUGGLED
    ),
    "chunked behind a bare LF": bad(400, POST + b"x: y\ntransfer-encoding: chunked\r\n\r\n" + LAST + SMUGGLED),
    "chunked in HTTP/1.0": bad(400, PUT_10 + b"transfer-encoding: chunked\r\n\r\n" + LAST + SMUGGLED),
    "a header that is nearly an encoding": last(
        POST + b"transfer_encoding: chunked\r\nconnection: close\r\ncontent-length: 3\r\n\r\nabc" + SMUGGLED
    ),
    "chunked in capitals": good(POST + b"Transfer-Encoding: CHUNKED\r\n\r\n" + chunk(b"abc") + LAST),
    "chunked between spaces": good(POST + b"transfer-encoding: \t chunked  \r\n\r\n" + chunk(b"abc") + LAST),
    "chunked before a tab": bad(400, POST + b"transfer-encoding: chunked\t\r\n\r\n" + LAST + SMUGGLED),
    "a length between spaces": good(POST + b"content-length: \t 3 \t \r\n\r\nabc"),
    "a length with leading zeros": good(POST + b"content-length: 0003\r\n\r\nabc"),
    "a body of GET": good(sized(b"abc", head=GET), served=(b"GET /a abc",)),
    "a chunked body of DELETE": good(
        b"DELETE /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"abc") + LAST,
        served=(b"DELETE /a abc",),
    ),
    "no length at all": good(POST + b"\r\n" + NEXT, served=(b"POST /a ", b"GET /next ")),
    "a length of zero": good(sized(b"") + NEXT, served=(b"POST /a ", b"GET /next ")),
    "a request inside a body": good(sized(SMUGGLED) + NEXT, served=(b"POST /a " + SMUGGLED, b"GET /next ")),
    "a request inside a chunk": good(
        CHUNKED + chunk(SMUGGLED) + LAST + NEXT, served=(b"POST /a " + SMUGGLED, b"GET /next ")
    ),
    "an end of chunks inside a chunk": good(
        CHUNKED + chunk(LAST + SMUGGLED) + LAST, served=(b"POST /a " + LAST + SMUGGLED,)
    ),
}

REQUEST_LINES: dict[str, Case] = {
    "bare LF throughout": bad(400, b"GET /a HTTP/1.1\nhost: x\n\n" + SMUGGLED),
    "bare LF throughout, alone": bad(400, b"GET /a HTTP/1.1\nhost: x\n\n"),
    "bare LF behind the line": bad(400, b"GET /a HTTP/1.1\nhost: x\r\n\r\n" + SMUGGLED),
    "bare CR behind the line": bad(400, b"GET /a HTTP/1.1\rhost: x\r\n\r\n" + SMUGGLED),
    "CR CR LF behind the line": bad(400, b"GET /a HTTP/1.1\r\r\nhost: x\r\n\r\n" + SMUGGLED),
    "bare LF at the end of the head": bad(400, GET + b"\n" + SMUGGLED),
    "LF LF at the end of the head": bad(400, GET + b"x: y\n\n" + SMUGGLED),
    "CR CR LF behind a header": bad(400, GET + b"x: y\r\r\n\r\n" + SMUGGLED),
    "two spaces behind the method": bad(400, b"GET  /a HTTP/1.1\r\nhost: x\r\n\r\n"),
    "two spaces behind the target": bad(400, b"GET /a  HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a tab behind the method": bad(400, b"GET\t/a HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a space before the method": bad(400, b" GET /a HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a space behind the version": bad(400, b"GET /a HTTP/1.1 \r\nhost: x\r\n\r\n"),
    "a space in the target": bad(400, b"GET /a b HTTP/1.1\r\nhost: x\r\n\r\n"),
    "NUL in the target": bad(400, b"GET /a\x00b HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a tab in the target": bad(400, b"GET /a\tb HTTP/1.1\r\nhost: x\r\n\r\n"),
    "DEL in the target": bad(400, b"GET /a\x7f HTTP/1.1\r\nhost: x\r\n\r\n"),
    "UTF-8 in the target": bad(400, "GET /ä HTTP/1.1\r\nhost: x\r\n\r\n".encode()),
    "what is not UTF-8 in the target": bad(400, b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a fragment": bad(400, b"GET /a#b HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a target without a slash": bad(400, b"GET a HTTP/1.1\r\nhost: x\r\n\r\n"),
    "no target": bad(400, b"GET HTTP/1.1\r\nhost: x\r\n\r\n"),
    "an empty target": bad(400, b"GET  HTTP/1.1\r\nhost: x\r\n\r\n"),
    "no version": bad(400, b"GET /a\r\nhost: x\r\n\r\n" + SMUGGLED),
    "HTTP/0.9": bad(505, b"GET /a HTTP/0.9\r\nhost: x\r\n\r\n"),
    "HTTP/1.2": bad(505, b"GET /a HTTP/1.2\r\nhost: x\r\n\r\n"),
    "HTTP/2.0": bad(505, b"GET /a HTTP/2.0\r\nhost: x\r\n\r\n"),
    "the preface of HTTP/2": bad(505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/1.10": bad(400, b"GET /a HTTP/1.10\r\nhost: x\r\n\r\n"),
    "HTTP/01.1": bad(400, b"GET /a HTTP/01.1\r\nhost: x\r\n\r\n"),
    "HTTP/1": bad(400, b"GET /a HTTP/1\r\nhost: x\r\n\r\n"),
    "HTTP/1.": bad(400, b"GET /a HTTP/1.\r\nhost: x\r\n\r\n"),
    "a version in small letters": bad(400, b"GET /a http/1.1\r\nhost: x\r\n\r\n"),
    "another protocol": bad(400, b"GET /a RTSP/1.0\r\nhost: x\r\n\r\n"),
    "a method in small letters": bad(400, b"get /a HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a made-up method": bad(400, b"SMUGGLE /a HTTP/1.1\r\nhost: x\r\n\r\n"),
    "an empty method": bad(400, b" /a HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a method with a control character": bad(400, b"GE\x01T /a HTTP/1.1\r\nhost: x\r\n\r\n"),
    "an endless method": bad(431, b"A" * 10_000),
    "an endless target": bad(414, b"GET /" + b"a" * 10_000),
    "a long target": bad(414, b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n"),
    "a tunnel": bad(501, b"CONNECT x:443 HTTP/1.1\r\nhost: x:443\r\n\r\n" + SMUGGLED),
    "a TLS handshake": bad(400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200),
    "an SSH greeting": bad(400, b"SSH-2.0-OpenSSH_9.2\r\n"),
    "a proxy protocol header": bad(400, b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + SMUGGLED),
    "a binary proxy protocol header": bad(400, b"\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + b"\x00" * 12 + SMUGGLED),
    "a Redis command": bad(400, b"*1\r\n$4\r\nPING\r\n"),
    "a mail greeting": bad(400, b"EHLO x\r\n"),
    "NULs": bad(400, b"\x00" * 100),
    "random bytes": bad(400, bytes(range(128, 256))),
    "a line of text": bad(400, b"hello\r\n\r\n"),
    "a JSON body alone": bad(400, b'{"model":"x"}\r\n\r\n'),
    "the absolute form": good(b"GET http://x/a?b HTTP/1.1\r\nhost: x\r\n\r\n", served=(b"GET http://x/a?b ",)),
    "the asterisk form": good(b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n", served=(b"OPTIONS * ",)),
    "signs that browsers leave": good(
        b"GET /a?b={|}^`<> HTTP/1.1\r\nhost: x\r\n\r\n", served=(b"GET /a?b={|}^`<> ",)
    ),
    "empty lines before it": good(b"\r\n\r\n\r\n" + sized(b"abc")),
    "bare LFs before it": good(b"\n\n" + sized(b"abc")),
    "empty lines between two": good(sized(b"abc") + b"\r\n" + NEXT, served=(b"POST /a abc", b"GET /next ")),
    "one more byte than declared": bad(400, sized(b"abc") + b"d" + NEXT, before=(b"POST /a abc",)),
}

HEADERS: dict[str, Case] = {
    "no host": bad(400, b"GET /a HTTP/1.1\r\n\r\n"),
    "two hosts": bad(400, GET + b"host: y\r\n\r\n"),
    "the same host twice": bad(400, GET + HOST + b"\r\n"),
    "two hosts in HTTP/1.0": bad(400, b"GET /a HTTP/1.0\r\nhost: x\r\nhost: y\r\n\r\n"),
    "a host with a path": bad(400, b"GET /a HTTP/1.1\r\nhost: x/y\r\n\r\n"),
    "a host with a space": bad(400, b"GET /a HTTP/1.1\r\nhost: x y\r\n\r\n"),
    "a host with a user": bad(400, b"GET /a HTTP/1.1\r\nhost: u@x\r\n\r\n"),
    "a host that is not ASCII": bad(400, b"GET /a HTTP/1.1\r\nhost: \xff\r\n\r\n"),
    "an empty host": good(b"GET /a HTTP/1.1\r\nhost:\r\n\r\n", served=(b"GET /a ",)),
    "a header without a colon": bad(400, GET + b"x\r\n\r\n"),
    "a header without a name": bad(400, GET + b": y\r\n\r\n"),
    "a header named by a space": bad(400, GET + b" : y\r\n\r\n"),
    "a space before the first header": bad(400, b"GET /a HTTP/1.1\r\n host: x\r\n\r\n"),
    "a folded line": bad(400, GET + b"x: y\r\n z\r\n\r\n"),
    "a line folded by a tab": bad(400, GET + b"x: y\r\n\tz\r\n\r\n"),
    "a line folded to nothing": bad(400, GET + b"x: y\r\n \r\n\r\n" + SMUGGLED),
    "a space in a name": bad(400, GET + b"x y: z\r\n\r\n"),
    "a bracket in a name": bad(400, GET + b"x(y): z\r\n\r\n"),
    "a name that is not ASCII": bad(400, GET + b"x\xff: z\r\n\r\n"),
    "NUL in a name": bad(400, GET + b"x\x00: z\r\n\r\n"),
    "NUL in a value": bad(400, GET + b"x: y\x00z\r\n\r\n"),
    "a control character in a value": bad(400, GET + b"x: y\x01z\r\n\r\n"),
    "DEL in a value": bad(400, GET + b"x: y\x7f\r\n\r\n"),
    "a bare CR in a value": bad(400, GET + b"x: y\rz\r\n\r\n"),
    "a bare LF in a value": bad(400, GET + b"x: y\nz: w\r\n\r\n"),
    "a CR at the end of a value": bad(400, GET + b"x: y\r\r\n\r\n"),
    "257 headers": bad(431, GET + b"x: y\r\n" * 256 + b"\r\n"),
    "a header over its limit": bad(431, GET + b"x: " + b"y" * LINE_BYTES_MOST + b"\r\n\r\n"),
    "a name over its limit": bad(431, GET + b"x" * LINE_BYTES_MOST + b": y\r\n\r\n"),
    "a head over its limit": bad(431, GET + (b"x: " + b"y" * 1000 + b"\r\n") * 9 + b"\r\n"),
    "an endless head": bad(431, GET + b"x: y\r\n" * 10_000),
    "an endless value": bad(431, GET + b"x: " + b"y" * 100_000),
    "an unknown expectation": bad(417, sized(b"abc", b"expect: 200-ok\r\n")),
    "two expectations": bad(417, sized(b"abc", b"expect: 100-continue, x\r\n")),
    "an empty value": good(sized(b"abc", b"x:\r\n")),
    "a value that is not UTF-8": good(sized(b"abc", b"x: \xff\xfe\r\n")),
    "a tab in a value": good(sized(b"abc", b"x: y\tz\r\n")),
    "all signs of a name": good(sized(b"abc", b"!#$%&'*+-.^_`|~09azAZ: y\r\n")),
    "256 headers": good(sized(b"abc", b"x: y\r\n" * 254)),
    "a head at its limit": good(sized(b"abc", b"x: " + b"y" * (LINE_BYTES_MOST - 1) + b"\r\n")),
    "close": last(sized(b"abc", b"connection: close\r\n") + SMUGGLED),
    "close among others": last(sized(b"abc", b"connection: x, Close ,y\r\n") + SMUGGLED),
    "close and keep-alive": last(sized(b"abc", b"connection: keep-alive\r\nconnection: close\r\n") + SMUGGLED),
    "HTTP/1.0": last(PUT_10 + b"content-length: 3\r\n\r\nabc" + SMUGGLED),
    "HTTP/1.0 with a host": last(PUT_10 + b"host: x\r\ncontent-length: 3\r\n\r\nabc" + SMUGGLED),
    "HTTP/1.0 kept": good(PUT_10 + b"connection: keep-alive\r\ncontent-length: 3\r\n\r\nabc"),
    "an upgrade to HTTP/2": good(
        sized(b"abc", b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n") + NEXT,
        served=(b"POST /a abc", b"GET /next "),
    ),
    "an upgrade to WebSocket": good(
        GET + b"connection: Upgrade\r\nupgrade: websocket\r\n\r\n" + NEXT, served=(b"GET /a ", b"GET /next ")
    ),
    "an upgrade of a chunked request": good(
        POST
        + b"connection: upgrade\r\nupgrade: x\r\ntransfer-encoding: chunked\r\n\r\n"
        + chunk(b"abc")
        + LAST
        + NEXT,
        served=(b"POST /a abc", b"GET /next "),
    ),
    "a connection header for proxies": good(
        sized(b"abc", b"proxy-connection: close\r\n") + NEXT,
        NEXT,
        served=(b"POST /a abc", b"GET /next ", b"GET /next "),
    ),
    "a connection header for proxies, without a body": good(
        GET + b"proxy-connection: close\r\n\r\n" + NEXT, served=(b"GET /a ", b"GET /next ")
    ),
    "an upgrade that is not a connection option": good(sized(b"abc", b"upgrade: h2c\r\n")),
    "the answer to HEAD": good(b"HEAD /a HTTP/1.1\r\nhost: x\r\n\r\n", served=(b"HEAD /a ",)),
}

CHUNKS: dict[str, Case] = {
    "a size that is none": bad(400, CHUNKED + b"xyz\r\n" + SMUGGLED),
    "an empty size": bad(400, CHUNKED + b"\r\nabc\r\n" + LAST),
    "an empty size with an extension": bad(400, CHUNKED + b";a=b\r\nabc\r\n" + LAST),
    "a negative size": bad(400, CHUNKED + b"-3\r\nabc\r\n" + LAST),
    "a size with a sign": bad(400, CHUNKED + b"+3\r\nabc\r\n" + LAST),
    "a size with 0x": bad(400, CHUNKED + b"0x3\r\nabc\r\n" + LAST),
    "a size with an underscore": bad(400, CHUNKED + b"0_3\r\nabc\r\n" + LAST),
    "a size behind a space": bad(400, CHUNKED + b" 3\r\nabc\r\n" + LAST),
    "a size before a space": bad(400, CHUNKED + b"3 \r\nabc\r\n" + LAST),
    "a size before a tab": bad(400, CHUNKED + b"3\t\r\nabc\r\n" + LAST),
    "a size before NUL": bad(400, CHUNKED + b"3\x00\r\nabc\r\n" + LAST),
    "a size before a bare LF": bad(400, CHUNKED + b"3\nabc\r\n" + LAST),
    "a size before a bare CR": bad(400, CHUNKED + b"3\rabc\r\n" + LAST),
    "a size before CR CR LF": bad(400, CHUNKED + b"3\r\r\nabc\r\n" + LAST),
    "a size of 16 digits": bad(413, CHUNKED + b"FFFFFFFFFFFFFFFF\r\n"),
    "a size beyond 64 bits": bad(400, CHUNKED + b"10000000000000003\r\nabc\r\n" + LAST),
    "a size of 17 zeros": bad(400, CHUNKED + b"0" * 17 + b"\r\n\r\n"),
    "an endless size": bad(400, CHUNKED + b"0" * 10_000),
    "an enormous size": bad(413, CHUNKED + b"7fffffff\r\nabc"),
    "a size over the limit": bad(413, CHUNKED + b"%x\r\n" % (BODY_BYTES_MOST + 1)),
    "sizes over the limit": bad(413, CHUNKED + chunk(b"x" * 60_000) + b"%x\r\n" % 40_001),
    "a chunk that is too long": bad(400, CHUNKED + b"3\r\nabcd\r\n" + LAST),
    "a chunk that is too short": bad(400, CHUNKED + b"5\r\nabc\r\n" + LAST),
    "a chunk that ends in a bare LF": bad(400, CHUNKED + b"3\r\nabc\n" + LAST),
    "a chunk that ends in a bare CR": bad(400, CHUNKED + b"3\r\nabc\r0\r\n\r\n"),
    "a chunk without an end": bad(400, CHUNKED + b"3\r\nabc" + LAST + SMUGGLED),
    "a broken chunk behind a good one": bad(400, CHUNKED + chunk(b"abc"), b"zz"),
    "an extension with NUL": bad(400, CHUNKED + b"3;a=\x00\r\nabc\r\n" + LAST),
    "an extension with a bare LF": bad(400, CHUNKED + b"3;a\nb\r\nabc\r\n" + LAST + SMUGGLED),
    "an extension with a bare CR": bad(400, CHUNKED + b"3;a\rb\r\nabc\r\n" + LAST),
    "an extension without a name": bad(400, CHUNKED + b"3;\r\nabc\r\n" + LAST),
    "an extension with an open quote": bad(400, CHUNKED + b'3;a="b\r\nabc\r\n' + LAST),
    "an extension over its limit": bad(400, CHUNKED + b"3;" + b"a" * 300 + b"\r\nabc\r\n" + LAST),
    "an endless extension": bad(400, CHUNKED + b"3;" + b"a" * 100_000),
    "too many extensions": bad(400, CHUNKED + chunk(b"x", b";" + b"a" * 200) * 100 + LAST),
    "a trailer without a colon": bad(400, CHUNKED + b"0\r\nx\r\n\r\n"),
    "a trailer with a space before its colon": bad(400, CHUNKED + b"0\r\nx : y\r\n\r\n"),
    "a trailer with NUL": bad(400, CHUNKED + b"0\r\nx: \x00\r\n\r\n"),
    "a trailer behind a bare LF": bad(400, CHUNKED + b"0\r\nx: y\nz: w\r\n\r\n"),
    "a folded trailer": bad(400, CHUNKED + b"0\r\nx: y\r\n z\r\n\r\n"),
    "a trailer over its limit": bad(431, CHUNKED + b"0\r\n" + b"x: y\r\n" * 2_000 + b"\r\n"),
    "an endless trailer": bad(431, CHUNKED + b"0\r\n" + b"x: y\r\n" * 20_000),
    "an endless trailer line": bad(431, CHUNKED + b"0\r\nx: " + b"y" * 100_000),
    "a bare LF at the end": bad(400, CHUNKED + b"0\r\n\n" + SMUGGLED),
    "a request in place of the trailer": bad(400, CHUNKED + b"0\r\n" + SMUGGLED),
    "no chunks": good(CHUNKED + LAST, served=(b"POST /a ",)),
    "many zeros at the end": good(CHUNKED + chunk(b"abc") + b"0000\r\n\r\n"),
    "sizes in both cases": good(
        CHUNKED + b"a\r\n" + b"x" * 10 + b"\r\nA\r\n" + b"y" * 10 + b"\r\n" + LAST,
        served=(b"POST /a " + b"x" * 10 + b"y" * 10,),
    ),
    "extensions": good(CHUNKED + b'1;a\r\na\r\n1;b=c\r\nb\r\n1;d="e; f";g=h\r\nc\r\n0;i\r\n\r\n'),
    "trailers": good(CHUNKED + chunk(b"abc") + b"0\r\nx: y\r\nz:\r\n\r\n"),
    "trailers that name the framing": good(
        CHUNKED + chunk(b"abc") + b"0\r\ncontent-length: 99\r\ntransfer-encoding: x\r\nhost: y\r\n\r\n" + NEXT,
        served=(b"POST /a abc", b"GET /next "),
    ),
    "a chunk for each byte": good(CHUNKED + b"".join(chunk(b"%c" % byte) for byte in b"abc" * 900) + LAST,
                                  served=(b"POST /a " + b"abc" * 900,)),
    "a chunk of the whole limit": good(
        CHUNKED + chunk(b"x" * BODY_BYTES_MOST) + LAST, served=(b"POST /a " + b"x" * BODY_BYTES_MOST,)
    ),
}  # fmt: skip

ORDER: dict[str, Case] = {
    # requests ahead of their turn, early ends, pieces
    "twenty at once": good(NEXT * 20, served=(b"GET /next ",) * 20),
    "a thousand at once": good(NEXT * 1_000, served=(b"GET /next ",) * 1_000),
    "behind a body of 20 KB": good(
        (sized(b"x" * 20_000) + NEXT) * 20, served=(b"POST /a " + b"x" * 20_000, b"GET /next ") * 20
    ),
    "behind a body of 90 KB": good(
        (sized(b"x" * 90_000) + NEXT) * 5, served=(b"POST /a " + b"x" * 90_000, b"GET /next ") * 5
    ),
    "behind a chunked body of 90 KB": good(
        (CHUNKED + chunk(b"x" * 30_000) * 3 + LAST + NEXT) * 5,
        served=(b"POST /a " + b"x" * 90_000, b"GET /next ") * 5,
    ),
    "behind one that is refused": bad(400, NEXT + b"bad\r\n\r\n" + SMUGGLED, before=(b"GET /next ",)),
    "behind one that asks for the end": last(
        NEXT + sized(b"abc", b"connection: close\r\n") + SMUGGLED, served=(b"GET /next ", b"POST /a abc")
    ),
    "behind a body that is too large": bad(413, sized(b"x" * 2 * BODY_BYTES_MOST) + SMUGGLED),
    "a head cut at every byte": good(*bytewise(sized(b"abc"))),
    "chunks cut at every byte": good(*bytewise(CHUNKED + b"2;a=b\r\nab\r\n1\r\nc\r\n0\r\nx: y\r\n\r\n")),
    "a head cut in its end": good(sized(b"abc")[:-5], sized(b"abc")[-5:]),
    "a head cut in its end, and two more": good(
        sized(b"abc")[:-4], sized(b"abc")[-4:] + NEXT[:-1], NEXT[-1:], served=(b"POST /a abc", b"GET /next ")
    ),
    "a body behind its head": good(sized(b"abc")[:-3], b"a", b"bc"),
    "a body of 90 KB behind its head": good(
        POST + b"content-length: 90000\r\n\r\n", b"x" * 45_000, b"x" * 45_000 + NEXT,
        served=(b"POST /a " + b"x" * 90_000, b"GET /next "),
    ),
    "a bad head cut at every byte": bad(400, *bytewise(GET + b"x : y\r\n\r\n")),
    "the end inside a request line": gone(b"GET /a HT"),
    "the end inside a head": gone(GET + b"x: y\r\n"),
    "the end before a body": gone(POST + b"content-length: 3\r\n\r\n"),
    "the end inside a body": gone(POST + b"content-length: 3\r\n\r\nab"),
    "the end inside a long body": gone(POST + b"content-length: 90000\r\n\r\n" + b"x" * 50_000),
    "the end inside a chunk": gone(CHUNKED + b"3\r\nab"),
    "the end before the last chunk": gone(CHUNKED + chunk(b"abc")),
    "the end inside a trailer": gone(CHUNKED + chunk(b"abc") + b"0\r\nx: "),
    "the end before anything": gone(),
    "a head that stops": bad(408, GET + b"x: y\r\n"),
    "a request line that stops": bad(408, b"GET /a"),
    "a body that does not begin": bad(408, POST + b"content-length: 3\r\n\r\n"),
    "a body that stops": bad(408, POST + b"content-length: 3\r\n\r\nab"),
    "a long body that stops": bad(408, POST + b"content-length: 90000\r\n\r\n" + b"x" * 50_000),
    "a chunk that stops": bad(408, CHUNKED + b"3\r\nab"),
    "chunks without a last": bad(408, CHUNKED + chunk(b"abc")),
    "a trailer that stops": bad(408, CHUNKED + chunk(b"abc") + b"0\r\nx: y\r\n"),
    "silence": Case((), ends=True),
    "empty lines and then silence": Case((b"\r\n\r\n",), ends=True),
}  # fmt: skip

CASES: dict[str, Case] = {**TWO_WAYS, **REQUEST_LINES, **HEADERS, **CHUNKS, **ORDER}

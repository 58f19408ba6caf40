"""The head of a request: read by llhttp, then checked for everything that llhttp lets pass.

llhttp (in its strict mode) refuses bare CR and LF, folded lines, white space before a colon, control characters,
repeated or malformed lengths, and a length beside a transfer encoding. It accepts the following, which a proxy must
not: several spaces in the request line, other versions and protocols than HTTP/1.0 and 1.1, a fragment in the target,
encodings before `chunked`, a transfer encoding in HTTP/1.0, none or several `Host` headers, any number and size of
headers.
"""

from __future__ import annotations

from typing import Final

from httptools import HttpParserError, HttpParserInvalidMethodError, HttpParserInvalidURLError, HttpParserUpgrade
from httptools import HttpRequestParser as Parser

from proxy.downstream.body import IncomingBody
from proxy.downstream.errors import BadHttp, ProtocolError
from proxy.errors import CairnError

HEADERS_MOST: Final = 256
_LENGTH_DIGITS_MOST: Final = 15
_NAMES_REMEMBERED: Final = 1024  # clients may make up names: the table stops growing there
_NAME_BYTES_REMEMBERED: Final = 64
_HOST_SIGNS: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%!$&'()*+,;=:[]"
_METHODS: Final = {
    name.encode(): name for name in ("GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
}
_CHECKED: Final = frozenset(
    {b"content-length", b"transfer-encoding", b"connection", b"host", b"expect", b"upgrade", b"proxy-connection"}
)  # headers on which framing or the connection depends

_AROUND_TARGET_BYTES: Final = len(b"  HTTP/1.1")


class _LowerNames(dict[bytes, bytes]):
    """Names in lower case, each always the same object: requests have the same few, and comparing them is faster."""

    def __missing__(self, name: bytes) -> bytes:
        lower = name.lower()
        if len(self) < _NAMES_REMEMBERED and len(name) <= _NAME_BYTES_REMEMBERED:
            self[name] = lower
        return lower


lower_names: Final = _LowerNames()


class HeadReader:
    """Collects what the parser finds in a head; the parser calls its methods during `feed_head`."""

    __slots__ = ("headers", "is_whole", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_whole = False

    def on_url(self, piece: bytes) -> None:
        self.target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((lower_names[name], value))

    def on_headers_complete(self) -> None:
        self.is_whole = True

    def take(self, method: bytes, line: bytes, line_bytes_most: int) -> IncomingRequest:
        """Return the request that was collected, and begin a new one. Raises ProtocolError.

        `line` is the request line as received, without its line end; no header may be longer than `line_bytes_most`.
        """
        if not self.is_whole:
            raise _bad_line(line)  # the preface of HTTP/2, after which llhttp stops
        target, headers = self.target, self.headers
        self.target, self.headers, self.is_whole = b"", [], False
        return IncomingRequest(method, target, headers, line, line_bytes_most)


class IncomingRequest:
    """One request: its head, complete before anything else sees it, and its body.

    `target` is as sent. `headers` have lower-case names and keep their order and duplicates. `peer` is the address of
    the client, "" if the connection has none. `content_length` is the declared length in bytes, None if none was
    declared. `whole_body` is the body if it arrived together with the head (`body` is None then); otherwise `body`
    receives it. `refusal` is set if there was no room for it. `is_parser_spent` means that the parser of this head
    cannot read another one.
    """

    __slots__ = (
        "body",
        "content_length",
        "expects_continue",
        "headers",
        "is_chunked",
        "is_http_1_0",
        "is_parser_spent",
        "keep_alive",
        "method",
        "peer",
        "refusal",
        "target",
        "upgrade",
        "whole_body",
    )

    def __init__(  # noqa: C901 - one pass over the headers, on the path of every request
        self, method: bytes, target: bytes, headers: list[tuple[bytes, bytes]], line: bytes, line_bytes_most: int
    ) -> None:
        """Check a head and decide framing and persistence (RFC 9112, 3, 6.3 and 9.3). Raises ProtocolError."""
        self.is_http_1_0 = _is_http_1_0(method, target, line)
        if b"#" in target:
            raise ProtocolError(BadHttp.REQUEST_LINE, "The request target has a fragment.")
        self.headers = headers
        self.peer = ""
        self.content_length: int | None = None
        self.is_chunked = self.expects_continue = self.is_parser_spent = False
        self.upgrade = b""
        self.body: IncomingBody | None = None
        self.whole_body = b""
        self.refusal: CairnError | None = None
        hosts = encodings = 0
        connection = expect = b""
        for name, value in headers:
            if len(value) + len(name) > line_bytes_most:
                raise head_too_large(line, line_bytes_most)
            if name not in _CHECKED:
                continue
            if name == b"host":
                hosts += 1
                _check_host(value)
            elif name == b"content-length":
                self.content_length = _length_of(value, self.content_length)
            elif name == b"connection":
                connection = b"%b,%b" % (connection, value) if connection else value
            elif name == b"transfer-encoding":
                encodings += 1
                self.is_chunked = value.strip(b" \t").lower() == b"chunked"
            elif name == b"expect":
                expect = value.strip(b" \t").lower()
            elif name == b"proxy-connection":
                self.is_parser_spent = True  # llhttp takes it for a Connection header
            else:
                self.is_parser_spent = True  # llhttp may expect another protocol now
                self.upgrade = value.strip(b" \t").lower()
        if hosts != 1 and (hosts or not self.is_http_1_0):
            raise ProtocolError(BadHttp.HOST, "A request must have exactly one Host header.")
        if encodings:
            self._check_encoding(encodings)
        if len(headers) > HEADERS_MOST:
            raise head_too_large(line, line_bytes_most)
        if expect and not self.is_http_1_0:
            if expect != b"100-continue":
                raise ProtocolError(BadHttp.EXPECT, "Only the expectation 100-continue is supported.", 417)
            self.expects_continue = self.has_body
        if method == b"CONNECT":
            raise ProtocolError(BadHttp.TUNNEL, "This proxy does not open tunnels.", 501)
        self.method = _METHODS.get(method) or method.decode("ascii")
        self.target = target.decode("ascii")
        self.keep_alive = _may_stay(connection, self.is_http_1_0) if connection else not self.is_http_1_0

    @property
    def has_body(self) -> bool:
        """True if the head announces a body that is not empty."""
        return self.is_chunked or bool(self.content_length)

    def _check_encoding(self, encodings: int) -> None:
        if encodings > 1 or not self.is_chunked or self.is_http_1_0:
            raise ProtocolError(
                BadHttp.TRANSFER_ENCODING,
                "The only transfer encoding that a request may have is chunked, in HTTP/1.1.",
            )
        if self.content_length is not None:
            raise _bad_length()


def _is_http_1_0(method: bytes, target: bytes, line: bytes) -> bool:
    """Return True for HTTP/1.0, False for HTTP/1.1. Raises ProtocolError for any other version or a malformed line.

    The line's length shows whether there is exactly one space on either side of the target.
    """
    if len(line) == len(method) + len(target) + _AROUND_TARGET_BYTES:
        if line.endswith(b" HTTP/1.1"):
            return False
        if line.endswith(b" HTTP/1.0"):
            return True
    raise _bad_line(line)


def _check_host(value: bytes) -> None:
    if value.strip(b" \t").translate(None, _HOST_SIGNS):
        raise ProtocolError(BadHttp.HOST, "The Host header is not a valid host.")


def _length_of(value: bytes, before: int | None) -> int:
    digits = value.strip(b" \t")
    if before is not None or not digits.isdigit() or len(digits) > _LENGTH_DIGITS_MOST:
        raise _bad_length()
    return int(digits)


def _may_stay(connection: bytes, is_http_1_0: bool) -> bool:
    """Decide by the options of all `Connection` headers whether the client wants to keep the connection."""
    options = [option.strip(b" \t") for option in connection.lower().split(b",")]
    return b"close" not in options and (not is_http_1_0 or b"keep-alive" in options)


def feed_head(parser: Parser, piece: bytes | memoryview) -> None:
    """Feed a head, or a part of one, to its parser. Raises ProtocolError.

    A request to switch protocols is handled like any other.
    """
    try:
        parser.feed_data(piece)
    except HttpParserUpgrade:
        pass
    except (HttpParserInvalidMethodError, HttpParserInvalidURLError):
        raise _bad_request_line() from None
    except HttpParserError as error:
        raise _as_reason(str(error)) from None


def head_too_large(line: bytes, line_bytes_most: int) -> ProtocolError:
    """Return the error for a head that has too many bytes or headers.

    It is about the target if the request line alone, as far as it has come, is longer than a header may be
    (RFC 9112, 3).
    """
    if len(line) > line_bytes_most and b" " in line:
        return ProtocolError(BadHttp.HEAD_SIZE, "The target of the request is too long.", 414)
    return ProtocolError(BadHttp.HEAD_SIZE, "The head of the request is too large.", 431)


def _as_reason(words: str) -> ProtocolError:
    """Map an error of llhttp to a reason by its text, which is not shown."""
    if "Content-Length" in words:
        return _bad_length()
    if "Transfer-Encoding" in words:
        return ProtocolError(BadHttp.TRANSFER_ENCODING, "The transfer encoding of the request is not valid.")
    if "Invalid HTTP version" in words or "PRI" in words:
        return _bad_version()
    if "after version" in words or "Expected HTTP/" in words:
        return _bad_request_line()
    return ProtocolError(BadHttp.HEADER, "A header of the request is not valid.")


def _bad_line(line: bytes) -> ProtocolError:
    version = line.rpartition(b" ")[2]
    is_other = version.startswith(b"HTTP/") and version not in (b"HTTP/1.0", b"HTTP/1.1")
    return _bad_version() if is_other else _bad_request_line()


def _bad_version() -> ProtocolError:
    return ProtocolError(BadHttp.VERSION, "The version of the request is not HTTP/1.0 or HTTP/1.1.", 505)


def _bad_request_line() -> ProtocolError:
    return ProtocolError(BadHttp.REQUEST_LINE, "The request line is not valid.")


def _bad_length() -> ProtocolError:
    return ProtocolError(BadHttp.CONTENT_LENGTH, "The length of the body is not declared in a valid way.")

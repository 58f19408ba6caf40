"""The head of a request: read by llhttp, then checked for everything that llhttp lets pass. Pure.

llhttp (in its strict mode) refuses bare CR and LF, folded lines, white space before a colon, control characters,
repeated or malformed lengths, and a length beside a transfer encoding. It accepts the following, which a proxy must
not: several spaces in the request line, other versions and protocols than HTTP/1.0 and 1.1, a fragment in the target,
encodings before `chunked`, a transfer encoding in HTTP/1.0, none or several `Host` headers, any number and size of
headers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from httptools import HttpParserError, HttpParserInvalidMethodError, HttpParserInvalidURLError, HttpParserUpgrade
from httptools import HttpRequestParser as Parser

from proxy.downstream.errors import BadHttp, ProtocolError

if TYPE_CHECKING:
    from proxy.downstream.body import IncomingBody
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
    {b"content-length", b"transfer-encoding", b"connection", b"host", b"expect", b"upgrade"}
)  # names on which framing or the connection depends

_lower_names: Final[dict[bytes, bytes]] = {}  # every request has the same few names: one object for each


class IncomingRequest:
    """One request: its head, complete before anything else sees it, and its body.

    `target` is as sent. `headers` have lower-case names, in their order, duplicates kept. `peer` is the address from
    which the client connected. `content_length` is the declared length in bytes, None if none was declared.
    `whole_body` is the body if it arrived together with the head (`body` is None then); otherwise `body` receives it.
    `refusal` is set if there was no room for it.
    """

    __slots__ = (
        "_connection",
        "_encodings",
        "_expect",
        "_hosts",
        "_line_bytes_most",
        "_problem",
        "_target",
        "body",
        "content_length",
        "expects_continue",
        "has_head",
        "headers",
        "is_chunked",
        "is_http_1_0",
        "keep_alive",
        "method",
        "peer",
        "refusal",
        "target",
        "upgrade",
        "whole_body",
    )

    def __init__(self, line_bytes_most: int) -> None:
        self.method = ""
        self.peer = ""
        self.target = ""
        self.headers: list[tuple[bytes, bytes]] = []
        self.is_http_1_0 = False
        self.keep_alive = True
        self.content_length: int | None = None
        self.is_chunked = False
        self.expects_continue = False
        self.upgrade = b""
        self.has_head = False
        self.body: IncomingBody | None = None
        self.whole_body = b""
        self.refusal: CairnError | None = None
        self._line_bytes_most = line_bytes_most
        self._target = b""
        self._connection = b""
        self._expect = b""
        self._encodings = 0
        self._hosts = 0
        self._problem: ProtocolError | None = None

    @property
    def has_body(self) -> bool:
        """True if the head announces a body, even an empty one."""
        return self.is_chunked or bool(self.content_length)

    # -- the parser's callbacks, called within `feed_head`

    def on_url(self, piece: bytes) -> None:
        self._target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = _lower_names.get(name)
        if lower is None:
            lower = _lower(name)
        if lower in _CHECKED:
            self._check(lower, value)
        self.headers.append((lower, value))

    def on_headers_complete(self) -> None:
        self.has_head = True

    def _check(self, name: bytes, value: bytes) -> None:
        if name == b"host":
            self._hosts += 1
            if value.strip(b" \t").translate(None, _HOST_SIGNS):
                self._problem = ProtocolError(BadHttp.HOST, "The Host header is not a valid host.")
        elif name == b"content-length":
            digits = value.strip(b" \t")
            if not digits.isdigit() or len(digits) > _LENGTH_DIGITS_MOST or self.content_length is not None:
                self._problem = _bad_length()
            else:
                self.content_length = int(digits)
        elif name == b"transfer-encoding":
            self._encodings += 1
            self.is_chunked = value.strip(b" \t").lower() == b"chunked"
        elif name == b"connection":
            self._connection += b"," + value
        elif name == b"expect":
            self._expect = value.strip(b" \t").lower()
        else:
            self.upgrade = value.strip(b" \t").lower()

    # -- after the last of them

    def finish(self, method: bytes, line: bytes) -> None:
        """Check the whole head and decide framing and persistence (RFC 9112, sections 3, 6.3 and 9.3).

        `line` is the request line as it came, without its end. Raises ProtocolError.
        """
        problem, self._problem = self._problem, None  # not kept: its traceback holds this request
        if problem is not None:
            raise problem
        if not self.has_head:
            raise _bad_line(line)  # the preface of HTTP/2, at which llhttp stops
        start = b"%b %b HTTP/1." % (method, self._target)
        if line == start + b"1":
            if self._hosts != 1:
                raise ProtocolError(BadHttp.HOST, "A request has exactly one Host header.")
        elif line == start + b"0":
            self.is_http_1_0 = True
            if self._hosts > 1:
                raise ProtocolError(BadHttp.HOST, "A request has at most one Host header.")
        else:
            raise _bad_line(line)
        if b"#" in self._target:
            raise ProtocolError(BadHttp.REQUEST_LINE, "The request target has a fragment.")
        self._check_framing()
        if (
            len(self.headers) > HEADERS_MOST
            or max((len(name) + len(value) for name, value in self.headers), default=0) > self._line_bytes_most
        ):
            raise head_too_large()
        if method == b"CONNECT":
            raise ProtocolError(BadHttp.TUNNEL, "This proxy opens no tunnels.", 501)
        if self._expect and not self.is_http_1_0:
            if self._expect != b"100-continue":
                raise ProtocolError(BadHttp.EXPECT, "Only the expectation 100-continue is known.", 417)
            self.expects_continue = self.has_body
        self.method = _METHODS.get(method) or method.decode("ascii")
        self.target = self._target.decode("ascii")
        self._settle_persistence()

    def _check_framing(self) -> None:
        if self._encodings:
            if self._encodings > 1 or not self.is_chunked or self.is_http_1_0:
                raise ProtocolError(
                    BadHttp.TRANSFER_ENCODING, "The only transfer encoding of a request is chunked, of HTTP/1.1."
                )
            if self.content_length is not None:
                raise _bad_length()

    def _settle_persistence(self) -> None:
        connection = self._connection
        if not connection:
            self.keep_alive = not self.is_http_1_0
            return
        options = [option.strip(b" \t") for option in connection.lower().split(b",")]
        self.keep_alive = b"close" not in options and (not self.is_http_1_0 or b"keep-alive" in options)


def feed_head(parser: Parser, piece: bytes | memoryview) -> None:
    """Feed a part of a head to the parser of a request. Raises ProtocolError.

    A request to switch protocols is not taken up, so its head is like any other.
    """
    try:
        parser.feed_data(piece)
    except HttpParserUpgrade:
        pass
    except (HttpParserInvalidMethodError, HttpParserInvalidURLError):
        raise _bad_request_line() from None
    except HttpParserError as error:
        raise _as_reason(str(error)) from None


def head_too_large() -> ProtocolError:
    """The error for a head that has too many bytes or headers."""
    return ProtocolError(BadHttp.HEAD_SIZE, "The head of the request is too large.", 431)


def _as_reason(words: str) -> ProtocolError:
    """Sort an error of llhttp by what it is about; its own words are not shown."""
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


def _lower(name: bytes) -> bytes:
    lower = name.lower()
    if len(_lower_names) < _NAMES_REMEMBERED and len(name) <= _NAME_BYTES_REMEMBERED:
        _lower_names[name] = lower
    return lower

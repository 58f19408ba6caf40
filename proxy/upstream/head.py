"""The head of a request as bytes. Pure. What it refuses can never become a second request.

It must not know which headers a client may send on; that is `proxy.wire.headers`. Only what belongs to the connection
itself (framing, host, hop-by-hop) is written here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from proxy.upstream.origin import Origin

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET = re.compile(rb"/[!-~\x80-\xff]*")
_COMMON_METHODS = frozenset({b"GET", b"POST", b"HEAD", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
_METHODS_WITH_BODY = frozenset({b"POST", b"PUT", b"PATCH"})
_MAX_KNOWN_NAMES = 1024  # names are made up by clients: the table stops growing there
_OURS = frozenset(
    {
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"upgrade",
        b"expect",
    }
)


class HeadWriter:
    """Writes request heads for one origin; remembers header names that it has checked."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._host_line = b" HTTP/1.1\r\nhost: " + origin.host_header
        self._lines: dict[bytes, bytes] = dict.fromkeys(_OURS, b"")

    def write(
        self, method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], length: int | None
    ) -> bytes:
        """The head up to and with its empty line; `length` is the body's in bytes, None for chunked.

        Headers that belong to the connection (framing, host, hop-by-hop) are left out of `headers`: the client
        writes its own. Raises ValueError where a method, target, name or value could be read as anything else.
        """
        if method not in _COMMON_METHODS and not _TOKEN.fullmatch(method):
            raise ValueError("a method is a token")
        if not _TARGET.fullmatch(target):
            raise ValueError("a target starts with a slash and has no white space or control characters")
        lines = [method + b" " + self._origin.target(target) + self._host_line]
        known = self._lines
        for name, value in headers:
            start = known.get(name)
            if start is None:
                start = self._learn(name)
            if start:
                lines.append(start + value)
        if length is None:
            lines.append(b"transfer-encoding: chunked")
        elif length or method in _METHODS_WITH_BODY:
            lines.append(b"content-length: %d" % length)
        lines.append(b"\r\n")
        return _checked(b"\r\n".join(lines), len(lines) + 1)

    def _learn(self, name: bytes) -> bytes:
        if not _TOKEN.fullmatch(name):
            raise ValueError("a header's name is a token")
        start = b"" if name.lower() in _OURS else name + b": "
        if len(self._lines) < _MAX_KNOWN_NAMES:
            self._lines[name] = start
        return start


def _checked(head: bytes, line_ends: int) -> bytes:
    """`head` if it has no line end but its own: three scans of the whole are cheaper than one of each value."""
    if head.count(b"\r") != line_ends or head.count(b"\n") != line_ends or b"\0" in head:
        raise ValueError("a header's value has no CR, LF or NUL")
    return head

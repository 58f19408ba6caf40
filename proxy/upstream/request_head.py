"""Write the head of a request as bytes. Pure. An accepted head cannot be read as two requests.

`proxy.wire.headers` decides which of a client's headers are passed on; headers that belong to the connection itself
(framing, host, hop-by-hop) are written only here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from proxy.upstream.origin import Origin

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET = re.compile(rb"/[!-~\x80-\xff]*")
_METHODS_WITH_BODY = frozenset({b"POST", b"PUT", b"PATCH"})
_MAX_KNOWN_NAMES: Final = 1024  # clients choose names and targets, so the tables are bounded
_MAX_KNOWN_NAME_BYTES: Final = 64
_MAX_KNOWN_LINES: Final = 256
_MAX_KNOWN_LINE_BYTES: Final = 512
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


class _Starts(dict[bytes, bytes | None]):
    """The start of each header's line, computed once; None for headers that belong to the connection."""

    def __missing__(self, name: bytes) -> bytes | None:
        if not _TOKEN.fullmatch(name):
            raise ValueError("a header's name must be a token")
        start = None if name.lower() in _OURS else name + b": "
        if len(self) < _MAX_KNOWN_NAMES and len(name) < _MAX_KNOWN_NAME_BYTES:
            self[name] = start
        return start


class HeadWriter:
    """Writes request heads for one origin; caches the names and first lines that it has checked."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._host_line = b" HTTP/1.1\r\nhost: " + origin.host_header
        self._first_lines: dict[tuple[bytes, bytes], bytes] = {}
        self._starts = _Starts()

    def write(
        self, method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], length: int | None
    ) -> bytes:
        """Return the head including its empty line; `length` is the body's size in bytes, None for chunked.

        Headers that belong to the connection (framing, host, hop-by-hop) are skipped: the client writes its own.
        Raises ValueError if the method, the target, a name or a value could be read as anything else.
        """
        starts = self._starts
        lines = [start + value for name, value in headers if (start := starts[name]) is not None]
        lines.insert(0, self._first_lines.get((method, target)) or self._first_line(method, target))
        if length is None:
            lines.append(b"transfer-encoding: chunked\r\n\r\n")
        elif length or method in _METHODS_WITH_BODY:
            lines.append(b"content-length: %d\r\n\r\n" % length)
        else:
            lines.append(b"\r\n")
        head = b"\r\n".join(lines)
        line_ends = len(lines) + (1 if lines[-1] == b"\r\n" else 2)
        # Three scans of the whole head are cheaper than one per value and find every line end inside a value.
        if head.count(b"\r") != line_ends or head.count(b"\n") != line_ends or 0 in head:
            raise ValueError("a header's value must not contain CR, LF or NUL")
        return head

    def _first_line(self, method: bytes, target: bytes) -> bytes:
        if not _TOKEN.fullmatch(method):
            raise ValueError("a method must be a token")
        if not _TARGET.fullmatch(target):
            raise ValueError("a target must start with a slash and contain no white space or control characters")
        line = method + b" " + self._origin.target(target) + self._host_line
        if len(self._first_lines) < _MAX_KNOWN_LINES and len(line) < _MAX_KNOWN_LINE_BYTES:
            self._first_lines[method, target] = line
        return line

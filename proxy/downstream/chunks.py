"""Decode a chunked body (RFC 9112, section 7.1), strictly and within bounds. Pure.

llhttp could do it, but httptools shows neither the declared size of a chunk, by which an enormous one is refused
before its bytes arrive, nor where in a read the body ends and the next request begins.

| state | waits for | then |
|---|---|---|
| SIZE | a line: hexadecimal size, perhaps an extension | DATA, or TRAILER if the size is 0 |
| DATA | as many bytes as the line declares | DATA_END |
| DATA_END | CR LF | SIZE |
| TRAILER | header lines, which are dropped, and an empty line | DONE |
| DONE | nothing | - |
"""

from __future__ import annotations

import re
from typing import Final

from proxy.downstream.errors import BadHttp, ProtocolError
from proxy.errors import TooLarge

LINE_BYTES_MOST: Final = 256  # of a size with its extension
EXTENSION_BYTES_MOST: Final = 16 * 1024  # of a whole body
TRAILER_BYTES_MOST: Final = 8 * 1024

_SIZE: Final = 0
_DATA: Final = 1
_DATA_END: Final = 2
_TRAILER: Final = 3
_DONE: Final = 4
_LF: Final = 10

_TOKEN: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_EXTENSION: Final = (
    rb";" + _TOKEN + rb"(?:=(?:" + _TOKEN + rb'|"(?:[\t\x20!#-\[\]-~\x80-\xff]|\\[\t\x20-~\x80-\xff])*"))?'
)
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:" + _EXTENSION + rb")*\r\n")
_SIZE_LINE_BEGUN = re.compile(rb"[0-9A-Fa-f]{1,16}(?:;[\t\x20-\x7e\x80-\xff]*)?\r?")
_TRAILER_LINE_BEGUN = re.compile(rb"(?:" + _TOKEN + rb"(?::[\t\x20-\x7e\x80-\xff]*)?)?\r?")
_TRAILER_LINE = re.compile(_TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n")

Buffer = bytes | bytearray


class ChunkDecoder:
    """Decodes one body of at most `limit_bytes`; `announced_bytes` are in the chunks whose sizes were read so far."""

    __slots__ = ("_extension_bytes", "_left", "_line", "_state", "_trailer_bytes", "announced_bytes", "limit_bytes")

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._state = _SIZE
        self._left = 0  # missing bytes of the present chunk, or of its end
        self._line = b""  # the beginning of an incomplete line
        self.announced_bytes = 0  # sum of the chunk sizes read so far
        self._extension_bytes = 0
        self._trailer_bytes = 0

    @property
    def is_done(self) -> bool:
        """True if the body is whole."""
        return self._state == _DONE

    def decode(self, data: Buffer, at: int, end: int, out: bytearray) -> int:
        """Append the content in data[at:end] to `out`; return the offset up to which `data` was used.

        That is `end`, or the offset just after the body. Raises ProtocolError, and TooLarge as soon as a chunk's size
        exceeds the limit.
        """
        view = memoryview(data)
        while at < end and self._state != _DONE:
            if self._state == _DATA:
                stop = min(end, at + self._left)
                out += view[at:stop]
                self._left -= stop - at
                at = stop
                if not self._left:
                    self._state, self._left = _DATA_END, 2
            elif self._state == _DATA_END:
                if data[at] != (13 if self._left == 2 else 10):
                    raise _bad_chunk()
                at += 1
                self._left -= 1
                if not self._left:
                    self._state = _SIZE
            else:
                at = self._read_line(data, at, end)
        return at

    def _read_line(self, data: Buffer, at: int, end: int) -> int:
        """Take a line, or the beginning of one."""
        found = data.find(b"\n", at, end)
        stop = end if found < 0 else found + 1
        is_size = self._state == _SIZE
        if is_size and len(self._line) + stop - at > LINE_BYTES_MOST:
            raise _bad_chunk()
        if not is_size:
            self._trailer_bytes += stop - at
            if self._trailer_bytes > TRAILER_BYTES_MOST:
                raise ProtocolError(BadHttp.TRAILER, "The trailer of the body is too large.", 431)
        line = self._line + bytes(data[at:stop])
        if found < 0:
            if (_SIZE_LINE_BEGUN if is_size else _TRAILER_LINE_BEGUN).fullmatch(line) is None:
                raise _bad_chunk() if is_size else _bad_trailer()
            self._line = line
        else:
            self._line = b""
            if is_size:
                self._begin_chunk(line)
            else:
                self._take_trailer(line)
        return stop

    def _begin_chunk(self, line: bytes) -> None:
        found = _SIZE_LINE.fullmatch(line)
        if found is None:
            raise _bad_chunk()
        digits = found[1]
        self._extension_bytes += len(line) - len(digits) - 2
        if self._extension_bytes > EXTENSION_BYTES_MOST:
            raise ProtocolError(BadHttp.CHUNK, "The body has too many chunk extensions.")
        self._left = int(digits, 16)
        self.announced_bytes += self._left
        if self.announced_bytes > self.limit_bytes:
            raise TooLarge(f"The body has more than {self.limit_bytes} bytes, the most that is read.")
        self._state = _DATA if self._left else _TRAILER

    def _take_trailer(self, line: bytes) -> None:
        if line == b"\r\n":
            self._state = _DONE
        elif _TRAILER_LINE.fullmatch(line) is None:
            raise _bad_trailer()


def _bad_trailer() -> ProtocolError:
    return ProtocolError(BadHttp.TRAILER, "The trailer of the body is not valid.")


def _bad_chunk() -> ProtocolError:
    return ProtocolError(BadHttp.CHUNK, "The chunks of the body are not valid.")

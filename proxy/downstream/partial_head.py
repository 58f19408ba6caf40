"""The part of a head that has arrived so far, if a head does not arrive in one read.

The parser takes each part at once, so that what cannot become a head is refused early. It shows neither the request
line nor where the head ends, which are found here.
"""

from __future__ import annotations

from typing import Final

from proxy.downstream.chunks import Buffer

END_OF_HEAD: Final = b"\r\n\r\n"
_BEFORE_END: Final = len(END_OF_HEAD) - 1


class PartialHead:
    """`nbytes` have arrived; `line` is the request line as far as it is known, without its line end."""

    __slots__ = ("_has_line", "_tail", "line", "nbytes")

    def __init__(self) -> None:
        self.nbytes = 0
        self.line = b""
        self._has_line = False
        self._tail = b""  # the last bytes, which may be the beginning of the end

    def end_in(self, data: Buffer, at: int, end: int) -> int:
        """Return where the head ends in data[at:end], which follows what has arrived; -1 if it does not."""
        tail = self._tail
        seam = tail + bytes(data[at : min(end, at + _BEFORE_END)])
        found = seam.find(END_OF_HEAD)
        if found >= 0:
            return at + found + len(END_OF_HEAD) - len(tail)
        stop = data.find(END_OF_HEAD, at, end)
        return -1 if stop < 0 else stop + len(END_OF_HEAD)

    def add(self, piece: bytes) -> None:
        """Note the next part."""
        self.nbytes += len(piece)
        if not self._has_line:
            first, newline, _ = (self.line + piece).partition(b"\r\n")
            self.line, self._has_line = first, bool(newline)
        self._tail = (self._tail + piece[-_BEFORE_END:])[-_BEFORE_END:]

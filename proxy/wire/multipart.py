"""Find the fields of a `multipart/form-data` body without copying it, or piece by piece as it comes. Pure.

Forms are read strictly: a form that two parsers could read differently is refused, since a decision depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from proxy.model import Body

PARTS_MOST: Final = 1000  # of one form
_HEAD_BYTES_MOST: Final = 4096  # of one part: a name, a file name and a media type
_CHARSET = rb"charset=[\w-]+"
_TYPE = re.compile(
    rb'multipart/form-data\s*;(?:\s*%b\s*;)?\s*boundary=(?:"(?P<quoted>[^"]*)"|(?P<plain>[^;"\s]+))(?:\s*;\s*%b)?'
    % (_CHARSET, _CHARSET),
    re.IGNORECASE,
)
_PLAIN_ENCODINGS: Final = frozenset({"7bit", "8bit", "binary"})
"""Transfer encodings of a part whose value is as it was sent. Some parsers undo the others (RFC 7578, 4.7)."""

_LINE = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\r\n\0]*")
"""A line of a part's head. Some parsers join one that begins with a space to the line before, or take a lone CR or LF
for the end of a line, and two of them for the end of the head."""

_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=?-]{1,70}")  # RFC 2046, 5.1.1, without spaces
_DISPOSITION = re.compile(
    r'form-data(?:\s*;\s*(?:name="(?P<name>[^"\\\r\n]*)"|name=(?P<plain>[\w.\[\]-]+)|filename\*?=(?:"[^"\r\n]*"|"(?:[^"\\\r\n]|\\.)*"|[^;"\s]*)))*\s*',
    re.IGNORECASE | re.ASCII,
)
"""In a file's name some senders escape a quote by a backslash, and others send backslashes as they are. .NET sends a
field's name without quotes."""


class UnreadableForm(ValueError):
    """The body is not a form that every parser reads in the same way."""


class Field(NamedTuple):
    """A field of a form: its name, and its value as a view of the body."""

    name: str
    value: memoryview


def is_form(content_type: bytes) -> bool:
    """Return True if a `content-type` header declares the body to be a form."""
    return content_type[:19].lower() == b"multipart/form-data"


def fields(body: Body, content_type: bytes) -> Iterator[Field]:
    """Yield the fields of a form in their order.

    Raises:
        UnreadableForm: the boundary, a part's head or the end is missing, malformed or ambiguous, or there are more
            than `PARTS_MOST` parts.
    """
    marker = b"--" + _boundary(content_type)
    if not body.startswith(marker):
        raise UnreadableForm
    view = memoryview(body)
    at = len(marker)
    for _ in range(PARTS_MOST):
        if body[at : at + 2] == b"--":
            return
        if body[at : at + 2] != b"\r\n":
            raise UnreadableForm
        head_end = body.find(b"\r\n\r\n", at, at + _HEAD_BYTES_MOST)
        value_end = body.find(b"\r\n" + marker, head_end + 2)
        if head_end < 0 or value_end < 0 or _may_end_before(body, marker, head_end, value_end):
            raise UnreadableForm
        yield Field(_name(bytes(body[at + 2 : head_end])), view[head_end + 4 : max(value_end, head_end + 4)])
        at = value_end + 2 + len(marker)
    raise UnreadableForm


class FieldPiece(NamedTuple):
    """A piece of the value of a field: the field's name, and whether the value ends here."""

    name: str
    value: memoryview
    is_last: bool


class FormReader:
    """Finds the fields of a form that comes in pieces cut anywhere. It holds no more than the head of one part.

    It raises UnreadableForm for what `fields` refuses, and for anything but white space behind the form's end.
    `is_complete` is true once the end has come.
    """

    def __init__(self, content_type: bytes) -> None:
        self.is_complete = False
        self._delimiter = b"\r\n--" + _boundary(content_type)
        self._rest = b"\r\n"  # bytes that were not read yet; at first as if a value had ended here
        self._name: str | None = None  # of the field whose value is read, None between two of them
        self._passed_over = 0  # bytes before the value that end its head, and may begin the delimiter if it is empty
        self._parts = 0

    def feed(self, piece: bytes) -> list[FieldPiece]:
        """Take the next bytes, and return what they bring of the fields' values, in order."""
        data = self._rest + piece
        view = memoryview(data)
        found: list[FieldPiece] = []
        at = 0
        while not self.is_complete:
            if self._name is None:
                head_end = self._read_head(data, at)
                if head_end is None:
                    break
                at = head_end
                continue
            start = at + self._passed_over
            end = data.find(self._delimiter, at)
            if _may_end_before(data, self._delimiter[2:], at, end if end >= 0 else len(data)):
                raise UnreadableForm
            if end < 0:
                end = len(data) - len(self._delimiter) + 1  # from here on the delimiter may begin
                if end > start:
                    found.append(FieldPiece(self._name, view[start:end], is_last=False))
                    self._passed_over, at = 0, end
                break
            found.append(FieldPiece(self._name, view[start : max(start, end)], is_last=True))
            self._name, at = None, end
        if self.is_complete and data[at:].strip():
            raise UnreadableForm
        self._rest = b"" if self.is_complete else data[at:]
        return found

    def _read_head(self, data: bytes, at: int) -> int | None:
        """Read a delimiter and the head behind it; return the offset of the head's last line end, None if cut."""
        marked = at + len(self._delimiter)
        if len(data) < marked + 2:
            return None
        if not data.startswith(self._delimiter, at) or self._parts == PARTS_MOST:
            raise UnreadableForm
        if data[marked : marked + 2] == b"--":
            self.is_complete = True
            return marked + 2
        head_end = data.find(b"\r\n\r\n", marked, marked + _HEAD_BYTES_MOST)
        if data[marked : marked + 2] != b"\r\n" or (head_end < 0 and len(data) >= marked + _HEAD_BYTES_MOST):
            raise UnreadableForm
        if head_end < 0:
            return None
        self._name = _name(data[marked + 2 : head_end])
        self._passed_over = 2
        self._parts += 1
        return head_end + 2


def _boundary(content_type: bytes) -> bytes:
    found = _TYPE.fullmatch(content_type.strip())
    boundary = (found["quoted"] or found["plain"] or b"") if found is not None else b""
    if not _BOUNDARY.fullmatch(boundary):
        raise UnreadableForm
    return boundary


def _may_end_before(data: Body, marker: bytes, at: int, end: int) -> bool:
    """Return True if a value has a boundary behind a lone CR or LF, which some parsers take for its end."""
    return data.find(b"\n" + marker, at, end) >= 0 or data.find(b"\r" + marker, at, end) >= 0


def _name(head: bytes) -> str:
    """Return the name in the one `content-disposition` line of a part's head."""
    given = head.decode("latin-1").split("\r\n")
    lines = [line for line in given if line[:20].lower() == "content-disposition:"]
    found = _DISPOSITION.fullmatch(lines[0][20:].strip()) if len(lines) == 1 else None
    name = None if found is None else found["plain"] if found["name"] is None else found["name"]
    if (
        name is None
        or not all(map(_LINE.fullmatch, given))
        or lines[0].lower().count("name=") - lines[0].lower().count("filename=") != 1
        or any(map(_recodes, given))
    ):
        raise UnreadableForm
    return name


def _recodes(line: str) -> bool:
    """Return True if a line of a part's head says that the value is coded, which only some parsers undo."""
    name, _, value = line.partition(":")
    return name.strip().lower() == "content-transfer-encoding" and value.strip().lower() not in _PLAIN_ENCODINGS

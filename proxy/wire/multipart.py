"""Find the fields of a `multipart/form-data` body without copying it. Pure.

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
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=?-]{1,70}")  # RFC 2046, 5.1.1, without spaces
_DISPOSITION = re.compile(
    r'form-data(?:\s*;\s*(?:name="(?P<name>[^"\\\r\n]*)"|filename\*?=(?:"[^"\r\n]*"|"(?:[^"\\\r\n]|\\.)*"|[^;"\s]*)))*\s*',
    re.IGNORECASE,
)
"""In a file's name some senders escape a quote by a backslash, and others send backslashes as they are."""


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
        if head_end < 0 or value_end < 0:
            raise UnreadableForm
        yield Field(_name(bytes(body[at + 2 : head_end])), view[head_end + 4 : max(value_end, head_end + 4)])
        at = value_end + 2 + len(marker)
    raise UnreadableForm


def _boundary(content_type: bytes) -> bytes:
    found = _TYPE.fullmatch(content_type.strip())
    boundary = (found["quoted"] or found["plain"] or b"") if found is not None else b""
    if not _BOUNDARY.fullmatch(boundary):
        raise UnreadableForm
    return boundary


def _name(head: bytes) -> str:
    """Return the name in the one `content-disposition` line of a part's head."""
    lines = [line for line in head.decode("latin-1").split("\r\n") if line[:20].lower() == "content-disposition:"]
    found = _DISPOSITION.fullmatch(lines[0][20:].strip()) if len(lines) == 1 else None
    if (
        found is None
        or found["name"] is None
        or lines[0].lower().count("name=") - lines[0].lower().count("filename=") != 1
    ):
        raise UnreadableForm
    return found["name"]

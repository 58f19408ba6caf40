"""Find the objects that a body refers to: files, earlier responses, containers and vector stores, by their ids. Pure.

With a key that clients share, any client that names an object by its id would get it. The ids are therefore compared
with those that the client itself has created.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import msgspec

from proxy.model import Body
from proxy.wire.schemas import DECODE_ERRORS

_COLLECTIONS: Final = {
    "file_id": "files",
    "file_ids": "files",
    "input_file_id": "files",
    "previous_response_id": "responses",
    "conversation": "conversations",
    "container": "containers",
    "container_id": "containers",
    "vector_store_ids": "vector_stores",
}
"""Keys whose value is an id or a list of ids, and the collection in which those lie."""

_ESCAPE: Final = b"\\u00"
_ESCAPED_LETTER = re.compile(rb"\\u00(?:[46][1-9a-fA-F]|[57][0-9aA]|5[fF])")
"""A letter or underscore written as an escape. Encoders do not write letters so, but one could hide a key."""

_IN_CONTENT: Final = b"file_id"  # the one key with an id in messages and input items
_ELSEWHERE = (b"_id", b"container", b"conversation", _ESCAPE)


class Reference(NamedTuple):
    """An object by its collection, as in paths, and its id."""

    collection: str
    object_id: str


def references(body: Body, others: Iterable[memoryview | Body] = ()) -> frozenset[Reference] | None:
    """Return the objects that a JSON body refers to, None if it cannot be read.

    Args:
        body: the whole body. It is searched for files, at 0.5 ms per MB, and decoded only if it may refer to an
            object.
        others: its members in which objects of other kinds are named, such as tools.
    """
    if not (
        body.find(_IN_CONTENT) >= 0
        or any(bytes(member).find(key) >= 0 for member in others for key in _ELSEWHERE)
        or (body.find(_ESCAPE) >= 0 and _ESCAPED_LETTER.search(body) is not None)
    ):
        return frozenset()
    try:
        return frozenset(_in_decoded(msgspec.json.decode(body)))
    except DECODE_ERRORS:
        return None


def _in_decoded(value: Any) -> Iterable[Reference]:
    """Walk a decoded body without recursion."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += each
        elif isinstance(each, dict):
            for key, member in each.items():
                if collection := _COLLECTIONS.get(key):
                    yield from (Reference(collection, name) for name in _ids(member))
                waiting.append(member)


def _ids(value: Any) -> list[str]:
    """The ids in the value of a key: a string, a list of strings, or an object with an id."""
    if isinstance(value, dict):
        value = value.get("id")
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]

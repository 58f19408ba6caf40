"""Find the objects that a body refers to: files, earlier responses, containers and vector stores, by their ids. Pure.

With a key that clients share, any client that names an object by its id would get it. The ids are therefore compared
with those that the client itself has created.

Servers written in Go ignore the letter case of keys, others do not: a body is searched as either of them reads it.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from contextlib import suppress
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw

from proxy.model import Body
from proxy.wire import multipart
from proxy.wire.bounds import check_values
from proxy.wire.json_cuts import text_with_keys
from proxy.wire.schemas import DECODE_ERRORS, NONE, decode_members, short_text

_COLLECTIONS: Final = {
    "file_id": "files",
    "file_ids": "files",
    "input_file_id": "files",
    "input_files": "files",
    "training_file": "files",
    "training_files": "files",
    "validation_file": "files",
    "validation_files": "files",
    "part_ids": "parts",
    "previous_response_id": "responses",
    "conversation": "conversations",
    "container": "containers",
    "container_id": "containers",
    "vector_store_id": "vector_stores",
    "vector_store_ids": "vector_stores",
}
"""Keys whose value is an id or a list of ids, with the collection of these objects."""

_INPUTS: Final = frozenset({"input_file_id", "input_files"})
"""Keys of files whose content is a list of requests."""

_CLIENTS_OWN: Final = frozenset(
    {
        "attributes", "chat_template_kwargs", "guided_json", "input_examples", "input_schema", "item_schema",
        "json_schema", "metadata", "parameters", "response_schema", "schema", "structured_outputs",
    }
)  # fmt: skip
"""Keys whose values have keys of the client's own choice: a `file_id` in them is, for example, a tool's argument, a
variable of a template, or in an example of what a response must look like.
"""

ITEMS: Final = "items"
"""The collection of a response's items. It has no path: an item is named in the input of a later response."""

_KINDS: Final = {"file_id": "files", "item_reference": ITEMS}
"""Types of objects that name another one by their `id`: the source of an evaluation, and an item of a request that is
sent within another one.
"""

_TOOL_CALLS: Final = frozenset({"tool_use", "mcp_tool_use"})
"""Types of content whose `input` holds the arguments of a tool, which the upstream only renders."""

_KEY = re.compile(rb'"(?:%b)"\s*:' % b"|".join(key.encode() for key in _COLLECTIONS), re.IGNORECASE)
_FIELD_NAME = re.compile(r"[a-z_]+")  # in the name of a form's field, such as `file_ids[]` or `image[file_id]`

_ESCAPE: Final = b"\\u00"
_ESCAPED_LETTER = re.compile(rb"\\u00(?:[46][1-9a-fA-F]|[57][0-9aA]|5[fF])")
"""A letter or underscore written as an escape. Encoders do not escape letters, but a client could to hide a key.
"""

_ESCAPED_LETTERS_MOST: Final = 50_000  # 30 ms; text about escapes, such as a program, may contain some
REFERENCES_MOST: Final = 10_000  # of one body

_OUTERMOST: Final = frozenset({*_COLLECTIONS, "input", "items", "tools"})
"""Members of the outermost object that may name objects. The prompt's decoder knows them in this letter case only."""

CONTINUING: Final = frozenset({"conversation", "previous_response_id"})
"""Outermost members that the decoder of a prompt for the Responses API reads, and no other."""

FURTHER: Final = frozenset(_COLLECTIONS) - CONTINUING - {"container"}
"""Outermost members that no decoder of a prompt reads."""

_URLS: Final = ("url", "uri")  # how the key of a URL ends
_FILE_URL = re.compile(r"(?i)\s*ms:/*([^/?#]+)")
"""A URL of a picture or video that names an uploaded file, as Moonshot reads it: `ms://file-1`."""

_FILES_TEXT = re.compile(r"(?i)\s*fileid:/")
_FILE_IN_TEXT = re.compile(r"(?i)fileid:/+([^/?#,;\s]+)")
"""A text that names uploaded files in place of what it would say, as Qwen reads it: `fileid://file-1,fileid://file-2`."""

_FILE_ID: Final = b"file_id"  # the one key with an id in messages and input items
_FILE_URLS: Final = b'"ms'  # at the beginning of a string, in lower case
_URLS_MARK = re.compile(rb'"ms[:\\]')
_FILES_IN_TEXT: Final = b"fileid"
_FILES_MARK = re.compile(rb"fileid[:\\]")

_LONG_S: Final = (b"\xc5\xbf", b"\\u017f")
"""The one letter besides a name's own that servers in Go take for one of its letters, in lower case."""

_NUL: Final = b"\0"
_IN_MEMBERS: Final = (b"_id", b"container", b"conversation", b"training_file", b"validation_file", _ESCAPE)
"""Parts of keys with ids in members of a prompt besides messages and input. Each takes a search of all its tools."""

_ELSEWHERE: Final = (*_IN_MEMBERS, b"input_file", b"item_reference")
"""Parts of keys with ids, and of types, in any other body."""

_NESTED: Final = b"{["
_USUAL: Final = frozenset(
    {
        "container", "documents", "functions", "input", "instructions", "max_completion_tokens", "max_tokens",
        "messages", "metadata", "model", "n", "prompt", "seed", "stop", "store", "stream", "stream_options", "system",
        "temperature", "tool_choice", "tools", "top_k", "top_p", "user",
    }
)  # fmt: skip
"""Outermost members of prompts in which no object is named but by `file_id`, or which are searched by themselves."""

_IN_TOOLS: Final = (b'"container"', b'"file_ids"', b'"vector_store_ids"')  # keys with ids in hosted tools


class Reference(NamedTuple):
    """An object by its collection, as in paths, and its id, and whether it is named as the input of a batch."""

    collection: str
    object_id: str
    is_input: bool = False


def references(
    body: Body, others: Iterable[memoryview | Body] = (), unread: frozenset[str] = frozenset()
) -> frozenset[Reference] | None:
    """Return the objects that a JSON body refers to, None if it cannot be read or refers to too many.

    Args:
        body: the whole body. Its keys are searched for files, at 0.1 ms per MB if strings are long, and it is decoded
            only if it may refer to an object.
        others: the members of the body that may name objects of other kinds, such as tools.
        unread: of a prompt, names of outermost members that the caller has not read, where objects are looked for.
    """
    if body.find(_NUL) >= 0:
        return None  # JSON in UTF-16 or UTF-32, which some servers read, and no search here does
    marks = _IN_MEMBERS if unread else _ELSEWHERE
    if not (
        may_refer(body)
        or any(_contains(bytes(member).lower(), marks) for member in others)
        or has_members(body, unread)
    ):
        return frozenset()
    plain, escaped_letters = body, 0
    if body.find(_ESCAPE) >= 0:
        plain, escaped_letters = _ESCAPED_LETTER.subn(_unescaped, body, _ESCAPED_LETTERS_MOST)
    written = sum(1 for _ in islice(_KEY.finditer(plain), REFERENCES_MOST + 1))
    if escaped_letters == _ESCAPED_LETTERS_MOST or written > REFERENCES_MOST:
        return None
    check_values(body)
    try:
        found, keys = _in_decoded(msgspec.json.decode(body))
    except DECODE_ERRORS:
        return None
    if written > keys or len(found) > REFERENCES_MOST:
        return None  # of a key given twice, only the last one was decoded
    return frozenset(found)


def may_refer(body: Body) -> bool:
    """Return True if a JSON body may refer to a file, perhaps with escapes or another letter case in the key.

    No key is in the inside of a long string, so that is not searched: 0.1 ms per MB and not 1.
    """
    text = text_with_keys(body)
    folded = text.lower()
    return (
        folded.find(_FILE_ID) >= 0
        or (folded.find(_FILE_URLS) >= 0 and _URLS_MARK.search(folded) is not None)
        or (folded.find(_FILES_IN_TEXT) >= 0 and _FILES_MARK.search(folded) is not None)
        or (text.find(_ESCAPE) >= 0 and _ESCAPED_LETTER.search(text) is not None)
    )


def has_members_in_other_case(body: Body) -> bool:
    """Return True if the outermost object names a member that is searched, but in another letter case.

    Raises BadRequest if it has too many members.
    """
    return has_members(body)


def has_members(body: Body, names: frozenset[str] = frozenset()) -> bool:
    """Return True if the outermost object has one of these members, anything that names an object within another
    member, or members in another letter case.

    Raises BadRequest if it has too many members.
    """
    try:
        members = decode_members(text_with_keys(body))
    except DECODE_ERRORS:
        return False  # it is not JSON, at least to a strict server, as those in Go are
    if names:
        rare = members.keys() - _USUAL
        if rare and any(key in names or _names_object(members[key]) for key in rare):
            return True
    return _in_other_case(members, _OUTERMOST)


def _names_object(value: Raw) -> bool:
    """Return True if an object or array may have a key that names an object."""
    if memoryview(value)[0] not in _NESTED:
        return False  # nearly all
    text = bytes(value)
    folded = text.lower()
    return _contains(folded, _LONG_S) or (
        _contains(folded, _ELSEWHERE) and (text.find(_ESCAPE) >= 0 or _KEY.search(text) is not None)
    )


def _in_other_case(members: Iterable[str], names: Container[str]) -> bool:
    """Return True if a key is one of `names` in another letter case. To Go, U+017F is an s and U+212A a k."""
    joined = "".join(members)
    if joined.isascii() and joined.islower():
        return False  # nearly all
    return any(key not in names and key.casefold() in names for key in members)


def _contains(text: Body, keys: Iterable[bytes]) -> bool:
    return any(text.find(key) >= 0 for key in keys)  # `in` takes four times as long


def form_references(body: Body, content_type: bytes) -> frozenset[Reference] | None:
    """Return the objects that the fields of a form refer to, None if that cannot be read.

    A form that cannot be read refers to nothing if it contains none of the names that refer.
    """
    found: list[Reference] = []
    try:
        for field in multipart.fields(body, content_type):
            names = _COLLECTIONS.keys() & set(_FIELD_NAME.findall(field.name.casefold()))
            found += [_reference(name, str(field.value, "utf-8").strip()) for name in names]
    except (multipart.UnreadableForm, UnicodeDecodeError):
        lower = body.lower()
        return None if any(name.encode() in lower for name in _COLLECTIONS) else frozenset()
    return frozenset(found)


def first_object_id(members: Iterable[memoryview]) -> str | None:
    """Return the id of the first object, such as a container, that members besides messages and input refer to."""
    for member in members:
        text = bytes(member)
        if any(key in text for key in _IN_TOOLS):
            for reference in references(text, (text,)) or ():
                return reference.object_id
    return None


_KEPT: Final = {"image_generation_call": ("result",), "reasoning": ("content", "encrypted_content")}
"""Types of items that an upstream keeps and finds by their id, and the members that bring the content instead."""

_ITEM_KEYS: Final = ("id", "type", "role", *[member for members in _KEPT.values() for member in members])
_EMPTY: Final = (b"null", b"[]", b'""')


def item_references(items: Iterable[memoryview | bytes]) -> list[Reference]:
    """Return the items of earlier responses that input items refer to; `type` may be left out in a reference."""
    found: list[Reference] = []
    for item in items:
        with suppress(*DECODE_ERRORS):  # of a string
            found += [Reference(ITEMS, object_id) for object_id in _item_ids(text_with_keys(bytes(item)))]
    return found


def _item_ids(item: Body) -> list[str]:
    """Return the ids to which an item may refer, as servers with and without regard to letter case read it.

    Of a key in several letter cases, any may count. Raises DECODE_ERRORS.
    """
    members = decode_members(item)
    found = _referred({name: [members.get(name, NONE)] for name in _ITEM_KEYS})
    if _in_other_case(members, _ITEM_KEYS):
        found += _referred(
            {
                name: [value for key, value in members.items() if key.casefold() == name] or [NONE]
                for name in _ITEM_KEYS
            }
        )
    return found


def _referred(given: dict[str, list[Raw]]) -> list[str]:
    """Return the ids of an item that is a reference by one of the values of each of these members."""
    kinds = [short_text(kind) for kind in given["type"]]
    refers = (
        "item_reference" in kinds
        or (any(map(_is_absent, given["type"])) and any(map(_is_absent, given["role"])))
        or any(_lacks_content(given, _KEPT[kind]) for kind in kinds if kind in _KEPT)
    )
    return [text for each in given["id"] if (text := short_text(each)) is not None] if refers else []


def _lacks_content(given: dict[str, list[Raw]], names: Iterable[str]) -> bool:
    """Return True if by some reading none of these members has a content."""
    return all(any(map(_is_empty, given[name])) for name in names)


def _is_empty(value: Raw) -> bool:
    return value is NONE or bytes(value).translate(None, b" \t\r\n") in _EMPTY


def _is_absent(value: Raw) -> bool:
    return value is NONE or bytes(memoryview(value)[:4]) == b"null"


_decode_items = msgspec.json.Decoder(list[Raw]).decode


def listed_items(body: Body) -> list[memoryview]:
    """Return the items that a JSON body lists as `input` or `items`, in any letter case; there may be no list."""
    found: list[memoryview] = []
    try:
        top = decode_members(body)
    except DECODE_ERRORS:
        return found
    for key, value in top.items():
        if key.casefold() in ("input", "items"):
            with suppress(*DECODE_ERRORS):
                found += map(memoryview, _decode_items(value))
    return found


def _unescaped(escape: re.Match[bytes]) -> bytes:
    return bytes([int(escape[0][2:], 16)])


def _in_decoded(value: Any) -> tuple[list[Reference], int]:
    """Return the references in a decoded body, and how many keys look like one. Walks without recursion.

    Letter case is ignored, as some servers ignore it.
    """
    found: list[Reference] = []
    keys = 0
    waiting = [(value, True)]
    while waiting:
        each, may_refer = waiting.pop()
        if isinstance(each, list):
            waiting += [(member, may_refer) for member in each if isinstance(member, (dict, list))]
        elif isinstance(each, dict):
            kind = each.get("type")
            if may_refer and isinstance(kind, str) and kind in _KINDS:
                found += [Reference(_KINDS[kind], name) for name in _ids(each)]
            calls_tool = isinstance(kind, str) and kind in _TOOL_CALLS
            for key, member in each.items():
                if (folded := key.casefold()) in _COLLECTIONS:
                    keys += 1
                    found += [_reference(folded, name) for name in _ids(member)] if may_refer else ()
                elif may_refer and isinstance(member, str):
                    found += [Reference("files", name) for name in _files_of_text(key, member)]
                is_own = key in _CLIENTS_OWN or (calls_tool and key == "input")
                if isinstance(member, (dict, list)):
                    waiting.append((member, may_refer and not is_own))
    return found, keys


def _reference(key: str, object_id: str) -> Reference:
    return Reference(_COLLECTIONS[key], object_id, key in _INPUTS)


def _files_of_text(key: str, text: str) -> list[str]:
    """Return the ids of the files that a text names as a whole: a URL, or a text that stands for files."""
    if _FILES_TEXT.match(text):
        return _FILE_IN_TEXT.findall(text)
    named = _FILE_URL.match(text) if key.casefold().endswith(_URLS) else None
    return [] if named is None else [named[1]]


def _ids(value: Any) -> list[str]:
    """Return the ids in the value of a key: a string, a list of strings, or an object with an id."""
    if isinstance(value, dict):
        value = value.get("id")
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str)]

"""Find the stored context that a chat request names, and the edits that insert it. Pure.

A context is named by a first message of the role `cache`, or by a header if its messages are repeated in the request.
The stored bytes are inserted unchanged; nothing is re-encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body, Edit
from proxy.records import Prompt
from proxy.wire.headers import CONTEXT_HEADER
from proxy.wire.request import CACHE_MESSAGE_BYTES_MOST
from proxy.wire.schemas import DECODE_ERRORS
from proxy.wire.spans import span_of

TTL_SECONDS_MOST = 10 * 366 * 86_400  # ten years; a longer one is a mistaken unit
CONTEXT_ID = re.compile(r"cache-[0-9a-f]{32}")
TAG = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,127}")
_CONTENT_PARAM = "messages[0].content"
_NONE = Raw()


class Reference(msgspec.Struct, frozen=True):
    """The context that a request names, by id or by tag, with its options. Both are None for an invalid name."""

    id: str | None = None
    tag: str | None = None
    reset_ttl_seconds: int | None = None
    dry_run: bool = False


class Named(msgspec.Struct, frozen=True):
    """A request whose first message names a context. The spans are offsets in its body."""

    reference: Reference
    message_span: tuple[int, int]
    tools_span: tuple[int, int] | None  # of `tools`, if that is null
    rest: tuple[memoryview, ...]


class Spliced(msgspec.Struct, frozen=True):
    """The edits that insert a context, and views of the messages that follow it."""

    edits: tuple[Edit, ...]
    rest: tuple[memoryview, ...]


class _Body(msgspec.Struct, gc=False):
    messages: list[Raw] | None = []
    tools: Raw = _NONE
    functions: Raw = _NONE

    @property
    def listed(self) -> list[Raw]:
        """The messages; empty if `messages` is null."""
        return self.messages or []


class _Message(msgspec.Struct, gc=False):
    role: Any = None
    content: Any = None


_body_decoder = msgspec.json.Decoder(_Body)
_message_decoder = msgspec.json.Decoder(_Message)


def named_in(prompt: Prompt) -> Named | None:
    """Return the context that a message of the role `cache` names, None if there is no such message.

    Raises:
        BadRequest: the message is not the first or is malformed, or the request has its own tools.
    """
    body = _decode_body(prompt.body)
    named = None
    for place, message in enumerate(body.listed):
        if not _may_be_cache(message):
            continue
        decoded = _decode_message(message, place)
        if decoded.role != "cache":
            continue
        if place:
            raise BadRequest("Only the first message may have the role cache.", param=f"messages[{place}].role")
        named = _named(prompt.body, body, decoded.content)
    return named


def _decode_body(body: Body) -> _Body:
    try:
        return _body_decoder.decode(body)
    except DECODE_ERRORS:
        raise BadRequest("The body must be a JSON object with an array of messages, in UTF-8.") from None


def _decode_message(message: Raw, place: int) -> _Message:
    try:
        return _message_decoder.decode(message)
    except DECODE_ERRORS:
        raise BadRequest("A message must be a JSON object in UTF-8.", param=f"messages[{place}]") from None


def _may_be_cache(message: Raw) -> bool:
    view = memoryview(message)
    return len(view) <= CACHE_MESSAGE_BYTES_MOST and b'"cache"' in bytes(view)


def _named(body: Body, fields: _Body, content: Any) -> Named:
    for param, value in (("tools", fields.tools), ("functions", fields.functions)):
        if value is not _NONE and bytes(value) != b"null":
            raise BadRequest(f"{param} must be absent: the stored context has its own.", param=param)
    tools_span = None if fields.tools is _NONE else span_of(body, fields.tools)
    rest = tuple([memoryview(message) for message in fields.listed[1:]])
    return Named(read_reference(content), span_of(body, fields.listed[0]), tools_span, rest)


def read_reference(content: Any) -> Reference:
    """Read the content of a message of the role `cache`: `cache_id=ID` or `tag=NAME`, and options after semicolons.

    The options are `reset_ttl=SECONDS` and `dry_run=1`. Raises BadRequest.
    """
    if not isinstance(content, str):
        raise BadRequest("The content of a message of the role cache must be a string.", param=_CONTENT_PARAM)
    pairs = [part.partition("=") for part in content.split(";")]
    values = {key: value for key, _, value in pairs}
    if len(values) != len(pairs) or not all(value for _, _, value in pairs):
        raise BadRequest(
            "The content must be key=value pairs separated by semicolons, each key once.", param=_CONTENT_PARAM
        )
    if values.keys() - {"cache_id", "tag", "reset_ttl", "dry_run"}:
        raise BadRequest(
            "The content may have the keys cache_id, tag, reset_ttl and dry_run only.", param=_CONTENT_PARAM
        )
    if ("cache_id" in values) == ("tag" in values):
        raise BadRequest("The content must have either cache_id or tag.", param=_CONTENT_PARAM)
    return _reference(
        values.get("cache_id"), values.get("tag"), values.get("reset_ttl"), values.get("dry_run"), _CONTENT_PARAM
    )


def reference_in(headers: Iterable[tuple[bytes, bytes]]) -> Reference | None:
    """Return the context that `X-Msh-Context-Cache` names, None if there is no such header. Raises BadRequest."""
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name.startswith(CONTEXT_HEADER):
            found[name[len(CONTEXT_HEADER) :]] = value.decode("latin-1").strip()
    if b"" not in found:
        return None
    return _reference(found[b""], None, found.get(b"-reset-ttl"), found.get(b"-dryrun"), "X-Msh-Context-Cache")


def _reference(
    context_id: str | None, tag: str | None, reset_ttl: str | None, dry_run: str | None, param: str
) -> Reference:
    seconds = None
    if reset_ttl is not None:
        if not (reset_ttl.isascii() and reset_ttl.isdigit() and len(reset_ttl) <= 9 and int(reset_ttl) > 0):
            raise BadRequest("reset_ttl must be a positive number of seconds.", param=param)
        seconds = int(reset_ttl)
    if dry_run not in (None, "0", "1"):
        raise BadRequest("dry_run must be 0 or 1.", param=param)
    if tag is not None and not TAG.fullmatch(tag):
        tag = None
    if context_id is not None and not CONTEXT_ID.fullmatch(context_id):
        context_id = None
    return Reference(context_id, tag, seconds, dry_run == "1")


def splice_named(prompt: Prompt, named: Named, tools: bytes, messages: bytes) -> Spliced:
    """Replace the naming message by the stored `messages` (without brackets), and insert the stored `tools`."""
    edits = [Edit(*named.message_span, messages)]
    if tools and named.tools_span is not None:
        edits.append(Edit(*named.tools_span, tools))
    elif tools:
        start = prompt.body.index(b"{") + 1
        edits.append(Edit(start, start, b'"tools":%b,' % tools))
    return Spliced(tuple(edits), named.rest)


def splice_repeated(prompt: Prompt, tools: bytes, messages: bytes, stored: Sequence[memoryview]) -> Spliced | str:
    """Replace repeated messages and tools by the stored ones, or return the first place where they differ.

    They are compared as JSON values: white space, escapes and the order of keys do not matter.

    Args:
        prompt: the request.
        tools: the stored tools, empty if there are none.
        messages: the stored messages, without brackets.
        stored: views of each message within `messages`.

    Raises:
        BadRequest: the body cannot be read.
    """
    body = _decode_body(prompt.body)
    sent = body.listed
    if not _same_tools(body.tools, tools):
        return "tools"
    if not 0 < len(stored) <= len(sent):
        return "messages"
    for place, mine in enumerate(stored):
        if not _same(memoryview(sent[place]), mine):
            return f"messages[{place}]"
    first, last = span_of(prompt.body, sent[0]), span_of(prompt.body, sent[len(stored) - 1])
    edits = [Edit(first[0], last[1], messages)]
    if tools:
        edits.append(Edit(*span_of(prompt.body, body.tools), tools))
    return Spliced(tuple(edits), tuple([memoryview(message) for message in sent[len(stored) :]]))


def _same_tools(sent: Raw, stored: bytes) -> bool:
    if sent is _NONE or bytes(sent) in (b"null", b"[]"):
        return not stored
    return bool(stored) and _same(memoryview(sent), memoryview(stored))


def _same(sent: memoryview, stored: memoryview) -> bool:
    return sent == stored or _meaning(sent) == _meaning(stored)


def _meaning(value: memoryview) -> bytes:
    """Return a canonical text of a value. Values cannot be compared directly: in Python True == 1 == 1.0."""
    try:
        return msgspec.json.encode(msgspec.json.decode(value), order="deterministic")
    except DECODE_ERRORS:
        return bytes(value)

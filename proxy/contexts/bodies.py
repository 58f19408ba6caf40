"""Read and check the bodies and queries of /v1/caching. Pure. Each error names its field.

Messages and tools keep the bytes that were sent. Of a large message only the role and the kind of its content are
decoded.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body
from proxy.records import Media
from proxy.wire.bounds import check_array, check_nesting, may_hold_many
from proxy.wire.contexts import CONTEXT_ID, TAG, TTL_SECONDS_MOST
from proxy.wire.media import find_media
from proxy.wire.request import MODEL_NAME_BYTES_MOST
from proxy.wire.spans import span_of

NAME_CHARACTERS_MOST = 256
DESCRIPTION_CHARACTERS_MOST = 512
METADATA_PAIRS_MOST, KEY_CHARACTERS_MOST, VALUE_CHARACTERS_MOST = 16, 64, 512
TAGS_MOST = 16  # of one upload
MESSAGES_MOST = 10_000
TOOLS_MOST = 128
PARTS_MOST = 10_000  # of one message, and tool calls
MEMBER_BYTES_MOST = 256 * 1024  # of one small member; the longest metadata has 60 KB, or six times that in escapes
PAGE_MOST, PAGE_USUAL = 100, 20

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_NONE = Raw()
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class Upload(msgspec.Struct, frozen=True):
    """A context to be stored. `bounds` has begin and end of each message within `messages` (without brackets)."""

    model: str
    tools: bytes
    messages: bytes
    bounds: array[int]
    ends_with_user: bool
    name: str
    description: str
    metadata: dict[str, str]
    tags: tuple[str, ...]
    ttl_seconds: int | None
    expired_at: int | None
    media: tuple[Media, ...] = ()


class Change(msgspec.Struct, frozen=True):
    """The changes that a PUT asks for."""

    metadata: dict[str, str] | None
    ttl_seconds: int | None
    expired_at: int | None


class Page(msgspec.Struct, frozen=True):
    """The requested part of a list."""

    limit: int = PAGE_USUAL
    newest_first: bool = True
    after: str | None = None
    before: str | None = None
    metadata: dict[str, str] = {}


class _Upload(msgspec.Struct, gc=False):
    model: Raw = _NONE
    messages: Raw = _NONE
    tools: Raw = _NONE
    name: Raw = _NONE
    description: Raw = _NONE
    metadata: Raw = _NONE
    tags: Raw = _NONE
    expired_at: Raw = _NONE
    ttl: Raw = _NONE


class _Change(msgspec.Struct, gc=False):
    metadata: Any = None
    expired_at: Any = None
    ttl: Any = None


class _Tagging(msgspec.Struct, gc=False):
    tag: Any = None
    cache_id: Any = None


class _Message(msgspec.Struct, gc=False):
    role: Raw = _NONE
    content: Raw = _NONE
    name: Raw = _NONE
    tool_calls: Raw = _NONE
    tool_call_id: Raw = _NONE
    function_call: Raw = _NONE
    refusal: Raw = _NONE


class _Part(msgspec.Struct, gc=False):
    type: str
    text: Raw = _NONE


class _Function(msgspec.Struct, gc=False):
    name: str
    arguments: Raw = _NONE
    parameters: Raw = _NONE


class _ToolCall(msgspec.Struct, gc=False):
    id: str
    function: _Function


class _Tool(msgspec.Struct, gc=False):
    type: str
    function: _Function | None = None


def read_upload(body: Body) -> Upload:
    """Read the body of a creation. Raises BadRequest."""
    if may_hold_many(body):
        check_nesting(body)
    fields = _decoded(body, _Upload)
    model = _small(fields.model, "model")
    if not isinstance(model, str) or not 0 < len(model.encode()) <= MODEL_NAME_BYTES_MOST:
        raise BadRequest(f"model must be a string of 1 to {MODEL_NAME_BYTES_MOST} bytes.", param="model")
    tools, functions = _tools(fields.tools)
    messages, bounds, last_role, media = _messages(body, fields.messages, functions)
    ttl_seconds, expired_at = _expiry(_small(fields.ttl, "ttl"), _small(fields.expired_at, "expired_at"))
    return Upload(
        model=model,
        tools=tools,
        messages=messages,
        bounds=bounds,
        ends_with_user=last_role == "user",
        name=_text(_small(fields.name, "name"), "name", NAME_CHARACTERS_MOST),
        description=_text(_small(fields.description, "description"), "description", DESCRIPTION_CHARACTERS_MOST),
        metadata=_metadata(_small(fields.metadata, "metadata")) or {},
        tags=_tags(_small(fields.tags, "tags")),
        ttl_seconds=ttl_seconds,
        expired_at=expired_at,
        media=media,
    )


def read_change(body: Body) -> Change:
    """Read the body of a PUT. Raises BadRequest."""
    _check_short(body)
    fields = _decoded(body, _Change)
    ttl_seconds, expired_at = _expiry(fields.ttl, fields.expired_at)
    return Change(_metadata(fields.metadata), ttl_seconds, expired_at)


def read_tagging(body: Body) -> tuple[str, str | None]:
    """Read the body that creates or moves a tag: the tag, and the id, None if it cannot be one. Raises BadRequest."""
    _check_short(body)
    fields = _decoded(body, _Tagging)
    if not isinstance(fields.cache_id, str):
        raise BadRequest("cache_id must be a string.", param="cache_id")
    known = CONTEXT_ID.fullmatch(fields.cache_id)
    return _tag(fields.tag, "tag"), fields.cache_id if known else None


def read_page(query: str) -> Page:
    """Read the query of a list. Raises BadRequest."""
    values: dict[str, str] = {}
    metadata: dict[str, str] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=64)
    except ValueError:
        raise BadRequest("The query has too many fields.") from None
    for key, value in pairs:
        if key.startswith("metadata[") and key.endswith("]"):
            metadata[key[len("metadata[") : -1]] = value
        else:
            values[key] = value
    limit = values.get("limit", str(PAGE_USUAL))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= PAGE_MOST):
        raise BadRequest(f"limit must be a number from 1 to {PAGE_MOST}.", param="limit")
    order = values.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadRequest("order must be asc or desc.", param="order")
    return Page(int(limit), order == "desc", values.get("after"), values.get("before"), metadata)


def _check_short(body: Body) -> None:
    """Refuse a body that is longer than all its members may be: it is decoded whole."""
    if len(body) > MEMBER_BYTES_MOST:
        raise BadRequest(f"The body has more than {MEMBER_BYTES_MOST:,} bytes.")


def _small(value: Raw, param: str) -> Any:
    """Decode a small member. Raises BadRequest."""
    if value is _NONE:
        return None
    if len(memoryview(value)) > MEMBER_BYTES_MOST:
        raise BadRequest(f"{param} has more than {MEMBER_BYTES_MOST:,} bytes.", param=param)
    return _decoded(value, Any)


def _decoded(body: Body | Raw, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError:
        raise BadRequest("The body must be a JSON object.") from None
    except msgspec.DecodeError as error:
        raise BadRequest(
            "The body is empty." if not bytes(body).strip() else f"The body is not JSON: {error}"
        ) from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8.") from None


def _expiry(ttl: Any, expired_at: Any) -> tuple[int | None, int | None]:
    if ttl is not None and expired_at is not None:
        raise BadRequest("Give ttl or expired_at, not both.", param="expired_at")
    for value, param in ((ttl, "ttl"), (expired_at, "expired_at")):
        if value is not None and (type(value) is not int or value <= 0):
            raise BadRequest(f"{param} must be a positive whole number of seconds.", param=param)
    if ttl is not None and ttl > TTL_SECONDS_MOST:
        raise BadRequest("ttl is longer than ten years.", param="ttl")
    return ttl, expired_at


def _text(value: Any, param: str, characters_most: int) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > characters_most:
        raise BadRequest(f"{param} must be a string of at most {characters_most} characters.", param=param)
    return value


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > METADATA_PAIRS_MOST:
        raise BadRequest(f"metadata must be an object of at most {METADATA_PAIRS_MOST} pairs.", param="metadata")
    for key, entry in value.items():
        if len(key) > KEY_CHARACTERS_MOST:
            raise BadRequest(
                f"Keys of metadata must have at most {KEY_CHARACTERS_MOST} characters.", param="metadata"
            )
        if not isinstance(entry, str) or len(entry) > VALUE_CHARACTERS_MOST:
            raise BadRequest(
                f"Values of metadata must be strings of at most {VALUE_CHARACTERS_MOST} characters.", param="metadata"
            )
    return dict(value)


def _tags(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > TAGS_MOST:
        raise BadRequest(f"tags must be an array of at most {TAGS_MOST}.", param="tags")
    return tuple(dict.fromkeys(_tag(tag, f"tags[{place}]") for place, tag in enumerate(value)))


def _tag(value: Any, param: str) -> str:
    if not isinstance(value, str) or not TAG.fullmatch(value):
        raise BadRequest(
            "A tag must begin with a letter and have at most 128 letters, digits, `_`, `-` and `.`.", param=param
        )
    return value


def _tools(value: Raw) -> tuple[bytes, frozenset[str]]:
    """Return the array as sent, empty if there is none, and the names of its functions."""
    if value is _NONE or bytes(memoryview(value)[:5]) in (b"null", b"[]"):
        return b"", frozenset()
    check_array(value, "tools", TOOLS_MOST)
    try:
        listed = msgspec.json.decode(value, type=list[Raw])
    except _DECODE_ERRORS:
        raise BadRequest("tools must be an array.", param="tools") from None
    if len(listed) > TOOLS_MOST:
        raise BadRequest(f"tools must have at most {TOOLS_MOST} entries.", param="tools")
    names = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(listed)]
    return (bytes(value) if listed else b""), frozenset(names) - {""}


def _tool(value: Raw, param: str) -> str:
    try:
        tool = msgspec.json.decode(value, type=_Tool)
    except _DECODE_ERRORS:
        raise BadRequest("A tool must be an object with a type.", param=param) from None
    if tool.function is None:
        if tool.type == "function":
            raise BadRequest("A tool of type function must have a function.", param=f"{param}.function")
        return ""
    if not _FUNCTION_NAME.fullmatch(tool.function.name):
        raise BadRequest(
            "The name of a function must have 1 to 128 letters, digits, `_`, `-` and `.`.",
            param=f"{param}.function.name",
        )
    if _kind(tool.function.parameters) not in ("", "{", "n"):
        raise BadRequest("The parameters of a function must be an object.", param=f"{param}.function.parameters")
    return tool.function.name


def _messages(body: Body, value: Raw, functions: frozenset[str]) -> tuple[bytes, array[int], str, tuple[Media, ...]]:
    """Return the messages as sent without brackets, their bounds, the last one's role, and the parts without text."""
    check_array(value, "messages", MESSAGES_MOST)
    try:
        listed = msgspec.json.decode(value, type=list[Raw])
    except _DECODE_ERRORS:
        listed = []
    if not 0 < len(listed) <= MESSAGES_MOST:
        raise BadRequest(f"messages must be an array of 1 to {MESSAGES_MOST}.", param="messages")
    calls: dict[str, str] = {}
    role = ""
    for place, message in enumerate(listed):
        role = _message(message, f"messages[{place}]", calls, functions)
    spans = [span_of(body, message) for message in listed]
    first = spans[0][0]
    kept = bytes(memoryview(body)[first : spans[-1][1]])
    try:
        kept.decode()
    except UnicodeDecodeError:
        raise BadRequest("The messages are not UTF-8.", param="messages") from None
    bounds = array("I", [offset - first for span in spans for offset in span])
    return kept, bounds, role, find_media(kept, listed)


def _message(value: Raw, param: str, calls: dict[str, str], functions: frozenset[str]) -> str:
    """Check one message and return its role; `calls` collects the tool calls so far, by id."""
    try:
        message = msgspec.json.decode(value, type=_Message)
    except _DECODE_ERRORS:
        raise BadRequest("A message must be an object.", param=param) from None
    role = _small(message.role, f"{param}.role")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRequest(
            "role must be one of assistant, developer, function, system, tool and user.", param=f"{param}.role"
        )
    if not isinstance(_small(message.name, f"{param}.name"), str | None):
        raise BadRequest("name must be a string.", param=f"{param}.name")
    made = _tool_calls(message.tool_calls, f"{param}.tool_calls")
    if made and role != "assistant":
        raise BadRequest("Only an assistant message may have tool_calls.", param=f"{param}.tool_calls")
    says_other = bool(made) or _kind(message.function_call) == "{" or _kind(message.refusal) == '"'
    _check_content(message.content, f"{param}.content", may_be_null=role == "assistant" and says_other)
    if role == "tool":
        _check_tool_answer(_small(message.tool_call_id, f"{param}.tool_call_id"), param, calls, functions)
    calls.update(made)
    return role


def _check_content(value: Raw, param: str, *, may_be_null: bool) -> None:
    kind = _kind(value)
    if kind == '"' or (kind in ("", "n") and may_be_null):
        return
    if kind != "[":
        raise BadRequest("content must be a string or an array of parts.", param=param)
    check_array(value, param, PARTS_MOST)
    try:
        parts = msgspec.json.decode(value, type=list[_Part])
    except _DECODE_ERRORS:
        raise BadRequest("Each part of the content must be an object with a type.", param=param) from None
    if not parts:
        raise BadRequest("content must have at least one part.", param=param)
    for place, part in enumerate(parts):
        if part.type == "text" and _kind(part.text) != '"':
            raise BadRequest("A part of type text must have a text.", param=f"{param}[{place}].text")


def _tool_calls(value: Raw, param: str) -> dict[str, str]:
    if _kind(value) in ("", "n"):
        return {}
    check_array(value, param, PARTS_MOST)
    try:
        calls = msgspec.json.decode(value, type=list[_ToolCall])
    except _DECODE_ERRORS:
        raise BadRequest("Each tool call must have an id and a function with a name.", param=param) from None
    return {call.id: call.function.name for call in calls}


def _check_tool_answer(call_id: Any, param: str, calls: Mapping[str, str], functions: frozenset[str]) -> None:
    if not isinstance(call_id, str) or call_id not in calls:
        raise BadRequest(
            "A message of the role tool must answer a tool call of an assistant message before it.",
            param=f"{param}.tool_call_id",
        )
    if calls[call_id] not in functions:
        raise BadRequest("The function that an assistant message calls must be among the tools.", param="tools")


def _kind(value: Raw) -> str:
    """Return the first character of a JSON value, which determines its type; empty if there is no value."""
    return chr(memoryview(value)[0]) if value is not _NONE and len(memoryview(value)) else ""

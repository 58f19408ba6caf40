"""Types of the JSON that is read (requests, responses and events of every dialect), and their decoders.

Members that are not named here are skipped without being decoded; those of type `Raw` keep their text.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body
from proxy.records import Usage
from proxy.wire.bounds import check_array, check_nesting, may_hold_many

NONE = Raw()
"""The value of a raw member that is absent; compare by identity."""

DECODE_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""The exceptions of the decoders here."""


_NAME_BYTES_MOST: Final = 4096  # of an id, or of a type with every letter written as an escape
_QUOTE: Final = 34
_decode_text: Callable[[Raw], str] = msgspec.json.Decoder(str).decode


def short_text(value: Raw) -> str | None:
    """Return a string; None if it is absent, of another type, or too long for a name. Raises DECODE_ERRORS."""
    if value is NONE or len(memoryview(value)) > _NAME_BYTES_MOST or memoryview(value)[0] != _QUOTE:
        return None
    return _decode_text(value)


# --- requests

MESSAGES_MOST: Final = 10_000
"""Messages or input items of one prompt. A view of each is made and hashed; these take 30 ms of the event loop."""


class Model(str):
    """A type for which msgspec calls `_convert`, once for every occurrence of the key."""

    __slots__ = ()


class SecondModel(Exception):
    """The body names a model twice. msgspec does not convert it, since it is not a ValueError."""


class Named:
    """The value of a member that names an object; msgspec calls `_convert` for every occurrence of its key."""

    __slots__ = ("object_id",)
    member = ""

    def __init__(self, value: Any) -> None:
        inner = value.get("id") if isinstance(value, dict) else value
        self.object_id: str | None = inner if isinstance(inner, str) and inner else None


class PreviousResponse(Named):
    """The response that a prompt continues."""

    __slots__ = ()
    member = "previous_response_id"


class Conversation(Named):
    """The conversation that a prompt continues, as an id or as {"id": ...}."""

    __slots__ = ()
    member = "conversation"


class Container(Named):
    """The container in which tools run, as an id or as {"id": ...}."""

    __slots__ = ()
    member = "container"


_NAMED: Final[dict[str, type[Named]]] = {kind.member: kind for kind in (PreviousResponse, Conversation, Container)}
_NAMED_BYTES_MOST: Final = 64 * 1024  # of the value of one of them in a body with very many values


class SecondObject(Exception):
    """The body has the member `member` twice, so that the upstream might read the other one."""

    def __init__(self, member: str) -> None:
        super().__init__(member)
        self.member = member


class _Seen(threading.local):
    """The models and objects found in the body being read; per thread, so that any thread may read a body."""

    def __init__(self) -> None:
        self.models: list[object] = []
        self.objects: dict[str, str] = {}  # id by member
        self.members = 0  # of the object being read
        self.cache_marks = 0


seen = _Seen()


def _noted(named: Named) -> Named:
    seen.objects[named.member] = named.object_id or ""
    return named


def _convert(kind: type, value: Any) -> Any:
    if issubclass(kind, Named):
        if kind.member in seen.objects:
            raise SecondObject(kind.member)
        return _noted(kind(value))
    if kind is not Model or not (value is None or isinstance(value, str)):
        raise ValueError("model must be a string")
    seen.models.append(value)
    if len(seen.models) > 1:
        raise SecondModel  # at once: a body can hold millions of models
    return Model(value or "")  # null counts as absent, which is left to the upstream


class Common(msgspec.Struct, gc=False):
    """Members that all dialects share."""

    model: Model = Model()
    stream: Any = None  # servers differ in the values that they accept as true
    stream_options: Raw = NONE
    tools: Raw = NONE
    tool_choice: Raw = NONE
    lora: Raw = NONE
    lora_path: Raw = NONE
    adapter: Raw = NONE
    cache_salt: Raw = NONE
    chat_template: Raw = NONE
    chat_template_kwargs: Raw = NONE
    add_special_tokens: Raw = NONE
    documents: Raw = NONE
    mm_processor_kwargs: Raw = NONE
    reasoning: Raw = NONE
    reasoning_effort: Raw = NONE
    enable_thinking: Raw = NONE
    thinking: Raw = NONE
    max_tokens: Raw = NONE
    container: Container | None = None
    cache_prompt: Raw = NONE
    prompt_cache_key: Raw = NONE
    priority: Raw = NONE
    service_tier: Raw = NONE
    prompt_logprobs: Raw = NONE
    logprob_start_len: Raw = NONE
    truncate_prompt_tokens: Raw = NONE


class _Chat(Common, gc=False):
    messages: list[Raw] | None = None
    functions: Raw = NONE
    max_completion_tokens: Raw = NONE
    web_search_options: Raw = NONE
    store: Any = None


class _Completion(Common, gc=False):
    prompt: Raw = NONE
    suffix: Raw = NONE
    echo: Raw = NONE


class _Responses(Common, gc=False):
    input: list[Raw] | None = None
    instructions: Raw = NONE
    prompt: Raw = NONE
    max_output_tokens: Raw = NONE
    background: Raw = NONE
    previous_response_id: PreviousResponse | None = None
    conversation: Conversation | None = None


class _ResponsesText(_Responses, gc=False):
    input: Raw = NONE  # type: ignore[assignment]


class _Messages(Common, gc=False):
    messages: list[Raw] | None = None
    system: Raw = NONE
    mcp_servers: Raw = NONE


class _Embeddings(msgspec.Struct, gc=False):
    model: Model = Model()


def _of_body(kind: type) -> Callable[[Body], Any]:
    return msgspec.json.Decoder(kind, dec_hook=_convert).decode


_ANY_VALUE: Final = frozenset({"stream", "store"})  # only `true` matters, but the value may be of any type and size


def _counted(kind: type, member: str | None = None) -> Callable[[Body], Any]:
    """Return a decoder of `kind` which, if the body may hold very many values, decodes none whose size is not known.

    It then counts the items of the array `member` before it makes any. Raises BadRequest in addition.
    """
    fields_of_kind = {field.name for field in msgspec.structs.fields(kind)}
    names, flags = sorted(fields_of_kind & _NAMED.keys()), sorted(fields_of_kind & _ANY_VALUE)
    raw_members = [(name, Raw, NONE) for name in (*names, *flags, *([member] if member else []))]
    decode_short = _of_body(kind)
    decode = _of_body(msgspec.defstruct(kind.__name__, raw_members, bases=(kind,), gc=False))

    def decode_counted(body: Body) -> Any:
        if not may_hold_many(body):
            return decode_short(body)
        check_nesting(body)
        fields = decode(body)
        for name in names:  # their values may be as large as the body
            setattr(fields, name, _bounded(getattr(fields, name), _NAMED[name], body))
        for name in flags:
            setattr(fields, name, bytes(getattr(fields, name)) == b"true")
        if member is not None:
            setattr(fields, member, _items(getattr(fields, member), member))
        return fields

    return decode_counted


def _items(raw: Raw, member: str) -> list[Raw] | None:
    """Return the items of an array, None if it is absent or null. Raises BadRequest."""
    check_array(raw, member, MESSAGES_MOST)
    try:
        return None if raw is NONE else _decode_items(raw)
    except msgspec.ValidationError:
        raise BadRequest(f"{member} must be an array", param=member) from None


def _bounded(raw: Raw, kind: type[Named], body: Body) -> Named | None:
    """Return what `_convert` would have made of a member. Raises BadRequest and SecondObject."""
    if raw is NONE:
        return None
    if len(memoryview(raw)) > _NAMED_BYTES_MOST:
        raise BadRequest(f"{kind.member} is too long", param=kind.member)
    if body.count(b'"%b"' % kind.member.encode()) > 1:
        raise SecondObject(kind.member)
    value = msgspec.json.decode(raw)
    return None if value is None else _noted(kind(value))


_decode_items: Callable[[Raw], list[Raw] | None] = msgspec.json.Decoder(list[Raw] | None).decode


MEMBERS_MOST: Final = 1_000
"""Most members of a body's outermost object if all of them must be known; requests have some fifty."""


class TooManyMembers(BadRequest):
    """An object has too many members."""


class _Key(str):
    """The key of a member; msgspec calls `_counted_key` for each of them."""

    __slots__ = ()


def _counted_key(_: type, value: Any) -> _Key:
    seen.members += 1
    if seen.members > MEMBERS_MOST:
        raise TooManyMembers(f"the body has more than {MEMBERS_MOST:,} members.")
    return _Key(value)


_decode_members = msgspec.json.Decoder(dict[_Key, Raw], dec_hook=_counted_key).decode


def decode_members(body: Body) -> dict[str, Raw]:
    """Return the members of an object as raw values. Raises DECODE_ERRORS, and TooManyMembers at the first too many.

    A million members take 0.4 s.
    """
    seen.members = 0
    members: dict[Any, Raw] = _decode_members(body)
    return members


decode_completion = _counted(_Completion)
decode_responses_text = _counted(_ResponsesText)
decode_embeddings = _counted(_Embeddings)
decode_chat = _counted(_Chat, "messages")
decode_messages = _counted(_Messages, "messages")
decode_responses = _counted(_Responses, "input")
decode_model = decode_embeddings


class _Options(msgspec.Struct, gc=False):
    include_usage: bool | None = None


decode_options = msgspec.json.Decoder(_Options | None).decode


# --- content that may contain a picture, a sound or a file


class Part(msgspec.Struct, gc=False):
    """A content part of any dialect, with the raw values that may contain its bytes."""

    type: str = ""
    image_url: Raw = NONE
    input_audio: Raw = NONE
    audio_url: Raw = NONE
    video_url: Raw = NONE
    file: Raw = NONE
    file_data: Raw = NONE
    source: Raw = NONE
    content: Raw = NONE


class _PartsMessage(msgspec.Struct, gc=False):
    content: list[Part] | None = None


class MessageHead(msgspec.Struct, gc=False):
    """The role, type and id of a message or an item, and its content and reasoning as raw text."""

    role: str = ""
    type: str = ""
    id: Raw = NONE
    content: Raw = NONE
    reasoning_content: Raw = NONE
    reasoning: Raw = NONE


decode_message_head = msgspec.json.Decoder(MessageHead).decode
decode_raw_list = msgspec.json.Decoder(list[Raw]).decode
decode_raw_members = msgspec.json.Decoder(dict[str, Raw]).decode
decode_parts_message = msgspec.json.Decoder(_PartsMessage).decode
decode_parts = msgspec.json.Decoder(list[Part]).decode


# --- the events of a stream


class EventRead(msgspec.Struct, frozen=True, gc=False):
    """The facts that one event reports. `extra` marks the chunk that exists only because usage was asked for."""

    token: bool = False
    finished: bool = False
    error: bool = False
    extra: bool = False
    usage: Any = None
    timings: Any = None
    service_tier: Any = None
    model: Any = None


class Delta(msgspec.Struct, gc=False):
    """The part of a choice that a chunk of chat adds."""

    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    tool_calls: Any = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None


class _Choice(msgspec.Struct, gc=False):
    delta: Delta | None = None
    text: Any = None
    finish_reason: Any = None
    usage: Any = None


class Chunk(msgspec.Struct, gc=False):
    """A chunk of chat or completions."""

    choices: list[_Choice] | None = None
    usage: Any = None
    usageMetadata: Any = None  # noqa: N815 - Gemini's spelling
    timings: Any = None
    error: Any = None
    service_tier: Any = None
    object: Any = None
    type: Any = None
    x_groq: Any = None
    id: Any = None
    message: Any = None
    detail: Any = None


decode_chunk = msgspec.json.Decoder(Chunk).decode


class _ResponseObject(msgspec.Struct, gc=False):
    usage: Any = None
    error: Any = None
    service_tier: Any = None
    model: Any = None


class ResponsesEvent(msgspec.Struct, gc=False):
    """An event of the Responses API."""

    type: str = ""
    response: _ResponseObject | None = None
    error: Any = None
    object: Any = None
    message: Any = None
    detail: Any = None


decode_responses_event = msgspec.json.Decoder(ResponsesEvent).decode


class MessageObject(msgspec.Struct, gc=False):
    """The message that an event begins."""

    usage: Any = None


class MessagesEvent(msgspec.Struct, gc=False):
    """An event of Anthropic's Messages API."""

    type: str = ""
    message: MessageObject | str | None = None
    usage: Any = None
    error: Any = None
    object: Any = None
    detail: Any = None


decode_messages_event = msgspec.json.Decoder(MessagesEvent).decode


# --- plain responses


class ResponseRead(msgspec.Struct, frozen=True, gc=False):
    """The facts that a plain response reports: usage, model, and whether it is an error or not JSON at all."""

    usage: Usage | None
    error_seen: bool
    model: str | None = None


class PlainResponse(msgspec.Struct, gc=False):
    """A plain response of any dialect."""

    usage: Any = None
    usageMetadata: Any = None  # noqa: N815 - Gemini's spelling
    timings: Any = None
    error: Any = None
    service_tier: Any = None
    model: Any = None


class PlainResponseWithChoices(PlainResponse, gc=False):
    """The same with its choices, in which some servers report usage."""

    choices: Raw = NONE


class _ChoiceUsage(msgspec.Struct, gc=False):
    usage: Any = None


class PlainError(msgspec.Struct, gc=False):
    """The members that show whether a plain response without usage is an error."""

    id: Any = None
    object: Any = None
    type: Any = None
    detail: Any = None
    message: Any = None


class CreatedObject(msgspec.Struct, gc=False):
    """An object of the upstream that has an id: a response, file, batch, upload, container or conversation.

    Batches and finished uploads name the files that the upstream made for them.
    """

    id: Any = None
    status: Any = None
    background: Any = None
    output_file_id: Any = None
    error_file_id: Any = None
    file: Any = None

    def ids(self) -> list[str]:
        """Return the ids of this object and of the files made for it."""
        return [*_texts(self.id), *self.file_ids()]

    def file_ids(self) -> list[str]:
        """Return the ids of the files that the upstream made for this object."""
        inner = self.file.get("id") if isinstance(self.file, dict) else None
        return _texts(self.output_file_id, self.error_file_id, inner)


def _texts(*values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str) and value]


LONG_RESPONSE_BYTES: Final = 256 * 1024
"""Length from which a response is decoded member by member: it could hold a million values, which take 0.5 s."""

MEMBER_BYTES_MOST: Final = 64 * 1024
"""Longest member that is read of a long response. A usage object has some 300 bytes."""

_decode_short_response = msgspec.json.Decoder(PlainResponseWithChoices).decode


def _raw_members_of(kind: type[msgspec.Struct]) -> Callable[[bytes | memoryview], Any]:
    """Return a decoder of the members of `kind` that leaves their values undecoded."""
    members = [(name, Raw, NONE) for name in kind.__struct_fields__]
    return msgspec.json.Decoder(msgspec.defstruct(f"Long{kind.__name__}", members, gc=False)).decode


_decode_long_response = _raw_members_of(PlainResponseWithChoices)


def decode_response(body: bytes | memoryview) -> PlainResponseWithChoices:
    """Decode a plain response without what a long one has in members that are too long; an error is then True.

    Raises DECODE_ERRORS.
    """
    if len(body) < LONG_RESPONSE_BYTES:
        return _decode_short_response(body)
    members: Any = _decode_long_response(body)
    response = PlainResponseWithChoices(choices=members.choices)
    for name in PlainResponse.__struct_fields__:
        value: Raw = getattr(members, name)
        if value is not NONE and len(memoryview(value)) <= MEMBER_BYTES_MOST:
            setattr(response, name, msgspec.json.decode(value))
        elif value is not NONE and name == "error":
            response.error = True
    return response


decode_choices = msgspec.json.Decoder(list[_ChoiceUsage] | None).decode
decode_error = msgspec.json.Decoder(PlainError).decode
_decode_short_created = msgspec.json.Decoder(CreatedObject).decode
_decode_long_created = _raw_members_of(CreatedObject)


def decode_created(body: bytes | memoryview) -> CreatedObject:
    """Decode a created object, a long one without the members that are too long. Raises DECODE_ERRORS."""
    if len(body) < LONG_RESPONSE_BYTES:
        return _decode_short_created(body)
    members: Any = _decode_long_created(body)
    created = CreatedObject()
    for name in CreatedObject.__struct_fields__:
        value: Raw = getattr(members, name)
        if value is not NONE and len(memoryview(value)) <= MEMBER_BYTES_MOST:
            setattr(created, name, msgspec.json.decode(value))
    return created


# --- invalid JSON


LENIENT_BYTES_MOST = 1024 * 1024
"""Longest text that Python's decoder is used for, which takes 10 ms per MB."""

LENIENT_VALUES_MOST: Final = 100_000
"""Most arrays, objects and commas of such a text: with more, it takes ten times as long."""

_Kind = TypeVar("_Kind")


def decode_leniently(text: bytes | memoryview, kind: type[_Kind]) -> _Kind | None:
    """Decode JSON as Python does: with NaN, Infinity, lone surrogates and invalid UTF-8. None if that fails too."""
    if len(text) > LENIENT_BYTES_MOST:
        return None
    body = bytes(text)
    if body.count(b",") + body.count(b"[") + body.count(b"{") > LENIENT_VALUES_MOST:
        return None
    try:
        value = json.loads(body.decode("utf-8", "replace"))
        return msgspec.convert(value, kind)
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None


# --- tools


class ToolType(msgspec.Struct, gc=False):
    """The member of a tool that shows whether it is hosted by the upstream."""

    type: Any = None


decode_tool_types = msgspec.json.Decoder(list[ToolType] | None).decode


# --- urgency


class Urgent(msgspec.Struct, gc=False):
    """The members by which a body of any kind states its priority."""

    priority: Raw = NONE
    service_tier: Raw = NONE


decode_urgent = msgspec.json.Decoder(Urgent).decode
decode_tier = msgspec.json.Decoder(str).decode
decode_priority = msgspec.json.Decoder(int | float).decode

"""One server-sent event of any dialect: its data, and what that says about token, usage, end and error.

Pure; knows nothing of chunks or of what came before. Data that cannot be read says nothing.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Raw

from proxy.model import Endpoint
from proxy.wire.usage import decoded, says_something

_NONE = Raw()
_BOM = b"\xef\xbb\xbf"


class EventRead(msgspec.Struct, frozen=True, gc=False):
    """What one event says. `extra` marks the chunk that exists only because usage was asked for."""

    token: bool = False
    finished: bool = False
    error: bool = False
    extra: bool = False
    usage: Any = None
    timings: Any = None


NOTHING = EventRead()
_DONE = EventRead(finished=True)


def data_of(event: bytes) -> bytes:
    """The data of a raw event: its `data` lines joined by line feeds; empty for comments and blank lines."""
    if event.startswith(_BOM):
        event = event[3:]
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)


def read_event(event: bytes, endpoint: Endpoint) -> EventRead:
    """What the raw `event` of a stream of `endpoint` says; never raises."""
    payload = data_of(event).strip()
    if payload == b"[DONE]":
        return _DONE
    if not payload.startswith(b"{"):
        return NOTHING
    try:
        if endpoint is Endpoint.RESPONSES:
            return _of_responses(_decode_responses(payload))
        if endpoint is Endpoint.MESSAGES:
            return _of_messages(_decode_messages(payload))
        return _of_chunk(_decode_chunk(payload))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return NOTHING


class _Delta(msgspec.Struct, gc=False):
    content: Raw = _NONE
    reasoning_content: Raw = _NONE
    reasoning: Raw = _NONE
    tool_calls: Raw = _NONE
    function_call: Raw = _NONE
    refusal: Raw = _NONE
    audio: Raw = _NONE


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    text: Raw = _NONE
    finish_reason: Raw = _NONE
    usage: Raw = _NONE


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Raw = _NONE
    usageMetadata: Raw = _NONE  # noqa: N815 - Gemini's spelling
    timings: Raw = _NONE
    error: Raw = _NONE


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


def _of_chunk(chunk: _Chunk) -> EventRead:
    """A chunk of chat or completions."""
    usage = decoded(chunk.usage) or decoded(chunk.usageMetadata)
    token = finished = False
    for choice in chunk.choices or ():
        token = token or says_something(choice.text) or (choice.delta is not None and _is_token(choice.delta))
        finished = finished or says_something(choice.finish_reason)
        usage = usage or decoded(choice.usage)
    extra = chunk.choices is not None and not chunk.choices and isinstance(usage, dict)
    return EventRead(token, finished, says_something(chunk.error), extra, usage, decoded(chunk.timings))


def _is_token(delta: _Delta) -> bool:
    """True for the first content, reasoning or tool call; a role, null and empty values are none."""
    return (
        says_something(delta.content)
        or says_something(delta.reasoning_content)
        or says_something(delta.tool_calls)
        or says_something(delta.reasoning)
        or says_something(delta.function_call)
        or says_something(delta.refusal)
        or says_something(delta.audio)
    )


class _ResponseObject(msgspec.Struct, gc=False):
    usage: Raw = _NONE
    error: Raw = _NONE


class _ResponsesEvent(msgspec.Struct, gc=False):
    type: str = ""
    response: _ResponseObject | None = None
    error: Raw = _NONE


_decode_responses = msgspec.json.Decoder(_ResponsesEvent).decode
_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete", "response.failed", "response.cancelled"})


def _of_responses(event: _ResponsesEvent) -> EventRead:
    response = event.response
    broken = event.type in ("error", "response.failed") or says_something(event.error)
    return EventRead(
        token=event.type.endswith(".delta"),
        finished=event.type in _RESPONSE_ENDS,
        error=broken or (response is not None and says_something(response.error)),
        usage=None if response is None else decoded(response.usage),
    )


class _MessageObject(msgspec.Struct, gc=False):
    usage: Raw = _NONE


class _MessagesEvent(msgspec.Struct, gc=False):
    type: str = ""
    message: _MessageObject | None = None
    usage: Raw = _NONE
    error: Raw = _NONE


_decode_messages = msgspec.json.Decoder(_MessagesEvent).decode


def _of_messages(event: _MessagesEvent) -> EventRead:
    usage = decoded(event.usage)
    if usage is None and event.message is not None:
        usage = decoded(event.message.usage)
    return EventRead(
        token=event.type == "content_block_delta",
        finished=event.type == "message_stop",
        error=event.type == "error" or says_something(event.error),
        usage=usage,
    )

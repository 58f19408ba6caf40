"""Read one server-sent event of any dialect: whether it carries a token, usage, an error or the end. Pure.

Data that cannot be read counts as none of these, except for a usage object found in it.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from proxy.model import Endpoint
from proxy.wire.schemas import (
    DECODE_ERRORS,
    Chunk,
    Delta,
    EventRead,
    MessageObject,
    MessagesEvent,
    ResponsesEvent,
    decode_chunk,
    decode_leniently,
    decode_messages_event,
    decode_responses_event,
)
from proxy.wire.usage import tail_usage

_BOM: Final = b"\xef\xbb\xbf"
_CR: Final = 13

_ERROR_NAME = re.compile(rb"(?:^|[\r\n]|\xef\xbb\xbf)(?:event: ?error[ \t]*(?:[\r\n]|$)|error: ?\{)")
"""An event with this name, or older llama.cpp's own field."""

_ERROR: Final = "error"
_PART_ENDS: Final = (".delta", ".partial_image")  # of the types of events of transcripts, speech and pictures
_WHOLE_ENDS: Final = (".done", ".completed")

NOTHING = EventRead()
_DONE = EventRead(finished=True)


def data_of(event: bytes) -> bytes:
    """Return the data of a raw event: its `data` lines joined by line feeds; empty for comments and blank lines."""
    if event.startswith(_BOM):
        event = event[3:]
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return lines[0] if len(lines) == 1 else b"\n".join(lines)


def read_event(event: bytes, endpoint: Endpoint) -> EventRead:
    """Return what a raw event of a stream of `endpoint` reports; never raises.

    An error may be written into a stream as if it were a plain response, without any field (Gemini).
    """
    if event.startswith(b"data: {") and 0 < len(event) - event.find(b"\n") <= 2 and _CR not in event:
        payload = event[6:]  # one line of JSON, as in nearly all events; white space after it is harmless
    elif b"error" in event and _ERROR_NAME.search(event):
        read = _read_payload(data_of(event).strip(), endpoint)
        return read if read.error else msgspec.structs.replace(read, error=True)
    else:
        payload = data_of(event).strip()
        if not payload and b"error" in event:
            return EventRead(error=True) if _read_payload(event.strip(), endpoint).error else NOTHING
    return _read_payload(payload, endpoint)


def _read_payload(payload: bytes, endpoint: Endpoint) -> EventRead:
    if payload == b"[DONE]":
        return _DONE
    if not payload.startswith(b"{"):
        if not payload.startswith(b"[{"):
            return NOTHING
        payload = payload[1:].removesuffix(b"]")  # a list of one object, as Gemini's errors are
    try:
        if endpoint is Endpoint.RESPONSES:
            return _of_responses(decode_responses_event(payload))
        if endpoint is Endpoint.MESSAGES:
            return _of_messages(decode_messages_event(payload))
        return _of_chunk(decode_chunk(payload))
    except DECODE_ERRORS:
        return _leniently(payload, endpoint)


def _leniently(payload: bytes, endpoint: Endpoint) -> EventRead:
    """Read an event that a strict decoder refuses: NaN, Infinity, lone surrogates, bytes that are not UTF-8."""
    if endpoint is Endpoint.RESPONSES:
        if (event := decode_leniently(payload, ResponsesEvent)) is not None:
            return _of_responses(event)
    elif endpoint is Endpoint.MESSAGES:
        if (message := decode_leniently(payload, MessagesEvent)) is not None:
            return _of_messages(message)
    elif (chunk := decode_leniently(payload, Chunk)) is not None:
        return _of_chunk(chunk)
    usage = tail_usage(payload)
    return NOTHING if usage is None else EventRead(usage=usage)


def _of_chunk(chunk: Chunk) -> EventRead:
    """Read a chunk of chat or completions.

    Groq reports usage, and the error that ends a stream early, in `x_groq` too. Errors of older vLLM and SGLang have
    their fields at the top, with the object "error". OpenRouter ends a failed choice with the reason "error".
    """
    groq = chunk.x_groq if type(chunk.x_groq) is dict else {}
    usage = chunk.usage or chunk.usageMetadata or groq.get("usage")
    error = bool(chunk.error or groq.get(_ERROR)) or _ERROR in (chunk.object, chunk.type)
    if chunk.choices is None and chunk.id is None and chunk.object is None and chunk.type is None:
        error = error or _is_bare_error(chunk.message, chunk.detail)
    kind = chunk.type if type(chunk.type) is str else ""
    token, finished = kind.endswith(_PART_ENDS), kind.endswith(_WHOLE_ENDS)
    for choice in chunk.choices or ():
        if choice.text or (choice.delta is not None and _is_token(choice.delta)):
            token = True
        if choice.finish_reason:
            finished = True
            error = error or choice.finish_reason == _ERROR
        usage = usage or choice.usage
    extra = chunk.choices is not None and not chunk.choices and isinstance(usage, dict)
    return EventRead(token, finished, error, extra, usage, chunk.timings, chunk.service_tier)


def _is_token(delta: Delta) -> bool:
    """Return True for content, reasoning or a tool call; roles, nulls and empty values are not tokens."""
    return bool(
        delta.content
        or delta.reasoning_content
        or delta.tool_calls
        or delta.reasoning
        or delta.function_call
        or delta.refusal
        or delta.audio
    )


def _is_bare_error(message: Any, detail: Any) -> bool:
    """Return True for an event that is nothing but a message: an error of a web framework or gateway."""
    return type(message) is str or bool(detail)


_RESPONSE_ENDS = frozenset(
    {"response.completed", "response.done", "response.incomplete", "response.failed", "response.cancelled"}
)
"""Types of final events; `response.done` is that of some gateways."""


def _of_responses(event: ResponsesEvent) -> EventRead:
    response = event.response
    broken = event.type in ("error", "response.failed") or bool(event.error) or event.object == _ERROR
    if not event.type and response is None:
        broken = broken or _is_bare_error(event.message, event.detail)
    return EventRead(
        token=event.type.endswith(".delta"),
        finished=event.type in _RESPONSE_ENDS,
        error=broken or (response is not None and bool(response.error)),
        usage=None if response is None else response.usage,
        service_tier=None if response is None else response.service_tier,
        model=None if response is None else response.model,
    )


def _of_messages(event: MessagesEvent) -> EventRead:
    usage, message = event.usage, event.message
    error = event.type == _ERROR or bool(event.error) or event.object == _ERROR
    if isinstance(message, MessageObject):
        usage = message.usage if usage is None else usage
    elif not event.type:
        error = error or _is_bare_error(message, event.detail)
    return EventRead(
        token=event.type == "content_block_delta",
        finished=event.type == "message_stop",
        error=error,
        usage=usage,
    )

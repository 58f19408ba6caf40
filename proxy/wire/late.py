"""Write a plain response as the events of a stream, for a client that was sent the head of a stream already. Pure.

It is used for errors, which an upstream sends as a plain response although a stream was asked for, and for upstreams
that never stream. Values are copied unchanged from the response.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.errors import REASON_PHRASES, BadResponse, UpstreamError
from proxy.model import Body, Endpoint
from proxy.wire.bounds import TooManyItems, check_array, is_nested_beyond
from proxy.wire.errors import error_event
from proxy.wire.schemas import DECODE_ERRORS, LONG_RESPONSE_BYTES

_MESSAGE_BYTES_MOST: Final = 2048  # of an error that is not JSON
_NESTED_MOST: Final = 200_000  # arrays, objects and members of an answer; log-probabilities are most of them
_ITEMS_MOST: Final = 1_000  # choices, blocks, calls or items of an answer; each becomes some events
_EVENTS_MOST: Final = (
    10_000  # of an answer; what an upstream sends in a few bytes would become a hundred times as much
)
_DONE: Final = b"data: [DONE]\n\n"
_OUTPUT_TEXT: Final = Raw(b'"output_text"')
_Fields = dict[str, Raw]


def events_of_plain(status: int, body: Body, endpoint: Endpoint, *, request_id: str = "") -> bytes:
    """Return the events that are equivalent to a plain response with `status` and the decoded `body`."""
    if status < 300:
        try:
            return _answer(bytes(body), endpoint)
        except (*DECODE_ERRORS, KeyError, TooManyItems):
            error: UpstreamError = BadResponse("the upstream answered a request for a stream with something else")
            return error_event(error, endpoint, request_id=request_id)
    return _error(status, bytes(body), endpoint, request_id)


# -- errors


class _Said(msgspec.Struct):
    """The error in a body: an object with a message, or a text."""

    error: Any = None
    message: Any = None
    detail: Any = None


def _error(status: int, body: bytes, endpoint: Endpoint, request_id: str) -> bytes:
    told = _told(body)
    if endpoint is not Endpoint.RESPONSES and told is not None and isinstance(told.error, dict):
        name = b"event: error\n" if endpoint is Endpoint.MESSAGES else b""
        return name + _data(Raw(body))
    fields: dict[str, Any] = told.error if told is not None and isinstance(told.error, dict) else {}
    text = fields.get("message")
    if not text and told is not None:
        text = next((each for each in (told.error, told.message, told.detail) if isinstance(each, str)), None)
    error = UpstreamError(
        text if isinstance(text, str) and text else f"The upstream answered {status} {_phrase(status)}.",
        param=fields.get("param") if isinstance(fields.get("param"), str) else None,
        code=str(fields.get("code") or status),
    )
    error.status = status
    if isinstance(fields.get("type"), str):
        error.type = fields["type"]
    return error_event(error, endpoint, request_id=request_id)


def _told(body: bytes) -> _Said | None:
    if len(body) >= LONG_RESPONSE_BYTES:
        return None  # it could hold a million values
    try:
        return msgspec.json.decode(body, type=_Said)
    except DECODE_ERRORS:
        return None


def _phrase(status: int) -> str:
    return REASON_PHRASES.get(status, b"").decode()


# -- answers


def _answer(body: bytes, endpoint: Endpoint) -> bytes:
    """Return the events of a whole answer. Raises DECODE_ERRORS, and KeyError if it is not one of this endpoint."""
    if len(body) >= LONG_RESPONSE_BYTES and is_nested_beyond(body, _NESTED_MOST):
        raise TooManyItems("an answer has too many members")
    if endpoint is Endpoint.MESSAGES:
        return _messages(body)
    if endpoint is Endpoint.RESPONSES:
        return _responses(body)
    fields = msgspec.json.decode(body, type=_Fields)
    if "error" in fields and "choices" not in fields:
        return _data(fields)
    choices = _listed(fields, "choices")
    if endpoint is Endpoint.CHAT:
        fields["object"] = Raw(b'"chat.completion.chunk"')
        choices = [_chunk_choice(choice) for choice in choices]
    return _data({**fields, "choices": choices}) + _DONE


def _chunk_choice(choice: _Fields) -> dict[str, Any]:
    """Return a choice with its message as the delta of a chunk, in which each tool call has its index."""
    message: dict[str, Any] = msgspec.json.decode(choice["message"], type=_Fields)
    if (raw := message.get("tool_calls")) is not None and bytes(raw) != b"null":
        calls = _listed(message, "tool_calls")
        message["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return {"delta": message, **{key: value for key, value in choice.items() if key != "message"}}


class _Item(msgspec.Struct):
    id: Raw = Raw(b"null")
    content: list[_Fields] | None = None


def _responses(body: bytes) -> bytes:
    """Return the first event, each item with its parts and their text as one delta, and the end with the response."""
    fields = msgspec.json.decode(body, type=_Fields)
    check_array(fields["output"], "output", _ITEMS_MOST)
    output = msgspec.json.decode(fields["output"], type=list[Raw])
    begun: dict[str, Any] = {**fields, "output": [], "status": "in_progress"}
    events: list[dict[str, Any]] = [{"type": "response.created", "response": {**begun, "usage": None}}]
    for index, item in enumerate(output):
        events += _item_events(index, item)
        if len(events) > _EVENTS_MOST:
            raise TooManyItems("an answer has too many parts")
    events.append({"type": "response.completed", "response": Raw(body)})
    numbered = [{**event, "sequence_number": number} for number, event in enumerate(events)]
    return b"".join([_named(event) for event in numbered])


def _item_events(index: int, raw: Raw) -> list[dict[str, Any]]:
    item = msgspec.json.decode(raw, type=_Item)
    fields: dict[str, Any] = dict(msgspec.json.decode(raw, type=_Fields))
    if item.content is not None:
        fields |= {"content": [], "status": "in_progress"}
    events = [{"type": "response.output_item.added", "output_index": index, "item": fields}]
    for number, part in enumerate(item.content or ()):
        place = {"item_id": item.id, "output_index": index, "content_index": number}
        is_text = part.get("type") == _OUTPUT_TEXT and "text" in part
        begun = {**part, "text": ""} if is_text else part
        events.append({"type": "response.content_part.added", **place, "part": begun})
        if is_text:
            events.append({"type": "response.output_text.delta", **place, "delta": part["text"], "logprobs": []})
            events.append({"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []})
        events.append({"type": "response.content_part.done", **place, "part": part})
    events.append({"type": "response.output_item.done", "output_index": index, "item": raw})
    return events


_BLOCKS: Final = {
    "text": (("text", "text_delta"),),
    "thinking": (("thinking", "thinking_delta"), ("signature", "signature_delta")),
}
"""The fields of a content block that are sent as deltas, and the deltas' types. Other blocks are sent whole."""


def _messages(body: bytes) -> bytes:
    """Return the events of a message: its beginning, each of its blocks, and its end."""
    message = msgspec.json.decode(body, type=_Fields)
    blocks = _listed(message, "content")
    ended = {key: message[key] for key in ("stop_reason", "stop_sequence") if key in message}
    begun: dict[str, Any] = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
    for index, block in enumerate(blocks):
        events += _block_events(index, block)
    events.append({"type": "message_delta", "delta": ended, "usage": message.get("usage")})
    events.append({"type": "message_stop"})
    return b"".join([_named(event) for event in events])


def _block_events(index: int, block: _Fields) -> list[dict[str, Any]]:
    deltas: list[dict[str, Any]] = []
    start: dict[str, Any] = dict(block)
    kind = msgspec.json.decode(block["type"], type=str)
    if kind == "tool_use":
        start["input"] = {}
        deltas.append({"type": "input_json_delta", "partial_json": bytes(block["input"]).decode()})
    for field, delta in _BLOCKS.get(kind, ()):
        if field in block:
            start[field] = ""
            deltas.append({"type": delta, field: block[field]})
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


# -- both


def _listed(fields: _Fields, member: str) -> list[_Fields]:
    """Return the objects in an array. Raises DECODE_ERRORS, KeyError, and TooManyItems."""
    check_array(fields[member], member, _ITEMS_MOST)
    objects: list[_Fields] = msgspec.json.decode(fields[member], type=list[_Fields])
    return objects


def _named(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\n".encode() + _data(event)


def _data(value: Any) -> bytes:
    """Return one event with its JSON in a single line."""
    return b"data: " + msgspec.json.format(msgspec.json.encode(value), indent=-1) + b"\n\n"

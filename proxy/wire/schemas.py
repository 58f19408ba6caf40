"""The JSON that is read, as msgspec decodes it: requests, answers and events of every dialect.

Words and their decoders only; what they mean stands in the modules that read them. What is not named here is skipped
and not decoded, and what is named `Raw` stays the text that it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Raw

from proxy.model import Body, Usage

NONE = Raw()
"""What a raw member is where it is absent: told by identity."""

DECODE_ERRORS = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)
"""What a decoder here raises over bytes that are not what they claim to be."""


# --- requests


class Model(str):
    """A type of its own, so that msgspec calls `_seen_model` once for every occurrence of the key."""

    __slots__ = ()


class _Seen(threading.local):
    """Models met in the body being read; per thread, so that a body may be read in any."""

    def __init__(self) -> None:
        self.models: list[object] = []


seen = _Seen()


def _seen_model(kind: type, value: Any) -> Any:
    if kind is not Model or not isinstance(value, str):
        raise ValueError("model must be a string")
    seen.models.append(value)
    return Model(value)


class Common(msgspec.Struct, gc=False):
    """What the dialects share."""

    model: Model = Model()
    stream: bool | None = None
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
    container: Raw = NONE


class _Chat(Common, gc=False):
    messages: list[Raw] | None = None
    functions: Raw = NONE
    max_completion_tokens: Raw = NONE


class _Completion(Common, gc=False):
    prompt: Raw = NONE
    suffix: Raw = NONE


class _Responses(Common, gc=False):
    input: list[Raw] | None = None
    instructions: Raw = NONE
    prompt: Raw = NONE
    max_output_tokens: Raw = NONE
    previous_response_id: Raw = NONE
    conversation: Raw = NONE


class _ResponsesText(_Responses, gc=False):
    input: Raw = NONE  # type: ignore[assignment]


class _Messages(Common, gc=False):
    messages: list[Raw] | None = None
    system: Raw = NONE


class _Embeddings(msgspec.Struct, gc=False):
    model: Model = Model()


def _of_body(kind: type) -> Callable[[Body], Any]:
    return msgspec.json.Decoder(kind, dec_hook=_seen_model).decode


decode_chat = _of_body(_Chat)
decode_completion = _of_body(_Completion)
decode_responses = _of_body(_Responses)
decode_responses_text = _of_body(_ResponsesText)
decode_messages = _of_body(_Messages)
decode_embeddings = _of_body(_Embeddings)
decode_model = decode_embeddings


class _Options(msgspec.Struct, gc=False):
    include_usage: bool | None = None


decode_options = msgspec.json.Decoder(_Options | None).decode


class _Conversation(msgspec.Struct, gc=False):
    id: str | None = None


decode_conversation = msgspec.json.Decoder(_Conversation).decode
decode_text = msgspec.json.Decoder(str).decode


# --- content that may be a picture, a sound or a file


class Part(msgspec.Struct, gc=False):
    """A content part of any dialect, with the raw values in which its bytes may stand."""

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


decode_parts_message = msgspec.json.Decoder(_PartsMessage).decode
decode_parts = msgspec.json.Decoder(list[Part]).decode


# --- the events of a stream


class EventRead(msgspec.Struct, frozen=True, gc=False):
    """What one event says. `extra` marks the chunk that exists only because usage was asked for."""

    token: bool = False
    finished: bool = False
    error: bool = False
    extra: bool = False
    usage: Any = None
    timings: Any = None


class Delta(msgspec.Struct, gc=False):
    """What a chunk of chat adds to a choice."""

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


decode_chunk = msgspec.json.Decoder(Chunk).decode


class _ResponseObject(msgspec.Struct, gc=False):
    usage: Any = None
    error: Any = None


class ResponsesEvent(msgspec.Struct, gc=False):
    """An event of the responses surface."""

    type: str = ""
    response: _ResponseObject | None = None
    error: Any = None


decode_responses_event = msgspec.json.Decoder(ResponsesEvent).decode


class _MessageObject(msgspec.Struct, gc=False):
    usage: Any = None


class MessagesEvent(msgspec.Struct, gc=False):
    """An event of Anthropic's surface."""

    type: str = ""
    message: _MessageObject | None = None
    usage: Any = None
    error: Any = None


decode_messages_event = msgspec.json.Decoder(MessagesEvent).decode


# --- plain answers


class ResponseRead(msgspec.Struct, frozen=True, gc=False):
    """What a plain answer's body says: its usage, and whether it is an error, or not JSON, whatever its status."""

    usage: Usage | None
    error_seen: bool


class _Answer(msgspec.Struct, gc=False):
    usage: Any = None
    usageMetadata: Any = None  # noqa: N815 - Gemini's spelling
    timings: Any = None
    error: Any = None
    choices: Raw = NONE


class _ChoiceUsage(msgspec.Struct, gc=False):
    usage: Any = None


class _Made(msgspec.Struct, gc=False):
    id: str | None = None


decode_response = msgspec.json.Decoder(_Answer).decode
decode_choices = msgspec.json.Decoder(list[_ChoiceUsage] | None).decode
decode_made = msgspec.json.Decoder(_Made).decode

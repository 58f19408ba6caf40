"""Read a generation request as spans of its body; long content is never decoded, and nothing is judged that the
upstream can judge.

It knows no HTTP, no tenant and no replica. What the prefix chain is made of is decided here:

- the salt: the model, the adapter, and the arguments that change how the engine renders the *head* of the prompt
  (`reasoning_effort`, `chat_template_kwargs`, ...). Sampling never counts. `tool_choice` counts only as "none", which
  takes the tools out of the prompt. `response_format` and guided decoding do not count: vLLM and SGLang apply them to
  the sampler; the few that render them see a wrong guess corrected by the reported usage.
- the spans: tools, then messages, as their JSON text stands. An absent, null and empty `tools` are the same.

JSON is read as msgspec reads it: of duplicate keys the last wins, as in Python's json, orjson, pydantic and
nlohmann. Only `model` twice is refused, since the model decides what a client may use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body, Endpoint, Prompt, UsageRequest
from proxy.wire.media import find_media
from proxy.wire.schemas import (
    NONE,
    Common,
    decode_chat,
    decode_completion,
    decode_conversation,
    decode_embeddings,
    decode_messages,
    decode_options,
    decode_responses,
    decode_responses_text,
    decode_text,
    seen,
)
from proxy.wire.spans import span_of

MODEL_NAME_BYTES_MOST: Final = 512  # bytes; the longest names seen (paths of local models) stay under 300

CACHE_MESSAGE_BYTES_MOST: Final = 1024
"""Of the JSON text of a message that names a stored context; twice what it needs."""

_SEARCHED_BYTES: Final = 8192
"""A body up to this is searched as one, at 1 us per KB; of others only the short messages."""

_NOTHING = frozenset({b"", b"null", b"[]", b"{}"})
_NOT_APPLICABLE: Final = UsageRequest.NOT_APPLICABLE


_TEMPLATE = (
    "lora",
    "lora_path",
    "adapter",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "add_special_tokens",
    "documents",
    "mm_processor_kwargs",
    "reasoning",
    "reasoning_effort",
    "enable_thinking",
    "thinking",
)
_template_values = operator.attrgetter(*_TEMPLATE)
_NO_TEMPLATE_VALUES = (NONE,) * len(_TEMPLATE)


def read(body: Body, endpoint: Endpoint, *, model: str | None = None) -> Prompt:
    """Return the prompt of `body`, read by the dialect of `endpoint` (a generation, or embeddings).

    Args:
        body: the JSON text.
        endpoint: a generation, or embeddings.
        model: the model that the path names; it replaces the body's.

    Raises:
        BadRequest: the body cannot be read; `param` names the field. A missing model is no error: it is empty then.
    """
    prompt = _READERS[endpoint](body)
    if model is not None:
        salt = (model.encode(), *prompt.chain_salt[1:])
        prompt = msgspec.structs.replace(prompt, model=model, chain_salt=salt)
    return prompt


def first_file_id(body: Body) -> str | None:
    """Return the first `file_id` in `body`, found by a search at 0.2 ms per MB; None if there is none."""
    start = body.find(b'"file_id"')
    if start < 0:
        return None
    parts = body[start + len(b'"file_id"') : start + 600].split(b'"', 2)
    if len(parts) < 3 or parts[0].strip() != b":":
        return None
    return parts[1].decode(errors="replace")


def _read_chat(body: Body) -> Prompt:
    fields = _decoded(decode_chat, body)
    messages = fields.messages
    if messages is None:
        raise BadRequest("messages must be an array", param="messages")
    spans = [memoryview(message) for message in messages]
    if fields.tools is not NONE or fields.functions is not NONE:
        spans[:0] = _present(fields.tools, fields.functions)
    limit = fields.max_completion_tokens
    if limit is NONE:
        limit = fields.max_tokens
    return _prompt(body, fields, spans, messages, limit, names_context=_may_name_context(body, spans))


def _may_name_context(body: Body, spans: list[memoryview]) -> bool:
    """Whether a message could have the role `cache`: never wrongly no, but for a role written with escapes."""
    if len(body) <= _SEARCHED_BYTES:
        return body.find(b'"cache"') >= 0  # `in` costs four times as much
    return any(len(span) <= CACHE_MESSAGE_BYTES_MOST and bytes(span).find(b'"cache"') >= 0 for span in spans)


def _read_completion(body: Body) -> Prompt:
    fields = _decoded(decode_completion, body)
    spans = _present(fields.prompt, fields.suffix)
    return _prompt(body, fields, spans, (), fields.max_tokens)


def _read_messages(body: Body) -> Prompt:
    """Anthropic's dialect: a change of `tool_choice` keeps tools and system cached, not the messages."""
    fields = _decoded(decode_messages, body)
    if fields.messages is None:
        raise BadRequest("messages must be an array", param="messages")
    spans = _present(fields.tools, fields.system, fields.tool_choice)
    spans += map(memoryview, fields.messages)
    return _prompt(body, fields, spans, fields.messages, fields.max_tokens, always_reports=True)


def _read_responses(body: Body) -> Prompt:
    fields = _decoded_responses(body)
    spans = _present(fields.tools, fields.instructions, fields.prompt)
    items: list[Raw] = []
    if isinstance(fields.input, Raw):
        spans += _present(fields.input)
    elif fields.input:
        items = fields.input
        spans += map(memoryview, items)
    pinned = _text(fields.previous_response_id) or _conversation(fields.conversation)
    return _prompt(body, fields, spans, items, fields.max_output_tokens, pinned, always_reports=True)


def _read_embeddings(body: Body) -> Prompt:
    fields = _decoded(decode_embeddings, body)
    return Prompt(body, fields.model, False, (fields.model.encode(),), (), 0)


_READERS: dict[Endpoint, Callable[[Body], Prompt]] = {
    Endpoint.CHAT: _read_chat,
    Endpoint.COMPLETIONS: _read_completion,
    Endpoint.RESPONSES: _read_responses,
    Endpoint.MESSAGES: _read_messages,
    Endpoint.EMBEDDINGS: _read_embeddings,
}


def _prompt(
    body: Body,
    fields: Common,
    spans: list[memoryview],
    content: Iterable[Raw],
    limit: Raw,
    pinned_to: str | None = None,
    *,
    always_reports: bool = False,
    names_context: bool = False,
) -> Prompt:
    asked, options = _NOT_APPLICABLE, (0, 0)
    if fields.stream and not always_reports:
        asked, options = _usage_request(body, fields.stream_options)
    return Prompt(
        body,
        str(fields.model),
        fields.stream is True,
        _salt(fields),
        tuple(spans),
        sum([len(span) for span in spans]),
        asked,
        options,
        pinned_to,
        find_media(body, content),
        None if limit is NONE else _count(limit),
        names_context,
        () if fields.tools is NONE and fields.container is NONE else tuple(_present(fields.tools, fields.container)),
    )


def _decoded(decode: Callable[[Body], Any], body: Body) -> Any:
    """Fields of `body`, with `model` checked: there, once, not empty, not absurdly long."""
    models = seen.models
    models.clear()
    try:
        fields = decode(body)
    except msgspec.ValidationError as error:
        raise _wrong_type(error) from None
    except msgspec.DecodeError as error:
        message = "the body is empty" if not body.strip() else f"the body is not valid JSON: {error}"
        raise BadRequest(message) from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid UTF-8") from None
    if len(models) > 1:
        raise BadRequest("model is given twice", param="model")
    if models and not 0 < len(fields.model) <= MODEL_NAME_BYTES_MOST:
        raise BadRequest("model is empty or too long", param="model")
    return fields


def _decoded_responses(body: Body) -> Any:
    """`input` is mostly an array; where it is a text, the first reading stops there and a second is made."""
    try:
        return _decoded(decode_responses, body)
    except BadRequest as error:
        if error.param != "input":
            raise
    return _decoded(decode_responses_text, body)


def _wrong_type(error: msgspec.ValidationError) -> BadRequest:
    """msgspec says "Expected `bool`, got `int` - at `$.stream`": no value of the body is in it."""
    message, _, path = str(error).partition(" - at `$")
    param = path.strip("`").lstrip(".").partition("[")[0].partition(".")[0] or None
    return BadRequest(f"{param or 'the body'}: {message}", param=param)


def _salt(fields: Common) -> tuple[bytes, ...]:
    model = fields.model.encode()
    values = _template_values(fields)
    if values == _NO_TEMPLATE_VALUES and fields.tool_choice is NONE:
        return (model,)
    parts = [model]
    for name, value in zip(_TEMPLATE, values, strict=True):
        if value is not NONE and bytes(value) not in _NOTHING:
            parts += (name.encode(), bytes(value))
    if bytes(fields.tool_choice) == b'"none"':
        parts += (b"tool_choice", b"none")
    return tuple(parts)


def _present(*values: Raw) -> list[memoryview]:
    """Views of those that say something."""
    views = [memoryview(value) for value in values if value is not NONE]
    return [view for view in views if len(view) > 4 or bytes(view) not in _NOTHING]


def _usage_request(body: Body, options: Raw) -> tuple[UsageRequest, tuple[int, int]]:
    """What the body says about usage; options of a wrong type are left to the upstream's judgement."""
    if options is NONE:
        return UsageRequest.ABSENT, (0, 0)
    try:
        asked = decode_options(options)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _NOT_APPLICABLE, (0, 0)
    if asked is not None and asked.include_usage:
        return UsageRequest.ASKED, (0, 0)
    return UsageRequest.REPLACE, span_of(body, options)


def _count(value: Raw) -> int | None:
    """A positive whole number, or None for whatever else stands there: the upstream is its judge."""
    text = bytes(value)
    return int(text) if len(text) < 16 and text.isdigit() else None


def _text(value: Raw) -> str | None:
    """A non-empty string, else None."""
    try:
        return decode_text(value) or None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _conversation(value: Raw) -> str | None:
    """The id of a conversation, given as a string or as {"id": ...}."""
    if value is NONE:
        return None
    try:
        return decode_conversation(value).id or None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _text(value)

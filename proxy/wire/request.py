"""Read a generation request as spans of its body. Pure.

Long content is never decoded, and errors that the upstream can report are left to it. The content of the prefix chain
is decided here:

- The salt: the model, the adapter, the conversation that is continued, and the arguments that change how the engine
  renders the *head* of the prompt (`reasoning_effort`, `chat_template_kwargs`, ...). Sampling does not count.
  `tool_choice` is part of it only as "none", which takes the tools out of the prompt. `response_format` and guided
  decoding are left out, since vLLM and SGLang apply them to the sampler; for the few engines that render them, the
  reported usage corrects a wrong guess.
- The spans: tools, then messages, as their JSON text is in the body. Absent, null and empty `tools` are the same.

JSON is read as msgspec reads it: of duplicate keys the last one counts, as in Python's json, orjson, pydantic and
nlohmann. Only a second `model` is refused, since the model decides what a client may use.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body, Endpoint, UsageRequest
from proxy.records import Prompt
from proxy.wire.bounds import TooManyItems
from proxy.wire.json_cuts import shortened, text_with_keys
from proxy.wire.media import are_plain_text, find_media
from proxy.wire.schemas import (
    MESSAGES_MOST,
    NONE,
    Common,
    Named,
    SecondModel,
    SecondObject,
    decode_chat,
    decode_completion,
    decode_embeddings,
    decode_messages,
    decode_options,
    decode_responses,
    decode_responses_text,
    seen,
)
from proxy.wire.spans import span_of
from proxy.wire.template import CACHE_MARK
from proxy.wire.urgency import body_priority

MODEL_NAME_BYTES_MOST: Final = 512  # bytes; the longest names seen (paths of local models) are under 300

CACHE_MESSAGE_BYTES_MOST: Final = 1024
"""Longest JSON text of a message that names a stored context; twice what is needed."""

_SEARCHED_BYTES: Final = 8192
"""Longest body that is searched as a whole, at 1 us per KB; of longer ones only the short messages are searched."""

_NOTHING = frozenset({b"", b"null", b"[]", b"{}"})
_NOT_TRUE = frozenset({b"null", b"false"})
_REMOTE_TOOL: Final = b'"server_label"'
"""A key that each tool of the type `mcp` has. The upstream itself calls such a tool, which may do anything."""

_COLLECTIONS: Final = {
    "previous_response_id": "responses",
    "conversation": "conversations",
    "container": "containers",
}
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
_no_cache_values = operator.attrgetter(
    "cache_prompt", "prompt_logprobs", "logprob_start_len", "truncate_prompt_tokens"
)
_NO_NO_CACHE_VALUES = (NONE,) * 4
_UNTEMPLATED: Final = (b"template", b"none")
"""Part of the salt of a prompt that is rendered without a template; the same text as input of a response has one."""
_NO_TEMPLATE_VALUES = (NONE,) * len(_TEMPLATE)


def read(body: Body, endpoint: Endpoint, *, model: str | None = None) -> Prompt:
    """Return the prompt of `body`, read by the dialect of `endpoint` (a generation, or embeddings).

    Args:
        body: the JSON text.
        endpoint: a generation, or embeddings.
        model: the model that the path names; it replaces the body's.

    Raises:
        BadRequest: the body cannot be read; `param` names the field. A missing model is not an error: like null, it
        is read as empty.
    """
    prompt = _READERS[endpoint](body)
    if model is not None:
        salt = (model.encode(), *prompt.chain_salt[1:])
        prompt = dataclasses.replace(prompt, model=model, chain_salt=salt)
    return prompt


def first_file_id(body: Body) -> str | None:
    """Return the first `file_id` in `body`, None if there is none. The inside of long strings is not searched."""
    text = text_with_keys(body)
    start = text.find(b'"file_id"')
    if start < 0:
        return None
    parts = text[start + len(b'"file_id"') : start + 600].split(b'"', 2)
    if len(parts) < 3 or parts[0].strip() != b":":
        return None
    return parts[1].decode(errors="replace")


def _read_chat(body: Body) -> Prompt:
    fields = _decoded(decode_chat, body)
    messages = _listed(fields.messages, "messages")
    spans = [memoryview(message) for message in messages]
    tools: list[memoryview] = []
    if fields.tools is not NONE or fields.functions is not NONE:
        tools = _present(fields.tools, fields.functions)
        spans[:0] = tools
    limit = fields.max_completion_tokens
    if limit is NONE:
        limit = fields.max_tokens
    return _prompt(
        body,
        fields,
        spans,
        messages,
        limit,
        names_context=_may_name_context(body, spans),
        tool_spans=len(tools),
        has_hidden_parts=fields.web_search_options is not NONE,
        is_stored=fields.store is True,
    )


def _listed(messages: list[Raw] | None, param: str) -> list[Raw]:
    """Return the messages, or raise BadRequest if there is no list of them or it is too long."""
    if messages is None:
        raise BadRequest(f"{param} must be an array", param=param)
    if len(messages) > MESSAGES_MOST:
        raise TooManyItems(f"{param} has more than {MESSAGES_MOST} items.", param=param)
    return messages


def _may_name_context(body: Body, spans: list[memoryview]) -> bool:
    """Return False if no message has the role `cache`, except for a role written with escapes."""
    if len(body) <= _SEARCHED_BYTES:
        return body.find(b'"cache"') >= 0  # `in` takes four times as long
    return any(len(span) <= CACHE_MESSAGE_BYTES_MOST and bytes(span).find(b'"cache"') >= 0 for span in spans)


def _read_completion(body: Body) -> Prompt:
    fields = _decoded(decode_completion, body)
    spans = _present(fields.prompt, fields.suffix)
    echoes = bytes(fields.echo) == b"true"  # with log-probabilities the whole prompt is computed
    return _prompt(body, fields, spans, (), fields.max_tokens, is_templated=False, skips_cache=echoes)


def _read_messages(body: Body) -> Prompt:
    """Read Anthropic's dialect, in which a change of `tool_choice` leaves tools and system cached, not messages."""
    fields = _decoded(decode_messages, body)
    messages = _listed(fields.messages, "messages")
    tools, system = _present(fields.tools), _present(fields.system, fields.tool_choice)
    spans = [*tools, *system, *[memoryview(message) for message in messages]]
    return _prompt(
        body,
        fields,
        spans,
        messages,
        fields.max_tokens,
        always_reports=True,
        tool_spans=len(tools),
        system_spans=len(system),
        is_anthropic=True,
        has_effects=fields.mcp_servers is not NONE and bytes(fields.mcp_servers) not in _NOTHING,
    )


def _read_responses(body: Body) -> Prompt:
    fields = _decoded_responses(body)
    tools, system = _present(fields.tools), _present(fields.instructions, fields.prompt)
    spans = [*tools, *system]
    items: list[Raw] = []
    if isinstance(fields.input, Raw):
        spans += _present(fields.input)
    elif fields.input:
        items = _listed(fields.input, "input")
        spans += map(memoryview, items)
    continued = _object_id(fields.previous_response_id) or _object_id(fields.conversation)
    return _prompt(
        body,
        fields,
        spans,
        items,
        fields.max_output_tokens,
        continued,
        always_reports=True,
        has_hidden_parts=fields.prompt is not NONE,
        tool_spans=len(tools),
        system_spans=len(system),
        has_effects=(bool(tools) or fields.background is not NONE or fields.conversation is not None)
        and _response_has_effects(fields, tools),
    )


def _response_has_effects(fields: Any, tools: list[memoryview]) -> bool:
    """Return True if a response is a job that goes on without its client, adds to a conversation or calls tools.

    That it is stored, as nearly all are, is no such effect: nobody learns the id of one whose answer did not come.
    """
    if fields.background is not NONE and bytes(fields.background) not in _NOT_TRUE:
        return True
    return fields.conversation is not None or any(bytes(each).find(_REMOTE_TOOL) >= 0 for each in tools)


def _read_embeddings(body: Body) -> Prompt:
    fields = _decoded(decode_embeddings, body)
    return Prompt(body, str(fields.model), stream=False, chain_salt=(fields.model.encode(),), spans=(), size_bytes=0)


_READERS: dict[Endpoint, Callable[[Body], Prompt]] = {
    Endpoint.CHAT: _read_chat,
    Endpoint.COMPLETIONS: _read_completion,
    Endpoint.RESPONSES: _read_responses,
    Endpoint.MESSAGES: _read_messages,
    Endpoint.EMBEDDINGS: _read_embeddings,
}


def _prompt(  # noqa: PLR0913 - one keyword per difference between the dialects
    body: Body,
    fields: Common,
    spans: list[memoryview],
    content: Sequence[Raw],
    limit: Raw,
    pinned_to: str | None = None,
    *,
    always_reports: bool = False,
    names_context: bool = False,
    has_hidden_parts: bool = False,
    is_stored: bool = False,
    has_effects: bool = False,
    tool_spans: int = 0,
    system_spans: int = -1,
    is_anthropic: bool = False,
    is_templated: bool = True,
    skips_cache: bool = False,
) -> Prompt:
    """Build the prompt from the fields that all dialects share; `content` are its messages or input items."""
    asked, options = _NOT_APPLICABLE, (0, 0)
    if fields.stream is True and not always_reports:
        asked, options = _usage_request(body, fields.stream_options)
    referring: tuple[memoryview, ...] = ()
    if fields.tools is not NONE:
        referring = tuple(_present(fields.tools))
    names: tuple[tuple[str, str], ...] = ()
    if seen.objects:
        names = _names(fields)
        has_effects = has_effects or any(kind == "containers" for kind, _ in names)  # in which tools leave files
    salt = _salt(fields) if is_templated else (*_salt(fields), *_UNTEMPLATED)
    is_plain_text = are_plain_text(body, content)
    return Prompt(
        body,
        str(fields.model),
        stream=fields.stream is True,
        chain_salt=salt if pinned_to is None else (*salt, b"continues", pinned_to.encode()),
        spans=tuple(spans),
        size_bytes=sum([len(span) for span in spans]),
        usage_request=asked,
        stream_options_span=options,
        pinned_to=pinned_to,
        media=() if is_plain_text else find_media(body, content),
        max_output_tokens=None if limit is NONE else _count(limit),
        may_name_context=names_context,
        referring=referring,
        names=names,
        has_hidden_parts=has_hidden_parts,
        is_stored=is_stored,
        has_effects=has_effects,
        skips_cache=skips_cache or _skips_cache(fields),
        cache_key=b"" if fields.prompt_cache_key is NONE else _cache_key(fields.prompt_cache_key),
        priority=body_priority(fields.service_tier, fields.priority),
        tool_spans=tool_spans,
        system_spans=system_spans,
        is_anthropic=is_anthropic,
        is_plain_text=is_plain_text and system_spans <= 0,
        cache_marks=seen.cache_marks,
    )


def _skips_cache(fields: Common) -> bool:
    """Return True if the engine computes the whole prompt although it may have it cached.

    Its cached tokens then show nothing. The reasons: llama.cpp's `cache_prompt: false`; log-probabilities of the
    prompt (vLLM, SGLang); a prompt truncated on its left.
    """
    values = _no_cache_values(fields)
    if values == _NO_NO_CACHE_VALUES:
        return False
    cache_prompt, prompt_logprobs, start, truncate = values
    return (
        bytes(cache_prompt) == b"false"
        or bytes(prompt_logprobs) not in _NOTHING
        or bytes(start) not in (b"", b"null", b"-1")
        or bytes(truncate) not in _NOTHING
    )


def _decoded(decode: Callable[[Body], Any], body: Body) -> Any:
    """Decode the fields of `body`, and check that `model` is given at most once and not too long."""
    short = shortened(body)
    if short is None:
        return _decoded_text(decode, body)
    try:
        fields = _decoded_text(decode, short.text)
    except BadRequest:
        return _decoded_text(decode, body)  # for an error about the text that the client has sent
    short.restore(fields, NONE)
    return fields


def _decoded_text(decode: Callable[[Body], Any], body: Body) -> Any:
    models = seen.models
    models.clear()
    if seen.objects:
        seen.objects.clear()
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
    except SecondModel:
        raise BadRequest("model is given twice", param="model") from None
    except SecondObject as error:
        raise _second(error.member) from None
    seen.cache_marks = body.count(CACHE_MARK)
    if models and len(fields.model) > MODEL_NAME_BYTES_MOST:
        raise BadRequest("model is too long", param="model")
    return fields


def _decoded_responses(body: Body) -> Any:
    """Decode a body whose `input` is mostly an array; if it is a string, the body is decoded a second time."""
    try:
        return _decoded(decode_responses, body)
    except BadRequest as error:
        if error.param != "input" or isinstance(error, TooManyItems):
            raise
    return _decoded(decode_responses_text, body)


def _wrong_type(error: msgspec.ValidationError) -> BadRequest:
    """Split msgspec's message, "Expected `bool`, got `int` - at `$.stream`", which contains no value of the body."""
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
    """Return views of the values that are not empty."""
    views = [memoryview(value) for value in values if value is not NONE]
    return [view for view in views if len(view) > 4 or bytes(view) not in _NOTHING]


def _usage_request(body: Body, options: Raw) -> tuple[UsageRequest, tuple[int, int]]:
    """Return whether the body asks for usage; options of a wrong type are left for the upstream to judge."""
    if options is NONE:
        return UsageRequest.ABSENT, (0, 0)
    try:
        asked = decode_options(options)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _NOT_APPLICABLE, (0, 0)
    if asked is not None and asked.include_usage:
        return UsageRequest.ASKED, (0, 0)
    if not _is_utf8(options):  # unread members may contain anything, and the options are written again
        return _NOT_APPLICABLE, (0, 0)
    return UsageRequest.REPLACE, span_of(body, options)


def _is_utf8(value: Raw) -> bool:
    try:
        bytes(value).decode()
    except UnicodeDecodeError:
        return False
    return True


def _cache_key(value: Raw) -> bytes:
    """Return `prompt_cache_key` as raw JSON; empty if it is null, an empty string or no string."""
    text = bytes(value)
    return text if len(text) > 2 and text[:1] == b'"' else b""


def _count(value: Raw) -> int | None:
    """Return a positive whole number, or None for anything else, which the upstream will judge."""
    text = bytes(value)
    return int(text) if len(text) < 16 and text.isdigit() else None


def _object_id(named: Named | None) -> str | None:
    return None if named is None else named.object_id


def _names(fields: Common) -> tuple[tuple[str, str], ...]:
    """Return the objects that the body continues or uses, as (collection, id).

    Raises BadRequest if a member is given twice, the second time as null.
    """
    found: list[tuple[str, str]] = []
    for member, object_id in seen.objects.items():
        if getattr(fields, member, None) is None:
            raise _second(member)
        if object_id:
            found.append((_COLLECTIONS[member], object_id))
    return tuple(found)


def _second(member: str) -> BadRequest:
    return BadRequest(f"{member} is given twice", param=member)

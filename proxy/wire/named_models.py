"""Find the models that a body names, for every kind of path. Pure.

For a client that may use every model, the one model that routes the request is enough. For a limited client all
models are collected that the body can make the upstream use, and a body that cannot be read in full is refused.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec

from proxy.errors import BadRequest
from proxy.model import Body
from proxy.wire import multipart
from proxy.wire.bounds import TooManyItems, check_array, check_values
from proxy.wire.schemas import (
    DECODE_ERRORS,
    SecondModel,
    TooManyMembers,
    decode_members,
    decode_model,
    decode_raw_list,
    seen,
)

_BATCH_REQUESTS_MOST: Final = 100_000  # of one batch of messages: Anthropic's limit
_OTHER_NAMES: Final = frozenset(
    {
        "adapter", "adapter_id", "adapters", "agent_id", "deployment", "deployment_id", "engine", "lora", "lora_id",
        "lora_name", "lora_path", "preset",
    }
)  # fmt: skip
"""Fields that choose a model in another way: an adapter (which changes the named model), an agent (which has one), a
deployment, or a gateway's preset.
"""

_CONTENT: Final = frozenset(
    {
        "chat_template_kwargs", "documents", "functions", "input", "inputs", "instructions", "items", "messages",
        "metadata", "mm_processor_kwargs", "prompt", "query", "suffix", "system", "texts", "user",
    }
)  # fmt: skip
"""Top-level fields that hold text, a conversation or the variables of a template, and name no model."""

_SCHEMAS: Final = frozenset(
    {
        "function", "guided_json", "input_examples", "input_schema", "json_schema", "parameters", "properties",
        "response_schema", "schema", "structured_outputs",
    }
)  # fmt: skip
"""Fields whose keys are the client's own: `model` in them is the name of an argument."""

_IMAGES: Final = "image_generation"
"""The hosted tool that runs a model chosen by the upstream if it names none."""

_CHARSET = re.compile(rb"""charset\s*=\s*["']?([^"';\s]*)""", re.IGNORECASE)
_UTF8: Final = frozenset({b"utf-8", b"utf8", b"us-ascii", b"ascii"})
_WITH_ASCII: Final = _UTF8 | {b"iso-8859-1", b"latin1", b"windows-1252"}
_ESCAPE: Final = b"\\u00"  # an escape could hide a letter of a key
_MARKS: Final = (
    b"model",
    b"fallback",
    b"adapter",
    b"agent_id",
    b"lora",
    b"deployment",
    b"engine",
    b"preset",
    b"image",
    _ESCAPE,
)


def model_of(body: Body, content_type: bytes) -> str | None:
    """Return the model that `body` (JSON, or a form) names, None if it names none or cannot be read.

    Raises:
        BadRequest: `model` is given twice, so that the upstream might read the other one.
    """
    if not multipart.is_form(content_type):
        return _json_model(body)
    try:
        values = [field.value for field in multipart.fields(body, content_type) if field.name == "model"]
    except multipart.UnreadableForm:
        return None
    if len(values) > 1:
        raise BadRequest("model is given twice", param="model")
    try:
        return str(values[0], "utf-8").strip() or None if values else None
    except UnicodeDecodeError:
        return None


def _json_model(body: Body) -> str | None:
    seen.models.clear()
    try:
        model = decode_model(body).model
    except DECODE_ERRORS:
        return None
    except SecondModel:
        raise BadRequest("model is given twice", param="model") from None
    return str(model) or None


def further_models(body: Body, content_type: bytes) -> list[str] | None:
    """Return every model that a body names: `model`, fallbacks, adapters, and the models of hosted tools.

    Keys are found in any letter case, since some servers ignore it, and at any depth outside of prompts and schemas.
    None if the body cannot be read, since it might name any model.
    """
    if (charset := _CHARSET.search(content_type)) is not None and charset[1].lower() not in _UTF8:
        return None  # some servers decode JSON by it: in UTF-7 ASCII text may name other members
    if multipart.is_form(content_type):
        return _form_models(body, content_type)
    try:
        found: list[str] = []
        for key, value in decode_members(body).items():
            folded = key.casefold()
            if folded == "model" and key != "model":
                return None
            if folded not in _CONTENT and (_names_models(folded) or _may_name_models(bytes(value))):
                check_values(bytes(value))
                _collect(found, {key: msgspec.json.decode(value)})
    except (*DECODE_ERRORS, TooManyMembers, _Unreadable):
        return None
    return found


def hides_names(content_type: bytes) -> bool:
    """Return True if a body of this type has a charset in which ASCII text may mean something else, such as UTF-7."""
    charset = _CHARSET.search(content_type)
    return charset is not None and charset[1].lower() not in _WITH_ASCII


def query_models(target: str) -> list[str]:
    """Return the models that the query of a request target names, whether `;` separates parameters or not."""
    query = target.partition("?")[2]
    pairs = parse_qsl(query) + (parse_qsl(query, separator=";") if ";" in query else [])
    return [value for key, value in pairs if _names_models(key.casefold())]


class _Unreadable(ValueError):
    """A field that names models has a value of an unknown form."""


def _form_models(body: Body, content_type: bytes) -> list[str] | None:
    try:
        named = [
            field.value for field in multipart.fields(body, content_type) if _names_models(field.name.casefold())
        ]
        return [str(value, "utf-8").strip() for value in named]
    except (multipart.UnreadableForm, UnicodeDecodeError):
        return None


def _names_models(folded: str) -> bool:
    """Return True if the value of a key (in lower case) names models."""
    return "model" in folded or "fallback" in folded or folded in _OTHER_NAMES


def _may_name_models(text: bytes) -> bool:
    """Return True if JSON text may contain such a key, in a fiftieth of the time that decoding it takes."""
    folded = text.lower()
    return any(each in folded for each in _MARKS)


def _collect(found: list[str], value: Any) -> None:
    """Add the models that a decoded value names, without recursion. Raises _Unreadable."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list):
            waiting += [member for member in each if isinstance(member, (dict, list))]
        elif isinstance(each, dict):
            for key, member in each.items():
                folded = key.casefold()
                if folded == "tools" and _draws_with_any_model(member):
                    raise _Unreadable
                if _names_models(folded):
                    found += _names(member)
                elif folded not in _SCHEMAS and isinstance(member, (dict, list)):
                    waiting.append(member)


def _draws_with_any_model(tools: Any) -> bool:
    each_tool = tools if isinstance(tools, list) else []
    return any(isinstance(tool, dict) and _draws_with_a_model_unnamed(tool) for tool in each_tool)


def _draws_with_a_model_unnamed(tool: dict[str, Any]) -> bool:
    """Return True for a tool that draws, for some servers only if they ignore the letter case of keys."""
    draws = any(value == _IMAGES and key.casefold() == "type" for key, value in tool.items())
    return draws and not tool.get("model")


def _names(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(name, str) for name in values):
        raise _Unreadable
    return values


def models_of_request(request: Any) -> set[str] | None:
    """Return every model of one decoded request; None if it names none, or has fields that could name others."""
    models: set[str] = set()
    return models if _add_models(models, request) else None


def batch_request_models(body: Body) -> set[str] | None:
    """Return every model of a `messages/batches` body, None if one of its requests cannot be read."""
    models: set[str] = set()
    try:
        batch = decode_members(body)
        if _is_in_other_case(batch, "requests"):
            return None
        check_array(batch["requests"], "requests", _BATCH_REQUESTS_MOST)
        for each in decode_raw_list(batch["requests"]):  # one by one, so that other threads can run
            check_values(bytes(each))
            request = msgspec.json.decode(each)
            if _is_in_other_case(request, "params") or not _add_models(models, request.get("params")):
                return None
    except (*DECODE_ERRORS, TooManyItems, TooManyMembers, AttributeError, KeyError):
        return None
    return models


def _is_in_other_case(value: Any, name: str) -> bool:
    """Return True if an object has a key that is `name` for servers that ignore letter case, but not for others."""
    members = value if isinstance(value, dict) else {}
    return any(key != name and key.casefold() == name for key in members)


def _add_models(models: set[str], request: Any) -> bool:
    """Add the models of one decoded request; False if it names none, or has fields that could name others."""
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        return False
    found: list[str] = []
    for key, value in request.items():
        if key != "model" and key.casefold() == "model":
            return False
        if key.casefold() not in _CONTENT:
            try:
                _collect(found, {key: value})
            except _Unreadable:
                return False
    models.update(found)
    return True

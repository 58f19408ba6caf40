"""Find the models that a body names, in every form in which paths take them. Pure.

For a client that may use every model, the one model that routes the request is enough. For a limited client all
models that the body can make the upstream use are collected; a body that cannot be read in full is not accepted then.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw

from proxy.errors import BadRequest
from proxy.model import Body
from proxy.wire import multipart
from proxy.wire.schemas import DECODE_ERRORS, decode_model, seen

_BATCH_LINES_MOST: Final = 50_000  # requests of one batch, the providers' own limit
_FALLBACKS: Final = ("models", "fallbacks", "fallback_models")
"""Fields in which gateways accept further models, tried if the first fails."""


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
    if len(seen.models) > 1:
        raise BadRequest("model is given twice", param="model")
    return str(model) or None


def further_models(body: Body, content_type: bytes) -> list[str] | None:
    """Return the models that a JSON body names beside `model`: fallbacks, and `model` in other letter case.

    Some servers ignore the case of keys. None if the body cannot be read, so that it might name any. A form has none.
    """
    if multipart.is_form(content_type):
        return []
    try:
        top = msgspec.json.decode(body, type=dict[str, Raw])
        found: list[str] = []
        for key, value in top.items():
            if key != "model" and key.casefold() == "model":
                return None
            if key.casefold() in _FALLBACKS and bytes(value) != b"null":
                found += msgspec.json.decode(value, type=list[str])
    except DECODE_ERRORS:
        return None
    return found


def is_batch_input(body: Body, content_type: bytes) -> bool | None:
    """Return True if an uploaded form is the input of a batch, None if that cannot be read."""
    try:
        purposes = {bytes(field.value) for field in multipart.fields(body, content_type) if field.name == "purpose"}
    except multipart.UnreadableForm:
        return None
    return purposes == {b"batch"} if len(purposes) <= 1 else None


def batch_file_models(body: Body, content_type: bytes) -> set[str] | None:
    """Return every model of the batch requests in an uploaded form's files, None if one of them cannot be read."""
    models: set[str] = set()
    try:
        for field in multipart.fields(body, content_type):
            if field.name != "file":
                continue
            lines = bytes(field.value).splitlines()
            if len(lines) > _BATCH_LINES_MOST:
                return None
            for line in filter(bytes.strip, lines):
                if not _add_models(models, msgspec.json.decode(line).get("body")):
                    return None
    except (*DECODE_ERRORS, multipart.UnreadableForm, AttributeError):
        return None
    return models


def batch_request_models(body: Body) -> set[str] | None:
    """Return every model of a `messages/batches` body, None if one of its requests cannot be read."""
    models: set[str] = set()
    try:
        requests = msgspec.json.decode(body)["requests"]
        if not all(_add_models(models, request.get("params")) for request in requests):
            return None
    except (*DECODE_ERRORS, AttributeError, TypeError, KeyError):
        return None
    return models


def _add_models(models: set[str], request: Any) -> bool:
    """Add the models of one decoded request; False if it names none, or has fields that could name others."""
    if not isinstance(request, dict) or not isinstance(request.get("model"), str):
        return False
    for key, value in request.items():
        if key != "model" and key.casefold() == "model":
            return False
        if key.casefold() in _FALLBACKS and value is not None:
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                return False
            models.update(value)
    models.add(request["model"])
    return True

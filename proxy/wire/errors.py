"""Turn a CairnError into the response that a client reads: in OpenAI's error format, or Anthropic's on its path."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from proxy.errors import CairnError
from proxy.model import Endpoint

_JSON = (b"content-type", b"application/json")
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ErrorResponse(msgspec.Struct, frozen=True, gc=False):
    """A whole response. `headers` excludes `content-length` and the headers that every response gets."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


def error_response(error: CairnError, endpoint: Endpoint, *, request_id: str = "") -> ErrorResponse:
    """Return the response for `error`, to be sent if nothing was sent before."""
    headers = [_JSON]
    if error.retry_after_seconds is not None:
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_seconds))))
    if error.status == 426:
        headers += [(b"connection", b"upgrade"), (b"upgrade", b"HTTP/1.1")]  # required with it (RFC 9110, 15.5.22)
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    body = _anthropic(error, request_id) if endpoint is Endpoint.MESSAGES else {"error": _openai(error)}
    return ErrorResponse(error.status, tuple(headers), msgspec.json.encode(body))


def error_event(error: CairnError, endpoint: Endpoint, *, mid_event: bool = False, request_id: str = "") -> bytes:
    """Return the event that ends a broken stream; `mid_event` if the client got only part of the event before."""
    if endpoint is Endpoint.MESSAGES:
        name, body = b"event: error\n", _anthropic(error, request_id)
    elif endpoint is Endpoint.RESPONSES:
        name = b"event: error\n"
        body = {"type": "error", "code": error.code or error.type, "message": error.message, "param": error.param}
    else:
        name, body = b"", {"error": _openai(error)}
    return (b"\n\n" if mid_event else b"") + name + b"data: " + msgspec.json.encode(body) + b"\n\n"


def _openai(error: CairnError) -> dict[str, Any]:
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def _anthropic(error: CairnError, request_id: str) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error")
    body: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": error.message}}
    if request_id:
        body["request_id"] = request_id
    return body

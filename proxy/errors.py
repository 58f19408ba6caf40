"""The taxonomy of what goes wrong: whose fault, which status, whether to try again.

Foreign exceptions (sockets, TLS, parsers) are mapped to these once, at the edge where they arise. OpenAI's error
shape is made of them in one place, `proxy.wire.errors`.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

REASON_PHRASES: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
"""Reason phrases of HTTP by status."""


class CairnError(Exception):
    """Base of all. `message` is safe to show: it never holds a prompt, a key or a path of the machine."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code
        self.retry_after_seconds = retry_after_seconds


class InternalError(CairnError):
    """A defect of Cairn's own; the log has it."""

    code = "internal_error"


class ConfigError(CairnError):
    """The configuration cannot be used; `param` is the path of the offending key, such as `$.pools[0].name`."""


class ClientError(CairnError):
    """The request cannot be served as it is."""

    status = 400
    type = "invalid_request_error"


class BadRequest(ClientError):
    """Malformed: `param` names the field."""


class Unauthorized(ClientError):
    """No key, or one that no client has."""

    status = 401
    type = "invalid_authentication_error"
    code = "invalid_api_key"


class Forbidden(ClientError):
    """A known client asks for what it may not have."""

    status = 403
    type = "permission_denied_error"


class NotFound(ClientError):
    """Unknown model, path or object; another tenant's object looks the same."""

    status = 404
    code = "model_not_found"


class UnknownObject(NotFound):
    """The client has created no such file, response or batch; one that another client created looks the same."""

    code = "object_not_found"


class ContextNotFound(NotFound):
    """No such stored context or tag with this tenant, whoever else may have one."""

    type = "resource_not_found_error"
    code = "context_not_found"


class RequestTimeout(ClientError):
    """The client did not finish sending."""

    status = 408
    type = "timeout_error"


class TooLarge(ClientError):
    """The body exceeds `max_body_bytes`."""

    status = 413
    code = "request_too_large"


class UpgradeRefused(ClientError):
    """A client asks for a WebSocket; the same endpoint answers over HTTP."""

    status = 426
    code = "websocket_not_supported"


class RateLimited(ClientError):
    """A bound on concurrent or waiting work is reached."""

    status = 429
    type = "rate_limit_reached_error"
    code = "rate_limit_exceeded"


class QuotaExceeded(ClientError):
    """A budget or quota of stored contexts is full, and nothing may be discarded for it."""

    status = 429
    type = "exceeded_current_quota_error"
    code = "context_quota_exceeded"


class ContextsAway(CairnError):
    """Redis is away, and with it stored contexts that this worker has not in memory."""

    status = 503
    code = "contexts_unavailable"


class ContextDamaged(CairnError):
    """What is stored of a context is not what was uploaded; nothing of it is used."""

    code = "context_damaged"


class Overloaded(CairnError):
    """No replica can take the request now."""

    status = 503
    type = "server_error"
    code = "no_upstream_available"


class UpstreamError(CairnError):
    """The upstream failed. `reason` is a closed label; `before_answer` says that no byte of an answer came."""

    status = 502
    type = "upstream_error"
    reason = "error"
    before_response = True


class ConnectFailed(UpstreamError):
    """Refused, unreachable, or the name does not resolve."""

    reason = "connect"
    code = "upstream_unreachable"


class ConnectTimeout(ConnectFailed):
    """No connection within the limit."""

    reason = "connect_timeout"


class TlsFailed(ConnectFailed):
    """The certificate or the handshake is not acceptable."""

    reason = "tls"
    code = "upstream_tls"


class PoolTimeout(UpstreamError):
    """No connection of the bounded pool became free in time."""

    reason = "pool_timeout"
    status = 503


class ResetBeforeResponse(UpstreamError):
    """The connection ended before the first byte of the answer. `reused` tells that it came from the pool."""

    reason = "reset_before_answer"
    code = "upstream_reset"

    def __init__(self, message: str, *, reused: bool = False) -> None:
        super().__init__(message)
        self.reused = reused


class FirstByteTimeout(UpstreamError):
    """No answer began within the limit."""

    status = 504
    reason = "first_byte_timeout"
    code = "upstream_timeout"


class BadResponse(UpstreamError):
    """What came is not HTTP that can be trusted (framing, oversized head)."""

    reason = "bad_answer"
    code = "upstream_protocol"


class ResetMidResponse(UpstreamError):
    """The connection ended inside the answer's body."""

    reason = "reset_mid_answer"
    code = "upstream_reset"
    before_response = False


class IdleTimeout(UpstreamError):
    """The answer's body stood still for longer than the limit."""

    status = 504
    reason = "idle_timeout"
    code = "upstream_timeout"
    before_response = False

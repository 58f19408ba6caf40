"""Every error: the HTTP status, the type and code in OpenAI's error format, and whether to retry. Pure.

Exceptions of other libraries (sockets, TLS, parsers) are mapped to these once, where they arise. `proxy.wire.errors`
writes the error format.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

REASON_PHRASES: Final = {status.value: status.phrase.encode() for status in HTTPStatus}
"""Reason phrases of HTTP by status."""

PROBLEMS_AT_MOST: Final = 20  # of a configuration, in one error
TEXT_AT_MOST: Final = 1_000  # characters of a path of a setting, and of what is wrong with it


class CairnError(Exception):
    """Base of all errors. `message` can be shown to anyone: it contains no prompt, key or path of the machine."""

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
    """A defect of Cairn; the log has the details."""

    code = "internal_error"


class ConfigError(CairnError):
    """The configuration cannot be used.

    `problems` lists what was found, or the first of very many: the path of a setting, such as `$.pools[0].name`, and
    a text. `lines` has a line for each of them, and one with the number of the others if not all are listed. `param`
    is the path of the first one; it is None if the configuration could not be read at all.
    """

    problems: Sequence[tuple[str, str]] = ()
    lines: Sequence[str] = ()

    @property
    def is_in_file(self) -> bool:
        """True if the first problem is a setting, and not the file as a whole or a variable."""
        return self.param is not None and self.param.startswith("$")

    @classmethod
    def of(cls, problems: Sequence[tuple[str, str]]) -> ConfigError:
        """Make an error of at least one problem. It is bounded: each of a thousand lines may have a mistake."""
        shown = [(shortened(path), shortened(text)) for path, text in problems[:PROBLEMS_AT_MOST]]
        lines = [f"{path}: {text}" for path, text in shown]
        if left_out := len(problems) - len(shown):
            lines.append(f"and {left_out:,} more problems" if left_out > 1 else "and one more problem")
        error = cls("; ".join(lines), param=shown[0][0])
        error.problems, error.lines = shown, lines
        return error


def shortened(text: str) -> str:
    """Return `text`, or its beginning if it is very long: names in a file may have any length."""
    return text if len(text) <= TEXT_AT_MOST else text[: TEXT_AT_MOST - 1] + "…"


class ClientError(CairnError):
    """The request cannot be served as it is."""

    status = 400
    type = "invalid_request_error"


class BadRequest(ClientError):
    """The request is malformed; `param` names the field."""


class TargetTooLong(BadRequest):
    """The target of the request has more bytes than are read."""

    status = 414
    code = "bad_path"


class Unauthorized(ClientError):
    """There is no key, or no client has this key."""

    status = 401
    type = "invalid_authentication_error"
    code = "invalid_api_key"


class Forbidden(ClientError):
    """The client may not do this."""

    status = 403
    type = "permission_denied_error"


class NotFound(ClientError):
    """The model, path or object is unknown; another tenant's object looks the same."""

    status = 404
    code = "model_not_found"


class UnknownObject(NotFound):
    """The client's tenant has created no such file, response or batch; one of another tenant looks the same."""

    code = "object_not_found"


class ContextNotFound(NotFound):
    """This tenant has no such stored context or tag."""

    type = "resource_not_found_error"
    code = "context_not_found"


class RequestTimeout(ClientError):
    """The client did not send the whole request in time."""

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
    """A limit on concurrent or waiting requests is reached."""

    status = 429
    type = "rate_limit_reached_error"
    code = "rate_limit_exceeded"


class TooManySessions(RateLimited):
    """A new session would wait for a replica for too long; its place in the order is kept."""


class QuotaExceeded(ClientError):
    """A budget or quota of stored contexts is used up, and nothing may be discarded."""

    status = 429
    type = "exceeded_current_quota_error"
    code = "context_quota_exceeded"


class ContextsAway(CairnError):
    """Redis is not available, and this worker does not have the stored context in memory."""

    status = 503
    code = "contexts_unavailable"


class ContextDamaged(NotFound):
    """The stored content of a context differs from what was uploaded; none of it is used.

    Like a context that is gone, it has to be uploaded again; the request would fail again.
    """

    type = "resource_not_found_error"
    code = "context_damaged"


class Overloaded(CairnError):
    """No replica can take the request at the moment."""

    status = 503
    type = "server_error"
    code = "no_upstream_available"


class TurnedAway(CairnError):
    """The replica for which a request waits is not used any more: the request is planned again. No client gets it."""

    status = 503
    type = "server_error"


class DeadlineUnreachable(CairnError):
    """The client's own deadline passes before the first token could come."""

    status = 504
    type = "timeout_error"
    code = "deadline_unreachable"


class UpstreamError(CairnError):
    """The upstream failed. `reason` is a metric label; `before_response`: no part of the response had arrived."""

    status = 502
    type = "upstream_error"
    reason = "error"
    before_response = True


class ConnectFailed(UpstreamError):
    """The connection is refused, the host unreachable, or its name does not resolve."""

    reason = "connect"
    code = "upstream_unreachable"


class ConnectTimeout(ConnectFailed):
    """No connection was made in time."""

    reason = "connect_timeout"


class TlsFailed(ConnectFailed):
    """The certificate or the handshake is not acceptable."""

    reason = "tls"
    code = "upstream_tls"


class PoolTimeout(UpstreamError):
    """No connection of the pool became free in time."""

    reason = "pool_timeout"
    status = 503


class ResetBeforeResponse(UpstreamError):
    """The connection ended before the response began. `reused`: it had carried other requests before."""

    reason = "reset_before_answer"
    code = "upstream_reset"

    def __init__(self, message: str, *, reused: bool = False) -> None:
        super().__init__(message)
        self.reused = reused


class FirstByteTimeout(UpstreamError):
    """No response began in time."""

    status = 504
    reason = "first_byte_timeout"
    code = "upstream_timeout"


class BadResponse(UpstreamError):
    """The response is not valid HTTP, or its head is too large."""

    reason = "bad_answer"
    code = "upstream_protocol"


class ResetMidResponse(UpstreamError):
    """The connection ended within the response's body."""

    reason = "reset_mid_answer"
    code = "upstream_reset"
    before_response = False


class IdleTimeout(UpstreamError):
    """The response made no progress for longer than the limit."""

    status = 504
    reason = "idle_timeout"
    code = "upstream_timeout"
    before_response = False

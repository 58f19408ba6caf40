"""Errors of HTTP itself: a request that is invalid, arrives too slowly, or exceeds a limit.

Messages are constants, so that no answer repeats bytes that a client sent.
"""

from __future__ import annotations

import enum

from proxy.errors import ClientError


class BadHttp(enum.StrEnum):
    """Why a connection's input was refused; the label of `cairn_client_errors_total`."""

    REQUEST_LINE = "request_line"
    VERSION = "version"
    HEADER = "header"
    HEAD_SIZE = "head_size"
    HEAD_LATE = "head_late"
    HOST = "host"
    CONTENT_LENGTH = "content_length"
    TRANSFER_ENCODING = "transfer_encoding"
    EXPECT = "expect"
    TUNNEL = "tunnel"
    CHUNK = "chunk"
    TRAILER = "trailer"
    BODY_SIZE = "body_size"
    BODY_LATE = "body_late"
    READ_LATE = "read_late"  # the client stopped reading its answer


class ClientLimit(enum.StrEnum):
    """A bound of the client port that was reached; the label of `cairn_client_refused_total`."""

    CONNECTIONS = "connections"
    CONNECTIONS_PER_ADDRESS = "connections_per_address"
    HEAD_BYTES = "head_bytes"
    BODY_BYTES = "body_bytes"


class ProtocolError(ClientError):
    """The input is not a request that can be answered; the connection closes after the error."""

    code = "invalid_http"

    def __init__(self, reason: BadHttp, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.reason = reason
        self.status = status

    def __reduce__(self) -> tuple[type[ProtocolError], tuple[BadHttp, str, int]]:
        """Support copying, for which an exception by default calls `__init__` with the message alone."""
        return ProtocolError, (self.reason, self.message, self.status)


class ClientStalled(ConnectionResetError):
    """The client read nothing of its answer for `write_seconds`, so its connection was aborted."""

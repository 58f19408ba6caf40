"""Errors of the cache. No foreign exception leaves `cache`: `cache.store.redis_errors` maps each one to these.

None of them may reach a client, unless it asked for a stored context.
"""

from __future__ import annotations

import enum


class ErrorKind(enum.StrEnum):
    """Why an operation on Redis failed. The value is the metric label."""

    TIMEOUT = "timeout"  # no reply within the limit, or no free connection
    CONNECTION = "connection"  # refused, reset, unknown name, TLS, a Cluster that does not serve the slot
    OOM = "oom"
    READONLY = "readonly"
    MISCONF = "misconf"  # Redis cannot write its files, for example because the disk is full
    NOREPLICAS = "noreplicas"
    LOADING = "loading"
    BUSY = "busy"  # a script of another client blocks Redis
    WRONGTYPE = "wrongtype"
    AUTH = "auth"
    NOSCRIPT = "noscript"
    CORRUPT = "corrupt"
    OTHER = "other"


class CacheError(Exception):
    """Base class. `kind` is the label of its counter. The message contains no key, value or credential."""

    kind = ErrorKind.OTHER

    def __init__(self, message: str, kind: ErrorKind | None = None) -> None:
        super().__init__(message)
        if kind is not None:
            self.kind = kind


class StoreUnavailable(CacheError):
    """Redis does not serve any command now, or the breaker is open. Nothing was done."""

    kind = ErrorKind.CONNECTION


class StoreTimeout(StoreUnavailable):
    """No reply within the limit, or no free connection in the pool. The operation may or may not have been done."""

    kind = ErrorKind.TIMEOUT


class WritesRefused(CacheError):
    """Redis serves reads and refuses all writes. Nothing was written; a later attempt may succeed."""


class StoreFull(WritesRefused):
    """Redis has reached its memory limit."""

    kind = ErrorKind.OOM


class StoreReadOnly(WritesRefused):
    """The server is a replica, as after a failover. A new connection is opened next, to find the master."""

    kind = ErrorKind.READONLY


class StoreRefused(CacheError):
    """Redis refused this command: wrong type, unknown command, an error in a script."""


class StoreCorrupt(CacheError):
    """Stored bytes are damaged, truncated, of another version, or hold values that Cairn does not write."""

    kind = ErrorKind.CORRUPT


class UnknownContext(CacheError):
    """This tenant has no such context or tag. Another tenant may have one."""


class QuotaFull(CacheError):
    """A budget or quota of stored contexts is reached and nothing may be discarded. The message names it."""


class PinRefused(CacheError):
    """This tenant may not pin contexts yet, since its key is unchecked."""


class PastExpiry(CacheError):
    """The requested expiry is in the past, by Redis's clock."""


class StoreUrlError(CacheError):
    """The URL of the store cannot be used. The message gives the reason."""


class EmbeddedError(CacheError):
    """The private Valkey cannot be started. The message says what to do, in one line."""

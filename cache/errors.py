"""What goes wrong in the memory of the proxy. Knows nothing of HTTP, nor of any library's exceptions.

Foreign exceptions become one of these once, in `cache.store.store`. None of them may reach a client, unless it asked
for a stored context.
"""

from __future__ import annotations

import enum


class ErrorKind(enum.StrEnum):
    """What a failed operation on Redis is counted as; the value is the metric label."""

    TIMEOUT = "timeout"  # no answer within the limit, or no free connection
    CONNECTION = "connection"  # refused, reset, name unknown, TLS, Cluster without the slot
    OOM = "oom"
    READONLY = "readonly"
    LOADING = "loading"
    WRONGTYPE = "wrongtype"
    AUTH = "auth"
    NOSCRIPT = "noscript"
    CORRUPT = "corrupt"
    OTHER = "other"


class CacheError(Exception):
    """Base of all; `kind` is its counter's label. The message holds no key, value or credential."""

    kind = ErrorKind.OTHER

    def __init__(self, message: str, kind: ErrorKind | None = None) -> None:
        super().__init__(message)
        if kind is not None:
            self.kind = kind


class StoreUnavailable(CacheError):
    """Redis cannot be reached, is loading, or the breaker is open: nothing was done."""

    kind = ErrorKind.CONNECTION


class StoreTimeout(StoreUnavailable):
    """No answer within the limit, or no connection of the bounded pool: it may or may not have been done."""

    kind = ErrorKind.TIMEOUT


class StoreFull(CacheError):
    """Redis is at its memory limit: writes fail, reads go on."""

    kind = ErrorKind.OOM


class StoreReadOnly(CacheError):
    """A replica answered a write, as after a failover; the next connection is made anew, to find the master."""

    kind = ErrorKind.READONLY


class StoreRefused(CacheError):
    """Redis understood and said no: wrong type, no permission, a script's error."""


class StoreCorrupt(CacheError):
    """Stored bytes are not what this version of Cairn writes: damaged, cut off, or of another version."""

    kind = ErrorKind.CORRUPT


class UnknownContext(CacheError):
    """No such context or tag with this tenant, whoever else may have one."""


class QuotaFull(CacheError):
    """A budget of stored contexts is reached and nothing may be discarded; the message says which."""


class PastExpiry(CacheError):
    """The asked end of a context has passed by Redis's clock."""


class StoreUrlError(CacheError):
    """The URL of the store cannot be used; says what is wrong with it."""


class EmbeddedError(CacheError):
    """The private Valkey cannot be run; says in one line what to do."""

"""Map redis-py's exceptions to the cache's own errors: the only place that knows both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from redis import exceptions as foreign

from cache.errors import (
    CacheError,
    ErrorKind,
    StoreFull,
    StoreReadOnly,
    StoreRefused,
    StoreTimeout,
    StoreUnavailable,
    WritesRefused,
)

_Meaning = tuple[ErrorKind, type[CacheError]]

_MAPPING: Mapping[type[BaseException], _Meaning] = {
    foreign.OutOfMemoryError: (ErrorKind.OOM, StoreFull),
    foreign.ReadOnlyError: (ErrorKind.READONLY, StoreReadOnly),
    foreign.BusyLoadingError: (ErrorKind.LOADING, StoreUnavailable),
    foreign.NoScriptError: (ErrorKind.NOSCRIPT, StoreRefused),
    foreign.AuthenticationError: (ErrorKind.AUTH, StoreUnavailable),
    foreign.AuthorizationError: (ErrorKind.AUTH, StoreUnavailable),
    foreign.AuthenticationWrongNumberOfArgsError: (ErrorKind.AUTH, StoreUnavailable),
    foreign.NoPermissionError: (ErrorKind.AUTH, StoreUnavailable),
    foreign.MaxConnectionsError: (ErrorKind.TIMEOUT, StoreTimeout),
    foreign.TimeoutError: (ErrorKind.TIMEOUT, StoreTimeout),
    TimeoutError: (ErrorKind.TIMEOUT, StoreTimeout),
    foreign.ClusterDownError: (ErrorKind.CONNECTION, StoreUnavailable),
    foreign.AskError: (ErrorKind.CONNECTION, StoreUnavailable),  # and MOVED: the slots are moving
    foreign.TryAgainError: (ErrorKind.CONNECTION, StoreUnavailable),
}

_FIRST_WORDS: Mapping[str, _Meaning] = {
    "WRONGTYPE": (ErrorKind.WRONGTYPE, StoreRefused),
    "OOM": (ErrorKind.OOM, StoreFull),
    "READONLY": (ErrorKind.READONLY, StoreReadOnly),
    "MISCONF": (ErrorKind.MISCONF, WritesRefused),
    "NOREPLICAS": (ErrorKind.NOREPLICAS, WritesRefused),
    "LOADING": (ErrorKind.LOADING, StoreUnavailable),
    "BUSY": (ErrorKind.BUSY, StoreUnavailable),
    "MASTERDOWN": (ErrorKind.CONNECTION, StoreUnavailable),
    "CLUSTERDOWN": (ErrorKind.CONNECTION, StoreUnavailable),
    "UNBLOCKED": (ErrorKind.CONNECTION, StoreUnavailable),
    "NOAUTH": (ErrorKind.AUTH, StoreUnavailable),
    "WRONGPASS": (ErrorKind.AUTH, StoreUnavailable),
    "NOPERM": (ErrorKind.AUTH, StoreUnavailable),
    "DENIED": (ErrorKind.AUTH, StoreUnavailable),  # protected mode: no password, and not on loopback
}
"""Meanings by the first word of Redis's reply, for errors without a class in redis-py or inside a script's error."""


_LONG_AND_UNAUTHENTICATED = "Protocol error: unauthenticated"
"""Redis's reply, in place of NOAUTH, to a long command (over ten arguments or 16 KB) without a password."""


_DENIED_IN_SCRIPT = ("ACL failure in script", "The user executing the script can't")
"""Redis's reply, in place of NOPERM, if the user may run a script but not a command, key or channel in it; the second
is that of versions before 7."""


_NO_CONNECTION_LEFT: Final = "max number of clients"
"""Redis's reply to a new connection if it has too many. redis-py knows the text of a single server only, not that of
a node of a Cluster."""


_IN_SCRIPT: Final = re.compile(
    r"Error running script \(call to f_[0-9a-f]{40}\): @user_script:[0-9]+: (?:@user_script: [0-9]+: )?-?"
)
"""The prefix of the error of a command in a script, in versions before 7."""


def map_error(error: BaseException, operation: str) -> CacheError:
    """Return the cache's error for `error`. Redis's text is not repeated: a script's error could hold a key."""
    if isinstance(error, CacheError):
        return error
    for kind_of_error in type(error).__mro__:
        if (found := _MAPPING.get(kind_of_error)) is not None:
            return _error(operation, found)
    if isinstance(error, foreign.ResponseError):
        text = str(error)
        if outer := _IN_SCRIPT.match(text):
            text = text[outer.end() :]
        if text.startswith((_LONG_AND_UNAUTHENTICATED, *_DENIED_IN_SCRIPT)):
            return _error(operation, (ErrorKind.AUTH, StoreUnavailable))
        if text.startswith(_NO_CONNECTION_LEFT):
            return _error(operation, (ErrorKind.CONNECTION, StoreUnavailable))
        words = text.split()
        return _error(operation, _FIRST_WORDS.get(words[0] if words else "", (ErrorKind.OTHER, StoreRefused)))
    # redis-py's ConnectionError and RedisClusterException, OSError, RuntimeError of a transport that closed meanwhile
    return _error(operation, (ErrorKind.CONNECTION, StoreUnavailable))


def _error(operation: str, meaning: _Meaning) -> CacheError:
    kind, error = meaning
    return error(f"{operation}: {kind}", kind)

"""Every foreign exception has one meaning here, and no text of Redis is repeated."""

from __future__ import annotations

import pytest
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
from cache.store.redis_errors import map_error


@pytest.mark.parametrize(
    ("error", "kind", "meaning"),
    [
        (foreign.ResponseError("MISCONF Errors writing to the AOF file"), ErrorKind.MISCONF, WritesRefused),
        (
            foreign.ResponseError("ACL failure in script: No permissions to access a channel"),
            ErrorKind.AUTH,
            StoreUnavailable,
        ),
        (foreign.ResponseError("NOREPLICAS Not enough good replicas"), ErrorKind.NOREPLICAS, WritesRefused),
        (foreign.ResponseError("OOM command not allowed. script: abc, on @user_script:3."), ErrorKind.OOM, StoreFull),
        (foreign.OutOfMemoryError("x"), ErrorKind.OOM, StoreFull),
        (foreign.ReadOnlyError("x"), ErrorKind.READONLY, StoreReadOnly),
        (foreign.ResponseError("READONLY in a script"), ErrorKind.READONLY, StoreReadOnly),
        (foreign.ResponseError("BUSY Redis is busy running a script"), ErrorKind.BUSY, StoreUnavailable),
        (foreign.BusyLoadingError("x"), ErrorKind.LOADING, StoreUnavailable),
        (foreign.ResponseError("LOADING Redis is loading"), ErrorKind.LOADING, StoreUnavailable),
        (foreign.ResponseError("MASTERDOWN Link with MASTER is down"), ErrorKind.CONNECTION, StoreUnavailable),
        (foreign.ResponseError("CLUSTERDOWN Hash slot not served"), ErrorKind.CONNECTION, StoreUnavailable),
        (foreign.AuthenticationError("x"), ErrorKind.AUTH, StoreUnavailable),
        (foreign.ResponseError("NOAUTH Authentication required."), ErrorKind.AUTH, StoreUnavailable),
        (foreign.ResponseError("NOPERM this user has no permissions"), ErrorKind.AUTH, StoreUnavailable),
        (foreign.ResponseError("DENIED Redis is running in protected mode"), ErrorKind.AUTH, StoreUnavailable),
        (foreign.ResponseError("Protocol error: unauthenticated bulk length"), ErrorKind.AUTH, StoreUnavailable),
        (foreign.ResponseError("Protocol error: unauthenticated multibulk length"), ErrorKind.AUTH, StoreUnavailable),
        (foreign.ResponseError("Protocol error: invalid bulk length"), ErrorKind.OTHER, StoreRefused),
        (foreign.ResponseError("WRONGTYPE Operation against a key"), ErrorKind.WRONGTYPE, StoreRefused),
        (foreign.ResponseError("ERR unknown command"), ErrorKind.OTHER, StoreRefused),
        (foreign.ResponseError(""), ErrorKind.OTHER, StoreRefused),
        (
            foreign.ResponseError("max number of clients + cluster connections reached"),
            ErrorKind.CONNECTION,
            StoreUnavailable,
        ),
        (foreign.NoScriptError("x"), ErrorKind.NOSCRIPT, StoreRefused),
        (TimeoutError(), ErrorKind.TIMEOUT, StoreTimeout),
        (foreign.ConnectionError("x"), ErrorKind.CONNECTION, StoreUnavailable),
        (OSError(), ErrorKind.CONNECTION, StoreUnavailable),
        (RuntimeError("transport closed"), ErrorKind.CONNECTION, StoreUnavailable),
    ],
)
def test_an_error_is_about_the_command_about_writes_or_about_redis(
    error: Exception, kind: ErrorKind, meaning: type[CacheError]
) -> None:
    """Only the first kind loses what was to be written."""
    mapped = map_error(error, "SET")
    assert type(mapped) is meaning
    assert mapped.kind is kind
    assert str(mapped) == f"SET: {kind}"


IN_SCRIPT = f"Error running script (call to f_{'0af9' * 10}): @user_script:12: "


@pytest.mark.parametrize(
    ("text", "kind", "meaning"),
    [
        ("@user_script: 12: -OOM command not allowed when used memory > 'maxmemory'.", ErrorKind.OOM, StoreFull),
        ("@user_script: 12: -NOREPLICAS Not enough good replicas.", ErrorKind.NOREPLICAS, WritesRefused),
        ("@user_script: 12: -READONLY You can't write.", ErrorKind.READONLY, StoreReadOnly),
        ("@user_script: 12: -MISCONF Redis is configured to save RDB snapshots", ErrorKind.MISCONF, WritesRefused),
        (
            "@user_script: 12: The user executing the script can't run this command or subcommand",
            ErrorKind.AUTH,
            StoreUnavailable,
        ),
        ("WRONGTYPE Operation against a key", ErrorKind.WRONGTYPE, StoreRefused),
        ("ERR value is not an integer or out of range", ErrorKind.OTHER, StoreRefused),
        ("user_script:12: -OOM", ErrorKind.OTHER, StoreRefused),
    ],
)
def test_an_error_in_a_script_of_an_older_redis_is_found_behind_its_frame(
    text: str, kind: ErrorKind, meaning: type[CacheError]
) -> None:
    """As Redis 6.2 writes them: before version 7 every error of a script began with the same words."""
    mapped = map_error(foreign.ResponseError(IN_SCRIPT + text), "EVALSHA")
    assert (type(mapped), mapped.kind) == (meaning, kind)


def test_an_error_of_the_cache_stays_what_it_is() -> None:
    """It was mapped before."""
    error = StoreFull("full")
    assert map_error(error, "SET") is error

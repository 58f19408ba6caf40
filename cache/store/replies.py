"""Convert Redis replies from the several forms that redis-py returns to one, and check them. Pure.

A reply may have any form: the server may be no Redis, an entry may have been written by somebody else, and a proxy in
between may mix up replies. So each is converted by `parsed`, whose error is handled as any other of Redis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from cache.errors import StoreCorrupt

T = TypeVar("T")


def parsed(read: Callable[[Any], T], reply: Any) -> T:
    """Return `read(reply)`. Raises StoreCorrupt if the reply is not as `read` expects it."""
    try:
        return read(reply)
    except (ValueError, TypeError, AttributeError, ArithmeticError, LookupError, msgspec.MsgspecError) as error:
        raise StoreCorrupt("a reply of Redis is damaged, or is that of another server") from error


def text(reply: Any) -> bytes:
    """Return a reply that must be a string."""
    if not isinstance(reply, bytes):
        raise TypeError
    return reply


def text_or_none(reply: Any) -> bytes | None:
    """Return a reply that must be a string, or none if there is no such key."""
    return None if reply is None else text(reply)


class StreamEntry(msgspec.Struct, frozen=True, gc=False):
    """One entry of a stream: its id as Redis wrote it, and the value of its first field."""

    id: bytes
    payload: bytes


def hash_pairs(reply: Any) -> list[tuple[bytes, bytes]]:
    """Return the fields and values of a hash. redis-py gives a dictionary, or from a pipeline a flat list."""
    return list(reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True))


def entries_of_read(reply: Any) -> list[StreamEntry]:
    """Return the entries of an XREAD of one stream."""
    if not reply:
        return []
    return entries_of_range(reply[0][1] if isinstance(reply, list) else next(iter(reply.values())))


def entries_of_range(pairs: Any) -> list[StreamEntry]:
    """Return the entries of an XRANGE."""
    entries = []
    for entry_id, fields in pairs or ():
        values = list(fields.values()) if isinstance(fields, dict) else (fields or ())[1::2]
        entries.append(StreamEntry(text(entry_id), text(values[0]) if values else b""))
    return entries

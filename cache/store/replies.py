"""Convert Redis replies from the several forms that redis-py returns to one. Pure."""

from __future__ import annotations

from typing import Any

import msgspec


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
        entries.append(StreamEntry(entry_id, values[0] if values else b""))
    return entries

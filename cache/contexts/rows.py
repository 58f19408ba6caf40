"""What is known of a stored context and of a tag, and how the scripts' replies are read. Pure.

It knows shapes, not when they are read or written. What does not read as this version writes it is `StoreCorrupt`.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from cache.contexts.retention import Kept, StoredValue
from cache.errors import StoreCorrupt

HEAD_VERSION = 1
PIN = "pin"  # the metadata key that keeps a context from being discarded
_PINNING = frozenset({"1", "true", "yes", "on"})


class ContextStatus(enum.StrEnum):
    """How a context stands."""

    PENDING = "pending"  # being warmed; it can be used
    READY = "ready"
    ERROR = "error"  # the warming failed
    INACTIVE = "inactive"  # expired, and still there for its grace time


class Draft(msgspec.Struct, frozen=True):
    """A context to be made. `messages` stand without brackets, message k from bounds[2k] to bounds[2k + 1].

    One of `ttl_seconds` and `expires_unix_seconds` is set. `value_usd` is what one use is expected to save. `media`
    tells kind and bytes of what in it is no text, for whoever counts tokens.
    """

    id: str
    model: str
    tools: bytes
    messages: bytes
    bounds: array[int]
    ttl_seconds: float | None
    expires_unix_seconds: float | None
    status: ContextStatus
    tokens: int
    value_usd: float
    name: str = ""
    description: str = ""
    metadata: dict[str, str] = {}
    tags: tuple[str, ...] = ()
    media: tuple[tuple[str, int], ...] = ()

    @property
    def pinned(self) -> bool:
        return pins(self.metadata)

    @property
    def size_bytes(self) -> int:
        """Of tools and messages, as they were uploaded."""
        return len(self.tools) + len(self.messages)


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What never changes of a context."""

    model: str
    name: str
    description: str
    digest: bytes
    content_bytes: int
    media: tuple[tuple[str, int], ...] = ()


class ContextRow(msgspec.Struct, frozen=True):
    """A context without its content. Times are seconds since 1970 by Redis's clock; `as_of` is when it was read."""

    id: str
    head: Head
    metadata: dict[str, str]
    created_unix_seconds: float
    expires_unix_seconds: float
    stored_status: ContextStatus
    tokens: int
    problem: tuple[str, str] | None  # type and message
    size_bytes: int  # in Redis, compressed
    standing: StoredValue
    value_usd: float
    warming_until_unix_seconds: float
    pinned: bool
    as_of_unix_seconds: float

    def status(self, now_unix_seconds: float) -> ContextStatus:
        """How it stands at a moment of Redis's clock."""
        if self.expires_unix_seconds <= now_unix_seconds:
            return ContextStatus.INACTIVE
        if self.stored_status is ContextStatus.PENDING and self.warming_until_unix_seconds <= now_unix_seconds:
            return ContextStatus.ERROR
        return self.stored_status

    @property
    def worth(self) -> float:
        """USD per second and byte, as of when it was read."""
        return self.standing.worth(self.value_usd, self.size_bytes, self.as_of_unix_seconds)

    @property
    def saving_usd_per_hour(self) -> float:
        """What its uses save at their present pace: the worth, times its bytes."""
        return self.worth * self.size_bytes * 3600

    @property
    def kept(self) -> Kept:
        """How it stands against the others where room is needed."""
        rank = self.standing.rank(self.value_usd, self.size_bytes)
        expired = self.expires_unix_seconds <= self.as_of_unix_seconds
        return Kept(rank, self.size_bytes, self.pinned, expired)


class Tag(msgspec.Struct, frozen=True):
    """A name for a context."""

    tag: str
    context_id: str
    created_unix_seconds: float


def pins(metadata: dict[str, str]) -> bool:
    """Whether metadata ask that the context be kept whatever its worth."""
    return metadata.get(PIN, "").lower() in _PINNING


def encode_head(head: Head) -> bytes:
    """For the context's hash."""
    return bytes((HEAD_VERSION,)) + msgspec.msgpack.encode(head)


def read_row(context_id: str, fields: Sequence[bytes | None], now_ms: int) -> ContextRow | None:
    """A row of the script `context-read`; None where there is no such context."""
    head, metadata, created, expires, status, tokens, error, size, uses, used, value, warming, pin = fields
    if head is None:
        return None
    try:
        return ContextRow(
            context_id,
            _head(head),
            msgspec.msgpack.decode(metadata or b"\x80", type=dict[str, str]),
            _seconds(created),
            _seconds(expires),
            ContextStatus((status or b"").decode()),
            int(tokens or 0),
            msgspec.msgpack.decode(error, type=tuple[str, str]) if error else None,
            int(size or 0),
            StoredValue(float(uses or 0), _seconds(used)),
            float(value or 0),
            _seconds(warming),
            pin == b"1",
            now_ms / 1000,
        )
    except (ValueError, msgspec.MsgspecError) as wrong:
        raise StoreCorrupt("a context's entry is damaged") from wrong


def read_tag(name: str, value: bytes) -> Tag:
    """A tag as it is stored."""
    context_id, _, created = value.partition(b" ")
    try:
        return Tag(name, context_id.decode(), int(created) / 1000)
    except ValueError as wrong:
        raise StoreCorrupt("a tag's entry is damaged") from wrong


def _head(stored: bytes) -> Head:
    if stored[:1] != bytes((HEAD_VERSION,)):
        raise StoreCorrupt("a context's entry is of another version")
    head: Head = msgspec.msgpack.decode(memoryview(stored)[1:], type=Head)
    return head


def _seconds(milliseconds: Any) -> float:
    return int(milliseconds or 0) / 1000

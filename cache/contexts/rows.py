"""Data types for stored contexts and tags, and the reading of scripts' replies. Pure.

Redis is a trust boundary: a reply with a value that Cairn does not write raises `StoreCorrupt`.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from sys import getsizeof

import msgspec

from cache.contexts.retention import Kept, StoredValue
from cache.errors import StoreCorrupt

HEAD_VERSION = 1
PIN = "pin"  # the metadata key that keeps a context from being discarded
DIGEST_BYTES = 32
MAX_SECONDS = 1e11  # since 1970: the year 5138
ROW_BYTES = 900
MEDIA_BYTES = 120
TAG_BYTES = 500
"""Memory of a remembered row in addition to its texts, of each part that is not text, and of a tag, as measured."""

MAX_NUMBER = 1e15  # of bytes, tokens, uses, USD
_PINNING = frozenset({"1", "true", "yes", "on"})


class ContextStatus(enum.StrEnum):
    """State of a context."""

    PENDING = "pending"  # being warmed; it can be used
    READY = "ready"
    ERROR = "error"  # the warming failed
    INACTIVE = "inactive"  # expired; it can be revived during its grace time


class Draft(msgspec.Struct, frozen=True):
    """A context to be created. `messages` has no brackets; message k is at bounds[2k] to bounds[2k + 1].

    One of `ttl_seconds` and `expires_unix_seconds` is set. `value_usd` is the expected saving of one use. `media` has
    kind and size in bytes of each part that is not text, for counting tokens.
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
        """True if it asks to be pinned."""
        return pins(self.metadata)

    @property
    def size_bytes(self) -> int:
        """Size of tools and messages, as uploaded."""
        return len(self.tools) + len(self.messages)


class Head(msgspec.Struct, frozen=True, array_like=True):
    """The part of a context that never changes."""

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
    stored_value: StoredValue
    value_usd: float
    warming_until_unix_seconds: float
    pinned: bool
    as_of_unix_seconds: float

    def status(self, now_unix_seconds: float) -> ContextStatus:
        """Return its state at a moment of Redis's clock."""
        if self.expires_unix_seconds <= now_unix_seconds:
            return ContextStatus.INACTIVE
        if self.stored_status is ContextStatus.PENDING and self.warming_until_unix_seconds <= now_unix_seconds:
            return ContextStatus.ERROR
        return self.stored_status

    @property
    def memory_bytes(self) -> int:
        """Estimate of its memory in a worker."""
        head, metadata = self.head, self.metadata
        texts = (head.name, head.description, *metadata, *metadata.values())
        return ROW_BYTES + getsizeof(metadata) + sum(map(getsizeof, texts)) + MEDIA_BYTES * len(head.media)

    @property
    def worth(self) -> float:
        """Worth in USD per second and byte, as of the time of reading."""
        return self.stored_value.worth(self.value_usd, self.size_bytes, self.as_of_unix_seconds)

    @property
    def saving_usd_per_hour(self) -> float:
        """Saving at the present rate of use."""
        return self.worth * self.size_bytes * 3600

    @property
    def kept(self) -> Kept:
        """The properties by which it competes with other contexts for room."""
        rank = self.stored_value.rank(self.value_usd, self.size_bytes)
        expired = self.expires_unix_seconds <= self.as_of_unix_seconds
        return Kept(rank, self.size_bytes, self.pinned, expired)


class Tag(msgspec.Struct, frozen=True):
    """A name for a context."""

    tag: str
    context_id: str
    created_unix_seconds: float

    @property
    def memory_bytes(self) -> int:
        """Estimate of its memory in a worker."""
        return TAG_BYTES


def pins(metadata: dict[str, str]) -> bool:
    """Return whether metadata ask for the context to be pinned: never to be discarded for room."""
    return metadata.get(PIN, "").lower() in _PINNING


def encode_head(head: Head) -> bytes:
    """Encode a head for the context's hash."""
    return bytes((HEAD_VERSION,)) + msgspec.msgpack.encode(head)


def read_row(context_id: str, fields: Sequence[bytes | None], now_ms: int) -> ContextRow | None:
    """Read a row of the script `context-read`; None if there is no such context. Raises StoreCorrupt."""
    head, metadata, created, expires, status, tokens, error, size, uses, used, value, warming, pin = fields
    if head is None:
        return None
    try:
        return ContextRow(
            id=context_id,
            head=_head(head),
            metadata=msgspec.msgpack.decode(metadata or b"\x80", type=dict[str, str]),
            created_unix_seconds=_seconds(created),
            expires_unix_seconds=_seconds(expires),
            stored_status=ContextStatus((status or b"").decode()),
            tokens=int(_number(tokens)),
            problem=msgspec.msgpack.decode(error, type=tuple[str, str]) if error else None,
            size_bytes=int(_number(size)),
            stored_value=StoredValue(_number(uses), _seconds(used)),
            value_usd=_number(value),
            warming_until_unix_seconds=_seconds(warming),
            pinned=pin == b"1",
            as_of_unix_seconds=now_ms / 1000,
        )
    except (ValueError, ArithmeticError, msgspec.MsgspecError) as wrong:
        raise StoreCorrupt("a context's entry is damaged") from wrong


def read_tag(name: str, value: bytes) -> Tag:
    """Read a stored tag. Raises StoreCorrupt."""
    context_id, _, created = value.partition(b" ")
    try:
        return Tag(name, context_id.decode(), _seconds(created))
    except (ValueError, ArithmeticError) as wrong:
        raise StoreCorrupt("a tag's entry is damaged") from wrong


def _head(stored: bytes) -> Head:
    if stored[:1] != bytes((HEAD_VERSION,)):
        raise StoreCorrupt("a context's entry is of another version")
    head: Head = msgspec.msgpack.decode(memoryview(stored)[1:], type=Head)
    sizes = [head.content_bytes, *[size_bytes for _, size_bytes in head.media]]
    if len(head.digest) != DIGEST_BYTES or not all(0 <= size <= MAX_NUMBER for size in sizes):
        raise StoreCorrupt("a context's entry is damaged")
    return head


def _number(stored: bytes | None) -> float:
    number = float(stored or 0)
    if not 0 <= number <= MAX_NUMBER:  # false for NaN, too
        raise ValueError("out of range")
    return number


def _seconds(milliseconds: bytes | None) -> float:
    seconds = float(milliseconds or 0) / 1000
    if not 0 <= seconds <= MAX_SECONDS:
        raise ValueError("out of range")
    return seconds

"""What a worker tells its supervisor of prefixes and misses, for the status page. Words only."""

from __future__ import annotations

import msgspec

from proxy.model import MissReason


class PrefixRow(msgspec.Struct, array_like=True, gc=False):
    """One prefix since the worker began. `key` is the hash at its end: for joining rows, never for people."""

    key: int
    model: str
    tokens: int
    hits: int
    saved_tokens: int
    used_unix_seconds: float
    next_key: int = 0  # of the block with which the last prompt went on; 0 where it ended here
    forked: bool = False


class Miss(msgspec.Struct, frozen=True):
    """One prompt that was not wholly found."""

    unix_seconds: float
    model: str
    upstream: str
    prompt_tokens: int
    cached_tokens: int | None
    reason: MissReason


class MissRow(Miss, array_like=True, frozen=True, gc=False):
    """The same without names, on its way to the supervisor."""

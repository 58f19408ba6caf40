"""Rows about prefixes and misses that a worker reports for the status page. Data types only."""

from __future__ import annotations

import msgspec

from proxy.model import MissReason


class PrefixRow(msgspec.Struct, array_like=True, gc=False):
    """One prefix since the worker started. `key` is the hash at its end; it joins rows and is never shown."""

    key: int
    model: str
    tokens: int
    hits: int
    saved_tokens: int
    used_unix_seconds: float
    next_key: int = 0  # hash of the block that followed in the last prompt; 0 if the prompt ended here
    forked: bool = False


class Miss(msgspec.Struct, frozen=True):
    """One prompt of which a part was not expected to be cached."""

    unix_seconds: float
    model: str
    upstream: str
    prompt_tokens: int
    cached_tokens: int | None
    reason: MissReason


class MissRow(Miss, array_like=True, frozen=True, gc=False):
    """A `Miss` as it travels to the supervisor: an array without field names."""


class PrefixReport(msgspec.Struct, frozen=True):
    """The prefixes that saved most at one worker, and its last misses."""

    prefixes: list[PrefixRow] = []
    misses: list[MissRow] = []

"""Remember which replica served each session that clients name: a hint for ties, never an order.

Known clients send a header that names their session, or `prompt_cache_key` in the body. Content decides the replica
of a prompt; a hint counts only among replicas that hold equally much of it and cost about the same. Hints are
separate for each tenant. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from zlib import crc32

DEFAULT_HEADERS: Final = (
    "x-claude-code-session-id",
    "session-id",
    "session_id",
    "x-session-affinity",
    "x-session-id",
)
"""Headers by which agents name their session."""

MAX_SESSIONS: Final = 65_536
"""Sessions remembered; the least recently used is dropped, since clients choose the names."""

MAX_HINT_BYTES: Final = 256
"""Longest name of a session; longer ones are ignored."""


class SessionHints:
    """The last replica of each session, in this process."""

    def __init__(self, headers: Iterable[str] = DEFAULT_HEADERS) -> None:
        self._headers = frozenset(name.lower().encode() for name in headers)
        self._replicas: dict[int, int] = {}

    def key(self, tenant_id: str, headers: Iterable[tuple[bytes, bytes]], cache_key: bytes) -> int | None:
        """Return a number for the session, from its header or else from `prompt_cache_key`; None if unnamed."""
        hint = cache_key
        names = self._headers
        for name, value in headers:
            if name in names:
                hint = value
                break
        if not 0 < len(hint) <= MAX_HINT_BYTES:
            return None
        return crc32(hint, crc32(tenant_id.encode())) << 32 | crc32(hint)

    def replica(self, key: int) -> int | None:
        """Return the replica that served the session last."""
        return self._replicas.get(key)

    def served(self, key: int, replica: int) -> None:
        """Remember which replica served the session."""
        replicas = self._replicas
        replicas.pop(key, None)
        replicas[key] = replica
        if len(replicas) > MAX_SESSIONS:
            del replicas[next(iter(replicas))]

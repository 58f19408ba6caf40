"""Cross-origin requests of web pages, for the origins that the configuration lists (the Fetch standard, 3.2).

A browser asks first, without a key (a preflight), and lets a page read a response only if it names the page's origin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from proxy.downstream.response import Downstream, Headers

_ANY_ORIGIN: Final = b"*"
_METHODS: Final = b"GET, HEAD, POST, PUT, PATCH, DELETE"
_MAX_AGE_SECONDS: Final = b"7200"  # how long a browser may remember a preflight; Chromium's own limit
_EXPOSED: Final = b"*, x-request-id, cache-status, server-timing, retry-after"  # the names are for older browsers
_HEADER_BYTES_MOST: Final = 4096  # of the header names that a preflight asks for, which are repeated to it


class Cors:
    """Decides which origins' pages may read responses.

    Args:
        origins: such as `https://chat.example.com`, or `*` for any; empty turns all of this off.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origin.rstrip("/").lower().encode() for origin in origins)

    def preflight(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> Headers | None:
        """Return the headers of the answer (204) to a preflight; None if the request is not an allowed preflight."""
        if not self._origins or method != "OPTIONS":
            return None
        named = dict(headers)
        granted = self._granted(named.get(b"origin"))
        if not granted or b"access-control-request-method" not in named:
            return None
        asked = named.get(b"access-control-request-headers", b"")
        return (
            *granted,
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", asked if 0 < len(asked) <= _HEADER_BYTES_MOST else b"*"),
            (b"access-control-max-age", _MAX_AGE_SECONDS),
        )

    def response(self, client: Downstream, headers: Iterable[tuple[bytes, bytes]]) -> Downstream:
        """Return `client`; if the request comes from an allowed origin, a response whose head names that origin."""
        if not self._origins:
            return client
        granted = self._granted(next((value for name, value in headers if name == b"origin"), None))
        return CorsResponse(client, (*granted, (b"access-control-expose-headers", _EXPOSED))) if granted else client

    def _granted(self, origin: bytes | None) -> tuple[tuple[bytes, bytes], ...]:
        if origin is None or not origin:
            return ()
        if _ANY_ORIGIN in self._origins:
            return ((b"access-control-allow-origin", _ANY_ORIGIN),)
        if origin.lower() not in self._origins:
            return ()
        return ((b"access-control-allow-origin", origin), (b"vary", b"Origin"))


class CorsResponse:
    """A `Downstream` whose head carries these headers in place of the upstream's own of the same kind."""

    def __init__(self, inner: Downstream, own: tuple[tuple[bytes, bytes], ...]) -> None:
        self._inner = inner
        self._own = own

    @property
    def begun(self) -> bool:
        return self._inner.begun

    def send(self, status: int, reason: bytes, headers: Headers, body: bytes) -> None:
        self._inner.send(status, reason, self._with_own(headers), body)

    def begin(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        self._inner.begin(status, reason, self._with_own(headers), length)

    async def write(self, piece: bytes | memoryview) -> None:
        await self._inner.write(piece)

    def offer(self, piece: bytes, framed: bytes | None = None) -> bool:
        return self._inner.offer(piece, framed)

    async def drained(self) -> None:
        await self._inner.drained()

    def end(self) -> None:
        self._inner.end()

    def write_last(self, piece: bytes) -> None:
        self._inner.write_last(piece)

    def break_off(self) -> None:
        self._inner.break_off()

    def _with_own(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        return [pair for pair in headers if not pair[0].startswith(b"access-control-")] + list(self._own)

"""The HTTP client that the fleet needs, for replicas and for the API of Kubernetes."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from typing import Protocol

from proxy.upstream import Limits, Origin, UpstreamResponse


class HttpClient(Protocol):
    """Sends one request: `proxy.upstream.UpstreamClient`."""

    def request(
        self,
        origin: Origin,
        method: bytes,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]] = (),
        *,
        limits: Limits | None = None,
        repeatable: bool | None = None,
    ) -> Awaitable[UpstreamResponse]:
        """Send a request; return when the head of the response has arrived. Raises UpstreamError."""
        ...


class PooledClient(HttpClient, Protocol):
    """A client that also knows when something was last received: `proxy.upstream.UpstreamClient`."""

    def received_seconds(self, origin: Origin) -> float:
        """Return the monotonic time of the last byte of any response from an origin; 0 if there was none."""
        ...

"""Send a request over a connection of its origin's pool, and map every failure to an error.

Whether another replica is tried is the caller's decision, made from the error.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeAlias

from proxy.clock import Clock
from proxy.errors import ConnectFailed, ResetBeforeResponse, TlsFailed
from proxy.upstream.authorities import Authorities
from proxy.upstream.connect import Lookups, dial
from proxy.upstream.connection import Connection
from proxy.upstream.interruption import interrupted_by
from proxy.upstream.origin import Limits, Origin
from proxy.upstream.pool import Pool, PoolCounts
from proxy.upstream.request_head import HeadWriter
from proxy.upstream.response import UpstreamResponse
from proxy.upstream.timeouts import Deadlines

_FORGOTTEN_MOST: Final = 4096  # origins that are remembered as gone

Body: TypeAlias = bytes | Sequence[bytes | bytearray | memoryview] | AsyncIterator[bytes]


class _Upstream:
    """State kept per origin."""

    __slots__ = ("head", "origin", "pool")

    def __init__(self, origin: Origin, pool: Pool) -> None:
        self.origin = origin
        self.pool = pool
        self.head = HeadWriter(origin)


class UpstreamClient:
    """An HTTP/1.1 client with one pool per origin. Created and used within one running loop."""

    def __init__(
        self,
        limits: Limits,
        clock: Clock,
        tls_context: Callable[[], Awaitable[ssl.SSLContext]] | None = None,
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._tls_context = tls_context or Authorities(clock).tls_context
        self._loop = asyncio.get_running_loop()
        self._deadlines = Deadlines(self._loop, clock)
        self._lookups = Lookups(self._loop)
        self._upstreams: dict[Origin, _Upstream] = {}
        self._forgotten: set[Origin] = set()
        self._closed = False

    async def request(
        self,
        origin: Origin,
        method: bytes,
        target: bytes,
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: Body = b"",
        *,
        length: int | None = None,
        limits: Limits | None = None,
        repeatable: bool | None = None,
    ) -> UpstreamResponse:
        """Send a request and return when the head of the final response has arrived.

        Args:
            body: bytes, buffers that are written without being joined, or an async iterator.
            length: size in bytes of an iterator's body; without it the body is sent chunked.
            limits: replaces the client's limits for this request.
            repeatable: True to send again on a new connection if a pooled one turns out to be dead before any byte
                arrives; False to use no pooled one, since the upstream may just be closing it; None for neither. A
                body that cannot be sent twice is never sent on a pooled connection.

        Raises ValueError, with nothing sent, if the head cannot be written safely; PoolTimeout, ConnectFailed,
        ResetBeforeResponse, FirstByteTimeout, BadResponse; and the errors of the iterator. On each of these, and on
        cancellation, the connection is closed.
        """
        upstream = self._upstream(origin)
        limits = limits or self._limits
        streamed = False
        if isinstance(body, bytes):
            length = len(body)
        elif isinstance(body, list) or not isinstance(body, AsyncIterator):  # the cheaper test first
            length = sum(map(len, body))
        else:
            streamed = True
        head = upstream.head.write(method, target, headers, length)
        fresh = streamed or repeatable is False
        while True:
            connection = (None if fresh else upstream.pool.take()) or await self._connection(upstream, fresh, limits)
            response = connection.begin(limits, head_only=method == b"HEAD")
            try:
                if streamed:
                    await self._upload(connection, response, head, body, length, limits)  # type: ignore[arg-type]
                else:
                    connection.send(head, body)  # type: ignore[arg-type]
                while response.pending:
                    await response.change()
                response.check()
            except ResetBeforeResponse as error:
                if not (error.reused and repeatable):
                    raise
                upstream.pool.retried += 1
                fresh = True
            except BaseException:
                response.abort()
                raise
            else:
                return response

    def counts(self) -> dict[Origin, PoolCounts]:
        """Return each origin's connection counts."""
        return {origin: upstream.pool.counts for origin, upstream in self._upstreams.items()}

    def received_seconds(self, origin: Origin) -> float:
        """Return when the last byte of any response came from an origin, on the monotonic clock; 0 for never."""
        upstream = self._upstreams.get(origin)
        return 0.0 if upstream is None else upstream.pool.received_seconds

    def forget(self, origin: Origin) -> bool:
        """Drop the pool of an origin that is gone: now, or as soon as its last connection closes.

        Return True if it is dropped now. A request that is sent to the origin later has a pool while it lasts.
        """
        if len(self._forgotten) >= _FORGOTTEN_MOST:
            self._forgotten.clear()
        self._forgotten.add(origin)
        upstream = self._upstreams.get(origin)
        if upstream is not None:
            upstream.pool.emptied = lambda: self._drop(origin)
            upstream.pool.shut()
        return origin not in self._upstreams

    def _drop(self, origin: Origin) -> None:
        self._upstreams.pop(origin, None)

    async def close(self) -> None:
        """Close every connection, including those in use, and wait until all are gone."""
        self._closed = True
        for upstream in self._upstreams.values():
            upstream.pool.close()
        await self._lookups.close()
        await self._deadlines.close()

    def _upstream(self, origin: Origin) -> _Upstream:
        if self._closed:
            raise RuntimeError("the upstream client is closed")
        upstream = self._upstreams.get(origin)
        if upstream is None:
            pool = Pool(self._loop, self._limits, str(origin))
            if origin in self._forgotten:
                pool.emptied = lambda: self._drop(origin)
            upstream = self._upstreams[origin] = _Upstream(origin, pool)
        return upstream

    async def _tls(self) -> ssl.SSLContext:
        try:
            return await self._tls_context()
        except OSError as error:  # includes ssl.SSLError
            raise TlsFailed("the certificate authorities for the upstream cannot be read") from error

    async def _connection(self, upstream: _Upstream, fresh: bool, limits: Limits) -> Connection:
        """Return a connection of the pool, else a new one."""
        pool = upstream.pool
        connection = await pool.obtain(fresh=fresh)
        if connection is not None:
            return connection

        def make() -> Connection:
            return Connection(self._loop, self._clock, self._deadlines, pool, limits)

        origin = upstream.origin
        try:
            context = await self._tls() if origin.scheme == "https" else None
            connection = await dial(self._loop, self._lookups, origin, context, make, limits.connect_seconds)
        except BaseException:
            pool.vacate()
            raise
        pool.opened_one(connection)
        if self._closed or not connection.usable:
            connection.close()
            raise ConnectFailed("the connection to the upstream closed as it opened")
        return connection

    async def _upload(
        self,
        connection: Connection,
        response: UpstreamResponse,
        head: bytes,
        body: AsyncIterator[bytes],
        length: int | None,
        limits: Limits,
    ) -> None:
        """Send a body piece by piece until it ends, or until a response or a failure arrives.

        No time limit runs while the iterator is awaited: the upstream is not late then.
        """
        connection.upload(unfinished=True)
        connection.send(head, b"")
        async with interrupted_by(response):
            sent_bytes = 0
            connection.wait_for_response(math.inf)
            async for piece in body:
                if not response.pending:
                    return
                if not piece:
                    continue
                sent_bytes += len(piece)
                if length is not None and sent_bytes > length:
                    raise ValueError("the request's body is longer than declared")
                framed = (piece,) if length is not None else (b"%x\r\n" % len(piece), piece, b"\r\n")
                await connection.write(framed, limits.first_byte_seconds)
                connection.wait_for_response(math.inf)
            if length is not None and sent_bytes < length:
                raise ValueError("the request's body is shorter than declared")
            await connection.write((b"0\r\n\r\n",) if length is None else (), limits.first_byte_seconds)
            connection.upload(unfinished=False)
        connection.wait_for_response(limits.first_byte_seconds)

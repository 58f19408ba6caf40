"""The client port of one worker: accept connections, limit them, enforce their deadlines and drain them."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from proxy.clock import Clock
from proxy.downstream.connection import ROOM_BYTES, Connection, Handle
from proxy.downstream.errors import BadHttp, ClientLimit
from proxy.downstream.limits import ByteBudget, Limits, connections_within
from proxy.errors import CairnError
from proxy.tasks import Tasks
from proxy.timers import DeadlineTimer

log = logging.getLogger("cairn.clients")

_LOOK_SECONDS_MOST: Final = 1.0  # between two checks of all deadlines, which are enforced with this precision
_LOOK_SECONDS_LEAST: Final = 0.01
_TURNS_TO_CONNECT: Final = 4  # of the loop, from the moment at which it accepts a connection to `connection_made`
_PREFIX_BITS: Final = 64  # of an IPv6 address: a client usually has a network of this size to itself


class Observer(Protocol):
    """Counts what happens at the client port."""

    def client_error(self, reason: BadHttp) -> None:
        """Count a client's input that was refused or arrived too slowly."""
        ...

    def refused(self, limit: ClientLimit) -> None:
        """Count a connection or request that was refused because `limit` was reached."""
        ...

    def in_use(self, connections: int, head_bytes: int, body_bytes: int) -> None:
        """Set the gauges of the amounts that the limits bound."""
        ...


class ClientServer:
    """Serves `handle` on listening sockets.

    `error_response` serialises the answer to input that is not a request. Create the server inside the event loop.
    """

    def __init__(
        self,
        handle: Handle,
        limits: Limits,
        clock: Clock,
        observer: Observer,
        error_response: Callable[[CairnError], bytes],
    ) -> None:
        self.handle = handle
        self.limits = limits
        self.heads = ByteBudget(limits.head_bytes_in_flight)
        self.bodies = ByteBudget(limits.body_bytes_in_flight)
        self.is_draining = False
        self.is_closed = False
        self.room = bytearray(ROOM_BYTES)
        self.now = clock.monotonic
        self.client_error = observer.client_error
        self.refused = observer.refused
        self.error_response = error_response
        self._observer = observer
        self._connections: set[Connection] = set()
        self._max_connections = limits.connections
        self._by_network: Counter[str] = Counter()
        self._tasks = Tasks()
        self._listening: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []
        self._looking: DeadlineTimer | None = None
        self._all_gone: asyncio.Event = asyncio.Event()
        self._all_gone.set()

    def __len__(self) -> int:
        return len(self._connections)

    def connect(self) -> Connection:
        """Make the protocol of a new connection."""
        return Connection(self)

    async def start(self, listening: Sequence[socket.socket], backlog: int) -> None:
        """Accept connections on sockets that listen already."""
        limit = connections_within(self.limits.connections, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        if limit < self.limits.connections:
            log.warning("at most %d client connections: the limit of open files (ulimit -n) allows no more", limit)
        self._max_connections = limit
        loop = asyncio.get_running_loop()
        for end in listening:
            self._listening.append(end)
            self._listeners.append(await loop.create_server(self.connect, sock=end, backlog=backlog))
        self._looking = DeadlineTimer(loop, self._look)
        self._look()

    def adopt(self, connection: socket.socket) -> None:
        """Serve a connection that was accepted elsewhere."""
        self._tasks.start(self._adopt(connection), "adopt")

    async def _adopt(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self.connect, connection)
        except OSError:  # its client has gone
            connection.close()

    async def drain(self, seconds: float) -> None:
        """Accept no more, and wait up to `seconds` until all connections have ended.

        A connection is answered once more, with `Connection: close`, if its client sends a request within a second,
        so that a client that keeps its connection busy loses no request. Connections that the kernel has accepted
        already are taken first: closing the listening sockets would reset them.
        """
        self.is_draining = True
        for connection in tuple(self._connections):
            connection.drain()
        waiting = [each for end in self._listening for each in _accepted(end)] if seconds else []
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._listening.clear()
        if seconds:
            await asyncio.gather(*map(self._adopt, waiting))
            for _ in range(_TURNS_TO_CONNECT):
                await asyncio.sleep(0)
        if seconds and self._connections:
            try:
                async with asyncio.timeout(seconds):
                    await self._all_gone.wait()
            except TimeoutError:
                log.warning("closing %d connections that have not ended in time", len(self._connections))

    async def close(self) -> None:
        """End all remaining connections at once, and those that the kernel has accepted and the loop brings later."""
        self.is_closed = True
        await self.drain(0)
        for connection in tuple(self._connections):
            connection.abort()
        await self._tasks.close()
        await self._all_gone.wait()
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None

    # -- called by a connection

    def opened(self, connection: Connection, address: str) -> ClientLimit | None:
        """Register a connection; return the limit that it exceeds, if any."""
        limits, network = self.limits, network_of(address)
        exceeded = None
        if len(self._connections) >= self._max_connections:
            exceeded = ClientLimit.CONNECTIONS
        elif network and self._by_network[network] >= limits.connections_per_address:
            exceeded = ClientLimit.CONNECTIONS_PER_ADDRESS
        self._all_gone.clear()
        self._connections.add(connection)
        if network:
            self._by_network[network] += 1
        return exceeded

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self._connections.discard(connection)
        if network := network_of(connection.address):
            self._by_network[network] -= 1
            if not self._by_network[network]:
                del self._by_network[network]
        if not self._connections:
            self._all_gone.set()

    def start_serving(self, connection: Connection) -> asyncio.Task[None]:
        """Run `connection.serve()` as a task."""
        return self._tasks.start(connection.serve(), "client")

    # -- deadlines

    def look(self) -> None:
        """Expire all connections whose deadlines have passed."""
        now = self.now()
        for connection in tuple(self._connections):
            if connection.deadline <= now:
                connection.expire(now)
        self._observer.in_use(len(self._connections), self.heads.used, self.bodies.used)

    def _look(self) -> None:
        self.look()
        if self._looking is not None:
            self._looking.start(_look_seconds(self.limits))


def _accepted(listening: socket.socket) -> Iterator[socket.socket]:
    """Take the connections that wait at a socket which does not block. The loop may take one each time it polls."""
    while True:
        try:
            yield listening.accept()[0]
        except OSError:  # none is left, or there are no descriptors for more
            return


def network_of(address: str) -> str:
    """Return the unit of the limit per address: an IPv4 address or an IPv6 network; "" if there is no address."""
    if ":" not in address:
        return address
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, _PREFIX_BITS), strict=False))


def _look_seconds(limits: Limits) -> float:
    """Return the seconds between two checks of the deadlines: a quarter of the shortest limit, within bounds."""
    shortest = min(
        limits.head_seconds,
        limits.keepalive_seconds,
        limits.write_seconds,
        limits.linger_seconds,
        limits.body_seconds,
    )
    return min(_LOOK_SECONDS_MOST, max(_LOOK_SECONDS_LEAST, shortest / 4))

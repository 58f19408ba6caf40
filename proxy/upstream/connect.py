"""Open a connection: resolve, connect and do the TLS handshake within one limit; map foreign errors once."""

from __future__ import annotations

import asyncio
import copy
import socket
import ssl
from collections.abc import Callable
from typing import Final

from aiohappyeyeballs import AddrInfoType, start_connection

from proxy.errors import ConnectFailed, ConnectTimeout, TlsFailed
from proxy.tasks import Tasks
from proxy.upstream.connection import Connection
from proxy.upstream.origin import Origin

NEXT_ADDRESS_SECONDS: Final = 0.5
"""Time after which the next address is tried beside one that has not accepted yet. One on the other side of the earth
takes 0.3.
"""

SHARED_SECONDS: Final = 0.5
"""A look-up that takes longer is not waited for by others: a resolver asks again only seconds after a lost packet."""


_Found = list[AddrInfoType] | OSError | UnicodeError


class Lookups:
    """Resolves names. Connections that are opened at the same time share one look-up of their name.

    The system's resolver has a few threads and no cache: with a name server that takes 20 ms, a thousand look-ups
    take five seconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tasks = Tasks()
        self._running: dict[tuple[str, int], tuple[float, asyncio.Task[_Found]]] = {}

    async def addresses(self, origin: Origin) -> list[AddrInfoType]:
        """Return the addresses of the name, each once, in the resolver's order. Raises OSError or UnicodeError."""
        key = (origin.host, origin.port)
        began_seconds, running = self._running.get(key, (0.0, None))
        if running is None or running.done() or self._loop.time() - began_seconds > SHARED_SECONDS:
            running = self._tasks.start(self._look_up(*key), "look-up")
            self._running[key] = (self._loop.time(), running)
            running.add_done_callback(lambda task: self._ended(key, task))
        await asyncio.wait({running})  # one that is cancelled leaves the look-up to the others
        if running.cancelled():
            raise OSError("the client is closed")
        found = running.result()
        if isinstance(found, list):
            return found
        raise copy.copy(found)  # each has its own traceback

    async def close(self) -> None:
        """End all look-ups."""
        await self._tasks.close()

    async def _look_up(self, host: str, port: int) -> _Found:
        """Return the addresses, or the error, which is not one of the task's: each that waits for it raises it."""
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return error
        return list(dict.fromkeys(found))

    def _ended(self, key: tuple[str, int], task: asyncio.Task[_Found]) -> None:
        if key in self._running and self._running[key][1] is task:
            del self._running[key]


async def dial(
    loop: asyncio.AbstractEventLoop,
    lookups: Lookups,
    origin: Origin,
    ssl_context: ssl.SSLContext | None,
    make: Callable[[], Connection],
    limit_seconds: float,
) -> Connection:
    """Return a connection made by `make` and open to `origin`, within `limit_seconds` in all.

    Raises ConnectTimeout, TlsFailed (certificate or handshake) or ConnectFailed (refused, unreachable, no such name).
    """
    try:
        async with asyncio.timeout(limit_seconds):
            return await _connect(loop, await lookups.addresses(origin), origin, ssl_context, make())
    except TimeoutError:
        raise ConnectTimeout("the upstream could not be reached in time") from None
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason or "handshake"
        raise TlsFailed(f"no trusted TLS connection to the upstream: {reason}") from error
    except socket.gaierror as error:
        raise ConnectFailed("the upstream's name does not resolve") from error
    except UnicodeError as error:  # raised by the codec for host names if a label is too long
        raise ConnectFailed("the upstream's name is not a valid host name") from error
    except OSError as error:
        raise ConnectFailed("the upstream cannot be reached") from error


async def _connect(
    loop: asyncio.AbstractEventLoop,
    addresses: list[AddrInfoType],
    origin: Origin,
    ssl_context: ssl.SSLContext | None,
    connection: Connection,
) -> Connection:
    """Connect to the first address that accepts. Raises OSError."""
    name = origin.host if ssl_context is not None else None
    try:
        if len(addresses) == 1:
            host = str(addresses[0][4][0])
            await loop.create_connection(lambda: connection, host, origin.port, ssl=ssl_context, server_hostname=name)
        else:
            accepted = await _first_that_accepts(loop, addresses)
            await loop.create_connection(lambda: connection, sock=accepted, ssl=ssl_context, server_hostname=name)
    except BaseException:
        connection.discard()
        raise
    return connection


async def _first_that_accepts(loop: asyncio.AbstractEventLoop, addresses: list[AddrInfoType]) -> socket.socket:
    """Try the addresses of both families alternately, the next one beside those that are silent. Raises OSError."""
    if not addresses:
        raise OSError("the name has no address")
    try:
        return await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, interleave=1, loop=loop)
    except RuntimeError as error:  # uvloop's, for a descriptor that is in use
        raise OSError("no address could be tried") from error

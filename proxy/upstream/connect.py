"""Open a connection: resolve, connect and do the TLS handshake within one limit; map foreign errors once."""

from __future__ import annotations

import asyncio
import copy
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from typing import Final

from proxy.errors import ConnectFailed, ConnectTimeout, TlsFailed
from proxy.tasks import Tasks
from proxy.upstream.connection import Connection
from proxy.upstream.origin import Origin

NEXT_ADDRESS_SECONDS: Final = 0.5
"""An address that takes longer is not waited for alone. With TLS, one on the other side of the earth takes 0.4."""

SHARED_SECONDS: Final = 0.5
"""A look-up that takes longer is not waited for by others: a resolver asks again only seconds after a lost packet."""


class Lookups:
    """Resolves names. Connections that are opened at the same time share one look-up of their name.

    The system's resolver has a few threads and no cache: with a name server that takes 20 ms, a thousand look-ups
    take five seconds.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tasks = Tasks()
        self._running: dict[tuple[str, int], tuple[float, asyncio.Task[list[str] | OSError | UnicodeError]]] = {}

    async def addresses(self, origin: Origin) -> list[str]:
        """Resolve the name; alternate the two address families, the resolver's first choice first.

        Raises OSError or UnicodeError.
        """
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

    async def _look_up(self, host: str, port: int) -> list[str] | OSError | UnicodeError:
        """Return the addresses, or the error, which is not one of the task's: each that waits for it raises it."""
        try:
            found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            return error
        by_family: dict[int, list[str]] = {}
        for family, _, _, _, address in found:
            by_family.setdefault(family, []).append(str(address[0]))
        turns = chain.from_iterable(zip_longest(*by_family.values()))
        return list(dict.fromkeys(address for address in turns if address is not None))

    def _ended(self, key: tuple[str, int], task: asyncio.Task[list[str] | OSError | UnicodeError]) -> None:
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
    name = origin.host if ssl_context is not None else None

    def connect(address: str) -> Awaitable[Connection]:
        return _connect(loop, address, origin.port, ssl_context, name, make())

    try:
        async with asyncio.timeout(limit_seconds):
            addresses = await lookups.addresses(origin)
            return await (connect(addresses[0]) if len(addresses) == 1 else _first_of(addresses, connect))
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


async def _first_of(addresses: Sequence[str], connect: Callable[[str], Awaitable[Connection]]) -> Connection:
    """Connect to the first address that accepts ("happy eyeballs", which uvloop does not implement).

    The next address is tried as soon as one has failed, and beside those that take longer than
    `NEXT_ADDRESS_SECONDS`. Raises OSError.
    """
    opened: list[Connection] = []
    failures: list[OSError] = []
    news = asyncio.Event()

    async def attempt(address: str) -> None:
        try:
            opened.append(await connect(address))
        except OSError as error:
            failures.append(error)
        news.set()

    try:
        async with asyncio.TaskGroup() as group:
            attempts: list[asyncio.Task[None]] = []
            while not opened and len(failures) < len(addresses) and not _is_final(failures):
                is_last = len(attempts) == len(addresses)
                if not is_last:
                    attempts.append(group.create_task(attempt(addresses[len(attempts)])))
                news.clear()
                await _within(news, None if is_last else NEXT_ADDRESS_SECONDS)
            for each in attempts:
                each.cancel()
    except BaseException:
        for connection in opened:
            connection.discard()
        raise
    for connection in opened[1:]:
        connection.discard()
    if opened:
        return opened[0]
    raise failures[-1] if failures else OSError("the name has no address")


def _is_final(failures: Sequence[OSError]) -> bool:
    """Return whether a server responded, whose certificate is not trusted: it is the same at another address."""
    return any(isinstance(failure, ssl.SSLError) for failure in failures)


async def _within(event: asyncio.Event, seconds: float | None) -> None:
    """Wait for `event`, for at most `seconds` (None: without a limit)."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _connect(
    loop: asyncio.AbstractEventLoop,
    address: str,
    port: int,
    ssl_context: ssl.SSLContext | None,
    name: str | None,
    connection: Connection,
) -> Connection:
    try:
        await loop.create_connection(lambda: connection, address, port, ssl=ssl_context, server_hostname=name)
    except BaseException:
        connection.discard()
        raise
    return connection

"""Open a connection: resolve, connect and do the TLS handshake within one limit; map foreign errors once."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from itertools import chain, zip_longest

from proxy.errors import ConnectFailed, ConnectTimeout, TlsFailed
from proxy.upstream.connection import Connection
from proxy.upstream.origin import Origin


async def dial(
    loop: asyncio.AbstractEventLoop,
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
            return await _try_in_turn(loop, origin, ssl_context, make, limit_seconds)
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


async def _try_in_turn(
    loop: asyncio.AbstractEventLoop,
    origin: Origin,
    ssl_context: ssl.SSLContext | None,
    make: Callable[[], Connection],
    limit_seconds: float,
) -> Connection:
    """Connect to the first address that accepts. Each gets an equal share of the remaining time.

    uvloop does not implement happy eyeballs.
    """
    addresses = await _addresses(loop, origin)
    ends_at = loop.time() + limit_seconds
    name = origin.host if ssl_context is not None else None
    for position, address in enumerate(addresses):
        left = len(addresses) - position
        try:
            async with asyncio.timeout_at(loop.time() + (ends_at - loop.time()) / left):
                return await _connect(loop, address, origin.port, ssl_context, name, make())
        except ssl.SSLError:
            raise  # the server responded; another address would have the same certificate
        except OSError:
            if left == 1:
                raise
    raise OSError("the name has no address")


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


async def _addresses(loop: asyncio.AbstractEventLoop, origin: Origin) -> list[str]:
    """Resolve the name; alternate the two address families, the resolver's first choice first."""
    found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    by_family: dict[int, list[str]] = {}
    for family, _, _, _, address in found:
        by_family.setdefault(family, []).append(str(address[0]))
    turns = chain.from_iterable(zip_longest(*by_family.values()))
    return list(dict.fromkeys(address for address in turns if address is not None))

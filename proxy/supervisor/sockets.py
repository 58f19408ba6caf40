"""Open the listening sockets before any worker starts, so that no connection is reset when a worker ends.

On Linux every worker has its own socket on the same port and the kernel spreads connections over them. Elsewhere all
workers share one socket, because other kernels do not balance.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from proxy.clock import Clock
from proxy.errors import CairnError

_OWN_SOCKETS = sys.platform == "linux"
Address = tuple[socket.AddressFamily, tuple[str, int]]


class ListenError(CairnError):
    """An address cannot be bound; the message names it and the reason in one line."""

    is_in_use = False


RETRY_SECONDS = 3.0
"""Longest wait for a port whose owner is ending, for example the workers of a supervisor that was killed."""

_RETRY_PAUSE_SECONDS = 0.1
_CHOOSE_OWN = "give an address of this machine, or 0.0.0.0 for all of them, in --host or admin.host"
_Opened = TypeVar("_Opened")


async def when_free(open_sockets: Callable[[], _Opened], clock: Clock) -> _Opened:
    """Return `open_sockets()`, tried again for up to `RETRY_SECONDS` while the port is in use.

    Raises:
        ListenError: the port stayed in use, or cannot be opened at all.
    """
    deadline_seconds = clock.monotonic() + RETRY_SECONDS
    while True:
        try:
            return open_sockets()
        except ListenError as error:
            if not error.is_in_use or clock.monotonic() >= deadline_seconds:
                raise
        await asyncio.sleep(_RETRY_PAUSE_SECONDS)


def open_for_workers(host: str, port: int, workers: int, backlog: int) -> list[list[socket.socket]]:
    """Open the sockets of each worker: one for each address of `host`.

    Raises:
        ListenError: the port is in use, even by another Cairn that would share it, or not permitted.
    """
    opened: list[list[socket.socket]] = [[] for _ in range(workers)]
    try:
        for family, address in _addresses(host, port):
            first = open_one(family, address, backlog)  # fails if anything listens there
            if not _OWN_SOCKETS or workers == 1:
                for sockets in opened:
                    sockets.append(first)
                continue
            port = first.getsockname()[1]
            first.close()
            for sockets in opened:
                sockets.append(open_one(family, (address[0], port), backlog, shared=True))
    except ListenError:
        close_all(opened)
        raise
    return opened


def open_admin(host: str, port: int) -> socket.socket:
    """Open the admin port's socket, on the first address of `host`."""
    family, address = _addresses(host, port)[0]
    return open_one(family, address, 128)


def is_shared(end: socket.socket) -> bool:
    """Return whether other sockets may listen at the same address, as the workers' own do."""
    return sys.platform == "linux" and end.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) != 0


def renewed(end: socket.socket, take: Callable[[socket.socket], None]) -> socket.socket:
    """Close a shared socket and return another at its address, which gets no connections until its worker listens.

    `take` gets the connections that waited at the old one. Raises ListenError.
    """
    other = open_one(end.family, end.getsockname()[:2], None, shared=True)  # first, so that the port stays taken
    with suppress(OSError):  # BlockingIOError at last; any other error means that no further one can be had
        while True:
            take(end.accept()[0])
    end.close()
    return other


def open_one(family: int, address: tuple[str, int], backlog: int | None, *, shared: bool = False) -> socket.socket:
    """Open a socket that listens at `address`, or is only bound to it if `backlog` is None.

    `shared` lets other processes of this user listen there too.
    """
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        opened.bind(address)
        if backlog is not None:
            opened.listen(backlog)
        opened.setblocking(False)
    except OSError as error:
        opened.close()
        failure = ListenError(f"cannot listen on {address[0]} port {address[1]}: {_reason(error)}")
        failure.is_in_use = error.errno == errno.EADDRINUSE
        raise failure from None
    return opened


def close_all(opened: list[list[socket.socket]]) -> None:
    """Close every socket; closing a shared one twice is harmless."""
    for sockets in opened:
        for each in sockets:
            each.close()


def raise_descriptor_limit() -> None:
    """Raise the limit of open files as far as this user may; some systems start with 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 65_536)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # macOS refuses values above a limit that it does not report
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, 10_240)), hard))


def _addresses(host: str, port: int) -> Sequence[Address]:
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}: {error.strerror or error}; {_CHOOSE_OWN}") from None
    unique = {(family, (str(address[0]), port)): None for family, _, _, _, address in found}
    usable = [each for each in unique if each[0] in (socket.AF_INET, socket.AF_INET6)]
    if port == 0:  # otherwise two addresses would get two ports
        return usable[:1]
    return usable


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; choose another with --port or --admin-port"
    if error.errno == errno.EACCES:
        return "permission denied; ports below 1024 need a privilege (CAP_NET_BIND_SERVICE)"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"this machine does not have that address; {_CHOOSE_OWN}"
    return error.strerror or type(error).__name__

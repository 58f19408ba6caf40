"""Pass connections of clients from the supervisor to a worker, over a private Unix socket.

A connection that the kernel has assigned to a worker which then ended is served by another worker in this way. Each
is one byte with one descriptor.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

_MARK = b"c"


def hand_over(end: socket.socket, connection: socket.socket) -> bool:
    """Send `connection` through `end`, which does not block.

    Return False if the worker is gone, or has not read those before.
    """
    try:
        socket.send_fds(end, [_MARK], [connection.fileno()])
    except OSError:
        return False
    return True


class Handover:
    """The worker's end."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end

    def start(self, take: Callable[[socket.socket], None]) -> None:
        """Call `take` with each connection from now on."""
        asyncio.get_running_loop().add_reader(self._end, self._read, take)

    def close(self) -> None:
        """Take no more."""
        asyncio.get_running_loop().remove_reader(self._end)
        self._end.close()

    def _read(self, take: Callable[[socket.socket], None]) -> None:
        with suppress(BlockingIOError):
            mark, descriptors, _, _ = socket.recv_fds(self._end, len(_MARK), 1)
            for descriptor in descriptors:
                take(socket.socket(fileno=descriptor))
            if not mark:  # the supervisor has ended, which the control socket reports as well
                asyncio.get_running_loop().remove_reader(self._end)

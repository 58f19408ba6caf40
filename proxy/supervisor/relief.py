"""Serve the connections of a worker that does not respond, by passing them to another worker.

The kernel gives a worker its share of new connections whether or not it runs. The supervisor holds the same sockets
and can accept in the worker's place. For a worker that is only slow this is harmless, so it begins long before it is
certain that the worker is frozen.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Protocol

from proxy.supervisor.sockets import is_shared

log = logging.getLogger("cairn.supervisor")


class Heir(Protocol):
    """A worker that can take connections of another one; `WorkerProcess` in the product."""

    def adopt(self, connection: socket.socket) -> bool:
        """Serve `connection`, whose descriptor here may be closed afterwards. Return False if that is impossible."""


class Relief:
    """Accepts on the sockets of one worker while it is started.

    Args:
        number: the worker, for the log.
        sockets: the worker's sockets. Those that all workers share are left alone: the others accept there anyway.
        heir: returns the worker that gets a connection, None if no other one responds.
    """

    def __init__(self, number: int, sockets: Sequence[socket.socket], heir: Callable[[], Heir | None]) -> None:
        self._number = number
        self._sockets = sockets
        self._heir = heir
        self._relieved: list[socket.socket] = []
        self._passed_on = 0
        self._lost = 0

    def start(self) -> None:
        """Accept from now on, if another worker responds. Can be called again while started."""
        if self._relieved or self._heir() is None:
            return
        self._relieved = [each for each in self._sockets if is_shared(each)]
        for each in self._relieved:
            asyncio.get_running_loop().add_reader(each, self._pass_on, each)

    def stop(self) -> None:
        """Accept no more. To be called before the sockets are closed; can be called twice."""
        for each in self._relieved:
            asyncio.get_running_loop().remove_reader(each)
        self._relieved = []
        if self._passed_on:
            log.warning(
                "worker %d did not respond: %d new connections went to other workers", self._number, self._passed_on
            )
        if self._lost:
            log.warning("worker %d: %d connections that waited for it were closed", self._number, self._lost)
        self._passed_on = self._lost = 0

    def _pass_on(self, end: socket.socket) -> None:
        heir = self._heir()
        if heir is None:
            self.stop()  # a connection that nobody can take had better wait
            return
        try:
            connection = end.accept()[0]
        except BlockingIOError:
            return  # the worker runs again and was faster
        except OSError:  # no descriptors are left, for example
            self.stop()
            return
        if heir.adopt(connection):
            self._passed_on += 1
        else:
            self._lost += 1
        connection.close()

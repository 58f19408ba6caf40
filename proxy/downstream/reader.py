"""Reads all clients' connections into one room, and gives each session a copy of what is its own.

An event loop that is left to itself reads into a room of its own and copies what it got to an object, of which the
parser and whoever joins the pieces make further copies. Here the head and what came behind it are copied once each.
The room is as large as a short body and its head; a longer body is read straight to its place (`long_body`).

It must not know HTTP beyond the end of a head.
"""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

ROOM_BYTES: Final = 72 * 1024
"""A body of 64 KB comes whole with its head; of a longer one so much is copied twice."""

AHEAD_BYTES: Final = 16 * 1024
"""From so much in one read on: what is spared is a copy and some calls, what it costs is a new parser (1 us)."""

_HEAD_BYTES_MOST: Final = 64 * 1024  # searched for its end


class Session(Protocol):
    """Whose connection it is: `proxy.downstream.connection.Session`."""

    @property
    def awaits_head(self) -> bool:
        """True between two requests."""
        ...

    def head_came(self, head: bytes, ahead: bytes) -> None:
        """One read gave a whole head and what came behind it, mostly the beginning of its body."""
        ...

    def connection_made(self, transport: asyncio.BaseTransport) -> None: ...
    def connection_lost(self, exc: BaseException | None) -> None: ...
    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> bool | None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class Reader(asyncio.BufferedProtocol):
    """The protocol of one connection: reads for `session`, and hands everything else on to it.

    `room` is what all readers of one event loop fill in turn: it is read out before another one is asked.
    """

    def __init__(self, session: Session, room: bytearray) -> None:
        self.session = session
        self._room = room
        self._view = memoryview(room)

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        """Where the loop puts what comes."""
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        """So much came."""
        session, view = self.session, self._view
        if nbytes >= AHEAD_BYTES and session.awaits_head:
            searched = nbytes if nbytes < _HEAD_BYTES_MOST else _HEAD_BYTES_MOST
            end = self._room.find(b"\r\n\r\n", 0, searched)
            if end >= 0:
                end += 4
                session.head_came(bytes(view[:end]), bytes(view[end:nbytes]))
                return
        session.data_received(bytes(view[:nbytes]))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.session.connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.session.connection_lost(exc)

    def eof_received(self) -> bool | None:
        return self.session.eof_received()

    def pause_writing(self) -> None:
        self.session.pause_writing()

    def resume_writing(self) -> None:
        self.session.resume_writing()

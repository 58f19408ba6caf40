"""Connections of a worker that does not respond."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import pytest

from proxy.supervisor.relief import Relief
from proxy.supervisor.sockets import open_one

LIMIT_SECONDS = 60.0


class OtherWorker:
    """Takes as many connections as it has `room` for."""

    def __init__(self, room: int = 1000) -> None:
        self.adopted: list[socket.socket] = []
        self.asked = asyncio.Queue[bool]()
        self._room = room

    def adopt(self, connection: socket.socket) -> bool:
        takes = len(self.adopted) < self._room
        if takes:
            self.adopted.append(connection.dup())
        self.asked.put_nowait(takes)
        return takes


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """The socket of a worker that accepts nothing."""
    with open_one(socket.AF_INET, ("127.0.0.1", 0), 128, shared=True) as end:
        yield end


def client_of(end: socket.socket) -> socket.socket:
    return socket.create_connection(end.getsockname(), LIMIT_SECONDS)


async def test_connections_that_wait_and_new_ones_go_to_another_worker(
    silent: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """Until the worker responds again; how many there were is logged."""
    other = OtherWorker()
    relief = Relief(3, [silent], lambda: other)
    with client_of(silent) as first, contextlib.ExitStack() as closing:
        relief.start()
        async with asyncio.timeout(LIMIT_SECONDS):
            assert await other.asked.get()
            with client_of(silent):
                assert await other.asked.get()
        for adopted in other.adopted:
            closing.enter_context(adopted)
        other.adopted[0].sendall(b"served")
        assert first.recv(6) == b"served"
        relief.stop()
        with client_of(silent):
            silent.setblocking(True)
            silent.settimeout(LIMIT_SECONDS)
            silent.accept()[0].close()  # the worker's own again
    assert "worker 3 did not respond: 2 new connections went to other workers" in caplog.text


async def test_a_connection_waits_if_no_other_worker_responds(silent: socket.socket) -> None:
    """It is not accepted, so the worker or its successor can serve it."""
    heirs: list[OtherWorker | None] = [OtherWorker(), None]
    was_asked = asyncio.Event()

    def heir() -> OtherWorker | None:
        if len(heirs) == 1:
            was_asked.set()
        return heirs.pop(0)

    relief = Relief(0, [silent], heir)
    relief.start()
    with client_of(silent):
        async with asyncio.timeout(LIMIT_SECONDS):
            await was_asked.wait()
        silent.accept()[0].close()


async def test_a_connection_that_the_other_worker_cannot_take_is_closed(
    silent: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client can try again at once; waiting for nobody would be worse."""
    other = OtherWorker(room=0)
    relief = Relief(0, [silent], lambda: other)
    relief.start()
    with client_of(silent) as client:
        async with asyncio.timeout(LIMIT_SECONDS):
            assert not await other.asked.get()
        assert client.recv(1) == b""
    relief.stop()
    assert "1 connections that waited for it were closed" in caplog.text


async def test_a_socket_that_all_workers_share_is_left_alone() -> None:
    """The others accept there by themselves."""
    with open_one(socket.AF_INET, ("127.0.0.1", 0), 128) as end, client_of(end):
        other = OtherWorker()
        relief = Relief(0, [end], lambda: other)
        relief.start()
        await asyncio.sleep(0)
        end.accept()[0].close()
        relief.stop()
    assert not other.adopted

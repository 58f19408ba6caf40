"""Connections that the supervisor passes to a worker."""

from __future__ import annotations

import asyncio
import socket

from proxy.control.handover import Handover, hand_over


async def test_connections_arrive_in_their_order_each_once() -> None:
    """Also if several wait; the sender may close its copies."""
    ours, theirs = socket.socketpair()
    taken, handover = asyncio.Queue[socket.socket](), Handover(theirs)
    ends = [socket.socketpair() for _ in range(3)]
    for here, there in ends:
        assert hand_over(ours, there)
        there.close()
        here.sendall(b"%d" % here.fileno())
    handover.start(taken.put_nowait)
    async with asyncio.timeout(20):
        for here, _ in ends:
            with await taken.get() as connection:
                assert connection.recv(8) == b"%d" % here.fileno()
            here.close()
    assert taken.empty()
    handover.close()
    ours.close()


async def test_a_worker_that_reads_nothing_or_is_gone_is_reported() -> None:
    """The supervisor never waits for it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with socket.socket() as connection:
        while hand_over(ours, connection):
            pass
        theirs.close()
        assert not hand_over(ours, connection)
    ours.close()


async def test_the_end_of_the_supervisor_ends_nothing_else() -> None:
    """The loop does not spin on the closed socket."""
    ours, theirs = socket.socketpair()
    handover, taken = Handover(theirs), list[socket.socket]()
    handover.start(taken.append)
    ours.close()
    for _ in range(5):  # turns of the loop
        await asyncio.sleep(0)
    assert not asyncio.get_running_loop().remove_reader(theirs)
    assert taken == []
    handover.close()

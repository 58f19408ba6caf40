"""One timer for many connections: whom it expires, and whom it forgets."""

from __future__ import annotations

import asyncio
import math

from proxy.tasks import Tasks
from proxy.upstream.timeouts import Deadlines
from tests.support.clock import FakeClock


class Connection:
    """Something that is late, or not; it keeps what is asked of it and leaves only when the test says so."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.expired = self.closed = 0

    def expire(self) -> None:
        self.expired += 1
        self.deadline = math.inf

    def close(self) -> None:
        self.closed += 1


async def test_what_is_discarded_is_not_expired_nor_waited_for() -> None:
    """Its deadline sets no timer either; discarding it twice changes nothing."""
    clock = FakeClock()
    deadlines = Deadlines(asyncio.get_running_loop(), clock)
    late, gone, later = Connection(1_001.0), Connection(1_001.0), Connection(1_009.0)
    for each in (late, gone, later):
        deadlines.add(each)
    deadlines.discard(gone)
    deadlines.discard(gone)
    clock.advance(2.0)
    deadlines.ring()
    assert (late.expired, gone.expired, later.expired) == (1, 0, 0)
    assert (len(deadlines), deadlines.next_at) == (2, 1_009.0)
    deadlines.discard(later)
    deadlines.ring()
    assert deadlines.next_at == math.inf


async def test_closing_lasts_until_the_last_one_is_discarded() -> None:
    """Each is told to close once; with nothing watched there is nothing to wait for."""
    deadlines = Deadlines(asyncio.get_running_loop(), FakeClock())
    await deadlines.close()
    first, last = Connection(math.inf), Connection(math.inf)
    deadlines.add(first)
    deadlines.add(last)
    closing = Tasks().start(deadlines.close(), "closing")
    await asyncio.sleep(0)
    assert (first.closed, last.closed) == (1, 1)
    deadlines.discard(first)
    await asyncio.sleep(0)
    assert not closing.done()
    deadlines.discard(last)
    await asyncio.sleep(0)
    assert closing.done()

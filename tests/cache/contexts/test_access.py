"""Redis's clock as a worker knows it."""

from __future__ import annotations

from cache.contexts.access import Access
from tests.support.clock import FakeClock
from tests.support.context_store import LIMITS
from tests.support.fake_store import FakeStore


class SteppedClock(FakeClock):
    """A clock whose wall clock can be set."""

    def set_unix(self, seconds: float) -> None:
        self._unix = seconds


def test_a_step_of_the_wall_clock_does_not_move_redis_clock() -> None:
    """So with Redis away a stored context neither expires before its time nor lives longer."""
    clock = SteppedClock(unix_seconds=1_700_000_000.0)
    access = Access(FakeStore().as_store(), LIMITS, clock)
    assert access.now() == 1_700_000_000.0
    for redis_ms in (None, 1_800_000_000_000):
        if redis_ms is not None:
            access.set_clock(redis_ms)
        before = access.now()
        clock.set_unix(clock.unix() + 7200)
        assert access.now() == before
        clock.advance(3.0)
        assert access.now() == before + 3.0
    assert access.now() == 1_800_000_003.0

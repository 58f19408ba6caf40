"""The timer of deadlines, on a loop whose time only the test moves."""

from __future__ import annotations

import asyncio

import pytest

from proxy.timers import DeadlineTimer


class Ringing:
    """A timer on the running loop, and what it and the loop's sockets did, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time()
        monkeypatch.setattr(self.loop, "time", lambda: self.now)
        self.done: list[str] = []
        self.timer = DeadlineTimer(self.loop, lambda: self.done.append("rung"))

    async def pass_by(self, seconds: float) -> None:
        """Move the time in one step, and let the loop handle what became due."""
        self.now += seconds
        for _ in range(3):
            await asyncio.sleep(0)


async def test_a_timer_rings_once_at_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, and not again; started a second time it rings only at the later time."""
    ringing = Ringing(monkeypatch)
    ringing.timer.start(5.0)
    ringing.timer.start(10.0)
    await ringing.pass_by(9.9)
    assert ringing.done == []
    await ringing.pass_by(0.15)
    assert ringing.done == ["rung"]
    await ringing.pass_by(20.0)
    assert ringing.done == ["rung"]


async def test_after_a_pause_the_loop_reads_its_sockets_before_the_timer_rings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then it rings, however late the loop is in that moment: a loop that is always late has deadlines, too."""
    ringing = Ringing(monkeypatch)
    ringing.timer.start(10.0)
    await ringing.pass_by(60.0)
    assert ringing.done == []
    await ringing.pass_by(60.0)
    assert ringing.done == ["rung"]


@pytest.mark.parametrize("seconds", [9.0, 60.0])
async def test_a_cancelled_timer_does_not_ring(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Neither before its time nor while it is put off."""
    ringing = Ringing(monkeypatch)
    ringing.timer.start(10.0)
    await ringing.pass_by(seconds)
    ringing.timer.cancel()
    await ringing.pass_by(60.0)
    assert ringing.done == []

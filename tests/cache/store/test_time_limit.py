"""The limit of an operation, on a loop whose time only the test moves."""

from __future__ import annotations

import asyncio
from typing import Final

import pytest

from cache.store.time_limit import time_limit

LIMIT_SECONDS: Final = 10.0


class LoopTime:
    """The time of the running loop, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = asyncio.get_running_loop().time()
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)

    async def pass_by(self, seconds: float) -> None:
        """Move the time in one step, and let the loop handle what became due."""
        self.now += seconds
        for _ in range(3):
            await asyncio.sleep(0)


async def limited(reply: asyncio.Future[str]) -> str:
    async with time_limit(LIMIT_SECONDS):
        return await reply


async def begin() -> tuple[asyncio.Future[str], asyncio.Task[str]]:
    reply = asyncio.get_running_loop().create_future()
    operation = asyncio.get_running_loop().create_task(limited(reply))
    await asyncio.sleep(0)
    return reply, operation


async def test_an_operation_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before, and at the limit with a TimeoutError, if the loop was running all the time."""
    time = LoopTime(monkeypatch)
    _, operation = await begin()
    await time.pass_by(LIMIT_SECONDS - 0.01)
    assert not operation.done()
    await time.pass_by(0.01)
    with pytest.raises(TimeoutError):
        await operation


async def test_a_reply_that_came_during_a_pause_of_the_loop_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer is handled first; the reply is read behind it, and the operation has succeeded."""
    time = LoopTime(monkeypatch)
    reply, operation = await begin()
    await time.pass_by(LIMIT_SECONDS + 0.5)
    assert not operation.done()
    reply.set_result("late")
    assert await operation == "late"


async def test_a_pause_begins_the_limit_again_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a loop that is always late would never give up."""
    time = LoopTime(monkeypatch)
    _, operation = await begin()
    await time.pass_by(LIMIT_SECONDS + 0.5)
    await time.pass_by(LIMIT_SECONDS + 0.5)
    with pytest.raises(TimeoutError):
        await operation


async def test_an_operation_that_is_cancelled_ends_as_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that is due at the same time does not turn it into a TimeoutError, nor fire later."""
    time = LoopTime(monkeypatch)
    _, operation = await begin()
    operation.cancel()
    await time.pass_by(LIMIT_SECONDS)
    assert operation.cancelled()

"""Waiting for a replica whose concurrent work is limited: every ending gives the place on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from proxy.errors import ConnectFailed, DeadlineUnreachable, Overloaded, RateLimited
from proxy.routing.fair_shares import Priority, Share, TenantShares
from proxy.routing.replica_queue import RECHECK_SECONDS, QueueLimits, ReplicaQueue
from tests.support.clock import FakeClock
from tests.support.operations import operations


def queue_of(limit: int | None, **limits: float) -> ReplicaQueue:
    return ReplicaQueue(limit, QueueLimits(**limits), FakeClock())  # type: ignore[arg-type]


async def waiter(queue: ReplicaQueue, work: float, order: list[float]) -> None:
    async with await queue.acquire(work):
        order.append(work)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_without_a_limit_nothing_waits():
    """It is off where no limit is known."""
    queue = queue_of(None)
    permits = [await queue.acquire(1.0) for _ in range(100)]
    assert (len(queue), queue.running) == (0, 100)
    for permit in permits:
        permit.done()
        permit.done()
    assert queue.running == 0


async def test_a_queue_is_among_those_in_use_while_requests_wait_in_it():
    """So that nobody looks at the others."""
    in_use: dict[ReplicaQueue, None] = {}
    queue = ReplicaQueue(1, QueueLimits(), FakeClock(), in_use=in_use)
    first = await queue.acquire(1.0)
    assert not in_use
    waiting = asyncio.get_running_loop().create_task(queue.acquire(1.0))
    await settle()
    assert list(in_use) == [queue]
    first.done()
    await waiting
    assert not in_use


async def test_a_crowded_replica_gets_one_at_a_time_and_tenants_take_turns():
    """Each request counts before the next is sent: a queue that opens does not let all through at once."""
    sent: list[str] = []
    room = [0]
    queue = ReplicaQueue(None, QueueLimits(), FakeClock(), is_crowded=lambda: len(sent) >= room[0])

    async def send(tenant: str) -> None:
        await queue.acquire(1.0, Share(tenant, tokens=50_000.0))
        sent.append(tenant)

    tasks = [asyncio.get_running_loop().create_task(send(tenant)) for tenant in "aaaab"]
    await settle()
    assert (sent, len(queue)) == ([], 5)
    for opened in (1, 2, 3):
        room[0] = opened
        queue.look()
        await settle()
        assert len(sent) == opened
    assert sent[:2] in (["a", "b"], ["b", "a"])
    for task in tasks:
        task.cancel()


async def test_the_wait_for_a_place_is_predicted_by_the_rate_at_which_others_got_one():
    """By the order of the queue; by the work before it until a rate is measured. None if a place is free."""
    clock = FakeClock()
    queue = ReplicaQueue(1, QueueLimits(), clock)
    assert (queue.has_place, queue.wait_seconds(1.0, Share("a"), 9.0)) == (True, 0.0)
    permit = await queue.acquire(1.0, Share("a"))
    assert (queue.has_place, queue.wait_seconds(1.0, Share("a"), 9.0)) == (False, 9.0)
    others = [asyncio.get_running_loop().create_task(queue.acquire(1.0, Share("a"))) for _ in range(6)]
    await settle()
    assert queue.wait_seconds(1.0, Share("a"), 9.0) == pytest.approx(9.0 + 6.0)
    assert queue.wait_seconds(0.9, Share("a"), 9.0) == pytest.approx(9.0)
    for each in others[:2]:
        clock.advance(4.0)
        permit.done()
        permit = await each
    assert queue.wait_seconds(1.0, Share("a"), 9.0) == pytest.approx(4.0 * 5)  # four before it, and its own
    assert queue.wait_seconds(0.9, Share("a"), 9.0) == pytest.approx(4.0 * 5)  # the others have waited for 8 s
    assert queue.wait_seconds(0.1, Share("a"), 9.0) == pytest.approx(4.0)
    assert queue.wait_seconds(1.0, Share("b"), 9.0) == pytest.approx(4.0 * 2)
    assert queue.wait_seconds(1.0, Share("a", priority=Priority.HIGH), 9.0) == pytest.approx(4.0)
    assert queue.wait_seconds(0.1, Share("b", priority=Priority.LOW), 9.0) == pytest.approx(4.0 * 5)
    for each in others:
        each.cancel()
    await settle()


async def test_what_is_sent_at_once_counts_for_its_tenant():
    """By its tokens: a tenant that had much goes behind one that had nothing, once both wait."""
    shares = TenantShares()
    for tenant in "ab":
        shares.seen(tenant, 1.0, 0.0)
    queue = ReplicaQueue(1, QueueLimits(), FakeClock(), shares=shares)
    first = await queue.acquire(1.0, Share("a", tokens=1_000_000.0))
    assert shares.round_of("a") > shares.round_of("b")
    assert queue.try_acquire(Share("b", tokens=1.0)) is None
    first.done()


async def test_several_events_in_one_moment_let_one_request_go():
    """The first counts as sent only once its task has run, however often it is looked until then."""
    sent: list[int] = []
    open_for = [0]
    queue = ReplicaQueue(None, QueueLimits(), FakeClock(), is_crowded=lambda: len(sent) >= open_for[0])

    async def send(number: int) -> None:
        await queue.acquire(1.0)
        sent.append(number)

    tasks = [asyncio.get_running_loop().create_task(send(number)) for number in range(6)]
    await settle()
    open_for[0] = 1
    for _ in range(5):
        queue.look()
    await settle()
    assert (len(sent), len(queue)) == (1, 5)
    open_for[0] = 2
    queue.look()
    next(task for task in tasks if not task.done()).cancel()  # maybe the one that was just let go
    await settle()
    assert (len(sent), len(queue)) == (2, 3)
    for task in tasks:
        task.cancel()


async def test_waiting_requests_are_served_least_work_first():
    """As places become free."""
    queue = queue_of(1)
    first = await queue.acquire(1.0)
    order: list[float] = []
    async with asyncio.TaskGroup() as group:
        for work in (9.0, 0.1, 2.0):
            group.create_task(waiter(queue, work, order))
        await settle()
        assert (len(queue), queue.running) == (3, 1)
        first.done()
    assert order == [0.1, 2.0, 9.0]
    assert (len(queue), queue.running) == (0, 0)


async def test_a_client_that_leaves_is_gone_from_the_line():
    """And takes no place with it."""
    queue = queue_of(1)
    first = await queue.acquire(1.0)
    order: list[float] = []
    left, stays = (asyncio.get_running_loop().create_task(waiter(queue, work, order)) for work in (1.0, 2.0))
    await settle()
    left.cancel()
    await settle()
    assert len(queue) == 1
    first.done()
    await stays
    assert order == [2.0]
    assert queue.running == 0


async def test_one_that_is_cancelled_in_the_moment_of_its_turn_gives_it_on():
    """The permit was given, the task never ran: the next one gets it."""
    queue = queue_of(1)
    first = await queue.acquire(1.0)
    order: list[float] = []
    unlucky, stays = (asyncio.get_running_loop().create_task(waiter(queue, work, order)) for work in (1.0, 2.0))
    await settle()
    first.done()
    unlucky.cancel()
    await stays
    assert order == [2.0]
    assert (len(queue), queue.running) == (0, 0)


async def test_the_deadline_answers_503():
    """With Retry-After, and the place is given up."""
    queue = queue_of(1, deadline_seconds=0.01)
    await queue.acquire(1.0)
    with pytest.raises(Overloaded) as caught:
        await queue.acquire(1.0)
    assert caught.value.status == 503
    assert caught.value.retry_after_seconds == 1.0
    assert caught.value.message == "The request waited too long for a replica."
    assert len(queue) == 0


async def test_beyond_its_length_it_answers_429():
    """At once, with Retry-After."""
    queue = queue_of(1, max_waiting=1)
    first = await queue.acquire(1.0)
    order: list[float] = []
    task = asyncio.get_running_loop().create_task(waiter(queue, 1.0, order))
    await settle()
    with pytest.raises(RateLimited) as caught:
        await queue.acquire(1.0)
    assert (caught.value.status, caught.value.retry_after_seconds) == (429, 12.0)
    assert caught.value.message == "Too many requests wait for a replica."
    first.done()
    await task


async def test_when_the_replica_is_down_all_that_wait_are_told():
    """They can go elsewhere, and none waits without hope."""
    queue = queue_of(1)
    permit = await queue.acquire(1.0)
    tasks = [asyncio.get_running_loop().create_task(queue.acquire(1.0)) for _ in range(3)]
    await settle()
    queue.fail(ConnectFailed("The replica is down."))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [ConnectFailed] * 3
    assert (len(queue), queue.running) == (0, 1)
    permit.done()
    assert queue.running == 0


async def test_to_tell_all_that_wait_takes_as_long_for_each_where_more_tenants_wait():
    """A thousand of as many tenants held up the worker for a second."""

    async def cost(waiting: int) -> float:
        queue = queue_of(1)
        await queue.acquire(1.0)
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(queue.acquire(1.0, Share(f"t{number:03}"))) for number in range(waiting)]
        await settle()
        taken = operations(lambda: queue.fail(ConnectFailed("The replica is down.")))
        assert len(await asyncio.gather(*tasks, return_exceptions=True)) == waiting
        return taken / waiting

    assert await cost(400) < 1.5 * await cost(40)


async def test_a_raised_limit_lets_the_next_pass():
    """At once; a lowered one takes no permit back."""
    queue = queue_of(1)
    first = await queue.acquire(1.0)
    order: list[float] = []
    task = asyncio.get_running_loop().create_task(waiter(queue, 1.0, order))
    await settle()
    queue.set_limit(2)
    await task
    queue.set_limit(1)
    assert queue.running == 1
    assert queue.try_acquire() is None
    first.done()
    assert queue.try_acquire() is not None


async def test_what_other_processes_leave_free_is_taken_a_moment_later():
    """The share at once; more when news of the others shows it free, since a burst reaches all processes together."""
    allowed = 1
    queue = ReplicaQueue(4, QueueLimits(), FakeClock(), lambda waiting, _is_first: allowed)
    first = await queue.acquire(1.0)
    order: list[float] = []
    task = asyncio.get_running_loop().create_task(waiter(queue, 1.0, order))
    await settle()
    assert (len(queue), queue.running) == (1, 1)
    allowed = 2
    async with asyncio.timeout(20):
        await task
    assert order == [1.0]
    first.done()


async def test_other_bounds_hold_from_the_next_request_on():
    """As after a reload."""
    queue = queue_of(1)
    await queue.acquire(1.0)
    queue.set_limits(QueueLimits(deadline_seconds=0.01, max_waiting=1))
    with pytest.raises(Overloaded):
        await queue.acquire(1.0)


@pytest.mark.parametrize("deadline_seconds", [0.01, -5.0])
async def test_a_request_waits_no_longer_than_its_own_deadline(deadline_seconds: float):
    """Also one that has passed when it comes; the client is told when to come back."""
    queue = queue_of(1)
    first = await queue.acquire(1.0)
    now_seconds = queue._clock.monotonic()  # noqa: SLF001 - the clock of the test itself
    with pytest.raises(DeadlineUnreachable) as caught:
        await queue.acquire(1.0, deadline_seconds=now_seconds + deadline_seconds)
    assert caught.value.retry_after_seconds == 12.0
    assert len(queue) == 0
    first.done()


async def test_a_deadline_that_is_later_than_the_queues_does_not_lengthen_it():
    queue = queue_of(1, deadline_seconds=0.01)
    first = await queue.acquire(1.0)
    with pytest.raises(Overloaded) as caught:
        await queue.acquire(1.0, deadline_seconds=1e9)
    assert not isinstance(caught.value, DeadlineUnreachable)
    first.done()


async def test_it_matters_for_whom_a_request_is_served_once_there_are_several_tenants():
    shares = TenantShares()
    queue = ReplicaQueue(1, QueueLimits(), FakeClock(), shares=shares)
    shares.seen("a", 1.0, 0.0)
    assert not queue.needs_share
    shares.seen("b", 1.0, 0.0)
    assert queue.needs_share


async def test_places_of_others_are_asked_for_once_their_news_had_time_to_come(monkeypatch: pytest.MonkeyPatch):
    """At the second look, which comes a tenth of a second later; when none waits the count begins anew."""
    timers: list[tuple[float, Callable[[], object]]] = []
    loop = asyncio.get_running_loop()
    asked: list[int] = []

    def places(waiting: int, _is_first: bool) -> int:
        asked.append(waiting)
        return 1

    queue = ReplicaQueue(4, QueueLimits(), FakeClock(), places)
    first = await queue.acquire(1.0)
    later = loop.call_later

    def noted(delay: float, call: Callable[..., object], *about: object) -> asyncio.TimerHandle:
        if delay == RECHECK_SECONDS:
            timers.append((delay, lambda: call(*about)))
        return later(1_000.0, call, *about)

    monkeypatch.setattr(loop, "call_later", noted)
    waits = [loop.create_task(queue.acquire(1.0)) for _ in range(2)]
    for _ in range(2):
        await settle()
        assert len(timers) == 1
        asked.clear()
        for expected in (0, 2):
            timers.pop()[1]()
            assert asked[-1] == expected
        for each in waits:
            each.cancel()
        await settle()
        timers.pop()[1]()
        assert timers == []
        waits = [loop.create_task(queue.acquire(1.0)) for _ in range(2)]
    for each in waits:
        each.cancel()
    await settle()
    first.done()


async def test_a_look_at_an_empty_queue_changes_nothing():
    queue = queue_of(1)
    first = await queue.acquire(1.0)
    queue.look()
    assert (len(queue), queue.running) == (0, 1)
    first.done()


async def test_a_request_that_was_cancelled_in_the_moment_of_its_turn_gives_it_to_the_next():
    """Also when all are told that the replica is down in that moment."""
    queue = queue_of(1)
    first = await queue.acquire(1.0)
    order: list[float] = []
    loop = asyncio.get_running_loop()
    leaving, staying = (loop.create_task(waiter(queue, work, order)) for work in (1.0, 2.0))
    await settle()
    first.done()
    leaving.cancel()
    await settle()
    assert order == [2.0]
    assert staying.done()
    first = await queue.acquire(1.0)
    leaving = loop.create_task(waiter(queue, 1.0, order))
    await settle()
    leaving.cancel()
    queue.fail(ConnectFailed("The replica is down."))
    first.done()
    await settle()
    assert (len(queue), queue.running) == (0, 0)

"""The queue before a replica whose concurrent requests are limited; the order is `proxy.routing.shortest_job`'s.

One `ReplicaQueue` per replica and process. Only events wake it: the end of a request, a raised limit, a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from math import inf
from types import TracebackType
from typing import Final

from proxy.clock import Clock
from proxy.errors import CairnError, DeadlineUnreachable, Overloaded, RateLimited
from proxy.routing.fair_shares import ALONE, Claimant, FairQueue, Priority, Share, TenantShares
from proxy.routing.queue_heads import OWED, Elsewhere, Head, waiting_in
from proxy.routing.shortest_job import AGEING, ShortestJobQueue
from proxy.routing.waiting_rate import WaitingRate

RECHECK_SECONDS: Final = 0.05
"""Interval at which waiting requests check whether other processes leave places free."""

CHECKS_BEFORE_BORROWING: Final = 2
"""Checks before a process takes more than its share. A burst reaches all processes together, and their reports
take about 10 ms, more if a loop is busy, so each first waits for the reports of the others.
"""


OTHERS_SECONDS: Final = 3.0
"""Longest time for which a process sends nothing because others have sent enough."""

ANYONE: Final = Share()
_TOO_LONG: Final = Overloaded
_PASSED: Final = DeadlineUnreachable


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """A request waits for at most `deadline_seconds`; at most `max_waiting` requests wait."""

    deadline_seconds: float = 120.0
    max_waiting: int = 1_024


class Permit:
    """One request's place at its replica; `async with` or `done` gives it to the next request."""

    __slots__ = ("_queue",)

    def __init__(self, queue: ReplicaQueue) -> None:
        self._queue: ReplicaQueue | None = queue

    def done(self) -> None:
        """Give the place back. May be called twice."""
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.release()

    async def __aenter__(self) -> Permit:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.done()


class ReplicaQueue:
    """Lets at most `limit` requests be at a replica at a time; None means no limit.

    `places`, if given, maps the number of requests waiting here, and whether the first of them goes before those of
    other processes, to the number of places that this process may use now. `heads` returns those processes' first
    requests. While requests wait, the queue is a key of `in_use`.
    """

    def __init__(  # noqa: PLR0913 - one keyword for each thing that may be left out
        self,
        limit: int | None,
        limits: QueueLimits,
        clock: Clock,
        places: Callable[[int, bool], int | None] | None = None,
        *,
        shares: TenantShares | None = None,
        is_crowded: Callable[[], bool] | None = None,
        is_crowded_by_others: Callable[[], bool] | None = None,
        ageing: float = AGEING,
        heads: Callable[[], Mapping[str, Head]] | None = None,
        in_use: MutableMapping[ReplicaQueue, None] | None = None,
    ) -> None:
        self._limit = limit
        self._limits = limits
        self._clock = clock
        self._places = places
        self._recheck_due = False
        self._checks = 0
        self._shares = shares or TenantShares()
        self._is_crowded = is_crowded
        self._is_crowded_by_others = is_crowded_by_others
        self._went_seconds = -inf  # when it last let one go, or when it ceased to be empty
        self._ageing = ageing
        self._heads = heads
        self._elsewhere = Elsewhere()
        self._sent_tokens = [0.0] * len(Priority)
        self._in_use = {} if in_use is None else in_use
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue(self._shares, self._make_line)
        self._running = 0
        self._rate = WaitingRate()  # in requests
        self._starting = 0  # requests that were let go and whose tasks have not run yet

    def __len__(self) -> int:
        """Count the requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have a permit."""
        return self._running

    @property
    def needs_share(self) -> bool:
        """False if it makes no difference whose share a request uses that need not wait."""
        return self._shares.has_several

    @property
    def has_place(self) -> bool:
        """True if a request that comes now need not wait, here or behind those of other processes."""
        heads = self._heads_elsewhere()
        return not heads and not len(self._waiting) and self._has_room(heads)

    def try_acquire(self, share: Share = ANYONE) -> Permit | None:
        """Return a permit if no request would have to wait for it: the common case, without an await."""
        if self.has_place:
            self._running += 1
            if self._shares.has_several:
                self._shares.serve(share.tenant, share.tokens, share.weight)
            return Permit(self)
        return None

    async def acquire(
        self, work_seconds: float, share: Share = ANYONE, deadline_seconds: float | None = None
    ) -> Permit:
        """Wait for a permit.

        Args:
            work_seconds: the request's uncached tokens over the replica's rate.
            share: the tenant's share that it uses.
            deadline_seconds: latest time until which it waits, on the monotonic clock; None: as long as the queue
                allows.

        Raises:
            RateLimited: too many requests wait.
            Overloaded: the queue's deadline passed.
            DeadlineUnreachable: the request's own deadline passed.
            CairnError: `fail` was called with it.

        A caller that is cancelled leaves the queue.
        """
        permit = self.try_acquire(share)
        if permit is not None:
            return permit
        self.check_length()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        now_seconds = self._clock.monotonic()
        if not len(self._waiting):
            self._went_seconds = now_seconds
            self._rate.began(now_seconds)
        entry = self._waiting.join(Claimant(future, *share), work_seconds, now_seconds)
        self._in_use[self] = None
        if deadline_seconds is not None and deadline_seconds - now_seconds < self._limits.deadline_seconds:
            alarm = loop.call_later(deadline_seconds - now_seconds, self._expire, future, _PASSED)
        else:
            alarm = loop.call_later(self._limits.deadline_seconds, self._expire, future, _TOO_LONG)
        self._schedule_recheck()
        if self._heads_elsewhere():
            self._wake()  # there may be room that was left to them, and this one may go before them
        try:
            await future
        except BaseException:
            # the permit may have been given just when the caller was cancelled
            if future.done() and not future.cancelled() and future.exception() is None:
                self._starting -= 1
                self.release()
            raise
        finally:
            alarm.cancel()
            self._waiting.leave(entry)
            if not len(self._waiting):
                self._in_use.pop(self, None)
        self._starting -= 1
        return Permit(self)

    def release(self) -> None:
        """Give one place to the next request; `Permit.done` calls it."""
        self._running -= 1
        self._wake()

    def set_limit(self, limit: int | None) -> None:
        """Change how many requests may be at the replica."""
        self._limit = limit
        self._wake()

    def set_limits(self, limits: QueueLimits) -> None:
        """Change deadline and length, from the next request on."""
        self._limits = limits

    def fail(self, error: CairnError) -> None:
        """Raise `error` in every waiting request, so that they go elsewhere: the replica is down."""
        while (claimant := self._waiting.head(self._clock.monotonic())) is not None:
            self._waiting.leave(claimant)
            if not claimant.item.done():
                claimant.item.set_exception(error)

    def look(self) -> None:
        """Look for requests that may go, since work at the replica ended in some process."""
        if len(self._waiting):
            self._wake()

    def tokens_before(self, share: Share) -> float:
        """Return the tokens of the requests waiting here that go before one with this share, at least."""
        before = own = 0.0
        others: dict[str, float] = {}
        for each in self._waiting.in_order(self._clock.monotonic()):
            if each.priority < share.priority:
                before += each.tokens
            elif each.priority > share.priority:
                continue
            elif each.tenant != share.tenant:
                others[each.tenant] = others.get(each.tenant, 0.0) + each.tokens
            elif each.tokens <= share.tokens:
                own += each.tokens
        return before + own + self._shares.most_before(share.tenant, own, others)

    def check_length(self) -> None:
        """Raise RateLimited if no further request may wait."""
        if len(self._waiting) >= self._limits.max_waiting:
            raise RateLimited(
                "Too many requests wait for a replica.", retry_after_seconds=self._retry_after_seconds()
            )

    def wait_seconds(self, work_seconds: float, share: Share, sent_seconds: float) -> float:
        """Estimate how long a request would wait for a place, by the rate at which waiting ones got one lately.

        Until that is measured, it is the time of the work before it: what the replica was sent, and the requests
        that wait and go first.

        Args:
            work_seconds: the request's uncached tokens over the replica's rate.
            share: the tenant's share that it would use.
            sent_seconds: seconds of prefill that were sent to the replica and are not done.
        """
        if self.has_place:
            return 0.0
        requests, before_seconds = self._before(work_seconds, share)
        if not self._rate.is_measured:
            return sent_seconds + before_seconds
        return self._rate.seconds_for(1.0 + requests, 1.0)

    def _before(self, work_seconds: float, share: Share) -> tuple[float, float]:
        """Return about how many of the requests waiting here go before a new one, and their work in seconds.

        A tenant's own go by the order of its line. Of another tenant's with the same priority, no more go first than
        of its own, and one.
        """
        now_seconds = self._clock.monotonic()
        requests = seconds = 0.0
        own, others = 0, dict[str, tuple[int, float]]()
        for each in self._waiting.in_order(now_seconds):
            entry = each.entry
            if entry is None or each.priority > share.priority:
                continue
            if each.priority == share.priority:
                if each.tenant != share.tenant:
                    count, total = others.get(each.tenant, (0, 0.0))
                    others[each.tenant] = count + 1, total + entry.work_seconds
                    continue
                if entry.work_seconds - self._ageing * (now_seconds - entry.arrived_seconds) > work_seconds:
                    continue
                own += 1
            requests += 1.0
            seconds += entry.work_seconds
        for count, total in others.values():
            first = min(count, own + 1)
            requests += float(first)
            seconds += total * first / count
        return requests, seconds

    def head(self) -> Head | None:
        """Return the request that goes next, for the other processes; None if none waits."""
        claimant = self._waiting.head(self._clock.monotonic())
        return None if claimant is None else self._head_of(claimant)

    def _head_of(self, claimant: Claimant[asyncio.Future[None]]) -> Head:
        priority = claimant.priority
        placed = OWED if priority > Priority.HIGH and self._waiting.is_owed(claimant) else int(priority)
        round_number = self._shares.round_of(claimant.tenant)
        return Head(claimant.tenant, placed, round_number, tuple(self._sent_tokens), self._waiting.priorities())

    def _heads_elsewhere(self) -> Mapping[str, Head]:
        """Return the first requests that wait for this replica in other processes."""
        return {} if self._heads is None else self._heads()

    def _may_go(self, claimant: Claimant[asyncio.Future[None]], heads: Mapping[str, Head]) -> bool:
        """Return False if a request of another process goes first."""
        return not self._elsewhere.must_hold(self._head_of(claimant), heads, self._clock.monotonic())

    def _is_first(self, heads: Mapping[str, Head]) -> bool:
        """Return True if the request that goes next here goes before one of each other process that it can."""
        own = self.head()
        if own is None:
            return False
        others = heads.values()
        return any(own.goes_before(each) for each in others) and not any(each.goes_before(own) for each in others)

    def _make_line(self) -> ShortestJobQueue[Claimant[asyncio.Future[None]]]:
        return ShortestJobQueue(self._limits.deadline_seconds, self._ageing)

    def _has_room(self, heads: Mapping[str, Head]) -> bool:
        if self._is_crowded is not None and (self._starting or self._is_crowded()):
            return False  # a request that was let go counts as sent only once its task has run
        is_first = bool(heads) and self._is_first(heads)
        if heads and not is_first and self._leaves_room():
            return False
        if self._limit is None:
            return True
        if self._places is None:
            return self._running < self._limit
        waiting = len(self._waiting) if self._checks >= CHECKS_BEFORE_BORROWING else 0
        places = self._places(waiting, is_first)
        return places is None or self._running < places

    def _leaves_room(self) -> bool:
        """Return True if the replica has enough work of other processes, where requests wait that may go before.

        Only for a time: processes differ in what they know of a replica's rate, and one that believes it too low
        would never find room.
        """
        if self._is_crowded_by_others is None or not self._is_crowded_by_others():
            return False
        return self._clock.monotonic() - self._went_seconds < OTHERS_SECONDS

    def _schedule_recheck(self) -> None:
        if self._places is not None and not self._recheck_due:
            self._recheck_due = True
            asyncio.get_running_loop().call_later(RECHECK_SECONDS, self._recheck)

    def _recheck(self) -> None:
        self._recheck_due = False
        self._checks += 1
        self._wake()
        if len(self._waiting):
            self._schedule_recheck()
        else:
            self._checks = 0

    def _wake(self) -> None:
        heads = self._heads_elsewhere()
        elsewhere = waiting_in(heads) if heads else ALONE
        self._waiting.sent_elsewhere(self._elsewhere.newly_sent(heads), elsewhere)
        while len(self._waiting):
            if not self._has_room(heads):
                self._elsewhere.no_room()
                return
            now_seconds = self._clock.monotonic()
            claimant = self._waiting.head(now_seconds)
            if claimant is None or (heads and not self._may_go(claimant, heads)):
                return
            self._waiting.serve(claimant, elsewhere)
            self._went_seconds = now_seconds
            self._sent_tokens[claimant.priority] += claimant.tokens
            if not claimant.item.done():
                self._rate.took(1.0, now_seconds)
                self._running += 1
                self._starting += 1
                claimant.item.set_result(None)
                if self._is_crowded is not None:
                    # its task runs before this is called again
                    asyncio.get_running_loop().call_soon(self._wake)
                    return

    def _expire(self, future: asyncio.Future[None], error: type[CairnError]) -> None:
        if not future.done():
            future.set_exception(
                error("The request waited too long for a replica.", retry_after_seconds=self._retry_after_seconds())
            )

    def _retry_after_seconds(self) -> float:
        """Return a hint: a tenth of the deadline."""
        return max(1.0, self._limits.deadline_seconds / 10)

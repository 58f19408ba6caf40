"""Predict how long a cold turn will wait, and keep the place of a session that is turned away. Pure.

A new session that would wait for too long is refused with a Retry-After after which it will be accepted: a ticket,
without the body, keeps its arrival time, so that it does not lose its place in the order. The client may come back to
another worker, so tickets are sent to all, with the reports about work in flight (`Tickets.rows`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from math import ceil
from typing import Final, NamedTuple

from proxy.errors import CairnError, DeadlineUnreachable, RateLimited, TooManySessions
from proxy.routing.cold_turn import GateLimits, Turn, Verdict
from proxy.routing.fair_shares import MAX_TENANTS, Priority
from proxy.routing.waiting_rate import WaitingRate

MAX_TICKETS: Final = 16_384

GRACE: Final = 2.0
"""A ticket is kept for this multiple of its Retry-After ..."""

GRACE_SECONDS: Final = 60.0
"""... and this long on top."""

LATE_SECONDS: Final = 5.0
"""A session that is not back this long after its Retry-After is not expected any more, though its place is kept."""

SENDS: Final = 3
"""Number of reports that contain a new ticket, or one that was taken: a lost one does no harm."""

MAX_ROWS: Final = 64
"""Tickets in one report."""

LONGEST_SECONDS: Final = 86_400.0
"""No ticket is kept for longer, so one that is said to be is damage."""

FULL_RETRY_SECONDS: Final = 5.0
"""Retry-After while the waiting bodies take all the memory that they are allowed."""

_ROW: Final = "\0ticket:"
"""Prefix of the tickets' rows in the report about in-flight work, which no replica's name can have."""


class LineRates:
    """The rates at which replicas take the cold turns of each line: those of one tenant with one priority.

    It shows what those get that keep coming to the other lines: a line is served in order of arrival, but many of the
    turns that go before its last one have not come yet. A long cold turn may also have to wait for its tenant's part
    of the replicas.
    """

    def __init__(self) -> None:
        self._rates: OrderedDict[tuple[str, Priority], WaitingRate] = OrderedDict()  # the longest unused in front
        self._waiting: dict[tuple[str, Priority], int] = {}

    def __len__(self) -> int:
        return len(self._rates)

    def joined(self, tenant: str, priority: Priority, now_seconds: float) -> None:
        """Note that a turn begins to wait."""
        line = tenant, priority
        rate = self._rates.setdefault(line, WaitingRate())
        self._rates.move_to_end(line)
        waiting = self._waiting.get(line, 0)
        if not waiting:
            rate.began(now_seconds)
        self._waiting[line] = waiting + 1
        while len(self._rates) > MAX_TENANTS:
            self._rates.popitem(last=False)

    def took(self, tenant: str, priority: Priority, tokens: float, now_seconds: float) -> None:
        """Note that a turn of `tokens` was sent. It still counts as one that waits."""
        rate = self._rates.get((tenant, priority))
        if rate is not None:
            rate.took(tokens, now_seconds)

    def left(self, tenant: str, priority: Priority) -> None:
        """Note that a turn waits no more, sent or not."""
        line = tenant, priority
        waiting = self._waiting[line] - 1
        if waiting:
            self._waiting[line] = waiting
        else:
            del self._waiting[line]

    def seconds_for(
        self, tenant: str, priority: Priority, tokens: float, least_seconds: float, most_seconds: float
    ) -> float:
        """Return the seconds in which `tokens` of a line are taken, within bounds; `least_seconds` until measured.

        The bounds are those of the present, and the rate is of the last minutes: other tenants may have gone or come.
        """
        rate = self._rates.get((tenant, priority))
        if rate is None or not rate.is_measured:
            return least_seconds
        return max(least_seconds, min(rate.seconds_for(tokens, 1.0), most_seconds))


class Expected(NamedTuple):
    """A session that was turned away: the time until it is to come back, and its work."""

    seconds: float
    tenant: str
    tokens: float


class _Ticket:
    __slots__ = ("arrived_seconds", "due_seconds", "ends_seconds", "tokens")

    def __init__(self, arrived_seconds: float, tokens: float, due_seconds: float, ends_seconds: float) -> None:
        self.arrived_seconds = arrived_seconds
        self.tokens = tokens
        self.due_seconds = due_seconds
        self.ends_seconds = ends_seconds


def pool_of(row: str) -> str | None:
    """Return the pool of a row of `Tickets.rows`; None for rows of anything else."""
    return row[len(_ROW) :].partition("\0")[0] if row.startswith(_ROW) else None


class Tickets:
    """Places of sessions that were turned away from `pool`, by their tenant and the end of their prompt."""

    def __init__(self, pool: str = "") -> None:
        self._tickets: OrderedDict[tuple[str, int], _Ticket] = OrderedDict()
        self._by_due: list[tuple[float, str, int]] = []  # all of them in the order in which they are to come back
        self._unsent: dict[tuple[str, int], int] = {}  # with the number of reports still to contain them
        self._prefix = f"{_ROW}{pool}\0"

    def __len__(self) -> int:
        return len(self._tickets)

    def arrival(self, tenant: str, prompt_end: int, now_seconds: float) -> float:
        """Return the time at which this prompt first arrived: now, unless it has a ticket."""
        ticket = self._tickets.get((tenant, prompt_end))
        return now_seconds if ticket is None or ticket.ends_seconds < now_seconds else ticket.arrived_seconds

    def is_due(self, tenant: str, prompt_end: int, now_seconds: float) -> bool:
        """Return True if this prompt was refused and comes back after its Retry-After: it was promised to wait then.

        The prediction may be a little higher by now, and a client that is refused twice believes no Retry-After.
        """
        ticket = self._tickets.get((tenant, prompt_end))
        return ticket is not None and ticket.due_seconds <= now_seconds <= ticket.ends_seconds

    def expected(self, arrived_seconds: float, now_seconds: float) -> Iterator[Expected]:
        """Yield the sessions that were turned away, arrived before and are expected back, the soonest first.

        Only what is taken from the iterator costs time. Change nothing meanwhile.
        """
        for place in range(bisect_left(self._by_due, (now_seconds - LATE_SECONDS,)), len(self._by_due)):
            due_seconds, tenant, prompt_end = self._by_due[place]
            each = self._tickets[tenant, prompt_end]
            if each.arrived_seconds < arrived_seconds:
                yield Expected(max(due_seconds - now_seconds, 0.0), tenant, each.tokens)

    def give(
        self,
        tenant: str,
        prompt_end: int,
        tokens: float,
        arrived_seconds: float,
        back_seconds: float,
        now_seconds: float,
    ) -> None:
        """Keep the place of a prompt that was refused with a Retry-After of `back_seconds`."""
        ends = now_seconds + GRACE * back_seconds + GRACE_SECONDS
        self._keep((tenant, prompt_end), _Ticket(arrived_seconds, tokens, now_seconds + back_seconds, ends))
        self._unsent[tenant, prompt_end] = SENDS

    def take(self, tenant: str, prompt_end: int) -> None:
        """Drop the ticket of a prompt that came back and waits now, or was served."""
        if self._drop((tenant, prompt_end)):
            self._unsent[tenant, prompt_end] = SENDS

    def rows(self, now_seconds: float) -> dict[str, tuple[float, ...]]:
        """Return recent changes for the other workers: tokens, seconds since the arrival, to the return and to the
        end; nothing for a ticket that was taken. Times are ages, because each worker has its own clock.
        """
        rows: dict[str, tuple[float, ...]] = {}
        for key in list(self._unsent)[:MAX_ROWS]:
            left = self._unsent.pop(key) - 1
            if left:
                self._unsent[key] = left  # moved to the end, so that others get their turn
            ticket = self._tickets.get(key)
            rows[f"{self._prefix}{key[1]:x}\0{key[0]}"] = (
                ()
                if ticket is None
                else (
                    ticket.tokens,
                    now_seconds - ticket.arrived_seconds,
                    ticket.due_seconds - now_seconds,
                    ticket.ends_seconds - now_seconds,
                )
            )
        return rows

    def absorb(self, rows: Mapping[str, tuple[float, ...]], now_seconds: float) -> None:
        """Apply the changes of another worker. Rows of anything else, and damaged ones, are left out."""
        for name, row in rows.items():
            if name.startswith(self._prefix):
                prompt_end, _, tenant = name[len(self._prefix) :].partition("\0")
                try:
                    key = tenant, int(prompt_end, 16)
                except ValueError:
                    continue
                if not row:
                    self._drop(key)
                elif len(row) == 4 and row[0] >= 0 and max(map(abs, row[1:])) <= LONGEST_SECONDS:
                    tokens, age, due, ends = row
                    self._keep(key, _Ticket(now_seconds - age, tokens, now_seconds + due, now_seconds + ends))

    def _keep(self, key: tuple[str, int], ticket: _Ticket) -> None:
        self._drop(key)
        self._tickets[key] = ticket
        insort(self._by_due, (ticket.due_seconds, *key))
        while len(self._tickets) > MAX_TICKETS:
            self._drop(next(iter(self._tickets)))

    def _drop(self, key: tuple[str, int]) -> bool:
        """Drop a ticket; return whether there was one."""
        ticket = self._tickets.pop(key, None)
        if ticket is None:
            return False
        del self._by_due[bisect_left(self._by_due, (ticket.due_seconds, *key))]
        return True

    def expire(self, now_seconds: float) -> None:
        """Drop the tickets of prompts that did not come back."""
        for key in [key for key, each in self._tickets.items() if each.ends_seconds < now_seconds]:
            self._drop(key)


def refusal_of(
    turn: Turn, verdict: Verdict, tickets: Tickets, limits: GateLimits, waiting_bytes: int, now_seconds: float
) -> CairnError | None:
    """Return the error by which a turn that would have to wait is refused, None if it may wait.

    `waiting_bytes` are the bodies of the requests that wait already.
    """
    least_seconds = verdict.least_seconds
    if turn.deadline_seconds is not None and now_seconds + least_seconds > turn.deadline_seconds:
        return DeadlineUnreachable(
            f"The first token would come after about {ceil(least_seconds)} s, which is past the deadline.",
            retry_after_seconds=max(least_seconds, 1.0),
        )
    if waiting_bytes + turn.body_bytes > limits.max_waiting_bytes:
        return RateLimited(
            "The requests that wait for a replica take all the memory allowed for them.",
            retry_after_seconds=FULL_RETRY_SECONDS,
        )
    is_too_long = verdict.seconds > limits.max_wait_seconds
    if turn.is_new and is_too_long and not tickets.is_due(turn.tenant, turn.prompt_end, now_seconds):
        return TooManySessions(
            "More sessions are active than the replicas have memory for; new ones are accepted again later.",
            retry_after_seconds=max(verdict.seconds - limits.max_wait_seconds, 1.0),
        )
    return None

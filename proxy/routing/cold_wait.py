"""Predict how long a cold turn will wait, and keep the place of a session that is turned away. Pure.

A new session that would wait for too long is refused with a Retry-After after which it will be accepted: a ticket,
without the body, keeps its arrival time, so that it does not lose its place in the order.
"""

from __future__ import annotations

from collections import OrderedDict
from math import exp
from typing import Final

MEMORY_SECONDS: Final = 120.0
"""Time constant of the measured rate: several long prefills."""

MAX_TICKETS: Final = 16_384

GRACE: Final = 2.0
"""A ticket is kept for this multiple of its Retry-After ..."""

GRACE_SECONDS: Final = 60.0
"""... and this long on top."""


class ColdRate:
    """Tokens of cold turns that replicas take per second while turns wait."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._last_seconds: float | None = None

    def began(self, now_seconds: float) -> None:
        """Note that turns begin to wait, after none did."""
        self._last_seconds = now_seconds

    def took(self, tokens: float, now_seconds: float) -> None:
        """Note that a turn of `tokens` that waited was sent."""
        last = now_seconds if self._last_seconds is None else self._last_seconds
        elapsed = max(now_seconds - last, 0.0)
        kept = exp(-elapsed / MEMORY_SECONDS)
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + elapsed
        self._last_seconds = now_seconds

    def seconds_for(self, tokens: float, first_guess: float) -> float:
        """Return the seconds in which replicas take `tokens`; `first_guess` is the rate until one is measured."""
        measured = self._tokens / self._seconds if self._seconds > 1.0 else 0.0
        return tokens / (measured or first_guess)


class _Ticket:
    __slots__ = ("arrived_seconds", "due_seconds", "ends_seconds", "tokens")

    def __init__(self, arrived_seconds: float, tokens: float, due_seconds: float, ends_seconds: float) -> None:
        self.arrived_seconds = arrived_seconds
        self.tokens = tokens
        self.due_seconds = due_seconds
        self.ends_seconds = ends_seconds


class Tickets:
    """Places of sessions that were turned away, by their tenant and the end of their prompt."""

    def __init__(self) -> None:
        self._tickets: OrderedDict[tuple[str, int], _Ticket] = OrderedDict()

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

    def tokens_before(self, arrived_seconds: float, now_seconds: float) -> float:
        """Return the tokens of sessions that were turned away, arrived before and are expected back."""
        return sum(
            each.tokens
            for each in self._tickets.values()
            if each.arrived_seconds < arrived_seconds and each.ends_seconds >= now_seconds
        )

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
        key = (tenant, prompt_end)
        self._tickets.pop(key, None)
        ends = now_seconds + GRACE * back_seconds + GRACE_SECONDS
        self._tickets[key] = _Ticket(arrived_seconds, tokens, now_seconds + back_seconds, ends)
        while len(self._tickets) > MAX_TICKETS:
            self._tickets.popitem(last=False)

    def take(self, tenant: str, prompt_end: int) -> None:
        """Drop the ticket of a prompt that came back and waits now, or was served."""
        self._tickets.pop((tenant, prompt_end), None)

    def expire(self, now_seconds: float) -> None:
        """Drop the tickets of prompts that did not come back."""
        for key in [key for key, each in self._tickets.items() if each.ends_seconds < now_seconds]:
            del self._tickets[key]

"""Requests charged to one replica and not finished, in the order of routing.

A charge has two parts. Its *prefill* part (uncached tokens) is pending until the first token; its *presence* counts
as in flight until the response ends. Engines prefill in order, so the oldest pending charge is the running head: it
is assumed to have done `elapsed x rate` of its tokens, and the time by which it exceeds its prediction is the
lateness.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import takewhile
from typing import Final

LEAST_TOKENS: Final = 0.5
"""A smaller sum of floats is a rounding error: a charge has at least one token."""


class Charge:
    """One request's claim on one replica. Only `Work` changes it; every change may be repeated."""

    __slots__ = (
        "due_seconds",
        "gated",
        "is_trial",
        "pending",
        "plain",
        "prefill_seconds",
        "present",
        "prompt_tokens",
        "replica",
        "sent_seconds",
        "started",
        "uncached_tokens",
    )

    def __init__(
        self, replica: int, uncached_tokens: float, *, plain: bool, gated: bool, prompt_tokens: float = 0.0
    ) -> None:
        self.replica = replica
        self.uncached_tokens = uncached_tokens
        self.prompt_tokens = prompt_tokens  # the whole prompt, which the cache holds until the response ends
        self.due_seconds = 0.0  # time of its predicted first token, set at its start
        self.plain = plain  # its first token cannot be seen: its prefill ends when predicted
        self.gated = gated  # waits at the cold gate, so it is not in flight yet
        self.sent_seconds = 0.0
        self.started = False  # it was sent; before that it waits at the gate or in the queue
        self.pending = True
        self.present = True
        self.is_trial = False
        self.prefill_seconds: float | None = None  # duration of its prefill, if that was seen


class Work:
    """The charges of one replica."""

    __slots__ = (
        "_started",
        "in_flight",
        "pending_tokens",
        "released_seconds",
        "running_tokens",
        "sent_tokens",
        "waiting",
    )

    def __init__(self) -> None:
        self.pending_tokens = 0.0
        self.in_flight = 0
        self.running_tokens = 0.0  # prompts of all in flight, which cannot be evicted
        self.waiting = 0  # those in flight that are in the queue and not sent yet
        self.released_seconds = 0.0  # when the last prefill seen here ended
        self._started: OrderedDict[Charge, None] = OrderedDict()  # a head that hangs keeps nothing of those behind it
        self.sent_tokens = 0.0

    def add(self, charge: Charge) -> None:
        """Add a new charge, which waits until `start`."""
        self.pending_tokens += charge.uncached_tokens
        self.running_tokens += charge.prompt_tokens
        if not charge.gated:
            self.in_flight += 1
            self.waiting += 1

    def start(self, charge: Charge, rate: float, now_seconds: float, elsewhere_tokens: float = 0.0) -> None:
        """Start a charge behind those sent before it, of which other processes sent `elsewhere_tokens`."""
        if charge.started or not charge.present:
            return
        charge.started = True
        if charge.gated:
            charge.gated = False
            self.in_flight += 1
        else:
            self.waiting -= 1
        if not charge.pending:
            return
        charge.sent_seconds = now_seconds
        ahead = self.sent_tokens - self.progress_tokens(rate, now_seconds) + elsewhere_tokens
        charge.due_seconds = now_seconds + (ahead + charge.uncached_tokens) / rate
        self._started[charge] = None
        self.sent_tokens += charge.uncached_tokens

    def first_token(self, charge: Charge, now_seconds: float, elsewhere_seconds: float = 0.0) -> None:
        """End its prefill; the next one begins.

        The head's prefill lasted since it was sent, or since the one before it ended, here or (`elsewhere_seconds`)
        in another process: its TTFT minus the wait for earlier charges. Prefills are done in order, so charges sent
        before it whose first token cannot be seen are done too. If they decayed by a rate that is guessed too low,
        they would pile up, and with one of them always at the head no rate would ever be learned.
        """
        if charge.pending:
            if self.head is charge:
                since = max(self.released_seconds, elsewhere_seconds, charge.sent_seconds)
                charge.prefill_seconds = now_seconds - since
            elif charge.started:
                earlier = takewhile(lambda each: each is not charge, self._started)
                for done in [each for each in earlier if each.plain]:
                    self._drop(done)
            self._drop(charge)
            self.released_seconds = now_seconds

    def leave(self, charge: Charge) -> None:
        """End the presence of a charge whose client left.

        An engine that has the request goes on with the prefill, so that part decays. Nothing remains of a charge that
        was never sent.
        """
        self._absent(charge)
        charge.plain = True
        if charge.pending and not charge.started:
            self._drop(charge)

    def end(self, charge: Charge, now_seconds: float) -> None:
        """Remove a charge, except for a prefill part that `leave` left to decay."""
        if not charge.present:
            return
        self._absent(charge)
        if charge.pending:
            was_head = self.head is charge
            self._drop(charge)
            if was_head:
                self.released_seconds = now_seconds

    def settle(self, now_seconds: float) -> None:
        """Release heads whose first token cannot be seen and was due by now."""
        while (head := self.head) is not None and head.plain and head.due_seconds <= now_seconds:
            self._drop(head)
            self.released_seconds = max(self.released_seconds, head.due_seconds)

    @property
    def unanswered(self) -> int:
        """Number of charges that were sent and whose prefill is not known to be done."""
        return len(self._started)

    @property
    def head(self) -> Charge | None:
        """The oldest charge that was sent and whose prefill is not known to have ended."""
        return next(iter(self._started)) if self._started else None

    def progress_tokens(self, rate: float, now_seconds: float) -> float:
        """Return the tokens that the running head must have computed by now, at most all that it has."""
        head = self.head
        if head is None:
            return 0.0
        since = max(self.released_seconds, head.sent_seconds)
        return min((now_seconds - since) * rate, head.uncached_tokens)

    def _absent(self, charge: Charge) -> None:
        if charge.present:
            charge.present = False
            self.running_tokens = max(self.running_tokens - charge.prompt_tokens, 0.0)
            if not charge.gated:
                self.in_flight -= 1
                self.waiting -= not charge.started

    def _drop(self, charge: Charge) -> None:
        charge.pending = False
        self.pending_tokens -= charge.uncached_tokens
        if charge.started:
            self.sent_tokens -= charge.uncached_tokens
            self._started.pop(charge, None)
        if not self._started:  # sums of floats must not drift
            self.sent_tokens = 0.0
            if self.pending_tokens < LEAST_TOKENS:
                self.pending_tokens = 0.0

"""What one replica has been given and has not done: charges in the order of routing. It must not know why.

A charge has two parts. Its *prefill* part (uncached tokens) is pending until the first token; its *presence* counts
as in flight until the answer ends. Engines prefill in order, so the oldest pending charge is the running head: it is
taken to have done `elapsed x rate` of its tokens, and what it takes beyond its prediction is lateness.
"""

from __future__ import annotations

from collections import deque


class Charge:
    """One request's claim on one replica. Made and changed by `Work` alone; every change may come twice."""

    __slots__ = ("due_seconds", "gated", "is_trial", "pending", "plain", "present", "replica", "uncached_tokens")

    def __init__(self, replica: int, uncached_tokens: float, due_seconds: float, *, plain: bool, gated: bool) -> None:
        self.replica = replica
        self.uncached_tokens = uncached_tokens
        self.due_seconds = due_seconds  # predicted first token
        self.plain = plain  # no first token to be seen: its prefill ends when predicted
        self.gated = gated  # waits at the cold gate, so it is not in flight there
        self.pending = True
        self.present = True
        self.is_trial = False


class Work:
    """The charges of one replica."""

    __slots__ = ("_pending_charges", "in_flight", "pending_tokens", "working_since_seconds")

    def __init__(self) -> None:
        self.pending_tokens = 0.0
        self.in_flight = 0
        self.working_since_seconds = 0.0  # when the running head began, as far as can be seen
        self._pending_charges: deque[Charge] = deque()

    def add(self, charge: Charge, now_seconds: float) -> None:
        """Take in a new charge."""
        if not self._pending_charges:
            self.working_since_seconds = now_seconds
        self._pending_charges.append(charge)
        self.pending_tokens += charge.uncached_tokens
        if not charge.gated:
            self.in_flight += 1

    def ungate(self, charge: Charge) -> None:
        """It goes to the replica now."""
        if charge.gated:
            charge.gated = False
            if charge.present:
                self.in_flight += 1

    def first_token(self, charge: Charge, now_seconds: float) -> None:
        """Its prefill is done, and the next one's begins."""
        if charge.pending:
            self._drop(charge)
            self.working_since_seconds = now_seconds

    def leave(self, charge: Charge) -> None:
        """Its client is gone: no longer in flight, but the engine goes on with the prefill, so that part decays."""
        self._absent(charge)
        charge.plain = True

    def end(self, charge: Charge, now_seconds: float) -> None:
        """The request is over, however it went: nothing of it remains, but what `leave` left to decay."""
        if not charge.present:
            return
        self._absent(charge)
        if charge.pending:
            was_head = self.head is charge
            self._drop(charge)
            if was_head:
                self.working_since_seconds = now_seconds

    def settle(self, now_seconds: float) -> None:
        """Release the heads whose first token nobody will see, when it was due."""
        pending = self._pending_charges
        while pending and (head := pending[0]).plain and head.due_seconds <= now_seconds:
            self._drop(head)
            self.working_since_seconds = max(self.working_since_seconds, head.due_seconds)

    @property
    def head(self) -> Charge | None:
        """The oldest charge with a prefill that is not known to be done."""
        return self._pending_charges[0] if self._pending_charges else None

    def _absent(self, charge: Charge) -> None:
        if charge.present:
            charge.present = False
            if not charge.gated:
                self.in_flight -= 1

    def _drop(self, charge: Charge) -> None:
        charge.pending = False
        self.pending_tokens -= charge.uncached_tokens
        pending = self._pending_charges
        while pending and not pending[0].pending:
            pending.popleft()
        if not pending:
            self.pending_tokens = 0.0  # no drift of floats

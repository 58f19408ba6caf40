"""One attempt of a request at one replica: the claims made for it, and their release on every path.

Claimed are, in this order: the place at the cold gate and in the queue, the charge (the replica is busier), and the
placement (it will hold the prefix). `Attempts.begin` claims, `Attempt` gives back; each way to end it may be called
twice and after another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Final, Protocol

from cache import Fingerprint, Placement
from proxy.clock import Clock
from proxy.errors import DeadlineUnreachable, TurnedAway
from proxy.fleet import Charge, Fleet
from proxy.records import Candidate, Plan
from proxy.routing.fair_shares import Share
from proxy.routing.prefill_gate import Follower, Prefill, PrefillGate
from proxy.routing.replica_queue import ANYONE, Permit, ReplicaQueue

EARLY_SECONDS: Final = 0.005
"""A timer may fire so much before its time."""


class Placements(Protocol):
    """The part of `cache.Journal` that keeps placements."""

    def place(self, replica: int, fingerprint: Fingerprint, tokens: float, *, source: int = 0) -> Placement: ...
    def computed(self, placement: Placement) -> None: ...
    def take_back(self, placement: Placement) -> None: ...
    def left(self, placement: Placement) -> None: ...


class Shared:
    """Dependencies shared by all attempts."""

    __slots__ = ("changed", "fleet", "placements")

    def __init__(self, fleet: Fleet, placements: Placements, changed: Callable[[], None]) -> None:
        self.fleet = fleet
        self.placements = placements
        self.changed = changed


class Attempt:
    """An attempt under way. `placement` is None if nothing was worth placing."""

    __slots__ = (
        "_permit",
        "_prefill",
        "_queue",
        "_shared",
        "_waits_for",
        "_was_used",
        "candidate",
        "charge",
        "placement",
        "share",
        "waits_until",
    )

    def __init__(
        self,
        shared: Shared,
        candidate: Candidate,
        charge: Charge,
        placement: Placement | None,
        queue: ReplicaQueue,
        gate: Prefill | Follower | None,
        permit: Permit | None,
        *,
        was_used: bool = False,
    ) -> None:
        self._shared = shared
        self._was_used = was_used  # otherwise it is sent to a replica that is known to be down: there is no other
        self.share = ANYONE  # whose share it uses if it must wait
        self.waits_until: float | None = None  # on the monotonic clock
        self._queue = queue
        self._waits_for = gate if isinstance(gate, Follower) else None
        self._prefill = gate.prefill if isinstance(gate, Follower) else gate
        self._permit = permit
        self.candidate = candidate
        self.charge = charge
        self.placement = placement

    @property
    def replica(self) -> int:
        """The replica's number."""
        return self.candidate.replica.id

    @property
    def must_wait(self) -> bool:
        """True if it may not be sent before `wait` has returned."""
        return self._permit is None

    async def wait(self, clock: Clock) -> None:
        """Wait for the leader of the same cold prefix, then for a place at the replica.

        Raises Overloaded at the queue's deadline, DeadlineUnreachable at the request's own, RateLimited if too many
        wait, and TurnedAway if the replica goes down.
        """
        if self._waits_for is not None:
            until = self.waits_until
            await self._waits_for.wait(inf if until is None else until - clock.monotonic())
            self._check_replica()
            if until is not None and clock.monotonic() >= until - EARLY_SECONDS:
                raise DeadlineUnreachable(
                    "The deadline passed while the request waited for another that computes the same prompt.",
                    retry_after_seconds=1.0,
                )
        candidate = self.candidate
        work_seconds = candidate.uncached_tokens / candidate.replica.rate_tokens_per_second
        self._permit = await self._queue.acquire(work_seconds, self.share, self.waits_until)
        self._check_replica()
        self._shared.fleet.start(self.charge, clock.monotonic())
        self._shared.changed()

    def _check_replica(self) -> None:
        """Raise TurnedAway if the replica has gone down during the wait."""
        if self._was_used and not self._shared.fleet.is_used(self.replica):
            raise TurnedAway("The replica that the request waited for is no longer used.")

    def first_token(self, now_seconds: float) -> None:
        """Note that the prefill is done."""
        self._shared.fleet.first_token(self.charge, now_seconds)
        self._shared.changed()
        self.computed()

    def computed(self) -> None:
        """Release the requests that wait for this prefix: as far as the response shows, the replica has it."""
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            prefill.first_token()
            if self.placement is not None:
                self._shared.placements.computed(self.placement)

    def take_back(self) -> None:
        """Withdraw what only this attempt placed: the replica did not compute the prefix."""
        placement, self.placement = self.placement, None
        if placement is not None:
            self._shared.placements.take_back(placement)

    def end(self, now_seconds: float, *, client_left: bool = False) -> None:
        """Give back what is still claimed. With `client_left` the charge decays: the engine may still compute."""
        fleet = self._shared.fleet
        if client_left:
            fleet.client_left(self.charge)
        fleet.finish(self.charge, now_seconds)
        self._shared.changed()
        if self._waits_for is not None:
            self._waits_for.leave()
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            prefill.failed()
            if self.placement is not None:
                self._shared.placements.left(self.placement)
        if self._permit is not None:
            self._permit.done()


class Attempts:
    """Begins attempts. `queues` are by replica number; `changed` is called whenever this worker's load changes."""

    def __init__(
        self,
        fleet: Fleet,
        placements: Placements,
        gate: PrefillGate,
        queues: Mapping[int, ReplicaQueue],
        changed: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._shared = Shared(fleet, placements, changed)
        self._gate = gate
        self._queues = queues
        self._clock = clock

    def turn_away(self, replica: int) -> None:
        """Raise TurnedAway in all requests that wait for a replica which is not used any more."""
        self._gate.turn_away(replica)
        queue = self._queues.get(replica)
        if queue is not None:
            queue.fail(TurnedAway("The replica that the request waited for is no longer used."))

    def needs_share(self, replica: int) -> bool:
        """Return False if it makes no difference whose share an attempt at this replica uses, unless it waits."""
        return self._queues[replica].needs_share

    def begin(
        self,
        plan: Plan,
        candidate: Candidate,
        fingerprint: Fingerprint | None,
        matched_blocks: int,
        *,
        stream: bool,
        waits_for_prefix: bool = True,
        source: int = 0,
        share: Share = ANYONE,
    ) -> Attempt:
        """Charge `candidate`, place the prefix there and enter the gate.

        Without `fingerprint` (nothing worth sharing) only the charge is made. Without `waits_for_prefix` the gate is
        not entered, since the prompt is computed anew in any case. `source` is a number for the tenant,
        `share` the tenant's share that it uses if it need not wait.
        """
        now_seconds = self._clock.monotonic()
        replica, uncached = candidate.replica.id, candidate.uncached_tokens
        queue = self._queues[replica]
        gate: Prefill | Follower | None = None
        placement: Placement | None = None
        if fingerprint is not None and waits_for_prefix:
            gate = self._gate.enter(
                replica,
                fingerprint.hashes,
                matched_blocks=matched_blocks,
                matched_tokens=candidate.matched_tokens,
                prompt_tokens=plan.prompt_tokens,
                prefill_seconds=(candidate.replica.pending_tokens + uncached)
                / candidate.replica.rate_tokens_per_second,
            )
        gated = isinstance(gate, Follower)
        permit = None if gated else queue.try_acquire(share)
        charge = self._shared.fleet.charge(
            replica,
            uncached,
            now_seconds,
            plain=not stream,
            gated=gated,
            queued=permit is None and not gated,
            prompt_tokens=plan.prompt_tokens,
        )
        if fingerprint is not None:
            placement = self._shared.placements.place(replica, fingerprint, plan.prompt_tokens, source=source)
        self._shared.changed()
        was_used = permit is None and self._shared.fleet.is_used(replica)
        return Attempt(self._shared, candidate, charge, placement, queue, gate, permit, was_used=was_used)

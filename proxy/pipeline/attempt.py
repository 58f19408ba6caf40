"""One try of a request at one replica: what is claimed for it, and given back on every path.

Claimed in this order: the charge (the replica is busier), the placement (it will hold the prefix), the place at the
cold gate and in the queue. `Attempts.begin` claims, `Attempt` gives back; each of its endings may come twice and
after another. It must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cache import Fingerprint, Journal, Placement
from proxy.clock import Clock
from proxy.errors import UpstreamError
from proxy.fleet import Charge, Fleet
from proxy.model import Candidate, Plan
from proxy.routing.prefill_gate import Follower, Prefill, PrefillGate
from proxy.routing.replica_queue import Permit, ReplicaQueue


class Attempt:
    """A try under way. `placement` is None where nothing was worth placing."""

    __slots__ = (
        "_changed",
        "_fleet",
        "_journal",
        "_prefill",
        "_queue",
        "_turn",
        "_waits_for",
        "candidate",
        "charge",
        "placement",
    )

    def __init__(
        self,
        fleet: Fleet,
        journal: Journal,
        candidate: Candidate,
        charge: Charge,
        placement: Placement | None,
        queue: ReplicaQueue,
        gate: Prefill | Follower | None,
        turn: Permit | None,
        changed: Callable[[], None],
    ) -> None:
        self._changed = changed
        self._fleet = fleet
        self._journal = journal
        self._queue = queue
        self._waits_for = gate if isinstance(gate, Follower) else None
        self._prefill = gate.prefill if isinstance(gate, Follower) else gate
        self._turn = turn
        self.candidate = candidate
        self.charge = charge
        self.placement = placement

    @property
    def replica(self) -> int:
        """The replica's number."""
        return self.candidate.replica.id

    @property
    def must_wait(self) -> bool:
        """True where it may not be sent before `wait` came back."""
        return self._turn is None

    async def wait(self, clock: Clock) -> None:
        """Wait for the leader of the same cold prefix, then for a place at the replica.

        Raises Overloaded at the deadline and RateLimited where too many wait.
        """
        if self._waits_for is not None:
            await self._waits_for.wait()
        candidate = self.candidate
        self._turn = await self._queue.acquire(candidate.uncached_tokens / candidate.replica.rate_tokens_per_second)
        self._fleet.start(self.charge, clock.monotonic())
        self._changed()

    def first_token(self, now_seconds: float) -> None:
        """The prefill is done."""
        self._fleet.first_token(self.charge, now_seconds)
        self._changed()
        self.computed()

    def computed(self) -> None:
        """The replica has the prefix, as far as the answer tells: who waits for it may go."""
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            prefill.first_token()
            if self.placement is not None:
                self._journal.computed(self.placement)

    def take_back(self) -> None:
        """The replica did not compute the prefix: forget that it holds what only this attempt placed there."""
        placement, self.placement = self.placement, None
        if placement is not None:
            self._journal.take_back(placement)

    def end(self, now_seconds: float, *, client_left: bool = False) -> None:
        """Give back what is still claimed. With `client_left` the engine may still compute: the charge decays."""
        if client_left:
            self._fleet.client_left(self.charge)
        self._fleet.finish(self.charge, now_seconds)
        self._changed()
        if self._waits_for is not None:
            self._waits_for.leave()
        prefill, self._prefill = self._prefill, None
        if prefill is not None:
            prefill.failed()
            if self.placement is not None:
                self._journal.left(self.placement)
        if self._turn is not None:
            self._turn.done()


class Attempts:
    """Begins attempts. `queues` are by replica number; `changed` tells the other workers that work was taken on."""

    def __init__(
        self,
        fleet: Fleet,
        journal: Journal,
        gate: PrefillGate,
        queues: Mapping[int, ReplicaQueue],
        changed: Callable[[], None],
        clock: Clock,
    ) -> None:
        self._fleet = fleet
        self._journal = journal
        self._gate = gate
        self._queues = queues
        self._changed = changed
        self._clock = clock

    def turn_away(self, replica: int, error: UpstreamError) -> None:
        """The replica is down: whoever waits for it gets `error` now, and may go elsewhere."""
        self._queues[replica].fail(error)

    def begin(
        self,
        plan: Plan,
        candidate: Candidate,
        fingerprint: Fingerprint | None,
        matched_blocks: int,
        *,
        stream: bool,
        source: int = 0,
    ) -> Attempt:
        """Charge `candidate`, place the prefix there and stand at the gate.

        Without `fingerprint` (nothing worth sharing) only the charge is made. `source` stands for the tenant.
        """
        now_seconds = self._clock.monotonic()
        replica, uncached = candidate.replica.id, candidate.uncached_tokens
        queue = self._queues[replica]
        gate: Prefill | Follower | None = None
        placement: Placement | None = None
        if fingerprint is not None:
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
        turn = None if gated else queue.try_acquire()
        charge = self._fleet.charge(
            replica,
            uncached,
            now_seconds,
            plain=not stream,
            gated=gated,
            queued=turn is None and not gated,
            prompt_tokens=plan.prompt_tokens,
        )
        if fingerprint is not None:
            placement = self._journal.place(replica, fingerprint, plan.prompt_tokens, source=source)
        self._changed()
        return Attempt(self._fleet, self._journal, candidate, charge, placement, queue, gate, turn, self._changed)

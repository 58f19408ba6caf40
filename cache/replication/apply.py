"""Apply other writers' deltas to this worker's index.

Deltas come from Redis, which is a trust boundary: a delta that names an unknown replica or placement, or has values
that cannot be applied, is dropped and counted, and the next one is applied.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from cache.errors import StoreCorrupt
from cache.index.fingerprint import Fingerprint
from cache.index.placement import Placement
from cache.index.prefix_index import PrefixIndex
from cache.ports import Clock
from cache.replication import codec
from cache.replication.codec import (
    Answered,
    Batch,
    Began,
    Budgeted,
    Computed,
    Delta,
    Owned,
    Placed,
    Suspected,
    TakenBack,
)
from cache.replication.owners import ObjectLocations
from cache.replication.restarts import Miss, RestartDetector
from cache.replication.stats import JournalStats
from cache.replication.writer import ReplicaNames

REMEMBERED_BYTES = 32 * 1024 * 1024
"""Memory for other writers' placements, which may still be answered or taken back: 40,000 short prompts, or 2,500 of
two megabytes.
"""

_PLACEMENT_BYTES: Final = 640  # of one of them, in addition to its boundaries, as measured

MAX_EPOCH_STEP: Final = 1_000
"""Largest step of an epoch: a replica does not restart more often between two deltas, so more is damaged data."""

_OF_REPLICAS = (Placed, Began, Budgeted, Owned)
_CANNOT_BE_APPLIED = (StoreCorrupt, ArithmeticError, LookupError, ValueError)


class RemotePrefills(Protocol):
    """Receives the progress of other writers' requests."""

    def placed(self, placement: Placement, prompt_tokens: int) -> None:
        """Note that a request was sent; the part of its prompt that was not held is being computed."""

    def computed(self, placement_id: int) -> None:
        """Note that the first token or the response of a request arrived."""

    def failed(self, placement_id: int) -> None:
        """Note that a request was taken back, or that its client left."""


@dataclass(frozen=True, slots=True)
class Listeners:
    """Receivers of other writers' activity, each optional.

    `placed` gets the id, replica, chain and predicted tokens of every placement; `prefills` gets the progress of
    those that were applied while the index is live; `answered` gets the replica and chain of every answer.
    """

    placed: Callable[[int, int, Fingerprint, float], None] | None = None
    prefills: RemotePrefills | None = None
    answered: Callable[[int, Fingerprint], None] | None = None


@dataclass(frozen=True, slots=True)
class _Remembered:
    """Another writer's placement, which may still be answered or taken back."""

    replica: int
    fingerprint: Fingerprint
    epoch: int
    prompt_tokens: int
    source: int


class DeltaApplier:
    """Applies batches. `live` is False while the index is being rebuilt, when prefills are not reported."""

    def __init__(
        self,
        index: PrefixIndex,
        locations: ObjectLocations,
        restarts: RestartDetector,
        replicas: ReplicaNames,
        listeners: Listeners,
        clock: Clock,
        stats: JournalStats,
    ) -> None:
        self._index = index
        self._locations = locations
        self._restarts = restarts
        self._replicas = replicas
        self._placed = listeners.placed
        self._prefills = listeners.prefills
        self._answered = listeners.answered
        self._clock = clock
        self._stats = stats
        self.live = False
        self._remembered: OrderedDict[int, _Remembered] = OrderedDict()
        self._remembered_bytes = 0

    def apply_payload(self, payload: bytes) -> None:
        """Apply one entry of the stream."""
        try:
            batch = codec.decode_batch(payload)[1]
        except StoreCorrupt:
            self._stats.dropped_corrupt += 1
            return
        self.apply(batch)

    def apply_own_budgets(self, payload: bytes) -> None:
        """Apply the budgets of this writer's own entry: the order in the stream decides which change counts."""
        try:
            batch = codec.decode_batch(payload)[1]
        except StoreCorrupt:
            self._stats.dropped_corrupt += 1
            return
        for delta in batch.deltas:
            if isinstance(delta, Budgeted):
                replica = self._replicas.number_of(batch.names.get(delta.replica, ""))
                if replica is not None:
                    self._apply_budget(delta, replica)

    def apply(self, batch: Batch) -> None:
        """Apply every delta of a batch that can be applied."""
        number_of = {number: self._replicas.number_of(name) for number, name in batch.names.items()}
        now = self._clock.unix()
        for delta in batch.deltas:
            try:
                if self._apply_delta(delta, number_of, now):
                    self._stats.applied_deltas += 1
            except _CANNOT_BE_APPLIED:
                self._stats.dropped_invalid += 1

    def _apply_delta(self, delta: Delta, number_of: dict[int, int | None], now: float) -> bool:
        if not isinstance(delta, _OF_REPLICAS):
            return self._apply_to_placement(delta)
        replica = number_of.get(delta.replica)
        if replica is None:
            self._stats.dropped_unknown += 1
            return False
        if isinstance(delta, Placed):
            self._check_epoch(replica, delta.epoch)
            self._apply_placed(delta, replica, now)
        elif isinstance(delta, Began):
            self._check_epoch(replica, delta.epoch)
            self._index.new_epoch(replica, delta.epoch)
            self._restarts.clear(replica)
        elif isinstance(delta, Owned):
            self._locations.learn(delta.made_id, self._replicas.name_of(replica) or "")
        else:
            self._apply_budget(delta, replica)
        return True

    def _check_epoch(self, replica: int, epoch: int) -> None:
        if epoch > self._index.epoch(replica) + MAX_EPOCH_STEP:
            raise StoreCorrupt("an epoch is far ahead of the replica's")

    def _apply_placed(self, delta: Placed, replica: int, now: float) -> None:
        fingerprint = delta.fingerprint
        # a clock ahead of ours must not make its placements the newest; also false for NaN
        stamp = delta.unix_seconds if 0.0 <= delta.unix_seconds <= now else now
        placement = self._index.apply_place(
            replica,
            fingerprint,
            delta.prompt_tokens,
            delta.epoch,
            delta.placement,
            stamp,
            source=delta.source,
        )
        if placement is not None:
            if self._prefills is not None and self.live:
                self._prefills.placed(placement, delta.prompt_tokens)
            remembered = _Remembered(replica, fingerprint, delta.epoch, delta.prompt_tokens, delta.source)
            self._remember(delta.placement, remembered)
        if self._placed is not None:
            self._placed(delta.placement, replica, fingerprint, delta.prompt_tokens)

    def _apply_budget(self, delta: Budgeted, replica: int) -> None:
        known = self._index.replicas().get(replica)
        if delta.from_tokens is None or (known is not None and known.budget_tokens == delta.from_tokens):
            self._index.set_budget(replica, delta.to_tokens)

    def _apply_to_placement(self, delta: TakenBack | Answered | Suspected | Computed) -> bool:
        self._tell_prefills(delta)
        if isinstance(delta, Computed):
            return True
        remembered = self._remembered.get(delta.placement)
        if remembered is None:
            self._stats.dropped_orphans += 1
            return False
        replica, fingerprint, epoch = remembered.replica, remembered.fingerprint, remembered.epoch
        if isinstance(delta, TakenBack):
            self._index.apply_take_back(replica, fingerprint, delta.from_block, epoch, delta.placement)
        elif isinstance(delta, Answered):
            self._index.apply_answer(
                replica,
                fingerprint,
                delta.prompt_tokens,
                delta.output_tokens,
                epoch,
                cached_tokens=delta.cached_tokens,
                placement_id=delta.placement,
            )
            if delta.cached_tokens:
                self._restarts.clear(replica)
            if self._answered is not None:
                self._answered(replica, fingerprint)
        elif 0 < delta.held_blocks <= len(fingerprint.hashes):
            tokens = remembered.prompt_tokens
            miss = Miss(
                placement=delta.placement,
                epoch=epoch,
                fingerprint=fingerprint,
                held_blocks=delta.held_blocks,
                prompt_tokens=tokens,
                source=remembered.source,
            )
            self._restarts.missed(replica, miss)
        return True

    def _tell_prefills(self, delta: TakenBack | Answered | Suspected | Computed) -> None:
        if self._prefills is None:
            return
        if isinstance(delta, TakenBack):
            self._prefills.failed(delta.placement)
        else:
            self._prefills.computed(delta.placement)

    def _remember(self, placement: int, remembered: _Remembered) -> None:
        known = self._remembered
        before = known.get(placement)
        if before is not None:
            self._remembered_bytes -= _size_bytes(before)
        self._remembered_bytes += _size_bytes(remembered)
        known[placement] = remembered
        while self._remembered_bytes > REMEMBERED_BYTES:
            self._remembered_bytes -= _size_bytes(known.popitem(last=False)[1])


def _size_bytes(remembered: _Remembered) -> int:
    return _PLACEMENT_BYTES + len(remembered.fingerprint.hashes) * codec.BOUNDARY_BYTES

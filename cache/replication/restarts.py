"""Detect that a replica restarted: nothing was cached of whole earlier prompts.

Two such responses in the same epoch, on chains of which neither is a prefix of the other, mean that the replica's
cache is empty: a new epoch begins, here and for all writers. If the replica serves several tenants, the two must be
of different tenants; if it also loses prompts without a restart, there must be more. The responses may be this
worker's or another's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from cache.index.fingerprint import Fingerprint
from cache.index.placement import Placement
from cache.index.prefix_index import PrefixIndex
from cache.index.replica_state import MAX_RESTART_MISSES
from cache.index.token_counts import MAX_PROMPT_TOKENS
from cache.ports import Clock
from cache.replication.codec import MAX_MEDIA, Began, Delta, Placed

MAX_MISSES: Final = MAX_RESTART_MISSES + 1
"""Misses remembered per replica: one tenant may have several before another has one."""


@dataclass(frozen=True, slots=True)
class Miss:
    """A placement whose first `held_blocks` were confidently predicted to be cached, and were not."""

    placement: int
    epoch: int
    fingerprint: Fingerprint
    held_blocks: int
    prompt_tokens: int
    source: int = 0  # a number for the tenant


class RestartDetector:
    """The last misses of each replica. `enqueue` sends a delta to all other writers."""

    def __init__(self, index: PrefixIndex, enqueue: Callable[[Delta], None], clock: Clock) -> None:
        self._index = index
        self._enqueue = enqueue
        self._clock = clock
        self._misses: dict[int, list[Miss]] = {}

    def clear(self, replica: int) -> None:
        """Forget the misses of a replica: something of its present epoch was cached, or a new epoch began."""
        self._misses.pop(replica, None)

    def missed(self, replica: int, miss: Miss) -> None:
        """Note a miss; begin a new epoch if enough of them came in a row."""
        if miss.epoch != self._index.epoch(replica):
            return
        earlier = [each for each in self._misses.get(replica, ()) if each.epoch == miss.epoch]
        others = [each for each in earlier if _differ(each, miss)]
        if self._index.is_restart(replica, miss.source, [each.source for each in others]):
            self.restarted(replica, miss.epoch + 1, miss)
        else:
            self._misses[replica] = [*others, miss][-MAX_MISSES:]

    def restarted(self, replica: int, epoch: int, second: Miss) -> None:
        """Begin `epoch`, in which the prompts of all misses have been computed, and announce it to all writers."""
        earlier = self._misses.pop(replica, [])
        now = self._clock.unix()
        self._index.new_epoch(replica, epoch)
        self._enqueue(Began(replica, epoch))
        for miss in (*earlier, second):
            placement = self._index.apply_place(
                replica, miss.fingerprint, miss.prompt_tokens, epoch, miss.placement, now, source=miss.source
            )
            if placement is not None:
                self._enqueue(placed(placement, miss.prompt_tokens, now))


def placed(placement: Placement, prompt_tokens: float, unix_seconds: float) -> Placed:
    """Return the delta of a placement."""
    chain = placement.fingerprint
    return Placed(
        replica=placement.replica,
        placement=placement.id,
        epoch=placement.epoch,
        hashes=chain.hashes.tobytes(),
        ends=chain.ends.tobytes(),
        prompt_tokens=max(0, min(int(prompt_tokens), MAX_PROMPT_TOKENS)),
        unix_seconds=unix_seconds,
        source=placement.source,
        media=chain.media[:MAX_MEDIA],
    )


def _differ(one: Miss, other: Miss) -> bool:
    """Return whether neither of the two predicted prefixes is a prefix of the other."""
    depth = min(one.held_blocks, other.held_blocks) - 1
    return depth >= 0 and one.fingerprint.hashes[depth] != other.fingerprint.hashes[depth]

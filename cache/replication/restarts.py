"""Detect that a replica restarted, from confident predictions of which nothing was cached.

One such answer may be an eviction. Two in the same epoch, on chains of which neither is a prefix of the other, mean
that the replica's cache is empty: a new epoch begins, here and for all writers. The answers may be this worker's or
another's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cache.index.fingerprint import Fingerprint
from cache.index.prefix_index import PrefixIndex
from cache.index.token_counts import MAX_PROMPT_TOKENS
from cache.ports import Clock
from cache.replication.codec import Began, Delta, Placed


@dataclass(frozen=True, slots=True)
class Miss:
    """A placement whose first `held_blocks` were confidently predicted to be cached, and were not."""

    placement: int
    epoch: int
    fingerprint: Fingerprint
    held_blocks: int
    prompt_tokens: int


class RestartDetector:
    """The last miss of each replica. `enqueue` sends a delta to all other writers."""

    def __init__(self, index: PrefixIndex, enqueue: Callable[[Delta], None], clock: Clock) -> None:
        self._index = index
        self._enqueue = enqueue
        self._clock = clock
        self._misses: dict[int, Miss] = {}

    def clear(self, replica: int) -> None:
        """Forget the miss of a replica: something of its present epoch was cached, or a new epoch began."""
        self._misses.pop(replica, None)

    def missed(self, replica: int, miss: Miss) -> None:
        """Note a miss; begin a new epoch if it is the second one."""
        first = self._misses.get(replica)
        if miss.epoch != self._index.epoch(replica):
            return
        if first is None or first.epoch != miss.epoch:
            self._misses[replica] = miss
        elif _differ(first, miss):
            self.restarted(replica, miss.epoch + 1, miss)

    def restarted(self, replica: int, epoch: int, second: Miss) -> None:
        """Begin `epoch`, in which the replica has computed the prompts of both misses; tell all writers."""
        first = self._misses.pop(replica, None)
        now = self._clock.unix()
        self._index.new_epoch(replica, epoch)
        self._enqueue(Began(replica, epoch))
        for miss in (first, second):
            if miss is not None:
                self._index.apply_place(replica, miss.fingerprint, miss.prompt_tokens, epoch, miss.placement, now)
                self._enqueue(placed(miss.placement, replica, epoch, miss.fingerprint, miss.prompt_tokens, now))


def placed(
    placement: int, replica: int, epoch: int, chain: Fingerprint, prompt_tokens: float, unix_seconds: float
) -> Placed:
    """Return the delta of a placement."""
    return Placed(
        replica=replica,
        placement=placement,
        epoch=epoch,
        hashes=chain.hashes.tobytes(),
        ends=chain.ends.tobytes(),
        prompt_tokens=max(0, min(int(prompt_tokens), MAX_PROMPT_TOKENS)),
        unix_seconds=unix_seconds,
    )


def _differ(one: Miss, other: Miss) -> bool:
    """Return whether neither of the two predicted prefixes is a prefix of the other."""
    depth = min(one.held_blocks, other.held_blocks) - 1
    return depth >= 0 and one.fingerprint.hashes[depth] != other.fingerprint.hashes[depth]

"""Let requests that share a cold prefix wait for the first token of the first one: one prefill, not many.

Engines share a prefix only once it is computed, so two requests that arrive together would compute it twice. The plan
has already placed the first one (the leader) in the index, so the next one (a follower) matches it there, on a
replica that does not have it yet. One comparison finds the leader: the chained hash at the follower's deepest matched
block is at the same position in the leader's own chain, beyond what the leader itself found warm. Equal chained
hashes at one position mean an equal prefix, so there is nothing to search.

The leader may belong to another process (`proxy.routing.remote_prefills`).

The plan has decided before whether waiting is worth it: its cost includes the leader's pending tokens, so a request
for which waiting costs more than a prefill elsewhere is not sent to this replica; and it asks `holds_back`, so
neither is one that another replica can answer sooner without computing anything twice.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from math import inf
from typing import Final

from cache import Held

COLD_TOKENS: Final = 1_024
"""For a shorter prefix that is being computed it is not worth waiting: computing it again is faster."""

PATIENCE: Final = 2.0
"""A follower waits for at most this multiple of the leader's predicted prefill, plus `PATIENCE_SECONDS`."""

PATIENCE_SECONDS: Final = 1.0
"""Additional time for which a follower waits; then it goes on alone."""


class Passage(enum.Enum):
    """Ways in which a follower passes the gate."""

    OPENED = "opened"  # the leader's first token came: the prefix is computed
    PROMOTED = "promoted"  # the leader failed: this one goes ahead and leads
    EXPIRED = "expired"  # the leader took too long


class Prefill:
    """A request under way to a replica that computes a part of its prompt: the leader of requests that share it.

    The first `warm_blocks` of the chain, with `warm_tokens`, were cached or being computed by another when it was
    routed.
    """

    __slots__ = ("_gate", "followers", "hashes", "number", "replica", "warm_blocks", "warm_tokens")

    def __init__(
        self, gate: PrefillGate, replica: int, hashes: Sequence[int], warm_blocks: int, warm_tokens: float
    ) -> None:
        self._gate = gate
        self.replica = replica
        self.hashes = hashes
        self.warm_blocks = warm_blocks
        self.warm_tokens = warm_tokens
        self.followers: list[Follower] = []
        self.number = 0  # in the order in which the prefills became leaders

    def first_token(self) -> None:
        """Let all followers go, since the prefix is computed. May be called twice, and after `failed`."""
        self._gate.close(self)
        followers, self.followers = self.followers, []
        for follower in followers:
            follower.let_pass(Passage.OPENED)

    def failed(self) -> None:
        """End without a first token: the first follower that still waits goes ahead, and the others follow it."""
        self._gate.close(self)
        followers, self.followers = self.followers, []
        waiting = [follower for follower in followers if follower.is_waiting]
        if not waiting:
            return
        leader = waiting[0].prefill
        self._gate.close(leader)  # it is found by what it computes
        leader.warm_blocks, leader.warm_tokens = self.warm_blocks, self.warm_tokens
        self._gate.open(leader)
        for follower in waiting[1:]:
            if leader.shares(follower.prefill.hashes, follower.matched_blocks):
                leader.followers.append(follower)
            else:
                follower.let_pass(Passage.OPENED)
        waiting[0].let_pass(Passage.PROMOTED)

    def shares(self, hashes: Sequence[int], matched_blocks: int) -> bool:
        """Return True if the matched part of `hashes`, `matched_blocks` deep, ends in what this prefill computes."""
        return self.warm_blocks < matched_blocks <= len(self.hashes) and (
            self.hashes[matched_blocks - 1] == hashes[matched_blocks - 1]
        )


class Follower:
    """A request that waits for a leader. `prefill` is its own, which may have followers while it waits."""

    __slots__ = ("_passage", "_then", "matched_blocks", "patience_seconds", "prefill")

    def __init__(self, prefill: Prefill, matched_blocks: int, patience_seconds: float) -> None:
        self.prefill = prefill
        self.matched_blocks = matched_blocks
        self.patience_seconds = patience_seconds
        self._passage: Passage | None = None
        self._then: Callable[[], None] | None = None

    @property
    def is_waiting(self) -> bool:
        """True until it passes or leaves."""
        return self._passage is None

    async def wait(self, most_seconds: float = inf) -> Passage:
        """Wait for the leader's first token, for at most `most_seconds`.

        A follower whose wait is cancelled leaves and is never promoted.
        """
        if self._passage is None:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self.then(lambda: None if future.done() else future.set_result(None))
            alarm = loop.call_later(min(self.patience_seconds, most_seconds), self.expire)
            try:
                await future
            finally:
                alarm.cancel()
                self.leave()
        return self._passage or Passage.EXPIRED

    def then(self, go: Callable[[], None]) -> None:
        """Call `go` once, when it may go on. For callers without an event loop, which must call `expire`."""
        if self._passage is None:
            self._then = go
        else:
            go()

    def expire(self) -> None:
        """Go on alone: it has waited long enough."""
        self.let_pass(Passage.EXPIRED)

    def leave(self) -> None:
        """Stop waiting. May be called twice, and after it passed."""
        self._passage = self._passage or Passage.EXPIRED

    def let_pass(self, passage: Passage) -> None:
        """Let it go on, unless it has already passed or left."""
        if self._passage is None:
            self._passage = passage
            if self._then is not None:
                self._then()


class _Leaders:
    """The prefills under way at one replica, by the first boundary that each computes.

    Who shares a deeper boundary with one of them shares this one too. So of thousands only those are looked at that
    compute what a request needs.
    """

    __slots__ = ("all", "by_first", "depths")

    def __init__(self) -> None:
        self.all: dict[Prefill, None] = {}
        self.by_first: dict[int, dict[Prefill, None]] = {}
        self.depths: dict[int, int] = {}  # how many begin to compute behind so many blocks

    def add(self, prefill: Prefill) -> None:
        """Add one that is not there yet."""
        self.all[prefill] = None
        depth = prefill.warm_blocks
        if depth < len(prefill.hashes):
            self.by_first.setdefault(prefill.hashes[depth], {})[prefill] = None
            self.depths[depth] = self.depths.get(depth, 0) + 1

    def remove(self, prefill: Prefill) -> None:
        """Remove one that is there."""
        del self.all[prefill]
        depth = prefill.warm_blocks
        if depth < len(prefill.hashes):
            first = prefill.hashes[depth]
            del self.by_first[first][prefill]
            if not self.by_first[first]:
                del self.by_first[first]
            self.depths[depth] -= 1
            if not self.depths[depth]:
                del self.depths[depth]


class PrefillGate:
    """The prefills under way, by replica, that are long enough to be worth waiting for."""

    def __init__(self, cold_tokens: float = COLD_TOKENS) -> None:
        self.cold_tokens = cold_tokens
        self._leaders: dict[int, _Leaders] = {}
        self._opened = 0

    def enter(
        self,
        replica: int,
        hashes: Sequence[int],
        *,
        matched_blocks: int,
        matched_tokens: float,
        prompt_tokens: float,
        prefill_seconds: float,
    ) -> Prefill | Follower | None:
        """Announce a request that is being sent to `replica`, where the index matched `matched_blocks` of it.

        `prefill_seconds` is the predicted time until the first token, and bounds the wait. Return None if there is
        nothing to wait for and nothing to lead; a `Prefill` if the request goes ahead (then call its `first_token` or
        `failed`); or a `Follower` (then `await wait()` and go on with its `prefill` as above).
        """
        leads = prompt_tokens - matched_tokens > self.cold_tokens
        if not leads and replica not in self._leaders:
            return None
        own = Prefill(self, replica, hashes, matched_blocks, matched_tokens)
        leader = self._leader(replica, hashes, matched_blocks, matched_tokens)
        if leader is None:
            return self.open(own) if leads else None
        follower = Follower(own, matched_blocks, PATIENCE * prefill_seconds + PATIENCE_SECONDS)
        leader.followers.append(follower)
        if leads:
            self.open(own)
        return follower

    def holds_back(self, hashes: Sequence[int], replica: int, held: Held) -> bool:
        """Return True if a request of which `replica` holds `held` would have to wait there. Changes nothing."""
        return self._leader(replica, hashes, held.blocks, held.tokens) is not None

    def lead(self, replica: int, hashes: Sequence[int], warm_blocks: int, warm_tokens: float) -> Prefill:
        """Announce a long prefill that does not wait itself; call its `first_token` or `failed`."""
        return self.open(Prefill(self, replica, hashes, warm_blocks, warm_tokens))

    def turn_away(self, replica: int) -> None:
        """Let all requests pass that wait for a prefill at `replica`, which is not used any more."""
        leaders = self._leaders.get(replica)
        for leader in () if leaders is None else tuple(leaders.all):
            followers, leader.followers = leader.followers, []
            for follower in followers:
                follower.expire()

    @property
    def is_open(self) -> bool:
        """True if there is nothing to wait for, at any replica."""
        return not self._leaders

    def __len__(self) -> int:
        """Count the prefills that a request may wait for."""
        return sum([len(leaders.all) for leaders in self._leaders.values()])

    def open(self, prefill: Prefill) -> Prefill:
        """Let requests follow `prefill`. May be called twice."""
        leaders = self._leaders.get(prefill.replica)
        if leaders is None:
            leaders = self._leaders[prefill.replica] = _Leaders()
        if prefill not in leaders.all:
            if not prefill.number:
                self._opened += 1
                prefill.number = self._opened
            leaders.add(prefill)
        return prefill

    def close(self, prefill: Prefill) -> None:
        """Let no further request follow `prefill`. May be called twice."""
        leaders = self._leaders.get(prefill.replica)
        if leaders is not None and prefill in leaders.all:
            leaders.remove(prefill)
            if not leaders.all:
                del self._leaders[prefill.replica]

    def _leader(
        self, replica: int, hashes: Sequence[int], matched_blocks: int, matched_tokens: float
    ) -> Prefill | None:
        """Return the first prefill that computes what was matched at `replica`, if it is worth waiting for."""
        leaders = self._leaders.get(replica)
        if leaders is None:
            return None
        found: Prefill | None = None
        for depth in leaders.depths:
            if depth >= matched_blocks:
                continue
            for leader in leaders.by_first.get(hashes[depth], ()):
                if (
                    (found is None or leader.number < found.number)
                    and matched_tokens - leader.warm_tokens > self.cold_tokens
                    and leader.shares(hashes, matched_blocks)
                ):
                    found = leader
        return found

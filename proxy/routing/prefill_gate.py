"""Siblings of a cold prefix wait for the first token of the one that went ahead: one prefill instead of many.

Engines share a prefix only once it is computed; two that arrive together compute it twice. The plan has placed the
first (the leader) in the index, so a sibling matches it there, on a replica that does not have it yet. Which leader
is told by one comparison: the chained hash at the sibling's deepest matched block stands at the same position in the
leader's own chain, beyond what the leader itself found warm. Equal chained hashes at one position mean an equal
prefix, so nothing has to be searched.

The leader may be another process's: its placement comes by in the journal before it is answered, and leads here until
its first token comes by too, or for as long as its prefill may take (`RemotePrefills`); nobody asks anybody.

Whether waiting is worth it is not asked here: the plan's cost holds the leader's pending tokens, so a sibling for
which waiting costs more than a prefill elsewhere was not sent to this replica; and the plan asks (`holds_back`), so
one that another replica could answer sooner, with nothing computed twice, was not either.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from typing import Final

from cache import Held, Placement

COLD_TOKENS: Final = 1_024
"""A prefix with fewer tokens under way is computed again sooner than it is worth waiting for."""

PATIENCE: Final = 2.0
"""A sibling waits for at most this multiple of the leader's predicted prefill ..."""

PATIENCE_SECONDS: Final = 1.0
"""... and this long on top; then it goes on alone."""


class Passage(enum.Enum):
    """How a sibling came through the gate."""

    OPENED = "opened"  # the leader's first token came: the prefix is there
    PROMOTED = "promoted"  # the leader failed: this one goes ahead and leads
    EXPIRED = "expired"  # the leader took too long


class Prefill:
    """A request under way to a replica, of which a part is being computed: a leader to those that share that part."""

    __slots__ = ("_followers", "_gate", "_hashes", "_replica", "_warm_blocks", "_warm_tokens")

    def __init__(
        self, gate: PrefillGate, replica: int, hashes: Sequence[int], warm_blocks: int, warm_tokens: float
    ) -> None:
        self._gate = gate
        self._replica = replica
        self._hashes = hashes
        self._warm_blocks = warm_blocks  # of the chain: there, or another's to compute, when it was routed
        self._warm_tokens = warm_tokens
        self._followers: list[Follower] = []

    def first_token(self) -> None:
        """The prefix is computed: all that wait may go. May come twice, and after `failed`."""
        self._gate._close(self)
        followers, self._followers = self._followers, []
        for follower in followers:
            follower._pass(Passage.OPENED)

    def failed(self) -> None:
        """It ended, its first token unseen: the first that still waits goes ahead, and the others follow that one."""
        self._gate._close(self)
        followers, self._followers = self._followers, []
        waiting = [follower for follower in followers if follower._passage is None]
        if not waiting:
            return
        leader = waiting[0].prefill
        leader._warm_blocks, leader._warm_tokens = self._warm_blocks, self._warm_tokens
        self._gate._open(leader)
        for follower in waiting[1:]:
            if leader._shares(follower.prefill._hashes, follower.matched_blocks):
                leader._followers.append(follower)
            else:
                follower._pass(Passage.OPENED)
        waiting[0]._pass(Passage.PROMOTED)

    def _shares(self, hashes: Sequence[int], matched_blocks: int) -> bool:
        """True where what `hashes` matched, `matched_blocks` deep, ends in what this one computes now."""
        return self._warm_blocks < matched_blocks <= len(self._hashes) and (
            self._hashes[matched_blocks - 1] == hashes[matched_blocks - 1]
        )


class Follower:
    """A sibling that waits; `prefill` is its own, to tell of in turn, and may have followers while it waits."""

    __slots__ = ("_passage", "_then", "matched_blocks", "patience_seconds", "prefill")

    def __init__(self, prefill: Prefill, matched_blocks: int, patience_seconds: float) -> None:
        self.prefill = prefill
        self.matched_blocks = matched_blocks
        self.patience_seconds = patience_seconds
        self._passage: Passage | None = None
        self._then: Callable[[], None] | None = None

    async def wait(self) -> Passage:
        """Wait for the leader's first token. One that is cancelled is gone, and is never promoted."""
        if self._passage is None:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self.then(lambda: None if future.done() else future.set_result(None))
            alarm = loop.call_later(self.patience_seconds, self.expire)
            try:
                await future
            finally:
                alarm.cancel()
                self.leave()
        return self._passage or Passage.EXPIRED

    def then(self, go: Callable[[], None]) -> None:
        """Call `go` once, when it may go on: for who has no event loop, and says `expire` by a clock of its own."""
        if self._passage is None:
            self._then = go
        else:
            go()

    def expire(self) -> None:
        """It has waited long enough, and goes on alone."""
        self._pass(Passage.EXPIRED)

    def leave(self) -> None:
        """Wait no longer. May come twice, and after it passed."""
        self._passage = self._passage or Passage.EXPIRED

    def _pass(self, passage: Passage) -> None:
        if self._passage is None:
            self._passage = passage
            if self._then is not None:
                self._then()


class PrefillGate:
    """The prefills under way to every replica that are long enough to be waited for."""

    def __init__(self, cold_tokens: float = COLD_TOKENS) -> None:
        self.cold_tokens = cold_tokens
        self._leaders: dict[int, list[Prefill]] = {}

    def enter(
        self,
        replica: int,
        hashes: Sequence[int],
        matched_blocks: int,
        matched_tokens: float,
        prompt_tokens: float,
        prefill_seconds: float,
    ) -> Prefill | Follower | None:
        """A request is being sent to `replica`, where the index matched so much of it.

        None: nothing to wait for and nothing to lead. `Prefill`: go ahead, and say `first_token` or `failed`.
        `Follower`: `await wait()` first, then go on with its `prefill` as above. `prefill_seconds` is what the
        leader's prefill is predicted to take from now on, and bounds the wait.
        """
        leads = prompt_tokens - matched_tokens > self.cold_tokens
        if not leads and replica not in self._leaders:
            return None
        own = Prefill(self, replica, hashes, matched_blocks, matched_tokens)
        leader = self._leader(replica, hashes, matched_blocks, matched_tokens)
        if leader is None:
            return self._open(own) if leads else None
        follower = Follower(own, matched_blocks, PATIENCE * prefill_seconds + PATIENCE_SECONDS)
        leader._followers.append(follower)
        if leads:
            self._open(own)
        return follower

    def holds_back(self, hashes: Sequence[int], replica: int, held: Held) -> bool:
        """True where a request that finds so much of it at `replica` would have to wait there. Changes nothing."""
        return self._leader(replica, hashes, held.blocks, held.tokens) is not None

    def lead(self, replica: int, hashes: Sequence[int], warm_blocks: int, warm_tokens: float) -> Prefill:
        """A long prefill goes ahead at `replica`, which held so much of it: say `first_token` or `failed`."""
        return self._open(Prefill(self, replica, hashes, warm_blocks, warm_tokens))

    @property
    def is_open(self) -> bool:
        """True where there is nothing to wait for, at any replica."""
        return not self._leaders

    def __len__(self) -> int:
        """Prefills that somebody may wait for."""
        return sum(map(len, self._leaders.values()))

    def _leader(
        self, replica: int, hashes: Sequence[int], matched_blocks: int, matched_tokens: float
    ) -> Prefill | None:
        """The first that computes what was matched at `replica`, where that is worth waiting for."""
        for leader in self._leaders.get(replica, ()):
            if matched_tokens - leader._warm_tokens > self.cold_tokens and leader._shares(hashes, matched_blocks):
                return leader
        return None

    def _open(self, prefill: Prefill) -> Prefill:
        leaders = self._leaders.setdefault(prefill._replica, [])
        if prefill not in leaders:
            leaders.append(prefill)
        return prefill

    def _close(self, prefill: Prefill) -> None:
        leaders = self._leaders.get(prefill._replica)
        if leaders is not None and prefill in leaders:
            leaders.remove(prefill)
            if not leaders:
                del self._leaders[prefill._replica]


class RemotePrefills:
    """The prefills of other processes, as the journal tells of them (`cache.Elsewhere`), as leaders at our gate.

    `wait_seconds(replica, tokens)` predicts how long a prefill of so many tokens takes there from now on, all that is
    before it included.
    """

    def __init__(self, gate: PrefillGate, wait_seconds: Callable[[int, float], float]) -> None:
        self._gate = gate
        self._wait_seconds = wait_seconds
        self._leading: dict[int, tuple[Prefill, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._leading)

    def placed(self, placement: Placement, prompt_tokens: int) -> None:
        """Another process has sent a request; where it computes much, siblings wait for it."""
        uncached = prompt_tokens - placement.predicted_tokens
        if uncached <= self._gate.cold_tokens or placement.id in self._leading:
            return
        prefill = self._gate.lead(
            placement.replica, placement.fingerprint.hashes, placement.held_blocks, placement.predicted_tokens
        )
        patience = PATIENCE * self._wait_seconds(placement.replica, uncached) + PATIENCE_SECONDS
        alarm = asyncio.get_running_loop().call_later(patience, self.computed, placement.id)
        self._leading[placement.id] = prefill, alarm

    def computed(self, placement_id: int) -> None:
        """Its first token came, or its time is over: who waits may go. May come twice."""
        if (prefill := self._pop(placement_id)) is not None:
            prefill.first_token()

    def failed(self, placement_id: int) -> None:
        """It was taken back, or its client left: the first of ours that waits leads."""
        if (prefill := self._pop(placement_id)) is not None:
            prefill.failed()

    def _pop(self, placement_id: int) -> Prefill | None:
        prefill, alarm = self._leading.pop(placement_id, (None, None))
        if alarm is not None:
            alarm.cancel()
        return prefill

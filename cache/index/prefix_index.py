"""Record which replica holds which prefix: the index's operations for looking up, placing, learning and upkeep.

It is in memory only and has no clock: `now` is passed in, in seconds of a clock that all writers share.
Replicas are small numbers of this process. A wrong entry may cost a request time, never content.

Every operation is bounded: upkeep that exceeds a call's share is done by the next call, or by `tend`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from cache.index.eviction import (
    MAX_BLOCKS,
    MAX_BYTES,
    UPKEEP_STEPS,
    Eviction,
    dropped_tokens,
    free_prompts,
    held_prompts,
)
from cache.index.feedback import confirm, judge, new_budget
from cache.index.fingerprint import Fingerprint
from cache.index.matching import add_fork, reused_tokens, round_to_blocks
from cache.index.nodes import NO_PLACEMENT, NOBODY, Node, ReplicaEntries, Step
from cache.index.placement import Feedback, FeedbackKind, Held, IndexStats, Match, Placement, ReplicaStats
from cache.index.replica_state import UNLIMITED_TOKENS, ReplicaState
from cache.index.rows import Reader, ReplicaRow, RunRow, written
from cache.index.token_counts import estimate
from cache.index.tree import Tree, count_stored, ends_at, new_entries, reuse_distance

__all__ = [
    "UNLIMITED_TOKENS",
    "Feedback",
    "FeedbackKind",
    "Held",
    "IndexStats",
    "Match",
    "Placement",
    "PrefixIndex",
    "ReplicaRow",
    "ReplicaStats",
    "RunRow",
]

LOADED_ROWS: Final = 100
"""Rows loaded between two yields: about a millisecond."""

MAX_IN_FLIGHT: Final = 65_536
"""Placements remembered as unanswered; beyond that the oldest count as answered."""

REUSE_STEPS: Final = 8
REUSE_STEPS_UNKNOWN: Final = 128
"""Residencies examined from either end for a reuse distance: under a microsecond. The second number applies while
the capacity can be learned from these distances only.
"""

SAFE_HIT_SHARE: Final = 0.9
"""Below this share of whole earlier prompts that hit, a stated capacity is not relied on. An engine that keeps a
state for each prompt, as hybrid models need, holds fewer prompts than their shared tokens suggest: it loses some
that are far from being the oldest.
"""

ORIGIN_BITS: Final = 24
"""Placement ids are origin << (63 - ORIGIN_BITS) | counter: no two writers share one, and they fit into 64 signed
bits.
"""

# constants: the member of an enum is looked up in Python
_RESTARTED: Final = FeedbackKind.RESTARTED


class PrefixIndex:
    """The index of this process.

    `origin`, random per process, sets the placement ids apart from those of other processes. `max_blocks` and
    `max_bytes` bound the blocks of all replicas together and their memory.
    """

    def __init__(self, *, origin: int = 0, max_blocks: int = MAX_BLOCKS, max_bytes: int = MAX_BYTES) -> None:
        self._tree = Tree()
        self._replicas: dict[int, ReplicaState] = {}
        self._in_flight: dict[int, None] = {}  # placements of this process without an answer
        self._running: dict[int, float] = {}  # placements of all processes without an answer, with their times
        self._eviction = Eviction(self._running, max_blocks, max_bytes)
        self._next_id = (origin % 2**ORIGIN_BITS << 63 - ORIGIN_BITS) + 1
        self._snapshots = 0
        self._coarse: set[int] = set()  # replicas whose blocks are large enough to matter for a prediction

    # -- looking up

    def match(self, fingerprint: Fingerprint) -> Match:
        """Return which replicas hold how much of a prompt.

        Its cost is proportional to the nodes on the path and the replicas that drop out on the way.
        """
        hashes = fingerprint.hashes
        found: dict[int, Held] = {}
        known: Step | None = None
        steps = self._tree.walk(hashes)
        for step in reversed(steps):
            held = step.node.held
            if len(held) <= len(found):
                continue
            part = Held(step.depth, step.node.ends[step.blocks - 1], step.tokens)
            if step.node.fork_tokens >= 0 and step.depth < len(hashes):
                add_fork(found, step, part)
            elif found:
                for entries in held:
                    if entries.replica not in found:
                        found[entries.replica] = part
            else:
                found = {entries.replica: part for entries in held}
            if known is None and (len(found) > 1 or NOBODY not in found):
                known = step
        found.pop(NOBODY, None)
        if self._coarse:
            round_to_blocks(found, steps, self._coarse, self._replicas)
        if known is None:
            return Match(found, evicted_from=self._tree.last_holder(hashes[0]) if len(hashes) else NOBODY)
        grows = known.blocks == len(known.node.hashes) and not known.node.children
        depth = known.depth
        whole = depth == len(hashes)
        return Match(
            found,
            known_blocks=depth,
            known_bytes=known.node.ends[known.blocks - 1],
            known_tokens=known.tokens,
            evicted_from=NOBODY if whole else self._tree.last_holder(hashes[depth]),
            diverged=not whole and not grows,
        )

    # -- room

    def dropped_tokens(self, replica: int, matched_tokens: float, uncached_tokens: float) -> float:
        """Predict the tokens that the replica must evict for a prompt of which it holds `matched_tokens`."""
        state = self._replicas.get(replica)
        return 0.0 if state is None else dropped_tokens(state, matched_tokens, uncached_tokens)

    def free_prompts(self, replica: int, prompt_tokens: float) -> int | None:
        """Count the prompts of this length that fit into the replica's free room; None if its capacity is unknown."""
        state = self._replicas.get(replica)
        return None if state is None else free_prompts(state, prompt_tokens)

    def held_prompts(self, replica: int, prompt_tokens: float) -> int:
        """Count the prompts of this length that have as many tokens as the replica holds, rounded up."""
        state = self._replicas.get(replica)
        return 0 if state is None else held_prompts(state, prompt_tokens)

    # -- routing

    def place(
        self, replica: int, fingerprint: Fingerprint, prompt_tokens: float, now: float, *, source: int = 0
    ) -> Placement:
        """Note, when a prompt is routed, that the replica will hold all of it.

        `prompt_tokens` is an estimate, `source` a number that identifies the tenant. The placement counts as in
        flight until `answered`, `take_back` or `settled`.
        """
        placement_id = self._next_id
        self._next_id += 1
        placement = self._place(replica, fingerprint, prompt_tokens, now, placement_id, source)
        in_flight = self._in_flight
        in_flight[placement_id] = None
        if len(in_flight) > MAX_IN_FLIGHT:
            del in_flight[next(iter(in_flight))]
        return placement

    def apply_place(
        self,
        replica: int,
        fingerprint: Fingerprint,
        prompt_tokens: float,
        epoch: int,
        placement_id: int,
        now: float,
        *,
        source: int = 0,
    ) -> Placement | None:
        """Apply another writer's placement under its id; applying it twice is harmless.

        An epoch newer than the replica's present one begins here. Return None if the placement's epoch is over.
        """
        state = self._replica(replica)
        if epoch < state.epoch:
            return None
        if epoch > state.epoch:
            self.new_epoch(replica, epoch)
        return self._place(replica, fingerprint, prompt_tokens, now, placement_id, source)

    def take_back(self, placement: Placement) -> None:
        """Remove the entries that only this placement created and no later placement has touched."""
        self.apply_take_back(
            placement.replica, placement.fingerprint, placement.held_blocks, placement.epoch, placement.id
        )

    def apply_take_back(
        self, replica: int, fingerprint: Fingerprint, from_block: int, epoch: int, placement_id: int
    ) -> None:
        """Take back another writer's placement, given by its parts; applying it twice is harmless."""
        self._in_flight.pop(placement_id, None)
        self._running.pop(placement_id, None)
        state = self._replica(replica)
        if epoch != state.epoch:
            return
        entries = state.entries
        for step in reversed(self._tree.walk(fingerprint.hashes)):
            node = step.node
            residency = node.held.get(entries)
            if residency is None:
                continue
            start = step.depth - step.blocks
            if step.depth <= from_block or residency.touched_by != placement_id or step.blocks < len(node.hashes):
                return
            if any(entries in child.held for child in (node.children or {}).values()):
                return
            if start >= from_block:
                self._tree.release(entries, node)
            else:
                self._tree.trim(entries, node, from_block - start)

    def settled(self, placement: Placement) -> None:
        """End a placement whose request brought no usage to learn from; its entries stay."""
        self._in_flight.pop(placement.id, None)
        self._running.pop(placement.id, None)

    # -- learning

    def answered(
        self,
        placement: Placement,
        prompt_tokens: int,
        cached_tokens: int | None,
        output_tokens: int,
        now: float,
        *,
        decide: bool = True,
    ) -> Feedback:
        """Learn from a response's usage.

        `cached_tokens` is None if the upstream did not report them, or if the request asked not to use the cache.
        With `decide` the epoch or budget that follows is applied here; without, it is only returned.
        """
        self._in_flight.pop(placement.id, None)
        self._running.pop(placement.id, None)
        predicted = min(placement.predicted_tokens, prompt_tokens)
        error = None if cached_tokens is None else cached_tokens - predicted
        state = self._replica(placement.replica)
        if placement.epoch != state.epoch:
            return Feedback(predicted, error, FeedbackKind.STALE)
        steps = self._tree.walk(placement.fingerprint.hashes)
        resident = state.entries.stored_tokens
        learnt = judge(state, placement, prompt_tokens, cached_tokens, steps)
        self._note_blocks(placement.replica, state)
        steps = self._renew(state, placement.fingerprint, prompt_tokens, steps, placement.id)
        confirm(state.entries, placement.fingerprint, steps, prompt_tokens, output_tokens)
        if placement.replica in self._coarse:
            self._count_stored(state, [step.node for step in steps])
        epoch = state.epoch + 1 if learnt is _RESTARTED else None
        budget = new_budget(state, placement, learnt, resident)
        if decide and epoch is not None:
            self.new_epoch(placement.replica, epoch)
            self._place(placement.replica, placement.fingerprint, prompt_tokens, now, placement.id, placement.source)
            self._running.pop(placement.id, None)
        if decide and budget is not None:
            self.set_budget(placement.replica, budget)
        return Feedback(predicted, error, learnt, epoch, budget)

    def apply_answer(
        self,
        replica: int,
        fingerprint: Fingerprint,
        prompt_tokens: int,
        output_tokens: int,
        epoch: int,
        *,
        cached_tokens: int | None = None,
        placement_id: int = 0,
    ) -> None:
        """Apply the usage of another writer's response: the tokens of a chain, which the replica has computed."""
        self._running.pop(placement_id, None)
        state = self._replica(replica)
        if epoch == state.epoch:
            if cached_tokens:
                state.granularity.observe(cached_tokens)
                self._note_blocks(replica, state)
                state.shortest_hit_tokens = min(state.shortest_hit_tokens, prompt_tokens)
            steps = self._tree.walk(fingerprint.hashes)
            steps = self._renew_elsewhere(state, fingerprint, prompt_tokens, steps, placement_id)
            confirm(state.entries, fingerprint, steps, prompt_tokens, output_tokens)
            if replica in self._coarse:
                self._count_stored(state, [step.node for step in steps])

    def _renew(
        self,
        state: ReplicaState,
        fingerprint: Fingerprint,
        prompt_tokens: int,
        steps: list[Step],
        placement_id: int,
    ) -> list[Step]:
        """Make an answered prompt the newest: an engine holds all its blocks to the end of the answer.

        `steps` is the prompt's path. Return its path now. What was evicted meanwhile is placed again. A provider's
        time to live begins with the request, so nothing changes there.
        """
        if state.ttl_seconds is not None:
            return steps
        tree, entries = self._tree, state.entries
        tree.split_end(steps)
        is_whole = bool(steps) and steps[-1].depth == len(fingerprint.hashes)
        if is_whole and entries in steps[-1].node.held:
            tree.touch(entries, [step.node for step in steps], tree.stamp(0.0), NO_PLACEMENT)
            return steps
        self._hold(state, fingerprint, prompt_tokens, steps, tree.stamp(0.0), placement_id)
        return tree.walk(fingerprint.hashes)

    def _renew_elsewhere(
        self,
        state: ReplicaState,
        fingerprint: Fingerprint,
        prompt_tokens: int,
        steps: list[Step],
        placement_id: int,
    ) -> list[Step]:
        """Do what `_renew` does for another writer's prompt, except that a node which continues it stays whole."""
        entries = state.entries
        whole = [step.node for step in steps if step.blocks == len(step.node.hashes)]
        is_known = bool(steps) and steps[-1].depth == len(fingerprint.hashes)
        if not is_known or entries not in steps[-1].node.held:
            return self._renew(state, fingerprint, prompt_tokens, steps, placement_id)
        if state.ttl_seconds is None:
            self._tree.touch(entries, whole, self._tree.stamp(0.0), NO_PLACEMENT)
        return steps

    # -- epochs and budgets

    def new_epoch(self, replica: int, epoch: int) -> None:
        """Begin an epoch: the replica restarted and holds nothing. Takes constant time.

        An epoch that is not above the present one is ignored.
        """
        state = self._replica(replica)
        if epoch <= state.epoch:
            return
        self._eviction.retire(self._tree, state)
        state.epoch = epoch
        state.forget_answers()
        self._coarse.discard(replica)

    def set_capacity(self, replica: int, tokens: int | None, slots: int | None = None) -> None:
        """Set the capacity that the configuration or the engine states. The budget never exceeds `tokens`, if given.

        `slots` is the number of prompts that the engine can hold, if it keeps each in a slot.
        """
        state = self._replica(replica)
        state.capacity_tokens, state.slots, state.stated_slots = tokens, slots, slots or 0
        self.set_budget(replica, state.budget_tokens)

    def set_budget(self, replica: int, tokens: int) -> None:
        """Set how many tokens the index keeps of the replica, at most its capacity.

        Entries beyond it are dropped by the next placements and `tend`.
        """
        state = self._replica(replica)
        tokens = min(tokens, state.bound_tokens)
        if tokens < state.budget_tokens:
            state.placed_tokens = 0  # not for growth: otherwise each correct prediction would delay the next shrink
        state.budget_tokens = tokens

    def set_ttl(self, replica: int, seconds: float | None) -> None:
        """Let the replica's placements end by time, as at a provider: responses change neither budget nor epoch."""
        self._replica(replica).ttl_seconds = seconds

    def remove(self, replica: int) -> None:
        """Forget a replica."""
        self._coarse.discard(replica)
        state = self._replicas.pop(replica, None)
        if state is not None:
            self._eviction.retire(self._tree, state)

    # -- upkeep

    def tend(self, now: float) -> bool:
        """Do one bounded share of upkeep: past epochs, expired placements, budgets. Return True if some is left."""
        eviction = self._eviction
        steps = eviction.clear_retired(UPKEEP_STEPS)
        for state in self._replicas.values():
            if steps <= 0:
                return True
            steps = eviction.expire(self._tree, state, now, steps)
            steps = eviction.evict(self._tree, state, steps)
        return steps <= 0

    # -- figures

    def replicas(self) -> dict[int, ReplicaStats]:
        """Return the figures of each replica."""
        return {
            replica: ReplicaStats(
                state.entries.blocks,
                state.entries.tokens,
                state.budget_tokens,
                state.epoch,
                state.evicted_blocks + state.entries.evicted_blocks,
            )
            for replica, state in self._replicas.items()
        }

    def is_restart(self, replica: int, source: int, other_sources: Sequence[int]) -> bool:
        """Return True if one more prompt of which nothing is cached means a restart: `ReplicaState.is_restart`."""
        return self._replica(replica).is_restart(source, other_sources)

    def budget_tokens(self, replica: int) -> int:
        """Return how many tokens the replica is believed to hold; UNLIMITED_TOKENS if that is not known."""
        state = self._replicas.get(replica)
        return UNLIMITED_TOKENS if state is None else state.budget_tokens

    def epoch(self, replica: int) -> int:
        """Return the replica's present epoch."""
        return self._replica(replica).epoch

    def stats(self) -> IndexStats:
        """Return the totals."""
        tree = self._tree
        return IndexStats(tree.blocks, tree.nodes, tree.residencies, tree.size_bytes)

    # -- snapshots

    def snapshot(self, rows_per_chunk: int = 500) -> Iterator[Sequence[ReplicaRow | RunRow]]:
        """Yield all rows that `load` needs, in chunks of bounded work between which the index may change.

        Entries that exist from the first chunk to the last are included, prefix-closed. A change in between may or
        may not be, so the reader applies changes since the first chunk again.
        """
        self._snapshots += 1
        number = self._snapshots
        yield [
            ReplicaRow(replica, state.epoch, state.budget_tokens, state.ttl_seconds, state.placed_tokens)
            for replica, state in self._replicas.items()
        ]
        yield from written(self._tree, number, rows_per_chunk)

    def load(
        self, rows: Iterable[ReplicaRow | RunRow], replica_of: Mapping[int, int] | None = None
    ) -> Iterator[None]:
        """Replace this index by the one that was written. Yields from time to time; it is complete at the end.

        `replica_of` translates replica numbers; those that it leaves out are dropped. Until the end all operations
        use the present contents, which are then dropped. A replica that has begun a newer epoch here by then holds
        nothing. Each keeps the time to live that was set here: it is configured, and the writer's may be an old one.
        """
        tree = Tree()
        loaded: dict[int, ReplicaState] = {}

        def number_of(written_as: int) -> int | None:
            return written_as if replica_of is None else replica_of.get(written_as)

        def entries_of(written_as: int) -> ReplicaEntries | None:
            state = loaded.get(number) if (number := number_of(written_as)) is not None else None
            return state.entries if state else None

        reader = Reader(tree, entries_of)
        for count, row in enumerate(rows):
            if isinstance(row, RunRow):
                reader.add(row)
            elif (number := number_of(row.replica)) is not None:
                loaded[number] = ReplicaState(
                    new_entries(number), row.epoch, row.budget_tokens, row.ttl_seconds, row.placed_tokens
                )
            if count % LOADED_ROWS == 0:
                yield
        yield from reader.finish(LOADED_ROWS)
        self._become(tree, loaded)

    # -- inside

    def _note_blocks(self, replica: int, state: ReplicaState) -> None:
        """Remember whether look-ups must round what the replica holds to its blocks."""
        if state.granularity.is_coarse:
            self._coarse.add(replica)
        else:
            self._coarse.discard(replica)

    def _is_room_known(self, state: ReplicaState) -> bool:
        """Return True if a stated capacity can be relied on: with large blocks, their size may still be a guess."""
        if state.capacity_tokens is None or state.entries.replica in self._coarse:
            return False
        return state.hit_share >= SAFE_HIT_SHARE

    def _count_stored(self, state: ReplicaState, path: list[Node]) -> None:
        """Count the room that a path takes at a replica whose blocks are large."""
        if state.granularity.block_tokens:
            count_stored(state.entries, path, state.granularity.block_tokens)

    def _replica(self, replica: int) -> ReplicaState:
        state = self._replicas.get(replica)
        if state is None:
            state = self._replicas[replica] = ReplicaState(new_entries(replica))
        return state

    def _place(
        self,
        replica: int,
        fingerprint: Fingerprint,
        prompt_tokens: float,
        now: float,
        placement_id: int,
        source: int,
    ) -> Placement:
        tree, state = self._tree, self._replica(replica)
        entries, stamp = state.entries, tree.stamp(now)
        running = self._running
        running[placement_id] = stamp
        if len(running) > MAX_IN_FLIGHT:
            del running[next(iter(running))]
        steps = tree.walk(fingerprint.hashes)
        tree.split_end(steps)
        last: Step | None = None
        for step in steps:
            if entries not in step.node.held:
                break
            last = step
        placement = self._placement(state, placement_id, fingerprint, last, stamp, source)
        self._hold(state, fingerprint, prompt_tokens, steps, stamp, placement_id)
        return placement

    def _hold(
        self,
        state: ReplicaState,
        fingerprint: Fingerprint,
        prompt_tokens: float,
        steps: list[Step],
        stamp: float,
        placement_id: int,
    ) -> None:
        """Let a replica hold a whole prompt, whose path so far is `steps`, as its newest."""
        tree, entries = self._tree, state.entries
        held_before = entries.tokens
        path = [step.node for step in steps]
        depth = steps[-1].depth if steps else 0
        if depth < len(fingerprint.hashes):
            tokens = estimate(fingerprint, steps[-1] if steps else None, prompt_tokens)
            node = tree.grow(path[-1] if path else tree.root, entries, fingerprint, depth, tokens)
            if not path or node is not path[-1]:
                path.append(node)
        tree.touch(entries, path, stamp, placement_id)
        if entries.replica in self._coarse:
            self._count_stored(state, path)
        state.placed_tokens += entries.tokens - held_before
        self._eviction.make_room(tree, state, self._replicas.values())

    def _placement(
        self,
        state: ReplicaState,
        placement_id: int,
        fingerprint: Fingerprint,
        last: Step | None,
        stamp: float,
        source: int,
    ) -> Placement:
        replica, epoch = state.entries.replica, state.epoch
        state.saw_source(source)
        if last is None:
            return Placement(placement_id, replica, epoch, fingerprint, stamp, source=source)
        node = last.node
        residency = node.held[state.entries]
        tokens = node.tokens
        proved = residency.confirmed == last.blocks
        whole = ends_at(last, state.entries)
        return Placement(
            placement_id,
            replica,
            epoch,
            fingerprint,
            stamp,
            held_blocks=last.depth,
            held_tokens=last.tokens,
            predicted_tokens=reused_tokens(state, last, whole=whole),
            proved=proved,
            confident=proved and residency.touched_by not in self._in_flight,
            exact=bool(node.pins) and node.pins[-1] == last.blocks,
            whole=whole,
            forks=bool(node.children),
            tolerance_tokens=tokens[-1] - (tokens[-2] if len(tokens) > 1 else 0),
            allowance_tokens=residency.output_tokens,
            reuse_tokens=reuse_distance(
                state.entries,
                residency,
                REUSE_STEPS if self._is_room_known(state) else REUSE_STEPS_UNKNOWN,
            )
            if whole
            else 0,
            source=source,
        )

    def _become(self, tree: Tree, loaded: dict[int, ReplicaState]) -> None:
        """Replace the present contents by the loaded ones."""
        for state in self._replicas.values():
            self._eviction.retire(self._tree, state)
        self._tree = tree
        for replica, read in loaded.items():
            state = self._replica(replica)
            if read.epoch < state.epoch:
                self._eviction.retire(tree, read)
                continue
            state.entries, state.epoch = read.entries, read.epoch
            state.forget_answers()
            self._coarse.discard(replica)
            state.budget_tokens = min(read.budget_tokens, state.bound_tokens)
            state.placed_tokens = read.placed_tokens

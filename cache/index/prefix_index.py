"""Which replica holds which prefix: deepest match, token budgets, leaf-first eviction, epochs, feedback.

In memory and alone: it knows no Redis, no HTTP and no clock (`now` is passed in, in seconds of one clock that all
writers share). Replicas are small numbers of this process. What it believes may cost a request time, never content.

Every verb is bounded: what does not fit into one call's share of upkeep is done by the next, or by `tend`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from cache.index.fingerprint import Fingerprint
from cache.index.nodes import NOBODY, Node, ReplicaEntries, Step
from cache.index.placement import Feedback, FeedbackKind, Held, IndexStats, Match, Placement, ReplicaStats
from cache.index.rows import Reader, ReplicaRow, RunRow, written
from cache.index.token_counts import estimate, learn_tokens, recount
from cache.index.tree import Tree, new_shelf

__all__ = [
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

UNLIMITED_TOKENS = 2**31
"""The budget of a replica whose capacity nobody knows yet; the first confident shortfall makes it a real one."""

MAX_BLOCKS: Final = 2_000_000
"""Blocks of all replicas together, some 100 to 200 MB: a bound for the process, whatever the budgets say."""

UPKEEP_STEPS: Final = 500
"""Nodes that one call may drop: a millisecond or two."""

MIN_TOLERANCE_TOKENS: Final = 128
"""Engines and providers report in steps of 16 to 128 tokens, so less than that is no news."""

SHRINK: Final = 0.9
GROW: Final = 1.05
GROW_FULL_AND_RIGHT: Final = 1.0005
"""Some thirty answers a turnover are right, so this undoes a sixth of a shrink: on traces the budget then stays
within a tenth of the truth, where 1.002 lets it drift to a multiple."""

FULL: Final = 0.95
"""Share of the budget from which an index counts as full; only then can the budget be what was wrong."""

COUNTING_PART: Final = 16
"""A node is not lost for this part of what is cached: engines round down to whole blocks, counts are interpolated,
and what hangs on a common system prompt must not go because that was counted a few tokens too long."""

RECOUNT_SHARE: Final = 0.3
"""Up to this share a shortfall on an interpolated count is taken for a wrong count and not for an eviction."""

LOADED_ROWS: Final = 100
"""Rows that are read back between two yields: about a millisecond."""

MAX_IN_FLIGHT: Final = 65_536
"""Placements remembered as unanswered; beyond that the oldest count as answered."""

ORIGIN_BITS: Final = 24
"""Placement ids are origin << (63 - ORIGIN_BITS) | counter: no two writers share one, and they fit a signed 64."""

# constants: the member of an enum is looked up in Python
_NOTHING: Final = FeedbackKind.NOTHING
_RIGHT: Final = FeedbackKind.RIGHT
_LESS: Final = FeedbackKind.LESS
_MORE: Final = FeedbackKind.MORE
_RESTARTED: Final = FeedbackKind.RESTARTED


@dataclass(slots=True, eq=False)
class _Replica:
    """The state of one replica beside what it holds. `placed_tokens` counts since the budget last shrank."""

    shelf: ReplicaEntries
    epoch: int = 0
    budget_tokens: int = UNLIMITED_TOKENS
    ttl_seconds: float | None = None
    placed_tokens: int = 0
    evicted_blocks: int = 0
    suspect: Placement | None = None


class PrefixIndex:
    """See the module. `origin`, random per process, sets its placement ids apart from the others'."""

    def __init__(self, *, origin: int = 0, max_blocks: int = MAX_BLOCKS) -> None:
        self._tree = Tree()
        self._replicas: dict[int, _Replica] = {}
        self._dead: deque[tuple[Tree, ReplicaEntries]] = deque()
        self._in_flight: dict[int, None] = {}
        self._next_id = (origin % 2**ORIGIN_BITS << 63 - ORIGIN_BITS) + 1
        self._max_blocks = max_blocks
        self._snapshots = 0

    # -- looking up

    def match(self, fingerprint: Fingerprint) -> Match:
        """Who holds how much of it. Costs the nodes on its path and the replicas that drop out on the way."""
        hashes = fingerprint.hashes
        found: dict[int, Held] = {}
        known: Step | None = None
        for step in reversed(self._tree.walk(hashes)):
            held = step.node.held
            if len(held) <= len(found):
                continue
            much = Held(step.depth, step.node.ends[step.blocks - 1], step.tokens)
            if found:
                for shelf in held:
                    if shelf.replica not in found:
                        found[shelf.replica] = much
            else:
                found = {shelf.replica: much for shelf in held}
            if known is None and (len(found) > 1 or NOBODY not in found):
                known = step
        found.pop(NOBODY, None)
        if known is None:
            return Match(found, evicted=len(hashes) > 0 and self._tree.was_evicted(hashes[0]))
        grows = known.blocks == len(known.node.hashes) and not known.node.children
        depth = known.depth
        whole = depth == len(hashes)
        return Match(
            found,
            depth,
            known.node.ends[known.blocks - 1],
            known.tokens,
            not whole and self._tree.was_evicted(hashes[depth]),
            not whole and not grows,
        )

    # -- routing

    def place(self, replica: int, fingerprint: Fingerprint, prompt_tokens: float, now: float) -> Placement:
        """Note, when a prompt is routed, that the replica will hold it all. `prompt_tokens` is the estimate.

        The placement counts as in flight until `answered`, `take_back` or `settled`.
        """
        placement_id = self._next_id
        self._next_id += 1
        placement = self._place(replica, fingerprint, prompt_tokens, now, placement_id)
        in_flight = self._in_flight
        in_flight[placement_id] = None
        if len(in_flight) > MAX_IN_FLIGHT:
            del in_flight[next(iter(in_flight))]
        return placement

    def apply_place(
        self, replica: int, fingerprint: Fingerprint, prompt_tokens: float, epoch: int, placement_id: int, now: float
    ) -> Placement | None:
        """A placement by another writer, under its id; again is harmless. None if its epoch is over.

        A newer epoch than ours begins here.
        """
        state = self._replica(replica)
        if epoch < state.epoch:
            return None
        if epoch > state.epoch:
            self.new_epoch(replica, epoch)
        return self._place(replica, fingerprint, prompt_tokens, now, placement_id)

    def take_back(self, placement: Placement) -> None:
        """Undo what the placement alone created and no later placement has touched; nothing else."""
        self.apply_take_back(
            placement.replica, placement.fingerprint, placement.held_blocks, placement.epoch, placement.id
        )

    def apply_take_back(
        self, replica: int, fingerprint: Fingerprint, from_block: int, epoch: int, placement_id: int
    ) -> None:
        """The same by its parts, for a placement by another writer; again is harmless."""
        self._in_flight.pop(placement_id, None)
        state = self._replica(replica)
        if epoch != state.epoch:
            return
        shelf = state.shelf
        for step in reversed(self._tree.walk(fingerprint.hashes)):
            node = step.node
            holding = node.held.get(shelf)
            if holding is None:
                continue
            start = step.depth - step.blocks
            if step.depth <= from_block or holding.touched_by != placement_id or step.blocks < len(node.hashes):
                return
            if any(shelf in child.held for child in (node.children or {}).values()):
                return
            if start >= from_block:
                self._tree.release(shelf, node)
            else:
                self._tree.trim(shelf, node, from_block - start)

    def settled(self, placement: Placement) -> None:
        """The request ended without an answer to learn from, and its placement stays."""
        self._in_flight.pop(placement.id, None)

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
        """Learn from an answer's usage. None for cached tokens means that the upstream did not say.

        With `decide` the epoch or budget that follows is applied here; without, it is only returned.
        """
        self._in_flight.pop(placement.id, None)
        predicted = min(placement.predicted_tokens, prompt_tokens)
        error = None if cached_tokens is None else cached_tokens - predicted
        state = self._replica(placement.replica)
        if placement.epoch != state.epoch:
            return Feedback(predicted, error, FeedbackKind.STALE)
        steps = self._tree.walk(placement.fingerprint.hashes)
        resident = state.shelf.tokens
        learnt = self._judge(state, placement, error, cached_tokens, steps)
        self._confirm(state.shelf, placement.fingerprint, steps, prompt_tokens, output_tokens)
        epoch = state.epoch + 1 if learnt is _RESTARTED else None
        budget = self._new_budget(state, learnt, resident)
        if decide and epoch is not None:
            self.new_epoch(placement.replica, epoch)
            self._place(placement.replica, placement.fingerprint, prompt_tokens, now, placement.id)
        if decide and budget is not None:
            self.set_budget(placement.replica, budget)
        return Feedback(predicted, error, learnt, epoch, budget)

    def apply_answer(
        self, replica: int, fingerprint: Fingerprint, prompt_tokens: int, output_tokens: int, epoch: int
    ) -> None:
        """What another writer's answer says about the tokens of a chain, and that the replica has computed it."""
        state = self._replica(replica)
        if epoch == state.epoch:
            steps = self._tree.walk(fingerprint.hashes)
            self._confirm(state.shelf, fingerprint, steps, prompt_tokens, output_tokens)

    # -- what the lease-holder decides

    def new_epoch(self, replica: int, epoch: int) -> None:
        """The replica began anew and holds nothing; takes no time. An epoch not above the present one is ignored."""
        state = self._replica(replica)
        if epoch <= state.epoch:
            return
        self._bury(state)
        state.epoch = epoch
        state.suspect = None

    def set_budget(self, replica: int, tokens: int) -> None:
        """How many tokens its engine can hold; what is over goes with the next placements and `tend`."""
        state = self._replica(replica)
        if tokens < state.budget_tokens:
            state.placed_tokens = 0  # growing is no turnover: each right answer would put off the next shrink
        state.budget_tokens = tokens

    def set_ttl(self, replica: int, seconds: float | None) -> None:
        """Let its placements end by time, as a provider's do: then no answer changes its budget or epoch."""
        self._replica(replica).ttl_seconds = seconds

    def remove(self, replica: int) -> None:
        """Forget a replica."""
        state = self._replicas.pop(replica, None)
        if state is not None:
            self._bury(state)

    # -- upkeep

    def tend(self, now: float) -> bool:
        """One bounded share of upkeep: old epochs, placements past their time, budgets. True if some is left."""
        steps = self._clear_dead(UPKEEP_STEPS)
        for state in self._replicas.values():
            if steps <= 0:
                return True
            steps = self._expire(state, now, steps)
            steps = self._evict(state, steps)
        return steps <= 0

    # -- seen from outside

    def replicas(self) -> dict[int, ReplicaStats]:
        """Each replica's part."""
        return {
            replica: ReplicaStats(
                state.shelf.blocks,
                state.shelf.tokens,
                state.budget_tokens,
                state.epoch,
                state.evicted_blocks + state.shelf.evicted_blocks,
            )
            for replica, state in self._replicas.items()
        }

    def epoch(self, replica: int) -> int:
        """The replica's present epoch."""
        return self._replica(replica).epoch

    def stats(self) -> IndexStats:
        """Totals. Memory by the measured size of a node with its arrays, of a holding, and 16 bytes a boundary."""
        tree = self._tree
        size_bytes = tree.blocks * 17 + tree.nodes * 720 + tree.holdings * 130
        return IndexStats(tree.blocks, tree.nodes, tree.holdings, size_bytes)

    # -- snapshots

    def snapshot(self, rows_per_chunk: int = 500) -> Iterator[Sequence[ReplicaRow | RunRow]]:
        """All that `load` needs, in chunks of bounded work, between which the index may change.

        What was there at the first chunk and still is at the last is in it, prefix-closed; a change in between may
        or may not be, so the reader applies what came after the first chunk again.
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
        """Become the index that was written; yields now and then, and has become it when it ends.

        `replica_of` translates replica numbers; those that it leaves out are dropped. Until the end all verbs go on
        with what is there, which is then let go. A replica that has begun a newer epoch here by then holds nothing,
        and one with a time to live keeps its own.
        """
        tree = Tree()
        loaded: dict[int, _Replica] = {}

        def number_of(written_as: int) -> int | None:
            return written_as if replica_of is None else replica_of.get(written_as)

        def shelf_of(written_as: int) -> ReplicaEntries | None:
            state = loaded.get(number) if (number := number_of(written_as)) is not None else None
            return state.shelf if state else None

        reader = Reader(tree, shelf_of)
        for count, row in enumerate(rows):
            if isinstance(row, RunRow):
                reader.add(row)
            elif (number := number_of(row.replica)) is not None:
                loaded[number] = _Replica(
                    new_shelf(number), row.epoch, row.budget_tokens, row.ttl_seconds, row.placed_tokens
                )
            if count % LOADED_ROWS == 0:
                yield
        yield from reader.finish(LOADED_ROWS)
        self._become(tree, loaded)

    # -- inside

    def _replica(self, replica: int) -> _Replica:
        state = self._replicas.get(replica)
        if state is None:
            state = self._replicas[replica] = _Replica(new_shelf(replica))
        return state

    def _place(
        self, replica: int, fingerprint: Fingerprint, prompt_tokens: float, now: float, placement_id: int
    ) -> Placement:
        tree, state = self._tree, self._replica(replica)
        shelf, stamp = state.shelf, tree.stamp(now)
        steps = tree.walk(fingerprint.hashes)
        tree.split_end(steps)
        last: Step | None = None
        for step in steps:
            if shelf not in step.node.held:
                break
            last = step
        placement = self._placement(state, placement_id, fingerprint, last, stamp)
        held_before = shelf.tokens
        path = [step.node for step in steps]
        depth = steps[-1].depth if steps else 0
        if depth < len(fingerprint.hashes):
            tokens = estimate(fingerprint, steps[-1] if steps else None, prompt_tokens)
            node = tree.grow(path[-1] if path else tree.root, shelf, fingerprint, depth, tokens)
            if not path or node is not path[-1]:
                path.append(node)
        tree.touch(shelf, path, stamp, placement_id)
        state.placed_tokens += shelf.tokens - held_before
        self._make_room(state)
        return placement

    def _placement(
        self, state: _Replica, placement_id: int, fingerprint: Fingerprint, last: Step | None, stamp: float
    ) -> Placement:
        replica, epoch = state.shelf.replica, state.epoch
        if last is None:
            return Placement(placement_id, replica, epoch, fingerprint, 0, 0, False, False, 0, 0, stamp)
        node = last.node
        holding = node.held[state.shelf]
        tokens = node.tokens
        return Placement(
            placement_id,
            replica,
            epoch,
            fingerprint,
            last.depth,
            last.tokens,
            holding.confirmed == last.blocks and holding.touched_by not in self._in_flight,
            bool(node.pins) and node.pins[-1] == last.blocks,
            tokens[-1] - (tokens[-2] if len(tokens) > 1 else 0),
            holding.output_tokens,
            stamp,
        )

    def _judge(
        self, state: _Replica, placement: Placement, error: int | None, cached: int | None, steps: list[Step]
    ) -> FeedbackKind:
        """Compare and drop or recount what was wrong; the caller turns the result into an epoch or a budget."""
        if error is None or state.ttl_seconds is not None:
            return _NOTHING
        if cached:
            state.suspect = None
        tolerance = max(MIN_TOLERANCE_TOKENS, placement.tolerance_tokens)
        if error > tolerance + placement.allowance_tokens:
            return _MORE
        if not placement.confident:
            return _NOTHING
        if error >= -tolerance:
            if error and cached and not placement.exact:
                recount(steps, placement.held_blocks, error)
            return _RIGHT
        if not cached:
            return self._suspect(state, placement)
        if not placement.exact and -error <= RECOUNT_SHARE * placement.predicted_tokens:
            recount(steps, placement.held_blocks, error)
            return FeedbackKind.RECOUNTED
        self._drop_below(state.shelf, placement, cached, steps)
        return _LESS

    def _suspect(self, state: _Replica, placement: Placement) -> FeedbackKind:
        first = state.suspect
        if first is None or _same_chain(first, placement):
            state.suspect = placement
            return FeedbackKind.SUSPECT
        return _RESTARTED

    def _drop_below(self, shelf: ReplicaEntries, placement: Placement, cached: int, steps: list[Step]) -> None:
        """Drop what hangs on the part that the engine had lost, but for this chain, which it has just computed anew,
        and for what was routed after it."""
        on_path = {id(step.node) for step in steps}
        there = cached + max(MIN_TOLERANCE_TOKENS, placement.tolerance_tokens, cached // COUNTING_PART)
        lost = [step.node for step in steps if step.tokens > there and step.depth <= placement.held_blocks]
        budget = UPKEEP_STEPS
        for node in lost:
            for child in list(islice((node.children or {}).values(), budget)):
                budget -= 1
                if id(child) not in on_path:
                    budget -= self._drop_subtree(shelf, child, placement.stamp, budget)
            if budget <= 0:
                return

    def _drop_subtree(self, shelf: ReplicaEntries, top: Node, before: float, limit: int) -> int:
        """Let go of a subtree, leaves first, where nothing newer than `before` stands; returns nodes visited."""
        order: list[Node] = []
        stack = [top]
        while stack and len(order) < limit:
            node = stack.pop()
            holding = node.held.get(shelf)
            if holding is not None and holding.stamp < before:
                order.append(node)
                stack.extend(islice((node.children or {}).values(), limit))
        if stack or len(order) >= limit:
            return len(order)
        for node in reversed(order):
            self._tree.release(shelf, node)
        return len(order)

    def _confirm(
        self,
        shelf: ReplicaEntries,
        fingerprint: Fingerprint,
        steps: list[Step],
        prompt_tokens: int,
        output_tokens: int,
    ) -> None:
        for step in steps:
            holding = step.node.held.get(shelf)
            if holding is None:
                break
            holding.confirmed = max(holding.confirmed, step.blocks)
        if not steps or steps[-1].depth != len(fingerprint.hashes):
            return
        last = steps[-1]
        learn_tokens(steps, prompt_tokens)
        holding = last.node.held.get(shelf)
        if holding is not None and last.blocks == len(last.node.hashes):
            holding.output_tokens = output_tokens

    def _new_budget(self, state: _Replica, learnt: FeedbackKind, resident: int) -> int | None:
        """The budget that follows from what was learnt while `resident` tokens were here, in tokens, or None."""
        budget = state.budget_tokens
        full = resident >= FULL * budget
        if learnt is _LESS and state.placed_tokens >= min(resident, budget):
            return max(1, int(SHRINK * min(resident, budget)))
        if learnt is _MORE and full:
            return min(UNLIMITED_TOKENS, int(GROW * budget) + 1)
        if learnt is _RIGHT and full:
            return min(UNLIMITED_TOKENS, int(GROW_FULL_AND_RIGHT * budget) + 1)
        return None

    def _bury(self, state: _Replica) -> None:
        """Give the replica an empty shelf; the old one is cleared little by little."""
        old = state.shelf
        state.evicted_blocks += old.evicted_blocks
        state.shelf = new_shelf(old.replica)
        state.placed_tokens = 0
        old.replica = NOBODY
        self._dead.append((self._tree, old))

    def _make_room(self, state: _Replica) -> None:
        steps = UPKEEP_STEPS
        if state.shelf.tokens > state.budget_tokens:
            steps = self._evict(state, steps)
        if self._dead:
            steps = self._clear_dead(steps)
        if self._tree.blocks > self._max_blocks:
            largest = max(self._replicas.values(), key=lambda each: each.shelf.blocks).shelf
            while self._tree.blocks > self._max_blocks and steps > 0 and largest.blocks:
                self._tree.release(largest, _oldest(largest), evicted=True)
                steps -= 1

    def _evict(self, state: _Replica, steps: int) -> int:
        """Drop the oldest blocks until the budget holds; returns the steps left."""
        tree, shelf = self._tree, state.shelf
        while steps > 0 and shelf.blocks:
            over = shelf.tokens - state.budget_tokens
            if over <= 0:
                break
            node = _oldest(shelf)
            keep = bisect_right(node.tokens, node.tokens[-1] - over)
            if 0 < keep < len(node.hashes):
                tree.trim(shelf, node, keep, evicted=True)
            else:
                tree.release(shelf, node, evicted=True)
            steps -= 1
        return steps

    def _expire(self, state: _Replica, now: float, steps: int) -> int:
        if state.ttl_seconds is None:
            return steps
        shelf = state.shelf
        while steps > 0 and shelf.ring.newer.stamp <= now - state.ttl_seconds:  # type: ignore[union-attr]
            self._tree.release(shelf, _oldest(shelf), evicted=True)
            steps -= 1
        return steps

    def _clear_dead(self, steps: int) -> int:
        while self._dead and steps > 0:
            tree, shelf = self._dead[0]
            if shelf.blocks:
                tree.release(shelf, _oldest(shelf))
                steps -= 1
            else:
                shelf.ring.older = shelf.ring.newer = None  # it is its own neighbour: cut, so that it is freed
                self._dead.popleft()
        return steps

    def _become(self, tree: Tree, loaded: dict[int, _Replica]) -> None:
        """Put what was read back in the place of what is there."""
        for state in self._replicas.values():
            self._bury(state)
        self._tree = tree
        for replica, read in loaded.items():
            state = self._replica(replica)
            if read.epoch < state.epoch:
                self._bury(read)
                continue
            state.shelf, state.epoch, state.suspect = read.shelf, read.epoch, None
            state.budget_tokens, state.placed_tokens = read.budget_tokens, read.placed_tokens
            if state.ttl_seconds is None:
                state.ttl_seconds = read.ttl_seconds


def _oldest(shelf: ReplicaEntries) -> Node:
    node = shelf.ring.newer.node  # type: ignore[union-attr]
    assert node is not None  # noqa: S101 - callers have seen that the shelf is not empty
    return node


def _same_chain(one: Placement, other: Placement) -> bool:
    """True if what the one found held is a prefix of what the other did, or the other way round."""
    depth = min(one.held_blocks, other.held_blocks) - 1
    return one.fingerprint.hashes[depth] == other.fingerprint.hashes[depth]

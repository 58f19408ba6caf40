"""Drop entries from the index: over a budget, past a time to live, or of an epoch that has ended.

Every call is bounded by a number of steps, so that no request waits for a clean-up; the next call continues. Budgets
and epochs are decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from math import ceil
from typing import Final

from cache.index.nodes import NO_PLACEMENT, NOBODY, Node, ReplicaEntries, Residency
from cache.index.replica_state import UNLIMITED_TOKENS, ReplicaState
from cache.index.tree import Tree, new_entries

MAX_BLOCKS: Final = 2_000_000
"""Blocks of all replicas together, whatever the budgets are: it bounds the snapshots in Redis (24 MB) too."""

MAX_BYTES: Final = 256 * 1024 * 1024
"""Memory of all entries, unless configured. It is reached before the blocks are if prompts are short: a node of one
block takes as much as 60 blocks of a long one.
"""

UPKEEP_STEPS: Final = 500
"""Nodes that one call may drop: one to two milliseconds."""


MAX_RUN_SECONDS: Final = 600.0
"""Time after which a prompt without an answer no longer counts as running: its worker may be gone."""

MIN_PROMPT_TOKENS: Final = 1_024.0
"""Least length that is assumed for a prompt when free room is compared: shorter ones make no difference."""


class Eviction:
    """Drops entries, oldest first, except those of running prompts, which engines do not evict either.

    `running` maps the ids of placements without an answer to their times; `max_blocks` and `max_bytes` bound the
    blocks of all replicas together and their memory.
    """

    def __init__(
        self, running: Mapping[int, float], max_blocks: int = MAX_BLOCKS, max_bytes: int = MAX_BYTES
    ) -> None:
        self._running = running
        self._max_blocks = max_blocks
        self._max_bytes = max_bytes
        self._retired: deque[tuple[Tree, ReplicaEntries]] = deque()

    def retire(self, tree: Tree, state: ReplicaState) -> None:
        """Give the replica empty entries in constant time; the old ones are cleared later, in portions."""
        old = state.entries
        state.evicted_blocks += old.evicted_blocks
        state.entries = new_entries(old.replica)
        state.placed_tokens = 0
        old.replica = NOBODY
        self._retired.append((tree, old))

    def make_room(self, tree: Tree, state: ReplicaState, states: Iterable[ReplicaState]) -> None:
        """Bring `state` under its budget after a placement, and all `states` under the process's bounds."""
        steps = UPKEEP_STEPS
        if state.slots is not None:
            steps = _fit_slots(tree, state, state.slots, steps)
        if state.entries.stored_tokens > state.budget_tokens:
            steps = self.evict(tree, state, steps)
        if self._retired:
            steps = self.clear_retired(steps)
        if self._is_full(tree):
            largest = max(states, key=lambda each: each.entries.blocks).entries
            while self._is_full(tree) and steps > 0 and largest.blocks:
                tree.release(largest, _oldest(largest), evicted=True)
                steps -= 1

    def _is_full(self, tree: Tree) -> bool:
        return tree.blocks > self._max_blocks or tree.size_bytes > self._max_bytes

    def evict(self, tree: Tree, state: ReplicaState, steps: int) -> int:
        """Drop the oldest blocks until the budget holds, in at most `steps` steps. Return the steps left.

        A running prompt becomes the newest instead, once in a call: its engine uses it now.
        """
        entries, began = state.entries, tree.last_stamp
        while steps > 0 and entries.blocks:
            over = entries.stored_tokens - state.budget_tokens
            if over <= 0:
                break
            steps -= 1
            node = _oldest(entries)
            residency = node.held[entries]
            if residency.stamp <= began and self._is_running(residency):
                tree.touch(entries, _path_to(node), tree.stamp(0.0), NO_PLACEMENT)
                continue
            keep = bisect_right(node.tokens, node.tokens[-1] - over)
            if 0 < keep < len(node.hashes):
                tree.trim(entries, node, keep, evicted=True)
            else:
                tree.release(entries, node, evicted=True)
        return steps

    def _is_running(self, residency: Residency) -> bool:
        placed_seconds = self._running.get(residency.touched_by)
        return placed_seconds is not None and residency.stamp - placed_seconds < MAX_RUN_SECONDS

    def expire(self, tree: Tree, state: ReplicaState, now: float, steps: int) -> int:
        """Drop entries past the replica's time to live, in at most `steps` steps. Return the steps left."""
        if state.ttl_seconds is None:
            return steps
        entries = state.entries
        while steps > 0 and entries.ring.newer.stamp <= now - state.ttl_seconds:  # type: ignore[union-attr]
            tree.release(entries, _oldest(entries), evicted=True)
            steps -= 1
        return steps

    def clear_retired(self, steps: int) -> int:
        """Clear entries of past epochs, in at most `steps` steps. Return the steps left."""
        while self._retired and steps > 0:
            tree, entries = self._retired[0]
            if entries.blocks:
                tree.release(entries, _oldest(entries))
                steps -= 1
            else:
                entries.ring.older = entries.ring.newer = None  # it is its own neighbour: break the cycle, to free it
                self._retired.popleft()
        return steps


def dropped_tokens(state: ReplicaState, matched_tokens: float, uncached_tokens: float) -> float:
    """Predict the tokens that a replica must evict for a prompt of which it holds `matched_tokens`."""
    entries = state.entries
    if state.slots is None:
        over = entries.stored_tokens + uncached_tokens - state.budget_tokens
        return min(max(over, 0.0), uncached_tokens)
    if matched_tokens > uncached_tokens or state.taken_slots < state.slots:
        return 0.0  # it continues in its own slot, or a slot is free
    return entries.tokens / state.taken_slots if state.taken_slots else 0.0


def free_prompts(state: ReplicaState, prompt_tokens: float) -> int | None:
    """Return how many prompts of a length fit into free room; None if the capacity is not known."""
    if state.slots is not None:
        return state.slots - state.taken_slots
    if state.budget_tokens >= UNLIMITED_TOKENS:
        return None
    return int(max(state.budget_tokens - state.entries.stored_tokens, 0) / max(prompt_tokens, MIN_PROMPT_TOKENS))


def held_prompts(state: ReplicaState, prompt_tokens: float) -> int:
    """Return how many prompts of a length have as many tokens as the replica holds, rounded up."""
    return ceil(state.entries.tokens / max(prompt_tokens, MIN_PROMPT_TOKENS))


def _fit_slots(tree: Tree, state: ReplicaState, slots: int, steps: int) -> int:
    """Keep the most recently used prompts, one per slot: each leaf of the replica's entries is one prompt."""
    entries = state.entries
    nodes = _newest_first(entries)
    # counted from below, since a node may have many children that other replicas hold
    held_children: dict[Node, int] = {}
    for node in nodes:
        if node.parent is not None:
            held_children[node.parent] = held_children.get(node.parent, 0) + 1
    leaves = [node for node in nodes if node not in held_children]
    state.taken_slots = min(len(leaves), slots)
    for leaf in reversed(leaves[slots:]):
        above: Node | None = leaf
        while above is not None and above.parent is not None and steps > 0 and not held_children.get(above, 0):
            node, above = above, above.parent
            tree.release(entries, node, evicted=True)
            held_children[above] -= 1
            steps -= 1
    return steps


def _newest_first(entries: ReplicaEntries) -> list[Node]:
    nodes: list[Node] = []
    ring = entries.ring
    residency = ring.older
    while residency is not ring:
        node = residency.node  # type: ignore[union-attr]
        assert node is not None  # noqa: S101 - only the ring has none
        nodes.append(node)
        residency = residency.older  # type: ignore[union-attr]
    return nodes


def _path_to(node: Node) -> list[Node]:
    path = [node]
    while (above := path[-1].parent) is not None and above.parent is not None:
        path.append(above)
    path.reverse()
    return path


def _oldest(entries: ReplicaEntries) -> Node:
    node = entries.ring.newer.node  # type: ignore[union-attr]
    assert node is not None  # noqa: S101 - callers have checked that there are entries
    return node

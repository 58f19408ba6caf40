"""What an answer's usage says about the index: compare it with the prediction, and correct what was wrong.

Pure functions on the tree and on one replica's state. They may drop or recount entries; a new epoch or budget they
only propose, and the index applies it.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

from cache.index.fingerprint import Fingerprint
from cache.index.nodes import Node, ReplicaEntries, Step
from cache.index.placement import FeedbackKind, Placement
from cache.index.replica_state import UNLIMITED_TOKENS, ReplicaState
from cache.index.token_counts import learn_tokens, recount
from cache.index.tree import Tree

MIN_TOLERANCE_TOKENS: Final = 128
"""Engines and providers report in steps of 16 to 128 tokens; a smaller difference means nothing."""

SHRINK: Final = 0.95
GROW: Final = 1.025
GROW_FULL_AND_RIGHT: Final = 1.00025
"""About thirty answers a turnover are right, so this undoes a sixth of a shrink: on traces the budget then stays
within a tenth of the truth, where 1.002 lets it drift to a multiple."""

SHRINK_AFTER: Final = 1.0 / 12.0
"""Share of the cache that must be placed anew between two shrinks, since several shortfalls at once often have
one cause. With a whole turnover, which takes minutes if sessions need more cache than there is, the budget stays a
third above the truth, and a fifth of the turns are lost to prefixes that are gone."""

FULL: Final = 0.95
"""Share of the budget from which an index counts as full; only then can the budget be what was wrong."""

COUNTING_PART: Final = 16
"""A node does not count as lost for this part of what is cached: engines round down to whole blocks, counts are
interpolated, and what hangs on a common system prompt must not go because that was counted a few tokens too long."""

RECOUNT_SHARE: Final = 0.3
"""Up to this share a shortfall on an interpolated count is taken for a wrong count and not for an eviction."""

MAX_DROPPED_NODES: Final = 500
"""Nodes that one answer may drop: one to two milliseconds."""

# constants: the member of an enum is looked up in Python
_NOTHING: Final = FeedbackKind.NOTHING
_RIGHT: Final = FeedbackKind.RIGHT
_LESS: Final = FeedbackKind.LESS
_MORE: Final = FeedbackKind.MORE


def judge(
    tree: Tree, state: ReplicaState, placement: Placement, cached_tokens: int | None, steps: list[Step], error: int
) -> FeedbackKind:
    """Compare an answer with its placement, and drop or recount what was wrong.

    `steps` is the placement's path in the tree, `error` the reported less the predicted tokens (0 if `cached_tokens`
    is None, which means that the upstream did not report them).
    """
    if cached_tokens is None or state.ttl_seconds is not None:
        return _NOTHING
    if cached_tokens:
        state.suspect = None
    tolerance = max(MIN_TOLERANCE_TOKENS, placement.tolerance_tokens)
    if error > tolerance + placement.allowance_tokens:
        return _MORE
    if not placement.confident:
        return _NOTHING
    if error >= -tolerance:
        if error and cached_tokens and not placement.exact:
            recount(steps, placement.held_blocks, error)
        return _RIGHT
    if not cached_tokens:
        return _suspect(state, placement)
    if not placement.exact and -error <= RECOUNT_SHARE * placement.predicted_tokens:
        recount(steps, placement.held_blocks, error)
        return FeedbackKind.RECOUNTED
    _drop_below(tree, state.entries, placement, cached_tokens, steps)
    return _LESS


def confirm(
    entries: ReplicaEntries, fingerprint: Fingerprint, steps: list[Step], prompt_tokens: int, output_tokens: int
) -> None:
    """Note that the replica has computed the chain, which is `prompt_tokens` long, and then generated its output."""
    for step in steps:
        residency = step.node.held.get(entries)
        if residency is None:
            break
        residency.confirmed = max(residency.confirmed, step.blocks)
    if not steps or steps[-1].depth != len(fingerprint.hashes):
        return
    last = steps[-1]
    learn_tokens(steps, prompt_tokens)
    residency = last.node.held.get(entries)
    if residency is not None and last.blocks == len(last.node.hashes):
        residency.output_tokens = output_tokens


def new_budget(state: ReplicaState, learnt: FeedbackKind, resident_tokens: int) -> int | None:
    """The budget in tokens that follows from an answer, or None; `resident_tokens` were held before it."""
    budget = state.budget_tokens
    full = resident_tokens >= FULL * budget
    if learnt is _LESS and state.placed_tokens >= SHRINK_AFTER * min(resident_tokens, budget):
        return max(1, int(SHRINK * min(resident_tokens, budget)))
    if learnt is _MORE and full:
        return min(UNLIMITED_TOKENS, int(GROW * budget) + 1)
    if learnt is _RIGHT and full:
        return min(UNLIMITED_TOKENS, int(GROW_FULL_AND_RIGHT * budget) + 1)
    return None


def _suspect(state: ReplicaState, placement: Placement) -> FeedbackKind:
    first = state.suspect
    if first is None or _same_chain(first, placement):
        state.suspect = placement
        return FeedbackKind.SUSPECT
    return FeedbackKind.RESTARTED


def _same_chain(one: Placement, other: Placement) -> bool:
    """True if what one placement found held is a prefix of what the other did."""
    depth = min(one.held_blocks, other.held_blocks) - 1
    return one.fingerprint.hashes[depth] == other.fingerprint.hashes[depth]


def _drop_below(tree: Tree, entries: ReplicaEntries, placement: Placement, cached: int, steps: list[Step]) -> None:
    """Drop what hangs on the part that the engine had lost, except this chain, which it has just computed anew, and
    what was routed after it."""
    on_path = {id(step.node) for step in steps}
    there = cached + max(MIN_TOLERANCE_TOKENS, placement.tolerance_tokens, cached // COUNTING_PART)
    lost = [step.node for step in steps if step.tokens > there and step.depth <= placement.held_blocks]
    budget = MAX_DROPPED_NODES
    for node in lost:
        for child in list(islice((node.children or {}).values(), budget)):
            budget -= 1
            if id(child) not in on_path:
                budget -= _drop_subtree(tree, entries, child, placement.stamp, budget)
        if budget <= 0:
            return


def _drop_subtree(tree: Tree, entries: ReplicaEntries, top: Node, before: float, limit: int) -> int:
    """Release a subtree, leaves first, if nothing in it is newer than `before`. Return the nodes visited."""
    order: list[Node] = []
    stack = [top]
    while stack and len(order) < limit:
        node = stack.pop()
        residency = node.held.get(entries)
        if residency is not None and residency.stamp < before:
            order.append(node)
            stack.extend(islice((node.children or {}).values(), limit))
    if stack or len(order) >= limit:
        return len(order)
    for node in reversed(order):
        tree.release(entries, node)
    return len(order)

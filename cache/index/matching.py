"""Parts of a lookup: the tokens that a replica reuses of those it holds, at forks and by its block size. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cache.index.nodes import Step
from cache.index.placement import Held
from cache.index.replica_state import ReplicaState
from cache.index.tree import ends_at, found_at_fork


def add_fork(found: dict[int, Held], step: Step, part: Held) -> None:
    """Add the holders of a node at whose end other prompts are known to find less than all of it."""
    fork = Held(part.blocks, part.size_bytes, found_at_fork(step))
    for entries in step.node.held:
        if entries.replica not in found:
            found[entries.replica] = part if ends_at(step, entries) else fork


def reused_tokens(state: ReplicaState, step: Step, *, whole: bool) -> int:
    """Return the tokens that the replica reuses of those it holds up to `step`; `whole` if a prompt ended there."""
    found = step.tokens if whole else found_at_fork(step)
    if found < step.tokens:
        return found  # as responses have reported it, in whole blocks
    return state.granularity.usable(found)


def round_to_blocks(
    found: dict[int, Held], steps: list[Step], replicas: Iterable[int], states: Mapping[int, ReplicaState]
) -> None:
    """Reduce the held part of a prompt, whose path is `steps`, to the part that each of `replicas` will reuse."""
    for replica in replicas:
        have = found.get(replica)
        if have is None:
            continue
        for step in steps:
            if step.depth == have.blocks and step.tokens == have.tokens:  # fewer are what answers have reported
                granularity = states[replica].granularity
                reused = granularity.usable(have.tokens)
                if reused < have.tokens and not granularity.is_trial(have.tokens):
                    found[replica] = Held(have.blocks, have.size_bytes, reused, have.tokens - reused)

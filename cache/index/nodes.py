"""Data types of the prefix tree: nodes, and which replica's entries contain them.

Nodes and residencies are exempt from Python's garbage collector (`gc=False`): with a million blocks, each full pass
would be a pause. They form cycles only through `Node.children`, which are cut when a node is dropped.
"""

from __future__ import annotations

from array import array

import msgspec

NOBODY = -1
"""The replica number of entries whose epoch is over."""


class Node(msgspec.Struct, gc=False, eq=False):
    """A run of consecutive boundaries below `parent`.

    `ends` are bytes from the start of the prompt. `tokens` count from the start of the run, so that a correction
    above the node changes nothing in it. The first `known` boundaries lie on a chain whose prompt tokens were
    reported; at `pins` (numbers of boundaries) the count was reported and not interpolated by bytes.
    """

    parent: Node | None
    hashes: array[int]
    ends: array[int]
    tokens: array[int]
    held: dict[ReplicaEntries, Residency]
    children: dict[int, Node] | None = None
    known: int = 0
    pins: tuple[int, ...] = ()
    emitted: int = 0  # number of the last snapshot that wrote it
    fork_misses: int = 0  # responses in a row that found far less than predicted at its end
    fork_tokens: int = -1  # tokens that such prompts find, from the start of the prompt; -1: all that precede


class Residency(msgspec.Struct, gc=False, eq=False):
    """Records that a replica holds a node. `older` and `newer` link the replica's order of recency.

    `touched_by` is the last placement over it, `confirmed` the number of the run's boundaries that a response has
    proved, `output_tokens` the tokens that the engine generated after the end of the run and may have cached. `ends`
    are the numbers of boundaries at which prompts ended that this replica has answered.
    """

    node: Node | None
    older: Residency | None
    newer: Residency | None
    stamp: float
    touched_by: int
    confirmed: int = 0
    output_tokens: int = 0
    ends: tuple[int, ...] = ()


class ReplicaEntries(msgspec.Struct, gc=False, eq=False):
    """Entries of one replica in one epoch. `ring.newer` is its oldest residency, `ring.older` its newest."""

    replica: int  # NOBODY once the epoch is over, until the entries are cleared
    ring: Residency
    blocks: int = 0
    tokens: int = 0
    evicted_blocks: int = 0


class Step(msgspec.Struct, frozen=True, gc=False):
    """A node on a path: `blocks` of its run match; `depth` and `tokens` count from the start of the prompt."""

    node: Node
    blocks: int
    depth: int
    tokens: int

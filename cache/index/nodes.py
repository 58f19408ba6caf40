"""What the tree of prefixes is made of. Words only, no behaviour.

Nodes and holdings are kept out of Python's garbage collector (`gc=False`): a million blocks would make each of its
full passes a pause. They form cycles only through `Node.children`, which are cut when a node is dropped.
"""

from __future__ import annotations

from array import array

import msgspec

NOBODY = -1
"""The replica of a shelf whose epoch is over."""


class Node(msgspec.Struct, gc=False, eq=False):
    """A run of boundaries below `parent`.

    `ends` are bytes from the prompt's begin; `tokens` counts from the run's own begin, so that a correction above
    moves nothing below. The first `known` boundaries lie on a chain whose prompt tokens were reported; at `pins`
    (numbers of boundaries) the count is what the report said and not interpolated by bytes.
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


class Residency(msgspec.Struct, gc=False, eq=False):
    """That a shelf holds a node. `older` and `newer` link the shelf's order of recency.

    `touched_by` is the last placement over it, `confirmed` how many of the run's boundaries an answer has proved,
    `output_tokens` what the engine generated, and may have cached, after the run's end.
    """

    node: Node | None
    older: Residency | None
    newer: Residency | None
    stamp: float
    touched_by: int
    confirmed: int = 0
    output_tokens: int = 0


class ReplicaEntries(msgspec.Struct, gc=False, eq=False):
    """What one replica holds in one epoch. `ring.newer` is its oldest holding, `ring.older` its newest."""

    replica: int  # NOBODY once the epoch is over, until the shelf is cleared
    ring: Residency
    blocks: int = 0
    tokens: int = 0
    evicted_blocks: int = 0


class Step(msgspec.Struct, frozen=True, gc=False):
    """A node on a path: `blocks` of its run match; the others count from the prompt's begin, at the last of them."""

    node: Node
    blocks: int
    depth: int
    tokens: int

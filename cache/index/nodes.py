"""Data types of the prefix tree: nodes, and which replica's entries contain them.

They are plain classes and not structs, so that compiled code reads their attributes without a look-up, which makes
the index a quarter faster. Compiled and declared acyclic, they are exempt from Python's garbage collector: with a
million blocks, each full pass would be a pause. They form cycles only through `Node.children` and the order of
recency, which are cut when a node is dropped.
"""

from __future__ import annotations

from array import array

from mypy_extensions import mypyc_attr

NOBODY = -1
"""The replica number of entries whose epoch is over."""

NO_PLACEMENT = 0
"""A number that no placement has."""


@mypyc_attr(acyclic=True)
class Node:
    """A run of consecutive boundaries below `parent`.

    `ends` are bytes from the start of the prompt. `tokens` count from the start of the run, so that a correction
    above the node changes nothing in it. The first `known` boundaries lie on a chain whose prompt tokens were
    reported; at `pins` (numbers of boundaries) the count was reported and not interpolated by bytes.
    """

    __slots__ = (
        "children",
        "emitted",
        "ends",
        "fork_misses",
        "fork_tokens",
        "hashes",
        "held",
        "known",
        "parent",
        "pins",
        "tokens",
    )

    def __init__(
        self,
        parent: Node | None,
        hashes: array[int],
        ends: array[int],
        tokens: array[int],
        held: dict[ReplicaEntries, Residency],
        children: dict[int, Node] | None = None,
        known: int = 0,
        pins: tuple[int, ...] = (),
    ) -> None:
        self.parent = parent
        self.hashes = hashes
        self.ends = ends
        self.tokens = tokens
        self.held = held
        self.children = children
        self.known = known
        self.pins = pins
        self.emitted = 0  # number of the last snapshot that wrote it
        self.fork_misses = 0  # responses in a row that found far less than predicted at its end
        self.fork_tokens = -1  # tokens that such prompts find, from the start of the prompt; -1: all that precede


@mypyc_attr(acyclic=True)
class Residency:
    """Records that a replica holds a node. `older` and `newer` link the replica's order of recency.

    `touched_by` is the last placement over it, `confirmed` the number of the run's boundaries that a response has
    proved, `output_tokens` the tokens that the engine generated after the end of the run and may have cached. `ends`
    are the numbers of boundaries at which prompts ended that this replica has answered. `unstored_tokens` are the
    tokens of the run in excess of the whole blocks that end in it; they are negative if its first block begins above.
    """

    __slots__ = (
        "confirmed",
        "ends",
        "newer",
        "node",
        "older",
        "output_tokens",
        "stamp",
        "touched_by",
        "unstored_tokens",
    )

    def __init__(
        self,
        node: Node | None,
        older: Residency | None,
        newer: Residency | None,
        stamp: float,
        touched_by: int,
        confirmed: int = 0,
        output_tokens: int = 0,
        ends: tuple[int, ...] = (),
    ) -> None:
        self.node = node
        self.older = older
        self.newer = newer
        self.stamp = stamp
        self.touched_by = touched_by
        self.confirmed = confirmed
        self.output_tokens = output_tokens
        self.ends = ends
        self.unstored_tokens = 0


@mypyc_attr(acyclic=True)
class ReplicaEntries:
    """Entries of one replica in one epoch. `ring.newer` is its oldest residency, `ring.older` its newest.

    `unstored_tokens` is the sum of its residencies' values.
    """

    __slots__ = ("blocks", "evicted_blocks", "replica", "ring", "tokens", "unstored_tokens")

    def __init__(self, replica: int, ring: Residency) -> None:
        self.replica = replica  # NOBODY once the epoch is over, until the entries are cleared
        self.ring = ring
        self.blocks = 0
        self.tokens = 0
        self.unstored_tokens = 0
        self.evicted_blocks = 0

    @property
    def stored_tokens(self) -> int:
        """Tokens of the whole blocks in which the engine keeps these entries: the room that they take there."""
        return self.tokens - self.unstored_tokens


@mypyc_attr(acyclic=True)
class Step:
    """A node on a path: `blocks` of its run match; `depth` and `tokens` count from the start of the prompt."""

    __slots__ = ("blocks", "depth", "node", "tokens")

    def __init__(self, node: Node, blocks: int, depth: int, tokens: int) -> None:
        self.node = node
        self.blocks = blocks
        self.depth = depth
        self.tokens = tokens

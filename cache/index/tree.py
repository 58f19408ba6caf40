"""The radix tree of prefix chains, with the replicas that hold each node. No budgets, epochs or feedback.

A node is a run of consecutive boundaries that each of its holders holds completely; if they differ, it is split.
Hashes are chained, so two chains that agree at a depth agree before it: a mismatch inside a run is found by
bisection, and a replica that holds a node holds all nodes above it (prefix-closed). Each replica's entries are kept
in an order of recency in which a node is always older than those above it, so its oldest node is always a leaf among
those it holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import islice
from math import nextafter
from typing import Final

from cache.index.fingerprint import Fingerprint
from cache.index.nodes import NO_PLACEMENT, NOBODY, Node, ReplicaEntries, Residency, Step

EVICTED_HASHES: Final = 16_384
"""Chain ends remembered after eviction, to distinguish an evicted prefix from a cold one: about 1.5 MB."""

BLOCK_BYTES: Final = 17
NODE_BYTES: Final = 720
RESIDENCY_BYTES: Final = 170
"""Memory of a block, of a node with its arrays and dictionaries, and of a residency, as measured on 64-bit CPython:
compiled code takes a tenth less, and code that is not compiled a tenth more.
"""

MAX_CHILDREN_SEEN: Final = 8
"""Children of a node that are examined: if many prompts fork off, none of them is the continuation."""

_FOREVER = float("inf")


def new_entries(replica: int) -> ReplicaEntries:
    """Return the entries of a replica that holds nothing."""
    ring = Residency(None, None, None, _FOREVER, 0)
    ring.older = ring.newer = ring
    return ReplicaEntries(replica, ring)


def ends_at(step: Step, entries: ReplicaEntries) -> bool:
    """Return True if a prompt that the replica answered ended at the step, or in the partly filled block after it."""
    node = step.node
    residency = node.held.get(entries)
    if residency is not None and residency.ends and step.blocks in residency.ends:
        return True
    if node.children and step.blocks == len(node.hashes):
        for child in islice(node.children.values(), MAX_CHILDREN_SEEN):
            residency = child.held.get(entries)
            if residency is not None and residency.ends and residency.ends[0] == 1:
                return True
    return False


def found_at_fork(step: Step) -> int:
    """Return the tokens that a prompt finds which continues differently after the step."""
    node = step.node
    if node.fork_tokens < 0 or step.blocks < len(node.hashes):
        return step.tokens
    return min(node.fork_tokens, step.tokens)


def reuse_distance(entries: ReplicaEntries, residency: Residency, steps: int) -> int:
    """Return a lower bound of the tokens placed at the replica since it last used a node, including the node's.

    Exact for a node among the `steps` newest or the `steps` oldest; for one between them a lower bound.
    """
    ring = entries.ring
    newer = older = 0
    from_newest, from_oldest = ring.older, ring.newer
    for _ in range(steps):
        if from_newest is residency:
            return newer + _stored_tokens(residency)
        if from_oldest is residency:
            return entries.stored_tokens - older
        newer += _stored_tokens(from_newest)  # type: ignore[arg-type]
        older += _stored_tokens(from_oldest)  # type: ignore[arg-type]
        from_newest, from_oldest = from_newest.older, from_oldest.newer  # type: ignore[union-attr]
    return newer + _stored_tokens(residency)


def _stored_tokens(residency: Residency) -> int:
    return residency.node.tokens[-1] - residency.unstored_tokens  # type: ignore[union-attr]


def count_stored(entries: ReplicaEntries, path: Sequence[Node], block_tokens: int) -> None:
    """Note which part of a path, the head first, an engine keeps, whose blocks have `block_tokens`.

    It keeps whole blocks only. A block belongs to the node in which it ends, and prompts that fork off within a block
    have one each.
    """
    start = 0
    for node in path:
        end = start + node.tokens[-1]
        residency = node.held.get(entries)
        if residency is not None:
            unstored = end - start - (end // block_tokens - start // block_tokens) * block_tokens
            entries.unstored_tokens += unstored - residency.unstored_tokens
            residency.unstored_tokens = unstored
        start = end


class Tree:
    """The nodes. `blocks` counts a block once however many replicas hold it."""

    def __init__(self) -> None:
        self.root = Node(None, array("Q"), array("I"), array("I"), {}, {})
        self.blocks = 0
        self.nodes = 0
        self.residencies = 0
        self._evicted: dict[int, int] = {}  # boundaries to the replica that held them last
        self._last_stamp = 0.0

    @property
    def size_bytes(self) -> int:
        """Estimate of the memory that it takes."""
        return self.blocks * BLOCK_BYTES + self.nodes * NODE_BYTES + self.residencies * RESIDENCY_BYTES

    def walk(self, hashes: Sequence[int]) -> list[Step]:
        """Return the nodes that a chain runs through, the head first; all but the last match completely."""
        steps: list[Step] = []
        children = self.root.children
        total, depth, tokens = len(hashes), 0, 0
        while depth < total and children:
            node = children.get(hashes[depth])
            if node is None:
                break
            run = node.hashes
            size = blocks = len(run)
            if size > total - depth:
                blocks = total - depth
            if run[blocks - 1] != hashes[depth + blocks - 1]:
                blocks = _agreement(run, hashes, depth, blocks)
            depth += blocks
            tokens += node.tokens[blocks - 1]
            steps.append(Step(node, blocks, depth, tokens))
            if blocks < size:
                break
            children = node.children
        return steps

    def last_holder(self, block_hash: int) -> int:
        """Return the replica that held a boundary last and recently evicted it, or NOBODY."""
        return self._evicted.get(block_hash, NOBODY)

    @property
    def last_stamp(self) -> float:
        """The stamp of the latest touch."""
        return self._last_stamp

    def stamp(self, now: float) -> float:
        """Return `now` in seconds, increased by the least step if needed, so that stamps order all touches."""
        self._last_stamp = now if now > self._last_stamp else nextafter(self._last_stamp, _FOREVER)
        return self._last_stamp

    def split(self, node: Node, at: int) -> Node:
        """Cut the run after `at` boundaries (0 < at < its length) and return the new head; `node` is the tail."""
        parent = node.parent
        siblings = parent.children if parent is not None else None
        assert siblings is not None  # noqa: S101 - the root is never split
        base = node.tokens[at - 1]
        head = Node(
            parent,
            node.hashes[:at],
            node.ends[:at],
            node.tokens[:at],
            {},
            {node.hashes[at]: node},
            min(node.known, at),
            tuple(pin for pin in node.pins if pin <= at),
        )
        siblings[node.hashes[0]] = head
        node.parent = head
        node.hashes = node.hashes[at:]
        node.ends = node.ends[at:]
        node.tokens = array("I", [count - base for count in node.tokens[at:]])
        node.known = max(0, node.known - at)
        node.pins = tuple(pin - at for pin in node.pins if pin > at)
        for entries, tail in node.held.items():
            confirmed = min(tail.confirmed, at)
            above = Residency(head, tail, tail.newer, tail.stamp, tail.touched_by, confirmed)
            if tail.ends:
                above.ends = tuple([end for end in tail.ends if end <= at])
                tail.ends = tuple([end - at for end in tail.ends if end > at])
            tail.newer.older = above  # type: ignore[union-attr]
            tail.newer = above
            tail.confirmed -= confirmed
            head.held[entries] = above
        self.nodes += 1
        self.residencies += len(head.held)
        return head

    def split_end(self, steps: list[Step]) -> None:
        """Make the last node of a path end where the match ends, so that every step is a whole node."""
        if steps and steps[-1].blocks < len(steps[-1].node.hashes):
            last = steps[-1]
            steps[-1] = Step(self.split(last.node, last.blocks), last.blocks, last.depth, last.tokens)

    def grow(self, above: Node, entries: ReplicaEntries, chain: Fingerprint, depth: int, tokens: array[int]) -> Node:
        """Add the chain's boundaries from `depth` on below `above`. Return their node, not yet held by `entries`.

        A leaf that only `entries` holds is extended in place and stays held, so that a conversation stays one node.
        """
        added = len(chain.hashes) - depth
        self.blocks += added
        if above.parent is not None and not above.children and len(above.held) == 1 and entries in above.held:
            base = above.tokens[-1]
            above.hashes.extend(chain.hashes[depth:])
            above.ends.extend(chain.ends[depth:])
            above.tokens.extend([base + count for count in tokens])
            above.held[entries].output_tokens = 0
            entries.blocks += added
            entries.tokens += tokens[-1]
            return above
        node = Node(above, chain.hashes[depth:], chain.ends[depth:], tokens, {})
        if above.children is None:
            above.children = {}
        above.children[chain.hashes[depth]] = node
        self.nodes += 1
        return node

    def touch(self, entries: ReplicaEntries, path: Sequence[Node], stamp: float, touched_by: int) -> None:
        """Hold every node of `path` (the head first, from the root on) and make them the newest, the head last.

        `touched_by` is the placement; with `NO_PLACEMENT` the last one over each node stays the last.
        """
        ring = entries.ring
        for node in reversed(path):
            residency = node.held.get(entries)
            if residency is None:
                residency = node.held[entries] = Residency(node, None, None, stamp, touched_by)
                entries.blocks += len(node.hashes)
                entries.tokens += node.tokens[-1]
                self.residencies += 1
            else:
                older, newer = residency.older, residency.newer
                older.newer, newer.older = newer, older  # type: ignore[union-attr]
                residency.stamp = stamp
                if touched_by != NO_PLACEMENT:
                    residency.touched_by = touched_by
            newest = ring.older
            residency.older, residency.newer = newest, ring
            newest.newer = ring.older = residency  # type: ignore[union-attr]

    def restore(self, above: Node, hashes: array[int], ends: array[int], tokens: array[int]) -> Node:
        """Add a node that was loaded, below `above` and not held yet."""
        node = Node(above, hashes, ends, tokens, {})
        if above.children is None:
            above.children = {}
        above.children[node.hashes[0]] = node
        self.nodes += 1
        self.blocks += len(node.hashes)
        return node

    def hold(self, entries: ReplicaEntries, node: Node, residency: Residency) -> None:
        """Let `entries` hold a node that was loaded; `link` gives it a place in the order later."""
        node.held[entries] = residency
        entries.blocks += len(node.hashes)
        entries.tokens += node.tokens[-1]
        self.residencies += 1
        self._last_stamp = max(self._last_stamp, residency.stamp)

    def link(self, entries: ReplicaEntries, residency: Residency) -> None:
        """Make a residency that was loaded the replica's newest."""
        newest = entries.ring.older
        residency.older, residency.newer = newest, entries.ring
        newest.newer = entries.ring.older = residency  # type: ignore[union-attr]

    def release(self, entries: ReplicaEntries, node: Node, *, evicted: bool = False) -> None:
        """Stop holding a whole node, of which `entries` holds no child; a node without holders is removed."""
        residency = node.held.pop(entries)
        residency.older.newer, residency.newer.older = residency.newer, residency.older  # type: ignore[union-attr]
        self.residencies -= 1
        entries.blocks -= len(node.hashes)
        entries.tokens -= node.tokens[-1]
        entries.unstored_tokens -= residency.unstored_tokens
        if evicted:
            entries.evicted_blocks += len(node.hashes)
        if not node.held:
            first = node.hashes[0]
            del node.parent.children[first]  # type: ignore[union-attr]
            node.parent = None
            self.nodes -= 1
            self.blocks -= len(node.hashes)
            if evicted:
                self._remember(first, entries.replica)

    def trim(self, entries: ReplicaEntries, node: Node, keep: int, *, evicted: bool = False) -> None:
        """Stop holding all but the first `keep` boundaries (0 < keep < its length) of one of the replica's leaves."""
        if len(node.held) > 1 or node.children:
            self.split(node, keep)
            self.release(entries, node, evicted=evicted)
            return
        dropped = len(node.hashes) - keep
        if evicted:
            entries.evicted_blocks += dropped
            self._remember(node.hashes[keep], entries.replica)
        entries.blocks -= dropped
        entries.tokens -= node.tokens[-1] - node.tokens[keep - 1]
        self.blocks -= dropped
        for run in (node.hashes, node.ends, node.tokens):
            del run[keep:]
        node.known = min(node.known, keep)
        node.pins = tuple(pin for pin in node.pins if pin <= keep)
        residency = node.held[entries]
        residency.confirmed = min(residency.confirmed, keep)
        residency.ends = tuple([end for end in residency.ends if end <= keep])
        residency.output_tokens = 0
        entries.unstored_tokens -= residency.unstored_tokens
        residency.unstored_tokens = 0

    def _remember(self, block_hash: int, replica: int) -> None:
        evicted = self._evicted
        evicted.pop(block_hash, None)
        evicted[block_hash] = replica
        if len(evicted) > EVICTED_HASHES:
            del evicted[next(iter(evicted))]


def _agreement(run: Sequence[int], hashes: Sequence[int], depth: int, differing: int) -> int:
    """Return how many boundaries of `run` equal the chain's from `depth` on: at least one, fewer than `differing`."""
    low, high = 1, differing - 1
    while low < high:
        middle = (low + high + 1) // 2
        if run[middle - 1] == hashes[depth + middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low

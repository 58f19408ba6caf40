"""An index as rows, from which an equal one is rebuilt: written in chunks between which it may change.

Runs are written from the top of the tree down, each after the one it hangs on.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from heapq import merge

import msgspec

from cache.index.nodes import NOBODY, Node, ReplicaEntries, Residency
from cache.index.tree import Tree

SORTED_PORTION = 1_000
"""Holdings sorted at a time while an index is read back: under a millisecond."""

_Aged = tuple[float, int, int, Residency]


class ReplicaRow(msgspec.Struct, frozen=True, tag="replica", gc=False):
    """A replica in a snapshot; always before the runs."""

    replica: int
    epoch: int
    budget_tokens: int
    ttl_seconds: float | None
    placed_tokens: int


class HolderRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A holder of a run in a snapshot."""

    replica: int
    stamp: float
    touched_by: int
    confirmed: int
    output_tokens: int


class RunRow(msgspec.Struct, frozen=True, tag="run", gc=False):
    """A node in a snapshot, after the one it hangs on, whose last hash is `parent` (None at the top).

    The three runs are little-endian arrays of 8, 4 and 4 bytes a boundary.
    """

    parent: int | None
    hashes: bytes
    ends: bytes
    tokens: bytes
    known: int
    pins: tuple[int, ...]
    holders: tuple[HolderRow, ...]


def written(tree: Tree, number: int, rows_per_chunk: int) -> Iterator[list[RunRow]]:
    """All runs that somebody holds, in chunks; `number` is this snapshot's own, higher than any before."""
    stack = list((tree.root.children or {}).values())
    rows: list[RunRow] = []
    while stack:
        node = stack.pop()
        if not node.held:
            continue
        stack.extend((node.children or {}).values())
        rows.extend(map(_run_row, _unwritten(node, number)))
        if len(rows) >= rows_per_chunk:
            yield rows
            rows = []
    if rows:
        yield rows


class Reader:
    """Builds an empty tree up from rows. `shelf_of` gives a row's replica number its shelf; None leaves it out."""

    def __init__(self, tree: Tree, shelf_of: Callable[[int], ReplicaEntries | None]) -> None:
        self._tree = tree
        self._shelf_of = shelf_of
        self._ends: dict[int, Node] = {}
        self._order: dict[ReplicaEntries, list[list[_Aged]]] = {}
        self._serial = 0  # keeps equal ages apart, so that holdings are never compared

    def add(self, row: RunRow) -> None:
        """Hang a run on its parent. Who does not hold the parent, or is newer than there, came between two chunks."""
        tree = self._tree
        parent = tree.root if row.parent is None else self._ends.get(row.parent)
        if not 0 < len(row.hashes) == 2 * len(row.ends) == 2 * len(row.tokens):
            return  # not what was written; what hangs on it is left out with it
        holders = self._holders(row, parent) if parent is not None else []
        if parent is None or not holders:
            return
        node = tree.adopt(parent, array("Q", row.hashes), array("I", row.ends), array("I", row.tokens))
        node.known, node.pins = row.known, row.pins
        self._ends[node.hashes[-1]] = node
        for shelf, stamp, holder in holders:
            holding = Residency(node, None, None, stamp, holder.touched_by, holder.confirmed, holder.output_tokens)
            tree.hold(shelf, node, holding)
            self._note(shelf, stamp, -node.ends[-1], holding)

    def finish(self, holdings_per_turn: int) -> Iterator[None]:
        """Restore each shelf's order of recency: older placements first, within one the deeper first."""
        link, count = self._tree.link, 0
        for shelf, portions in self._order.items():
            portions[-1].sort()
            for _stamp, _depth, _serial, holding in merge(*portions):
                link(shelf, holding)
                count += 1
                if count % holdings_per_turn == 0:
                    yield

    def _note(self, shelf: ReplicaEntries, stamp: float, depth: int, holding: Residency) -> None:
        """Gather in sorted portions: one sort of all would be a pause."""
        portions = self._order.setdefault(shelf, [[]])
        self._serial += 1
        portions[-1].append((stamp, depth, self._serial, holding))
        if len(portions[-1]) >= SORTED_PORTION:
            portions[-1].sort()
            portions.append([])

    def _holders(self, row: RunRow, parent: Node) -> list[tuple[ReplicaEntries, float, HolderRow]]:
        holders: list[tuple[ReplicaEntries, float, HolderRow]] = []
        for holder in row.holders:
            shelf = self._shelf_of(holder.replica)
            if shelf is None:
                continue
            if row.parent is None:
                holders.append((shelf, holder.stamp, holder))
            elif (above := parent.held.get(shelf)) is not None:
                holders.append((shelf, min(holder.stamp, above.stamp), holder))
        return holders


def _unwritten(node: Node, number: int) -> list[Node]:
    """The node and those above it that this snapshot has not written yet, the highest first; marks them."""
    found: list[Node] = []
    above: Node | None = node
    while above is not None and above.parent is not None and above.emitted != number:
        above.emitted = number
        found.append(above)
        above = above.parent
    return found[::-1]


def _run_row(node: Node) -> RunRow:
    above = node.parent
    return RunRow(
        above.hashes[-1] if above is not None and above.parent is not None else None,
        node.hashes.tobytes(),
        node.ends.tobytes(),
        node.tokens.tobytes(),
        node.known,
        node.pins,
        tuple(
            HolderRow(shelf.replica, each.stamp, each.touched_by, each.confirmed, each.output_tokens)
            for shelf, each in node.held.items()
            if shelf.replica != NOBODY
        ),
    )

"""Write an index as rows and rebuild an equal one from them, in chunks between which the index may change.

Runs are written from the top of the tree down, each after its parent.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from heapq import merge

import msgspec

from cache.index.nodes import NOBODY, Node, ReplicaEntries, Residency
from cache.index.tree import Tree

SORTED_PORTION = 1_000
"""Residencies sorted at a time while an index is loaded: under a millisecond."""

_Aged = tuple[float, int, int, Residency]


class ReplicaRow(msgspec.Struct, frozen=True, tag="replica", gc=False):
    """One replica. All of these come before the runs."""

    replica: int
    epoch: int
    budget_tokens: int
    ttl_seconds: float | None
    placed_tokens: int


class HolderRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One replica's residency of a run."""

    replica: int
    stamp: float
    touched_by: int
    confirmed: int
    output_tokens: int
    ends: tuple[int, ...] = ()


class RunRow(msgspec.Struct, frozen=True, tag="run", gc=False):
    """A node, written after its parent, whose last hash is `parent` (None at the top).

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
    """Yield all runs that a replica holds, in chunks. `number` is this snapshot's, higher than any before."""
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
    """Fills an empty tree from rows. `entries_of` maps a row's replica number to its entries; None leaves it out."""

    def __init__(self, tree: Tree, entries_of: Callable[[int], ReplicaEntries | None]) -> None:
        self._tree = tree
        self._entries_of = entries_of
        self._ends: dict[int, Node] = {}
        self._order: dict[ReplicaEntries, list[list[_Aged]]] = {}
        self._serial = 0  # breaks ties of equal ages, so that residencies are never compared

    def add(self, row: RunRow) -> None:
        """Add a run below its parent.

        Holders that do not hold the parent, or are newer there, were added between two chunks and are left out.
        """
        tree = self._tree
        parent = tree.root if row.parent is None else self._ends.get(row.parent)
        if not 0 < len(row.hashes) == 2 * len(row.ends) == 2 * len(row.tokens):
            return  # damaged: left out, with everything below it
        holders = self._holders(row, parent) if parent is not None else []
        if parent is None or not holders or self._contradicts(row, parent):
            return
        node = tree.restore(parent, array("Q", row.hashes), array("I", row.ends), array("I", row.tokens))
        node.known, node.pins = row.known, row.pins
        self._ends[node.hashes[-1]] = node
        for entries, stamp, holder in holders:
            residency = Residency(node, None, None, stamp, holder.touched_by, holder.confirmed, holder.output_tokens)
            residency.ends = holder.ends
            tree.hold(entries, node, residency)
            self._note(entries, stamp, -node.ends[-1], residency)

    def _contradicts(self, row: RunRow, parent: Node) -> bool:
        """Return whether the tree has another run in the row's place, or the row begins before its parent ends."""
        first, last = _first_and_last(row)
        begins_early = parent.parent is not None and array("I", row.ends[:4])[0] <= parent.ends[-1]
        return begins_early or last in self._ends or first in (parent.children or {})

    def finish(self, residencies_per_turn: int) -> Iterator[None]:
        """Restore each replica's order of recency: older placements first, within one the deeper first."""
        link, count = self._tree.link, 0
        for entries, portions in self._order.items():
            portions[-1].sort()
            for _stamp, _depth, _serial, residency in merge(*portions):
                link(entries, residency)
                count += 1
                if count % residencies_per_turn == 0:
                    yield

    def _note(self, entries: ReplicaEntries, stamp: float, depth: int, residency: Residency) -> None:
        """Add a residency to a sorted portion: sorting everything at once would be a pause."""
        portions = self._order.setdefault(entries, [[]])
        self._serial += 1
        portions[-1].append((stamp, depth, self._serial, residency))
        if len(portions[-1]) >= SORTED_PORTION:
            portions[-1].sort()
            portions.append([])

    def _holders(self, row: RunRow, parent: Node) -> list[tuple[ReplicaEntries, float, HolderRow]]:
        holders: list[tuple[ReplicaEntries, float, HolderRow]] = []
        listed: set[ReplicaEntries] = set()  # damage may list one twice, and a thousand may hold a system prompt
        for holder in row.holders:
            entries = self._entries_of(holder.replica)
            if entries is None or entries in listed:
                continue
            listed.add(entries)
            if row.parent is None:
                holders.append((entries, holder.stamp, holder))
            elif (above := parent.held.get(entries)) is not None:
                holders.append((entries, min(holder.stamp, above.stamp), holder))
        return holders


def _first_and_last(row: RunRow) -> tuple[int, int]:
    first, last = array("Q", row.hashes[:8] + row.hashes[-8:])
    return first, last


def _unwritten(node: Node, number: int) -> list[Node]:
    """Return the node and those above it that this snapshot lacks, the highest first, and mark them as written."""
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
            HolderRow(entries.replica, each.stamp, each.touched_by, each.confirmed, each.output_tokens, each.ends)
            for entries, each in node.held.items()
            if entries.replica != NOBODY
        ),
    )

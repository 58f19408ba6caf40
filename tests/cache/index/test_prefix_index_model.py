"""The index against a naive model: for each replica, a set of prefixes with the stamp of their last touch."""

from __future__ import annotations

from array import array
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cache.index.fingerprint import Fingerprint
from cache.index.nodes import Node
from cache.index.prefix_index import PrefixIndex

REPLICAS = 3
BLOCK_TOKENS = 10
MANY_TOKENS = 10**6
chains = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)
replicas = st.integers(0, REPLICAS - 1)


def fingerprint_of(chain: tuple[int, ...]) -> Fingerprint:
    hashes = [hash(chain[: i + 1]) % 2**64 for i in range(len(chain))]
    return Fingerprint(array("Q", hashes), array("I", [40 * (i + 1) for i in range(len(chain))]))


class NaiveReplica:
    """Prefixes (tuples) to (stamp, placement id)."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, ...], tuple[int, int]] = {}
        self.budget = MANY_TOKENS
        self.epoch = 0

    def depth(self, chain: tuple[int, ...]) -> int:
        return next((i for i in range(len(chain)) if chain[: i + 1] not in self.held), len(chain))

    def is_continued(self, chain: tuple[int, ...]) -> bool:
        return any(len(longer) > len(chain) and longer[: len(chain)] == chain for longer in self.held)

    def make_room(self, running: set[int], stamp: int) -> int:
        """Drop the oldest, but let what is running become the newest once; return the stamp reached."""
        began = stamp
        while len(self.held) * BLOCK_TOKENS > self.budget:
            oldest = min(self.held, key=lambda prefix: (self.held[prefix][0], -len(prefix)))
            if self.held[oldest][0] <= began and self.held[oldest][1] in running:
                stamp += 1
                self.touch(oldest, stamp, None)
            else:
                del self.held[oldest]
        return stamp

    def touch(self, chain: tuple[int, ...], stamp: int, placement_id: int | None) -> None:
        """Make a prompt the newest; None leaves each part to the placement that touched it last."""
        for i in range(len(chain)):
            prefix = chain[: i + 1]
            self.held[prefix] = (stamp, self.held[prefix][1] if placement_id is None else placement_id)


class IndexMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.index = PrefixIndex(origin=5)
        self.model = [NaiveReplica() for _ in range(REPLICAS)]
        self.placements: list[tuple[Any, tuple[int, ...], int]] = []
        self.now = 0.0
        self.stamp = 0
        self.running: set[int] = set()

    @rule(replica=replicas, chain=chains, advance=st.sampled_from([0.0, 1.0]))
    def place(self, replica: int, chain: tuple[int, ...], advance: float) -> None:
        self.now += advance
        self.stamp += 1
        model = self.model[replica]
        before = model.depth(chain)
        placement = self.index.place(replica, fingerprint_of(chain), len(chain) * BLOCK_TOKENS, self.now)
        assert placement.held_blocks == before
        assert placement.predicted_tokens == before * BLOCK_TOKENS
        for i in range(len(chain)):
            model.held[chain[: i + 1]] = (self.stamp, placement.id)
        self.running.add(placement.id)
        self.stamp = model.make_room(self.running, self.stamp)
        self.placements.append((placement, chain, model.epoch))

    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        if not self.placements:
            return
        placement, chain, epoch = data.draw(st.sampled_from(self.placements))
        self.index.take_back(placement)
        self.running.discard(placement.id)
        model = self.model[placement.replica]
        if epoch != model.epoch:
            return
        for i in range(len(chain), placement.held_blocks, -1):
            if chain[:i] in model.held:
                if model.held[chain[:i]][1] != placement.id or model.is_continued(chain[:i]):
                    break
                del model.held[chain[:i]]

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        if self.placements:
            placement, chain, epoch = data.draw(st.sampled_from(self.placements))
            tokens = len(chain) * BLOCK_TOKENS
            self.index.answered(placement, tokens, placement.predicted_tokens, 3, self.now, decide=False)
            self.running.discard(placement.id)
            model = self.model[placement.replica]
            if epoch == model.epoch:
                self.stamp += 1
                whole = model.depth(chain) == len(chain)
                model.touch(chain, self.stamp, None if whole else placement.id)
                self.stamp = model.make_room(self.running, self.stamp)

    @rule(replica=replicas, blocks=st.integers(1, 25))
    def set_budget(self, replica: int, blocks: int) -> None:
        self.index.set_budget(replica, blocks * BLOCK_TOKENS)
        self.index.tend(self.now)
        self.model[replica].budget = blocks * BLOCK_TOKENS
        self.stamp = self.model[replica].make_room(self.running, self.stamp)

    @rule(replica=replicas)
    def begin_epoch(self, replica: int) -> None:
        self.model[replica].epoch += 1
        self.model[replica].held.clear()
        self.index.new_epoch(replica, self.model[replica].epoch)

    @rule(chunk=st.integers(1, 4))
    def restart_from_a_snapshot(self, chunk: int) -> None:
        rows = [row for rows in self.index.snapshot(chunk) for row in rows]
        other = PrefixIndex(origin=6)
        for _ in other.load(rows):
            pass
        for replica in range(REPLICAS):
            mine, theirs = self.index.replicas().get(replica), other.replicas().get(replica)
            assert (mine is None) == (theirs is None)
            if mine and theirs:
                assert (mine.blocks, mine.tokens, mine.budget_tokens, mine.epoch) == (
                    theirs.blocks,
                    theirs.tokens,
                    theirs.budget_tokens,
                    theirs.epoch,
                )
        other._next_id = self.index._next_id  # noqa: SLF001 - internal state that no public name shows
        self.index = other
        self.running.clear()

    @rule(chain=chains)
    def matches_agree(self, chain: tuple[int, ...]) -> None:
        match = self.index.match(fingerprint_of(chain))
        depths = {replica: depth for replica in range(REPLICAS) if (depth := self.model[replica].depth(chain))}
        assert {replica: held.blocks for replica, held in match.held.items()} == depths
        assert match.known_blocks == max(depths.values(), default=0)
        for held in match.held.values():
            assert held.size_bytes == 40 * held.blocks
            assert held.tokens == BLOCK_TOKENS * held.blocks

    @invariant()
    def structure_holds(self) -> None:
        if not hasattr(self, "index"):
            return
        tree = self.index._tree  # noqa: SLF001 - internal state that no public name shows
        counted = {"blocks": 0, "nodes": 0, "residencies": 0}
        self._check_below(tree.root, counted)
        assert counted == {"blocks": tree.blocks, "nodes": tree.nodes, "residencies": tree.residencies}
        for replica, state in self.index._replicas.items():  # noqa: SLF001 - internal state that no public name shows
            assert state.entries.blocks == len(self.model[replica].held)
            assert state.entries.tokens == BLOCK_TOKENS * state.entries.blocks <= self.model[replica].budget
            self._check_order(state.entries)

    def _check_below(self, node: Node, counted: dict[str, int]) -> None:
        for first, child in (node.children or {}).items():
            assert child.parent is node
            assert child.hashes[0] == first
            assert child.held
            assert len(child.hashes) == len(child.ends) == len(child.tokens)
            if node.parent is not None:
                assert child.held.keys() <= node.held.keys(), "prefix-closed"
            counted["blocks"] += len(child.hashes)
            counted["nodes"] += 1
            counted["residencies"] += len(child.held)
            self._check_below(child, counted)

    def _check_order(self, entries: Any) -> None:
        seen: set[int] = set()
        residency, blocks, stamp = entries.ring.newer, 0, 0.0
        while residency is not entries.ring:
            assert not any(
                entries in child.held and id(child) not in seen for child in (residency.node.children or {}).values()
            )
            assert residency.stamp >= stamp
            assert residency.newer.older is residency
            assert residency.node.held[entries] is residency
            seen.add(id(residency.node))
            blocks += len(residency.node.hashes)
            residency, stamp = residency.newer, residency.stamp
        assert blocks == entries.blocks


TestIndexAgainstModel = IndexMachine.TestCase
TestIndexAgainstModel.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)

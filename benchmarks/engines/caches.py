"""Simulate the cache of an engine: the prompts it keeps, and the part of a new one found there.

Three kinds, each as its engines work: blocks of a fixed size shared by all prompts, the least recently used evicted
first, the end of a prompt before its head (vLLM, SGLang); the same with a state that exists only where a prompt ended
(hybrid and sliding-window models); and slots that hold one prompt each (llama.cpp). Texts are bytes; sizes are
tokens of `BYTES_PER_TOKEN` bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from xxhash import xxh3_64_intdigest

from benchmarks.engines.templates import BYTES_PER_TOKEN


class Cache(Protocol):
    """An engine's memory of prompts."""

    def find(self, text: bytes) -> int:
        """Return the tokens of `text` that need not be computed; at least one always is. Marks them as used."""
        ...

    def keep(self, text: bytes) -> None:
        """Keep a prompt that was computed, or a prompt with its output."""
        ...

    def clear(self) -> None:
        """Forget everything, as a restart does."""
        ...


def tokens_of(text: bytes) -> int:
    """Return the length of a text in tokens."""
    return max(len(text) // BYTES_PER_TOKEN, 1)


class BlockCache:
    """Blocks of `block_tokens`; `unused_blocks` whole ones at the end of what matches are never reused."""

    def __init__(self, capacity_tokens: int, block_tokens: int = 16, unused_blocks: int = 0) -> None:
        self.block_tokens = block_tokens
        self._unused = unused_blocks
        self._most = max(capacity_tokens // block_tokens, 1)
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def find(self, text: bytes) -> int:
        blocks = self._chain(text)
        matched = 0
        while matched < len(blocks) and blocks[matched] in self._blocks:
            matched += 1
        if matched * self.block_tokens >= tokens_of(text):
            matched -= 1
        matched = max(matched - self._unused, 0)
        self._use(blocks[:matched])
        return matched * self.block_tokens

    def keep(self, text: bytes) -> None:
        self._use(self._chain(text))

    def clear(self) -> None:
        self._blocks.clear()

    @property
    def held_tokens(self) -> int:
        """The present contents in tokens."""
        return len(self._blocks) * self.block_tokens

    def _use(self, blocks: list[int]) -> None:
        kept = self._blocks
        for block in reversed(blocks):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > self._most:
            kept.popitem(last=False)

    def _chain(self, text: bytes) -> list[int]:
        size, last = self.block_tokens * BYTES_PER_TOKEN, 0
        blocks = []
        for start in range(0, len(text) - size + 1, size):
            last = xxh3_64_intdigest(text[start : start + size], last)
            blocks.append(last)
        return blocks


class EndCache:
    """A state is kept only where a prompt ended: another prompt reuses all of it or nothing."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens
        self._ends: OrderedDict[bytes, None] = OrderedDict()

    def find(self, text: bytes) -> int:
        best = max((end for end in self._ends if len(end) < len(text) and text.startswith(end)), key=len, default=b"")
        if not best:
            return 0
        self._ends.move_to_end(best)
        return tokens_of(best)

    def keep(self, text: bytes) -> None:
        self._ends[text] = None
        self._ends.move_to_end(text)
        while sum(map(tokens_of, self._ends)) > self._capacity and len(self._ends) > 1:
            self._ends.popitem(last=False)

    def clear(self) -> None:
        self._ends.clear()


class Slots:
    """`count` slots of `slot_tokens`; a prompt takes the slot whose text it shares at least `similarity` of, else the
    least recently used one, and replaces what is there."""

    def __init__(self, count: int, slot_tokens: int, similarity: float = 0.1) -> None:
        self._slot_bytes = slot_tokens * BYTES_PER_TOKEN
        self._similarity = similarity
        self._slots: OrderedDict[int, bytes] = OrderedDict((number, b"") for number in range(count))
        self._taken = 0

    def find(self, text: bytes) -> int:
        shared = {number: _shared_bytes(held, text) for number, held in self._slots.items()}
        best = max(shared, key=lambda number: shared[number])
        if shared[best] < self._similarity * len(text):
            best = next(iter(self._slots))
        self._taken = best
        self._slots.move_to_end(best)
        return min(shared[best], len(text) - 1) // BYTES_PER_TOKEN

    def keep(self, text: bytes) -> None:
        self._slots[self._taken] = text[: self._slot_bytes]

    def clear(self) -> None:
        for number in self._slots:
            self._slots[number] = b""


def _shared_bytes(one: bytes, other: bytes) -> int:
    """Return the length of the longest common prefix, by bisection on slices."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

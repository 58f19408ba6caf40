"""Cuts a prompt's bytes into blocks and chains their hashes. The only importer of xxhash.

It knows bytes and nothing of JSON, models or replicas. A hash stands for all bytes up to its boundary, so equal
hashes mean equal prefixes. They are fast and not cryptographic: they may decide a route and never content.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Final

from xxhash import xxh3_64_intdigest

from cache.fingerprint import Fingerprint

FINE_BLOCK_BYTES: Final = 512
"""Block size at the head of a prompt, where system prompts fork: about 128 tokens of prose."""

FINE_REACH_BYTES = 16 * 1024
"""How far the fine blocks reach; a whole number of coarse blocks."""

COARSE_BLOCK_BYTES: Final = 2048
"""Block size after that: router blocks of 1 to 4 KB lose nothing against an engine's own of 16 tokens."""

COARSE_REACH_BYTES = 128 * 1024
"""How far the coarse blocks reach; a whole number of the next."""

DEEP_BLOCK_BYTES: Final = 4096
"""Block size from there on, where half a block is under two percent of what comes before it."""


def chain_root(parts: Iterable[bytes]) -> int:
    """The hash that a chain starts from, of what precedes the prompt in the key: salt, model, adapter, arguments.

    Each part goes in behind its length, so ("ab", "c") and ("a", "bc") differ.
    """
    return xxh3_64_intdigest(b"".join([len(part).to_bytes(8, "little") + part for part in parts]))


def cut(root: int, spans: Sequence[memoryview | bytes]) -> Fingerprint:
    """Boundaries and chained hashes (xxh3_64, seeded with the hash before) of the concatenated `spans`.

    A boundary stands at every span's end and on a grid of absolute offsets, so it depends on nothing that comes
    after it: a prompt with messages appended shares every boundary of the shorter one. Views must be of bytes
    (format 'B'). Nothing is copied but slices of spans that are `bytes`.
    """
    return _go_on(root, array("Q"), array("I"), spans)


def extend(known: Fingerprint, spans: Sequence[memoryview | bytes]) -> Fingerprint:
    """The fingerprint of what `known` stands for with `spans` behind it, as `cut` would give it for all of it.

    Only `spans` are hashed. `known` is left as it is, and must end where a span ends. Raises ValueError where it is
    empty: it would not know its root.
    """
    if not known.hashes:
        raise ValueError("an empty fingerprint has no end to go on from")
    return _go_on(known.hashes[-1], known.hashes, known.ends, spans)


def _go_on(
    seed: int, known_hashes: array[int], known_ends: array[int], spans: Sequence[memoryview | bytes]
) -> Fingerprint:
    """The chain that goes on from `seed`, behind copies of what is known."""
    digest = xxh3_64_intdigest
    hashes: list[int] = []
    ends = known_ends[:]
    base = ends[-1] if ends else 0
    for span in spans:
        size = len(span)
        if not size:
            continue
        stops = _grid(base, base + size)
        start = 0
        for end in stops:
            stop = end - base
            seed = digest(span[start:stop], seed)
            hashes.append(seed)
            start = stop
        seed = digest(span[start:] if start else span, seed)
        hashes.append(seed)
        base += size
        ends += stops
        ends.append(base)
    return Fingerprint(known_hashes + array("Q", hashes), ends)


_FINE_BLOCKS = FINE_REACH_BYTES // FINE_BLOCK_BYTES
_COARSE_BLOCKS = (COARSE_REACH_BYTES - FINE_REACH_BYTES) // COARSE_BLOCK_BYTES
_LISTED_BYTES = 4 * 1024 * 1024
_LISTED = array(
    "I",
    [
        *range(FINE_BLOCK_BYTES, FINE_REACH_BYTES, FINE_BLOCK_BYTES),
        *range(FINE_REACH_BYTES, COARSE_REACH_BYTES, COARSE_BLOCK_BYTES),
        *range(COARSE_REACH_BYTES, _LISTED_BYTES, DEEP_BLOCK_BYTES),
    ],
)
"""The grid, as far as nearly all prompts reach: a slice of it is a copy, where a number made costs half of a hash."""


def _grid(begin: int, end: int) -> array[int]:
    """The grid's offsets strictly between two offsets of a prompt."""
    first, last = _before(begin + 1), _before(end)
    listed = _LISTED[first:last]
    if end > _LISTED_BYTES:
        beyond = max(begin - begin % DEEP_BLOCK_BYTES + DEEP_BLOCK_BYTES, _LISTED_BYTES)
        listed.extend(range(beyond, end, DEEP_BLOCK_BYTES))
    return listed


def _before(offset: int) -> int:
    """How many of the grid's offsets lie before `offset`, which is at least 1; the list may end sooner."""
    if offset <= FINE_REACH_BYTES:
        return (offset - 1) // FINE_BLOCK_BYTES
    if offset <= COARSE_REACH_BYTES:
        return _FINE_BLOCKS + (offset - 1 - FINE_REACH_BYTES) // COARSE_BLOCK_BYTES
    return _FINE_BLOCKS + _COARSE_BLOCKS + (offset - 1 - COARSE_REACH_BYTES) // DEEP_BLOCK_BYTES

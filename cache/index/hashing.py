"""Cuts a prompt's bytes into blocks and chains their hashes. The only importer of xxhash.

It knows bytes and nothing of JSON, models or replicas. A hash stands for all bytes up to its boundary, so equal
hashes mean equal prefixes. They are fast and not cryptographic: they may decide a route and never content.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Final

from xxhash import xxh3_64_intdigest

from cache.index.fingerprint import Fingerprint

BLOCK_BYTES_LEAST: Final = 512
"""Block size up to FINE_REACH_BYTES, where system prompts fork: about 128 tokens of prose."""

FINE_REACH_BYTES: Final = 8 * 1024
"""From there on a block is an eighth of the power of two that lies before it, so half a block, by which a fork may be
missed, is never more than a sixteenth of what is known."""

BLOCK_BYTES_MOST: Final = 4096
"""Block size from 32 KB on: router blocks of 1 to 4 KB lose nothing against an engine's own of 16 tokens."""


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
        for end in stops.tolist():
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


_16K: Final = 16 * 1024
_32K: Final = 32 * 1024
_BLOCKS_TO_8K: Final = 16  # boundaries of the grid up to and with that offset
_BLOCKS_TO_16K: Final = 24
_BLOCKS_TO_32K: Final = 32
_LISTED_BYTES: Final = 4 * 1024 * 1024
_LISTED = array(
    "I",
    [
        *range(BLOCK_BYTES_LEAST, FINE_REACH_BYTES, BLOCK_BYTES_LEAST),
        *range(FINE_REACH_BYTES, _16K, 1024),
        *range(_16K, _32K, 2048),
        *range(_32K, _LISTED_BYTES, BLOCK_BYTES_MOST),
    ],
)
"""The grid, as far as nearly all prompts reach: a slice of it is a copy, where a number made costs half of a hash."""


def _grid(begin: int, end: int) -> array[int]:
    """The grid's offsets strictly between two offsets of a prompt."""
    first, last = _before(begin + 1), _before(end)
    listed = _LISTED[first:last]
    if end > _LISTED_BYTES:
        beyond = max(begin - begin % BLOCK_BYTES_MOST + BLOCK_BYTES_MOST, _LISTED_BYTES)
        listed.extend(range(beyond, end, BLOCK_BYTES_MOST))
    return listed


def _before(offset: int) -> int:
    """How many of the grid's offsets lie before `offset`, which is at least 1; the list may end sooner."""
    last = offset - 1
    if last < FINE_REACH_BYTES:
        return last // BLOCK_BYTES_LEAST
    if last < _16K:
        return _BLOCKS_TO_8K + (last - FINE_REACH_BYTES) // 1024
    if last < _32K:
        return _BLOCKS_TO_16K + (last - _16K) // 2048
    return _BLOCKS_TO_32K + (last - _32K) // BLOCK_BYTES_MOST

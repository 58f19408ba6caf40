"""Cut a prompt's bytes into blocks and chain their hashes. The only importer of xxhash.

A hash covers all bytes up to its boundary, so equal hashes mean equal prefixes. They are fast and not cryptographic:
they may decide a route but never content.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from cache.index.fingerprint import Fingerprint

BLOCK_BYTES_LEAST: Final = 512
"""Block size up to FINE_REACH_BYTES, where system prompts fork: about 128 tokens of prose."""

FINE_REACH_BYTES: Final = 8 * 1024
"""From here on a block is an eighth of the power of two below its offset, so half a block, by which a fork may be
missed, is at most a sixteenth of what precedes it.
"""

BLOCK_BYTES_MOST: Final = 16 * 1024
"""Block size from 512 KB on. It is 4 KB from 32 KB and 8 KB from 128 KB on: half a block is at most 3 percent of what
precedes it, and the long prompt costs half as much to hash, index and share as with blocks of 4 KB throughout.
"""


def chain_root(parts: Iterable[bytes]) -> int:
    """Hash what precedes the prompt in the key (salt, model, adapter, arguments): the start of its chain.

    Each part is preceded by its length, so ("ab", "c") and ("a", "bc") differ.
    """
    return xxh3_64_intdigest(b"".join([len(part).to_bytes(8, "little") + part for part in parts]))


def cut(root: int, spans: Sequence[memoryview | bytes]) -> Fingerprint:
    """Compute the boundaries and chained hashes (xxh3_64, seeded with the previous hash) of the concatenated `spans`.

    There is a boundary at the end of each span and on a grid of absolute offsets, so it depends on nothing that
    comes after it: a prompt with messages appended shares every boundary of the shorter one. Views must be of bytes
    (format 'B'). Only slices of spans that are `bytes` are copied.
    """
    return _go_on(root, array("Q"), array("I"), spans)


def extend(known: Fingerprint, spans: Sequence[memoryview | bytes]) -> Fingerprint:
    """Return the fingerprint of `known` followed by `spans`, equal to `cut` of both.

    Only `spans` are hashed. `known` is not changed and must end at the end of a span. Raises ValueError if it is
    empty, since its root would be unknown.
    """
    if not known.hashes:
        raise ValueError("cannot extend an empty fingerprint: cut all spans from their root instead")
    longer = _go_on(known.hashes[-1], known.hashes, known.ends, spans)
    return Fingerprint(longer.hashes, longer.ends, known.media) if known.media else longer


def _go_on(
    seed: int, known_hashes: array[int], known_ends: array[int], spans: Sequence[memoryview | bytes]
) -> Fingerprint:
    """Continue the chain from `seed`, in copies of the known arrays."""
    # Any: otherwise compiled code takes each number out of its object, and makes another one for the next call
    digest: Any = xxh3_64_intdigest
    link: Any = seed
    hashes: list[Any] = []
    ends = known_ends[:]
    base = ends[-1] if ends else 0
    for span in spans:
        size = len(span)
        if not size:
            continue
        grid = _grid(base, base + size)
        stops: list[Any] = [end - base for end in grid] if base else grid.tolist()
        start: Any = 0
        for stop in stops:
            link = digest(span[start:stop], link)
            hashes.append(link)
            start = stop
        link = digest(span[start:] if stops else span, link)
        hashes.append(link)
        base += size
        ends += grid
        ends.append(base)
    return Fingerprint(known_hashes + array("Q", hashes), ends)


_K: Final = 1024
_BLOCKS_TO_8K: Final = 16  # boundaries of the grid up to and including that offset
_BLOCKS_TO_16K: Final = 24
_BLOCKS_TO_32K: Final = 32
_BLOCKS_TO_128K: Final = 56
_BLOCKS_TO_512K: Final = 104
_LISTED_BYTES: Final = 8 * _K * _K
_LISTED = array(
    "I",
    [
        *range(BLOCK_BYTES_LEAST, FINE_REACH_BYTES, BLOCK_BYTES_LEAST),
        *range(FINE_REACH_BYTES, 16 * _K, _K),
        *range(16 * _K, 32 * _K, 2 * _K),
        *range(32 * _K, 128 * _K, 4 * _K),
        *range(128 * _K, 512 * _K, 8 * _K),
        *range(512 * _K, _LISTED_BYTES, BLOCK_BYTES_MOST),
    ],
)
"""The grid up to the length of nearly all prompts: a slice of it is a copy, while computing each number takes
half as long as hashing a block.
"""


def _grid(begin: int, end: int) -> array[int]:
    """Return the grid's offsets strictly between two offsets of a prompt."""
    first, last = grid_before(begin + 1), grid_before(end)
    listed = _LISTED[first:last]
    if end > _LISTED_BYTES:
        beyond = max(begin - begin % BLOCK_BYTES_MOST + BLOCK_BYTES_MOST, _LISTED_BYTES)
        listed.extend(range(beyond, end, BLOCK_BYTES_MOST))
    return listed


def grid_before(offset: int) -> int:
    """Return the number of the grid's offsets below `offset`, which is at least 1: a prompt has as many boundaries
    before it, and one more for each of its spans that ends between two of them.
    """
    last = offset - 1
    if last < FINE_REACH_BYTES:
        return last // BLOCK_BYTES_LEAST
    if last < 16 * _K:
        return _BLOCKS_TO_8K + (last - FINE_REACH_BYTES) // _K
    if last < 32 * _K:
        return _BLOCKS_TO_16K + (last - 16 * _K) // (2 * _K)
    if last < 128 * _K:
        return _BLOCKS_TO_32K + (last - 32 * _K) // (4 * _K)
    if last < 512 * _K:
        return _BLOCKS_TO_128K + (last - 128 * _K) // (8 * _K)
    return _BLOCKS_TO_512K + (last - 512 * _K) // BLOCK_BYTES_MOST

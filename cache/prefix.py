"""Cuts a prompt's bytes into blocks and chains their hashes. The only importer of xxhash.

It knows bytes and nothing of JSON, models or replicas. A hash stands for all bytes up to its boundary, so equal
hashes mean equal prefixes. They are fast and not cryptographic: they may decide a route and never content.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from xxhash import xxh3_64_intdigest

from cache.fingerprint import Fingerprint

FINE_BLOCK_BYTES = 512
"""Block size at the head of a prompt, where system prompts fork: about 128 tokens of prose."""

FINE_REACH_BYTES = 16 * 1024
"""How far the fine blocks reach; a whole number of coarse blocks."""

COARSE_BLOCK_BYTES = 2048
"""Block size after that: router blocks of 1 to 4 KB lose nothing against an engine's own of 16 tokens."""


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
    add = hashes.append
    ends = known_ends[:]
    base = ends[-1] if ends else 0
    for span in spans:
        size = len(span)
        if not size:
            continue
        start = 0
        for stops in _grid(base, size):
            for stop in stops:
                seed = digest(span[start:stop], seed)
                add(seed)
                start = stop
            ends.extend(range(base + stops.start, base + stops.stop, stops.step))
        seed = digest(span[start:] if start else span, seed)
        add(seed)
        base += size
        ends.append(base)
    return Fingerprint(known_hashes + array("Q", hashes), ends)


def _grid(base: int, size: int) -> tuple[range, ...]:
    """Grid offsets strictly inside a span of `size` bytes that begins at `base`, relative to its begin."""
    if base >= FINE_REACH_BYTES:
        return (range(COARSE_BLOCK_BYTES - base % COARSE_BLOCK_BYTES, size, COARSE_BLOCK_BYTES),)
    reach = FINE_REACH_BYTES - base
    fine = range(FINE_BLOCK_BYTES - base % FINE_BLOCK_BYTES, min(size, reach + 1), FINE_BLOCK_BYTES)
    return (fine,) if size <= reach else (fine, range(reach + COARSE_BLOCK_BYTES, size, COARSE_BLOCK_BYTES))

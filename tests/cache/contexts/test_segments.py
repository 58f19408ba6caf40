"""Contents as segments: what comes back is what went in, shared where it is the same, and checked."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.contexts.segments import (
    ALONE_BYTES,
    CHAINS_AT_MOST,
    SEGMENT_BYTES,
    Content,
    Packed,
    compress,
    pack,
    read_manifest,
    unpack,
)
from cache.errors import StoreCorrupt
from cache.index.hashing import chain_root, cut, extend


def joined(messages: list[bytes], between: bytes = b", ") -> tuple[bytes, array[int]]:
    """Messages in a row, and their bounds."""
    bounds, at = array("I"), 0
    for message in messages:
        bounds.extend((at, at + len(message)))
        at += len(message) + len(between)
    return between.join(messages), bounds


def stored(packed: Packed) -> dict[bytes, bytes | None]:
    return {digest: compress(segment) for digest, segment in packed.segments.items()}


def back(packed: Packed, held: dict[bytes, bytes | None]) -> Content:
    return unpack(read_manifest(packed.manifest, packed.digest), packed.digest, held)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


sizes = st.lists(st.sampled_from([1, 10, 1023, 1024, ALONE_BYTES - 1, ALONE_BYTES, 50_000]), min_size=1, max_size=6)


@given(sizes, st.sampled_from([b",", b" ,\n" * 400]), st.sampled_from([0, 5, 1024, 70_000]))
def test_what_is_packed_comes_back(lengths: list[int], between: bytes, tools: int) -> None:
    """Every byte, whatever lies large or small beside each other."""
    messages, bounds = joined([noise(size, number) for number, size in enumerate(lengths)], between)
    packed = pack(noise(tools), messages, bounds)
    content = back(packed, stored(packed))
    assert (content.tools, content.messages, content.bounds) == (noise(tools), messages, bounds)
    assert all(len(segment) <= SEGMENT_BYTES for segment in packed.segments.values())


def test_a_shared_document_shares_its_segments() -> None:
    """Alone, between other messages, and behind tools: the same segments of at most 1 MiB."""
    document = noise(2_500_000)
    alone = pack(b"", *joined([document]))
    among = pack(b"[1]", *joined([b"x" * 3000, document, b"y" * 30_000]))
    assert len(alone.segments) == 3
    assert alone.segments.keys() < among.segments.keys()
    assert len(among.segments) == 5


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "another", "version", "longer", "empty"])
def test_a_damaged_segment_is_never_handed_out(damage: str) -> None:
    """StoreCorrupt, whatever happened to it."""
    packed = pack(b"", *joined([noise(100_000)]))
    held = stored(packed)
    (digest,) = held
    good = held[digest]
    assert good is not None
    held[digest] = {
        "gone": None,
        "cut": good[:-7],
        "flipped": good[:500] + bytes((good[500] ^ 1,)) + good[501:],
        "another": compress(memoryview(noise(100_000, 1))),
        "version": b"\x09" + good[1:],
        "longer": compress(memoryview(noise(100_001))),
        "empty": b"",
    }[damage]
    with pytest.raises(StoreCorrupt):
        back(packed, held)


def test_a_bomb_is_not_opened() -> None:
    """A frame that says to hold more than its manifest is refused before it is decompressed."""
    packed = pack(b"", *joined([noise(20_000)]))
    (digest,) = packed.segments
    bomb = compress(memoryview(bytes(50_000_000)))
    with pytest.raises(StoreCorrupt):
        back(packed, {digest: bomb})


def test_a_manifest_is_the_one_that_its_digest_names() -> None:
    """A flipped byte, another version, another's manifest."""
    packed = pack(b"", *joined([b"x" * 100]))
    other = pack(b"", *joined([b"y" * 100]))
    for manifest in (other.manifest, packed.manifest[:-1], b"\x02" + packed.manifest[1:], b""):
        with pytest.raises(StoreCorrupt):
            read_manifest(manifest, packed.digest)


def test_the_chain_of_a_content_goes_on_as_that_of_the_whole_prompt() -> None:
    """Tools, messages, then what a client adds: the same blocks as if it had sent it all; made once per root."""
    messages, bounds = joined([noise(100_000), b'{"role":"user"}', noise(3000)])
    content = Content(b"", b"[tools]", messages, bounds)
    root, question = chain_root([b"model"]), [b"question", b"another" * 500]
    whole = cut(root, [b"[tools]", noise(100_000), b'{"role":"user"}', noise(3000), *question])
    known = content.chain(root)
    went_on = extend(known, question)
    assert (went_on.hashes, went_on.ends) == (whole.hashes, whole.ends)
    assert content.chain(root) is known
    assert content.span_bytes == known.size_bytes
    for number in range(CHAINS_AT_MOST + 5):
        content.chain(number)
    assert content.chain(root) is not known

"""The cut: boundaries that depend on the prefix alone, and hashes that stand for all bytes before them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from cache.index.hashing import (
    BLOCK_BYTES_LEAST,
    BLOCK_BYTES_MOST,
    FINE_REACH_BYTES,
    chain_root,
    cut,
    extend,
)

sizes = st.lists(
    st.one_of(st.integers(0, 40), st.integers(0, 6_000), st.integers(14_000, 40_000), st.integers(100_000, 140_000)),
    max_size=6,
)


def spans_of(lengths: list[int], fill: int = 7) -> list[bytes]:
    return [bytes((fill * i + n) % 251 for n in range(size)) for i, size in enumerate(lengths)]


def naive_ends(lengths: list[int]) -> list[int]:
    total = sum(lengths)
    ends = {sum(lengths[: i + 1]) for i in range(len(lengths))}
    offset = 0
    while offset <= total:
        ends.add(offset)
        octave_bytes = 1 << max(offset.bit_length() - 1, 0)
        eighth = octave_bytes // 8 if offset >= FINE_REACH_BYTES else BLOCK_BYTES_LEAST
        most = BLOCK_BYTES_MOST if offset >= 512 * 1024 else 8192 if offset >= 128 * 1024 else 4096
        offset += min(eighth, most)
    return sorted(end for end in ends if 0 < end <= total)


@given(sizes)
def test_boundaries_stand_at_span_ends_and_on_the_absolute_grid(lengths):
    assert list(cut(1, spans_of(lengths)).ends) == naive_ends(lengths)


@given(sizes, st.integers(0, 2**64 - 1))
def test_each_hash_is_that_of_its_block_seeded_with_the_hash_before(lengths, root):
    """Also where a span begins within a block of the grid, and for seeds of any size."""
    found, flat = cut(root, spans_of(lengths)), b"".join(spans_of(lengths))
    expected = [root]
    for start, end in pairwise([0, *found.ends]):
        expected.append(xxh3_64_intdigest(flat[start:end], expected[-1]))
    assert list(found.hashes) == expected[1:]


@given(sizes, sizes)
def test_an_appended_prompt_shares_every_boundary_of_the_shorter_one(first, more):
    spans = spans_of(first + more)
    short, long = cut(9, spans[: len(first)]), cut(9, spans)
    assert long.hashes[: len(short)] == short.hashes
    assert long.ends[: len(short)] == short.ends
    assert long.size_bytes == sum(first) + sum(more)


@given(sizes.filter(lambda lengths: sum(lengths) > 0), st.data())
def test_a_changed_byte_changes_every_hash_from_its_block_on_and_none_before(lengths, data):
    spans = spans_of(lengths)
    before = cut(3, spans)
    at = data.draw(st.integers(0, sum(lengths) - 1))
    flat = bytearray(b"".join(spans))
    flat[at] ^= 1
    changed, start = [], 0
    for span in spans:
        changed.append(bytes(flat[start : start + len(span)]))
        start += len(span)
    after = cut(3, changed)
    for end, old, new in zip(before.ends, before.hashes, after.hashes, strict=True):
        assert (old == new) == (end <= at)


@pytest.mark.parametrize("lengths", [[5_000_000], [4_194_304, 1, 9_000], [4_190_000, 300_000], [4_194_305]])
def test_the_grid_goes_on_however_long_a_prompt_is(lengths):
    assert list(cut(1, [bytes(length) for length in lengths]).ends) == naive_ends(lengths)


def test_views_and_bytes_hash_alike():
    body = bytes(range(256)) * 200
    view = memoryview(body)
    assert cut(5, [view[:700], view[700:]]).hashes == cut(5, [body[:700], body[700:]]).hashes


def test_two_megabytes_make_some_two_hundred_boundaries_and_none_is_left_out():
    fingerprint = cut(5, [bytes(2_000_000)])
    assert 190 < len(fingerprint) < 200
    assert fingerprint.size_bytes == 2_000_000


def test_the_same_bytes_in_other_spans_are_another_prompt():
    assert cut(1, [b"ab", b"c"]).hashes[-1] != cut(1, [b"a", b"bc"]).hashes[-1]


def test_an_empty_prompt_has_no_boundary():
    assert len(cut(1, [])) == 0
    assert cut(1, [b"", b""]).size_bytes == 0


def test_roots_tell_their_parts_apart_and_start_different_chains():
    assert chain_root([b"ab", b"c"]) != chain_root([b"a", b"bc"])
    assert chain_root([b"a", b""]) != chain_root([b"a"])
    assert cut(chain_root([b"m1"]), [b"x"]).hashes != cut(chain_root([b"m2"]), [b"x"]).hashes


@given(st.integers(0, 2**64 - 1), st.lists(st.binary(max_size=5000), max_size=6), st.integers(1, 40_000))
def test_going_on_from_a_known_chain_is_cutting_the_whole(root: int, spans: list[bytes], head: int) -> None:
    """This holds for any known chain, which stays unchanged."""
    known = cut(root, [b"x" * head])
    before = known.hashes[:], known.ends[:]
    went_on, whole = extend(known, spans), cut(root, [b"x" * head, *spans])
    assert (went_on.hashes, went_on.ends) == (whole.hashes, whole.ends)
    assert (known.hashes, known.ends) == before


def test_an_empty_chain_does_not_go_on() -> None:
    """It would not know where from."""
    with pytest.raises(ValueError):
        extend(cut(1, []), [b"x"])


@pytest.mark.parametrize("before_bytes", [BLOCK_BYTES_LEAST - 1, BLOCK_BYTES_LEAST, BLOCK_BYTES_LEAST + 1])
def test_the_grid_goes_on_just_behind_a_span_that_ends_beside_it(before_bytes):
    """Its next offset is a boundary even one byte after the end of a span."""
    ends = cut(0, [b"x" * before_bytes, b"y" * BLOCK_BYTES_LEAST]).ends.tolist()
    grid = [BLOCK_BYTES_LEAST, 2 * BLOCK_BYTES_LEAST]
    end = before_bytes + BLOCK_BYTES_LEAST
    assert ends == sorted({before_bytes, end, *[offset for offset in grid if offset < end]})

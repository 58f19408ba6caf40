"""Stored bytes: what was written is read, and nothing else is."""

from __future__ import annotations

from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import StoreCorrupt
from cache.index.hashing import cut
from cache.index.rows import ReplicaRow, RunRow
from cache.replication import codec
from cache.replication.codec import Answered, Began, Budgeted, Placed, SnapshotChunk, Suspected, TakenBack, Vector

HEAD = codec.own_head(codec.JOURNAL_VERSION, "writer")
CHAIN = cut(7, [b"x" * 3_000])
DELTAS: list[codec.Delta] = [
    Placed(0, 2**62, 3, CHAIN.hashes.tobytes(), CHAIN.ends.tobytes(), 750, 1_700_000_000.25),
    Placed(0, 7, 3, CHAIN.hashes.tobytes(), CHAIN.ends.tobytes(), 750, 1.0, 5, ((10, 900, 256), (900, 2_000, 256))),
    TakenBack(5, 2),
    Answered(5, 700, 20, None),
    Answered(5, 700, 20, 0),
    Began(0, 4),
    Suspected(5, 6),
    Budgeted(0, None, 90_000),
]
BATCH = codec.encode_batch(HEAD, {0: "http://one"}, DELTAS)


def test_a_batch_is_read_as_it_was_written() -> None:
    """Writer, names, each kind of delta, and the chain with its arrays."""
    writer, batch = codec.decode_batch(BATCH)
    assert (writer, batch.names, batch.deltas) == ("writer", {0: "http://one"}, DELTAS)
    placed = batch.deltas[0]
    assert isinstance(placed, Placed)
    assert (placed.fingerprint.hashes, placed.fingerprint.ends) == (CHAIN.hashes, CHAIN.ends)
    pictured = batch.deltas[1]
    assert isinstance(pictured, Placed)
    assert pictured.fingerprint.media == ((10, 900, 256), (900, 2_000, 256))


def test_a_view_of_an_array_is_written_as_its_bytes() -> None:
    """Queueing a placement copies nothing."""
    view = Placed(0, 1, 0, memoryview(CHAIN.hashes), memoryview(CHAIN.ends), 1, 0.0)  # type: ignore[arg-type]
    (read,) = codec.decode_batch(codec.encode_batch(HEAD, {}, [view]))[1].deltas
    assert isinstance(read, Placed)
    assert read.fingerprint.hashes == CHAIN.hashes


def test_a_writer_knows_its_echo_by_the_first_bytes() -> None:
    """Messages of another writer, even with the same beginning of its name, are not mistaken for its own."""
    assert BATCH.startswith(HEAD)
    assert not codec.encode_batch(codec.own_head(1, "writer2"), {}, []).startswith(HEAD)


@pytest.mark.parametrize("end", range(0, len(BATCH) - 1, 7))
def test_a_batch_cut_off_anywhere_is_refused(end: int) -> None:
    """Never half of it."""
    with pytest.raises(StoreCorrupt):
        codec.decode_batch(BATCH[:end])


def test_another_version_is_refused() -> None:
    """An older or newer Cairn's entry is dropped, not guessed at."""
    for version in (0, 2, 255):
        with pytest.raises(StoreCorrupt):
            codec.decode_batch(bytes((version,)) + BATCH[1:])
        with pytest.raises(StoreCorrupt):
            codec.decode_chunk(bytes((version,)) + codec.encode_chunk(SnapshotChunk({}, []))[1:])


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_being_refused(noise: bytes) -> None:
    """For any bytes in Redis, the only error is StoreCorrupt."""
    for decode in (codec.decode_batch, codec.decode_vector, codec.decode_chunk):
        for payload in (noise, b"\x01" + noise, HEAD + noise):
            try:
                decode(payload)
            except StoreCorrupt:
                continue


@given(st.data())
def test_a_flipped_byte_is_refused_or_read_as_deltas(draw: st.DataObject) -> None:
    """Damage within never raises anything but StoreCorrupt, not even from a chain."""
    at = draw.draw(st.integers(0, len(BATCH) - 1))
    damaged = BATCH[:at] + bytes((BATCH[at] ^ draw.draw(st.integers(1, 255)),)) + BATCH[at + 1 :]
    try:
        for delta in codec.decode_batch(damaged)[1].deltas:
            if isinstance(delta, Placed):
                assert len(delta.fingerprint.hashes) == len(delta.fingerprint.ends)
    except StoreCorrupt:
        pass


def test_a_chain_whose_arrays_differ_is_refused() -> None:
    """Hashes and ends belong together one by one; none at all is no chain."""
    for hashes, ends in ((b"", b""), (b"\0" * 8, b"\0" * 8), (b"\0" * 7, b"\0" * 4)):
        with pytest.raises(StoreCorrupt):
            _ = Placed(0, 1, 0, hashes, ends, 1, 0.0).fingerprint


def test_a_vector_is_read_as_it_was_written() -> None:
    """With its writer."""
    head = codec.own_head(codec.VECTOR_VERSION, "w")
    vector = Vector(9, {"a": (1.5, 1), "b": (0.0, 0)})
    assert codec.decode_vector(codec.encode_vector(head, vector)) == ("w", vector)


def test_a_part_of_a_snapshot_is_read_as_it_was_written() -> None:
    """Replicas by name, runs as arrays; a truncated run is not valid."""
    run = RunRow(
        None, array("Q", [1, 2]).tobytes(), array("I", [5, 9]).tobytes(), array("I", [1, 2]).tobytes(), 1, (), ()
    )
    chunk = SnapshotChunk({0: "http://one"}, [ReplicaRow(0, 1, 1_000, None, 10), run])
    read = codec.decode_chunk(codec.encode_chunk(chunk))
    assert (read.names, list(read.rows)) == (chunk.names, list(chunk.rows))
    short = RunRow(None, run.hashes, run.ends[:-1], run.tokens, 1, (), ())
    assert codec.is_valid(run)
    assert not codec.is_valid(short)


def test_a_writers_name_fits_its_length_byte() -> None:
    """Empty and too long are refused when it is made."""
    for bad in ("", "x" * 256):
        with pytest.raises(ValueError, match="writer"):
            codec.own_head(1, bad)


@pytest.mark.parametrize("media", [((5, 5, 1),), ((9, 5, 1),), ((5, 90, 1), (80, 100, 1))])
def test_media_that_overlap_or_are_empty_are_refused(media: tuple[tuple[int, int, int], ...]) -> None:
    placed = Placed(0, 1, 0, CHAIN.hashes.tobytes(), CHAIN.ends.tobytes(), 1, 0.0, 0, media)
    with pytest.raises(StoreCorrupt):
        _ = placed.fingerprint


def test_a_placement_of_an_earlier_version_is_read() -> None:
    """It names no tenant and no media; one of a later version may have further fields."""
    fields = [0, 0, 1, 0, CHAIN.hashes.tobytes(), CHAIN.ends.tobytes(), 750, 1.0]
    for row in (fields, [*fields, 5, [], "new"]):
        _, batch = codec.decode_batch(HEAD + msgspec.msgpack.encode([{}, [row]]))
        (placed,) = batch.deltas
        assert isinstance(placed, Placed)
        assert (placed.prompt_tokens, placed.fingerprint.media) == (750, ())


def test_an_entry_with_more_deltas_than_a_writer_packs_is_damaged() -> None:
    """Sixteen megabytes could hold four million, whose application would take seconds."""
    for count, is_read in ((codec.MAX_DELTAS, True), (codec.MAX_DELTAS + 1, False)):
        payload = codec.encode_batch(codec.own_head(codec.JOURNAL_VERSION, "w"), {}, [codec.TakenBack(1, 0)] * count)
        if is_read:
            assert len(codec.decode_batch(payload)[1].deltas) == count
        else:
            with pytest.raises(StoreCorrupt):
                codec.decode_batch(payload)
    names = dict.fromkeys(range(codec.MAX_VECTOR_ROWS + 1), "r")
    with pytest.raises(StoreCorrupt):
        codec.decode_batch(codec.encode_batch(codec.own_head(codec.JOURNAL_VERSION, "w"), names, []))

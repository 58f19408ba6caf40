"""Stored bytes to structs and back. Pure; knows shapes and neither keys nor when they are written.

Each stored value begins with one byte of version; what is of another version, damaged or cut off is refused with
`StoreCorrupt`, so a reader drops it and goes on. Behind it stands msgpack, fields by position. Arrays of numbers are
their bytes, little-endian, as on every machine that Cairn runs on.

A batch or a vector names its writer before all else, so that a writer knows its own echo without decoding it, and
replicas by their stable names (their origin).
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cache.errors import StoreCorrupt
from cache.index.fingerprint import Fingerprint
from cache.index.rows import ReplicaRow, RunRow

HASH_BYTES = 8
"""Of one boundary, as a chain is written."""

JOURNAL_VERSION = 1
SNAPSHOT_VERSION = 1
VECTOR_VERSION = 1
MAX_WRITER_BYTES = 255


class Placed(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """A prompt was routed: its whole chain, since a delta whose parent is unknown would hang in the air."""

    replica: int  # the writer's own number for it, as in the batch's names
    placement: int
    epoch: int
    hashes: bytes
    ends: bytes
    prompt_tokens: int
    unix_seconds: float

    @property
    def fingerprint(self) -> Fingerprint:
        """The chain. Raises StoreCorrupt where its two arrays do not fit each other."""
        hashes, ends = array("Q"), array("I")
        try:
            hashes.frombytes(self.hashes)
            ends.frombytes(self.ends)
        except ValueError as error:
            raise StoreCorrupt("a chain is cut off") from error
        if not hashes or len(hashes) != len(ends):
            raise StoreCorrupt("a chain's hashes and ends differ in number")
        return Fingerprint(hashes, ends)


class TakenBack(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A placement failed before its first token."""

    placement: int
    from_block: int


class Answered(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """What the upstream reported for a placement."""

    placement: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None


class Began(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """A replica began epoch `epoch`, holding nothing."""

    replica: int
    epoch: int


class Suspected(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """A confident prediction found nothing cached: with another one on another chain it means a new epoch."""

    placement: int
    held_blocks: int


class Owned(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """Something that a replica made lives there."""

    replica: int
    made_id: str


class Budgeted(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """A replica's budget goes from one value to another; counts only where it still has the first.

    Without a first value it is the lease-holder's word and counts always.
    """

    replica: int
    from_tokens: int | None
    to_tokens: int


class Computed(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """The first token of a placement came: its replica has computed the prefix."""

    placement: int


Delta = Placed | TakenBack | Answered | Began | Suspected | Budgeted | Owned | Computed


class Batch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry of the journal's stream. `names` is by the replica numbers of the process that wrote it."""

    names: dict[int, str]
    deltas: list[Delta]


class Vector(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One writer's work in flight, whole: a row of numbers for each replica where it has any.

    What the numbers mean is the business of who writes and who reads. `goodbye` is a writer's last.
    """

    number: int
    rows: dict[str, tuple[float, ...]]
    goodbye: bool = False


class SnapshotChunk(msgspec.Struct, frozen=True, array_like=True):
    """A part of the index. `names` is by the replica numbers of the process that wrote it."""

    names: dict[int, str]
    rows: Sequence[ReplicaRow | RunRow]
    owners: dict[str, str] = {}  # ids of what was made, to replica names


_encoder = msgspec.msgpack.Encoder()
_batches = msgspec.msgpack.Decoder(Batch)
_vectors = msgspec.msgpack.Decoder(Vector)
_chunks = msgspec.msgpack.Decoder(SnapshotChunk)


def own_head(version: int, writer: str) -> bytes:
    """How every message of this writer begins."""
    name = writer.encode()
    if not 0 < len(name) <= MAX_WRITER_BYTES:
        raise ValueError(f"a writer's name has 1 to {MAX_WRITER_BYTES} bytes")
    return bytes((version, len(name))) + name


def encode_batch(head: bytes, names: Mapping[int, str], deltas: Sequence[Delta]) -> bytes:
    """One stream entry's payload; `head` from `own_head`."""
    return head + _encoder.encode((names, deltas))


def decode_batch(payload: bytes) -> tuple[str, Batch]:
    """The writer and its batch. Raises StoreCorrupt."""
    writer, body = _writer_of(payload, JOURNAL_VERSION, "journal entry")
    return writer, _decode(_batches, body, "journal entry")


def encode_vector(head: bytes, vector: Vector) -> bytes:
    """One message of the in-flight channel."""
    return head + _encoder.encode(vector)


def decode_vector(payload: bytes) -> tuple[str, Vector]:
    """The writer and its vector. Raises StoreCorrupt."""
    writer, body = _writer_of(payload, VECTOR_VERSION, "in-flight vector")
    return writer, _decode(_vectors, body, "in-flight vector")


def encode_chunk(chunk: SnapshotChunk) -> bytes:
    """One part of a snapshot."""
    return bytes((SNAPSHOT_VERSION,)) + _encoder.encode(chunk)


def decode_chunk(payload: bytes) -> SnapshotChunk:
    """Raises StoreCorrupt, also where a run's arrays do not fit each other."""
    if payload[:1] != bytes((SNAPSHOT_VERSION,)):
        raise StoreCorrupt("a snapshot's part is of another version")
    chunk: SnapshotChunk = _decode(_chunks, memoryview(payload)[1:], "snapshot's part")
    for row in chunk.rows:
        if isinstance(row, RunRow) and not _fits(row):
            raise StoreCorrupt("a snapshot's run is cut off")
    return chunk


def _fits(row: RunRow) -> bool:
    blocks, rest = divmod(len(row.hashes), 8)
    return blocks > 0 and not rest and len(row.ends) == len(row.tokens) == 4 * blocks


def _writer_of(payload: bytes, version: int, what: str) -> tuple[str, memoryview]:
    if len(payload) < 2 or payload[0] != version:
        raise StoreCorrupt(f"a {what} is of another version")
    end = 2 + payload[1]
    try:
        return payload[2:end].decode(), memoryview(payload)[end:]
    except UnicodeDecodeError as error:
        raise StoreCorrupt(f"a {what} is damaged") from error


def _decode(decoder: Any, body: memoryview, what: str) -> Any:
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreCorrupt(f"a {what} is damaged") from error

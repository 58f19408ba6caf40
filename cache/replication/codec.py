"""Encode what replication stores and publishes, and decode and check what it reads. Pure.

Every value begins with one version byte, followed by msgpack with fields by position. Arrays of numbers are their raw
bytes, little-endian, as on every machine that Cairn supports. Journal entries and in-flight vectors name their writer
first, so that a writer recognises its own without decoding them. Replicas are identified by their stable names.

Redis is a trust boundary: other software may write to it. Decoding raises `StoreCorrupt` for everything that is
damaged, truncated, of another version, or has a value that Cairn never writes, such as a negative budget, a NaN or a
chain whose boundaries do not increase. Callers drop such a value, count it and continue.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import islice
from operator import le, lt
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cache.errors import StoreCorrupt
from cache.index.fingerprint import Fingerprint
from cache.index.prefix_index import UNLIMITED_TOKENS
from cache.index.rows import ReplicaRow, RunRow

HASH_BYTES = 8
"""Size of one boundary's hash in an encoded chain."""

BOUNDARY_BYTES = HASH_BYTES + 4
"""Size of a boundary in memory: its hash and its end."""

JOURNAL_VERSION = 1
SNAPSHOT_VERSION = 1
VECTOR_VERSION = 1
MAX_WRITER_BYTES = 255

MAX_ENTRY_BYTES = 16 * 1024 * 1024
"""Largest journal entry. One has 20,000 boundaries (250 KB) plus at most one prompt; a prompt of 1 GB has 6 MB."""

MAX_EPOCH = 2**48
MAX_ID = 2**63 - 1
MAX_MEDIA = 1_024
"""Images, sounds and files of one prompt that are written; the others count as text."""

MAX_VECTOR_ROWS = 65_536

MAX_DELTAS = 50_000
"""Deltas of one journal entry. Writers pack at most 20,000; an entry of 16 MB could hold four million."""

PlacementId = Annotated[int, Meta(ge=0, le=MAX_ID)]
Epoch = Annotated[int, Meta(ge=0, le=MAX_EPOCH)]
Tokens = Annotated[int, Meta(ge=0, le=UNLIMITED_TOKENS)]
Budget = Annotated[int, Meta(ge=1, le=UNLIMITED_TOKENS)]
Offset = Annotated[int, Meta(ge=0, le=2**32)]
MediaRow = tuple[Offset, Offset, Tokens]
"""Start and end of an image, sound or file in bytes, and its estimated tokens."""

Blocks = Annotated[int, Meta(ge=0, le=2**32)]
Figure = Annotated[float, Meta(ge=-60, le=1e18)]
"""A number of a vector. Ages may be slightly negative. NaN and infinities are out of range.

The tokens that a large fleet computes for a tenant of small weight, over that weight, pass 1e12 within a day.
"""


class Placed(msgspec.Struct, frozen=True, array_like=True, tag=0, gc=False):
    """A prompt was routed to a replica. Has the whole chain, since a part could not be applied without its parent."""

    replica: int  # the writer's own number for it, as in the batch's names
    placement: PlacementId
    epoch: Epoch
    hashes: bytes
    ends: bytes
    prompt_tokens: Tokens
    unix_seconds: float
    source: Annotated[int, Meta(ge=0, le=2**32)] = 0  # a number for the tenant; earlier versions do not write it
    media: Annotated[tuple[MediaRow, ...], Meta(max_length=MAX_MEDIA)] = ()  # nor this

    @property
    def fingerprint(self) -> Fingerprint:
        """The chain. Raises StoreCorrupt if it is empty, truncated, or its boundaries or media do not increase."""
        hashes, ends = array("Q"), array("I")
        try:
            hashes.frombytes(self.hashes)
            ends.frombytes(self.ends)
        except ValueError as error:
            raise StoreCorrupt("a chain is truncated") from error
        if not hashes or len(hashes) != len(ends):
            raise StoreCorrupt("a chain's hashes and ends differ in number")
        if not _increases(ends):
            raise StoreCorrupt("a chain's boundaries do not increase")
        last = 0
        for start, end, _ in self.media:
            if not last <= start < end:
                raise StoreCorrupt("a chain's media do not increase")
            last = end
        return Fingerprint(hashes, ends, self.media)


class TakenBack(msgspec.Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A placement failed before its first token; it created the blocks from `from_block` on."""

    placement: PlacementId
    from_block: Blocks


class Answered(msgspec.Struct, frozen=True, array_like=True, tag=2, gc=False):
    """The token counts that the upstream reported for a placement."""

    placement: PlacementId
    prompt_tokens: Annotated[int, Meta(ge=0, le=MAX_ID)]
    output_tokens: Annotated[int, Meta(ge=0, le=MAX_ID)]
    cached_tokens: Annotated[int, Meta(ge=0, le=MAX_ID)] | None


class Began(msgspec.Struct, frozen=True, array_like=True, tag=3, gc=False):
    """A replica began epoch `epoch` with an empty cache."""

    replica: int
    epoch: Epoch


class Suspected(msgspec.Struct, frozen=True, array_like=True, tag=4, gc=False):
    """A confident prediction found nothing cached. A second one on a different chain means a new epoch."""

    placement: PlacementId
    held_blocks: Blocks


class Owned(msgspec.Struct, frozen=True, array_like=True, tag=6, gc=False):
    """The object `made_id` (a response, a file) exists on a replica."""

    replica: int
    made_id: str


class Budgeted(msgspec.Struct, frozen=True, array_like=True, tag=5, gc=False):
    """A replica's budget changes. With `from_tokens` it applies only if the budget still has that value."""

    replica: int
    from_tokens: Tokens | None
    to_tokens: Budget


class Computed(msgspec.Struct, frozen=True, array_like=True, tag=7, gc=False):
    """The first token of a placement came: its replica has computed the prefix."""

    placement: PlacementId


Delta = Placed | TakenBack | Answered | Began | Suspected | Budgeted | Owned | Computed


class Batch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One entry of the journal's stream. `names` maps the replica numbers of the writing process to names."""

    names: Annotated[dict[int, str], Meta(max_length=MAX_VECTOR_ROWS)]
    deltas: Annotated[list[Delta], Meta(max_length=MAX_DELTAS)]


class Vector(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """All work in flight of one writer: a row of numbers for each replica that has any.

    Writer and reader agree on the meaning of the numbers. `goodbye` marks a writer's last vector.
    """

    number: Annotated[int, Meta(ge=0, le=MAX_ID)]
    rows: Annotated[dict[str, tuple[Figure, ...]], Meta(max_length=MAX_VECTOR_ROWS)]
    goodbye: bool = False


class SnapshotChunk(msgspec.Struct, frozen=True, array_like=True):
    """A part of the index. `names` maps the replica numbers of the writing process to names."""

    names: dict[int, str]
    rows: Sequence[ReplicaRow | RunRow]
    owners: dict[str, str] = {}  # object id to the name of the replica that has it


_encoder = msgspec.msgpack.Encoder()
_batches = msgspec.msgpack.Decoder(Batch)
_vectors = msgspec.msgpack.Decoder(Vector)
_chunks = msgspec.msgpack.Decoder(SnapshotChunk)


def own_head(version: int, writer: str) -> bytes:
    """Return the bytes with which every message of `writer` begins."""
    name = writer.encode()
    if not 0 < len(name) <= MAX_WRITER_BYTES:
        raise ValueError(f"a writer's name must have 1 to {MAX_WRITER_BYTES} bytes")
    return bytes((version, len(name))) + name


def encode_batch(head: bytes, names: Mapping[int, str], deltas: Sequence[Delta]) -> bytes:
    """Encode the payload of one stream entry; `head` comes from `own_head`."""
    return head + _encoder.encode((names, deltas))


def decode_batch(payload: bytes) -> tuple[str, Batch]:
    """Return the writer and its batch. Raises StoreCorrupt.

    Chains are checked when they are used (`Placed.fingerprint`), so that each is converted only once.
    """
    if len(payload) > MAX_ENTRY_BYTES:
        raise StoreCorrupt("a journal entry is too large")
    writer, body = _writer_of(payload, JOURNAL_VERSION, "journal entry")
    return writer, _decode(_batches, body, "journal entry")


def encode_vector(head: bytes, vector: Vector) -> bytes:
    """Encode one message of the in-flight channel."""
    return head + _encoder.encode(vector)


def decode_vector(payload: bytes) -> tuple[str, Vector]:
    """Return the writer and its vector. Raises StoreCorrupt."""
    if len(payload) > MAX_ENTRY_BYTES:
        raise StoreCorrupt("an in-flight vector is too large")
    writer, body = _writer_of(payload, VECTOR_VERSION, "in-flight vector")
    return writer, _decode(_vectors, body, "in-flight vector")


def encode_chunk(chunk: SnapshotChunk) -> bytes:
    """Encode one part of a snapshot."""
    return bytes((SNAPSHOT_VERSION,)) + _encoder.encode(chunk)


def decode_chunk(payload: bytes) -> SnapshotChunk:
    """Decode one part of a snapshot. Raises StoreCorrupt.

    Rows are checked one by one with `is_valid`, so that one bad row does not cost the others of its part.
    """
    if payload[:1] != bytes((SNAPSHOT_VERSION,)):
        raise StoreCorrupt("a snapshot's part is of another version")
    chunk: SnapshotChunk = _decode(_chunks, memoryview(payload)[1:], "snapshot's part")
    return chunk


def is_valid(row: ReplicaRow | RunRow) -> bool:
    """Return whether a row holds only values that an index writes."""
    return _is_valid_run(row) if isinstance(row, RunRow) else _is_valid_replica(row)


def _is_valid_replica(row: ReplicaRow) -> bool:
    return (
        0 <= row.epoch <= MAX_EPOCH
        and 1 <= row.budget_tokens <= UNLIMITED_TOKENS
        and 0 <= row.placed_tokens <= MAX_ID
        and (row.ttl_seconds is None or 0 < row.ttl_seconds < 1e12)
    )


def _is_valid_run(row: RunRow) -> bool:
    blocks, rest = divmod(len(row.hashes), HASH_BYTES)
    if blocks == 0 or rest or not len(row.ends) == len(row.tokens) == 4 * blocks:
        return False
    tokens = array("I", row.tokens)
    return (
        _increases(array("I", row.ends))
        and all(map(le, tokens, islice(tokens, 1, None)))
        and (row.parent is None or 0 <= row.parent < 2**64)
        and 0 <= row.known <= blocks
        and all(0 < pin <= blocks for pin in row.pins)
        and all(map(lt, row.pins, row.pins[1:]))
        and all(
            0 <= holder.stamp < 1e12
            and 0 <= holder.touched_by <= MAX_ID
            and 0 <= holder.confirmed <= blocks
            and 0 <= holder.output_tokens <= MAX_ID
            and all(0 < end <= blocks for end in holder.ends)
            and all(map(lt, holder.ends, holder.ends[1:]))
            for holder in row.holders
        )
    )


def _increases(ends: array[int]) -> bool:
    return ends[0] > 0 and all(map(lt, ends, islice(ends, 1, None)))


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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StoreCorrupt(f"a {what} is damaged") from error

"""Cut a context's content into segments, named by digest, so that equal documents have equal segments. Pure.

A large message is cut separately, so two contexts that share a document share its segments. Bytes between large
messages (separators, short messages) are joined. A `Manifest` names each segment by its BLAKE2b digest and is itself
named by one, so a manifest's digest identifies exactly one content.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import islice
from operator import le

import msgspec
import zstandard

from cache.errors import StoreCorrupt
from cache.index.fingerprint import Fingerprint
from cache.index.hashing import cut

SEGMENT_BYTES = 1024 * 1024
"""Largest segment before compression: small enough not to delay an event loop for long."""

ALONE_BYTES = 16 * 1024
"""Smallest message that is cut separately: sharing a smaller one would save less than its key costs."""

INLINE_BYTES = 1024
"""Bytes between two large messages are stored in the manifest itself if there are fewer than this."""

DIGEST_BYTES = 32
VERSION = 1
CHAINS_AT_MOST = 8
"""Prefix chains kept with a content: one per model, salt and set of template arguments used recently."""

CONTENT_BYTES = 600
CHAIN_BYTES = 450
"""Memory of a kept content in addition to its bytes, and of a chain in addition to its boundaries, as measured."""

MAX_CONTENT_BYTES = 512 * 1024 * 1024
"""Largest content that is read; larger ones cannot be created."""

_LEVEL = 3  # zstd's default: 2 MB of prose become a third in 8 ms; higher levels take twice as long to save a tenth


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """The parts of a content, each a digest with its size, or the bytes themselves.

    `bounds` is an array 'I' with the begin and end of every message within the messages.
    """

    tools: list[tuple[bytes, int] | bytes]
    messages: list[tuple[bytes, int] | bytes]
    bounds: bytes

    def digests(self) -> list[bytes]:
        """Return every segment's digest once, in the order of first use."""
        return list(dict.fromkeys(piece[0] for piece in self._pieces() if not isinstance(piece, bytes)))

    @property
    def size_bytes(self) -> int:
        """Size of the whole content."""
        return sum(len(piece) if isinstance(piece, bytes) else piece[1] for piece in self._pieces())

    def sizes(self) -> dict[bytes, int]:
        """Return the size of each segment by digest."""
        return {piece[0]: piece[1] for piece in self._pieces() if not isinstance(piece, bytes)}

    def _pieces(self) -> Iterator[tuple[bytes, int] | bytes]:
        yield from self.tools
        yield from self.messages


class Packed(msgspec.Struct, frozen=True):
    """A content ready to be stored. `segments` maps digests to views of the given bytes, not compressed yet."""

    manifest: bytes
    digest: bytes
    segments: dict[bytes, memoryview]


class Usage:
    """The memory of several contents, which each of them keeps up to date."""

    __slots__ = ("size_bytes",)

    def __init__(self) -> None:
        self.size_bytes = 0


class Content:
    """The uploaded bytes of a context: `tools` (a JSON array, or empty) and `messages` (without brackets).

    Prefix chains are computed at their first use and kept. `memory_bytes` is an estimate that includes them.
    """

    __slots__ = ("_chains", "_usage", "bounds", "digest", "memory_bytes", "messages", "tools")

    def __init__(self, digest: bytes, tools: bytes, messages: bytes, bounds: array[int]) -> None:
        self.digest = digest
        self.tools = tools
        self.messages = messages
        self.bounds = bounds
        self.memory_bytes = CONTENT_BYTES + self.size_bytes + len(bounds) * bounds.itemsize
        self._usage: Usage | None = None
        self._chains: dict[tuple[int, Hashable], Fingerprint] = {}

    def count_in(self, usage: Usage | None) -> None:
        """Count the memory of this content in `usage` from now on, and no longer where it was counted before."""
        if self._usage is not None:
            self._usage.size_bytes -= self.memory_bytes
        self._usage = usage
        if usage is not None:
            usage.size_bytes += self.memory_bytes

    @property
    def size_bytes(self) -> int:
        """Size of tools and messages."""
        return len(self.tools) + len(self.messages)

    @property
    def span_bytes(self) -> int:
        """Size of tools and messages without separators between messages: the length of a prefix chain."""
        bounds = self.bounds
        return len(self.tools) + sum(bounds[1::2]) - sum(bounds[::2])

    def spans(self) -> list[memoryview]:
        """Return views in the order in which an engine renders them: tools, then each message."""
        views = [memoryview(self.tools)] if self.tools else []
        return views + self.message_views()

    def message_views(self) -> list[memoryview]:
        """Return a view of each message."""
        view, bounds = memoryview(self.messages), self.bounds
        return [view[bounds[at] : bounds[at + 1]] for at in range(0, len(bounds), 2)]

    def chain(
        self,
        root: int,
        arrangement: Hashable = None,
        arrange: Callable[[], Sequence[memoryview | bytes]] | None = None,
    ) -> Fingerprint:
        """Return the prefix chain of the spans from `root`; computed at its first use in this worker.

        `arrange` returns the spans as an engine renders them, by default in the order of `spans`; equal values of
        `arrangement` must mean equal results. The chain is not stored in Redis: reading and checking its 12 KB takes
        as long as hashing 2 MB (0.4 ms).
        """
        chain = self._chains.get((root, arrangement))
        if chain is None:
            if len(self._chains) >= CHAINS_AT_MOST:
                self._grow(-_chain_bytes(self._chains.pop(next(iter(self._chains)))))
            chain = cut(root, self.spans() if arrange is None else arrange())
            self._chains[root, arrangement] = chain
            self._grow(_chain_bytes(chain))
        return chain

    def _grow(self, added_bytes: int) -> None:
        self.memory_bytes += added_bytes
        if self._usage is not None:
            self._usage.size_bytes += added_bytes


def pack(tools: bytes, messages: bytes, bounds: array[int]) -> Packed:
    """Cut a content into segments. `messages` has no brackets; message k is at bounds[2k] to bounds[2k + 1]."""
    segments: dict[bytes, memoryview] = {}
    listed_tools = _pieces([memoryview(tools)] if tools else [], segments)
    listed = _pieces(_runs(memoryview(messages), bounds), segments)
    manifest = bytes((VERSION,)) + msgspec.msgpack.encode(Manifest(listed_tools, listed, bounds.tobytes()))
    return Packed(manifest, _digest(manifest), segments)


def read_manifest(manifest: bytes, digest: bytes) -> Manifest:
    """Decode and check a manifest. Raises StoreCorrupt if it is not the one that `digest` names."""
    if _digest(manifest) != digest or manifest[:1] != bytes((VERSION,)):
        raise StoreCorrupt("a context's manifest is damaged")
    return _decode_manifest(memoryview(manifest)[1:])


def compress(segment: memoryview) -> bytes:
    """Return the stored form of a segment."""
    return bytes((VERSION,)) + zstandard.ZstdCompressor(level=_LEVEL).compress(segment)


def unpack(manifest: Manifest, digest: bytes, stored: Mapping[bytes, bytes | None]) -> Content:
    """Return the content with every segment verified. `digest` is the manifest's.

    Raises StoreCorrupt if a segment is missing or damaged, or the bounds do not fit the messages.
    """
    opened = {name: _open(name, size, stored.get(name)) for name, size in manifest.sizes().items()}
    tools, messages = (
        b"".join([piece if isinstance(piece, bytes) else opened[piece[0]] for piece in pieces])
        for pieces in (manifest.tools, manifest.messages)
    )
    bounds = array("I")
    bounds.frombytes(manifest.bounds)
    if bounds and (bounds[-1] > len(messages) or not all(map(le, bounds, islice(bounds, 1, None)))):
        raise StoreCorrupt("a context's bounds are damaged")
    return Content(digest, tools, messages, bounds)


def _chain_bytes(chain: Fingerprint) -> int:
    return CHAIN_BYTES + len(chain.hashes) * chain.hashes.itemsize + len(chain.ends) * chain.ends.itemsize


def _open(digest: bytes, size: int, stored: bytes | None) -> bytes:
    if stored is None:
        raise StoreCorrupt("a segment of a context is gone")
    if stored[:1] != bytes((VERSION,)) or size > SEGMENT_BYTES:
        raise StoreCorrupt("a segment of a context is of another version")
    try:
        if zstandard.frame_content_size(stored[1:19]) != size:  # a frame header has at most 18 bytes
            raise StoreCorrupt("a segment of a context is damaged")
        raw: bytes = zstandard.ZstdDecompressor().decompress(memoryview(stored)[1:], max_output_size=size)
    except zstandard.ZstdError as error:
        raise StoreCorrupt("a segment of a context is damaged") from error
    if _digest(raw) != digest:
        raise StoreCorrupt("a segment of a context is damaged")
    return raw


def _runs(messages: memoryview, bounds: Sequence[int]) -> Iterator[memoryview]:
    """Yield the messages in pieces, with each large message as a separate piece."""
    start = 0
    for at in range(0, len(bounds), 2):
        begin, end = bounds[at], bounds[at + 1]
        if end - begin >= ALONE_BYTES:
            yield messages[start:begin]
            yield messages[begin:end]
            start = end
    yield messages[start:]


def _pieces(
    runs: Iterator[memoryview] | Sequence[memoryview], segments: dict[bytes, memoryview]
) -> list[tuple[bytes, int] | bytes]:
    pieces: list[tuple[bytes, int] | bytes] = []
    for run in runs:
        if len(run) < INLINE_BYTES:
            if run:
                pieces.append(bytes(run))
            continue
        for start in range(0, len(run), SEGMENT_BYTES):
            segment = run[start : start + SEGMENT_BYTES]
            digest = _digest(segment)
            segments[digest] = segment
            pieces.append((digest, len(segment)))
    return pieces


def _digest(raw: bytes | memoryview) -> bytes:
    return hashlib.blake2b(raw, digest_size=DIGEST_BYTES).digest()


_manifests = msgspec.msgpack.Decoder(Manifest)


def _decode_manifest(encoded: memoryview) -> Manifest:
    try:
        manifest = _manifests.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise StoreCorrupt("a context's manifest is damaged") from error
    sizes = manifest.sizes().values()
    if len(manifest.bounds) % 8 or any(not 0 <= size <= SEGMENT_BYTES for size in sizes):
        raise StoreCorrupt("a context's manifest is damaged")
    if manifest.size_bytes > MAX_CONTENT_BYTES:
        raise StoreCorrupt("a context's manifest is damaged")
    return manifest

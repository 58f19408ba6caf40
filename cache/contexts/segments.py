"""A context's bytes as segments: cut so that a document has the same ones wherever it stands, named by digest.

Pure. It knows bytes, sizes and digests, and neither Redis nor JSON. A large message is cut by itself, so two contexts
that share a document share its segments; what lies between large ones (separators, short messages) is taken
together. What is opened again is checked: a `Manifest` names each piece by its BLAKE2b digest and is itself named by
one, so whoever holds a manifest's digest can be given no other content.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence

import msgspec
import zstandard

from cache.errors import StoreCorrupt
from cache.index.fingerprint import Fingerprint
from cache.index.hashing import cut

SEGMENT_BYTES = 1024 * 1024
"""The most that one value of Redis holds before compression: short enough to hold no event loop up for long."""

ALONE_BYTES = 16 * 1024
"""A message of this size is cut by itself; below, a shared copy would save less than its own key costs."""

INLINE_BYTES = 1024
"""Less than this between two large messages stands in the manifest itself."""

DIGEST_BYTES = 32
VERSION = 1
CHAINS_AT_MOST = 8
"""Chains kept beside a content: one for each model, salt and set of template arguments that asked of late."""

_LEVEL = 3  # zstd's own default: 2 MB of prose in 8 ms to a third; higher levels cost twice for a tenth


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """What a content is made of: each piece a digest with its size, or the bytes themselves.

    `bounds` are the begin and end of every message within the messages, as an array 'I'.
    """

    tools: list[tuple[bytes, int] | bytes]
    messages: list[tuple[bytes, int] | bytes]
    bounds: bytes

    def digests(self) -> list[bytes]:
        """Every segment's digest, once, in order of its first place."""
        return list(dict.fromkeys(piece[0] for piece in self._pieces() if not isinstance(piece, bytes)))

    @property
    def size_bytes(self) -> int:
        """Of the whole content."""
        return sum(len(piece) if isinstance(piece, bytes) else piece[1] for piece in self._pieces())

    def sizes(self) -> dict[bytes, int]:
        """Bytes by digest."""
        return {piece[0]: piece[1] for piece in self._pieces() if not isinstance(piece, bytes)}

    def _pieces(self) -> Iterator[tuple[bytes, int] | bytes]:
        yield from self.tools
        yield from self.messages


class Packed(msgspec.Struct, frozen=True):
    """A content ready to be stored: `segments` are views of what was given, by digest, not compressed yet."""

    manifest: bytes
    digest: bytes
    segments: dict[bytes, memoryview]


class Content:
    """What a stored context puts before a prompt: `tools` (an array, or empty) and `messages` (without brackets).

    Both are the uploaded bytes. Its prefix chains are made at their first use and kept.
    """

    __slots__ = ("_chains", "bounds", "digest", "messages", "tools")

    def __init__(self, digest: bytes, tools: bytes, messages: bytes, bounds: array[int]) -> None:
        self.digest = digest
        self.tools = tools
        self.messages = messages
        self.bounds = bounds
        self._chains: dict[int, Fingerprint] = {}

    @property
    def size_bytes(self) -> int:
        """Of tools and messages."""
        return len(self.tools) + len(self.messages)

    @property
    def span_bytes(self) -> int:
        """Of tools and messages without what stands between messages: as far as a prefix chain reaches."""
        bounds = self.bounds
        return len(self.tools) + sum(bounds[1::2]) - sum(bounds[::2])

    def spans(self) -> list[memoryview]:
        """Views in the order in which an engine renders them: tools, then each message."""
        views = [memoryview(self.tools)] if self.tools else []
        return views + self.message_views()

    def message_views(self) -> list[memoryview]:
        """Each message."""
        view, bounds = memoryview(self.messages), self.bounds
        return [view[bounds[at] : bounds[at + 1]] for at in range(0, len(bounds), 2)]

    def chain(self, root: int) -> Fingerprint:
        """The prefix chain from `root`, as `cut` gives it for the spans; made at its first use in this worker.

        It is not stored in Redis: to read and check the 12 KB of a chain costs no less than to hash 2 MB (0.4 ms).
        """
        chain = self._chains.get(root)
        if chain is None:
            if len(self._chains) >= CHAINS_AT_MOST:
                del self._chains[next(iter(self._chains))]
            chain = self._chains[root] = cut(root, self.spans())
        return chain


def pack(tools: bytes, messages: bytes, bounds: array[int]) -> Packed:
    """Cut and name a content. `messages` stand without brackets, message k from bounds[2k] to bounds[2k + 1]."""
    segments: dict[bytes, memoryview] = {}
    listed_tools = _pieces([memoryview(tools)] if tools else [], segments)
    listed = _pieces(_runs(memoryview(messages), bounds), segments)
    manifest = bytes((VERSION,)) + msgspec.msgpack.encode(Manifest(listed_tools, listed, bounds.tobytes()))
    return Packed(manifest, _digest(manifest), segments)


def read_manifest(manifest: bytes, digest: bytes) -> Manifest:
    """Raises StoreCorrupt where it is not the one that `digest` names."""
    if _digest(manifest) != digest or manifest[:1] != bytes((VERSION,)):
        raise StoreCorrupt("a context's manifest is damaged")
    return _decode_manifest(memoryview(manifest)[1:])


def compress(segment: memoryview) -> bytes:
    """What is stored for a segment."""
    return bytes((VERSION,)) + zstandard.ZstdCompressor(level=_LEVEL).compress(segment)


def unpack(manifest: Manifest, digest: bytes, stored: Mapping[bytes, bytes | None]) -> Content:
    """The content, every segment checked. `digest` is the manifest's.

    Raises StoreCorrupt where a segment is missing or damaged.
    """
    opened = {name: _open(name, size, stored.get(name)) for name, size in manifest.sizes().items()}
    tools, messages = (
        b"".join([piece if isinstance(piece, bytes) else opened[piece[0]] for piece in pieces])
        for pieces in (manifest.tools, manifest.messages)
    )
    bounds = array("I")
    bounds.frombytes(manifest.bounds)
    return Content(digest, tools, messages, bounds)


def _open(digest: bytes, size: int, stored: bytes | None) -> bytes:
    if stored is None:
        raise StoreCorrupt("a segment of a context is gone")
    if stored[:1] != bytes((VERSION,)) or size > SEGMENT_BYTES:
        raise StoreCorrupt("a segment of a context is of another version")
    try:
        if zstandard.frame_content_size(stored[1:19]) != size:  # a frame's head has at most 18 bytes
            raise StoreCorrupt("a segment of a context is damaged")
        raw: bytes = zstandard.ZstdDecompressor().decompress(memoryview(stored)[1:], max_output_size=size)
    except zstandard.ZstdError as error:
        raise StoreCorrupt("a segment of a context is damaged") from error
    if _digest(raw) != digest:
        raise StoreCorrupt("a segment of a context is damaged")
    return raw


def _runs(messages: memoryview, bounds: Sequence[int]) -> Iterator[memoryview]:
    """The messages in pieces that begin and end with each large message."""
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
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreCorrupt("a context's manifest is damaged") from error
    if len(manifest.bounds) % 8:
        raise StoreCorrupt("a context's manifest is damaged")
    return manifest

"""Rows and tags as Redis holds them: damaged ones are refused, and what is remembered of them is bounded."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest

from cache.contexts.memory import Entries, Remembered
from cache.contexts.rows import HEAD_VERSION, ContextRow, ContextStatus, Head, encode_head, read_row, read_tag
from cache.errors import StoreCorrupt

HEAD = Head("m", "name", "", bytes(32), 100, (("image", 5),))
FIELDS = {
    "head": encode_head(HEAD),
    "metadata": msgspec.msgpack.encode({"a": "b"}),
    "created": b"1000",
    "expires": b"9000",
    "status": b"ready",
    "tokens": b"7",
    "error": None,
    "size": b"123",
    "uses": b"2",
    "used": b"2000",
    "value": b"0.5",
    "warming": b"0",
    "pin": b"1",
}


def row(**changed: bytes | None) -> ContextRow | None:
    return read_row("id", list({**FIELDS, **changed}.values()), 5_000)


def test_a_row_is_read_with_its_times_in_seconds() -> None:
    read = row()
    assert read is not None
    assert (read.head, read.tokens, read.size_bytes, read.pinned) == (HEAD, 7, 123, True)
    assert (read.created_unix_seconds, read.expires_unix_seconds, read.as_of_unix_seconds) == (1.0, 9.0, 5.0)
    assert (read.kept.pinned, read.kept.expired, read.kept.size_bytes) == (True, False, 123)
    assert row(head=None) is None, "there is no such context"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head", b""),
        ("head", bytes((HEAD_VERSION + 1,)) + encode_head(HEAD)[1:]),
        ("head", encode_head(msgspec.structs.replace(HEAD, digest=b"short"))),
        ("head", encode_head(msgspec.structs.replace(HEAD, content_bytes=-1))),
        ("head", encode_head(msgspec.structs.replace(HEAD, media=(("image", 2**60),)))),
        ("metadata", b"\x01"),
        ("status", b"odd"),
        ("status", b"\xff"),
        ("tokens", b"nan"),
        ("size", b"9" * 5_000),
        ("created", b"soon"),
        ("error", b"\x01"),
    ],
)
def test_a_damaged_row_is_refused_whichever_field_it_is(field: str, value: bytes) -> None:
    """Another version's, too."""
    with pytest.raises(StoreCorrupt):
        row(**{field: value})


def test_a_tag_is_read_with_its_context_and_its_time() -> None:
    tag = read_tag("t", b"id 1500")
    assert (tag.tag, tag.context_id, tag.created_unix_seconds) == ("t", "id", 1.5)
    for damaged in (b"id soon", b"\xff 1500", b"id nan"):
        with pytest.raises(StoreCorrupt):
            read_tag("t", damaged)


def sized(
    description: str = "", media: int = 0, metadata: dict[str, str] | None = None, number: int = 0
) -> ContextRow:
    head = msgspec.structs.replace(HEAD, description=description, media=(("image", 5_000),) * media)
    fields = {
        "head": encode_head(head),
        "metadata": msgspec.msgpack.encode(metadata or {}),
        "size": b"%d" % (number + 999),
    }
    read = read_row(f"cache-{number:032}", list({**FIELDS, **fields}.values()), 5_000)
    assert read is not None
    return read


def test_remembered_rows_are_bounded_in_bytes_and_the_one_that_was_read_longest_ago_goes_first() -> None:
    """Texts and media count; what is read again or dropped is counted once."""
    small, large = sized(), sized("é" * 500, 100, {"note": "n" * 400})
    assert large.memory_bytes > small.memory_bytes + 12_000
    most = large.memory_bytes + 3 * small.memory_bytes
    entries: Entries[ContextRow] = Entries(most)
    for name in ("large", "one", "two", "three", "large", "one", "four"):
        entries.put("t", name, Remembered(large if name == "large" else small, 1))
    kept = [name for name in ("large", "one", "two", "three", "four") if entries.get("t", name) is not None]
    assert (kept, entries.size_bytes) == (["large", "one", "three", "four"], most)
    entries.drop("t", "large")
    entries.drop("t", "large")
    assert (len(entries), entries.size_bytes) == (3, 3 * small.memory_bytes)


@pytest.mark.parametrize(("media", "length"), [(0, 0), (0, 500), (200, 10)])
def test_the_size_of_a_remembered_row_is_that_of_its_memory(media: int, length: int) -> None:
    """Within a fifth."""
    entries: Entries[ContextRow] = Entries()
    tracemalloc.start()
    try:
        for number in range(200):
            metadata = {f"key {number} {pair}": chr(0x100) * length for pair in range(length // 50)}
            read = sized("d" * length, media, metadata, number)
            entries.put(f"{number:032}", read.id, Remembered(read, 1))
        del read, metadata
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 0.8 * taken < entries.size_bytes < 1.2 * taken


def test_a_context_that_is_warmed_for_too_long_has_failed() -> None:
    for until, status in ((b"9000", ContextStatus.PENDING), (b"4000", ContextStatus.ERROR)):
        read = row(status=b"pending", warming=until)
        assert read is not None
        assert read.status(5.0) is status

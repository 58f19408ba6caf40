"""Rows and tags as Redis holds them: damaged ones are refused, and what is remembered of them is bounded."""

from __future__ import annotations

import msgspec
import pytest

from cache.contexts.memory import ENTRIES_AT_MOST, Entries, Remembered
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


def test_a_worker_remembers_a_bounded_number_of_rows_the_last_read_ones() -> None:
    entries = Entries[int]()
    for number in range(ENTRIES_AT_MOST):
        entries.put("tenant", str(number), Remembered(number, 1))
    entries.put("tenant", "0", Remembered(0, 2))
    entries.put("tenant", "new", Remembered(-1, 2))
    assert [entries.get("tenant", name) is not None for name in ("0", "1", "2", "new")] == [True, False, True, True]


def test_a_context_that_is_warmed_for_too_long_has_failed() -> None:
    for until, status in ((b"9000", ContextStatus.PENDING), (b"4000", ContextStatus.ERROR)):
        read = row(status=b"pending", warming=until)
        assert read is not None
        assert read.status(5.0) is status

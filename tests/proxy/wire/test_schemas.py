"""Structs that are decoded from bodies."""

from __future__ import annotations

import json

import pytest

from proxy.wire.schemas import decode_created, decode_leniently


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"id": "batch_1", "output_file_id": "file_1", "error_file_id": "file_2"}, ["batch_1", "file_1", "file_2"]),
        ({"id": "upload_1", "file": {"id": "file_3", "bytes": 5}}, ["upload_1", "file_3"]),
        ({"id": "batch_1", "output_file_id": None, "file": "text"}, ["batch_1"]),
        ({"id": 7, "error_file_id": ["x"], "file": {"id": ""}}, []),
    ],
)
def test_an_object_names_itself_and_the_files_made_for_it(fields: dict[str, object], ids: list[str]) -> None:
    """A batch has up to two, a finished upload one; what is no text is no id."""
    assert decode_created(json.dumps(fields).encode()).ids() == ids


def test_of_a_long_created_object_only_the_short_members_are_decoded() -> None:
    """A response of 8 MB may be nothing but the values of one of them."""
    long = b"[" + b",".join([b"{}"] * 100_000) + b"]"
    created = decode_created(b'{"id":"file-1","status":%b,"file":%b,"output_file_id":"file-2"}' % (long, long))
    assert (created.ids(), created.status, created.file) == (["file-1", "file-2"], None, None)


@pytest.mark.parametrize(("count", "is_read"), [(1_000, True), (50_000, False)])
def test_invalid_json_with_very_many_values_is_not_read(count: int, is_read: bool) -> None:
    """Python's decoder takes ten times as long for them as for text."""
    body = b'{"x":NaN,"y":[' + b",".join([b"[]"] * count) + b"]}"
    assert (decode_leniently(body, dict) is not None) is is_read

"""Structs that are decoded from bodies."""

from __future__ import annotations

import json

import pytest

from proxy.wire.schemas import decode_created


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

"""The lines of a batch's file are cut as they come, and each is a request whose objects and models are known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.wire.batch_lines import LineReader, line_models, line_references


def line(body: Any, **members: Any) -> bytes:
    """One line."""
    return json.dumps({"custom_id": "1", "body": body, **members}).encode()


@given(
    st.lists(st.sampled_from((b"a", b"\n", b"\r\n", b"\r", b" ", b"\xef\xbb\xbf", b"bc")), max_size=20).map(b"".join),
    st.lists(st.integers(0, 40), max_size=5).map(sorted),
)
def test_the_lines_of_a_file_are_the_same_wherever_it_is_cut(content: bytes, cuts: list[int]) -> None:
    """Blank ones are left out, and a mark of the byte order at the beginning."""
    reader = LineReader()
    found: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
        found += reader.feed(content[start:end])
        assert reader.held_bytes <= len(content)
    found += reader.close()
    assert found == [each for each in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if each.strip()]
    assert reader.held_bytes == 0


def test_a_second_file_of_a_form_begins_anew() -> None:
    """Its mark of the byte order is none of its first line."""
    reader = LineReader()
    for _ in range(2):
        assert reader.feed(b"\xef\xbb\xbfx") == []
        assert reader.held_bytes == 4
        assert reader.close() == [b"x"]


@pytest.mark.parametrize(
    ("url", "is_read"),
    [
        ("/v1/chat/completions", True),
        ("/v4/chat/completions", True),
        ("/chat/completions", True),
        ("/openai/v1/responses", True),
        ("/v1/embeddings", True),
        ("/v1/images/edits", True),
        ("/v1/videos", True),
        ("/v1/responses/resp_1", False),
        ("/v1/threads/t/messages", False),
        ("/v1/chat/completions?x", False),
        ("/v1/chat/completions\n", False),
        ("//host/v1/responses", False),
        ("https://host/v1/responses", False),
        ("/v1/files", False),
        ("", False),
        (None, False),
        (7, False),
    ],
)
def test_a_line_is_sent_to_a_path_that_runs_a_model(url: Any, is_read: bool) -> None:
    """As providers write them; any other might name an object, or be administration."""
    assert (line_references(line({"model": "m"}, url=url)) is not None) is is_read


@pytest.mark.parametrize("method", ["POST", "post", "GET", "DELETE", None, 7])
def test_a_line_is_a_post(method: Any) -> None:
    """Nothing else runs a model."""
    assert (line_references(line({}, method=method)) is not None) is (str(method).upper() == "POST")


def test_what_cannot_be_decoded_names_unknown_objects_and_models() -> None:
    """In the line as a whole, or in a body of many members or values."""
    for each in (b"", b"x", b"[]", b"7", b"{}", line(7), line(None), line({}) + b"{}", b"[" * 100_000):
        assert line_references(each) is None
        assert line_models(each) is None
    with pytest.raises(BadRequest):
        line_references(line({f"k{number}": 1 for number in range(2000)}))
    with pytest.raises(BadRequest):
        line_models(line({"model": "m", "input": [0] * 300_000}))


def test_the_models_of_a_line_are_those_of_its_body() -> None:
    assert line_models(line({"model": "a", "fallbacks": ["b"]})) == {"a", "b"}
    assert line_models(line({})) is None

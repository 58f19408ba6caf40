"""Edits at offsets: the same as parse and insert in meaning, and every other byte untouched."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import Edit, Endpoint
from proxy.wire import splice
from proxy.wire.request import read


def joined(body: bytes, *edits: Edit) -> bytes:
    """The edited body in one piece, its length checked."""
    parts, length = splice.apply(body, edits)
    whole = b"".join(parts)
    assert len(whole) == length
    return whole


def test_without_edits_the_body_itself_is_sent() -> None:
    """No copy, not even a slice."""
    body = b"x" * 100
    parts, length = splice.apply(body, ())
    assert parts[0] is body
    assert length == 100


def test_edits_in_any_order_are_made_at_their_places() -> None:
    """Insertion, replacement, removal."""
    assert joined(b"0123456789", Edit(8, 10, b""), Edit(0, 0, b"<"), Edit(3, 5, b"xyz")) == b"<012xyz567"


@pytest.mark.parametrize(
    "edits", [(Edit(0, 3, b""), Edit(2, 4, b"")), (Edit(0, 99, b""),), (Edit(3, 1, b""),), (Edit(-2, 1, b""),)]
)
def test_edits_that_overlap_or_lie_outside_are_refused(edits) -> None:
    """A wrong offset must not become a wrong prompt."""
    with pytest.raises(ValueError, match=r"^edits overlap or lie outside the body$"):
        splice.apply(b"0123456789", edits)


@given(
    st.sampled_from(["absent", None, {}, {"include_usage": False}, {"include_usage": None, "x": [1.50]}, {"y": "é"}]),
    st.sampled_from([None, 1, 2]),
    st.sampled_from(["", "  ", "\n\t "]),
    st.booleans(),
    st.sampled_from([Endpoint.CHAT, Endpoint.COMPLETIONS]),
)
def test_asking_for_usage_equals_parse_and_insert(options, indent, lead, first, endpoint) -> None:
    """For any body, the spliced one has the same meaning as a parsed and changed one."""
    fields: dict[str, object] = {"model": "m", "messages": [{"content": '{"stream_options":{}}'}], "prompt": "p"}
    fields["stream"] = True
    if options != "absent":
        fields = {"stream_options": options} | fields if first else fields | {"stream_options": options}
    body = (lead + json.dumps(fields, indent=indent, ensure_ascii=False)).encode()
    edit = splice.ask_usage(read(body, endpoint))
    assert edit is not None
    wanted = (options if isinstance(options, dict) else {}) | {"include_usage": True}
    assert json.loads(joined(body, edit)) == fields | {"stream_options": wanted}
    assert joined(body, edit).startswith(body[: edit.start])
    assert joined(body, edit).endswith(body[edit.end :])


@pytest.mark.parametrize(
    "fields", [{}, {"stream": False}, {"stream": True, "stream_options": {"include_usage": True}}]
)
def test_a_body_that_needs_no_edit_gets_none(fields) -> None:
    """Asked for already, or no stream."""
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    assert splice.ask_usage(read(body, Endpoint.CHAT)) is None


def test_a_duplicate_of_the_options_is_edited_where_the_last_stands() -> None:
    """Upstreams read the last."""
    body = b'{"stream_options":{},"model":"m","messages":[],"stream":true,"stream_options":null}'
    edit = splice.ask_usage(read(body, Endpoint.CHAT))
    assert edit is not None
    assert json.loads(joined(body, edit))["stream_options"] == {"include_usage": True}


@given(
    st.binary(max_size=60),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5), st.binary(max_size=4)), max_size=4),
)
def test_any_edits_equal_slicing(body, wanted) -> None:
    """The buffers joined are what slicing gives."""
    edits, at, expected = [], 0, b""
    for start, length, insert in sorted(wanted):
        if start < at or start + length > len(body):
            continue
        edits.append(Edit(start, start + length, insert))
        expected += body[at:start] + insert
        at = start + length
    assert joined(body, *edits) == expected + body[at:]

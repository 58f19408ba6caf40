"""The ids of a response's items are found, however the stream is cut, and only where the upstream wrote them."""

from __future__ import annotations

import json

import pytest

from proxy.wire.item_ids import LINE_BYTES_MOST, StreamedItemIds, item_ids


def event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


ADDED = "response.output_item.added"
STOLEN = {"tools": [{"parameters": {"item": {"id": "stolen"}, "type": ADDED}}]}
STREAM = (
    event("response.created", response=STOLEN)
    + event(ADDED, item={"id": "rs_1", "type": "reasoning"})
    + event("response.output_text.delta", delta=f'"type":"{ADDED}","item":{{"id":"stolen"}}', item_id="stolen")
    + event(ADDED, item={"id": "msg_1", "type": "message"})
    + event(ADDED, item=None)
    + event(ADDED, item={"id": 7})
    + event(ADDED, item={"id": "ci_1", "type": "code_interpreter_call", "container_id": "cntr_1"})
    + event(ADDED, item={"id": "fc_1", "type": "function_call", "container_id": "stolen"})
    + event("response.completed", response=STOLEN)
)


@pytest.mark.parametrize("size", [1, 2, 7, 64, len(STREAM)])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_the_ids_of_added_items_are_found_at_any_cut(size: int, line_end: bytes) -> None:
    """And nothing that a client could have written into its tools, its metadata or the text."""
    stream = STREAM.replace(b"\n", line_end)
    ids = StreamedItemIds()
    found = [each for at in range(0, len(stream), size) for each in ids.feed(stream[at : at + size])]
    assert found == ["rs_1", "msg_1", "ci_1", "cntr_1", "fc_1"]


def test_a_line_without_end_is_not_kept() -> None:
    ids = StreamedItemIds()
    assert ids.feed(b"data: " + b"x" * LINE_BYTES_MOST) == []
    assert ids.feed(b"output_item.added\n") == []
    assert ids.feed(event(ADDED, item={"id": "msg_1"})) == ["msg_1"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"id":"resp_1","output":[{"id":"msg_1"},{"id":null},{}],"tools":[{"id":"stolen"}]}', ["msg_1"]),
        (b'{"output":[{"id":"ci_1","type":"code_interpreter_call","container_id":"c_1"}]}', ["ci_1", "c_1"]),
        (b'{"output":[{"id":"fc_1","type":"function_call","container_id":"stolen"}]}', ["fc_1"]),
        (b'{"output":[{"id":[{"id":"stolen"}],"type":{}},{"id":"msg_1"}]}', ["msg_1"]),
        (b'{"output":[{"id":"msg_1"},%b]}' % b",".join([b"{}"] * 2_000), []),
        (b'{"output":null}', []),
        (b'{"output":7}', []),
        (b"x", []),
        (b"", []),
    ],
)
def test_the_ids_of_a_plain_response_are_those_of_its_output(body: bytes, expected: list[str]) -> None:
    assert item_ids(body) == expected


@pytest.mark.parametrize("data", [b'{"type":"response.output_item.added"', b"[1]", b"\xff"])
def test_an_event_that_cannot_be_read_names_no_item_and_the_next_is_read(data: bytes) -> None:
    ids = StreamedItemIds()
    assert ids.feed(b"data: " + data + b" output_item.added\n\n") == []
    assert ids.feed(event(ADDED, item={"id": "msg_1"})) == ["msg_1"]

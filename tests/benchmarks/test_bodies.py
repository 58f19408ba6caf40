"""Bodies of the benchmarks: exact sizes, valid JSON, each different from the last."""

from __future__ import annotations

import json

import pytest

from benchmarks.common.bodies import Shape, body, stamp, words


@pytest.mark.parametrize("size", [300, 1024, 65_536, 65_537, 65_538, 65_539])
@pytest.mark.parametrize("stream", [False, True])
def test_a_body_has_the_wanted_size_and_is_a_chat_request(size, stream):
    content, _ = body(Shape(size, stream=stream))
    assert len(content) == size
    parsed = json.loads(content)
    assert [message["role"] for message in parsed["messages"]] == ["system", "user"]
    assert parsed.get("stream", False) is stream


def test_stamped_bodies_differ_in_the_last_message_only_and_from_its_start():
    content, offset = body(Shape(8192))
    first = json.loads(content)
    stamp(content, offset, 7)
    second = json.loads(content)
    assert len(content) == 8192
    assert first["messages"][0] == second["messages"][0]
    assert second["messages"][1]["content"].startswith("0000000000000007 ")
    assert not first["messages"][1]["content"].startswith("0000000000000007")


def test_the_shared_share_of_the_text_is_the_same_in_all_bodies():
    parsed = json.loads(body(Shape(100_000, shared_share=0.75))[0])
    shared, own = (len(message["content"]) for message in parsed["messages"])
    assert shared / (shared + own) == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("size", range(1000, 1040))
def test_words_never_end_inside_an_escape(size):
    text = words(size)
    assert len(text) == size
    json.loads(b'"' + text + b'"')


def test_a_size_without_room_is_refused():
    with pytest.raises(ValueError, match="no room"):
        body(Shape(100))

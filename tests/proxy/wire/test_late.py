"""A plain response as the events that an SDK of its dialect understands."""

from __future__ import annotations

import json
from typing import Any

import pytest

from proxy.model import Endpoint
from proxy.wire.events import read_event
from proxy.wire.late import events_of_plain


def events(raw: bytes) -> list[Any]:
    """The JSON of each event, and [DONE] as it is."""
    assert raw.endswith(b"\n\n")
    found = []
    for event in raw[:-2].split(b"\n\n"):
        data = event.rpartition(b"data: ")[2]
        assert b"\n" not in data
        found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return found


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {\n"message": "too long", "type": "t", "code": "c", "param": null}}', "too long"),
        (b'{"error": "flat"}', "flat"),
        (b'{"detail": "of FastAPI"}', "of FastAPI"),
        (b'{"object": "error", "message": "of vLLM", "code": 400}', "of vLLM"),
        (b"<html>busy</html>", "The upstream answered 503 Service Unavailable."),
        (b"", "The upstream answered 503 Service Unavailable."),
        (b'{"error": {"message": 5, "code": 7, "type": [], "param": {}}}', None),
        (b"[1]", "The upstream answered 503 Service Unavailable."),
    ],
)
def test_an_error_is_one_event_in_the_endpoints_own_dialect(
    endpoint: Endpoint, body: bytes, message: str | None
) -> None:
    """This holds for every form of the error; the tap of a stream recognises it as one."""
    raw = events_of_plain(503, body, endpoint, request_id="id")
    (event,) = events(raw)
    assert read_event(raw, endpoint).error
    if message is not None:
        assert (event if endpoint is Endpoint.RESPONSES else event["error"])["message"] == message


def test_the_fields_of_an_error_are_kept() -> None:
    body = b'{"error": {"message": "m", "type": "t", "code": "c", "param": "p", "extra": 1.50}}'
    assert b'"extra":1.50' in events_of_plain(400, body, Endpoint.CHAT)
    (event,) = events(events_of_plain(400, body, Endpoint.RESPONSES))
    assert event == {"type": "error", "code": "c", "message": "m", "param": "p"}


def test_a_chat_answer_is_a_chunk_whose_tool_calls_have_their_index() -> None:
    """Numbers stay as they were written."""
    call = '{"id":"t","type":"function","function":{"name":"f","arguments":"{}"}}'
    body = (
        '{"id":"c","object":"chat.completion","created":1e3,"choices":[{"index":0,"finish_reason":"tool_calls",'
        f'"message":{{"role":"assistant","content":null,"tool_calls":[{call},{call}]}}}}],\n"usage":{{"prompt_tokens":3}}}}'
    )
    raw = events_of_plain(200, body.encode(), Endpoint.CHAT)
    chunk, done = events(raw)
    assert done == "[DONE]"
    assert chunk["object"] == "chat.completion.chunk"
    assert [each["index"] for each in chunk["choices"][0]["delta"]["tool_calls"]] == [0, 1]
    assert chunk["choices"][0]["finish_reason"] == "tool_calls"
    assert chunk["usage"] == {"prompt_tokens": 3}
    assert b'"created":1e3' in raw


def test_a_completion_is_a_chunk_as_it_is() -> None:
    chunk, done = events(events_of_plain(200, b'{"choices":[{"text":"a"}]}', Endpoint.COMPLETIONS))
    assert (chunk["choices"][0]["text"], done) == ("a", "[DONE]")


def test_a_response_begins_brings_each_item_and_ends() -> None:
    """With the events that the SDK's accumulator needs before a text."""
    output = [
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "message", "id": "m", "content": [{"type": "output_text", "text": "a"}, {"type": "refusal"}]},
    ]
    body = json.dumps({"id": "resp", "object": "response", "status": "completed", "output": output, "usage": {}})
    found = events(events_of_plain(200, body.encode(), Endpoint.RESPONSES))
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created",
        "output_item.added", "output_item.done",
        "output_item.added",
        "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "content_part.added", "content_part.done",
        "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in found] == list(range(12))
    assert (found[0]["response"]["id"], found[0]["response"]["output"]) == ("resp", [])
    assert found[0]["response"]["usage"] is None, "it would be counted twice"
    assert found[3]["item"]["content"] == []
    assert (found[5]["delta"], found[5]["output_index"], found[5]["item_id"]) == ("a", 1, "m")
    assert found[10]["item"] == output[1]
    assert found[11]["response"]["output"] == output


def test_a_message_is_its_blocks_in_deltas() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1.0}},
        {"type": "server_tool_result", "content": []},
    ]
    body = json.dumps(
        {"type": "message", "content": blocks, "stop_reason": "tool_use", "usage": {"output_tokens": 2}}
    )
    found = events(events_of_plain(200, body.encode(), Endpoint.MESSAGES))
    assert found[0]["type"] == "message_start"
    assert found[0]["message"]["content"] == []
    deltas = [event["delta"] for event in found if event["type"] == "content_block_delta"]
    assert [delta["type"] for delta in deltas] == [
        "thinking_delta", "signature_delta", "text_delta", "input_json_delta",
    ]  # fmt: skip
    assert json.loads(deltas[3]["partial_json"]) == {"x": 1.0}
    assert [event["type"] for event in found[-2:]] == ["message_delta", "message_stop"]
    assert found[-2]["delta"]["stop_reason"] == "tool_use"
    assert found[-2]["usage"] == {"output_tokens": 2}


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.RESPONSES, Endpoint.MESSAGES])
@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"{}", b'{"choices":[{}]}', b'{"output":3}', b'{"content":[{}]}']
)
def test_a_success_that_is_no_answer_is_an_error_event(endpoint: Endpoint, body: bytes) -> None:
    raw = events_of_plain(200, body, endpoint)
    assert read_event(raw, endpoint).error
    assert b'"the upstream answered a request for a stream with something else"' in raw


def test_a_message_begins_without_the_reason_of_its_end_and_a_text_ends_with_its_fields() -> None:
    """An accumulator starts from the first event, and SDKs read `logprobs` of both events of a text."""
    body = json.dumps({"type": "message", "content": [], "stop_reason": "end_turn", "stop_sequence": "x"}).encode()
    begun = events(events_of_plain(200, body, Endpoint.MESSAGES))[0]["message"]
    assert begun == {"type": "message", "content": [], "stop_reason": None, "stop_sequence": None}
    output = [{"type": "message", "id": "m", "content": [{"type": "output_text", "text": "a", "annotations": []}]}]
    found = events(events_of_plain(200, json.dumps({"output": output}).encode(), Endpoint.RESPONSES))
    delta, done = (event for event in found if "output_text" in event["type"])
    place = {"item_id": "m", "output_index": 0, "content_index": 0, "logprobs": []}
    assert delta == {"type": "response.output_text.delta", **place, "delta": "a", "sequence_number": 3}
    assert done == {"type": "response.output_text.done", **place, "text": "a", "sequence_number": 4}


@pytest.mark.parametrize("status", [422, 499])
def test_an_error_that_says_nothing_is_told_by_its_status(status: int) -> None:
    """In every dialect, with a message that is no empty text."""
    for body in (b'{"error":{"message":""}}', b"{}"):
        (event,) = events(events_of_plain(status, body, Endpoint.RESPONSES))
        assert str(status) in event["message"]
        assert event["code"] == str(status)


def test_an_answer_with_an_error_and_no_choices_is_passed_on_as_an_event() -> None:
    (event,) = events(events_of_plain(200, b'{"error":{"message":"out of memory"}}', Endpoint.CHAT))
    assert event == {"error": {"message": "out of memory"}}


def test_a_chat_message_without_tool_calls_has_none_in_its_chunk() -> None:
    """Null stays null."""
    body = b'{"choices":[{"message":{"content":"a","tool_calls":null}},{"message":{"content":"b"}}]}'
    chunk, _ = events(events_of_plain(200, body, Endpoint.CHAT))
    assert [choice["delta"] for choice in chunk["choices"]] == [
        {"content": "a", "tool_calls": None},
        {"content": "b"},
    ]

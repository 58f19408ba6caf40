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


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.CHAT, b'{"choices":[%b]}' % b",".join([b'{"message":{}}'] * 1_001)),
        (Endpoint.CHAT, b'{"choices":[{"message":{"tool_calls":[%b]}}]}' % b",".join([b"{}"] * 1_001)),
        (Endpoint.RESPONSES, b'{"output":[%b]}' % b",".join([b"{}"] * 1_001)),
        (Endpoint.RESPONSES, b'{"output":[{"content":[%b]}]}' % b",".join([b"{}"] * 9_000)),
        (Endpoint.MESSAGES, b'{"content":[%b]}' % b",".join([b'{"type":"x"}'] * 1_001)),
        (Endpoint.CHAT, b'{"x":[%b],"choices":[]}' % b",".join([b"{}"] * 200_001)),
    ],
)
def test_an_answer_that_would_become_very_many_events_is_an_error_event(endpoint: Endpoint, body: bytes) -> None:
    """A megabyte of empty items became ninety of events, in six seconds."""
    raw = events_of_plain(200, body, endpoint)
    assert read_event(raw, endpoint).error
    assert len(raw) < 500


def test_the_text_of_a_very_long_error_is_not_looked_for() -> None:
    """It could hold a million values."""
    body = b'{"error":{"message":"m","x":"%b"}}' % (b"x" * 300_000)
    (event,) = events(events_of_plain(500, body, Endpoint.CHAT))
    assert event["error"]["message"] == "The upstream answered 500 Internal Server Error."


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


def test_the_events_of_a_message_are_these() -> None:
    """To the byte: SDKs read each of these fields."""
    body = {
        "type": "message",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "s"},
            {"type": "tool_use", "id": "t", "name": "f", "input": {"x": 1}},
            {"type": "image"},
        ],
        "stop_reason": "end_turn",
        "stop_sequence": "x",
        "usage": {"output_tokens": 2},
    }
    raw = json.dumps(body, indent=1).encode()
    assert events_of_plain(200, raw, Endpoint.MESSAGES).decode().split("\n\n")[:-1] == [
        'event: message_start\ndata: {"type":"message_start","message":{"type":"message","content":[],'
        '"stop_reason":null,"stop_sequence":null,"usage":{"output_tokens":2}}}',
        'event: content_block_start\ndata: {"type":"content_block_start","index":0,"content_block":'
        '{"type":"thinking","thinking":"","signature":""}}',
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
        '{"type":"thinking_delta","thinking":"hm"}}',
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
        '{"type":"signature_delta","signature":"s"}}',
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}',
        'event: content_block_start\ndata: {"type":"content_block_start","index":1,"content_block":'
        '{"type":"tool_use","id":"t","name":"f","input":{}}}',
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":1,"delta":'
        '{"type":"input_json_delta","partial_json":"{\\"x\\": 1}"}}'.replace('\\"x\\": 1', '\\n    \\"x\\": 1\\n   '),
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":1}',
        'event: content_block_start\ndata: {"type":"content_block_start","index":2,"content_block":{"type":"image"}}',
        'event: content_block_stop\ndata: {"type":"content_block_stop","index":2}',
        'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":"x"},'
        '"usage":{"output_tokens":2}}',
        'event: message_stop\ndata: {"type":"message_stop"}',
    ]


def test_the_events_of_a_response_are_these() -> None:
    """Items without content and parts without text are sent as they are."""
    body = {
        "id": "r",
        "status": "completed",
        "usage": {"input_tokens": 1},
        "output": [
            {"type": "message", "id": "m", "status": "completed", "content": [{"type": "refusal", "refusal": "no"}]},
            {"type": "reasoning", "status": "completed"},
        ],
    }
    raw = json.dumps(body, separators=(",", ":"))
    message, reasoning = (json.dumps(item, separators=(",", ":")) for item in body["output"])
    names = ["created", "output_item.added", "content_part.added", "content_part.done", "output_item.done"]
    names += ["output_item.added", "output_item.done", "completed"]
    place = '"item_id":"m","output_index":0,"content_index":0,"part":{"type":"refusal","refusal":"no"}'
    begun = message.replace("completed", "in_progress").replace('[{"type":"refusal","refusal":"no"}]', "[]")
    fields = [
        '"response":{"id":"r","status":"in_progress","usage":null,"output":[]}',
        f'"output_index":0,"item":{begun}',
        place,
        place,
        f'"output_index":0,"item":{message}',
        f'"output_index":1,"item":{reasoning}',
        f'"output_index":1,"item":{reasoning}',
        f'"response":{raw}',
    ]
    assert events_of_plain(200, raw.encode(), Endpoint.RESPONSES).decode().split("\n\n")[:-1] == [
        f'event: response.{name}\ndata: {{"type":"response.{name}",{rest},"sequence_number":{number}}}'
        for number, (name, rest) in enumerate(zip(names, fields, strict=True))
    ]


def test_the_events_of_a_chat_and_of_a_completion_are_these() -> None:
    """A tool call without an index gets its place as one; a null instead of calls stays."""
    calls = '[{"id":"a"},{"index":7,"id":"b"}]'
    chat = (
        '{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"content":"x","tool_calls":CALLS},'
        '"finish_reason":"stop"},{"index":1,"message":{"tool_calls":null}}],"usage":{"prompt_tokens":1}}'
    ).replace("CALLS", calls)
    assert events_of_plain(200, chat.encode(), Endpoint.CHAT) == (
        b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"delta":{"content":"x","tool_calls":'
        b'[{"index":0,"id":"a"},{"index":7,"id":"b"}]},"index":0,"finish_reason":"stop"},'
        b'{"delta":{"tool_calls":null},"index":1}],"usage":{"prompt_tokens":1}}\n\ndata: [DONE]\n\n'
    )
    completion = b'{"object":"text_completion", "choices":[{"text":"x"}]}'
    assert events_of_plain(299, completion, Endpoint.COMPLETIONS) == (
        b'data: {"object":"text_completion","choices":[{"text":"x"}]}\n\ndata: [DONE]\n\n'
    )


@pytest.mark.parametrize(
    ("status", "body", "endpoint", "text"),
    [
        (503, b'{"error": {"message": "m"}}', Endpoint.CHAT, b'data: {"error":{"message":"m"}}\n\n'),
        (
            503,
            b'{"type":"error","error": {"type": "t"}}',
            Endpoint.MESSAGES,
            b'event: error\ndata: {"type":"error","error":{"type":"t"}}\n\n',
        ),
        (
            300,
            b'{"error": {"message": "m", "code": 7, "param": "p", "type": "t"}}',
            Endpoint.RESPONSES,
            b'event: error\ndata: {"type":"error","code":"7","message":"m","param":"p"}\n\n',
        ),
        (
            503,
            b'{"error": {"param": 7}}',
            Endpoint.RESPONSES,
            b'event: error\ndata: {"type":"error","code":"503","message":"The upstream answered 503 Service '
            b'Unavailable.","param":null}\n\n',
        ),
        (
            503,
            b'{"detail": "busy"}',
            Endpoint.CHAT,
            b'data: {"error":{"message":"busy","type":"upstream_error","param":null,"code":"503"}}\n\n',
        ),
        (
            599,
            b"<html>",
            Endpoint.CHAT,
            b'data: {"error":{"message":"The upstream answered 599 .","type":"upstream_error","param":null,'
            b'"code":"599"}}\n\n',
        ),
    ],
)
def test_the_event_of_an_error_is_this(status: int, body: bytes, endpoint: Endpoint, text: bytes) -> None:
    """Its own fields if it has them, else the first text that says something, else its status."""
    assert events_of_plain(status, body, endpoint) == text

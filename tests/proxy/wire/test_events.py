"""A single event of a stream reports tokens, the end, an error, the usage."""

from __future__ import annotations

import pytest

from proxy.model import Endpoint
from proxy.wire.events import NOTHING, data_of, read_event
from proxy.wire.schemas import EventRead

CHAT, RESPONSES, MESSAGES = Endpoint.CHAT, Endpoint.RESPONSES, Endpoint.MESSAGES
USAGE = {"prompt_tokens": 1, "completion_tokens": 2}
USAGE_TEXT = b'{"prompt_tokens":1,"completion_tokens":2}'


@pytest.mark.parametrize(
    ("endpoint", "payload", "read"),
    [
        (CHAT, b"[DONE]", EventRead(finished=True)),
        (CHAT, b"7", NOTHING),
        (CHAT, b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', EventRead()),
        (CHAT, b'{"choices":[{"delta":{"content":"a"}}]}', EventRead(token=True)),
        (CHAT, b'{"choices":[{"text":"a"}]}', EventRead(token=True)),
        (CHAT, b'{"choices":[{"delta":{},"finish_reason":"stop"}]}', EventRead(finished=True)),
        (CHAT, b'{"choices":[{"delta":{},"finish_reason":"error"}]}', EventRead(finished=True, error=True)),
        (CHAT, b'{"choices":[],"usage":%b}' % USAGE_TEXT, EventRead(extra=True, usage=USAGE)),
        (CHAT, b'{"choices":[],"usage":null}', EventRead()),
        (CHAT, b'{"choices":[{"delta":{},"usage":%b}]}' % USAGE_TEXT, EventRead(usage=USAGE)),
        (CHAT, b'{"x_groq":{"usage":%b}}' % USAGE_TEXT, EventRead(usage=USAGE)),
        (CHAT, b'{"x_groq":{"error":"busy"}}', EventRead(error=True)),
        (CHAT, b'{"error":{"code":5}}', EventRead(error=True)),
        (CHAT, b'{"object":"error"}', EventRead(error=True)),
        (CHAT, b'{"type":"error"}', EventRead(error=True)),
        (RESPONSES, b'{"type":"response.output_text.delta","delta":"a"}', EventRead(token=True)),
        (RESPONSES, b'{"type":"response.created","response":{}}', EventRead()),
        (
            RESPONSES,
            b'{"type":"response.completed","response":{"usage":%b,"service_tier":"flex","model":"m"}}' % USAGE_TEXT,
            EventRead(finished=True, usage=USAGE, service_tier="flex", model="m"),
        ),
        (RESPONSES, b'{"type":"response.incomplete"}', EventRead(finished=True)),
        (
            RESPONSES,
            b'{"type":"response.done","response":{"usage":%b}}' % USAGE_TEXT,
            EventRead(finished=True, usage=USAGE),
        ),
        (RESPONSES, b'{"type":"response.failed"}', EventRead(finished=True, error=True)),
        (RESPONSES, b'{"type":"error","message":"m"}', EventRead(error=True)),
        (RESPONSES, b'{"type":"x","error":{"code":5}}', EventRead(error=True)),
        (RESPONSES, b'{"type":"x","response":{"error":{"code":5}}}', EventRead(error=True)),
        (MESSAGES, b'{"type":"content_block_delta"}', EventRead(token=True)),
        (MESSAGES, b'{"type":"message_stop"}', EventRead(finished=True)),
        (MESSAGES, b'{"type":"error"}', EventRead(error=True)),
        (MESSAGES, b'{"type":"x","error":{"type":"overloaded_error"}}', EventRead(error=True)),
        (MESSAGES, b'{"type":"message_start","message":{"usage":%b}}' % USAGE_TEXT, EventRead(usage=USAGE)),
        (MESSAGES, b'{"type":"message_delta","usage":%b}' % USAGE_TEXT, EventRead(usage=USAGE)),
        (MESSAGES, b'{"type":"x","usage":%b,"message":{"usage":{}}}' % USAGE_TEXT, EventRead(usage=USAGE)),
    ],
)
def test_an_event_reports_this_and_nothing_else(endpoint: Endpoint, payload: bytes, read: EventRead) -> None:
    """However its lines end, and with comments, an id or another name around it."""
    for event in (
        b"data: %b\n\n",
        b"data:%b\r\n\r\n",
        b": busy\ndata: %b\n\n",
        b"id: 7\nevent: x\ndata: %b",
        b"\xef\xbb\xbfdata: %b\n\n",
    ):
        assert read_event(event % payload, endpoint) == read, event


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES])
def test_an_event_with_a_name_of_an_error_is_one_whatever_its_data_is(endpoint: Endpoint) -> None:
    assert read_event(b"event: error\ndata: busy\n\n", endpoint).error
    assert not read_event(b"event: ping\ndata: busy\n\n", endpoint).error


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES])
def test_the_usage_of_an_event_that_cannot_be_read_is_found_all_the_same(endpoint: Endpoint) -> None:
    """Its other facts are unknown."""
    for payload in (b'{"usage":%b', b'{"x":\xff}{,"usage":%b'):
        assert read_event(b"data: " + payload % USAGE_TEXT, endpoint) == EventRead(usage=USAGE)
    assert read_event(b'data: {"choices":', endpoint) == NOTHING


_ERRORS = [
    b'{"error":{"message":"sick","code":500}}',
    b'{"error":"sick"}',
    b'{"object":"error","message":"sick","type":"InternalServerError","param":null,"code":500}',
    b'{"type":"error","message":"sick"}',
    b'{"code":500,"message":"sick"}',
    b'{"detail":"sick"}',
    b'[{"error":{"message":"sick","status":"UNAVAILABLE"}}]',
]


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES, Endpoint.COMPLETIONS, Endpoint.INFERENCE])
@pytest.mark.parametrize("error", _ERRORS)
def test_an_error_of_any_server_is_one_in_every_dialect(endpoint: Endpoint, error: bytes) -> None:
    """Gateways pass on what the server behind them writes, whatever dialect they speak themselves."""
    assert read_event(b"data: %b\n\n" % error, endpoint) == EventRead(error=True)


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES, MESSAGES])
def test_an_error_outside_the_format_is_one(endpoint: Endpoint) -> None:
    """Older llama.cpp has a field of its own for it, and Gemini writes it as if it were a plain response."""
    assert read_event(b'error: {"code":500,"message":"sick"}\n\n', endpoint).error
    assert read_event(b'\n{\n  "error": {\n    "code": 503\n  }\n}\n', endpoint).error
    assert not read_event(b'{"x": "no error"}\n\n', endpoint).error
    assert not read_event(b": error: {\n\n", endpoint).error


@pytest.mark.parametrize(
    ("endpoint", "payload"),
    [
        (CHAT, b'{"id":"c","message":"queued"}'),
        (CHAT, b'{"type":"transcript.text.segment","message":"a"}'),
        (RESPONSES, b'{"type":"response.queued","message":"a"}'),
        (MESSAGES, b'{"type":"ping","message":"a"}'),
        (MESSAGES, b'{"type":"message_start","message":{"detail":"a"}}'),
    ],
)
def test_a_message_beside_something_else_is_no_error(endpoint: Endpoint, payload: bytes) -> None:
    assert read_event(b"data: %b\n\n" % payload, endpoint) == NOTHING


def test_the_data_of_an_event_are_its_lines_in_their_order() -> None:
    """One space behind the colon belongs to the format."""
    assert data_of(b"data: a\ndata:b\nid: 1\ndata:  c\n\n") == b"a\nb\n c"
    assert data_of(b": comment\n\n") == b""

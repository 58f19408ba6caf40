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
            b'{"type":"response.completed","response":{"usage":%b,"service_tier":"flex"}}' % USAGE_TEXT,
            EventRead(finished=True, usage=USAGE, service_tier="flex"),
        ),
        (RESPONSES, b'{"type":"response.incomplete"}', EventRead(finished=True)),
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


def test_the_data_of_an_event_are_its_lines_in_their_order() -> None:
    """One space behind the colon belongs to the format."""
    assert data_of(b"data: a\ndata:b\nid: 1\ndata:  c\n\n") == b"a\nb\n c"
    assert data_of(b": comment\n\n") == b""

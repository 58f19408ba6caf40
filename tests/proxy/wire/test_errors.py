"""Errors in the shape that each surface's clients read."""

from __future__ import annotations

import json

import pytest

from proxy.errors import BadRequest, CairnError, Overloaded, ResetMidResponse, Unauthorized
from proxy.model import Endpoint
from proxy.wire.errors import error_event, error_response
from proxy.wire.sse import StreamTap


def test_an_error_has_openai_s_shape() -> None:
    """All four members, null where there is nothing to say."""
    answer = error_response(BadRequest("model is missing", param="model"), Endpoint.CHAT)
    assert answer.status == 400
    assert answer.headers == ((b"content-type", b"application/json"),)
    error = {"message": "model is missing", "type": "invalid_request_error", "param": "model", "code": None}
    assert json.loads(answer.body) == {"error": error}


def test_an_error_on_messages_has_anthropic_s_shape() -> None:
    """Its clients choose their exception by the type."""
    answer = error_response(Unauthorized("no such key"), Endpoint.MESSAGES, request_id="r1")
    assert (b"www-authenticate", b"Bearer") in answer.headers
    assert json.loads(answer.body) == {
        "type": "error",
        "error": {"type": "authentication_error", "message": "no such key"},
        "request_id": "r1",
    }


@pytest.mark.parametrize(("seconds", "value"), [(0.0, b"1"), (1.2, b"2"), (30.0, b"30")])
def test_when_to_try_again_is_told_in_whole_seconds(seconds, value) -> None:
    """Never zero, never early."""
    answer = error_response(Overloaded("none", retry_after_seconds=seconds), Endpoint.CHAT)
    assert dict(answer.headers)[b"retry-after"] == value


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS, Endpoint.RESPONSES, Endpoint.MESSAGES])
@pytest.mark.parametrize("mid_event", [False, True])
def test_a_broken_stream_ends_with_an_event_that_is_read_as_an_error(endpoint, mid_event) -> None:
    """Our own tap takes the place of a client's parser."""
    tap = StreamTap(endpoint)
    if mid_event:
        tap.feed(b'data: {"cho')
    tap.feed(error_event(ResetMidResponse("gone \n\n data: x"), endpoint, mid_event=tap.mid_event))
    assert tap.error_seen
    assert not tap.mid_event
    assert not tap.finished


def test_a_message_cannot_break_out_of_its_json() -> None:
    """Quotes and line breaks are escaped."""
    answer = error_response(CairnError('a"b\r\n'), Endpoint.CHAT)
    assert json.loads(answer.body)["error"]["message"] == 'a"b\r\n'

"""The kind of a body is found from its beginning, however it is cut."""

from __future__ import annotations

import asyncio

import pytest

from proxy.errors import ResetMidResponse
from proxy.model import Endpoint
from proxy.pipeline.opening import Opening, is_unfinished, judge, judge_plain, wait_for_opening
from tests.proxy.pipeline.bench import Upstream, turns
from tests.support.clock import FakeClock

CHUNK = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'

NO_TOKENS = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":0,"total_tokens":9}}\n\n'

# name: (body, dialect, what it is once it is there)
BODIES: dict[str, tuple[bytes, Endpoint, Opening]] = {
    "a chunk": (CHUNK, Endpoint.CHAT, Opening.STREAM),
    "a chunk that speaks of errors": (CHUNK.replace(b'"a"', b'"error"'), Endpoint.CHAT, Opening.STREAM),
    "done at once": (b"data: [DONE]\n\n", Endpoint.CHAT, Opening.NO_TOKENS),
    "done at once, after a comment": (b": busy\n\ndata: [DONE]\r\n\r\n", Endpoint.CHAT, Opening.NO_TOKENS),
    "nothing but usage": (NO_TOKENS + b"data: [DONE]\n\n", Endpoint.CHAT, Opening.NO_TOKENS),
    "usage, then a chunk": (NO_TOKENS + CHUNK, Endpoint.CHAT, Opening.STREAM),
    "usage of tokens that are not shown": (
        NO_TOKENS.replace(b'_tokens":0', b'_tokens":4') + b"data: [DONE]\n\n", Endpoint.CHAT, Opening.STREAM,
    ),
    "results of a filter": (b'data: {"choices":[],"prompt_filter_results":[]}\n\n', Endpoint.CHAT, Opening.STREAM),
    "an end of other streams": (b"data: [DONE]\n\n", Endpoint.INFERENCE, Opening.STREAM),
    "a comment, then a chunk": (b": busy\n\n" + CHUNK, Endpoint.CHAT, Opening.STREAM),
    "CRLF": (CHUNK.replace(b"\n", b"\r\n"), Endpoint.CHAT, Opening.STREAM),
    "CR": (CHUNK.replace(b"\n", b"\r"), Endpoint.CHAT, Opening.STREAM),
    "a byte order mark": (b"\xef\xbb\xbf" + CHUNK, Endpoint.CHAT, Opening.STREAM),
    "an id and a retry first": (b"retry: 5\nid: 1\n" + CHUNK, Endpoint.CHAT, Opening.STREAM),
    "a message's start": (
        b'event: message_start\ndata: {"type": "message_start"}\n\n', Endpoint.MESSAGES, Opening.STREAM,
    ),
    "an error of chat": (b'data: {"error": {"message": "m"}}\n\n', Endpoint.CHAT, Opening.ERROR),
    "an error with CRLF": (b'data: {"error": {"message": "m"}}\r\n\r\n', Endpoint.CHAT, Opening.ERROR),
    "an error behind comments": (b': a\n\n: b\n\ndata: {"error": {"code": 5}}\n\n', Endpoint.CHAT, Opening.ERROR),
    "an error of responses": (
        b'event: error\ndata: {"type": "error", "message": "m"}\n\n', Endpoint.RESPONSES, Opening.ERROR,
    ),
    "an event named error": (b"event: error\ndata: busy\n\n", Endpoint.CHAT, Opening.ERROR),
    "named so behind its data": (b'data: {"message": "m"}\nevent:error\n\n', Endpoint.MESSAGES, Opening.ERROR),
    "named so behind a mark": (b"\xef\xbb\xbfevent: error\r\ndata: {}\r\n\r\n", Endpoint.CHAT, Opening.ERROR),
    "an object named error": (b'data: {"object":"error","message":"m"}\n\n', Endpoint.CHAT, Opening.ERROR),
    "an error of Groq": (b'data: {"x_groq":{"error":"busy"}}\n\n', Endpoint.CHAT, Opening.ERROR),
    "a choice that failed": (
        b'data: {"choices":[{"delta":{},"finish_reason":"error"}]}\n\n', Endpoint.CHAT, Opening.ERROR,
    ),
    "a failed response": (
        b'event: response.failed\ndata: {"type": "response.failed", "response": {"error": {}}}\n\n',
        Endpoint.RESPONSES, Opening.ERROR,
    ),
    "an error behind a ping": (
        b'event: ping\ndata: {"type": "ping"}\n\nevent: error\ndata: {"type": "error", "error": {}}\n\n',
        Endpoint.MESSAGES, Opening.ERROR,
    ),
    "JSON": (b'{"choices": []}', Endpoint.CHAT, Opening.PLAIN),
    "JSON behind white space": (b'\n  {"choices": []}', Endpoint.CHAT, Opening.PLAIN),
    "HTML": (b"<!doctype html>", Endpoint.CHAT, Opening.PLAIN),
    "text": (b"busy, come again", Endpoint.CHAT, Opening.PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_whole_first_event_decides_and_a_part_of_it_does_not(name: str) -> None:
    """At no cut is a stream taken for plain, an error for none, or the other way round."""
    body, endpoint, opening = BODIES[name]
    assert judge(body, endpoint, complete=False) is opening
    assert judge(body, endpoint, complete=True) is opening
    for cut in range(len(body)):
        assert judge(body[:cut], endpoint, complete=False) in (Opening.UNDECIDED, opening), cut


@pytest.mark.parametrize("body", [b"", b"\n", b"\xef\xbb\xbf", b": busy\n\n", b"event: ping\n\n", CHUNK[:-9]])
def test_a_body_that_ends_before_its_first_event_is_empty(body: bytes) -> None:
    """Nothing in it is an answer, whether it has comments or a part of an event."""
    assert judge(body, Endpoint.CHAT, complete=False) is Opening.UNDECIDED
    assert judge(body, Endpoint.CHAT, complete=True) is Opening.EMPTY


def test_an_event_whose_last_line_has_no_end_is_read() -> None:
    """Some servers close the connection in place of the blank line."""
    assert judge(CHUNK[:-2], Endpoint.CHAT, complete=True) is Opening.STREAM
    assert judge(b"data: [DONE]", Endpoint.CHAT, complete=True) is Opening.NO_TOKENS
    assert judge(NO_TOKENS + b": busy\n\n", Endpoint.CHAT, complete=True) is Opening.NO_TOKENS
    assert judge(NO_TOKENS + CHUNK[:-2], Endpoint.CHAT, complete=True) is Opening.STREAM
    assert judge(b'data: {"error": {"message": "m"}}', Endpoint.CHAT, complete=True) is Opening.ERROR


@pytest.mark.parametrize(
    ("body", "endpoint", "opening"),
    [
        (b'{"choices":[],"error":null}', Endpoint.CHAT, Opening.PLAIN),
        (b'{"choices":[{"message":{"content":"say \\"error\\": 1"}}]}', Endpoint.CHAT, Opening.PLAIN),
        (b'{"id":"resp_1","output":[],"error":null,"usage":{"input_tokens":1}}', Endpoint.RESPONSES, Opening.PLAIN),
        (b' {"error":{"message":"m"}}', Endpoint.CHAT, Opening.ERROR_BODY),
        (b'{"error":"busy"}', Endpoint.INFERENCE, Opening.ERROR_BODY),
        (b'{"object":"error","message":"m","code":500}', Endpoint.CHAT, Opening.ERROR_BODY),
        (b'{"type":"error","error":{"type":"overloaded_error"}}', Endpoint.MESSAGES, Opening.ERROR_BODY),
        (b'[{"error":{"code":503}}]', Endpoint.CHAT, Opening.ERROR_BODY),
        (b"<html>busy</html>", Endpoint.EMBEDDINGS, Opening.HTML),
        (b"\n<!DOCTYPE html>", Endpoint.INFERENCE, Opening.HTML),
        (b"busy", Endpoint.CHAT, Opening.ERROR_BODY),
        (b'{"detail":"the model is loading"}', Endpoint.CHAT, Opening.ERROR_BODY),
        (b'{"message":"no"}', Endpoint.EMBEDDINGS, Opening.ERROR_BODY),
        (b'{"status":"loading model"}', Endpoint.MESSAGES, Opening.ERROR_BODY),
        (b'{"status":"completed","id":"resp_1"}', Endpoint.RESPONSES, Opening.PLAIN),
        (b'{"choices":[{"message":{"content":"a"}}]}', Endpoint.CHAT, Opening.PLAIN),
        (b'{"status":"loading a file"}', Endpoint.INFERENCE, Opening.PLAIN),
        (b"<svg/>", Endpoint.INFERENCE, Opening.PLAIN),
        (b"ID3\x04", Endpoint.INFERENCE, Opening.PLAIN),
        (b"", Endpoint.INFERENCE, Opening.PLAIN),
        (b"", Endpoint.MESSAGES, Opening.EMPTY),
    ],
)
def test_a_plain_body_that_is_an_error_is_told_from_an_answer(
    body: bytes, endpoint: Endpoint, opening: Opening
) -> None:
    """In every dialect; what is not JSON may be an answer only of speech, pictures and the like."""
    assert judge_plain(body, endpoint) is opening


def test_only_a_body_that_is_short_enough_is_examined_for_an_error() -> None:
    """64 KiB if it names one, and one KiB if it has nothing of an answer; keep-alives behind usage of 8 KiB."""
    for name, most, opening in (("error", 64 * 1024, Opening.PLAIN), ("detail", 1024, Opening.PLAIN)):
        body = b'{"%b":"m"}' % name.encode()
        assert judge_plain(body.ljust(most), Endpoint.CHAT) is Opening.ERROR_BODY
        assert judge_plain(body.ljust(most + 1), Endpoint.CHAT) is opening
    for size, opening in ((8 * 1024, Opening.NO_TOKENS), (8 * 1024 + 1, Opening.STREAM)):
        aside = b":" + b"x" * (size - 3) + b"\n\n"
        assert judge(NO_TOKENS + aside, Endpoint.CHAT, complete=True) is opening


def test_an_event_that_is_too_long_is_no_error_and_is_not_waited_for() -> None:
    assert judge(b"data: {" + b"x" * 70_000, Endpoint.CHAT, complete=False) is Opening.STREAM


@pytest.mark.parametrize("aside", [b":\n\n", b": a\r\n\r\n", b'event: ping\ndata: {"type": "ping"}\n\n'])
@pytest.mark.parametrize("complete", [False, True])
def test_behind_many_comments_or_pings_no_first_event_is_looked_for(aside: bytes, complete: bool) -> None:
    """They would all be read anew with each piece that arrives: 60 KB of them took the loop for seconds."""
    few, many = aside * (6_000 // len(aside)), aside * (20_000 // len(aside))
    error = b'data: {"error": {"code": 5}}\n\n'
    undecided = Opening.EMPTY if complete else Opening.UNDECIDED
    assert judge(few, Endpoint.MESSAGES, complete=complete) is undecided
    assert judge(few + error, Endpoint.MESSAGES, complete=complete) is Opening.ERROR
    assert judge(many, Endpoint.MESSAGES, complete=complete) is Opening.STREAM
    assert judge(many + error, Endpoint.MESSAGES, complete=complete) is Opening.STREAM


async def test_the_body_is_left_where_it_is() -> None:
    """It arrives in pieces, and all of them are there to be relayed."""
    upstream = Upstream(FakeClock())
    waiting = asyncio.get_running_loop().create_task(wait_for_opening(upstream.response, Endpoint.CHAT, 60.0))
    for byte in CHUNK:
        await turns(2)
        assert not waiting.done()
        upstream.send(bytes([byte]))
    assert await waiting is Opening.STREAM
    assert upstream.response.body_now() == CHUNK


async def test_the_wait_is_bounded_and_can_be_repeated() -> None:
    """Silence is no decision; what comes later is still there."""
    upstream = Upstream(FakeClock())
    upstream.send(b": busy\n\n")
    assert await wait_for_opening(upstream.response, Endpoint.CHAT, 0.01) is Opening.UNDECIDED
    upstream.send(CHUNK)
    assert await wait_for_opening(upstream.response, Endpoint.CHAT, 0.01) is Opening.STREAM
    assert not upstream.source.closed


async def test_what_ends_the_response_ends_the_wait() -> None:
    upstream = Upstream(FakeClock())
    waiting = asyncio.get_running_loop().create_task(wait_for_opening(upstream.response, Endpoint.CHAT, 60.0))
    await turns()
    upstream.fail(ResetMidResponse("reset"))
    with pytest.raises(ResetMidResponse):
        await waiting
    ended = Upstream(FakeClock())
    waiting = asyncio.get_running_loop().create_task(wait_for_opening(ended.response, Endpoint.CHAT, 60.0))
    await turns()
    ended.end()
    assert await waiting is Opening.EMPTY


async def test_a_cancelled_wait_closes_the_connection() -> None:
    upstream = Upstream(FakeClock())
    waiting = asyncio.get_running_loop().create_task(wait_for_opening(upstream.response, Endpoint.CHAT, 60.0))
    await turns()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert upstream.source.closed


@pytest.mark.parametrize("text", [b' {"a":{"b":["x]}",{}]},"c":[1]}\n', b'[{"a":null},[]]'])
def test_json_that_was_cut_anywhere_is_known(text: bytes) -> None:
    """Also just behind a bracket inside it; a very long one only by its ends."""
    start, end = len(text) - len(text.lstrip()), len(text.rstrip())
    for cut in range(len(text) + 1):
        assert is_unfinished(text[:cut]) is (start < cut < end), cut
    long = b'[{"a":"' + bytes(3_000_000).replace(b"\0", b"x") + b'"}'
    assert not is_unfinished(long)
    assert is_unfinished(long[:-1] + b",")


@pytest.mark.parametrize("text", [b'{"a":1}\n{"b":1}', b'{"a":NaN}', b"[" * 20_000 + b"]", b"12", b"plain", b"{x}"])
def test_what_is_not_json_is_not_taken_for_cut_json(text: bytes) -> None:
    """Its content type says json, and its client may understand it."""
    assert not is_unfinished(text)

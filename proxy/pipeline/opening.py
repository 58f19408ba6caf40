"""Peek at the beginning of a response's body to decide what the response is.

Whether a response is a stream is decided by what its body begins with: servers label streams as JSON and errors as
streams. A stream that begins with an error or ends before its first event, and a plain response that is an error or
empty, are found here, while another replica can still be tried.
"""

from __future__ import annotations

import asyncio
import enum
import re
from typing import Final, Protocol

import msgspec

from proxy.errors import ResetMidResponse
from proxy.model import Endpoint
from proxy.wire.events import data_of, read_event
from proxy.wire.refusals import HTML
from proxy.wire.usage import read_response

_EXAMINED_BYTES_AT_MOST: Final = 64 * 1024  # of a first event; a longer one is no error
_READ_BYTES_AT_MOST: Final = 2 * 1024 * 1024  # of a document that is read to its end, which takes 2 ms
_TRUNCATED: Final = "Input data was truncated"  # msgspec's words
_ASIDE_BYTES_AT_MOST: Final = 8 * 1024
"""Bytes of comments and pings behind which no first event is looked for. All of them are read again whenever more
arrives."""

_BOM: Final = b"\xef\xbb\xbf"
_BOM_BEGINNINGS: Final = (_BOM[:1], _BOM[:2])
_WHITE: Final = b" \t\r\n"
_BRACKETS: Final = (b"{", b"[")
_CLOSING_BRACKETS: Final = (b"}", b"]")
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")
_FIELD_BYTES_AT_MOST: Final = 6
_PING: Final = b"event: ping"
_EVENT_END: Final = b"\n\n"
_END_MARK: Final = b"[DONE]"
_DATA_ENDS: Final = (b"}", _END_MARK)
_BARE_BYTES_AT_MOST: Final = 1024
_ANSWER: Final = re.compile(rb'"(?:choices|content|output|data|usage|embeddings?)"')
"""A member of every answer to a prompt, without which a short body may be nothing but a message."""

_NOT_READY: Final = re.compile(rb'\{\s*"status"\s*:\s*"(?:loading|starting|initializ|warming|not )', re.IGNORECASE)
_USUAL: Final = (b"data: {", b"event: message_start", b"event: response.")


class Opening(enum.Enum):
    """Kinds of body, distinguished by their first bytes."""

    UNDECIDED = "undecided"  # too little has arrived
    PLAIN = "plain"
    STREAM = "stream"
    ERROR = "error"  # a stream whose first event is an error
    EMPTY = "empty"  # it ends before its first event; of a plain response, before its first byte
    NO_TOKENS = "no_tokens"  # a stream that has nothing but its end, and perhaps its usage
    ERROR_BODY = "error_body"  # a plain response that is an error in spite of its status
    HTML = "html"  # a plain response that is a page


class Arriving(Protocol):
    """The part of a response that is needed here: `proxy.upstream.UpstreamResponse`."""

    @property
    def complete(self) -> bool: ...
    def peek(self) -> bytes: ...
    async def arrived(self, seen_bytes: int, loop_seconds: float) -> bool: ...


def judge(body: bytes, endpoint: Endpoint, *, complete: bool) -> Opening:
    """Return the kind of a response that begins with `body`. Comments and pings decide nothing."""
    if body.startswith(_USUAL) and b"\n\n" in body and b"error" not in body and b"[]" not in body:
        return Opening.STREAM  # a short cut for nearly all streams: a tenth of the time
    if body in _BOM_BEGINNINGS and not complete:
        return Opening.UNDECIDED
    text = body.removeprefix(_BOM).lstrip(_WHITE)
    if not text:
        return Opening.EMPTY if complete else Opening.UNDECIDED
    if not text.startswith(_FIELDS):
        could_begin = len(text) < _FIELD_BYTES_AT_MOST and any(field.startswith(text) for field in _FIELDS)
        return Opening.UNDECIDED if could_begin and not complete else Opening.PLAIN
    event = first_event(text, complete=complete)
    if event is None:
        if _has_many_asides(text):
            return Opening.STREAM
        if complete:
            return Opening.EMPTY
        return Opening.STREAM if len(text) > _EXAMINED_BYTES_AT_MOST else Opening.UNDECIDED
    if b"error" in event and read_event(event, endpoint).error:
        return Opening.ERROR
    return _without_tokens(text, event, endpoint, complete=complete) if endpoint.is_generation else Opening.STREAM


def _without_tokens(text: bytes, event: bytes, endpoint: Endpoint, *, complete: bool) -> Opening:
    """Return NO_TOKENS if a stream has only its end, and usage without output, as after an early error in vLLM."""
    if data_of(event).strip() == _END_MARK:
        return Opening.NO_TOKENS
    if b"[]" not in event:
        return Opening.STREAM
    read = read_event(event, endpoint)
    if not read.extra or read.usage.get("completion_tokens"):
        return Opening.STREAM
    text = _with_line_feeds(text)
    rest = text[text.find(event) + len(event) :]
    following = first_event(rest, complete=complete)
    if following is None:
        if len(rest) > _ASIDE_BYTES_AT_MOST:
            return Opening.STREAM
        return Opening.NO_TOKENS if complete else Opening.UNDECIDED
    return Opening.NO_TOKENS if data_of(following).strip() == _END_MARK else Opening.STREAM


def _has_many_asides(text: bytes) -> bool:
    """Return True if `text` begins with so many comments and pings that no first event is looked for behind them."""
    return len(text) > _ASIDE_BYTES_AT_MOST and _asides_bytes(_with_line_feeds(text)) > _ASIDE_BYTES_AT_MOST


def first_event(text: bytes, *, complete: bool = False) -> bytes | None:
    """Return the first event of a stream that has data and is not a ping; None while it is incomplete.

    It is not looked for behind `_ASIDE_BYTES_AT_MOST` of comments and pings.
    """
    text = _with_line_feeds(text)
    start = _asides_bytes(text)
    end = text.find(_EVENT_END, start)
    if end >= 0:
        return text[start : end + len(_EVENT_END)].lstrip(b"\n") if start <= _ASIDE_BYTES_AT_MOST else None
    rest = text[start:]
    return rest if complete and data_of(rest).strip().endswith(_DATA_ENDS) else None


def _with_line_feeds(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in text else text


def _asides_bytes(text: bytes) -> int:
    """Return the size of the events without data and of the pings with which `text` begins, up to a bound."""
    start = 0
    while start <= _ASIDE_BYTES_AT_MOST and (end := text.find(_EVENT_END, start)) >= 0:
        event = text[start:end].lstrip(b"\n")
        if data_of(event) and not event.startswith(_PING):
            break
        start = end + len(_EVENT_END)
    return start


def judge_plain(body: bytes, endpoint: Endpoint) -> Opening:
    """Return the kind of a whole plain response with a status of success."""
    may_be_error = body.find(b'"error"') >= 0 and len(body) <= _EXAMINED_BYTES_AT_MOST
    if body.startswith(b"{") and not may_be_error and not _may_be_bare(body, endpoint):
        return Opening.PLAIN  # nearly all: what else there is to read is read behind the response
    text = body.strip()
    if text.startswith((b"{", b"[")):
        is_error = read_response(text, endpoint).error_seen or _NOT_READY.match(text) is not None
        return Opening.ERROR_BODY if is_error else Opening.PLAIN
    if HTML.match(text):
        return Opening.HTML
    if endpoint is Endpoint.INFERENCE:
        return Opening.PLAIN  # sound, a picture or a text
    return Opening.ERROR_BODY if text else Opening.EMPTY


def is_cut_off(begin: bytes, end: bytes) -> bool:
    """Return True if a JSON object or array that begins and ends with these bytes has not come whole.

    It is asked where the end of the connection is the end of the body, which looks the same if a server is killed. A
    document that was cut just behind a bracket inside it is recognised by `is_unfinished` alone.
    """
    return begin.lstrip()[:1] in _BRACKETS and end.rstrip()[-1:] not in _CLOSING_BRACKETS


def is_unfinished(body: bytes) -> bool:
    """Return True if `body` is the beginning of a JSON object or array. A very long one is judged by its two ends."""
    begin = body[:_EXAMINED_BYTES_AT_MOST]
    if begin.lstrip()[:1] not in _BRACKETS:
        return False
    if is_cut_off(begin, body[-_EXAMINED_BYTES_AT_MOST:]):
        return True
    if len(body) > _READ_BYTES_AT_MOST:
        return False
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError) as error:
        return str(error) == _TRUNCATED
    return False


def closed_inside() -> ResetMidResponse:
    """Return the error of a response that ended with its connection before it was whole."""
    return ResetMidResponse("the upstream closed inside its response")


def _may_be_bare(body: bytes, endpoint: Endpoint) -> bool:
    """Return True if a body may be nothing but a message of a web framework, gateway or engine that is loading."""
    return len(body) <= _BARE_BYTES_AT_MOST and endpoint is not Endpoint.INFERENCE and _ANSWER.search(body) is None


async def wait_for_opening(response: Arriving, endpoint: Endpoint, timeout_seconds: float) -> Opening:
    """Wait until the body shows what it is; UNDECIDED after `timeout_seconds`.

    Raises the error that ends the response before that. Cancelling it closes the connection.
    """
    body = response.peek()
    opening = judge(body, endpoint, complete=response.complete)
    if opening is not Opening.UNDECIDED:
        return opening
    deadline = asyncio.get_running_loop().time() + timeout_seconds
    while await response.arrived(len(body), deadline):
        body = response.peek()
        opening = judge(body, endpoint, complete=response.complete)
        if opening is not Opening.UNDECIDED:
            return opening
    return Opening.UNDECIDED

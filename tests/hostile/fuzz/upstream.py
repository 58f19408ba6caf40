"""An upstream that records what reaches it, and whose answers are strange but valid HTTP.

The answer to a request depends on its number and on what was received, so that each can be compared with what a
client would have got without a proxy.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import dataclass
from random import Random

import httptools

from tests.hostile.fuzz.requests import MARK, MODELS, number_of

NUMBERS_PER_SESSION = 1000
ANSWER = b"x-answer"  # the header with the number of the request that is answered
_STATUSES = (200,) * 30 + (201, 202, 400, 404, 409, 422)
_LINE_ENDS = (b"\n", b"\n", b"\n", b"\r\n", b"\r")
_USAGES = (
    b'{"prompt_tokens":100,"completion_tokens":5,"total_tokens":105,"prompt_tokens_details":{"cached_tokens":64}}',
    b'{"prompt_tokens":100,"completion_tokens":5,"total_tokens":105}',
    b'{"input_tokens":7,"cache_read_input_tokens":3,"cache_creation_input_tokens":1,"output_tokens":2}',
    b"null", b"{}", b"[]", b'"x"', b'{"prompt_tokens":-1}', b'{"prompt_tokens":NaN,"completion_tokens":Infinity}',
    b'{"prompt_tokens":1e400}', b'{"prompt_tokens":' + b"9" * 5000 + b"}",
    b'{"prompt_tokens":1.5,"completion_tokens":"7"}',
    b'{"prompt_tokens":18446744073709551616,"completion_tokens":9223372036854775807}', b'{"prompt_tokens":null}',
    b'{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":900000}}', b"[" * 2000 + b"]" * 2000,
    b'{"prompt_tokens":5,"prompt_tokens_details":"\xff"}', b'{"prompt_tokens":true}', b'{"\\ud800":1}',
)  # fmt: skip
_BODIES = (
    b"", b"null", b"not JSON", b"\xff\xfe\0", b"[", b'{"id":"\\ud800"}', b'{"id":7}', b'{"id":null,"usage":7}',
    b'{"object":"list","data":null}', b"<html></html>", b'{"id":"' + b"x" * 5000 + b'"}',
    b'{"error":{"message":"no"}}',
    b"[" * 3000, b'{"id":"a","id":"b"}', b'{"usage":{"prompt_tokens":1},"usage":{"prompt_tokens":2}}',
)  # fmt: skip
_EVENTS = (
    b": a comment", b"data: not JSON", b"data:{}", b"data: null", b"data: \xff\xfe", b"event: ping", b"id: 7\0",
    b"retry: 99999999999999999999", b"data", b"data: [", b"unknown: x", b'data: {"choices":null}', b"event: \xff",
    b'data: {"choices":[{"delta":null}]}', b'data: {"choices":[7]}', b'data: {"type":"response.completed"}',
    b'data: {"type":"message_delta","usage":{"output_tokens":-5}}', b'data: {"error":{"message":"late"}}',
    b"data: " + b"x" * 70_000, b'data: {"choices":[{"index":0,"delta":{"content":"\\ud800"}}]}',
    b"data: " + b"[" * 2000,
)  # fmt: skip


@dataclass(slots=True)
class Record:
    """The request that reached the upstream under one number, and the body that its client must get."""

    method: str
    target: bytes
    body: bytes
    times: int = 1
    status: int = 0
    answer: bytes = b""
    without_usage: bytes = b""  # the same without the event that only `include_usage` asked for


class Recorder:
    """The records of requests of present sessions, by number: the memory of a run does not depend on its length.

    `unnumbered` counts requests without a number, which are Cairn's own.
    """

    def __init__(self, seed: int) -> None:
        self.records: dict[int, Record] = {}
        self.unnumbered = 0
        self._seed = seed
        self._servers: list[asyncio.Server] = []
        self._sessions: set[int] = set()

    def begin(self, session: int) -> None:
        """Keep records of a session's requests from now on."""
        self._sessions.add(session)

    def end(self, session: int) -> None:
        """Drop the records of a session, and keep none of those of its requests that come later."""
        self._sessions.discard(session)
        for number in [number for number in self.records if number // NUMBERS_PER_SESSION == session]:
            del self.records[number]

    async def start(self, replicas: int) -> list[int]:
        """Serve on free ports, and return them."""
        loop = asyncio.get_running_loop()
        for _ in range(replicas):
            self._servers.append(await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0))
        return [server.sockets[0].getsockname()[1] for server in self._servers]

    def close(self) -> None:
        """Serve no more."""
        for server in self._servers:
            server.close()

    def answer(self, method: str, target: bytes, headers: dict[bytes, bytes], body: bytes) -> tuple[bytes, bool]:
        """Record a request; return the bytes of its answer, and whether the connection ends after them."""
        number = number_of(headers.get(MARK, b""))
        if number is None:
            self.unnumbered += 1
            return _unnumbered(target), False
        if (before := self.records.get(number)) is not None:
            before.times += 1
        record = Record(method, target, body, before.times if before else 1)
        if number // NUMBERS_PER_SESSION in self._sessions:
            self.records[number] = record
        random = Random(f"{self._seed} {number}")
        streams, counts_usage = _asked(body)
        if method == "POST" and streams and random.random() < 0.95:
            return _stream(random, number, record, counts_usage)
        return _plain(random, number, record, takes_gzip=b"gzip" in headers.get(b"accept-encoding", b""))


def _unnumbered(target: bytes) -> bytes:
    """Answer what Cairn asks by itself: lists of models, health, and the warming of contexts."""
    if target.partition(b"?")[0] == b"/v1/models":
        rows = [{"id": name, "object": "model", "max_model_len": 100_000} for name in MODELS]
        return _framed(200, [], json.dumps({"object": "list", "data": rows}).encode())
    if b"chat/completions" in target:
        return _framed(200, [], b'{"choices":[],"usage":{"prompt_tokens":50,"completion_tokens":1}}')
    return _framed(404, [], b"{}")


def _asked(body: bytes) -> tuple[bool, bool]:
    """Return whether a body asks for a stream, and for the usage at its end."""
    try:
        tree = json.loads(body)
        options = tree.get("stream_options")
        return tree.get("stream") is True, isinstance(options, dict) and options.get("include_usage") is True
    except (ValueError, AttributeError, RecursionError):
        return False, False


def _framed(status: int, headers: list[bytes], body: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d X" % status, *headers, b"content-length: %d" % len(body)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _plain(random: Random, number: int, record: Record, *, takes_gzip: bool) -> tuple[bytes, bool]:
    record.status = random.choice(_STATUSES)
    roll = random.random()
    if roll < 0.15:
        body = random.choice(_BODIES)
    else:
        usage = _USAGES[0] if roll < 0.6 else random.choice(_USAGES)
        text = b"x" * random.choice((5, 5, 5, 500, 200_000))
        body = b'{"id":"obj-%d","choices":[{"index":0,"message":{"content":"%b"}}],"usage":%b}' % (
            number,
            text,
            usage,
        )
    headers = [b"%b: %d" % (ANSWER, number), b"content-type: application/json", b"x-request-id: other"]
    if takes_gzip and random.random() < 0.5:
        body = gzip.compress(body, 1)
        headers.append(b"content-encoding: gzip")
    record.answer = record.without_usage = body
    ends = random.random() < 0.02
    headers += [b"connection: close"] * ends
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" * random.choice((0, 0, 0, 0, 0, 0, 1, 5))
    if record.method == "HEAD":
        record.answer = record.without_usage = b""
        return interim + _framed(record.status, headers, body)[: -len(body) or None], ends
    if random.random() < 0.3:
        return interim + _chunked(random, record.status, headers, [body]), ends
    return interim + _framed(record.status, headers, body), ends


def _stream(random: Random, number: int, record: Record, counts_usage: bool) -> tuple[bytes, bool]:
    record.status = 200
    end = random.choice(_LINE_ENDS)
    events = [b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant"}}]}']
    for turn in range(random.randrange(1, 8)):
        events.append(b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"t%d"}}]}' % turn)
        if random.random() < 0.1:
            events.append(random.choice(_EVENTS))
    before_usage = len(events)
    if counts_usage:
        usage = _USAGES[0] if random.random() < 0.7 else random.choice(_USAGES[:3])
        events.append(b'data: {"id":"c","choices":[],"usage":%b}' % usage)
    if random.random() < 0.9:
        events.append(b"data: [DONE]")
    framed = [event + end + end for event in events]
    if random.random() < 0.05:
        framed[-1] = framed[-1].rstrip()
    record.answer = b"".join(framed)
    record.without_usage = b"".join(framed[:before_usage] + framed[before_usage + counts_usage :])
    headers = [b"%b: %d" % (ANSWER, number), b"content-type: text/event-stream"]
    pieces = framed if random.random() < 0.7 else [record.answer]
    return _chunked(random, 200, headers, pieces), False


def _chunked(random: Random, status: int, headers: list[bytes], pieces: list[bytes]) -> bytes:
    out = [b"\r\n".join([b"HTTP/1.1 %d X" % status, *headers, b"transfer-encoding: chunked"]) + b"\r\n\r\n"]
    for piece in pieces:
        rest = piece
        while rest:
            cut = len(rest) if random.random() < 0.7 else random.randrange(1, len(rest) + 1)
            extension = b";a=b" if random.random() < 0.05 else b""
            out.append(b"%x%b\r\n%b\r\n" % (cut, extension, rest[:cut]))
            rest = rest[cut:]
    out.append(b"0\r\n" + (b"x-trailer: 1\r\n" if random.random() < 0.05 else b"") + b"\r\n")
    return b"".join(out)


class _Connection(asyncio.Protocol):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._parser = httptools.HttpRequestParser(self)
        self._clear()

    def _clear(self) -> None:
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._clear()

    def on_url(self, piece: bytes) -> None:
        self._target += piece

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        method = self._parser.get_method().decode()
        answer, ends = self._recorder.answer(method, self._target, self._headers, b"".join(self._body))
        self._transport.write(answer)
        if ends:
            self._transport.close()

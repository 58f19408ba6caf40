"""One server that simulates sick and well replicas, distinguished by the first segment of the path."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import Counter
from typing import Final, Self, cast

import httptools

WELL: Final = "well"
RESET: Final = "reset"
RESET_IN_HEAD: Final = "reset-in-head"
CUT: Final = "cut"
ERROR_EVENT: Final = "error-event"
_REASONS = {408: "Request Timeout", 429: "Too Many Requests", 529: "Overloaded"}

_USAGE = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
_RESPONSES_USAGE = {"input_tokens": 9, "output_tokens": 2, "total_tokens": 11}
_MESSAGES_USAGE = {"input_tokens": 9, "output_tokens": 2}


def _event(tree: object, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(tree).encode() + b"\n\n"


_RESPONSE = {"id": "resp_1", "object": "response", "status": "completed", "output": [], "usage": _RESPONSES_USAGE}
_MESSAGE = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "well"}]}
_PLAIN = {
    "chat/completions": {"choices": [{"index": 0, "message": {"content": "well"}}], "usage": _USAGE},
    "responses": {**_RESPONSE, "output": [{"type": "message", "content": [{"type": "output_text", "text": "well"}]}]},
    "messages": {**_MESSAGE, "usage": _MESSAGES_USAGE},
    "embeddings": {"data": [{"index": 0, "embedding": [0.5]}], "usage": _USAGE},
}
_STREAM = {
    "chat/completions": _event({"choices": [{"index": 0, "delta": {"content": "well"}, "finish_reason": "stop"}]})
    + b"data: [DONE]\n\n",
    "responses": _event({"type": "response.created", "response": {"id": "resp_1"}}, "response.created")
    + _event({"type": "response.output_text.delta", "delta": "well"}, "response.output_text.delta")
    + _event({"type": "response.completed", "response": _RESPONSE}, "response.completed"),
    "messages": _event({"type": "message_start", "message": {"usage": _MESSAGES_USAGE}}, "message_start")
    + _event({"type": "content_block_delta", "index": 0, "delta": {"text": "well"}}, "content_block_delta")
    + _event({"type": "message_stop"}, "message_stop"),
}
_ERROR = {"error": {"message": "sick", "type": "server_error", "code": None}}
_ERROR_EVENT = {
    "chat/completions": _event(_ERROR),
    "responses": _event({"type": "error", "code": "sick", "message": "sick"}, "error"),
    "messages": _event({"type": "error", "error": {"type": "overloaded_error", "message": "sick"}}, "error"),
}
_MODELS = {"object": "list", "data": []}


class Upstreams:
    """The server; use it as an asynchronous context. `asked` counts requests that run a model, by replica's name."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.port = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def url(self, name: str, behaviour: str) -> str:
        """Return the base URL of a replica with this behaviour: WELL, RESET, ..., or a status as text."""
        return f"http://127.0.0.1:{self.port}/{name}/{behaviour}/v1"


class _Connection(asyncio.Protocol):
    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams
        self._parser = httptools.HttpRequestParser(self)
        self._url = self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, piece: bytes) -> None:
        self._body += piece

    def on_message_complete(self) -> None:
        parts = self._url.decode().split("/", 4)
        if len(parts) < 5 or parts[3] != "v1":
            self._send(404, "application/json", b"{}")
            return
        _, name, behaviour, _, path = parts
        if path not in _PLAIN:
            self._send(200, "application/json", json.dumps(_MODELS).encode())
            return
        self._upstreams.asked[name] += 1
        self._behave(behaviour, path, stream=json.loads(self._body).get("stream") is True)

    def _behave(self, behaviour: str, path: str, *, stream: bool) -> None:
        if behaviour in (RESET, RESET_IN_HEAD):
            if behaviour == RESET_IN_HEAD:
                self._transport.write(b"HTTP/1.1 200 OK\r\nconte")
            self._reset()
        elif behaviour == CUT and stream:
            self._transport.write(_head(200, "text/event-stream") + b"transfer-encoding: chunked\r\n\r\n")
            self._reset()
        elif behaviour == ERROR_EVENT and stream:
            self._send(200, "text/event-stream", _ERROR_EVENT[path])
        elif behaviour.isdigit():
            self._send(int(behaviour), "application/json", json.dumps(_ERROR).encode())
        elif stream:
            self._send(200, "text/event-stream", _STREAM[path])
        else:
            self._send(200, "application/json", json.dumps(_PLAIN[path]).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self._transport.write(_head(status, kind) + b"content-length: %d\r\n\r\n" % len(body) + body)

    def _reset(self) -> None:
        raw = self._transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.close()


def _head(status: int, kind: str) -> bytes:
    return f"HTTP/1.1 {status} {_REASONS.get(status, 'X')}\r\ncontent-type: {kind}\r\n".encode()

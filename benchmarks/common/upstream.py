"""A static upstream: several replicas in one process, fast, on asyncio protocols and httptools.

Answers chat completions with a fixed JSON of about 1 KB or a stream of a given number of chunks, one write per chunk,
and the health and model pages that routers ask for at their start. The end of the last message, `[[wish size]]`, says
what else it should do (`Wish`) and how large the prompt is: routers that write bodies anew drop members they do not
know and change the size, and the answer must not depend on that. It counts what it receives, and shows the counts at
GET /bench/stats.

python -m benchmarks.common.upstream --ports 9001,9002 [--chunks 200] [--chunk-seconds 0.002]
"""

from __future__ import annotations

import argparse
import asyncio
import enum
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import httptools
import uvloop

_LOOK_BYTES = 512  # bytes at both ends that are searched for members, including spliced ones
_BYTES_PER_TOKEN = 4
_ENGINE_BLOCK_TOKENS = 16
_ANSWER_TEXT = "The stones were set by those who came before, and each one rests on the last. " * 9
_CHUNK_TEXT = " stone"
_SLOW_SECONDS = 0.05
_KEPT_DIGESTS = 64


class Wish(enum.StrEnum):
    """Manners of response that the mark at a body's end can request."""

    BENCH = "bench"
    SLOW = "slow"  # a pause before the answer
    RESET_BEFORE = "reset-before"  # the connection is reset and nothing answered
    RESET_MID = "reset-mid"  # half of the answer, then a reset
    CLOSE_AFTER = "close-after"  # a whole answer, then the connection closes without notice


@dataclass(slots=True)
class Tally:
    """Counts of all replicas together."""

    requests: int = 0
    body_bytes: int = 0
    open_connections: int = 0
    open_streams: int = 0
    usage_asked: int = 0
    per_replica: dict[int, int] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)

    def page(self) -> bytes:
        """Return the counts as JSON."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__}).encode()


@dataclass(frozen=True, slots=True)
class Manner:
    """The way streams are written, and the share of a prompt that is reported as cached."""

    chunks: int = 200
    chunk_seconds: float = 0.002
    cached_share: float = 0.5


def usage(body_bytes: int, cached_share: float, output_tokens: int) -> dict[str, object]:
    """Return the usage of a warm engine for a prompt of this size, cached tokens in whole blocks of the engine."""
    prompt = max(1, body_bytes // _BYTES_PER_TOKEN)
    cached = int(prompt * cached_share) // _ENGINE_BLOCK_TOKENS * _ENGINE_BLOCK_TOKENS
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output_tokens,
        "total_tokens": prompt + output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def parse_wish(mark: bytes, body_bytes: int) -> tuple[str, int]:
    """Return what a mark asks for and the prompt's size that it states, `body_bytes` if it states none."""
    wish, _, size = mark.decode(errors="replace").partition(" ")
    return wish, int(size) if size.isdecimal() else body_bytes


@functools.lru_cache(maxsize=1024)
def plain_answer(body_bytes: int, cached_share: float) -> bytes:
    """Head and body of a whole answer, the same for equal sizes."""
    content = json.dumps(
        {
            "id": "chatcmpl-benchmark",
            "object": "chat.completion",
            "created": 1_717_171_717,
            "model": "bench",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": _ANSWER_TEXT}, "finish_reason": "stop"}
            ],
            "usage": usage(body_bytes, cached_share, 64),
        }
    ).encode()
    return _answer(200, content)


def _answer(status: int, content: bytes) -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = b"0\r\n\r\n"


def framed(content: bytes) -> bytes:
    """Return one chunk of chunked framing."""
    return b"%x\r\n%b\r\n" % (len(content), content)


def _event(choices: list[object], **more: object) -> bytes:
    event = {
        "id": "chatcmpl-benchmark",
        "object": "chat.completion.chunk",
        "created": 1_717_171_717,
        "model": "bench",
        "choices": choices,
        **more,
    }
    return framed(b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n")


@functools.lru_cache(maxsize=256)
def stream_writes(body_bytes: int, manner: Manner, usage_asked: bool) -> tuple[bytes, ...]:
    """Return the writes of a streamed response after its head: chunks, usage if asked for, [DONE], the end.

    As vLLM does, and unlike OpenAI, the other chunks have no `"usage": null`; so a proxy that asks for usage and
    withholds it can be held to the very bytes that a client would get directly.
    """
    role = _event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    token = _event([{"index": 0, "delta": {"content": _CHUNK_TEXT}, "finish_reason": None}])
    last = _event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    writes = [role, *[token] * max(0, manner.chunks - 2), last]
    if usage_asked:
        writes.append(_event([], usage=usage(body_bytes, manner.cached_share, manner.chunks)))
    return (*writes, framed(b"data: [DONE]\n\n") + STREAM_END)


_PAGES: dict[bytes, dict[str, object]] = {
    b"/v1/models": {
        "object": "list",
        "data": [{"id": "bench", "object": "model", "created": 0, "owned_by": "bench"}],
    },
    b"/get_model_info": {"model_path": "bench", "is_generation": True},
    b"/model_info": {"model_path": "bench", "is_generation": True},
    b"/get_server_info": {"model_path": "bench", "served_model_name": "bench", "tp_size": 1, "dp_size": 1},
    b"/server_info": {"model_path": "bench", "served_model_name": "bench", "tp_size": 1, "dp_size": 1},
}


# vllm-router asks its engine to tokenize each prompt before it sends it. An empty answer is the cheapest for it: an
# error makes it try a second way, and token ids would have to be read.
_PREPARATIONS = frozenset({b"/v1/chat/completions/render", b"/tokenize"})


class ReplicaConnection(asyncio.Protocol):
    """One connection from a proxy."""

    def __init__(self, port: int, tally: Tally, manner: Manner) -> None:
        self._port = port
        self._tally = tally
        self._manner = manner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._writes: Sequence[bytes] = ()
        self._close_after = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._tally.open_connections += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._tally.open_connections -= 1
        if self._timer is not None:
            self._timer.cancel()
        if self._writes:
            self._tally.open_streams -= 1

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    # httptools' callbacks

    def on_message_begin(self) -> None:
        self._target = b""
        self._first = b""
        self._last = b""
        self._body_bytes = 0
        self._digest: object | None = None

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_body(self, piece: bytes) -> None:
        if len(self._first) < _LOOK_BYTES:
            self._first = (self._first + piece)[:_LOOK_BYTES]
            if b'"user":"verify"' in self._first and self._digest is None:
                self._digest = hashlib.blake2b(digest_size=16)
        if self._digest is not None:
            self._digest.update(piece)  # type: ignore[attr-defined]
        self._last = piece[-_LOOK_BYTES:] if len(piece) >= _LOOK_BYTES else (self._last + piece)[-_LOOK_BYTES:]
        self._body_bytes += len(piece)

    def on_message_complete(self) -> None:
        path = self._target.partition(b"?")[0]
        if self._parser.get_method() != b"POST":
            content = self._tally.page() if path == b"/bench/stats" else json.dumps(_PAGES.get(path, {})).encode()
            self._transport.write(_answer(200, content))
            if not self._parser.should_keep_alive():
                self._transport.close()
            return
        if path in _PREPARATIONS:
            self._transport.write(_answer(200, b"{}"))
            return
        tally = self._tally
        tally.requests += 1
        tally.body_bytes += self._body_bytes
        tally.per_replica[self._port] = tally.per_replica.get(self._port, 0) + 1
        if self._digest is not None:
            tally.digests[_KEPT_DIGESTS:] = []
            tally.digests.insert(0, self._digest.hexdigest())  # type: ignore[attr-defined]
        self._answer()

    def _answer(self) -> None:
        ends = self._first + self._last
        wish, size_bytes = parse_wish(ends.rpartition(b"[[")[2].partition(b"]]")[0], self._body_bytes)
        stream = b'"stream":true' in ends
        self._close_after = wish == Wish.CLOSE_AFTER or not self._parser.should_keep_alive()
        if wish == Wish.RESET_BEFORE:
            self._transport.abort()
        elif wish == Wish.SLOW:
            self._timer = self._loop.call_later(_SLOW_SECONDS, self._begin, stream, wish, ends, size_bytes)
        else:
            self._begin(stream, wish, ends, size_bytes)

    def _begin(self, stream: bool, wish: str, ends: bytes, size_bytes: int) -> None:
        if not stream:
            answer = plain_answer(size_bytes, self._manner.cached_share)
            if wish == Wish.RESET_MID:
                self._transport.write(answer[: len(answer) // 2])
                self._timer = self._loop.call_later(_SLOW_SECONDS, self._transport.abort)
                return
            self._transport.write(answer)
            self._finish()
            return
        asked = b'"include_usage":true' in ends
        self._tally.usage_asked += asked
        self._tally.open_streams += 1
        self._writes = stream_writes(size_bytes, self._manner, asked)
        self._position = 0
        self._reset_at = len(self._writes) // 2 if wish == Wish.RESET_MID else -1
        self._transport.write(STREAM_HEAD)
        self._step()

    def _step(self) -> None:
        if self._position == self._reset_at:
            self._transport.abort()
            return
        self._transport.write(self._writes[self._position])
        self._position += 1
        if self._position < len(self._writes):
            self._timer = self._loop.call_later(self._manner.chunk_seconds, self._step)
            return
        self._writes = ()
        self._tally.open_streams -= 1
        self._finish()

    def _finish(self) -> None:
        if self._close_after:
            self._transport.close()


async def serve(ports: Sequence[int], manner: Manner) -> None:
    """Serve on loopback until cancelled."""
    loop = asyncio.get_running_loop()
    tally = Tally()
    for port in ports:
        factory = functools.partial(ReplicaConnection, port, tally, manner)
        await loop.create_server(factory, "127.0.0.1", port, backlog=1024)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ports", required=True)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--chunk-seconds", type=float, default=0.002)
    parser.add_argument("--cached-share", type=float, default=0.5)
    args = parser.parse_args()
    manner = Manner(args.chunks, args.chunk_seconds, args.cached_share)
    uvloop.run(serve([int(port) for port in args.ports.split(",")], manner))


if __name__ == "__main__":
    main()

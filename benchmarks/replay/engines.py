"""Simulated engines behind HTTP: the model of `benchmarks.fleet.engine` in real time, sped up by a factor.

One process has all engines of a fleet, each on its own port. A prompt's text is cut into blocks of 2,048 bytes, which
are 512 tokens; usage is reported as by vLLM. In addition to the OpenAI paths each port has `/metrics` with its
capacity and start time, `POST /replay/restart`, after which it holds nothing, and `/replay/stats`.

python -m benchmarks.replay.engines --ports 9001,9002 --capacity 500000 --speed 5
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
from array import array
from collections.abc import Callable, Sequence
from typing import cast

import httptools
import msgspec
import uvloop
import xxhash

from benchmarks.common.upstream import STREAM_END, STREAM_HEAD, framed
from benchmarks.engines.templates import Chat, Template, decode_chat, render
from benchmarks.fleet.engine import BlockCache, Engine
from benchmarks.fleet.trace import BLOCK_TOKENS, BYTES_PER_TOKEN, Request
from benchmarks.replay.texts import BLOCK_BYTES, MODEL
from cache import Fingerprint
from proxy.clock import SystemClock

_CLOCK = SystemClock()
_CHUNK_SECONDS = 1.0
"""Engine time between two chunks: about 50 tokens in one, since chunks cost the proxies' CPU and decide nothing."""

_NO_FINGERPRINT = Fingerprint(array("Q"), array("I"))
_PREPARATIONS = frozenset({b"/v1/chat/completions/render"})
_MODEL_PAGES = {
    b"/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "bench"}]},
    b"/get_model_info": {"model_path": MODEL, "is_generation": True},
    b"/model_info": {"model_path": MODEL, "is_generation": True},
    b"/get_server_info": {"model_path": MODEL, "served_model_name": MODEL, "tp_size": 1, "dp_size": 1},
    b"/server_info": {"model_path": MODEL, "served_model_name": MODEL, "tp_size": 1, "dp_size": 1},
    b"/health": {},
}


class _Body(Chat):
    max_completion_tokens: int | None = None
    stream: bool = False


class Stats(msgspec.Struct):
    """Counts of an engine since its process began, restarts included."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


def blocks_of(text: bytes) -> tuple[int, ...]:
    """Return the chained hashes of the blocks of `text`, the last of which may be short."""
    found, last = [], 0
    for start in range(0, len(text), BLOCK_BYTES):
        last = xxhash.xxh3_64_intdigest(text[start : start + BLOCK_BYTES], last)
        found.append(last)
    return tuple(found)


class LiveEngine:
    """One engine in real time; its clock runs `speed` times as fast. Listens to its `Engine`."""

    def __init__(
        self, number: int, capacity_tokens: int, speed: float, template: Template | None = None, *, pins: bool = False
    ) -> None:
        self._template = template
        self._loop = asyncio.get_running_loop()
        self._speed = speed
        self._origin_seconds = self._loop.time()
        self._capacity_tokens = capacity_tokens
        self._streams: dict[int, Stream] = {}
        self._numbers = 0
        self._started_unix_seconds = _CLOCK.unix()
        self.engine = Engine(number, capacity_tokens, self.at, self, pins=pins)
        self.stats = Stats()

    def at(self, time: float, call: Callable[[float], None]) -> None:
        """Call `call` at `time`, in the engine's seconds; it gets the planned time, so that nothing drifts."""
        self._loop.call_at(self._origin_seconds + time / self._speed, call, time)

    def now(self) -> float:
        """Return the time in the engine's seconds."""
        return (self._loop.time() - self._origin_seconds) * self._speed

    def submit(self, stream: Stream, body: _Body) -> None:
        """Take a request that has arrived."""
        text = self._text(body)
        self._numbers += 1
        tokens = max(-(-len(text) // BYTES_PER_TOKEN), 1)
        now, output = self.now(), body.max_completion_tokens or body.max_tokens
        request = Request(self._numbers, now, tokens, output, blocks_of(text), _NO_FINGERPRINT)
        self._streams[request.number] = stream
        self.engine.submit(request, 0.0, now)

    def tokenized(self, body: bytes) -> dict[str, object]:
        """Tokenise a prompt; return nothing if the engine has no template or the body no messages."""
        if self._template is None:
            return {}
        try:
            text = render(decode_chat(body), self._template)
        except msgspec.DecodeError:
            return {}
        starts = range(0, len(text), BYTES_PER_TOKEN)
        return {"tokens": [int.from_bytes(text[start : start + BYTES_PER_TOKEN], "big") for start in starts]}

    def _text(self, body: _Body) -> bytes:
        if self._template is not None:
            return render(body, self._template)
        return "".join(message.content for message in body.messages).encode()

    def restart(self) -> None:
        """Forget all prompts, like a new process; running requests continue, so that none is lost."""
        self.engine.cache = BlockCache(self._capacity_tokens)
        self._started_unix_seconds = _CLOCK.unix()

    def metrics(self) -> bytes:
        """Return a metrics page like vLLM's, with the metrics that a router may read."""
        stats, model = self.stats, f'model_name="{MODEL}"'
        blocks = self._capacity_tokens // BLOCK_TOKENS
        return (
            f"process_start_time_seconds {self._started_unix_seconds:.3f}\n"
            f'vllm:cache_config_info{{block_size="{BLOCK_TOKENS}",num_gpu_blocks="{blocks}"}} 1.0\n'
            f"vllm:num_requests_running{{{model}}} {len(self._streams) - self.engine.waiting}\n"
            f"vllm:num_requests_waiting{{{model}}} {self.engine.waiting}\n"
            f"vllm:prefix_cache_queries_total{{{model}}} {stats.prompt_tokens}\n"
            f"vllm:prefix_cache_hits_total{{{model}}} {stats.cached_tokens}\n"
        ).encode()

    # events of the engine's model

    def started(self, request: Request, now: float) -> None:
        """Do nothing when a prefill begins."""

    def first_token(self, request: Request, replica: int, cached_tokens: int, now: float) -> None:
        """Count it and send the first token."""
        del replica
        self.stats.requests += 1
        self.stats.prompt_tokens += request.input_tokens
        self.stats.cached_tokens += cached_tokens
        self._streams[request.number].begin(request, cached_tokens)
        self.at(now + _CHUNK_SECONDS, functools.partial(self._go_on, request.number))

    def _go_on(self, number: int, now: float) -> None:
        if (stream := self._streams.get(number)) is not None:
            stream.more()
            self.at(now + _CHUNK_SECONDS, functools.partial(self._go_on, number))

    def ended(self, request: Request, replica: int, now: float) -> None:
        """Send the end."""
        del replica, now
        self._streams.pop(request.number).end()


def _event(choices: Sequence[object], **more: object) -> bytes:
    event = {"id": "chatcmpl-replay", "object": "chat.completion.chunk", "created": 0, "model": MODEL}
    return b"data: " + json.dumps({**event, "choices": choices, **more}, separators=(",", ":")).encode() + b"\n\n"


def _delta(**delta: str) -> bytes:
    return _event([{"index": 0, "delta": delta, "finish_reason": None}])


_ROLE = framed(_delta(role="assistant", content=""))
_TOKEN = framed(_delta(content="w "))
_STOP = framed(_event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))


def usage_of(request: Request, cached_tokens: int) -> dict[str, object]:
    """Return the usage as vLLM reports it: if nothing was cached the details are null."""
    return {
        "prompt_tokens": request.input_tokens,
        "completion_tokens": request.output_tokens,
        "total_tokens": request.input_tokens + request.output_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens} if cached_tokens else None,
    }


class Stream:
    """One response in progress; nothing more is written to a client that left."""

    def __init__(self, transport: asyncio.Transport, is_streamed: bool, close_after: bool) -> None:
        self._transport = transport
        self._is_streamed = is_streamed
        self._close_after = close_after
        self._usage: dict[str, object] = {}

    def begin(self, request: Request, cached_tokens: int) -> None:
        """Send the first token, after a chunk with the role alone."""
        self._usage = usage_of(request, cached_tokens)
        if self._is_streamed:
            self._write(STREAM_HEAD + _ROLE + _TOKEN)

    def more(self) -> None:
        """Send the next chunk."""
        if self._is_streamed:
            self._write(_TOKEN)

    def end(self) -> None:
        """Send the last chunk, or the whole of a plain response."""
        if self._is_streamed:
            self._write(_STOP + framed(_event([], usage=self._usage)) + framed(b"data: [DONE]\n\n") + STREAM_END)
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": "w"}, "finish_reason": "stop"}
            self._write(_page({"id": "c", "object": "chat.completion", "choices": [choice], "usage": self._usage}))
        if self._close_after:
            self._transport.close()

    def _write(self, piece: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(piece)


def _page(content: object) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    kind = b"text/plain" if isinstance(content, bytes) else b"application/json"
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


class Connection(asyncio.Protocol):
    """One connection from a proxy: one request at a time."""

    def __init__(self, engine: LiveEngine) -> None:
        self._engine = engine
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._decoder = msgspec.json.Decoder(_Body)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_message_begin(self) -> None:
        self._target = b""
        self._pieces: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        del value

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        path = self._target.partition(b"?")[0]
        if path == b"/v1/chat/completions":
            body = self._decoder.decode(b"".join(self._pieces))
            close_after = not self._parser.should_keep_alive()
            self._engine.submit(Stream(self._transport, body.stream, close_after), body)
            return
        self._transport.write(self._small_page(path))
        if not self._parser.should_keep_alive():
            self._transport.close()

    def _small_page(self, path: bytes) -> bytes:
        if path == b"/metrics":
            return _page(self._engine.metrics())
        if path == b"/replay/stats":
            return _page(msgspec.to_builtins(self._engine.stats))
        if path == b"/tokenize":
            return _page(self._engine.tokenized(b"".join(self._pieces)))
        if path == b"/replay/restart":
            self._engine.restart()
            return _page({})
        if path in _MODEL_PAGES or path in _PREPARATIONS:
            return _page(_MODEL_PAGES.get(path, {}))
        return b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"


TEMPLATES = {"tools_first": Template(), "system_first": Template(system_first=True, drops_reasoning=True)}


async def serve(
    ports: Sequence[int], capacity_tokens: int, speed: float, template: Template | None = None, *, pins: bool = False
) -> None:
    """Serve on loopback until cancelled. Without a template a prompt is the text of its messages."""
    loop = asyncio.get_running_loop()
    for number, port in enumerate(ports):
        engine = LiveEngine(number, capacity_tokens, speed, template, pins=pins)
        await loop.create_server(functools.partial(Connection, engine), "127.0.0.1", port, backlog=1024)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ports", required=True)
    parser.add_argument("--capacity", type=int, required=True)
    parser.add_argument("--speed", type=float, required=True)
    parser.add_argument("--pins", action="store_true", help="blocks of running requests cannot be evicted")
    parser.add_argument("--template", choices=list(TEMPLATES), help="render messages and tools by this template")
    options = parser.parse_args()
    ports = [int(port) for port in options.ports.split(",")]
    template = None if options.template is None else TEMPLATES[options.template]
    uvloop.run(serve(ports, options.capacity, options.speed, template, pins=options.pins))


if __name__ == "__main__":
    main()

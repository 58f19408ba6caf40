"""An OpenAI-like upstream with a prefix cache, which reports usage as vLLM does and can be told to fail.

Tokens are bytes: every four bytes of the rendered prompt are one. The cache is made of blocks of 64 bytes (16 tokens)
whose hash covers all before them, so that what is reported as cached is exactly what was sent here before.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web

BYTES_PER_TOKEN = 4
BLOCK_BYTES = 64
MAX_BODY_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it came, byte for byte; `headers` with their names as sent."""

    method: str
    target: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> bytes | None:
        """The first value of `name` (lower case), or None."""
        return next((value for key, value in self.headers if key.lower() == name), None)

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Failure:
    """A response in place of the usual one: an error status, or a connection that breaks after some chunks."""

    status: int = 500
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b'{"error": {"message": "told to fail", "type": "server_error", "code": null}}'
    cut_after_chunks: int | None = None  # 0: the connection ends before any byte of the answer


@dataclass
class OpenAIUpstream:
    """One replica on loopback; use it as an asynchronous context.

    `failures` are used up one a generation, None for "serve this one". `gate`, where set, holds every generation
    until the event is set. `pieces` are the texts of a stream's chunks. With `refuses_stream_options` a body that
    has the field gets a 400 that names it; with `closes_streams` the connection ends unannounced after each stream,
    as llama.cpp's does; without `reports_cached` no cached tokens are ever reported.
    """

    models: tuple[str, ...] = ("test-model",)
    pieces: tuple[str, ...] = ("Hello", ",", " world")
    cache: bool = True
    reports_cached: bool = True
    refuses_stream_options: bool = False
    closes_streams: bool = False
    gate: asyncio.Event | None = None
    failures: list[Failure | None] = field(default_factory=list)
    answers: dict[str, bytes] = field(default_factory=dict)  # JSON by path, for what is not a generation
    requests: list[Asked] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)  # of each generation, in order
    prompt_tokens: list[int] = field(default_factory=list)
    in_flight: int = 0
    abandoned: int = 0  # requests whose client left before the end
    port: int = 0

    def __post_init__(self) -> None:
        self._blocks: set[bytes] = set()
        self._answered = 0

    @property
    def url(self) -> str:
        """The base URL, ending in /v1."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def generations(self) -> list[Asked]:
        """The requests that had a prompt."""
        return [asked for asked in self.requests if asked.target.split("?")[0] in _GENERATORS]

    def restart(self) -> None:
        """Forget every cached prefix, as a restarted engine has."""
        self._blocks.clear()

    async def __aenter__(self) -> Self:
        self._runner = web.ServerRunner(
            web.Server(
                self._handle, handler_cancellation=True, request_factory=_large_request, auto_decompress=False
            ),
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop serving; once more is harmless."""
        await self._runner.cleanup()

    def prefill(self, prompt: bytes) -> tuple[int, int]:
        """Prompt tokens and cached tokens of a prompt; from now on all of its whole blocks are cached."""
        hashes = list(_block_hashes(prompt))
        known = 0
        while known < len(hashes) and hashes[known] in self._blocks:
            known += 1
        if self.cache:
            self._blocks.update(hashes)
        prompt_tokens = -(-len(prompt) // BYTES_PER_TOKEN)
        cached_tokens = min(known * BLOCK_BYTES // BYTES_PER_TOKEN, max(0, prompt_tokens - 1))
        self.prompt_tokens.append(prompt_tokens)
        self.cached_tokens.append(cached_tokens)
        return prompt_tokens, cached_tokens

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.in_flight += 1
        try:
            asked = Asked(request.method, request.path_qs, request.raw_headers, await request.read())
            self.requests.append(asked)
            generates = asked.target.split("?")[0] in _GENERATORS
            failure = self.failures.pop(0) if self.failures and generates else None
            if failure is not None and failure.cut_after_chunks is None:
                return _json_bytes(failure.body, failure.status, failure.headers)
            return await self._serve(request, asked, failure)
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        finally:
            self.in_flight -= 1

    async def _serve(self, request: web.BaseRequest, asked: Asked, failure: Failure | None) -> web.StreamResponse:
        path = asked.target.split("?")[0]
        if path == "/v1/models" and path not in self.answers:
            return _json({"object": "list", "data": [_model(name) for name in self.models]})
        if path == "/v1/embeddings":
            return self._embeddings(asked.json())
        dialect = _GENERATORS.get(path)
        if path in self.answers:
            return _json_bytes(self.answers[path], 200)
        if dialect is None:
            return web.Response(status=200, body=asked.body, content_type="application/octet-stream")
        if failure is not None and failure.cut_after_chunks == 0:
            _cut(request)
            return web.Response()
        if self.gate is not None:
            await self.gate.wait()
        try:
            body = asked.json()
        except ValueError:
            return _json(_error("We could not parse the JSON body of your request.", None), 400)
        if self.refuses_stream_options and "stream_options" in body:
            return _json(_error("Unknown parameter: 'stream_options'.", "stream_options"), 400)
        self._answered += 1
        usage = self._usage(*self.prefill(render(body)))
        if not body.get("stream"):
            return _json(dialect(self, body, usage).plain())
        cut_after = failure.cut_after_chunks if failure is not None else None
        return await self._stream(request, dialect(self, body, usage), cut_after)

    async def _stream(self, request: web.BaseRequest, dialect: Dialect, cut_after: int | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for number, event in enumerate(dialect.events()):
            if number == cut_after:
                _cut(request)
                return response
            await response.write(event)
        await response.write_eof()
        if self.closes_streams and request.transport is not None:
            request.transport.close()
        return response

    def _embeddings(self, body: Any) -> web.Response:
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        rows = [{"object": "embedding", "index": i, "embedding": [0.5, -0.5]} for i in range(len(inputs))]
        usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
        return _json({"object": "list", "data": rows, "model": body["model"], "usage": usage})

    def _usage(self, prompt_tokens: int, cached_tokens: int) -> dict[str, Any]:
        """As vLLM says it: a zero of cached tokens is left out."""
        output_tokens = len(self.pieces)
        details = {"cached_tokens": cached_tokens} if cached_tokens and self.reports_cached else None
        return {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "completion_tokens": output_tokens,
            "prompt_tokens_details": details,
        }


class Dialect:
    """One endpoint's shapes: the plain answer and the events of a stream."""

    def __init__(self, upstream: OpenAIUpstream, body: Any, usage: dict[str, Any]) -> None:
        self.pieces = upstream.pieces
        self.text = "".join(upstream.pieces)
        self.model = body.get("model")
        self.usage = usage
        self.wants_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.number = upstream._answered  # noqa: SLF001 - internal state that no public name shows

    def plain(self) -> dict[str, Any]:
        """The whole answer."""
        raise NotImplementedError

    def events(self) -> Iterator[bytes]:
        """The stream's events, each as it goes over the wire."""
        raise NotImplementedError


class Chat(Dialect):
    """/v1/chat/completions."""

    def plain(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage}

    def events(self) -> Iterator[bytes]:
        head = self._head("chat.completion.chunk")
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        deltas += [{"content": piece} for piece in self.pieces]
        for delta in deltas:
            yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.wants_usage:
            yield _event({**head, "choices": [], "usage": self.usage})
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.number}", "object": kind, "created": 1_700_000_000, "model": self.model}


class Completions(Dialect):
    """/v1/completions."""

    def plain(self) -> dict[str, Any]:
        choice = {"index": 0, "text": self.text, "finish_reason": "stop", "logprobs": None}
        return {**self._head(), "choices": [choice], "usage": self.usage}

    def events(self) -> Iterator[bytes]:
        for position, piece in enumerate(self.pieces):
            finish = "stop" if position == len(self.pieces) - 1 else None
            yield _event({**self._head(), "choices": [{"index": 0, "text": piece, "finish_reason": finish}]})
        if self.wants_usage:
            yield _event({**self._head(), "choices": [], "usage": self.usage})
        yield b"data: [DONE]\n\n"

    def _head(self) -> dict[str, Any]:
        kind = "text_completion"
        return {"id": f"cmpl-{self.number}", "object": kind, "created": 1_700_000_000, "model": self.model}


class Responses(Dialect):
    """/v1/responses."""

    def plain(self) -> dict[str, Any]:
        content = [{"type": "output_text", "text": self.text, "annotations": []}]
        item = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": content}
        return {**self._head("completed"), "output": [item], "usage": self._usage()}

    def events(self) -> Iterator[bytes]:
        created = {"type": "response.created", "sequence_number": 0, "response": {**self._head("in_progress")}}
        yield _named_event(created)
        for position, piece in enumerate(self.pieces):
            yield _named_event(
                {
                    "type": "response.output_text.delta",
                    "sequence_number": position + 1,
                    "item_id": "msg_1",
                    "output_index": 0,
                    "content_index": 0,
                    "delta": piece,
                }
            )
        number = len(self.pieces) + 1
        yield _named_event({"type": "response.completed", "sequence_number": number, "response": self.plain()})

    def _usage(self) -> dict[str, Any]:
        cached = (self.usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        return {
            "input_tokens": self.usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": self.usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.usage["total_tokens"],
        }

    def _head(self, status: str) -> dict[str, Any]:
        return {
            "id": f"resp_{self.number}",
            "object": "response",
            "created_at": 1_700_000_000,
            "status": status,
            "model": self.model,
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
        }


_GENERATORS: dict[str, Callable[[OpenAIUpstream, Any, dict[str, Any]], Dialect]] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completions,
    "/v1/responses": Responses,
}


def render(body: Any) -> bytes:
    """The prompt as this engine's template lays it out: model, tools, then what is said, in order."""
    parts = [body.get("model"), body.get("tools"), body.get("instructions"), body.get("prompt")]
    said = body.get("messages") or body.get("input") or []
    parts += said if isinstance(said, list) else [said]
    return "".join(json.dumps(part) + "\n" for part in parts if part is not None).encode()


def _block_hashes(prompt: bytes) -> Iterator[bytes]:
    running = hashlib.blake2b(digest_size=16)
    for start in range(0, len(prompt) - BLOCK_BYTES + 1, BLOCK_BYTES):
        running.update(prompt[start : start + BLOCK_BYTES])
        yield running.digest()


def _large_request(*parts: Any) -> web.BaseRequest:
    message, payload, protocol, writer, task = parts
    return web.BaseRequest(
        message, payload, protocol, writer, task, asyncio.get_running_loop(), client_max_size=MAX_BODY_BYTES
    )


def _cut(request: web.BaseRequest) -> None:
    if request.transport is not None:
        request.transport.abort()


def _event(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def _named_event(event: dict[str, Any]) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\n" + _event(event)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "test"}


def _error(message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}


def _json(value: Any, status: int = 200) -> web.Response:
    return _json_bytes(json.dumps(value).encode(), status)


def _json_bytes(body: bytes, status: int, headers: tuple[tuple[str, str], ...] = ()) -> web.Response:
    named = {"content-type": "application/json", **{name.lower(): value for name, value in headers}}
    return web.Response(status=status, body=body, headers=named)

"""An upstream that answers agents in the dialect each of them speaks, and calls one of their tools first.

Asked with tools and without a result of one, it calls the tool that the test names. Afterwards it answers with the
words that it finds in the conversation and that no client can know without its tool: the test writes one into a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import zstandard
from aiohttp import web

from tests.support.openai_upstream import Asked, OpenAIUpstream

WORD = re.compile(r"cairn-[0-9a-f]{12}")
OUTPUT_TOKENS = 7
_PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/messages")
_UNRENDERED = frozenset({"cache_control", "id", "tool_use_id", "tool_call_id", "call_id"})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a client's tool."""

    name: str
    arguments: dict[str, Any]


@dataclass
class AgentEngine(OpenAIUpstream):
    """One replica. `tool_call` is made once in each conversation; `texts` are the answers it gave."""

    tool_call: ToolCall | None = None
    texts: list[str] = field(default_factory=list)
    tool_calls: int = 0

    @property
    def output_tokens(self) -> int:
        """Output tokens of all answers."""
        return OUTPUT_TOKENS * len(self.prompt_tokens)

    @property
    def generations(self) -> list[Asked]:
        """The requests that had a prompt."""
        return [asked for asked in self.requests if asked.target.split("?")[0] in _PATHS]

    async def _serve(self, request: web.BaseRequest, asked: Asked, failure: object) -> web.StreamResponse:
        path = asked.target.split("?")[0]
        if path == "/v1/models":
            return _json({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})
        if path == "/v1/messages/count_tokens":
            return _json({"input_tokens": len(rendered(asked.json())) // 4})
        if path not in _PATHS:
            return web.Response(status=404, body=b'{"error": {"message": "unknown path"}}')
        body = decoded(asked)
        prompt_tokens, cached_tokens = self.prefill(rendered(body))
        reply = self._reply(body)
        turn = Turn(reply, body["model"], len(self.prompt_tokens), prompt_tokens, cached_tokens)
        dialect = _DIALECTS[path](turn)
        if not body.get("stream"):
            return _json(dialect.plain())
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for event in dialect.events():
            await response.write(event)
        await response.write_eof()
        return response

    def _reply(self, body: Any) -> str | ToolCall:
        call = self.tool_call
        text = json.dumps(body)
        words = WORD.findall(text)
        if call is not None and not words and f'"{call.name}"' in json.dumps(body.get("tools") or []):
            self.tool_calls += 1
            return call
        answer = f"Answer {len(self.texts) + 1}: the word is {words[-1] if words else 'unknown'}."
        self.texts.append(answer)
        return answer


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer: text or a tool call, with its usage."""

    reply: str | ToolCall
    model: str
    number: int
    prompt_tokens: int
    cached_tokens: int


class Dialect(Protocol):
    """The shapes of one endpoint."""

    def plain(self) -> dict[str, Any]:
        """Return the whole answer."""
        ...

    def events(self) -> Iterator[bytes]:
        """Return the events of the stream."""
        ...


class Chat:
    """/v1/chat/completions."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._finish = "stop" if isinstance(turn.reply, str) else "tool_calls"

    def plain(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": None, **self._delta()}
        choice = {"index": 0, "message": message, "finish_reason": self._finish}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}

    def events(self) -> Iterator[bytes]:
        head = self._head("chat.completion.chunk")
        for delta in ({"role": "assistant", "content": ""}, self._delta()):
            yield _data({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield _data({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": self._finish}]})
        yield _data({**head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _delta(self) -> dict[str, Any]:
        reply = self._turn.reply
        if isinstance(reply, str):
            return {"content": reply}
        function = {"name": reply.name, "arguments": json.dumps(reply.arguments)}
        call = {"index": 0, "id": f"call_{self._turn.number}", "type": "function", "function": function}
        return {"tool_calls": [call]}

    def _head(self, kind: str) -> dict[str, Any]:
        number, model = self._turn.number, self._turn.model
        return {"id": f"chatcmpl-{number}", "object": kind, "created": 1_700_000_000, "model": model}

    def _usage(self) -> dict[str, Any]:
        turn = self._turn
        return {
            "prompt_tokens": turn.prompt_tokens,
            "completion_tokens": OUTPUT_TOKENS,
            "total_tokens": turn.prompt_tokens + OUTPUT_TOKENS,
            "prompt_tokens_details": {"cached_tokens": turn.cached_tokens},
        }


class Responses:
    """/v1/responses."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def plain(self) -> dict[str, Any]:
        turn = self._turn
        usage = {
            "input_tokens": turn.prompt_tokens,
            "input_tokens_details": {"cached_tokens": turn.cached_tokens},
            "output_tokens": OUTPUT_TOKENS,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": turn.prompt_tokens + OUTPUT_TOKENS,
        }
        return {**self._head("completed"), "output": [self._item()], "usage": usage}

    def events(self) -> Iterator[bytes]:
        item = self._item()
        place = {"item_id": item["id"], "output_index": 0}
        events: list[dict[str, Any]] = [
            {"type": "response.created", "response": self._head("in_progress")},
            {"type": "response.output_item.added", "output_index": 0, "item": {**item, "status": "in_progress"}},
        ]
        if isinstance(self._turn.reply, str):
            delta = {"content_index": 0, "delta": self._turn.reply}
            events.append({"type": "response.output_text.delta", **place, **delta})
        else:
            events.append(
                {"type": "response.function_call_arguments.delta", **place, "delta": item["arguments"]},
            )
        events += [
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": "response.completed", "response": self.plain()},
        ]
        for number, event in enumerate(events):
            yield _named({**event, "sequence_number": number})

    def _item(self) -> dict[str, Any]:
        number, reply = self._turn.number, self._turn.reply
        if isinstance(reply, str):
            content = [{"type": "output_text", "text": reply, "annotations": []}]
            said = {"type": "message", "role": "assistant", "content": content}
            return {**said, "id": f"msg_{number}", "status": "completed"}
        call = {"type": "function_call", "name": reply.name, "arguments": json.dumps(reply.arguments)}
        return {**call, "id": f"fc_{number}", "call_id": f"call_{number}", "status": "completed"}

    def _head(self, status: str) -> dict[str, Any]:
        turn = self._turn
        head = {"id": f"resp_{turn.number}", "object": "response", "created_at": 1_700_000_000, "model": turn.model}
        return {**head, "status": status, "output": [], "tools": [], "tool_choice": "auto"}


class Messages:
    """/v1/messages. `input_tokens` leaves out what was cached, as Anthropic's does."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._stop = "end_turn" if isinstance(turn.reply, str) else "tool_use"

    def plain(self) -> dict[str, Any]:
        usage = {**self._prompt_usage(), "output_tokens": OUTPUT_TOKENS}
        ending = {"stop_reason": self._stop, "stop_sequence": None}
        return {**self._head(), "content": [self._block()], **ending, "usage": usage}

    def events(self) -> Iterator[bytes]:
        block = self._block()
        head = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
        usage = {**self._prompt_usage(), "output_tokens": 1}
        yield _named({"type": "message_start", "message": {**head, "usage": usage}})
        if block["type"] == "text":
            empty: dict[str, Any] = {"type": "text", "text": ""}
            delta = {"type": "text_delta", "text": block["text"]}
        else:
            empty = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield _named({"type": "content_block_start", "index": 0, "content_block": empty})
        yield _named({"type": "ping"})
        yield _named({"type": "content_block_delta", "index": 0, "delta": delta})
        yield _named({"type": "content_block_stop", "index": 0})
        ending = {"stop_reason": self._stop, "stop_sequence": None}
        yield _named({"type": "message_delta", "delta": ending, "usage": {"output_tokens": OUTPUT_TOKENS}})
        yield _named({"type": "message_stop"})

    def _block(self) -> dict[str, Any]:
        reply = self._turn.reply
        if isinstance(reply, str):
            return {"type": "text", "text": reply}
        return {"type": "tool_use", "id": f"toolu_{self._turn.number}", "name": reply.name, "input": reply.arguments}

    def _prompt_usage(self) -> dict[str, Any]:
        turn = self._turn
        fresh = turn.prompt_tokens - turn.cached_tokens
        return {
            "input_tokens": fresh,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": turn.cached_tokens,
        }

    def _head(self) -> dict[str, Any]:
        return {"id": f"msg_{self._turn.number}", "type": "message", "role": "assistant", "model": self._turn.model}


_DIALECTS: dict[str, Callable[[Turn], Dialect]] = dict(zip(_PATHS, (Chat, Responses, Messages), strict=True))


def decoded(asked: Asked) -> Any:
    """The body of a request, whether it was compressed or not."""
    if asked.header(b"content-encoding") == b"zstd":
        return json.loads(zstandard.ZstdDecompressor().decompressobj().decompress(asked.body))
    return json.loads(asked.body)


def rendered(body: Any) -> bytes:
    """The prompt as an engine's template lays it out: tools, system, messages; without ids and cache marks."""
    parts = [body.get(name) for name in ("tools", "system", "instructions")]
    said = body.get("messages") or body.get("input") or []
    parts += said if isinstance(said, list) else [said]
    return "".join(json.dumps(_plain(part)) + "\n" for part in parts if part is not None).encode()


def _plain(value: Any) -> Any:
    """A value as it is rendered: a list of one text like that text, and no billing block."""
    if isinstance(value, list):
        value = [each for each in value if not (isinstance(each, dict) and _is_billing(each))]
        if len(value) == 1 and isinstance(value[0], dict) and value[0].get("type") == "text":
            return value[0]["text"]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if name not in _UNRENDERED}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _is_billing(part: dict[str, Any]) -> bool:
    return str(part.get("text", "")).startswith("x-anthropic-billing-header")


def _json(value: Any) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), content_type="application/json")


def _data(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event).encode() + b"\n\n"


def _named(event: dict[str, Any]) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\n" + _data(event)

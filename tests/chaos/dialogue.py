"""The requests of the load and the answers of the replicas, byte for byte. Pure; both sides use it.

An answer depends on nothing but the messages of its request, except for the number of cached tokens, which the
replica reports and the client reads back. So the client knows every byte that must come, and a request that was
damaged, mixed up with another or answered twice is seen.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

MODEL = "chaos"
PATH = "/v1/chat/completions"
BYTES_PER_TOKEN = 4
_WORDS = ("cairn", "ridge", "scree", "tarn", "moor", "beck", "fell", "gill")
_SHARED_WORDS = 900  # of each conversation's first message: long enough to be indexed
_CACHED = re.compile(rb'"cached_tokens": (\d+)')


class Answer(NamedTuple):
    """A replica's response to one list of messages."""

    id: str
    words: tuple[str, ...]
    prompt_tokens: int

    @property
    def output_tokens(self) -> int:
        """One token per word."""
        return len(self.words)


class Ask(NamedTuple):
    """One request of the load."""

    body: bytes
    answer: Answer
    stream: bool
    asks_usage: bool

    def expected(self, received: bytes) -> bytes:
        """Return the body that must come, with the number of cached tokens that `received` reports."""
        found = _CACHED.search(received)
        cached = min(int(found[1]), self.answer.prompt_tokens) if found else 0
        if self.stream:
            return b"".join(events(self.answer, cached, usage=self.asks_usage))
        return whole(self.answer, cached)


def ask(conversation: int, turn: str, *, stream: bool, asks_usage: bool) -> Ask:
    """Return the request for one `turn`, a text that no other request has, of a conversation."""
    messages = [_first(conversation), {"role": "user", "content": turn}]
    body: dict[str, Any] = {"model": MODEL, "messages": messages, "stream": stream}
    if asks_usage and stream:
        body["stream_options"] = {"include_usage": True}
    return Ask(json.dumps(body).encode(), answer_to(messages), stream, asks_usage)


def upload(conversation: int) -> bytes:
    """Return the request that stores the first message of a conversation as a context."""
    tree = {"model": MODEL, "messages": [_first(conversation)], "ttl": 600}
    return json.dumps(tree).encode()


def ask_stored(conversation: int, context_id: str, turn: str) -> Ask:
    """Return a request that names a stored conversation; the replica gets its message in place of the name."""
    question = {"role": "user", "content": turn}
    messages = [{"role": "cache", "content": f"cache_id={context_id}"}, question]
    body = json.dumps({"model": MODEL, "messages": messages}).encode()
    return Ask(body, answer_to([_first(conversation), question]), stream=False, asks_usage=False)


def _first(conversation: int) -> dict[str, str]:
    shared = " ".join(f"{_WORDS[(conversation + i) % len(_WORDS)]}{conversation}" for i in range(_SHARED_WORDS))
    return {"role": "system", "content": shared}


def answer_to(messages: Sequence[Any]) -> Answer:
    """Return the answer to `messages`."""
    text = json.dumps(messages, sort_keys=True).encode()
    digest = hashlib.sha256(text).hexdigest()
    words = tuple(_WORDS[int(digit, 16) % len(_WORDS)] + digit for digit in digest[: 4 + int(digest[0], 16) % 8])
    return Answer(digest[:16], words, -(-len(text) // BYTES_PER_TOKEN))


def whole(answer: Answer, cached: int) -> bytes:
    """Return the body of a plain answer."""
    message = {"role": "assistant", "content": " ".join(answer.words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    tree = {**_head(answer, "chat.completion"), "choices": [choice], "usage": _usage(answer, cached)}
    return json.dumps(tree).encode()


def events(answer: Answer, cached: int, *, usage: bool) -> list[bytes]:
    """Return the events of a stream."""
    head = _head(answer, "chat.completion.chunk")
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word} for word in answer.words]
    choices: list[dict[str, Any]] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    found = [_event({**head, "choices": [choice]}) for choice in choices]
    if usage:
        found.append(_event({**head, "choices": [], "usage": _usage(answer, cached)}))
    return [*found, b"data: [DONE]\n\n"]


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{answer.id}", "object": kind, "created": 1_700_000_000, "model": MODEL}


def _usage(answer: Answer, cached: int) -> dict[str, Any]:
    details: dict[str, Any] = {"cached_tokens": cached}
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.prompt_tokens + answer.output_tokens,
        "prompt_tokens_details": details,
    }


def _event(tree: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(tree).encode() + b"\n\n"

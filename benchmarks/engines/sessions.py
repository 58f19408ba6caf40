"""Conversations as clients hold them: each turn repeats all that went before. Bodies are JSON, built from a seed."""

from __future__ import annotations

import json
from functools import lru_cache
from random import Random
from typing import Any

from benchmarks.engines.templates import BYTES_PER_TOKEN

_WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "as",
    "was",
    "with",
    "be",
    "by",
    "on",
    "not",
    "he",
    "this",
)


@lru_cache(4_096)
def words(seed: object, tokens: int) -> str:
    """Return text of `tokens` tokens, equal for equal seeds."""
    random, size = Random(str(seed)), tokens * BYTES_PER_TOKEN
    parts = [f"{seed} "]
    length = len(parts[0])
    while length < size:
        word = random.choice(_WORDS)
        parts.append(word + " ")
        length += len(word) + 1
    return "".join(parts)[:size]


def tools(name: str, tokens: int) -> list[dict[str, Any]]:
    """Return one tool whose description has about `tokens` tokens."""
    function = {"name": name, "description": words(f"tool {name}", tokens), "parameters": {"type": "object"}}
    return [{"type": "function", "function": function}]


class Session:
    """One conversation. `ask` adds a user message; `answered` the answer, as the client keeps it."""

    def __init__(
        self, name: str, system: str | None = None, tool_list: list[dict[str, Any]] | None = None, **fields: Any
    ) -> None:
        self.name = name
        self.fields = fields
        self.tools = tool_list
        self.messages: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        self._turns = 0

    def ask(self, tokens: int = 50, role: str = "user") -> bytes:
        """Return the next request's body, with a new message of `tokens` tokens."""
        self._turns += 1
        self.messages.append({"role": role, "content": words(f"{self.name} turn {self._turns}", tokens)})
        return self.body()

    def answered(self, tokens: int = 16, reasoning_tokens: int = 0) -> None:
        """Keep the answer: text as engines here generate it, with some reasoning before it if wanted."""
        message: dict[str, Any] = {"role": "assistant", "content": "w " * (tokens * BYTES_PER_TOKEN // 2)}
        if reasoning_tokens:
            message["reasoning_content"] = words(f"{self.name} thought {self._turns}", reasoning_tokens)
        self.messages.append(message)

    def body(self, **more: Any) -> bytes:
        """Return the body of the request in its present state."""
        request: dict[str, Any] = {"model": "m", "messages": self.messages, **self.fields, **more}
        if self.tools is not None:
            request["tools"] = self.tools
        return json.dumps(request).encode()

"""Sessions in the shapes of known agents, written from public descriptions of what they send. Bodies are JSON.

Each turn is one request of a tool loop: the client repeats all that went before, adds the answer and a tool's result.
The shapes differ in what breaks a key that follows the client's bytes: a billing block with a nonce before the system
prompt, cache marks that move, reasoning that is sent back, reminders put into the last message, a compaction that
replaces the history by a summary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.engines.sessions import tools, words

MARK: dict[str, Any] = {"cache_control": {"type": "ephemeral"}}


def claude_code(name: str, turns: int = 20, *, nonce: bool = True) -> Iterator[bytes]:
    """Claude Code through an OpenAI-compatible gateway: system parts, marks on two messages, a billing block.

    Reminders come in the user's messages; after half of the turns the history is compacted.
    """
    parts: list[dict[str, Any]] = [{"type": "text", "text": "You are an agent for the command line."}]
    parts.append({"type": "text", "text": words("claude system", 2_000), **MARK})
    history: list[dict[str, Any]] = [
        _user(f"{words(f'{name} task', 200)} <system-reminder>be brief</system-reminder>")
    ]
    for turn in range(turns):
        system = list(parts)
        if nonce:
            system.insert(
                0, {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.9; cch={turn:05x};"}
            )
        messages = [{"role": "system", "content": system}, *history[:-2], *[_marked(each) for each in history[-2:]]]
        yield _body(messages, tools("bash", 3_000))
        history += [_called(name, turn), _result(name, turn, 400)]
        if turn == turns // 2:
            history = [_user(words(f"{name} summary", 900))]


def codex(name: str, turns: int = 20, *, nonce: bool = True) -> Iterator[bytes]:
    """Codex: a developer message, the environment in a user message, reasoning sent back, a session id in the key."""
    del nonce
    history: list[dict[str, Any]] = [
        {"role": "developer", "content": words("codex system", 1_800)},
        _user(f"<environment_context>cwd {name}</environment_context>"),
        _user(words(f"{name} task", 150)),
    ]
    for turn in range(turns):
        yield _body(history, tools("shell", 1_200), prompt_cache_key=name)
        answer = _called(name, turn)
        answer["reasoning_content"] = words(f"{name} thought {turn}", 120)
        history += [answer, _result(name, turn, 500)]
        if turn % 7 == 6:
            history.append(_user(words(f"{name} further {turn}", 60)))


def cline(name: str, turns: int = 20, *, nonce: bool = True) -> Iterator[bytes]:
    """Cline: no tools in the request but all of them in the system prompt; details of the environment each turn."""
    del nonce
    history: list[dict[str, Any]] = [{"role": "system", "content": words("cline system with tools", 5_000)}]
    history.append(_user(words(f"{name} task", 150)))
    for turn in range(turns):
        yield _body(history)
        history.append({"role": "assistant", "content": words(f"{name} answer {turn}", 80)})
        history.append(
            _user(f"{words(f'{name} result {turn}', 300)} <environment_details>{turn}</environment_details>")
        )


def openhands(name: str, turns: int = 20, *, nonce: bool = True) -> Iterator[bytes]:
    """OpenHands: a marked system part, tools, results as tool messages; now and then a sub-agent."""
    del nonce
    system = {"role": "system", "content": [{"type": "text", "text": words("openhands system", 3_000), **MARK}]}
    history: list[dict[str, Any]] = [system, _user(words(f"{name} task", 250))]
    for turn in range(turns):
        yield _body([*history[:-1], _marked(history[-1])], tools("execute", 2_000))
        if turn % 5 == 4:
            sub = {"role": "system", "content": words("sub-agent system", 700)}
            yield _body([sub, _user(words(f"{name} sub-task {turn}", 300))], tools("search", 600))
        history += [_called(name, turn), _result(name, turn, 350)]


SHAPES = {"claude code": claude_code, "codex": codex, "cline": cline, "openhands": openhands}


def _body(messages: list[dict[str, Any]], tool_list: list[dict[str, Any]] | None = None, **more: Any) -> bytes:
    request: dict[str, Any] = {"model": "m", "messages": messages, "max_tokens": 16, **more}
    if tool_list is not None:
        request["tools"] = tool_list
    return json.dumps(request).encode()


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}]}


def _called(name: str, turn: int) -> dict[str, Any]:
    function = {"name": "bash", "arguments": json.dumps({"command": words(f"{name} call {turn}", 30)})}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": f"call_{turn}", "type": "function", "function": function}],
    }


def _result(name: str, turn: int, tokens: int) -> dict[str, Any]:
    part = {"type": "text", "text": words(f"{name} result {turn}", tokens)}
    return {"role": "tool", "tool_call_id": f"call_{turn}", "content": [part]}


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """Mark the last part of a message whose content is in parts."""
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": [*content[:-1], {**content[-1], **MARK}]}

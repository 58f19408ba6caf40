"""The key of a prompt as its engine renders it: which bytes, in which order, precede which.

Only the key is arranged; the body goes on as it came. A wrong arrangement costs a wrong guess of a route, never
content. The facts of a model's template come from `proxy.fleet.templates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from proxy.model import Prompt, TemplateFacts, ToolOrder
from proxy.wire.schemas import NONE, decode_message_head

Span = memoryview | bytes

BILLING_MARK: Final = b"x-anthropic-billing-header"
"""Begins a block that changes with each request, before the system prompt; most engines leave it out."""

_BILLING_REACH: Final = 256
"""Bytes at the start of the system prompt in which the mark is looked for: it begins the first text."""

_CACHE_MARK: Final = b'"cache_control"'
_MARKED_SPANS: Final = 6
"""Clients mark the last few messages and move the marks with each turn."""

_MARK_REACH: Final = 160
"""Bytes at the end of a message in which a mark is looked for: it follows the text of the last part."""

_SYSTEM_FIRST: Final = ToolOrder.SYSTEM_FIRST
_TOOLS_LAST: Final = ToolOrder.TOOLS_LAST
_TOOLS_FIRST: Final = ToolOrder.TOOLS_FIRST
_SYSTEM_ROLES: Final = frozenset({"system", "developer"})


def keyed_salt(prompt: Prompt, facts: TemplateFacts, today: str) -> tuple[bytes, ...]:
    """Return what precedes the prompt in its key: the model and what changes the head of the rendered text."""
    salt = prompt.chain_salt
    if not (facts.root or facts.dated or (len(salt) > 1 and (facts.headless or not facts.none_drops_tools))):
        return salt
    kept: list[bytes] = [facts.root.encode() or salt[0]]
    if facts.dated:
        kept += (b"date", today.encode())
    for place in range(1, len(salt) - 1, 2):
        name = salt[place]
        if name.decode(errors="replace") in facts.headless or (name == b"tool_choice" and not facts.none_drops_tools):
            continue
        kept += (name, salt[place + 1])
    return tuple(kept)


def keyed_spans(prompt: Prompt, facts: TemplateFacts) -> Sequence[Span]:
    """Return the prompt's spans in the order in which the engine renders them, without what it leaves out."""
    spans: Sequence[Span] = prompt.spans
    system = prompt.tool_spans  # the place of the system prompt
    if facts.order is not _TOOLS_FIRST or facts.drops_reasoning or facts.moves_system:
        spans = _arranged(prompt, facts)
        system = len(spans) - len(prompt.spans) + prompt.tool_spans if facts.order is _TOOLS_FIRST else 0
    elif _drops_tools(prompt, facts):
        spans, system = spans[system:], 0
    return _without_marks(spans, system, keeps_billing=facts.keeps_billing)


def _drops_tools(prompt: Prompt, facts: TemplateFacts) -> bool:
    return prompt.tool_spans > 0 and facts.none_drops_tools and prompt.chain_salt[-2:] == (b"tool_choice", b"none")


def _arranged(prompt: Prompt, facts: TemplateFacts) -> list[Span]:
    count = prompt.tool_spans
    tools: list[Span] = [] if _drops_tools(prompt, facts) else list(prompt.spans[:count])
    rest: list[Span] = list(prompt.spans[count:])
    leading = prompt.system_spans if prompt.system_spans >= 0 else _leading_systems(rest)
    systems, messages = rest[:leading], rest[leading:]
    if facts.moves_system:
        roles = [_role(message) for message in messages]
        systems += [each for each, role in zip(messages, roles, strict=True) if role in _SYSTEM_ROLES]
        messages = [each for each, role in zip(messages, roles, strict=True) if role not in _SYSTEM_ROLES]
    last_user = _last_user(messages) if facts.drops_reasoning or facts.order is _TOOLS_LAST else 0
    if facts.drops_reasoning:
        messages = [_without_reasoning(message) for message in messages[:last_user]] + messages[last_user:]
    if facts.order is _SYSTEM_FIRST:
        return [*systems, *tools, *messages]
    if facts.order is _TOOLS_LAST:
        return [*systems, *messages[:last_user], *tools, *messages[last_user:]]
    return [*tools, *systems, *messages]


def _leading_systems(messages: Sequence[Span]) -> int:
    leading = 0
    while leading < len(messages) and _role(messages[leading]) in _SYSTEM_ROLES:
        leading += 1
    return leading


def _last_user(messages: Sequence[Span]) -> int:
    """Return the place of the last user message; 0 if there is none."""
    for place in range(len(messages) - 1, -1, -1):
        if _role(messages[place]) == "user":
            return place
    return 0


def _role(message: Span) -> str:
    try:
        return decode_message_head(message).role
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def _without_reasoning(message: Span) -> Span:
    """Return the message without the value of its reasoning."""
    try:
        head = decode_message_head(message)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return message
    raw = head.reasoning_content if head.reasoning_content is not NONE else head.reasoning
    if raw is NONE:
        return message
    text, reasoning = bytes(message), bytes(raw)
    start = text.find(reasoning)
    end = start + len(reasoning)
    return text[:start] + text[end:]


def _without_marks(spans: Sequence[Span], system: int, *, keeps_billing: bool) -> Sequence[Span]:
    """Leave out the billing block of the system prompt, which is span `system`, and cache marks that move."""
    changed: list[Span] | None = None
    if not keeps_billing and system < len(spans):
        shorter = _without_billing(spans[system])
        if shorter is not None:
            changed = list(spans)
            changed[system] = shorter
    for place in range(max(len(spans) - _MARKED_SPANS, 0), len(spans)):
        span = spans[place]
        if bytes(span[-_MARK_REACH:]).find(_CACHE_MARK) >= 0:
            changed = list(spans) if changed is None else changed
            changed[place] = _without_cache_mark(bytes(changed[place]))
    return spans if changed is None else changed


def _without_billing(span: Span) -> bytes | None:
    """Return the span without the text that begins with the billing mark; None if there is none."""
    start = bytes(span[:_BILLING_REACH]).find(BILLING_MARK)
    if start < 0:
        return None
    text = bytes(span)
    end = text.find(b'"', start)
    return text[:start] + text[end:]


def _without_cache_mark(text: bytes) -> bytes:
    """Return the message's text without its last mark and the comma before it."""
    mark = text.rfind(_CACHE_MARK)
    end = text.find(b"}", mark) + 1
    start = mark
    while start > 0 and text[start - 1 : start] in (b" ", b",", b"\n"):
        start -= 1
    return text[:start] + text[end:] if end > 0 else text

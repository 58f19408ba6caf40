"""Arrange the key of a prompt as its engine renders it: the bytes that count, in the engine's order.

Only the key is arranged; the body is passed on unchanged. A wrong arrangement can only cause a wrong routing guess,
never wrong content. The facts of a model's template come from `proxy.fleet.templates`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

import msgspec

from proxy.model import TemplateFacts, ToolOrder
from proxy.records import Prompt
from proxy.wire.media import SHORT_BODY_BYTES
from proxy.wire.schemas import NONE, decode_message_head, decode_raw_list, decode_raw_members

Span = memoryview | bytes

BILLING_MARK: Final = b"x-anthropic-billing-header"
"""The beginning of a block before the system prompt that changes with each request; most engines leave it out."""

_BILLING_REACH: Final = 256
"""Bytes at the start of the system prompt that are searched for the mark, which begins the first text."""

_BILLING_ENDS: Final = (b"\\n", b'"')
"""The mark's line ends with the text or with a line break in it, as JSON writes it."""

_ID_KEY: Final = b'"id"'
_ID_HEAD_BYTES: Final = 64
_ID_TAIL_BYTES: Final = 96
"""Bytes at both ends of a message that are searched for the key of its own id: clients write it first or last."""

_ID_SAMPLE: Final = 3
"""Messages after the system prompt that are searched for ids: a client that keeps ids has them from the start."""

_THOUGHT_OPENS: Final = (b"<think>", b"\\u003cthink\\u003e")
_THOUGHT_ENDS: Final = (b"</think>", b"\\u003c/think\\u003e", b"<\\/think>")
"""Marks around reasoning that clients leave in the text of a message, as JSON writes them."""

_RESULT_MARK: Final = b'"tool_result"'
_RESULT_REACH: Final = 160
"""Bytes at the start of a user message that are searched for results of tools: engines render these as tool
messages and not as a user message.
"""

_RECENT_MARK: Final = b"\0"

_ANY_USER: Final = b'{"role":"user"}'
_MARKS_UNKNOWN: Final = 1 << 30  # every message is searched

CACHE_MARK: Final = b'"cache_control"'
_BREAKPOINT: Final = b'"prompt_cache_breakpoint"'  # OpenAI's mark, which is only written into parts
"""Marks of the places up to which a provider caches. Clients move them with each turn: from the last two messages of
a user, say, between which there may be dozens of others.
"""

_MARK_REACH: Final = 160
"""Bytes at the end of a message that are searched for a mark first: it usually follows the text of the last part."""

_MARK_VALUE = re.compile(rb"\s*:\s*(?:null|\{[^{}]*\})")
_MARK_BYTES_MOST: Final = 256  # of the value of a mark with its key, and of white space beside it
_MARKS_MOST: Final = 512
"""Most marks that are looked at, with those that turn out to be none. Providers take four in a request; a hostile one
may contain millions.
"""

_LONE_TEXT = re.compile(
    rb'"(?:content|output)"\s*:\s*(\[\s*\{\s*"type"\s*:\s*"(?:input_)?text"\s*,\s*"text"\s*:\s*)"'
)
_LONE_TEXT_REACH: Final = 128
"""Bytes at the start of a message in which the first part of its content begins."""

_LONE_TEXT_END: Final = b'"}]'
_LIST_END: Final = b"]}"  # ends a message whose content is a list
_LIST_IN_END: Final = b"}]}"  # ends such a message, marked or not
_LONE_TEXT_LEAST: Final = 36  # length of such a message with an empty text, without its role
_LONE_TEXT_MOST: Final = 1 << 20  # a longer one is not copied for its key
_END_OF_LIST: Final = ord("]")
_BACKSLASH: Final = ord("\\")
_WHITE: Final = b" \t\r\n"

_SYSTEM_FIRST: Final = ToolOrder.SYSTEM_FIRST
_TOOLS_LAST: Final = ToolOrder.TOOLS_LAST
_TOOLS_FIRST: Final = ToolOrder.TOOLS_FIRST
_SYSTEM_ROLES: Final = frozenset({"system", "developer"})
_SYSTEM_ONLY: Final = frozenset({"system"})

_THINKING: Final = b"thinking"
_KWARGS: Final = b"chat_template_kwargs"
_REASONING: Final = b"reasoning"
_EFFORT: Final = "reasoning_effort"
_EFFORTLESS: Final = frozenset({"effort", "summary", "generate_summary"})
"""Members of the Responses API's `reasoning`: its effort, and how much of the reasoning is shown to the client."""


def keyed_salt(prompt: Prompt, facts: TemplateFacts, today: str) -> tuple[bytes, ...]:
    """Return what precedes the prompt in its key: the model, and arguments that change the rendered head."""
    salt = prompt.chain_salt
    has_thinking = prompt.is_anthropic and _THINKING in salt[1:]
    if not (
        has_thinking
        or facts.root
        or facts.dated
        or (len(salt) > 1 and (facts.headless or facts.late_arguments or not facts.none_drops_tools))
    ):
        return salt
    left_out = facts.headless | facts.late_arguments
    kept: list[bytes] = [facts.root.encode() or salt[0]]
    if facts.dated:
        kept += (b"date", today.encode())
    for place in range(1, len(salt) - 1, 2):
        name, value = salt[place], salt[place + 1]
        if has_thinking and name == _THINKING:
            continue
        if name.decode(errors="replace") in left_out or (name == b"tool_choice" and not facts.none_drops_tools):
            continue
        if left_out and (name == _KWARGS or (name == _REASONING and _EFFORT in left_out)):
            value = _without_headless(value, left_out | _EFFORTLESS if name == _REASONING else left_out)
            if not value:
                continue
        kept += (name, value)
    return tuple(kept)


def _without_headless(value: bytes, headless: frozenset[str]) -> bytes:
    """Return the JSON object `value` without the members in `headless`; empty if none is left."""
    try:
        members = decode_raw_members(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return value
    kept = [b'"%b":%b' % (name.encode(), bytes(member)) for name, member in members.items() if name not in headless]
    return value if len(kept) == len(members) else b",".join(kept)


def keyed_spans(prompt: Prompt, facts: TemplateFacts) -> Sequence[Span]:
    """Return the prompt's spans in the order in which the engine renders them, without what it leaves out."""
    if prompt.is_anthropic and len(prompt.chain_salt) > 1:
        prompt = _with_thinking(prompt, facts)
    if facts.late_arguments and len(prompt.chain_salt) > 1:
        prompt = _with_late_arguments(prompt, facts.late_arguments)
        facts = msgspec.structs.replace(facts, late_arguments=frozenset())
    if facts.rewrites_turns:
        return _with_recent_marks(keyed_spans(prompt, msgspec.structs.replace(facts, rewrites_turns=False)))
    if facts.joins_head:
        return _with_joint_head(prompt, msgspec.structs.replace(facts, joins_head=False))
    return _without_what_changes(prompt, facts)


def _without_what_changes(prompt: Prompt, facts: TemplateFacts) -> Sequence[Span]:
    """Return the spans in the engine's order, without marks, ids and lists that change from turn to turn."""
    spans: Sequence[Span] = prompt.spans
    system = prompt.tool_spans  # the place of the system prompt
    if facts.order is not _TOOLS_FIRST or facts.moves_system or facts.system_last or _drops_any(facts):
        spans = _arranged(prompt, facts)
        system = len(spans) - len(prompt.spans) + prompt.tool_spans if facts.order is _TOOLS_FIRST else 0
    elif _drops_tools(prompt, facts):
        spans, system = spans[system:], 0
    body = prompt.body
    keeps_billing = facts.keeps_billing and not (prompt.is_anthropic and facts.messages_drop_billing)
    marks = prompt.cache_marks
    if 0 < len(body) <= SHORT_BODY_BYTES:
        if marks or body.find(_BREAKPOINT) >= 0 or body.find(BILLING_MARK) >= 0:
            spans = _without_marks(spans, system, marks, keeps_billing=keeps_billing)
        if body.find(_LIST_IN_END) >= 0:
            spans = _with_strings(spans)
        if body.find(_ID_KEY) < 0:
            return spans
    elif marks == 0 and _is_key_already(spans, system):
        return spans
    else:
        spans = _with_strings(_without_marks(spans, system, marks, keeps_billing=keeps_billing))
    return _without_ids(spans, system)


def _without_ids(spans: Sequence[Span], system: int) -> Sequence[Span]:
    """Return the spans without the ids of messages, if one of the first from `system` on has one."""
    for place in range(system, min(system + 1 + _ID_SAMPLE, len(spans))):
        if _may_carry_id(spans[place]):
            return [*spans[:place], *[_without_id(span) for span in spans[place:]]]
    return spans


def _with_thinking(prompt: Prompt, facts: TemplateFacts) -> Prompt:
    """Return a prompt of Anthropic's dialect with its `thinking` after the system prompt.

    A change of it leaves tools and system prompt cached at the provider. `keyed_salt` leaves it out.
    """
    salt, place = prompt.chain_salt, prompt.tool_spans + prompt.system_spans
    if _THINKING not in salt[1:] or "thinking" in facts.headless:
        return prompt
    at = salt.index(_THINKING, 1)
    spans = (*prompt.spans[:place], salt[at + 1], *prompt.spans[place:])
    rest = (*salt[:at], *salt[at + 2 :])
    return dataclasses.replace(prompt, spans=spans, chain_salt=rest, system_spans=prompt.system_spans + 1)


def _with_late_arguments(prompt: Prompt, names: frozenset[str]) -> Prompt:
    """Return a prompt with those of its template arguments that are in `names` before its first turn.

    Prompts that differ in them share tools and system messages. `keyed_salt` leaves them out.
    """
    found: list[bytes] = []
    salt = prompt.chain_salt
    for name, value in zip(salt[1:-1:2], salt[2::2], strict=True):
        if name.decode(errors="replace") in names:
            found += (name, value)
        elif name == _KWARGS or (name == _REASONING and _EFFORT in names):
            kept = _without_headless(value, names | _EFFORTLESS if name == _REASONING else names)
            found += () if kept == value else (name, value)
    if not found:
        return prompt
    place = prompt.tool_spans
    place += _leading_systems(prompt, prompt.spans[place:], _SYSTEM_ROLES)
    spans = (*prompt.spans[:place], b"\0".join(found), *prompt.spans[place:])
    return dataclasses.replace(prompt, spans=spans)


def _with_recent_marks(spans: Sequence[Span]) -> Sequence[Span]:
    """Return the spans with a mark on each answer after the last user message, whose key is another before it."""
    first = max(_last_user(spans), 0)
    recent = [bytes(span) + _RECENT_MARK if _role(span) == "assistant" else span for span in spans[first:]]
    return [*spans[:first], *recent]


def _with_joint_head(prompt: Prompt, facts: TemplateFacts) -> Sequence[Span]:
    """Return the spans behind a digest of tools and system messages, so that prompts share both or nothing."""
    spans = keyed_spans(prompt, facts)
    head = spans
    if facts.order is not _TOOLS_FIRST:
        head = keyed_spans(prompt, msgspec.structs.replace(facts, order=_TOOLS_FIRST))
    count = 0 if _drops_tools(prompt, facts) else prompt.tool_spans
    count += _leading_systems(prompt, prompt.spans[prompt.tool_spans :], _SYSTEM_ROLES)
    digest = blake2b(digest_size=16)
    for span in head[:count]:
        digest.update(span)
    return [digest.digest(), *spans]


def stored_first(rest: Sequence[Span], facts: TemplateFacts, *, has_arguments: bool = False) -> bool:
    """Return whether a stored context is always rendered before the messages that follow it, in one way.

    `has_arguments` means that the request has template arguments, which may be rendered within it.
    """
    if has_arguments and facts.late_arguments:
        return False
    if facts.moves_system or facts.joins_head or facts.system_last or facts.order is _TOOLS_LAST:
        return False
    return not (facts.drops_reasoning or facts.drops_thoughts or facts.rewrites_turns) or _last_user(rest) >= 0


def keyed_stored(
    prompt: Prompt, tools: bytes, messages: Sequence[Span], rest: Sequence[Span], facts: TemplateFacts
) -> Sequence[Span]:
    """Return the spans of a stored context, and of the messages that follow it, as `keyed_spans` does.

    With an empty `rest` they are those of the context alone, valid before any messages for which `stored_first`
    holds.
    """
    listed: list[Span] = [tools] if tools else []
    count = len(listed)
    listed += messages
    listed += rest or (_ANY_USER,)
    # the body does not contain the context's messages, so nothing can be concluded from it
    whole = dataclasses.replace(
        prompt, body=b"", spans=tuple(listed), tool_spans=count, system_spans=-1, cache_marks=_MARKS_UNKNOWN
    )
    spans = keyed_spans(whole, facts)
    return spans if rest else spans[:-1]


def _drops_any(facts: TemplateFacts) -> bool:
    return facts.drops_reasoning or facts.drops_thoughts or facts.ignores_reasoning


def _drops_tools(prompt: Prompt, facts: TemplateFacts) -> bool:
    return prompt.tool_spans > 0 and facts.none_drops_tools and prompt.chain_salt[-2:] == (b"tool_choice", b"none")


def _arranged(prompt: Prompt, facts: TemplateFacts) -> list[Span]:
    count = prompt.tool_spans
    tools: list[Span] = [] if _drops_tools(prompt, facts) else list(prompt.spans[:count])
    rest: list[Span] = list(prompt.spans[count:])
    system_roles = _SYSTEM_ONLY if facts.developer_in_place else _SYSTEM_ROLES
    leading = _leading_systems(prompt, rest, system_roles)
    if facts.splits_systems and prompt.system_spans <= 0:
        leading = min(leading, 1)
    systems, messages = rest[:leading], rest[leading:]
    if facts.moves_system:
        roles = [_role(message) for message in messages]
        systems += [each for each, role in zip(messages, roles, strict=True) if role in system_roles]
        messages = [each for each, role in zip(messages, roles, strict=True) if role not in system_roles]
    needs_last = facts.drops_reasoning or facts.drops_thoughts or facts.system_last or facts.order is _TOOLS_LAST
    last_user = max(_last_user(messages), 0) if needs_last else 0
    if _drops_any(facts):
        messages = [_without_reasoning(message, facts, is_old=True) for message in messages[:last_user]] + [
            _without_reasoning(message, facts, is_old=False) for message in messages[last_user:]
        ]
    return _in_order(facts, tools, systems, messages, last_user)


def _in_order(
    facts: TemplateFacts, tools: list[Span], systems: list[Span], messages: list[Span], last_user: int
) -> list[Span]:
    early, late = messages[:last_user], messages[last_user:]
    if facts.system_last:
        late = [*systems, *late]
        systems = []
    if facts.order is _SYSTEM_FIRST:
        return [*systems, *tools, *early, *late]
    if facts.order is _TOOLS_LAST:
        return [*systems, *early, *tools, *late]
    return [*tools, *systems, *early, *late]


def _leading_systems(prompt: Prompt, messages: Sequence[Span], roles: frozenset[str]) -> int:
    """Return the number of system prompts before the first turn: in a field of their own, or as messages."""
    leading = max(prompt.system_spans, 0)
    while not prompt.system_spans > 0 and leading < len(messages) and _role(messages[leading]) in roles:
        leading += 1
    return leading


def _last_user(messages: Sequence[Span]) -> int:
    """Return the index of the last message that a user wrote; -1 if there is none."""
    for place in range(len(messages) - 1, -1, -1):
        message = messages[place]
        if _role(message) == "user" and bytes(message[:_RESULT_REACH]).find(_RESULT_MARK) < 0:
            return place
    return -1


def _role(message: Span) -> str:
    try:
        return decode_message_head(message).role
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""


def _without_reasoning(message: Span, facts: TemplateFacts, *, is_old: bool) -> Span:
    """Return the message without reasoning that is not rendered; of an item of reasoning only the type remains."""
    drops_field = facts.ignores_reasoning or (is_old and facts.drops_reasoning)
    drops_thoughts = is_old and facts.drops_thoughts
    if not (drops_field or drops_thoughts):
        return message
    try:
        head = decode_message_head(message)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return message
    if drops_field and head.type == "reasoning":
        return b'{"type":"reasoning"}'
    raw = head.reasoning_content if head.reasoning_content is not NONE else head.reasoning
    if drops_field and raw is not NONE:
        message = _with(message, raw, b"")
    if head.role == "assistant" and head.content is not NONE:
        content = shorter = bytes(head.content)
        if drops_thoughts:
            shorter = _without_thoughts(content)
        if drops_field and shorter[:1] == b"[" and shorter.find(b'"thinking"') >= 0:
            shorter = _without_thinking_parts(shorter)
        if shorter != content:
            message = _with(message, head.content, shorter)
    return message


def _with(message: Span, raw: msgspec.Raw, instead: bytes) -> bytes:
    """Return the message with the first occurrence of a value's text replaced."""
    return bytes(message).replace(bytes(raw), instead, 1)


def _without_thoughts(content: bytes) -> bytes:
    """Return the text of a content without marked reasoning and the line breaks that follow it."""
    end = stop = -1
    for mark in _THOUGHT_ENDS:
        found = content.rfind(mark)
        if found > end:
            end, stop = found, found + len(mark)
    if end < 0:
        return content
    starts = [found for mark in _THOUGHT_OPENS if 0 <= (found := content.find(mark)) < end]
    start = min(starts) if starts else content.find(b'"') + 1  # some templates write the opening mark into the prompt
    while content.startswith(b"\\n", stop):
        stop += 2
    return content[:start] + content[stop:]


def _without_thinking_parts(content: bytes) -> bytes:
    try:
        parts = decode_raw_list(content)
        kept = [bytes(part) for part in parts if not decode_message_head(part).type.endswith("thinking")]
    except (msgspec.DecodeError, UnicodeDecodeError):
        return content
    return b"[" + b", ".join(kept) + b"]"


def _is_key_already(spans: Sequence[Span], system: int) -> bool:
    """Return True if one look at both ends of each message shows that nothing is to be left out.

    False means only that a closer look is needed. `system` is the place of the system prompt. A part that is marked
    by OpenAI's mark is in a list.
    """
    for place in range(len(spans)):
        span = spans[place]
        may_have_id = system <= place <= system + _ID_SAMPLE
        if may_have_id or place < system:
            tail = bytes(span[-_MARK_REACH:])
            if tail.endswith(_LIST_END) or tail.find(_BREAKPOINT) >= 0:
                return False
            if may_have_id:
                head = bytes(span[:_BILLING_REACH])
                if tail.find(_ID_KEY) >= 0 or head.find(_ID_KEY) >= 0 or head.find(BILLING_MARK) >= 0:
                    return False
        elif len(span) > _LONE_TEXT_LEAST and span[-2] == _END_OF_LIST:
            return False
    return True


def _may_carry_id(span: Span) -> bool:
    """Return whether a message seems to have its own id; the ids of calls within it are further inside."""
    return bytes(span[:_ID_HEAD_BYTES]).find(_ID_KEY) >= 0 or bytes(span[-_ID_TAIL_BYTES:]).find(_ID_KEY) >= 0


def _without_id(span: Span) -> Span:
    """Return a message without the value of its id, which no engine renders, unless the id refers to another item."""
    if not _may_carry_id(span):
        return span
    try:
        head = decode_message_head(span)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return span
    if head.id is NONE or head.type == "item_reference":
        return span
    return _with(span, head.id, b"")


def _without_marks(spans: Sequence[Span], system: int, marks: int, *, keeps_billing: bool) -> Sequence[Span]:
    """Leave out the billing block of the system prompt, which is span `system`, and all cache marks.

    `marks` is their number in the whole body at most. Messages that have one at their end are found first: a long
    conversation is searched as a whole only if others are missing.
    """
    changed = list(spans)
    if not keeps_billing and system < len(spans):
        shorter = _without_billing(spans[system])
        if shorter is not None:
            changed[system] = shorter
    has_breakpoints = False
    seen = looked_at = 0
    unmarked: list[int] = []
    for place in range(len(spans) - 1, -1, -1):
        tail = bytes(spans[place][-_MARK_REACH:])
        is_breakpoint = tail.find(_BREAKPOINT) >= 0
        has_breakpoints = has_breakpoints or is_breakpoint
        if is_breakpoint or (seen < marks and tail.find(CACHE_MARK) >= 0):
            found, breakpoints = _leave_out(changed, place, _MARKS_MOST - looked_at)
            seen += found
            looked_at += found + breakpoints
        else:
            unmarked.append(place)
    for place in reversed(unmarked):  # first those of tools and the system prompt
        if looked_at >= _MARKS_MOST or (seen >= marks and not has_breakpoints):
            break
        found, breakpoints = _leave_out(changed, place, _MARKS_MOST - looked_at)
        seen += found
        looked_at += found + breakpoints
    return changed


def _leave_out(spans: list[Span], place: int, most: int) -> tuple[int, int]:
    """Leave up to `most` marks of each kind out of the span at `place`. Return how many of each were looked at."""
    text = bytes(spans[place])
    counts = [0, 0]
    for kind, mark in enumerate((CACHE_MARK, _BREAKPOINT)):
        cuts, counts[kind] = _marked(text, mark, most)
        if cuts:
            kept: list[bytes] = []
            at = 0
            for start, end in cuts:
                kept.append(text[at:start])
                at = end
            kept.append(text[at:])
            text = b"".join(kept)
            spans[place] = text
    return counts[0], counts[1]


def _marked(text: bytes, mark: bytes, most: int) -> tuple[list[tuple[int, int]], int]:
    """Return the places of members named `mark`, each with a comma beside it, in order.

    The second value is how many places were looked at, which are `most` at most.
    """
    cuts: list[tuple[int, int]] = []
    looked_at = 0
    at = text.find(mark)
    while at >= 0 and looked_at < most:
        looked_at += 1
        end = at + len(mark)
        value = _MARK_VALUE.match(text, end, end + _MARK_BYTES_MOST)
        if value is not None:  # else it is a text of these letters, or a parameter of that name
            least = cuts[-1][1] if cuts else 0  # the comma before it may be left out already
            start = max(_after_white(text, at, -1), least)
            comma = start - 1
            end = value.end()
            if comma >= least and text[comma:start] == b",":
                start = max(_after_white(text, comma, -1), least)
            else:
                comma = _after_white(text, end, 1)
                if text[comma : comma + 1] == b",":
                    end = _after_white(text, comma + 1, 1)
            cuts.append((start, end))
        at = text.find(mark, end)
    return cuts, looked_at


def _after_white(text: bytes, place: int, step: int) -> int:
    """Return the nearest place, forwards or backwards by `step`, that white space does not continue."""
    before = min(step, 0)
    for _ in range(_MARK_BYTES_MOST):
        if not (0 <= place + before < len(text) and text[place + before] in _WHITE):
            break
        place += step
    return place


def _without_billing(span: Span) -> bytes | None:
    """Return the span without the text that begins with the billing mark; None if there is none."""
    start = bytes(span[:_BILLING_REACH]).find(BILLING_MARK)
    if start < 0:
        return None
    text = bytes(span)
    ends = [end for mark in _BILLING_ENDS if (end := text.find(mark, start)) >= 0]
    return text[:start] + text[min(ends) :] if ends else text


def _with_strings(spans: Sequence[Span]) -> Sequence[Span]:
    """Key a message whose content is a list of one text as if it were a string, since engines render both alike.

    A cache mark can only be written into a list, so clients write the same message as a list while it is marked and
    as a string once the mark has moved on.
    """
    changed: list[Span] | None = None
    for place in range(len(spans)):
        span = spans[place]
        if len(span) > _LONE_TEXT_LEAST and span[-2] == _END_OF_LIST and len(span) <= _LONE_TEXT_MOST:
            shorter = _with_string(span)
            if shorter is not None:
                changed = list(spans) if changed is None else changed
                changed[place] = shorter
    return spans if changed is None else changed


def _with_string(span: Span) -> bytes | None:
    """Return the message with a string for content; None if its content is not a list of one text."""
    opening = _LONE_TEXT.search(bytes(span[:_LONE_TEXT_REACH]))
    if opening is None:
        return None
    text = bytes(span)
    end = text.find(b'"}', opening.end())
    while end >= 0 and _is_escaped(text, end):
        end = text.find(b'"}', end + 1)
    if end < 0 or not text.startswith(_LONE_TEXT_END, end):
        return None
    return text[: opening.start(1)] + text[opening.end(1) : end + 1] + text[end + len(_LONE_TEXT_END) :]


def _is_escaped(text: bytes, place: int) -> bool:
    """Return True if an odd number of backslashes precedes `place`."""
    start = place
    while start > 0 and text[start - 1] == _BACKSLASH:
        start -= 1
    return (place - start) % 2 == 1

"""Chat templates: how an engine turns the messages and tools of a request into the one text that it computes.

Each models a family as published; `docs/templates.md` names the models. One token is four bytes of the
rendered text, so counts are exact and differ from template to template as real ones do.
"""

from __future__ import annotations

from typing import Any

import msgspec
from xxhash import xxh3_64_hexdigest

BYTES_PER_TOKEN = 4
IMAGE_TOKENS = 256
"""Tokens of an image whatever its size, as with models that scale it to a grid; its engine knows it by its digest."""

BILLING_MARK = "x-anthropic-billing-header"


class Template(msgspec.Struct, frozen=True):
    """The rendering of one family of models.

    `system_first` puts the system message before the tools. `drops_reasoning` leaves out the reasoning of messages
    before the last user message, also between `<think>` marks in their text; `ignores_reasoning` leaves the field out
    everywhere. `date` is put at the head if given. `moves_system` moves late system messages to the front.
    `drops_billing` leaves out a client's billing block. `drops_tools_for_none` leaves out the tools if `tool_choice`
    is "none". `marks_users` writes a switch that turns thinking off into each message of the user.
    `reasons_in_calls` renders the reasoning of messages that call a tool only.
    """

    system_first: bool = False
    drops_reasoning: bool = False
    ignores_reasoning: bool = False
    date: str = ""
    moves_system: bool = False
    drops_billing: bool = False
    drops_tools_for_none: bool = False
    marks_users: bool = False
    reasons_in_calls: bool = False


class Message(msgspec.Struct):
    """One message as it is sent."""

    role: str = ""
    content: Any = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class Chat(msgspec.Struct):
    """A chat request, as far as an engine's cache is concerned."""

    messages: list[Message]
    model: str = "m"
    tools: list[Any] | None = None
    tool_choice: Any = None
    max_tokens: int = 16
    cache_prompt: bool = True
    prompt_logprobs: int | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def reads_cache(self) -> bool:
        """False if the request asks for what only a prompt computed anew can give."""
        return self.cache_prompt and self.prompt_logprobs is None


decode_chat = msgspec.json.Decoder(Chat).decode


def render(chat: Chat, template: Template) -> bytes:
    """Return the text that the engine computes, without the generation prompt that follows it."""
    messages = chat.messages
    leading = 0
    while leading < len(messages) and messages[leading].role in ("system", "developer"):
        leading += 1
    systems, rest = list(messages[:leading]), list(messages[leading:])
    if template.moves_system:
        systems += [message for message in rest if message.role == "system"]
        rest = [message for message in rest if message.role != "system"]
    tools = "" if not chat.tools else f"<tools>{msgspec.json.encode(chat.tools).decode()}</tools>"
    if template.drops_tools_for_none and chat.tool_choice == "none":
        tools = ""
    system = "".join(_message(message, template, keeps_reasoning=True) for message in systems)
    head = system + tools if template.system_first else tools + system
    last_user = max((place for place, message in enumerate(rest) if message.role == "user"), default=-1)
    body = "".join(
        _message(message, template, keeps_reasoning=not template.drops_reasoning or place > last_user)
        for place, message in enumerate(rest)
    )
    if template.marks_users and chat.chat_template_kwargs.get("enable_thinking") is False:
        body = body.replace("<|user|>", "<|user|>/nothink ")
    effort = f"<effort>{chat.reasoning_effort}" if chat.reasoning_effort else ""
    return f"{template.date}{effort}{head}{body}".encode()


def _message(message: Message, template: Template, *, keeps_reasoning: bool) -> str:
    is_rendered = message.reasoning_content and keeps_reasoning and not template.ignores_reasoning
    if template.reasons_in_calls and message.tool_calls is None:
        is_rendered = False
    reasoning = f"<think>{message.reasoning_content}</think>" if is_rendered else ""
    calls = "" if message.tool_calls is None else msgspec.json.encode(message.tool_calls).decode()
    text = _text(message.content, template)
    if message.role == "assistant" and not keeps_reasoning:
        text = text.rpartition("</think>")[2].lstrip("\n")
    return f"<|{message.role}|>{reasoning}{text}{calls}<|end|>"


def _text(content: Any, template: Template) -> str:
    if isinstance(content, str):
        return content
    texts = [_image(part) or part.get("text", "") for part in content or [] if isinstance(part, dict)]
    return "".join(text for text in texts if not (template.drops_billing and text.startswith(BILLING_MARK)))


def _image(part: dict[str, Any]) -> str:
    """Stand-in for the image's tokens, equal for equal images; empty if the part is none."""
    if part.get("type") != "image_url":
        return ""
    return xxh3_64_hexdigest(part["image_url"]["url"].encode()) * (IMAGE_TOKENS * BYTES_PER_TOKEN // 16)

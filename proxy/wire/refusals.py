"""Read from a refusal whether another replica might serve the request. Pure.

Most refusals are about the request: every replica would give them. Some are about the server: it does not have the
model, the path or the kind of input, its context is too short, or it does not accept the operator's key or account.
Servers spell these differently, and many have no code for them, so their messages are read as well. A refusal that is
not recognised is passed on.
"""

from __future__ import annotations

import enum
import re
from typing import Any, Final

import msgspec

from proxy.wire.schemas import DECODE_ERRORS


class Refusal(enum.Enum):
    """Kinds of things that a server lacks; the value is the reason in the metric and in the header."""

    MODEL = "model_not_found"
    ENDPOINT = "not_supported"  # the path, or this kind of request for the model
    TOOLS = "no_tools"
    MEDIA = "no_media"
    CONTEXT = "context_length"
    KEY = "key_refused"  # the key that came with the request
    QUOTA = "quota"  # the account has nothing left
    MEMORY = "out_of_memory"


REFUSALS_AT_MOST_BYTES: Final = 32 * 1024
"""Size of a body up to which it is read. A connection holds more than that of one which nobody takes."""

STATUSES: Final = frozenset({400, 401, 402, 403, 404, 405, 410, 413, 422, 429, 500, 501})
"""Statuses of which the body is looked at."""

_MESSAGE_CHARACTERS: Final = 2_000
_NAME: Final = "\x00"  # stands for the model's name in a message

_CODES: Final = {
    "model_not_found": Refusal.MODEL,
    "model_not_available": Refusal.MODEL,
    "unknown_model": Refusal.MODEL,
    "invalid_model": Refusal.MODEL,
    "model_not_supported": Refusal.MODEL,
    "model_decommissioned": Refusal.MODEL,
    "deploymentnotfound": Refusal.MODEL,
    "context_length_exceeded": Refusal.CONTEXT,
    "exceed_context_size_error": Refusal.CONTEXT,
    "insufficient_quota": Refusal.QUOTA,
    "insufficient_balance": Refusal.QUOTA,
    "billing_hard_limit_reached": Refusal.QUOTA,
    "billing_not_active": Refusal.QUOTA,
}
_FILTER_CODES: Final = frozenset({"content_filter", "content_policy_violation", "responsibleaipolicyviolation"})
_FILTERED: Final = re.compile(r"content (?:management|policy|filter)|moderation|flagged|safety", re.IGNORECASE)

_MODEL: Final = re.compile(
    # vLLM, OpenAI, Ollama, llama.cpp, LM Studio, DeepSeek, Groq, Gemini: the model is not there
    r"\bmodels?\b[\s`'\"/:]*\x00?[`'\"]*,? "
    r"(?:(?:does not|doesn't|not) exist|(?:is |was )?not (?:found|loaded|deployed))"
    r"|\bmodel not found"
    # LiteLLM, Mistral, Perplexity: the name is wrong
    r"|\b(?:invalid|unknown|unrecognized|no such) model(?: (?:name|id))?\b(?: passed in model)?[\s`'\"=:]*\x00"
    r"|\x00\W*is not a valid model"
    r"|there is no 'model_name' with this"
    r"|(?:could not|cannot) find (?:the )?model\b.*\x00"
    r"|model identifier is invalid|invalid model identifier|requested model is not supported"
    r"|allowed now, your model \x00"
    # SGLang and others: adapters
    r"|\blora adapters?\b.{0,80}(?:not (?:been )?(?:loaded|found)|never been loaded|does not exist)"
    r"|模型不存在",
    re.IGNORECASE | re.DOTALL,
)
_ANTHROPIC_MODEL: Final = re.compile(r"\s*model: \x00\s*", re.IGNORECASE)

_ENDPOINT: Final = re.compile(
    r"does(?: not|n't) support (?:the )?"
    r"(?:embeddings?|chat|(?:chat )?completions?|responses|messages|generate|generation|rerank(?:ing)?|score|pooling"
    r"|transcriptions?|translations?|classification)\b"
    r"|not appear to be an embedding model|is not an embedding model"
    r"|invalid url \(|unknown request url|unrecognized request url|cannot post /",
    re.IGNORECASE,
)
_TOOLS: Final = re.compile(
    r"--enable-auto-tool-choice|--tool-call-parser|tools param requires --jinja"
    r"|(?:does(?: not|n't)|that) support (?:tools\b|tool[- ](?:use|calls?|calling|choice)|function[- ]call)",
    re.IGNORECASE,
)
_MEDIA: Final = re.compile(
    r"is not a multimodal model|(?:image|audio|video) input is not supported|at most 0 (?:image|audio|video)"
    r"|(?:does(?: not|n't)|that) support (?:image|vision|audio|video|multimodal)"
    r"|missing data required for image input",
    re.IGNORECASE,
)
_CONTEXT: Final = re.compile(
    r"maximum context length|longer than the (?:maximum model length|model's context length)"
    r"|exceeds? the (?:model's |available )?(?:maximum )?context|prompt is too long"
    r"|`?inputs`? (?:tokens|must have less than)",
    re.IGNORECASE,
)
_QUOTA: Final = re.compile(r"credit balance is too low|insufficient balance|insufficient credits", re.IGNORECASE)
_MEMORY: Final = re.compile(r"out of memory", re.IGNORECASE)
_BARE_404: Final = frozenset(
    {"", "not found", "404 page not found", "404 not found", "file not found", "route not found", "page not found"}
)
"""Messages of web frameworks about a path that they do not have: FastAPI, Go, llama.cpp."""

HTML: Final = re.compile(rb"\s*<(?:!doctype|html)", re.IGNORECASE)
"""Matches the beginning of a page, which no engine sends."""

_PATTERNS: Final = (
    (_TOOLS, Refusal.TOOLS),
    (_MEDIA, Refusal.MEDIA),
    (_ENDPOINT, Refusal.ENDPOINT),
    (_CONTEXT, Refusal.CONTEXT),
)
_PAYMENT: Final = 402
_FORBIDDEN: Final = 403
_NOT_FOUND: Final = 404
_RATE_LIMITED: Final = 429
_KEY_STATUSES: Final = (401, _FORBIDDEN)
_NO_SUCH_PATH: Final = (405, 501)
_MODEL_STATUSES: Final = (400, _NOT_FOUND, 422)
_CODE_NAMES: Final = ("code", "type", "error_type", "status")
_MESSAGE_NAMES: Final = ("error", "message", "detail", "innererror")
_OBJECTS_AT_MOST: Final = 16
_PLACES_AT_MOST: Final = 8


def read_refusal(status: int, body: bytes, model: str | None) -> Refusal | None:
    """Return what the server lacks that answered with an error status and `body`; None if that is not told.

    `model` is the name that the request asked for: a message about another model is about something else.
    """
    codes, messages = _read(body)
    if not _FILTER_CODES.isdisjoint(codes):
        return None
    for code in codes:
        if (known := _CODES.get(code)) is not None and (model or known is not Refusal.MODEL):
            return known
    message = "\n".join(messages)
    if status == _PAYMENT or _QUOTA.search(message):
        return Refusal.QUOTA
    if status in _KEY_STATUSES:
        return None if status == _FORBIDDEN and _FILTERED.search(message) else Refusal.KEY
    if status in _NO_SUCH_PATH or (status == _NOT_FOUND and _is_of_a_framework(body, messages)):
        return Refusal.ENDPOINT
    return None if status == _RATE_LIMITED else _of_message(status, message, model, codes)


def _is_of_a_framework(body: bytes, messages: list[str]) -> bool:
    """Return True for the answer of a web framework to a path that it does not have."""
    return HTML.match(body) is not None or all(each.strip().lower().rstrip(".") in _BARE_404 for each in messages)


def _of_message(status: int, message: str, model: str | None, codes: frozenset[str]) -> Refusal | None:
    if model and status in _MODEL_STATUSES:
        for text in _marked(message, model):
            if _MODEL.search(text) or ("not_found_error" in codes and _ANTHROPIC_MODEL.fullmatch(text)):
                return Refusal.MODEL
    for pattern, refusal in _PATTERNS:
        if pattern.search(message):
            return refusal
    return Refusal.MEMORY if status in _MODEL_STATUSES and _MEMORY.search(message) else None


def _marked(message: str, model: str) -> list[str]:
    """Return the message as it is and with `_NAME` in place of the model's name.

    A name may also be a word of the message, so each place where it stands is tried by itself.
    """
    name = re.compile(rf"(?<!\w){re.escape(model)}(?!\w)", re.IGNORECASE)
    places = [each.span() for each in name.finditer(message)][:_PLACES_AT_MOST]
    return [message, *[message[:start] + _NAME + message[end:] for start, end in places]]


def _read(body: bytes) -> tuple[frozenset[str], list[str]]:
    """Return an error's codes and types in lower case, and its messages; of what is no JSON, the text."""
    try:
        found: Any = msgspec.json.decode(body)
    except DECODE_ERRORS:
        return frozenset(), [body[:_MESSAGE_CHARACTERS].decode("utf-8", "replace")]
    codes: set[str] = set()
    messages: list[str] = []
    todo: list[Any] = [found[0] if isinstance(found, list) and found else found]  # Gemini's errors are lists
    for _ in range(_OBJECTS_AT_MOST):
        if not todo:
            break
        if not isinstance(each := todo.pop(0), dict):
            continue
        codes.update([value.lower() for name in _CODE_NAMES if isinstance(value := each.get(name), str)])
        for name in _MESSAGE_NAMES:  # gateways put an error into the message of another; lists repeat the request
            value = each.get(name)
            if isinstance(value, str):
                messages.append(value[:_MESSAGE_CHARACTERS])
            else:
                todo.append(value)
    return frozenset(codes), messages

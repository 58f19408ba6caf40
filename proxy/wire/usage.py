"""The tokens of an answer in one normal form, from every dialect in which engines and providers report them.

Pure arithmetic over decoded JSON; it never raises, whatever stands there: what cannot be true is clamped and marked
`inconsistent`. In the normal form cached and written tokens are part of the prompt, and reasoning is part of the
output; a cached count that nobody reported is None, never zero.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from proxy.model import Endpoint, Usage
from proxy.wire.schemas import DECODE_ERRORS, NONE, ResponseRead, decode_choices, decode_made, decode_response

TOKENS_MOST: Final = 1_000_000_000  # of one answer; a larger figure is a bug of the upstream, not a prompt


class _Counts:
    """Reads counts out of one usage object and remembers whether any was not what it claims to be."""

    __slots__ = ("inconsistent",)

    def __init__(self) -> None:
        self.inconsistent = False

    def of(self, holder: Any, *names: str) -> int | None:
        """The first of `names` in `holder` that is not null, as a count up to TOKENS_MOST; None if there is none."""
        if not isinstance(holder, dict):
            return None
        for name in names:
            value = holder.get(name)
            if value is not None:
                return value if type(value) is int and 0 <= value <= TOKENS_MOST else self._count(value)
        return None

    def _count(self, value: Any) -> int | None:
        if type(value) is float and value.is_integer() and 0 <= value <= TOKENS_MOST:
            return int(value)
        self.inconsistent = True
        if type(value) is str:
            value = int(value) if len(value) < 16 and value.isascii() and value.isdigit() else None
        if type(value) not in (int, float) or value != value:
            return None
        return int(min(max(value, 0), TOKENS_MOST))

    def within(self, value: int, most: int) -> int:
        """`value`, or `most` and a mark where it is larger."""
        if value <= most:
            return value
        self.inconsistent = True
        return most


def normal(usage: Any, timings: Any = None, *, endpoint: Endpoint = Endpoint.CHAT) -> Usage | None:
    """The normal form of a decoded `usage` (or Gemini's `usageMetadata`) object, with llama.cpp's `timings` if any.

    None where neither says how long the prompt or the output was. The dialect is told by its field names, since
    compatible servers mix them; `endpoint` only decides that Anthropic's `input_tokens` excludes what was cached.
    """
    counts = _Counts()
    if not isinstance(usage, dict):
        return _of_timings(timings, counts)
    if timings is None and (usual := _usual(usage)) is not None:
        return usual
    if "promptTokenCount" in usage or "candidatesTokenCount" in usage:
        return _of_gemini(usage, counts)
    if _excludes_cached(usage, endpoint):
        return _of_anthropic(usage, counts)
    return _of_openai(usage, timings, counts) or _of_timings(timings, counts)


_USUAL = frozenset({"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"})


def _usual(usage: dict[str, Any]) -> Usage | None:
    """What vLLM, SGLang and OpenAI's plain models say, where all of it makes sense: a quarter of the long way."""
    if not usage.keys() <= _USUAL:
        return None
    prompt, output, total = usage.get("prompt_tokens"), usage.get("completion_tokens"), usage.get("total_tokens")
    if not (type(prompt) is type(output) is type(total) is int) or total != prompt + output:
        return None
    cached = None
    if details := usage.get("prompt_tokens_details"):
        if type(details) is not dict or len(details) != 1:
            return None
        cached = details.get("cached_tokens")
        if type(cached) is not int or not 0 <= cached <= prompt:
            return None
    return Usage(prompt, output, cached) if 0 <= prompt <= TOKENS_MOST and 0 <= output <= TOKENS_MOST else None


def _excludes_cached(usage: dict[str, Any], endpoint: Endpoint) -> bool:
    """Anthropic counts cached tokens outside `input_tokens`; its names on the responses surface do not."""
    if "prompt_tokens" in usage or "input_tokens_details" in usage:
        return False
    named = "cache_read_input_tokens" in usage or "cache_creation_input_tokens" in usage
    return endpoint is Endpoint.MESSAGES or named


def _of_openai(usage: dict[str, Any], timings: Any, counts: _Counts) -> Usage | None:
    """OpenAI chat and responses, Moonshot, DeepSeek, Qwen, vLLM, SGLang, llama.cpp with usage."""
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    prompt = counts.of(usage, "prompt_tokens", "input_tokens")
    hit = None
    if "prompt_cache_hit_tokens" in usage:
        hit = counts.of(usage, "prompt_cache_hit_tokens")
        missed = counts.of(usage, "prompt_cache_miss_tokens")
        if hit is not None and missed is not None:
            prompt = hit + missed if prompt is None else prompt
            counts.inconsistent |= hit + missed != prompt
    output = counts.of(usage, "completion_tokens", "output_tokens")
    if prompt is None and output is None:
        return None
    nested = counts.of(details, "cached_tokens", "cache_read_input_tokens")
    top = counts.of(usage, "cached_tokens", "cache_read_input_tokens")
    cached = _agreed((nested, top, hit), counts)
    if cached is None:
        cached = counts.of(timings, "cache_n")
    short, long = _written(usage, details, counts)
    reasoning = counts.of(
        usage.get("completion_tokens_details") or usage.get("output_tokens_details"), "reasoning_tokens"
    )
    output = _with_hidden(usage, prompt, output, reasoning, cached, counts)
    return _made(prompt, output, cached, (short, long), reasoning or 0, counts, _prefill(timings))


def _agreed(reports: tuple[int | None, ...], counts: _Counts) -> int | None:
    """One count of what several fields repeat: zeros yield to the rest (Moonshot), of two that differ the lesser."""
    known = {report for report in reports if report is not None}
    positive = known - {0}
    if len(positive) > 1:
        counts.inconsistent = True
    return min(positive or known, default=None)


def _with_hidden(
    usage: dict[str, Any],
    prompt: int | None,
    output: int | None,
    reasoning: int | None,
    cached: int | None,
    counts: _Counts,
) -> int | None:
    """Output with the thoughts that Gemini's OpenAI surface counts in `total_tokens` alone."""
    total = counts.of(usage, "total_tokens")
    if total is None or prompt is None or output is None:
        return output
    hidden = total - prompt - output
    if hidden > 0 and (reasoning == hidden or not (reasoning or cached)):
        return output + hidden
    return output


def _of_anthropic(usage: dict[str, Any], counts: _Counts) -> Usage | None:
    fresh = counts.of(usage, "input_tokens")
    output = counts.of(usage, "output_tokens")
    cached = counts.of(usage, "cache_read_input_tokens")
    short, long = _written(usage, None, counts)
    if fresh is None and output is None and cached is None:
        return None
    prompt = (fresh or 0) + (cached or 0) + short + long
    return _made(prompt, output, cached, (short, long), 0, counts)


def _of_gemini(usage: dict[str, Any], counts: _Counts) -> Usage:
    """`usageMetadata`: thoughts stand outside `candidatesTokenCount`, tools' results outside `promptTokenCount`."""
    prompt = (counts.of(usage, "promptTokenCount") or 0) + (counts.of(usage, "toolUsePromptTokenCount") or 0)
    thoughts = counts.of(usage, "thoughtsTokenCount") or 0
    output = (counts.of(usage, "candidatesTokenCount") or 0) + thoughts
    return _made(prompt, output, counts.of(usage, "cachedContentTokenCount"), (0, 0), thoughts, counts)


def _of_timings(timings: Any, counts: _Counts) -> Usage | None:
    """llama.cpp without `usage`: what it reused and what it computed make the prompt."""
    computed = counts.of(timings, "prompt_n")
    cached = counts.of(timings, "cache_n")
    if computed is None:
        return None
    output = counts.of(timings, "predicted_n")
    return _made(computed + (cached or 0), output, cached, (0, 0), 0, counts, _prefill(timings))


def _written(usage: dict[str, Any], details: Any, counts: _Counts) -> tuple[int, int]:
    """Cache writes for five minutes and for an hour; what the split leaves unsaid was written for five minutes."""
    split = usage.get("cache_creation")
    if split is None and isinstance(details, dict):
        split = details.get("cache_creation")
    names = ("cache_creation_input_tokens", "cache_write_tokens", "cache_creation_tokens")
    whole = counts.of(usage, *names)
    if whole is None:
        whole = counts.of(details, *names)
    short = counts.of(split, "ephemeral_5m_input_tokens") or 0
    long = counts.of(split, "ephemeral_1h_input_tokens") or 0
    if whole is None:
        return short, long
    long = counts.within(long, whole)
    counts.within(short, whole - long)
    return whole - long, long


def _prefill(timings: Any) -> float | None:
    """Seconds that llama.cpp computed on the prompt."""
    value = timings.get("prompt_ms") if isinstance(timings, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
        return None
    return value / 1e3


def _made(
    prompt: int | None,
    output: int | None,
    cached: int | None,
    written: tuple[int, int],
    reasoning: int,
    counts: _Counts,
    prefill_seconds: float | None = None,
) -> Usage:
    prompt = counts.within(prompt or 0, TOKENS_MOST)
    output = counts.within(output or 0, TOKENS_MOST)
    if cached is not None:
        cached = counts.within(cached, prompt)
    long = counts.within(written[1], prompt - (cached or 0))
    short = counts.within(written[0], prompt - (cached or 0) - long)
    reasoning = counts.within(reasoning, output)
    return Usage(prompt, output, cached, short, long, reasoning, counts.inconsistent, prefill_seconds)


def merge(earlier: Any, later: Any) -> Any:
    """Two reports of one stream as one: what the later says holds, but for zeros and nulls where the earlier knew.

    Anthropic names the input at the start and the output at the end, and some servers repeat the input as zero.
    """
    if not isinstance(earlier, dict) or not isinstance(later, dict):
        return later if isinstance(later, dict) else earlier
    return earlier | {name: value for name, value in later.items() if value or name not in earlier}


def read_response(body: bytes | memoryview, endpoint: Endpoint) -> ResponseRead:
    """Usage and error of a plain (not streamed) answer; never raises."""
    try:
        answer = decode_response(body)
        usage = answer.usage or answer.usageMetadata
        if not usage and answer.choices is not NONE:
            usage = next((choice.usage for choice in decode_choices(answer.choices) or () if choice.usage), None)
    except DECODE_ERRORS:
        return ResponseRead(None, error_seen=True)
    return ResponseRead(normal(usage, answer.timings, endpoint=endpoint), error_seen=bool(answer.error))


def made_id(body: bytes | memoryview) -> str | None:
    """The id of what a plain answer tells of (a response, a file, a batch); None where it has none. Never raises."""
    try:
        return decode_made(body).id or None
    except DECODE_ERRORS:
        return None


def usage_of_answer(body: bytes | memoryview, endpoint: Endpoint) -> Usage | None:
    """The usage of a plain answer, found without decoding the rest; None where it has none."""
    return read_response(body, endpoint).usage


_USAGE_KEY = re.compile(rb'"usage"\s*:\s*(?=\{)')
_KEYS_TRIED: Final = 8  # from the end; a hostile event may hold thousands
_BRACE = re.compile(rb"[{}]")


def tail_usage(fragment: bytes) -> Any:
    """The last `usage` object in the end of an event whose beginning is gone; None where none can be read.

    Quotes inside strings are escaped in JSON, so the key cannot stand in a text; a tool that has a parameter of that
    name comes before, and is passed over for want of a token count.
    """
    for key in list(_USAGE_KEY.finditer(fragment))[: -1 - _KEYS_TRIED : -1]:
        depth = 0
        for brace in _BRACE.finditer(fragment, key.end()):
            depth += 1 if brace.group() == b"{" else -1
            if depth == 0:
                found = _object(fragment[key.end() : brace.end()])
                if normal(found) is not None:
                    return found
                break
    return None


def _object(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except DECODE_ERRORS:
        return None

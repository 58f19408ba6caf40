"""Convert the tokens that a response reports into one normal form, from the dialects of engines and providers.

This is arithmetic on decoded JSON and never raises: an impossible value is clamped and the result marked
`inconsistent`. In the normal form, cached and written tokens are part of the prompt, and reasoning is part of the
output. A cached count that was not reported is None, not zero.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

import msgspec

from proxy.model import ORDINARY_TIERS, Endpoint
from proxy.records import KindTokens, Usage
from proxy.wire.decode import ResponseDecoder
from proxy.wire.schemas import (
    DECODE_ERRORS,
    LONG_RESPONSE_BYTES,
    NONE,
    CreatedObject,
    PlainResponse,
    ResponseRead,
    decode_choices,
    decode_created,
    decode_error,
    decode_leniently,
    decode_response,
)

TOKENS_MOST: Final = 1_000_000_000  # of one response; a larger figure is a defect of the upstream
_ITERATIONS_MOST: Final = 1000  # model calls of one response that are added up
_TIER_LENGTH_MOST: Final = 32
_ERROR_BYTES_MOST: Final = 64 * 1024  # of a body that is only an error
_FAILED_CHOICE = re.compile(rb'"finish_reason"\s*:\s*"error"')
_DETAILS: Final = ("prompt_tokens_details", "input_tokens_details", "prompt_token_details", "input_token_details")
_OUTPUT_DETAILS: Final = ("completion_tokens_details", "output_tokens_details", "output_token_details")


_Kinds = tuple[KindTokens | None, KindTokens | None]
"""Tokens of audio and of images."""


class _Counts:
    """Reads counts from usage objects and remembers whether any of them was malformed."""

    __slots__ = ("inconsistent",)

    def __init__(self) -> None:
        self.inconsistent = False

    def of(self, holder: Any, *names: str) -> int | None:
        """Return the first of `names` in `holder` that is not null, from 0 to TOKENS_MOST; None if there is none."""
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
        """Return `value`, or `most` if that is smaller; the counts are then inconsistent."""
        if value <= most:
            return value
        self.inconsistent = True
        return most


def normal(
    usage: Any, timings: Any = None, *, endpoint: Endpoint = Endpoint.CHAT, service_tier: Any = None
) -> Usage | None:
    """Return the normal form of a decoded usage object, None if it names neither prompt nor output tokens.

    Args:
        usage: `usage`, or Gemini's `usageMetadata`. Its field names decide the dialect, since compatible servers mix
            them.
        timings: llama.cpp's, if any.
        endpoint: only decides whether `input_tokens` excludes cached tokens, as it does in Anthropic's dialect.
        service_tier: as the response names it beside the usage.
    """
    counts = _Counts()
    if not isinstance(usage, dict):
        return _of_timings(timings, counts)
    if timings is None and service_tier is None and (common := _common(usage)) is not None:
        return common
    if "promptTokenCount" in usage or "candidatesTokenCount" in usage:
        found: Usage | None = _of_gemini(usage, counts)
    elif _excludes_cached(usage, endpoint):
        found = _of_anthropic(usage, counts)
    else:
        found = _of_openai(usage, timings, counts) or _of_timings(timings, counts)
        if found is None and not endpoint.is_generation:
            found = _of_total(usage, counts)
    tier = _tier(usage.get("service_tier")) or _tier(service_tier) or _tier(usage.get("speed"))
    return dataclasses.replace(found, service_tier=tier) if tier and found is not None else found


def _tier(value: Any) -> str:
    """Return the name of a service tier that has separate prices, else an empty string."""
    if not isinstance(value, str) or len(value) > _TIER_LENGTH_MOST or value.lower() in ORDINARY_TIERS:
        return ""
    return value.lower()


_COMMON = frozenset({"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"})


def _common(usage: dict[str, Any]) -> Usage | None:
    """Read the form of vLLM, SGLang and OpenAI's plain models, if consistent; this takes a quarter of the time."""
    if not usage.keys() <= _COMMON:
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
    """Return True for Anthropic's `input_tokens`, which exclude cached tokens, unless details show OpenAI's form."""
    if "prompt_tokens" in usage or "input_tokens_details" in usage:
        return False
    named = "cache_read_input_tokens" in usage or "cache_creation_input_tokens" in usage
    return endpoint is Endpoint.MESSAGES or named


def _of_openai(usage: dict[str, Any], timings: Any, counts: _Counts) -> Usage | None:
    """Read OpenAI's form, also of Moonshot, DeepSeek, Qwen, Mistral, vLLM, SGLang, and llama.cpp with usage."""
    details = next((found for name in _DETAILS if (found := usage.get(name))), None)
    of_output = next((found for name in _OUTPUT_DETAILS if (found := usage.get(name))), None)
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
    top = counts.of(usage, "cached_tokens", "cache_read_input_tokens", "num_cached_tokens")
    cached = _agreed((nested, top, hit), counts)
    if cached is None:
        cached = counts.of(timings, "cache_n")
    reasoning = counts.of(of_output, "reasoning_tokens")
    written = _written(usage, details, counts)
    prompt = _with_cached(usage, prompt, output, (cached or 0) + sum(written), counts)
    output = _with_hidden(usage, prompt, output, reasoning, cached, counts)
    return _made(
        counts,
        prompt=prompt,
        output=output,
        cached=cached,
        written=written,
        reasoning=reasoning or 0,
        prefill_seconds=_prefill(timings),
        kinds=_kinds(details, of_output, counts),
    )


def _kinds(details: Any, of_output: Any, counts: _Counts) -> _Kinds:
    """Return the tokens of audio and of images. Cached ones of unknown kind are text, of which they save least."""
    of_cached = details.get("cached_tokens_details") if isinstance(details, dict) else None
    found: list[KindTokens | None] = []
    for name in ("audio_tokens", "image_tokens"):
        prompt, output = counts.of(details, name) or 0, counts.of(of_output, name) or 0
        cached = counts.within(counts.of(of_cached, name) or 0, prompt)
        found.append(KindTokens(prompt, cached, output) if prompt or output else None)
    return found[0], found[1]


def _agreed(reports: tuple[int | None, ...], counts: _Counts) -> int | None:
    """Return one count that several fields repeat: a positive one before zero, the smaller of two that differ."""
    known = {report for report in reports if report is not None}
    positive = known - {0}
    if len(positive) > 1:
        counts.inconsistent = True
    return min(positive or known, default=None)


def _with_cached(
    usage: dict[str, Any], prompt: int | None, output: int | None, aside: int, counts: _Counts
) -> int | None:
    """Add what was cached and written (`aside`) to a prompt that excludes both, as the total shows.

    Portkey passes Anthropic's counts on like this, under both dialects' names.
    """
    total = counts.of(usage, "total_tokens")
    if not aside or total is None or prompt is None or output is None or total - prompt - output != aside:
        return prompt
    is_anthropics = "cache_read_input_tokens" in usage or "cache_creation_input_tokens" in usage
    return prompt + aside if is_anthropics or aside > prompt else prompt


def _with_hidden(
    usage: dict[str, Any],
    prompt: int | None,
    output: int | None,
    reasoning: int | None,
    cached: int | None,
    counts: _Counts,
) -> int | None:
    """Add the thinking that Gemini's OpenAI surface counts in `total_tokens` alone to the output.

    If the rest of the total is as large as the cached part of the prompt, that was counted twice.
    """
    total = counts.of(usage, "total_tokens")
    if total is None or prompt is None or output is None:
        return output
    hidden = total - prompt - output
    if hidden > 0 and (reasoning == hidden or (not reasoning and hidden != cached)):
        return output + hidden
    return output


def _of_anthropic(usage: dict[str, Any], counts: _Counts) -> Usage | None:
    """Read Anthropic's form. If the response took several calls (for example a compaction first), add them up.

    The counts at the top are then those of the last call alone.
    """
    last = _of_anthropic_call(usage, counts)
    iterations = usage.get("iterations")
    if not isinstance(iterations, list) or not 1 < len(iterations) <= _ITERATIONS_MOST:
        return last
    calls = [call for each in iterations if isinstance(each, dict) and (call := _of_anthropic_call(each, counts))]
    prompt = sum(call.prompt_tokens for call in calls)
    output = sum(call.output_tokens for call in calls)
    if last is not None and (prompt < last.prompt_tokens or output < last.output_tokens):
        return last
    known = [call.cached_tokens for call in calls if call.cached_tokens is not None]
    added = _made(
        counts,
        prompt=prompt,
        output=output,
        cached=sum(known) if known else None,
        written=(sum(c.cache_write_5m_tokens for c in calls), sum(c.cache_write_1h_tokens for c in calls)),
    )
    return dataclasses.replace(added, longest_call_tokens=max((call.prompt_tokens for call in calls), default=0))


def _of_anthropic_call(usage: dict[str, Any], counts: _Counts) -> Usage | None:
    fresh = counts.of(usage, "input_tokens")
    output = counts.of(usage, "output_tokens")
    cached = counts.of(usage, "cache_read_input_tokens")
    written = _written(usage, None, counts)
    if fresh is None and output is None and cached is None:
        return None
    prompt = (fresh or 0) + (cached or 0) + sum(written)
    return _made(counts, prompt=prompt, output=output, cached=cached, written=written)


def _of_gemini(usage: dict[str, Any], counts: _Counts) -> Usage:
    """Read Gemini's form: `candidatesTokenCount` excludes thinking, `promptTokenCount` excludes results of tools."""
    prompt = (counts.of(usage, "promptTokenCount") or 0) + (counts.of(usage, "toolUsePromptTokenCount") or 0)
    thoughts = counts.of(usage, "thoughtsTokenCount") or 0
    output = (counts.of(usage, "candidatesTokenCount") or 0) + thoughts
    cached = counts.of(usage, "cachedContentTokenCount")
    return _made(counts, prompt=prompt, output=output, cached=cached, reasoning=thoughts)


def _of_total(usage: dict[str, Any], counts: _Counts) -> Usage | None:
    """Read the total of a request without output, the only figure of Jina's rerank and Voyage's embeddings."""
    total = counts.of(usage, "total_tokens")
    return None if total is None else _made(counts, prompt=total, output=0, cached=None)


def _of_timings(timings: Any, counts: _Counts) -> Usage | None:
    """Read llama.cpp's timings, without `usage`: the prompt is the sum of reused and computed tokens."""
    computed = counts.of(timings, "prompt_n")
    cached = counts.of(timings, "cache_n")
    if computed is None:
        return None
    output = counts.of(timings, "predicted_n")
    prompt = computed + (cached or 0)
    return _made(counts, prompt=prompt, output=output, cached=cached, prefill_seconds=_prefill(timings))


def _written(usage: dict[str, Any], details: Any, counts: _Counts) -> tuple[int, int]:
    """Return the cache writes for five minutes and for an hour; writes in neither part count as five minutes."""
    split = usage.get("cache_creation")
    if split is None and isinstance(details, dict):
        split = details.get("cache_creation") or details.get("cache_creation_token_details")  # Qwen's; LiteLLM's
    names = ("cache_creation_input_tokens", "cache_write_tokens", "cache_creation_tokens", "cached_creation_tokens")
    whole = counts.of(usage, *names)
    if whole is None:
        whole = counts.of(details, *names)
    if split is None:
        split = usage  # New API's
    short = counts.of(split, "ephemeral_5m_input_tokens", "claude_cache_creation_5_m_tokens") or 0
    long = counts.of(split, "ephemeral_1h_input_tokens", "claude_cache_creation_1_h_tokens") or 0
    if whole is None:
        return short, long
    long = counts.within(long, whole)
    counts.within(short, whole - long)
    return whole - long, long


def _prefill(timings: Any) -> float | None:
    """Return the seconds in which llama.cpp computed the prompt."""
    value = timings.get("prompt_ms") if isinstance(timings, dict) else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e9:
        return None
    return value / 1e3


def _made(
    counts: _Counts,
    *,
    prompt: int | None,
    output: int | None,
    cached: int | None,
    written: tuple[int, int] = (0, 0),
    reasoning: int = 0,
    prefill_seconds: float | None = None,
    kinds: _Kinds = (None, None),
) -> Usage:
    """Build the normal form, with every part no larger than the whole."""
    prompt = counts.within(prompt or 0, TOKENS_MOST)
    output = counts.within(output or 0, TOKENS_MOST)
    if cached is not None:
        cached = counts.within(cached, prompt)
    long = counts.within(written[1], prompt - (cached or 0))
    short = counts.within(written[0], prompt - (cached or 0) - long)
    reasoning = counts.within(reasoning, output)
    return Usage(
        prompt,
        output,
        cached,
        cache_write_5m_tokens=short,
        cache_write_1h_tokens=long,
        reasoning_tokens=reasoning,
        inconsistent=counts.inconsistent,
        prefill_seconds=prefill_seconds,
        audio=kinds[0],
        images=kinds[1],
    )


def merge(earlier: Any, later: Any) -> Any:
    """Merge two reports of one stream: the later one counts, except for zeros and nulls if the earlier has a value.

    Anthropic reports the input at the start and the output at the end, and some servers repeat the input as zero.
    """
    if not isinstance(earlier, dict) or not isinstance(later, dict):
        return later if isinstance(later, dict) else earlier
    merged = dict(earlier)
    for name, value in later.items():
        before = earlier.get(name)
        if isinstance(before, dict) and isinstance(value, dict):  # details, which are two levels deep at most
            merged[name] = before | {key: part for key, part in value.items() if part or key not in before}
        elif value or name not in earlier:
            merged[name] = value
    return merged


# --- plain responses


def read_response(body: bytes | memoryview, endpoint: Endpoint) -> ResponseRead:
    """Return the usage, the model and whether it is an error, of a plain (not streamed) response; never raises.

    JSON that a strict decoder refuses for a lone surrogate, NaN or Infinity is read as well.
    """
    response: PlainResponse
    try:
        response = decode_response(body)
        usage = response.usage or response.usageMetadata
        if not usage and response.choices is not NONE:
            usage = _usage_in_choices(response.choices)
    except DECODE_ERRORS:
        lenient = decode_leniently(body, PlainResponse)
        if lenient is None:
            found = normal(tail_usage(bytes(body)), endpoint=endpoint)
            return ResponseRead(found, error_seen=found is None)
        response = lenient
        usage = response.usage or response.usageMetadata
    found = normal(usage, response.timings, endpoint=endpoint, service_tier=response.service_tier)
    return ResponseRead(
        found,
        error_seen=bool(response.error) or _is_error(body, has_usage=found is not None),
        model=response.model if isinstance(response.model, str) else None,
    )


def _is_error(body: bytes | memoryview, *, has_usage: bool) -> bool:
    """Return True for an error that has no member `error`.

    A choice may have ended with one (OpenRouter), or the whole body is one: an object "error" with its fields at the
    top (older vLLM and SGLang), or a bare `detail` or `message` of a web framework or gateway.
    """
    text = bytes(body)
    if text.find(b'"error"') >= 0 and _FAILED_CHOICE.search(text) is not None:
        return True
    if has_usage or len(body) > _ERROR_BYTES_MOST:
        return False
    try:
        told = decode_error(body)
    except DECODE_ERRORS:
        return False
    is_bare = told.id is None and told.object is None and (type(told.message) is str or bool(told.detail))
    return is_bare or "error" in (told.object, told.type)


def _usage_in_choices(choices: msgspec.Raw) -> Any:
    """Return the usage inside a choice, where Moonshot's older API has it; long choices are not searched."""
    if len(memoryview(choices)) > LONG_RESPONSE_BYTES:
        return None
    try:
        return next((choice.usage for choice in decode_choices(choices) or () if choice.usage), None)
    except DECODE_ERRORS:
        return None


def created_object(body: bytes | memoryview) -> CreatedObject | None:
    """Return the object (a response, a file, a batch) that a plain response describes; None if it describes none."""
    try:
        return decode_created(body)
    except DECODE_ERRORS:
        return None


class PassedBody:
    """A plain response that is read after it has passed: as a whole if it is short enough, else at its two ends.

    Args:
        encoding: its content codings, as `content_encoding` returns them. A compressed body is also decoded as it
            passes, since it may be short only in this form.
        endpoint: decides how the usage is read.
        whole_bytes_most: the largest body that is kept, as it was sent.
    """

    def __init__(self, encoding: bytes, endpoint: Endpoint, whole_bytes_most: int) -> None:
        self._decoder = ResponseDecoder(encoding) if encoding else None
        self._endpoint = endpoint
        self._left_bytes = whole_bytes_most
        self._pieces: list[bytes] = []
        self._begin = b""
        self._end = b""

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        if self._decoder is not None:
            self._keep_ends(self._decoder.feed(piece))
        kept_all, self._left_bytes = self._left_bytes >= 0, self._left_bytes - len(piece)
        if self._left_bytes >= 0:
            self._pieces.append(piece)
        elif self._decoder is None:
            self._keep_ends(b"".join((*self._pieces, piece)) if kept_all else piece)
        if self._left_bytes < 0:
            self._pieces.clear()

    def whole(self) -> bytes | None:
        """Return the body as it was sent, None if it is too long."""
        return b"".join(self._pieces) if self._left_bytes >= 0 else None

    def usage(self) -> Usage | None:
        """Return the usage near the beginning or the end of a body that cannot be read as a whole."""
        found = normal(tail_usage(self._end), endpoint=self._endpoint)
        return found or normal(tail_usage(self._begin), endpoint=self._endpoint)

    def _keep_ends(self, text: bytes) -> None:
        if len(self._begin) < _END_BYTES:
            self._begin += text[: _END_BYTES - len(self._begin)]
        self._end = (self._end + text)[-_END_BYTES:] if len(text) < _END_BYTES else text[-_END_BYTES:]


_END_BYTES: Final = 16 * 1024  # of the beginning and the end of a long body, which are searched
_USAGE_NAME: Final = b'"usage"'
_USAGE_BEGIN = re.compile(rb'"usage"\s*:\s*(?=\{)')
_USAGE_BYTES_MOST: Final = 4096  # of a usage object; it has some 300
_OBJECTS_TRIED: Final = 8  # from the end; a hostile event may contain thousands
_KEYS_PASSED: Final = 512  # in 16 KB of chunks each of which has the usage null
_BRACE = re.compile(rb"[{}]")


def tail_usage(fragment: bytes) -> Any:
    """Return the last `usage` object in text whose beginning is missing or unreadable; None if there is none.

    Quotes inside strings are escaped in JSON, so the key cannot be part of a text. A tool that has a parameter of
    that name is passed over, since it has no token counts.
    """
    end = len(fragment)
    tried = 0
    for _ in range(_KEYS_PASSED):
        end = fragment.rfind(_USAGE_NAME, 0, end)
        if end < 0:
            return None
        key = _USAGE_BEGIN.match(fragment, end)
        if key is None:
            continue
        found = _object_at(fragment, key.end())
        if found is not None and normal(found, endpoint=Endpoint.INFERENCE) is not None:
            return found
        tried += 1
        if tried == _OBJECTS_TRIED:
            return None
    return None


def _object_at(text: bytes, start: int) -> Any:
    """Return the object that begins at `start`; None if it is longer than a usage object, or unreadable."""
    depth = 0
    for brace in _BRACE.finditer(text, start, start + _USAGE_BYTES_MOST):
        depth += 1 if brace.group() == b"{" else -1
        if depth == 0:
            return _object(text[start : brace.end()])
    return None


def _object(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except DECODE_ERRORS:
        return decode_leniently(text, dict)

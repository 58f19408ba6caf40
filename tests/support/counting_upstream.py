"""An upstream that answers scripted cases of every dialect and counts for itself what it reported.

A request names its case by a number in the header `x-case`; the same number always is the same case. What Cairn must
count for it stands in `Case.counts`, worked out from the figures and not read back out of the answer. Lean (one
protocol, no framework), so that ten thousand requests take seconds.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import gzip
import json
import random
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Self

import brotli
import httptools
import zstandard

KNOWN_MODEL, MUTE_MODEL = "truth", "mute"
PAIR_MODEL = "pair"  # served by a replica that fails and one that does not
STRICT_MODEL = "strict"  # served by a replica that refuses `stream_options`
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
EMBEDDINGS = "/v1/embeddings"
# The cases that fail at one of their two replicas. So few, and so far apart, that a worker may always repeat them,
# however slowly requests come: the budget of a pool is three in ten seconds, or a tenth of its requests.
FAILING = frozenset({9, 43, 981, 5011, 9135})
CUT_EVERY = 5  # rounds of all kinds: three broken answers in a row would rightly open the replica's breaker
# what each token costs in picodollars: per million 3 dollars for input, 0.3 read, 3.75 and 6 written, 15 for output
INPUT, READ, WRITE_5M, WRITE_1H, OUTPUT = 3_000_000, 300_000, 3_750_000, 6_000_000, 15_000_000
TIER_PERCENT = {"flex": 50, "priority": 200, "batch": 50}  # of these prices
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda body: gzip.compress(body, 1),
    "deflate": lambda body: zlib.compress(body, 1),
    "br": lambda body: brotli.compress(body, quality=1),
    "zstd": lambda body: zstandard.ZstdCompressor(1).compress(body),
}


@dataclass(frozen=True, slots=True)
class Figures:
    """The counts of one case: tokens of the prompt, those of them cached and written, and of the output."""

    prompt: int
    cached: int
    short: int
    long: int
    output: int

    @property
    def fresh(self) -> int:
        return self.prompt - self.cached - self.short - self.long


@dataclass(frozen=True, slots=True)
class Case:
    """A request and its answer. `pieces` are written one by one; with `cut` the connection ends in their middle.

    `coding` compresses the request. `later` is the answer to a GET of the response, which is asked for twice. A
    replica that fails does so as `fails` says: a status, `reset`, `event`, or not at all. NUMBER in a piece is the
    case's number.
    """

    path: str
    stream: bool
    pieces: tuple[bytes, ...]
    counts: Counter[str]
    model: str = KNOWN_MODEL
    status: int = 200
    packed: bool = False
    cut: bool = False
    asks_usage: bool = False
    coding: str = ""
    later: bytes = b""
    fails: str = ""

    @property
    def requests(self) -> int:
        """Requests that the client makes for it."""
        return 3 if self.later else 1


@cache
@functools.cache  # client and upstreams ask for each half a dozen times, and ten thousand take 20 MB
def case_of(number: int) -> Case:
    """The case of a number; neighbours are of different kinds."""
    chosen = random.Random(number)
    prompt = chosen.randint(50, 5000)
    cached, short, long = (chosen.randint(1, prompt // 4) for _ in range(3))
    figures = Figures(prompt, cached, short, long, chosen.randint(1, 500))
    kind = _KINDS[number % len(_KINDS)]
    if kind in (_cut, _anthropic_cut) and number // len(_KINDS) % CUT_EVERY:
        kind = _openai_stream
    case = kind(figures)
    return case if number in FAILING else replace(case, fails="")


def body_of(case: Case, number: int) -> bytes:
    """Return the client's body; one in ten is long enough to be placed, one in seven names an unknown model."""
    text = f"{number % 40}: " + "stones " * (900 if number % 10 == 0 else 20)
    model = f"made-up-{number}" if case.model == KNOWN_MODEL and number % 7 == 0 else case.model
    body: dict[str, Any] = {"model": model, "stream": case.stream}
    if case.asks_usage:
        body["stream_options"] = {"include_usage": True}
    if case.path == COMPLETIONS:
        body["prompt"] = text
    elif case.path in (RESPONSES, EMBEDDINGS):
        body["input"] = text
        body |= {"background": True} if case.later else {}
    else:
        body["messages"] = [{"role": "user", "content": text}]
    plain = json.dumps(body).encode()
    return PACK[case.coding](plain) if case.coding else plain


def headers_of(case: Case, number: int) -> str:
    """The headers with which the client sends it."""
    coding = f"content-encoding: {case.coding}\r\n" if case.coding else ""
    return f"x-case: {number}\r\naccept-encoding: gzip\r\ncontent-type: application/json\r\n{coding}"


def _counts(f: Figures, percent: int = 100, **others: int) -> Counter[str]:
    """As Cairn must count what `f` says, at `percent` of the prices; `others` beside it."""
    picos = f.fresh * INPUT + f.cached * READ + f.short * WRITE_5M + f.long * WRITE_1H + f.output * OUTPUT
    return Counter(
        input_fresh=f.fresh,
        input_cached=f.cached,
        input_cache_write=f.short + f.long,
        output=f.output,
        answers=1,
        cost_picos=picos * percent // 100,
        uncached_picos=(f.prompt * INPUT + f.output * OUTPUT) * percent // 100,
        **others,
    )


def _missing() -> Counter[str]:
    return Counter(missing=1)


# --- bodies


def _plain(usage: Any, **more: Any) -> tuple[bytes, ...]:
    tree = {"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": "Hi"}}]}
    return (json.dumps(tree | ({} if usage is ... else {"usage": usage}) | more).encode(),)


def _event(tree: Any, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(tree).encode() + b"\n\n"


def _delta(**more: Any) -> bytes:
    return _event({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "Hi"}} | more]})


def _chunks(*usages: Any, done: bool = True) -> tuple[bytes, ...]:
    ends = [_event({"object": "chat.completion.chunk", "choices": [], "usage": usage}) for usage in usages]
    return (_delta(), _delta(), *ends, *([b"data: [DONE]\n\n"] if done else []))


def _openai(f: Figures, prompt: int, **details: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": f.output, "prompt_tokens_details": details}


def _read_only(f: Figures) -> Figures:
    return Figures(f.prompt, f.cached, 0, 0, f.output)


def _nothing_cached(f: Figures) -> Figures:
    return Figures(f.prompt, 0, 0, 0, f.output)


def _five_minutes(f: Figures) -> Figures:
    return Figures(f.prompt, f.cached, f.short, 0, f.output)


# --- kinds


def _openai_plain(f: Figures) -> Case:
    f = _read_only(f)
    return Case(CHAT, False, _plain(_openai(f, f.prompt, cached_tokens=f.cached)), _counts(f))


def _openai_stream(f: Figures) -> Case:
    f = _read_only(f)
    return Case(CHAT, True, _chunks(_openai(f, f.prompt, cached_tokens=f.cached)), _counts(f))


def _asked_stream(f: Figures) -> Case:
    f = _read_only(f)
    usage = _openai(f, f.prompt, cached_tokens=f.cached)
    return Case(CHAT, True, _chunks(usage), _counts(f), asks_usage=True, packed=True)


def _zero(f: Figures) -> Case:
    f = _nothing_cached(f)
    return Case(CHAT, False, _plain(_openai(f, f.prompt, cached_tokens=0)), _counts(f))


def _written_stream(f: Figures) -> Case:
    f = _five_minutes(f)
    usage = _openai(f, f.prompt, cached_tokens=f.cached, cache_write_tokens=f.short)
    return Case(CHAT, True, _chunks(usage), _counts(f))


def _no_usage(f: Figures) -> Case:
    return Case(CHAT, False, _plain(...), _missing())


def _null_usage(f: Figures) -> Case:
    return Case(CHAT, False, _plain(None), _missing())


def _no_usage_stream(f: Figures) -> Case:
    return Case(CHAT, True, _chunks(), _missing())


def _negative(f: Figures) -> Case:
    only = Figures(0, 0, 0, 0, f.output)
    return Case(CHAT, False, _plain(_openai(f, -5, cached_tokens=-3)), _counts(only, inconsistent=1))


def _more_cached_than_prompt(f: Figures) -> Case:
    """Report an impossible count, which is ignored: the number of cached tokens is then unknown."""
    usage = _openai(f, f.prompt, cached_tokens=f.prompt + 100)
    return Case(CHAT, False, _plain(usage), _counts(_nothing_cached(f), unknown=f.prompt, inconsistent=1))


def _moonshot(f: Figures) -> Case:
    f = _read_only(f)
    usage = {"prompt_tokens": f.prompt, "completion_tokens": f.output, "cached_tokens": f.cached}
    return Case(CHAT, False, _plain(usage), _counts(f))


def _moonshot_in_choices(f: Figures) -> Case:
    f = _read_only(f)
    usage = {"prompt_tokens": f.prompt, "completion_tokens": f.output, "cached_tokens": f.cached}
    pieces = (_delta(), _delta(usage=usage, finish_reason="stop"), b"data: [DONE]\n\n")
    return Case(CHAT, True, pieces, _counts(f))


def _deepseek_usage(f: Figures) -> dict[str, int]:
    hit = {"prompt_cache_hit_tokens": f.cached, "prompt_cache_miss_tokens": f.prompt - f.cached}
    return {"prompt_tokens": f.prompt, "completion_tokens": f.output} | hit


def _deepseek(f: Figures) -> Case:
    f = _read_only(f)
    return Case(CHAT, False, _plain(_deepseek_usage(f)), _counts(f))


def _deepseek_stream(f: Figures) -> Case:
    f = _read_only(f)
    last = _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": _deepseek_usage(f)})
    return Case(CHAT, True, (_delta(), last, b"data: [DONE]\n\n"), _counts(f))


def _qwen(f: Figures) -> Case:
    f = _five_minutes(f)
    usage = _openai(f, f.prompt, cached_tokens=f.cached, cache_creation_input_tokens=f.short)
    return Case(CHAT, False, _plain(usage), _counts(f))


def _anthropic_input(f: Figures) -> dict[str, Any]:
    split = {"ephemeral_5m_input_tokens": f.short, "ephemeral_1h_input_tokens": f.long}
    written = {"cache_creation_input_tokens": f.short + f.long, "cache_creation": split}
    return {"input_tokens": f.fresh, "cache_read_input_tokens": f.cached, "output_tokens": 1} | written


def _anthropic(f: Figures) -> Case:
    usage = _anthropic_input(f) | {"output_tokens": f.output}
    tree = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": "Hi"}], "usage": usage}
    return Case(MESSAGES, False, (json.dumps(tree).encode(),), _counts(f))


def _anthropic_begin(f: Figures) -> tuple[bytes, ...]:
    start = {"type": "message_start", "message": {"type": "message", "usage": _anthropic_input(f)}}
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}}
    return _event(start, "message_start"), _event(delta, "content_block_delta")


def _anthropic_stream(f: Figures) -> Case:
    end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": f.output}}
    pieces = (*_anthropic_begin(f), _event(end, "message_delta"), _event({"type": "message_stop"}, "message_stop"))
    return Case(MESSAGES, True, pieces, _counts(f))


def _anthropic_cut(f: Figures) -> Case:
    """The input had been reported by then, and one token of output."""
    reported = Figures(f.prompt, f.cached, f.short, f.long, 1)
    return Case(MESSAGES, True, _anthropic_begin(f), _counts(reported), cut=True)


def _responses_tree(f: Figures) -> dict[str, Any]:
    usage = {
        "input_tokens": f.prompt,
        "input_tokens_details": {"cached_tokens": f.cached},
        "output_tokens": f.output,
    }
    return {"id": "resp_1", "object": "response", "status": "completed", "output": [], "usage": usage}


def _responses(f: Figures) -> Case:
    f = _read_only(f)
    return Case(RESPONSES, False, (json.dumps(_responses_tree(f)).encode(),), _counts(f))


def _responses_stream(f: Figures) -> Case:
    f = _read_only(f)
    begin = {"type": "response.created", "response": {"id": "resp_1", "usage": None}}
    delta = {"type": "response.output_text.delta", "delta": "Hi"}
    end = {"type": "response.completed", "response": _responses_tree(f)}
    pieces = tuple(_event(tree, str(tree["type"])) for tree in (begin, delta, end))
    return Case(RESPONSES, True, pieces, _counts(f))


def _cut(f: Figures) -> Case:
    return Case(CHAT, True, (_delta(), _delta()), _missing(), cut=True)


def _twice(f: Figures) -> Case:
    f = _read_only(f)
    usage = _openai(f, f.prompt, cached_tokens=f.cached)
    return Case(CHAT, True, _chunks(usage, usage), _counts(f))


def _packed(f: Figures) -> Case:
    f = _read_only(f)
    return Case(CHAT, False, _plain(_openai(f, f.prompt, cached_tokens=f.cached)), _counts(f), packed=True)


def _timings(f: Figures) -> Case:
    f = _read_only(f)
    timings = {"cache_n": f.cached, "prompt_n": f.fresh, "prompt_ms": 1.5, "predicted_n": f.output}
    last = _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "timings": timings})
    return Case(CHAT, True, (_delta(), last, b"data: [DONE]\n\n"), _counts(f))


def _mute(f: Figures) -> Case:
    f = _nothing_cached(f)
    usage = {"prompt_tokens": f.prompt, "completion_tokens": f.output}
    return Case(CHAT, False, _plain(usage), _counts(f, unknown=f.prompt), model=MUTE_MODEL)


def _mute_stream(f: Figures) -> Case:
    f = _nothing_cached(f)
    usage = {"prompt_tokens": f.prompt, "completion_tokens": f.output, "prompt_tokens_details": None}
    return Case(CHAT, True, _chunks(usage), _counts(f, unknown=f.prompt), model=MUTE_MODEL)


def _hidden_thoughts(f: Figures) -> Case:
    """Gemini counts thoughts in the total alone."""
    f = _nothing_cached(f)
    thought = Figures(f.prompt, 0, 0, 0, f.output + 50)
    usage = {
        "prompt_tokens": f.prompt,
        "completion_tokens": f.output,
        "total_tokens": f.prompt + f.output + 50,
    }
    return Case(CHAT, False, _plain(usage), _counts(thought, unknown=f.prompt), model=MUTE_MODEL)


def _refused(f: Figures) -> Case:
    """Nobody is billed for an error, whatever it says."""
    tree = {"error": {"message": "too long"}, "usage": _openai(f, f.prompt, cached_tokens=f.cached)}
    return Case(CHAT, False, (json.dumps(tree).encode(),), Counter(), status=400)


def _completions(f: Figures) -> Case:
    f = _read_only(f)
    return Case(COMPLETIONS, False, _plain(_openai(f, f.prompt, cached_tokens=f.cached)), _counts(f))


def _sent(case: Case, coding: str) -> Case:
    return replace(case, coding=coding)


def _zstd(f: Figures) -> Case:
    return _sent(_openai_plain(f), "zstd")


def _zstd_stream(f: Figures) -> Case:
    return _sent(_responses_stream(f), "zstd")


def _gzip_stream(f: Figures) -> Case:
    return _sent(_openai_stream(f), "gzip")


def _br(f: Figures) -> Case:
    return _sent(_anthropic(f), "br")


def _deflate(f: Figures) -> Case:
    return _sent(_completions(f), "deflate")


def _background(f: Figures) -> Case:
    """Its usage comes with the first GET; the second one brings it again."""
    f = _read_only(f)
    whole = _responses_tree(f) | {"id": "resp_NUMBER", "background": True, "model": KNOWN_MODEL}
    queued = whole | {"status": "queued", "usage": None}
    return Case(RESPONSES, False, (json.dumps(queued).encode(),), _counts(f), later=json.dumps(whole).encode())


def _background_stream(f: Figures) -> Case:
    """Its usage comes with the stream, and later GETs bring it again."""
    f = _read_only(f)
    whole = _responses_tree(f) | {"id": "resp_NUMBER", "background": True, "model": KNOWN_MODEL}
    begin = {"type": "response.created", "response": whole | {"status": "queued", "usage": None}}
    pieces = tuple(
        _event(each, str(each["type"])) for each in (begin, {"type": "response.completed", "response": whole})
    )
    return Case(RESPONSES, True, pieces, _counts(f), later=json.dumps(whole).encode())


def _large_last_event(f: Figures) -> Case:
    """The usage stands before 60 KB of output in the same event."""
    f = _read_only(f)
    whole = _responses_tree(f)
    whole["output"] = whole["tools"] = [
        {"type": "message", "content": [{"type": "output_text", "text": "a" * 30_000}]}
    ]
    usage = {"usage": whole.pop("usage")}
    delta = {"type": "response.output_text.delta", "delta": "Hi"}
    events = (delta, {"type": "response.completed", "response": usage | whole})
    return Case(RESPONSES, True, tuple(_event(each, str(each["type"])) for each in events), _counts(f))


def _tier(f: Figures) -> Case:
    f = _read_only(f)
    tier = ("flex", "priority", "batch")[f.prompt % 3]
    plain = _plain(_openai(f, f.prompt, cached_tokens=f.cached), service_tier=tier)
    return Case(CHAT, False, plain, _counts(f, TIER_PERCENT[tier]))


def _tier_stream(f: Figures) -> Case:
    f = _read_only(f)
    usage = _openai(f, f.prompt, cached_tokens=f.cached)
    last = _event({"choices": [], "usage": usage, "service_tier": "flex"})
    return Case(CHAT, True, (_delta(), last, b"data: [DONE]\n\n"), _counts(f, TIER_PERCENT["flex"]))


def _tier_of_messages(f: Figures) -> Case:
    usage = _anthropic_input(f) | {"output_tokens": f.output, "service_tier": "batch"}
    return Case(MESSAGES, False, (json.dumps({"content": [], "usage": usage}).encode(),), _counts(f, 50))


def _compacted_usage(f: Figures) -> tuple[dict[str, Any], Counter[str]]:
    """Two calls, of which the top of the usage shows the last one alone."""
    first, last = Figures(5 * f.prompt, 0, 0, 0, 2 * f.output), f
    calls = [{"type": kind, **_anthropic_input(each), "output_tokens": each.output} for kind, each in (
        ("compaction", first), ("message", last))]  # fmt: skip
    counted = _counts(first) + _counts(last)
    counted["answers"] = 1
    return calls[1] | {"iterations": calls}, counted


def _compacted(f: Figures) -> Case:
    usage, counted = _compacted_usage(f)
    return Case(MESSAGES, False, (json.dumps({"content": [], "usage": usage}).encode(),), counted)


def _compacted_stream(f: Figures) -> Case:
    usage, counted = _compacted_usage(f)
    end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
    pieces = (*_anthropic_begin(f), _event(end, "message_delta"), _event({"type": "message_stop"}, "message_stop"))
    return Case(MESSAGES, True, pieces, counted)


def _odd_json(f: Figures) -> Case:
    """Texts that a strict decoder refuses beside the usage: a lone surrogate, NaN, Infinity, invalid UTF-8."""
    f = _read_only(f)
    usage = json.dumps(_openai(f, f.prompt, cached_tokens=f.cached)).encode()
    odd = (b'"\\ud800"', b"NaN", b"-Infinity", b'"\xff"')[f.prompt % 4]
    body = b'{"choices":[{"index":0,"message":{"content":%b},"logprobs":{"x":%b}}],"usage":%b}' % (odd, odd, usage)
    return Case(CHAT, False, (body,), _counts(f))


def _odd_json_stream(f: Figures) -> Case:
    f = _read_only(f)
    usage = json.dumps(_openai(f, f.prompt, cached_tokens=f.cached)).encode()
    odd = (b'"\\udfff"', b"Infinity")[f.prompt % 2]
    last = b'data: {"choices":[],"usage":%b,"x":%b}\n\n' % (usage, odd)
    return Case(CHAT, True, (_delta(), last, b"data: [DONE]\n\n"), _counts(f))


def _mistral(f: Figures) -> Case:
    f = _read_only(f)
    usage = {"prompt_tokens": f.prompt, "completion_tokens": f.output, "num_cached_tokens": f.cached}
    return Case(CHAT, False, _plain(usage | {"prompt_audio_seconds": None}), _counts(f))


def _mistral_details(f: Figures) -> Case:
    f = _read_only(f)
    details = {"prompt_token_details": {"cached_tokens": f.cached}, "num_cached_tokens": f.cached}
    return Case(CHAT, False, _plain({"prompt_tokens": f.prompt, "completion_tokens": f.output} | details), _counts(f))


def _embedded(f: Figures) -> Case:
    f = Figures(f.prompt, 0, 0, 0, 0)
    tree = {
        "data": [{"index": 0, "embedding": [0.5]}],
        "usage": {"prompt_tokens": f.prompt, "total_tokens": f.prompt},
    }
    return Case(EMBEDDINGS, False, (json.dumps(tree).encode(),), _counts(f, unknown=f.prompt), model=MUTE_MODEL)


def _strict_stream(f: Figures) -> Case:
    """Mistral's manner: usage in the last chunk of every stream, and a 422 for a field that it does not know."""
    f = _read_only(f)
    usage = {"prompt_tokens": f.prompt, "completion_tokens": f.output, "num_cached_tokens": f.cached}
    last = _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage})
    return Case(CHAT, True, (_delta(), last, b"data: [DONE]\n\n"), _counts(f), model=STRICT_MODEL)


def _with_comments(f: Figures) -> Case:
    f = _read_only(f)
    chunks = _chunks(_openai(f, f.prompt, cached_tokens=f.cached))
    pieces = tuple(each for chunk in chunks for each in (b": ping\n\n", chunk, b":\n\n"))
    return Case(CHAT, True, pieces, _counts(f))


def _with_pings(f: Figures) -> Case:
    whole = _anthropic_stream(f)
    ping = _event({"type": "ping"}, "ping")
    return replace(whole, pieces=tuple(each for piece in whole.pieces for each in (ping, piece)))


def _error_in_200(f: Figures) -> Case:
    """No answer, whatever its status says; and nobody is billed for it."""
    bodies = (b'{"error":{"message":"sick"}}', b"<!DOCTYPE html><html>busy</html>", b"not json")
    return Case(CHAT, False, (bodies[f.prompt % 3],), Counter())


def _error_event_in_200(f: Figures) -> Case:
    error = _event({"error": {"message": "sick"}})
    return Case(CHAT, True, ((error,), (_delta(), error))[f.prompt % 2], Counter())


def _failover(f: Figures) -> Case:
    f = _read_only(f)
    plain = _plain(_openai(f, f.prompt, cached_tokens=f.cached))
    return Case(CHAT, False, plain, _counts(f), model=PAIR_MODEL, fails=("500", "reset")[f.prompt % 2])


def _failover_stream(f: Figures) -> Case:
    f = _read_only(f)
    chunks = _chunks(_openai(f, f.prompt, cached_tokens=f.cached))
    fails = ("503", "reset", "event")[f.prompt % 3]
    return Case(CHAT, True, chunks, _counts(f), model=PAIR_MODEL, fails=fails)


_KINDS: tuple[Callable[[Figures], Case], ...] = (
    _openai_plain, _cut, _openai_stream, _anthropic, _no_usage, _moonshot, _asked_stream, _zero, _negative, _failover,
    _anthropic_stream, _responses, _null_usage, _zstd, _moonshot_in_choices, _anthropic_cut, _deepseek, _mute, _tier,
    _written_stream, _qwen, _background, _no_usage_stream, _twice, _refused, _compacted, _packed, _responses_stream,
    _mute_stream, _odd_json, _more_cached_than_prompt, _timings, _strict_stream, _completions, _deepseek_stream,
    _hidden_thoughts, _gzip_stream, _embedded, _large_last_event, _error_in_200, _tier_stream, _mistral, _br,
    _failover_stream, _background_stream, _with_comments, _compacted_stream, _deflate, _error_event_in_200,
    _odd_json_stream, _mistral_details, _with_pings, _tier_of_messages, _zstd_stream,
)  # fmt: skip


# --- the server


class Ends(enum.Enum):
    """The fate of the connection after a response."""

    STAYS = "stays"
    CLOSES = "closes"
    RESETS = "resets"


@dataclass
class CountingUpstream:
    """One replica on loopback; use it as an asynchronous context. `counts` is its own count of what it reported.

    With `fails` it fails as its cases say. With `is_strict` it refuses requests that have `stream_options`.
    """

    fails: bool = False
    is_strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    port: int = 0
    fetched: set[int] = field(default_factory=set)  # background responses whose usage was reported

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def answer(self, number: int | None, method: str, body: bytes, *, takes_gzip: bool) -> tuple[bytes, Ends]:
        """All bytes of the answer to a case, and whether and how the connection ends after them."""
        if number is None:  # a probe
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}", Ends.STAYS
        case = case_of(number)
        if self.fails and case.fails:
            return _failure(case.fails)
        if self.is_strict and b'"stream_options"' in body:
            return _whole(422, b'{"detail":[{"type":"extra_forbidden"}]}'), Ends.STAYS
        self.answered += 1
        if method == "GET":
            self._count(number, case)
            return _whole(200, _numbered(case.later, number)), Ends.STAYS
        if not case.later or case.stream:
            self._count(number, case)
        packs = case.packed and takes_gzip
        kind = "text/event-stream" if case.stream and case.status == 200 else "application/json"
        head = f"HTTP/1.1 {case.status} X\r\nContent-Type: {kind}\r\n" + "Content-Encoding: gzip\r\n" * packs
        pieces = (gzip.compress(b"".join(case.pieces), 1),) if packs else case.pieces
        pieces = tuple(_numbered(piece, number) for piece in pieces)
        if not case.stream:
            whole = b"".join(pieces)
            return f"{head}Content-Length: {len(whole)}\r\n\r\n".encode() + whole, Ends.STAYS
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        end = b"5\r\ndat" if case.cut else b"0\r\n\r\n"
        ends = Ends.CLOSES if case.cut else Ends.STAYS
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + end, ends

    def _count(self, number: int, case: Case) -> None:
        """Count what is reported, that of a background response once."""
        if case.later and number in self.fetched:
            return
        self.fetched.add(number)
        self.counts += case.counts


def _numbered(piece: bytes, number: int) -> bytes:
    return piece.replace(b"NUMBER", b"%d" % number) if b"NUMBER" in piece else piece


def _whole(status: int, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _failure(fails: str) -> tuple[bytes, Ends]:
    """An answer of a sick replica, which reports what nobody may count."""
    if fails == "reset":
        return b"", Ends.RESETS
    error = {"error": {"message": "sick"}, "usage": {"prompt_tokens": 7, "completion_tokens": 7}}
    if fails == "event":
        return _whole(200, _event(error), "text/event-stream"), Ends.STAYS
    return _whole(int(fails), json.dumps(error).encode()), Ends.STAYS


class _Connection(asyncio.Protocol):
    def __init__(self, upstream: CountingUpstream) -> None:
        self._upstream = upstream
        self._parser = httptools.HttpRequestParser(self)
        self._case: int | None = None
        self._takes_gzip = False
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._case, self._takes_gzip, self._body = None, False, b""

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-case":
            self._case = int(value)
        elif name.lower() == b"accept-encoding":
            self._takes_gzip = b"gzip" in value

    def on_body(self, piece: bytes) -> None:
        if self._upstream.is_strict:
            self._body += piece

    def on_message_complete(self) -> None:
        method = self._parser.get_method().decode()
        answer, ends = self._upstream.answer(self._case, method, self._body, takes_gzip=self._takes_gzip)
        self._transport.write(answer)
        if ends is Ends.RESETS:
            raw = self._transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if ends is not Ends.STAYS:
            self._transport.close()  # in order, so that all before the cut arrives

"""One engine on a virtual clock: a queue of prefills, decodes beside it, a template and a cache. No HTTP.

Prefill computes `rate` uncached tokens a second, one prompt at a time; the first token follows, then decoding. A
prompt can be reused when its prefill ends, its output when the answer does. `serve` answers one request at once, for
scenarios in which time does not matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.engines.caches import Cache, tokens_of
from benchmarks.engines.templates import BYTES_PER_TOKEN, Chat, Template, render

PREFILL_TOKENS_PER_SECOND = 8_000.0
PREFILL_FIXED_SECONDS = 0.010
FIRST_TOKEN_SECONDS = 0.020
DECODE_SECONDS = 0.020


def seconds_alone(uncached_tokens: int) -> float:
    """Return the time until the first token of a prompt that waits for no other."""
    return PREFILL_FIXED_SECONDS + uncached_tokens / PREFILL_TOKENS_PER_SECOND + FIRST_TOKEN_SECONDS


At = Callable[[float, Callable[[float], None]], None]
"""The simulation's calendar: call at a time."""


class Usage(msgspec.Struct, frozen=True):
    """Usage that the engine reports for one response, in tokens."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


class Job(msgspec.Struct):
    """A request at an engine, and the functions to call at its first token and its end."""

    chat: Chat
    first_token: Callable[[Usage, float], None]
    ended: Callable[[Usage, float], None]


class SimulatedEngine:
    """One engine. `computed_tokens` counts the prompt tokens that it had to compute."""

    def __init__(
        self, cache: Cache, template: Template | None = None, *, rate: float = PREFILL_TOKENS_PER_SECOND
    ) -> None:
        self.cache = cache
        self.template = template or Template()
        self.prompt_tokens = 0
        self.computed_tokens = 0
        self._rate = rate
        self._waiting: deque[Job] = deque()
        self._busy = False

    def serve(self, chat: Chat) -> Usage:
        """Answer one request at once."""
        text, usage = self._begin(chat)
        self.cache.keep(text)
        self.cache.keep(_with_output(text, usage))
        return usage

    def submit(self, job: Job, now: float, at: At) -> None:
        """Take a request; the job's functions are called when its first token and its end come."""
        self._waiting.append(job)
        if not self._busy:
            self._start(now, at)

    def _begin(self, chat: Chat) -> tuple[bytes, Usage]:
        text = render(chat, self.template)
        cached = self.cache.find(text)
        if not chat.reads_cache:
            cached = 0
        usage = Usage(tokens_of(text), min(cached, tokens_of(text) - 1), chat.max_tokens)
        self.prompt_tokens += usage.prompt_tokens
        self.computed_tokens += usage.prompt_tokens - usage.cached_tokens
        return text, usage

    def _start(self, now: float, at: At) -> None:
        if not self._waiting:
            self._busy = False
            return
        self._busy = True
        job = self._waiting.popleft()
        text, usage = self._begin(job.chat)
        seconds = PREFILL_FIXED_SECONDS + (usage.prompt_tokens - usage.cached_tokens) / self._rate

        def computed(then: float) -> None:
            self.cache.keep(text)
            at(then + FIRST_TOKEN_SECONDS, lambda later: job.first_token(usage, later))
            at(then + FIRST_TOKEN_SECONDS + DECODE_SECONDS * usage.output_tokens, ended)
            self._start(then, at)

        def ended(then: float) -> None:
            self.cache.keep(_with_output(text, usage))
            job.ended(usage, then)

        at(now + seconds, computed)


class RankedEngine(SimulatedEngine):
    """An engine of several data-parallel ranks, each with its own cache, which serve requests by turns.

    A router that knows the ranks names one with each request: it has `ranks` before it, as other engines.
    """

    def __init__(self, caches: Sequence[Cache], template: Template | None = None) -> None:
        super().__init__(caches[0], template)
        self.ranks = [SimulatedEngine(cache, template) for cache in caches]
        self._turn = 0

    def serve(self, chat: Chat) -> Usage:
        """Answer one request at once, at the rank whose turn it is."""
        usage = self.ranks[self._turn % len(self.ranks)].serve(chat)
        self._turn += 1
        self.prompt_tokens += usage.prompt_tokens
        self.computed_tokens += usage.prompt_tokens - usage.cached_tokens
        return usage


def _with_output(text: bytes, usage: Usage) -> bytes:
    """Return the prompt and the text that was generated after it."""
    return text + b"w " * (usage.output_tokens * BYTES_PER_TOKEN // 2)

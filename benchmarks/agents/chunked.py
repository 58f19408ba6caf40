"""A replica's engine in steps, as vLLM computes: decodes and chunks of prefills share each step.

A step computes at most `step_tokens`: one for each request that decodes, then chunks of prompts in order of arrival.
Blocks of running requests cannot be evicted; the others are, the least recently used first, of one prompt the deepest
first. A prompt begins only if it fits beside those that run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

import msgspec

from benchmarks.fleet.engine import Listener, PinningCache
from benchmarks.fleet.trace import Request

STEADY_SECONDS = 3.0
"""A machine that others use as well changes its speed this often."""


class Speed(msgspec.Struct, frozen=True):
    """Times of an engine.

    A step takes `step_seconds`, `decode_seconds` for each token decoded in it, and the time of its prompt tokens.
    Before that, a request is read, rendered and tokenized in `request_seconds`, one after another. All steps take a
    random multiple of it, lognormal with `unsteadiness` as the deviation of its logarithm.
    """

    prefill_tokens_per_second: float
    step_seconds: float
    decode_seconds: float
    request_seconds: float
    unsteadiness: float = 0.0
    step_tokens: int = 2_048

    def alone_seconds(self, uncached_tokens: int, output_tokens: int) -> float:
        """Return the time of a request on an idle engine."""
        steps = -(-uncached_tokens // self.step_tokens) + output_tokens - 1
        return (
            self.request_seconds
            + uncached_tokens / self.prefill_tokens_per_second
            + steps * self.step_seconds
            + (output_tokens - 1) * self.decode_seconds
        )


class _Running:
    """A request under way."""

    __slots__ = ("cached_tokens", "done_tokens", "made_tokens", "pinned", "request")

    def __init__(self, request: Request, cached_tokens: int, pinned: int) -> None:
        self.request = request
        self.cached_tokens = cached_tokens
        self.done_tokens = cached_tokens
        self.pinned = pinned  # blocks
        self.made_tokens = 0

    @property
    def left_tokens(self) -> int:
        return self.request.input_tokens - self.done_tokens


class ChunkedEngine:
    """One replica. `at(time, call)` is the simulation's calendar."""

    def __init__(
        self,
        replica: int,
        capacity_tokens: int,
        at: Callable[[float, Callable[[float], None]], None],
        listener: Listener,
        *,
        speed: Speed,
        block_tokens: int,
    ) -> None:
        self._replica = replica
        self._at = at
        self._listener = listener
        self._speed = speed
        self._block_tokens = block_tokens
        self._cache = PinningCache(capacity_tokens, block_tokens)
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []
        self._busy = False
        self._read_seconds = 0.0  # the time until which the front end reads what was submitted

    def submit(self, request: Request, work_seconds: float, now: float) -> None:
        """Take a request."""
        del work_seconds
        self._read_seconds = max(self._read_seconds, now) + self._speed.request_seconds
        self._at(self._read_seconds, lambda then: self._read(request, then))

    def _read(self, request: Request, now: float) -> None:
        """Queue a request that was read."""
        self._waiting.append(request)
        if not self._busy:
            self._step(now)

    def _step(self, now: float) -> None:
        """Begin a step, if there is anything to compute."""
        speed = self._speed
        decoding = [each for each in self._running if not each.left_tokens]
        budget, chunks = speed.step_tokens - len(decoding), []
        for each in self._running:
            if each.left_tokens and budget > 0:
                chunks.append((each, min(each.left_tokens, budget)))
                budget -= chunks[-1][1]
        while budget > 0 and self._waiting and self._cache.fits(self._waiting[0].blocks):
            each = self._begin(self._waiting.popleft())
            chunks.append((each, min(each.left_tokens, budget)))
            budget -= chunks[-1][1]
        self._busy = bool(decoding or chunks)
        if not self._busy:
            return
        seconds = (
            speed.step_seconds
            + speed.decode_seconds * len(decoding)
            + sum(tokens for _, tokens in chunks) / speed.prefill_tokens_per_second
        )
        self._at(now + seconds * self._slowness(now), lambda then: self._stepped(decoding, chunks, then))

    def _slowness(self, now: float) -> float:
        deviation = self._speed.unsteadiness
        if not deviation:
            return 1.0
        return Random(f"{self._replica} {now // STEADY_SECONDS}").lognormvariate(0.0, deviation)

    def _begin(self, request: Request) -> _Running:
        cached = min(self._cache.matched_tokens(request), request.input_tokens - 1)
        held = cached // self._block_tokens
        self._cache.pin(request.blocks[:held])
        each = _Running(request, held * self._block_tokens, held)
        self._running.append(each)
        return each

    def _stepped(self, decoding: list[_Running], chunks: list[tuple[_Running, int]], now: float) -> None:
        """End a step: hand out its tokens, and begin the next one."""
        ended = []
        for each in decoding:
            each.made_tokens += 1
            if each.made_tokens >= each.request.output_tokens:
                ended.append(each)
        firsts = []
        for each, tokens in chunks:
            each.done_tokens += tokens
            whole = len(each.request.blocks) if not each.left_tokens else each.done_tokens // self._block_tokens
            self._cache.pin(each.request.blocks[each.pinned : whole])
            each.pinned = whole
            if not each.left_tokens:
                each.made_tokens = 1
                firsts.append(each)
        for each in ended:
            self._running.remove(each)
            self._cache.unpin(each.request.blocks)
        for each in firsts:
            self._listener.first_token(each.request, self._replica, each.cached_tokens, now)
        for each in ended:
            self._listener.ended(each.request, self._replica, now)
        self._step(now)

"""Conversations in a closed loop before real engines: each asks, reads its answer, thinks, and asks again."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

import aiohttp
import msgspec

from benchmarks.common.figures import percentile
from benchmarks.vllm.model import NAME
from proxy.clock import SystemClock
from proxy.tasks import Tasks

_CLOCK = SystemClock()
_CONTENT = re.compile(rb'"content": ?"[^"]')
_PROMPT = re.compile(rb'"prompt_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
_KEPT_BYTES = 4_096
_WORDS = ("self", "return", "import", "class", "value", "name", "for", "in", "None", "raise", "line", "path", "of")
_TOKENS_PER_WORD = 1.0  # the vocabulary has each of them whole
ANSWER_TOKENS = 8
QUESTION_TOKENS = 20


class Load(msgspec.Struct, frozen=True):
    """A closed loop: `sessions` of `prompt_tokens`, with exponential pauses of `think_seconds` in the mean.

    Turns that end before `warm_up_seconds` do not count. The sessions arrive over `arrival_seconds`.
    """

    sessions: int
    prompt_tokens: int
    think_seconds: float
    warm_up_seconds: float
    seconds: float
    arrival_seconds: float = 5.0


class Turn(msgspec.Struct, frozen=True):
    """One answered turn. Times are in seconds; `predicted_tokens` is None without Cairn."""

    ended: float
    ttft_seconds: float
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int | None


class Figures(msgspec.Struct, frozen=True):
    """Result of a load before one router."""

    turns: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    predicted_tokens: int | None
    ttft_seconds: tuple[float, float, float, float]  # mean, p50, p99, most

    @property
    def cached_share(self) -> float:
        """Share of all prompt tokens that was cached."""
        return self.cached_tokens / max(self.prompt_tokens, 1)

    @property
    def computed_per_turn(self) -> float:
        """Prompt tokens that the engines computed, by turn."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.turns, 1)


class Closed:
    """The sessions before one router. `port_of` gives the port for the n-th request."""

    def __init__(self, load: Load, port_of: Callable[[int], int], seed: int) -> None:
        self._load = load
        self._port_of = port_of
        self._seed = seed
        self._sent = 0
        self._failed = 0
        self._began = 0.0
        self._turns: list[Turn] = []

    async def run(self) -> Figures:
        """Drive the load for its time; unfinished turns do not count."""
        tasks = Tasks()
        self._began = _CLOCK.monotonic()
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as http:
            for number in range(self._load.sessions):
                tasks.start(self._talk(http, number), f"session {number}")
            await asyncio.sleep(self._load.seconds)
            await tasks.close()
        return figures([turn for turn in self._turns if turn.ended >= self._load.warm_up_seconds], self._failed)

    async def _talk(self, http: aiohttp.ClientSession, number: int) -> None:
        load, random = self._load, Random(f"{self._seed} {number}")
        first = words(f"{self._seed} session {number}", load.prompt_tokens)
        messages = [{"role": "system", "content": first}]
        await asyncio.sleep(load.arrival_seconds * number / load.sessions)
        for turn in range(1_000_000):
            messages.append({"role": "user", "content": words(f"question {number} {turn}", QUESTION_TOKENS)})
            await self._ask(http, messages)
            messages.append({"role": "assistant", "content": words(f"answer {number} {turn}", ANSWER_TOKENS)})
            await asyncio.sleep(random.expovariate(1 / load.think_seconds))

    async def _ask(self, http: aiohttp.ClientSession, messages: list[dict[str, Any]]) -> None:
        body = json.dumps({"messages": messages, **_FIELDS}).encode()
        port, sent = self._port_of(self._sent), _CLOCK.monotonic()
        self._sent += 1
        try:
            turn = await self._answer(http, port, body, sent)
        except (aiohttp.ClientError, OSError):
            turn = None
        if turn is None:
            self._failed += 1
        else:
            self._turns.append(turn)

    async def _answer(self, http: aiohttp.ClientSession, port: int, body: bytes, sent: float) -> Turn | None:
        """Send one request and read its answer to the end; None if it is no answer."""
        first, tail = 0.0, b""
        headers = {"content-type": "application/json"}
        async with http.post(f"http://127.0.0.1:{port}/v1/chat/completions", data=body, headers=headers) as answer:
            async for piece in answer.content.iter_any():
                tail = (tail + piece)[-_KEPT_BYTES:]
                if not first and _CONTENT.search(tail):
                    first = _CLOCK.monotonic()
            prompt, cached = _PROMPT.search(tail), _CACHED.search(tail)
            if answer.status != 200 or not first or prompt is None:
                return None
            predicted = answer.headers.get("x-cairn-matched-tokens")
        ended = _CLOCK.monotonic()
        return Turn(
            ended=ended - self._began,
            ttft_seconds=first - sent,
            seconds=ended - sent,
            prompt_tokens=int(prompt[1]),
            cached_tokens=0 if cached is None else int(cached[1]),
            predicted_tokens=None if predicted is None else int(predicted),
        )


_FIELDS = {
    "model": NAME,
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": ANSWER_TOKENS,
    "ignore_eos": True,
    "temperature": 0,
}


def figures(turns: list[Turn], failed: int) -> Figures:
    """Return the figures of all turns."""
    waits = sorted(turn.ttft_seconds for turn in turns)
    predicted = [turn.predicted_tokens for turn in turns if turn.predicted_tokens is not None]
    mean = sum(waits) / max(len(waits), 1)
    return Figures(
        turns=len(turns),
        failed=failed,
        prompt_tokens=sum(turn.prompt_tokens for turn in turns),
        cached_tokens=sum(turn.cached_tokens for turn in turns),
        predicted_tokens=sum(predicted) if predicted else None,
        ttft_seconds=(mean, percentile(waits, 0.5), percentile(waits, 0.99), percentile(waits, 1.0)),
    )


def words(seed: str, tokens: int) -> str:
    """Return text of about `tokens` tokens of the vocabulary, equal for equal seeds."""
    random = Random(seed)
    return " ".join(random.choice(_WORDS) for _ in range(int(tokens / _TOKENS_PER_WORD)))

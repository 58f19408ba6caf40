"""One streamed chat request, and the facts of its answer: times, tokens, cached tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

from benchmarks.load.workloads import Turn
from proxy.clock import Clock
from proxy.model import Endpoint
from proxy.wire.sse import StreamTap

_ERROR_BYTES = 200


class Answer(msgspec.Struct, frozen=True):
    """The result of one request. `cached_tokens` is None if the endpoint did not report it; `cache` is the
    response's Cache-Status (RFC 9211), empty if there is none."""

    ttft_seconds: float = 0.0
    seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    output_tokens: int = 0
    cache: str = ""
    error: str = ""

    @property
    def is_warm(self) -> bool:
        """True if most of the prompt was cached."""
        return (self.cached_tokens or 0) * 2 > self.prompt_tokens


async def ask(
    http: aiohttp.ClientSession, url: str, model: str, turn: Turn, headers: Mapping[str, str], clock: Clock
) -> Answer:
    """Send it and read the answer to its end; a failure is an `error`, never raised."""
    body: dict[str, Any] = {
        "model": model,
        "messages": msgspec.to_builtins(turn.messages),
        "max_tokens": turn.output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent = clock.monotonic()
    try:
        async with http.post(f"{url}/chat/completions", json=body, headers=headers) as answer:
            if answer.status != 200:
                text = (await answer.content.read(_ERROR_BYTES)).decode(errors="replace")
                return Answer(error=f"{answer.status} {text}")
            return await _read(answer, sent, clock)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        return Answer(error=type(error).__name__)


async def _read(answer: aiohttp.ClientResponse, sent: float, clock: Clock) -> Answer:
    tap, first = StreamTap(Endpoint.CHAT, withhold_usage=False), 0.0
    async for piece in answer.content.iter_any():
        tap.feed(piece)
        if not first and tap.first_token_seen:
            first = clock.monotonic()
    tap.close()
    if not first or not tap.finished or tap.error_seen:
        return Answer(error="the stream broke off")
    usage = tap.usage
    status = answer.headers.get("cache-status", "")
    seconds = clock.monotonic() - sent
    if usage is None:
        return Answer(first - sent, seconds, cache=status)
    return Answer(first - sent, seconds, usage.prompt_tokens, usage.cached_tokens, usage.output_tokens, status)

"""Send the requests of a trace at their times and record the result of each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence

import aiohttp
import msgspec

from benchmarks.fleet.trace import BLOCK_TOKENS, Request
from benchmarks.replay.contestants import Entrant
from benchmarks.replay.texts import Bodies
from proxy.clock import SystemClock

_CLOCK = SystemClock()
_FIRST_TOKEN = b'"content":"w'
_CACHED = re.compile(rb'"cached_tokens":(\d+)')
_PROMPT = re.compile(rb'"prompt_tokens":(\d+)')
_END = b"data: [DONE]"
_GIVE_UP_SECONDS = 1_800.0
_LAG_SAMPLE_SECONDS = 0.5
_LAG = re.compile(rb"^cairn_journal_lag_seconds ([0-9.e+-]+)", re.MULTILINE)


class Seen(msgspec.Struct, frozen=True):
    """One request as its client saw it. Seconds are the clock's, not the engines'; `error` is empty if it
    succeeded. `predicted_tokens` and `replica` are as Cairn reports them.
    """

    number: int
    ttft_seconds: float
    late_seconds: float  # how late it was sent
    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_tokens: int = 0
    replica: str = ""
    error: str = ""


class EngineCount(msgspec.Struct, frozen=True):
    """Counts of one engine."""

    requests: int
    prompt_tokens: int
    cached_tokens: int


class Run(msgspec.Struct, frozen=True):
    """One entrant's whole run; `lags_seconds` are samples of how old news of other proxies was when it was applied,
    `restarted` is the engine that began anew, by Cairn's name for it, before request `restarted_before`. All prompts
    begin with the same `shared_tokens`."""

    seen: list[Seen]
    engines: list[EngineCount]
    lags_seconds: list[float]
    restarted_before: int | None = None
    restarted: str = ""
    shared_tokens: int = 0


async def drive(
    entrant: Entrant, requests: Sequence[Request], texts: Bodies, speed: float, *, restart: bool = False
) -> Run:
    """Send all `requests` through the entrant, with arrivals `speed` times as fast.

    With `restart` its first engine forgets everything half-way.
    """
    seen: list[Seen] = []
    lags: list[float] = []
    timeout = aiohttp.ClientTimeout(total=_GIVE_UP_SECONDS)
    half = len(requests) // 2 if restart else None
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=timeout, read_bufsize=1 << 18
    ) as http:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_watch(http, entrant, lags))
            await _send_all(group, http, entrant, requests, texts, speed, half, seen)
            while len(seen) < len(requests):  # noqa: ASYNC110 - counted by whoever ends
                await asyncio.sleep(0.05)
            watching.cancel()
        engines = [await _count(http, port) for port in entrant.engine_ports]
    name = f"127.0.0.1:{entrant.engine_ports[0]}"
    return Run(sorted(seen, key=lambda each: each.number), engines, lags, half, name, _shared_tokens(requests))


def _shared_tokens(requests: Sequence[Request]) -> int:
    """Return the tokens of the blocks with which all prompts begin."""
    first, last = min(each.blocks for each in requests), max(each.blocks for each in requests)
    depth = next((n for n, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))
    return depth * BLOCK_TOKENS


async def _send_all(
    group: asyncio.TaskGroup,
    http: aiohttp.ClientSession,
    entrant: Entrant,
    requests: Sequence[Request],
    texts: Bodies,
    speed: float,
    half: int | None,
    seen: list[Seen],
) -> None:
    start = _CLOCK.monotonic()
    for place, request in enumerate(requests):
        due = start + request.arrival_seconds / speed
        wait = due - _CLOCK.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        if place == half:
            async with http.post(f"http://127.0.0.1:{entrant.engine_ports[0]}/replay/restart"):
                pass
        port = entrant.ports[place % len(entrant.ports)]
        group.create_task(_one(http, port, request, texts, due, seen))


async def _one(
    http: aiohttp.ClientSession, port: int, request: Request, texts: Bodies, due: float, seen: list[Seen]
) -> None:
    sent = _CLOCK.monotonic()
    try:
        seen.append(await ask(http, port, request, texts.body(request), sent, sent - due))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        seen.append(Seen(request.number, 0.0, sent - due, error=type(error).__name__))


async def ask(
    http: aiohttp.ClientSession, port: int, request: Request, body: bytes, sent: float, late: float
) -> Seen:
    """Send one request, and read its answer to the end."""
    first, tail = 0.0, b""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    async with http.post(url, data=body, headers={"content-type": "application/json"}) as answer:
        async for piece in answer.content.iter_any():
            tail = (tail + piece)[-4_096:]
            if not first and _FIRST_TOKEN in tail:
                first = _CLOCK.monotonic()
        if answer.status != 200 or not first or _END not in tail:
            return Seen(request.number, 0.0, late, error=f"status {answer.status}, first token {bool(first)}")
        prompt, cached = _PROMPT.search(tail), _CACHED.search(tail)
        return Seen(
            request.number,
            first - sent,
            late,
            int(prompt[1]) if prompt else 0,
            int(cached[1]) if cached else 0,
            int(answer.headers.get("x-cairn-matched-tokens", 0)),
            answer.headers.get("x-cairn-replica", ""),
        )


async def _watch(http: aiohttp.ClientSession, entrant: Entrant, lags: list[float]) -> None:
    """Sample the age of the journal's entries, if there are several proxies."""
    while len(entrant.admin_ports) > 1:
        await asyncio.sleep(_LAG_SAMPLE_SECONDS)
        for port in entrant.admin_ports:
            try:
                async with http.get(f"http://127.0.0.1:{port}/metrics") as answer:
                    if found := _LAG.search(await answer.read()):
                        lags.append(float(found[1]))
            except (aiohttp.ClientError, OSError, TimeoutError):
                continue


async def _count(http: aiohttp.ClientSession, port: int) -> EngineCount:
    async with http.get(f"http://127.0.0.1:{port}/replay/stats") as answer:
        return msgspec.json.decode(await answer.read(), type=EngineCount)

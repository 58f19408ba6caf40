"""Takes the picture of the status page for the README, of a real run before engines whose prefill takes time.

python -m tests.status.picture docs/status-page.png [--seconds 240]

Everything on it was counted by Cairn, but for the six days before today, whose totals are written beforehand.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
from aiohttp import web
from PIL import Image

from cache import Totals, open_store
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.browser import chromium, look
from tests.support.openai_upstream import Dialect, OpenAIUpstream
from tests.support.serving import Serving, serving
from tests.support.valkey import Valkey

MODELS = ("llama-3.3-70b", "qwen3-32b")
USERS = 10
PREFILL_TOKENS_PER_SECOND = 24_000
WORDS = ("stone", "path", "cairn", "ridge", "snow", "marker", "north", "lichen", "slope", "valley", "cloud", "ledge")
COLOURS = 96  # of the kept picture: enough for its letters' edges, and a third of the bytes


@dataclass
class Engine(OpenAIUpstream):
    """One prefill at a time, at a rate."""

    prefilling: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def _stream(self, request: web.BaseRequest, dialect: Dialect, cut_after: int | None) -> web.StreamResponse:
        usage = dialect.usage
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        async with self.prefilling:
            await asyncio.sleep((usage["prompt_tokens"] - cached) / PREFILL_TOKENS_PER_SECOND)
        await asyncio.sleep(random.uniform(0.012, 0.03))
        return await super()._stream(request, dialect, cut_after)


class Crowd:
    """People who ask about a few long documents, agents that go on for some turns, and now and then something new."""

    def __init__(self, running: Serving, http: aiohttp.ClientSession) -> None:
        self._url = f"{running.url}/chat/completions"
        self._http = http
        self._documents = [_prose(random.randint(8_000, 90_000)) for _ in range(24)]
        self._rules = _prose(14_000)

    async def ask_for(self, seconds: float) -> None:
        """All of them, for so long."""
        async with asyncio.timeout(seconds + 60):
            await asyncio.gather(*(self._user(MODELS[number % 3 == 0], seconds) for number in range(USERS)))

    async def _user(self, model: str, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            kind = random.random()
            if kind < 0.62:
                document = self._documents[min(int(random.expovariate(0.22)), len(self._documents) - 1)]
                await self._ask(model, [document, _prose(900)])
            elif kind < 0.82:
                turns = [self._rules]
                for _ in range(random.randint(2, 7)):
                    turns.append(_prose(1_500))
                    await self._ask(model, turns)
                    await asyncio.sleep(random.uniform(0.2, 0.8))
            elif kind < 0.94:
                await self._ask(model, [_prose(400)])
            else:
                await self._ask(model, [_prose(random.randint(5_000, 40_000))])
            await asyncio.sleep(random.expovariate(1.4))

    async def _ask(self, model: str, texts: list[str]) -> None:
        messages = [{"role": "user" if place else "system", "content": text} for place, text in enumerate(texts)]
        body = {"model": model, "stream": True, "messages": messages}
        async with self._http.post(self._url, json=body) as answer:
            await answer.read()


def _prose(size: int) -> str:
    return " ".join(random.choices(WORDS, k=size // 6))


async def _write_days_before(url: str) -> None:
    """Totals of the days before today, and of earlier today."""
    tasks = Tasks()
    store = open_store(url, clock=SystemClock(), tasks=tasks)
    await store.start()
    totals = Totals(store, "days-before")
    today = datetime.now(UTC).date()
    for back in range(7):
        prompt = random.randint(2_200_000_000, 3_600_000_000) // (1 if back else 3)
        cached = int(prompt * random.uniform(0.68, 0.79))
        row = totals.row((today - timedelta(days=back)).isoformat(), MODELS[0], "gpu-a", "team")
        row.answers, row.prompt_tokens, row.cached_tokens = prompt // 6_000, prompt, cached
        picos_a_token = 10 * 10**12 // 3_600 // PREFILL_TOKENS_PER_SECOND
        row.input_picos, row.saving_picos = prompt * picos_a_token, cached * picos_a_token
        row.prefill_micros = cached * 10**6 // PREFILL_TOKENS_PER_SECOND
    await totals.flush()
    await store.close()
    await tasks.close()


@asynccontextmanager
async def _cairn(folder: Path, redis_url: str) -> AsyncIterator[Serving]:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(Engine(models=MODELS)) for _ in range(4)]
        replicas = [
            {"url": engine.url, "name": f"gpu-{letter}", "capacity_tokens": 260_000}
            for letter, engine in zip("abcd", engines, strict=True)
        ]
        tree = {
            "server": {"workers": 2},
            "redis": {"url": redis_url},
            "pools": [{"name": "engines", "replicas": replicas, "models": list(MODELS)}],
            "prices": [{"usd_per_gpu_hour": 2.5, "gpus_per_replica": 4}],
        }
        yield await stack.enter_async_context(serving(folder, tree))


async def _take(file: Path, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        valkey = Valkey().start()
        try:
            await _write_days_before(valkey.url)
            async with _cairn(Path(folder), valkey.url) as running, aiohttp.ClientSession() as http:
                asking = asyncio.get_running_loop().create_task(Crowd(running, http).ask_for(seconds + 20))
                await asyncio.sleep(seconds)
                await _photograph(running, file)
                asking.cancel()
        finally:
            valkey.kill()


async def _photograph(running: Serving, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    async with chromium() as browser:
        for name, dark, width in ((file, False, 1280), (None, True, 1280), (None, False, 360), (None, True, 360)):
            looked = await look(browser, f"{running.admin}/", width=width, dark=dark)
            await looked.until("() => document.querySelectorAll('.plot .main-svg').length >= 2")
            await asyncio.sleep(2)  # until the totals are there
            path = await looked.keep(f"picture-{width}-{'dark' if dark else 'light'}.png")
            if name is not None:
                with Image.open(path) as picture:
                    picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(name, optimize=True)
            await looked.page.context.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0)
    given = parser.parse_args()
    asyncio.run(_take(given.file, given.seconds))

"""The status page in a real browser, before real workers and upstreams that count what they cached."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from playwright.async_api import Browser

from tests.support.browser import Looked, chromium, look
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.serving import Serving, serving

SOON_SECONDS = 2.0  # a request that ended must show by then
DOCUMENT = "The stones were set by those who came before, and each one rests on the last. " * 150
LIVE = "() => document.querySelector('#connection').textContent === 'Live'"
DRAWN = "() => document.querySelectorAll('.plot .main-svg').length >= 2"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Chromium, or a skipped test."""
    async with chromium() as running:
        yield running


@asynccontextmanager
async def cairn(
    folder: Path, workers: int = 2, **sections: Any
) -> AsyncIterator[tuple[Serving, list[OpenAIUpstream]]]:
    """Cairn before two upstreams."""
    async with OpenAIUpstream() as one, OpenAIUpstream() as other:
        upstreams = [one, other]
        replicas = [{"url": each.url, "name": f"replica-{at}"} for at, each in enumerate(upstreams, start=1)]
        pools = [{"name": "engines", "replicas": replicas, "models": ["test-model"]}]
        tree = {"server": {"workers": workers}, "pools": pools, **sections}
        async with serving(folder, tree) as running:
            yield running, upstreams


async def ask(http: aiohttp.ClientSession, url: str, question: str) -> None:
    """A streamed chat about the document."""
    messages = [{"role": "system", "content": DOCUMENT}, {"role": "user", "content": question}]
    body = {"model": "test-model", "stream": True, "messages": messages}
    async with http.post(f"{url}/chat/completions", json=body) as answer:
        assert answer.status == 200
        await answer.read()


async def scraped(http: aiohttp.ClientSession, admin: str) -> str:
    """The page of metrics."""
    async with http.get(f"{admin}/metrics") as answer:
        return await answer.text()


def total(page: str, name: str, *labels: str) -> float:
    """The sum of a counter's series that have all of `labels`."""
    lines = [line for line in page.splitlines() if re.match(rf"{name}(\{{|\s)", line)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in labels))


async def opened(browser: Browser, admin: str, **kwargs: Any) -> Looked:
    """The page once it is live and its plots are there."""
    looked = await look(browser, f"{admin}/", **kwargs)
    async with asyncio.timeout(20):
        await looked.until(LIVE)
        await looked.until(DRAWN)
    return looked


def shown(requests: int) -> str:
    """A script that is true once so many requests are shown."""
    return f"() => Number(document.querySelector('#figures').dataset.requests) === {requests}"


async def figures(looked: Looked) -> Any:
    """The figures since the start, exact."""
    return await looked.value(
        "() => Object.fromEntries([...document.querySelectorAll(\"[data-period='since start'] data\")]"
        ".map(each => [each.dataset.figure, Number(each.value)]))"
    )


async def column(looked: Looked, table: str, place: int) -> Any:
    """The texts of a table's column."""
    return await looked.value(
        f"() => [...document.querySelectorAll('#{table} tbody tr')].map(r => r.cells[{place}].textContent)"
    )


async def test_the_figures_are_those_of_metrics_and_of_the_upstreams(browser: Browser, tmp_path: Path) -> None:
    """Two workers; nothing is asked of anyone else, and the browser has nothing to complain about."""
    async with cairn(tmp_path) as (running, upstreams), aiohttp.ClientSession() as http:
        looked = await opened(browser, running.admin)
        for number in range(6):
            await ask(http, running.url, f"Question {number}?")
        async with asyncio.timeout(10):
            await looked.until(shown(6))
        page, found = await scraped(http, running.admin), await figures(looked)
        cached = sum(sum(each.cached_tokens) for each in upstreams)
        assert cached > 0
        assert found["cached_tokens"] == total(page, "cairn_tokens_total", 'type="input_cached"') == cached
        assert found["prompt_tokens"] == sum(sum(each.prompt_tokens) for each in upstreams)
        assert found["prefill_seconds"] == pytest.approx(total(page, "cairn_prefill_seconds_saved_total"))
        assert found["usd"] == total(page, "cairn_savings_usd_total")
        assert [await looked.value("() => document.querySelector('#ttft tbody').rows.length")] != [0]
        assert await column(looked, "replicas", 0) == ["replica-1", "replica-2"]
        assert await column(looked, "replicas", 1) == ["up", "up"]
        assert (await column(looked, "prefixes", 1))[0] == "test-model"
        assert any(reason.startswith("cold") for reason in await column(looked, "misses", 1))
        assert looked.complaints == []
        assert all(url.startswith((running.admin, "data:")) for url in looked.asked)
        await looked.keep("status-page.png")


async def test_a_request_shows_within_two_seconds(browser: Browser, tmp_path: Path) -> None:
    """From its end until the page has it."""
    async with cairn(tmp_path) as (running, _), aiohttp.ClientSession() as http:
        looked = await opened(browser, running.admin)
        for number in range(1, 4):
            await ask(http, running.url, "What is a cairn?")
            async with asyncio.timeout(SOON_SECONDS):
                await looked.until(shown(number))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_it_fits_a_small_screen(browser: Browser, tmp_path: Path, dark: bool) -> None:
    """At 360 px nothing sticks out sideways; the colours follow what the reader prefers."""
    async with cairn(tmp_path, workers=1) as (running, _), aiohttp.ClientSession() as http:
        await ask(http, running.url, "What is a cairn?")
        looked = await opened(browser, running.admin, width=360, dark=dark)
        async with asyncio.timeout(10):
            await looked.until(shown(1))
        assert await looked.value("() => document.documentElement.scrollWidth") <= 360
        paper = await looked.value("() => getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) is dark
        await looked.keep(f"status-page-360-{'dark' if dark else 'light'}.png")


async def test_a_token_is_asked_for_and_kept_in_the_tab(browser: Browser, tmp_path: Path) -> None:
    """A wrong one is refused in words; the right one opens the page, by keyboard alone."""
    async with cairn(tmp_path, workers=1, admin={"token": "right"}) as (running, _):
        looked = await look(browser, f"{running.admin}/")
        async with asyncio.timeout(20):
            await looked.until("() => document.activeElement.id === 'token'")
            await looked.page.keyboard.type("wrong")
            await looked.page.keyboard.press("Enter")
            await looked.until("() => document.querySelector('#login-error').textContent !== ''")
            await looked.page.keyboard.type("right")
            await looked.page.keyboard.press("Enter")
            await looked.until(LIVE)
        assert await looked.value("() => sessionStorage.length") == 1
        assert await looked.value("() => document.querySelector('#login').hidden")
        assert not [each for each in looked.complaints if "401" not in each]


async def test_it_says_so_when_the_figures_grow_old(browser: Browser, tmp_path: Path) -> None:
    """When Cairn is gone the page keeps its last figures and says that they may be old."""
    async with cairn(tmp_path, workers=1) as (running, _):
        looked = await opened(browser, running.admin)
    async with asyncio.timeout(20):
        await looked.until("() => document.querySelector('#connection').textContent.startsWith('No news')")


async def test_screen_readers_find_their_way(browser: Browser, tmp_path: Path) -> None:
    """Landmarks, one first heading, names on tables, plots and sections, and no row that is only colour."""
    async with cairn(tmp_path, workers=1) as (running, _):
        looked = await opened(browser, running.admin)
        counted = await looked.value(
            "() => ['header', 'main', 'footer', 'h1', 'table:not(:has(caption))', 'section:not([aria-labelledby])',"
            " '.plot:not([aria-label])', '[aria-live=assertive]'].map(s => document.querySelectorAll(s).length)"
        )
        assert counted == [1, 1, 1, 1, 0, 0, 0, 0]
        await looked.page.keyboard.press("Tab")
        assert await looked.value("() => document.activeElement.className") == "skip"

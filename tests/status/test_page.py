"""The status page in a real browser, before real workers and upstreams that count what they cached."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Browser

from proxy.clock import Clock, SystemClock, utc_date
from tests.support.browser import Looked, chromium, look
from tests.support.openai_upstream import OpenAIUpstream
from tests.support.serving import serving

pytestmark = pytest.mark.asyncio(loop_scope="module")
SOON_SECONDS = 2.0  # a request that ended must show by then
LIMIT_SECONDS = 60.0  # bounds the time of a failure
DOCUMENT = "The stones were set by those who came before, and each one rests on the last. " * 150
PRICE = {"model": "test-*", "input": 1.0, "output": 2.0, "cached_read": 0.5}
LIVE = "() => document.querySelector('#connection').textContent === 'Live'"
DRAWN = "() => document.querySelectorAll('.plot .main-svg').length >= 2"


class Fleet(NamedTuple):
    """Cairn with its upstreams and a client. `clock` is Cairn's, and `day` the day (UTC) on which it started."""

    url: str
    admin: str
    upstreams: list[OpenAIUpstream]
    http: aiohttp.ClientSession
    clock: Clock
    day: str

    @property
    def is_of_one_day(self) -> bool:
        """True until the day changes: from then on the figures of today are not all."""
        return utc_date(self.clock.unix()) == self.day

    @property
    def answered(self) -> int:
        """How many prompts the upstreams have answered."""
        return sum(len(each.prompt_tokens) for each in self.upstreams)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Chromium, or skipped tests."""
    async with chromium() as running:
        yield running


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _close_pages(browser: Browser) -> AsyncIterator[None]:
    """A page that nobody looks at any more would go on drawing."""
    yield
    for context in browser.contexts:
        await context.close()


@asynccontextmanager
async def cairn(
    folder: Path, workers: int, model: str = "test-model", replica: str = "replica", **sections: Any
) -> AsyncIterator[Fleet]:
    """Cairn before two upstreams that serve `model`."""
    clock = SystemClock()  # of this machine, as Cairn's processes
    day = utc_date(clock.unix())
    one, other = OpenAIUpstream(models=(model,)), OpenAIUpstream(models=(model,))
    async with one, other, aiohttp.ClientSession() as http:
        upstreams = [one, other]
        replicas = [{"url": each.url, "name": f"{replica}-{at}"} for at, each in enumerate(upstreams, start=1)]
        pools = [{"name": "engines", "replicas": replicas, "models": [model]}]
        async with serving(folder, {"server": {"workers": workers}, "pools": pools, **sections}) as running:
            yield Fleet(running.url, running.admin, upstreams, http, clock, day)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """One Cairn with two workers for all tests that do not end it."""
    async with cairn(tmp_path_factory.mktemp("cairn"), 2, prices=[PRICE]) as running:
        yield running


async def ask(fleet: Fleet, question: str, model: str = "test-model") -> None:
    """A streamed chat about the document."""
    messages = [{"role": "system", "content": DOCUMENT}, {"role": "user", "content": question}]
    body = {"model": model, "stream": True, "messages": messages}
    async with fleet.http.post(f"{fleet.url}/chat/completions", json=body) as answer:
        assert answer.status == 200
        await answer.read()


async def scraped(fleet: Fleet) -> str:
    """The page of metrics."""
    async with fleet.http.get(f"{fleet.admin}/metrics") as answer:
        return await answer.text()


def total(page: str, name: str, *labels: str) -> float:
    """The sum of a counter's series that have all of `labels`."""
    lines = [line for line in page.splitlines() if re.match(rf"{name}(\{{|\s)", line)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in labels))


async def opened(browser: Browser, admin: str, **kwargs: Any) -> Looked:
    """The page once it is live and its plots are there."""
    looked = await look(browser, f"{admin}/", **kwargs)
    async with asyncio.timeout(LIMIT_SECONDS):
        await looked.until(LIVE)
        await looked.until(DRAWN)
    return looked


def shown(requests: int) -> str:
    """A script that is true once this many requests are shown."""
    return f"() => Number(document.querySelector('#figures').dataset.requests) === {requests}"


async def figures(looked: Looked, period: str) -> Any:
    """The figures of a period, exact."""
    return await looked.value(
        f"() => Object.fromEntries([...document.querySelectorAll(\"[data-period='{period}'] data\")]"
        ".map(each => [each.dataset.figure, Number(each.value)]))"
    )


async def column(looked: Looked, table: str, place: int) -> Any:
    """The texts of a table's column."""
    return await looked.value(
        f"() => [...document.querySelectorAll('#{table} tbody tr')].map(r => r.cells[{place}].textContent)"
    )


async def test_the_figures_are_those_of_metrics_and_of_the_upstreams(browser: Browser, fleet: Fleet) -> None:
    """Two workers; nothing is asked of anyone else, and the browser has nothing to complain about."""
    looked = await opened(browser, fleet.admin)
    for number in range(6):
        await ask(fleet, f"Question {number}?")
    async with asyncio.timeout(LIMIT_SECONDS):
        await looked.until(shown(fleet.answered))
    page, found = await scraped(fleet), await figures(looked, "since start")
    cached = sum(sum(each.cached_tokens) for each in fleet.upstreams)
    assert cached > 0
    assert found["cached_tokens"] == total(page, "cairn_tokens_total", 'type="input_cached"') == cached
    assert found["prompt_tokens"] == sum(sum(each.prompt_tokens) for each in fleet.upstreams)
    assert found["prefill_seconds"] == pytest.approx(total(page, "cairn_prefill_seconds_saved_total"))
    assert found["usd"] == pytest.approx(total(page, "cairn_savings_usd_total"))
    assert found["usd"] == pytest.approx(cached * 0.5 / 1e6)
    assert await column(looked, "replicas", 0) == ["replica-1", "replica-2"]
    assert await column(looked, "replicas", 1) == ["up", "up"]
    assert (await column(looked, "prefixes", 1))[0] == "test-model"
    assert any(reason.startswith("cold") for reason in await column(looked, "misses", 1))
    assert looked.complaints == []
    assert all(url.startswith((fleet.admin, "data:")) for url in looked.asked)
    await looked.keep("status-page.png")


async def test_today_and_the_week_come_from_the_totals(browser: Browser, fleet: Fleet) -> None:
    """Totals are written within a second and read again within a few. After midnight, today's are not all."""
    await ask(fleet, "What is a cairn?")
    looked = await opened(browser, fleet.admin)
    async with asyncio.timeout(LIMIT_SECONDS):
        await looked.until(shown(fleet.answered))
        since = await figures(looked, "since start")
        for period in ("today", "7 days"):
            while await figures(looked, period) != pytest.approx(since):
                if period == "today" and not fleet.is_of_one_day:
                    break
                await looked.value("() => new Promise(requestAnimationFrame)")


async def test_a_request_shows_within_two_seconds(browser: Browser, fleet: Fleet) -> None:
    """From its end until the page has it; the shortest of three times, since the machine does other work too."""
    looked = await opened(browser, fleet.admin)
    now, taken = asyncio.get_running_loop().time, list[float]()
    for _ in range(3):
        await ask(fleet, "What is a cairn?")
        ended = now()
        async with asyncio.timeout(LIMIT_SECONDS):
            await looked.until(shown(fleet.answered))
        taken.append(now() - ended)
    assert min(taken) < SOON_SECONDS


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_it_fits_a_small_screen(browser: Browser, fleet: Fleet, dark: bool) -> None:
    """At 360 px nothing sticks out sideways; the colours follow what the reader prefers."""
    await ask(fleet, "What is a cairn?")
    looked = await opened(browser, fleet.admin, width=360, dark=dark)
    async with asyncio.timeout(LIMIT_SECONDS):
        await looked.until(shown(fleet.answered))
    assert await looked.value("() => document.documentElement.scrollWidth") <= 360
    paper = await looked.value("() => getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) is dark
    await looked.keep(f"status-page-360-{'dark' if dark else 'light'}.png")


async def test_screen_readers_find_their_way(browser: Browser, fleet: Fleet) -> None:
    """Landmarks, one first heading, names on tables, plots and sections; the keyboard reaches the figures first."""
    looked = await opened(browser, fleet.admin)
    counted = await looked.value(
        "() => ['header', 'main', 'footer', 'h1', 'table:not(:has(caption))', 'section:not([aria-labelledby])',"
        " '.plot:not([aria-label])', '[aria-live=assertive]'].map(s => document.querySelectorAll(s).length)"
    )
    assert counted == [1, 1, 1, 1, 0, 0, 0, 0]
    await looked.page.keyboard.press("Tab")
    assert await looked.value("() => document.activeElement.className") == "skip"


async def test_a_token_is_asked_for_and_the_page_says_when_figures_grow_old(browser: Browser, tmp_path: Path) -> None:
    """A wrong one is refused in words, the right one opens the page, by keyboard alone; a lost Cairn is no blank."""
    async with cairn(tmp_path, 1, admin={"token": "right"}) as running:
        looked = await look(browser, f"{running.admin}/")
        async with asyncio.timeout(LIMIT_SECONDS):
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
    async with asyncio.timeout(LIMIT_SECONDS):
        await looked.until("() => document.querySelector('#connection').textContent.startsWith('Disconnected')")
    assert await looked.value("() => document.querySelector('#status').textContent") == "Disconnected"
    assert await looked.value("() => document.querySelector('#workers').textContent") == "1"


async def test_a_page_without_a_request_shows_where_to_send_one(browser: Browser, tmp_path: Path) -> None:
    """The base URL and a command that works as it is; it goes away with the first request."""
    async with cairn(tmp_path, 1) as running:
        looked = await opened(browser, running.admin)
        assert await looked.value("() => document.querySelector('#base-url').textContent") == running.url
        command = await looked.value("() => document.querySelector('#curl').textContent")
        assert command.startswith(f"curl {running.url}/chat/completions ")
        assert '"model":"test-model"' in command
        await ask(running, "What is a cairn?")
        async with asyncio.timeout(LIMIT_SECONDS):
            await looked.until("() => document.querySelector('#start').hidden")


async def test_dead_engines_are_seen_at_a_glance(browser: Browser, tmp_path: Path) -> None:
    """The status, what fails, for whom, since when and why, on the first screen at 1280 by 900."""
    async with cairn(tmp_path, 1) as running:
        looked = await opened(browser, running.admin)
        await ask(running, "What is a cairn?")
        for upstream in running.upstreams:
            await upstream.stop()
        body = {"model": "test-model", "messages": [{"role": "user", "content": "?"}]}
        for _ in range(4):
            async with running.http.post(f"{running.url}/chat/completions", json=body) as answer:
                assert answer.status >= 500
        async with asyncio.timeout(LIMIT_SECONDS):
            await looked.until("() => document.querySelector('#status').textContent === 'Not ready'")
            await looked.until("() => document.querySelectorAll('#down tbody tr').length === 2")
            await looked.until("() => document.querySelectorAll('#error-plot .main-svg').length > 0")
            await looked.until("() => Number(document.querySelector('#reasons tbody td.number')?.textContent) > 0")
            await looked.until("() => document.querySelector('#replicas-up').textContent === '0 of 2'")
        assert await column(looked, "down", 0) == ["replica-1", "replica-2"]
        assert all(await column(looked, "down", 1)), "a reason is shown"
        assert (await column(looked, "errors", 0))[0] == "anonymous"
        assert "Now: " in await looked.value(
            "() => getComputedStyle(document.querySelector('#notices li.reason'), '::before').content"
        )
        for seen in ("#status", "#notices", "#error-plot", "#down", "#errors", "#saved"):
            bottom = await looked.value(f"() => document.querySelector('{seen}').getBoundingClientRect().bottom")
            assert bottom <= 900, seen
        assert looked.complaints == []
        await looked.keep("status-page-failures.png")


LONG_MODEL = "meta-llama/Llama-3.3-70B-Instruct-FP8-dynamic"
LONG_REPLICA = "gpu-07.inference.example.com-8000"
# the most lines that a text takes which contains one of the names, by table
LINES_OF_NAMES = """names => {
  const lines = cell => {
    const range = document.createRange();
    range.selectNodeContents(cell);
    return new Set([...range.getClientRects()].filter(r => r.width).map(r => Math.round(r.top))).size;
  };
  const hasName = cell => names.some(name => cell.textContent.includes(name));
  return Object.fromEntries([...document.querySelectorAll('table')].map(table => {
    const cells = [...table.querySelectorAll('tbody td')].filter(hasName);
    return [table.id, Math.max(0, ...cells.map(lines))];
  }));
}"""


async def test_long_names_are_not_broken_into_pieces(browser: Browser, tmp_path: Path) -> None:
    """Those of models and replicas, in every table that has them, break once at most; nothing sticks out sideways.
    On small and on large screens."""
    async with cairn(tmp_path, 1, LONG_MODEL, LONG_REPLICA) as running:
        for number in range(3):
            await ask(running, f"Question {number}?", LONG_MODEL)
        await running.upstreams[0].stop()
        await running.upstreams[1].stop()
        body = {"model": LONG_MODEL, "messages": [{"role": "user", "content": "?"}]}
        async with running.http.post(f"{running.url}/chat/completions", json=body) as answer:
            assert answer.status >= 500
        for width in (360, 1280):
            looked = await opened(browser, running.admin, width=width)
            async with asyncio.timeout(LIMIT_SECONDS):
                await looked.until("() => document.querySelectorAll('#down tbody tr').length === 2")
            await looked.keep(f"status-page-names-{width}.png")
            lines = await looked.page.evaluate(LINES_OF_NAMES, [LONG_MODEL, LONG_REPLICA])
            assert all(lines[table] >= 1 for table in ("down", "errors", "replicas", "prefixes"))
            assert {table: count for table, count in lines.items() if count > 2} == {}
            assert await looked.value("() => document.documentElement.scrollWidth") <= width

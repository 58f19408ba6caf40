"""Debian's Chromium through Playwright, which brings none of its own; where it is missing the test says so."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright

ARTEFACTS = Path(__file__).resolve().parents[2] / "artefacts"
# it may run as root in a container, has no screen, and must ask nobody but the page's own server
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """A running browser; skips the test where none is installed."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=list(_ARGUMENTS))
        try:
            yield browser
        finally:
            await browser.close()


class Looked:
    """A page with all that it complained about and asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    async def value(self, script: str) -> Any:
        """Return the value of `script` in the page."""
        return await self.page.evaluate(script)

    async def until(self, script: str) -> Any:
        """Ask the page at each of its frames until `script` gives something true; its policy forbids eval of texts,
        so that Playwright's own waiting for a function does not work there."""
        while not (found := await self.page.evaluate(script)):
            await self.page.evaluate("() => new Promise(requestAnimationFrame)")
        return found

    async def keep(self, name: str, **kwargs: Any) -> Path:
        """A picture of the whole page under artefacts/."""
        ARTEFACTS.mkdir(exist_ok=True)
        path = ARTEFACTS / name
        await self.page.screenshot(path=path, full_page=True, **kwargs)
        return path


async def look(browser: Browser, url: str, *, width: int = 1280, dark: bool = False) -> Looked:
    """Open `url` in a fresh window."""
    context = await browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    looked = Looked(await context.new_page())
    await looked.page.goto(url)
    return looked

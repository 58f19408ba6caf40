"""A client per test, closed behind it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import pytest

from proxy.clock import SystemClock
from proxy.upstream import Limits, Origin, UpstreamClient
from tests.support.upstream import ScriptedUpstream

MakeClient: TypeAlias = Callable[..., UpstreamClient]


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
    """Make clients with given limits (and clock, and TLS context); all are closed at the end."""
    made: list[UpstreamClient] = []

    def make(clock: Any = None, tls: ssl.SSLContext | None = None, **limits: Any) -> UpstreamClient:
        arguments = {"ssl_context": lambda _: tls} if tls is not None else {}
        made.append(UpstreamClient(Limits(**limits), clock or SystemClock(), **arguments))
        return made[-1]

    yield make
    async with asyncio.timeout(5):
        for client in made:
            await client.close()


def origin_of(upstream: ScriptedUpstream) -> Origin:
    return Origin.parse(upstream.url)


async def turns(count: int = 20) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; for what other tasks and the kernel do soon. Fails after five seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)

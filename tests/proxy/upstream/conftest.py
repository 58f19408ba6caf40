"""A client per test, closed behind it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

import pytest

from proxy.clock import SystemClock
from proxy.upstream import Limits, Origin, PoolCounts, UpstreamClient
from tests.support.loops import both_loops
from tests.support.upstream import ScriptedUpstream

T = TypeVar("T")
MakeClient: TypeAlias = Callable[..., UpstreamClient]


@pytest.fixture
async def make_client() -> AsyncIterator[MakeClient]:
    """Make clients with given limits (and clock, and TLS context); all are closed at the end."""
    made: list[UpstreamClient] = []

    def make(clock: Any = None, tls: ssl.SSLContext | None = None, **limits: Any) -> UpstreamClient:
        async def tls_context() -> ssl.SSLContext:
            assert tls is not None
            return tls

        made.append(
            UpstreamClient(Limits(**limits), clock or SystemClock(), tls_context if tls is not None else None)
        )
        return made[-1]

    yield make
    async with asyncio.timeout(20):
        for client in made:
            await client.close()


def counts(client: UpstreamClient, upstream: ScriptedUpstream) -> PoolCounts:
    return client.counts()[origin_of(upstream)]


async def fetch(client: UpstreamClient, upstream: ScriptedUpstream, body: Any = b"{}", **more: Any) -> bytes:
    """The body of the answer to one POST."""
    answered = await client.request(origin_of(upstream), b"POST", b"/v1/x", [(b"a", b"b")], body, **more)
    return await answered.read(1 << 30)


def origin_of(upstream: ScriptedUpstream) -> Origin:
    return Origin.parse(upstream.url)


async def turns(count: int = 20) -> None:
    """Let everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; for what other tasks and the kernel do soon. Fails after five seconds."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what it waits for is in other sockets and has no event
            await asyncio.sleep(0)


def spawn(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Run beside the test, which awaits it."""
    return asyncio.get_running_loop().create_task(coroutine)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], Any]]:
    """Every test here runs on the standard loop and on uvloop."""
    return both_loops()

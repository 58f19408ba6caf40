"""Fixtures of the scenario tests: a client session, a Valkey, and no blocking call in the loop during a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from tests.support import valkey
from tests.support.valkey import Valkey


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[BlockBuster]:
    """Any blocking call made by Cairn's own code inside the event loop fails the test."""
    with blockbuster_ctx(scanned_modules=["proxy", "cache"]) as guard:
        yield guard


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A session that keeps what it gets as it is."""
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


@pytest.fixture(scope="module")
def redis() -> Iterator[Valkey]:
    """One server for the module."""
    with valkey.running() as server:
        yield server

"""Fixtures of the cache's tests: one server, emptied for each test, a store on it, and a Cluster of three."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from cache.store.store import Store, open_store
from proxy.clock import SystemClock
from proxy.tasks import Tasks
from tests.support.valkey import PATIENT_SECONDS, Valkey, cluster_of_three, running


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with running() as valkey:
        yield valkey


@pytest.fixture
def valkey(server: Valkey) -> Valkey:
    """The server, emptied."""
    server.flush()
    return server


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    """A starter of background tasks, whose tasks end with the test."""
    tasks = Tasks()
    yield tasks
    await tasks.close()


@pytest.fixture
async def store(valkey: Valkey, tasks: Tasks) -> AsyncIterator[Store]:
    """A store on the emptied server, whose operations have more time than Cairn gives them."""
    store = open_store(valkey.url, clock=SystemClock(), tasks=tasks, limit_seconds=PATIENT_SECONDS)
    await store.start()
    await store.wait_available()
    yield store
    await store.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Valkey]]:
    with cluster_of_three() as nodes:
        yield list(nodes)


@pytest.fixture(params=["one server", "a Cluster of three"])
def nodes(request: pytest.FixtureRequest) -> list[Valkey]:
    """Emptied."""
    found: list[Valkey] = (
        [request.getfixturevalue("server")] if request.param == "one server" else request.getfixturevalue("cluster")
    )
    for node in found:
        node.flush()
    return found

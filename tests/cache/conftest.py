"""What tests of stored contexts share: one server, a Cluster of three, and either in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import valkey
from tests.support.valkey import Valkey


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with valkey.running() as running:
        yield running


@pytest.fixture(scope="module")
def cluster() -> Iterator[list[Valkey]]:
    with valkey.cluster_of_three() as nodes:
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

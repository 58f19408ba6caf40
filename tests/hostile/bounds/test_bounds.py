"""The memory and descriptors that Cairn holds are bounded, in a short run; `make bounds` is the long one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.hostile.bounds.loads import LOADS, SHORT, Load, Measured
from tests.hostile.fuzz.world import MIB, Held, World, running_world


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    """One Cairn for all loads: what one of them leaves behind, the others start with."""
    async with running_world(1) as running:
        yield running


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)
async def test_what_clients_send_takes_bounded_memory_and_descriptors(world: World, load: Load) -> None:
    """And clients that send nothing unusual are served meanwhile."""
    measured = await load(world, SHORT)
    assert measured.problems == []
    assert measured.refused == 0


def test_growth_beyond_the_bound_is_a_problem() -> None:
    """Of memory at any time, of descriptors afterwards."""
    before = Held(100 * MIB, {"client": 0})
    grown = Held(111 * MIB, {"client": 5})
    for during, after, problems in ((grown, before, 1), (before, grown, 2), (before, before, 0)):
        measured = Measured("x", before, during, after, most_growth_bytes=10 * MIB)
        assert len(measured.problems) == problems

"""A reload of a worker: it is afterwards as one that started with the new configuration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final, cast

import msgspec
import pytest

from proxy.config.reload import taken_over
from proxy.config.schema import Config
from proxy.worker.composition import build
from proxy.worker.sections import Parts
from tests.support import settings
from tests.support.object_graph import differences, values

_LEFT_OUT: Final = {
    # different in every worker
    *("clock", "_clock", "_access", "writer_id", "_writer_id", "_writer", "_head", "head", "_number"),
    *("_secret", "_origin", "_next_id", "_builtin"),
    "_configured_weights",  # by tenants' ids, which depend on the secret; a test of its own is below
    "_settings",  # the section `server` of the client port, which reads only what needs a restart
    "_listed",  # names of models that were configured once stay allowed as labels
    *("_rates", "_pools"),  # empty ones of pools that are gone
}

_NEW_REPLICAS: Final = ("pools.0.replicas.0.name", "pools.0.replicas.0.ranks", "pools.0.replicas.0.selector")
"""Settings whose change makes other replicas, which have other numbers."""


async def worker(config: Config) -> Parts:
    """A worker that was built and not started."""
    return await build(config, cast("Any", None), access_log_descriptor=2)


async def reload(parts: Parts, config: Config) -> None:
    """Apply a configuration; the replicas are not asked anything."""
    await parts.live.reconfigure(config)
    await parts.built.basics.loops.close()


def graph(parts: Parts) -> dict[str, object]:
    """What a worker consists of, once what is gone has been forgotten."""
    discovery, index = parts.built.replicas.discovery, parts.built.memory.index
    for number in parts.built.replicas.pools.served:
        index.set_budget(number, index.budget_tokens(number))  # makes an entry of each, as the first prompt does
    for number in discovery._gone:  # noqa: SLF001 - in place of a minute
        discovery._gone[number] = -math.inf  # noqa: SLF001
    discovery.forget()
    return values(parts, _LEFT_OUT)


def served(parts: Parts) -> dict[str, object]:
    """The replicas that a worker serves, by name, without their numbers."""
    fleet, pools, queues = parts.built.replicas.fleet, parts.built.replicas.pools, parts.requests.queues.by_replica
    return {name: (pools.backends[number], queues[number]._limit) for name, number in fleet.members().items()}  # noqa: SLF001


async def test_a_new_weight_of_a_client_counts_for_its_requests_that_wait(tmp_path: Path) -> None:
    """They are kept with the weight that they came with."""
    old = settings.base(tmp_path)
    parts = await worker(old)
    client = msgspec.structs.replace(old.clients[0], weight=old.clients[0].weight * 4)
    shares, before = parts.built.sharing.shares, old.clients[0].weight
    tenant = next(iter(parts.requests.http_server.authenticator.weights()))
    shares.seen(tenant, before, 0.0)
    await reload(parts, msgspec.structs.replace(old, clients=(client, *old.clients[1:])))
    assert shares.weight_of(tenant) == 4 * before


@pytest.mark.parametrize("path", settings.paths())
async def test_a_worker_that_is_reloaded_is_as_one_that_starts(path: str, tmp_path: Path) -> None:
    """With another value of any setting, and with the old one again."""
    old = settings.base(tmp_path)
    new, _ = taken_over(old, settings.changed(path, tmp_path), own_store=False)
    if new == old:
        return  # it needs a restart
    seen = served if path in _NEW_REPLICAS else graph
    reloaded = await worker(old)
    for config in (new, old):
        await reload(reloaded, config)
        assert differences(seen(reloaded), seen(await worker(config))) == []

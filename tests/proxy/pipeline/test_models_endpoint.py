"""The list of models: merged over pools, narrowed to what a client may use, and an error only if nobody answers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proxy.errors import BadResponse, ConnectFailed
from proxy.fleet import Fleet
from proxy.fleet.served_models import Listing, ServedModels
from proxy.model import Ending
from proxy.pipeline.exchange import Exchange
from proxy.pipeline.models_endpoint import ModelsEndpoint
from proxy.records import Tenant
from proxy.upstream import Origin, UpstreamClient
from tests.proxy.pipeline.test_cors import Kept
from tests.proxy.pipeline.test_disclosure import view
from tests.proxy.pipeline.test_reader import LIMITED, MINE, OWN_KEYS, SHARED, exchange, pools
from tests.support.clock import FakeClock

LISTS = {"a": ["cheap", "dear", "hidden"], "b": ["cheap"], "c": ["free-1", "cheap"]}


class Answer:
    """A response whose body is known."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self._body = body

    async def read(self, _most: int) -> bytes:
        return self._body

    def abort(self) -> None:
        """Nothing to release."""


HANGS = Answer(0, b"")
"""In place of an answer: none ever comes."""


class Upstreams:
    """The replicas as a client reaches them; `failures` are by host."""

    def __init__(self, **failures: Exception | Answer) -> None:
        self.asked: list[str] = []
        self.failures = failures

    async def request(self, origin: Origin, *_: Any, **__: Any) -> Answer:
        self.asked.append(origin.host)
        failure = self.failures.get(origin.host)
        if isinstance(failure, Exception):
            raise failure
        if failure is HANGS:
            await asyncio.Event().wait()
        data = [{"id": name, "object": "model"} for name in LISTS[origin.host]]
        return failure or Answer(200, json.dumps({"object": "list", "data": data}).encode())


class Replicas:
    """The fleet: a and b in the shared pool, b less busy; c alone."""

    def __init__(self, *down: str) -> None:
        self._down = down
        self.models = ServedModels()

    def snapshot(self, pool: str, _now: float, *_: Any) -> tuple[Any, ...]:
        if pool == "own":
            return (replace(view(2), name="c"),) if "c" not in self._down else ()
        busy = replace(view(0), name="a", in_flight=5, available="a" not in self._down)
        return (busy, replace(view(1), name="b", available="b" not in self._down))


async def answered(upstreams: Upstreams, fleet: Replicas, tenant: Tenant = MINE) -> tuple[Any, Exchange]:
    """The list that a client gets."""
    endpoint = ModelsEndpoint(
        cast("UpstreamClient", upstreams), pools(), cast("Fleet", fleet), FakeClock(), list_seconds=0.01
    )
    asked, kept = exchange("GET", "/v1/models", tenant=tenant), Kept()
    await endpoint.answer(asked, kept)
    _, status, _, _, body = kept.calls[0]
    assert status == 200
    assert isinstance(body, bytes)
    return json.loads(body), asked


async def listed(upstreams: Upstreams, fleet: Replicas, tenant: Tenant = MINE) -> tuple[list[str], Exchange]:
    """The names in the list that a client gets."""
    answer, asked = await answered(upstreams, fleet, tenant)
    return [model["id"] for model in answer["data"]], asked


async def test_the_lists_of_all_pools_are_merged() -> None:
    """The least busy replica of each is asked; a model belongs to the first pool that serves it."""
    upstreams = Upstreams()
    names, asked = await listed(upstreams, Replicas())
    assert names == ["cheap", "free-1"]
    assert sorted(upstreams.asked) == ["b", "c"]
    assert (asked.status, asked.ending) == (200, Ending.COMPLETE)


async def test_the_merged_list_has_the_form_of_an_upstream_list() -> None:
    """Client libraries look at the kind of an object; the models in it are as their upstreams describe them."""
    answer, _ = await answered(Upstreams(), Replicas())
    models = [{"id": "cheap", "object": "model"}, {"id": "free-1", "object": "model"}]
    assert answer == {"object": "list", "data": models}


async def test_a_model_that_the_pool_or_the_client_may_not_use_is_left_out() -> None:
    """By the pool's patterns, and by the client's."""
    assert (await listed(Upstreams(), Replicas("b")))[0] == ["cheap", "dear", "free-1"]
    assert (await listed(Upstreams(), Replicas("b"), LIMITED))[0] == ["cheap"]


FAILURES = [ConnectFailed("no"), Answer(500, b"{}"), Answer(200, b"<html>"), HANGS]


@pytest.mark.parametrize("failure", FAILURES)
async def test_a_pool_that_does_not_answer_is_left_out(failure) -> None:
    """As long as another one does."""
    assert (await listed(Upstreams(a=failure, b=failure), Replicas()))[0] == ["free-1"]


@pytest.mark.parametrize("failure", FAILURES)
async def test_if_a_replica_does_not_answer_another_one_is_asked(failure) -> None:
    """The busier one."""
    upstreams = Upstreams(b=failure)
    assert (await listed(upstreams, Replicas()))[0] == ["cheap", "dear", "free-1"]
    assert sorted(upstreams.asked) == ["a", "b", "c"]


async def test_if_no_pool_answers_the_first_failure_is_told() -> None:
    """An empty list would say that there are no models."""
    with pytest.raises(ConnectFailed):
        await listed(Upstreams(a=BadResponse("no"), b=ConnectFailed("no"), c=BadResponse("no")), Replicas())


async def test_a_pool_without_replicas_has_no_models_and_all_down_are_tried() -> None:
    """A followed name may have no address yet; a replica that is thought to be down may be up again."""
    assert (await listed(Upstreams(), Replicas("a", "b", "c")))[0] == ["cheap"]


async def test_a_defect_is_not_hidden_among_the_failures() -> None:
    """It ends the request like any other defect."""
    with pytest.raises(ZeroDivisionError):
        await listed(Upstreams(b=ZeroDivisionError()), Replicas())


def test_the_only_replicas_list_passes_unchanged_for_a_client_without_limits() -> None:
    """With several pools, or for a limited client, it is made here."""
    for served, tenant, merges in (
        ((SHARED,), MINE, False),
        ((SHARED,), LIMITED, True),
        ((SHARED, OWN_KEYS), MINE, True),
    ):
        client, fleet = cast("UpstreamClient", Upstreams()), cast("Fleet", Replicas())
        assert ModelsEndpoint(client, pools(*served), fleet, FakeClock()).merges_for(tenant) is merges


# -- replicas of one pool with different lists


def differing(*down: str, **lists: tuple[str, ...]) -> Replicas:
    """Replicas of the shared pool that are known to list these models."""
    replicas = Replicas(*down)
    for name, names in lists.items():
        entry = {"aliases": None, "owned_by": "vllm", "parent": None, "max_model_len": None}
        replicas.models.listed("shared", "ab".index(name), Listing([SimpleNamespace(id=id, **entry) for id in names]))
    return replicas


def test_the_list_of_one_pool_is_made_here_if_its_replicas_list_different_models() -> None:
    """The response of any of them would hide what others have."""
    for fleet, merges in (
        (differing(a=("cheap",), b=("cheap", "dear")), True),
        (differing(a=("cheap",), b=("cheap",)), False),
    ):
        endpoint = ModelsEndpoint(
            cast("UpstreamClient", Upstreams()), pools(SHARED), cast("Fleet", fleet), FakeClock()
        )
        assert endpoint.merges_for(MINE) is merges


async def test_as_many_replicas_are_asked_as_list_all_models_of_a_pool() -> None:
    """None whose list is part of another's, and one of those that list the same."""
    for lists, asked, names in (
        ({"a": ("cheap", "dear"), "b": ("cheap", "other")}, ["a", "b", "c"], {"cheap", "dear", "free-1"}),
        ({"a": ("cheap",), "b": ("cheap", "dear")}, ["b", "c"], {"cheap", "free-1"}),
        ({"a": ("cheap",), "b": ("cheap",)}, ["b", "c"], {"cheap", "free-1"}),
    ):
        upstreams = Upstreams()
        found, _ = await listed(upstreams, differing(**lists))
        assert (sorted(upstreams.asked), set(found), len(found)) == (asked, names, len(names))


async def test_what_any_of_several_replicas_lists_is_shown() -> None:
    """Also what has changed since their lists were last read."""
    answers = {
        host: Answer(200, json.dumps({"data": [{"id": name}]}).encode())
        for host, name in (("a", "cheap"), ("b", "dear"))
    }
    fleet = differing(a=("cheap", "dear"), b=("cheap", "other"))
    assert set((await listed(Upstreams(**answers), fleet))[0]) == {"cheap", "dear", "free-1"}


async def test_if_the_one_that_lists_all_does_not_answer_another_one_is_asked() -> None:
    """Its list is better than none."""
    fleet = differing(a=("cheap", "dear"), b=("cheap",))
    upstreams = Upstreams(b=ConnectFailed("no"))
    assert (await listed(upstreams, fleet))[0] == ["cheap", "dear", "free-1"]
    upstreams = Upstreams(a=ConnectFailed("no"))
    assert (await listed(upstreams, fleet))[0] == ["cheap", "free-1"]


@pytest.mark.parametrize("failure", FAILURES)
async def test_of_different_lists_one_that_does_not_come_hides_only_its_own_models(failure) -> None:
    """The others' are shown as soon as its time is over."""
    fleet = differing(a=("cheap", "dear"), b=("cheap", "other"))
    assert (await listed(Upstreams(b=failure), fleet))[0] == ["cheap", "dear", "free-1"]
    assert (await listed(Upstreams(a=failure), fleet))[0] == ["cheap", "free-1"]
    assert (await listed(Upstreams(a=failure, b=failure), fleet))[0] == ["free-1"]


async def test_of_different_lists_neither_a_defect_nor_the_failure_of_all_is_hidden() -> None:
    """The first failure is told, of the least busy replica."""
    fleet = differing(a=("cheap", "dear"), b=("cheap", "other"))
    with pytest.raises(ZeroDivisionError):
        await listed(Upstreams(b=ZeroDivisionError()), fleet)
    with pytest.raises(ConnectFailed):
        await listed(Upstreams(a=BadResponse("no"), b=ConnectFailed("no"), c=BadResponse("no")), fleet)

"""The effect of an engine's facts on budgets and limits."""

from __future__ import annotations

from typing import Any, cast

import pytest

from proxy.fleet import Fleet, ReplicaSpec
from proxy.fleet.engine_facts import EngineFacts
from proxy.fleet.findings import EngineFindings, Found
from proxy.fleet.pools import ReplicaEndpoint
from proxy.upstream import Origin

URL = "http://10.0.0.1:80"
OTHER_URL = "http://10.0.0.2:80"


class Told:
    """Journal, queues and model names in one; keeps what it is told."""

    def __init__(self, *, knows_budget: bool = False) -> None:
        self._knows_budget = knows_budget
        self.capacities: list[tuple[int, int, int | None]] = []
        self.budgets: list[int] = []

    def set_capacity(self, number: int, tokens: int, slots: int | None) -> None:
        self.capacities.append((number, tokens, slots))

    def set_budget(self, number: int, tokens: int) -> None:
        self.budgets.append(tokens)

    def knows_budget(self, number: int) -> bool:
        return self._knows_budget or bool(self.budgets)

    def update(self) -> None:
        pass


def findings(told: Told, fleet: Fleet | None = None) -> EngineFindings:
    fleet = fleet or Fleet(lambda: 0.5)
    fleet.add(ReplicaSpec("r0", "p"))
    other = cast("Any", told)
    return EngineFindings(fleet, other, other, other, other, other)


@pytest.mark.parametrize(("knows_budget", "budgets"), [(False, [500, 600]), (True, [600])])
def test_a_stated_capacity_is_told_with_its_slots_and_is_a_budget_only_when_it_is_new(
    knows_budget: bool, budgets: list[int]
) -> None:
    """A worker that starts among others takes over the budget that they have learned."""
    told = Told(knows_budget=knows_budget)
    found = findings(told)
    endpoint = ReplicaEndpoint("r0", "p", URL, Origin.parse(URL))
    for tokens in (500, 500, 600):
        found.apply(0, endpoint, Found(None, EngineFacts(capacity_tokens=tokens, slots=4)), 0.0)
    assert told.capacities == [(0, 500, 4), (0, 600, 4)]
    assert told.budgets == budgets


def test_a_stated_capacity_is_set_again_when_a_configured_one_is_taken_back() -> None:
    """That one had replaced it in the index, which knows no budget then."""
    told = Told()
    found = findings(told)
    endpoint = ReplicaEndpoint("r0", "p", URL, Origin.parse(URL))
    facts = Found(None, EngineFacts(capacity_tokens=500))
    found.apply(0, endpoint, facts, 0.0)
    told.budgets.clear()
    found.apply(0, endpoint, facts, 0.0)
    assert told.budgets == [500]
    assert len(told.capacities) == 2


def test_an_engine_that_comes_back_with_the_same_room_in_other_slots_has_those() -> None:
    """llama.cpp divides its context among the slots."""
    told = Told()
    found = findings(told)
    endpoint = ReplicaEndpoint("r0", "p", URL, Origin.parse(URL))
    for slots in (4, 4, 8):
        found.apply(0, endpoint, Found(None, EngineFacts(capacity_tokens=500, slots=slots)), 0.0)
    assert told.capacities == [(0, 500, 4), (0, 500, 8)]


@pytest.mark.parametrize(("url", "limit"), [(URL, 4), (OTHER_URL, None)])
def test_the_limit_of_an_engine_holds_until_another_one_has_its_name(url: str, limit: int | None) -> None:
    """One that states none would get no more requests than that at a time, and so show no limit of its own."""
    fleet, told = Fleet(lambda: 0.5), Told()
    found = findings(told, fleet)
    found.apply(
        0, ReplicaEndpoint("r0", "p", URL, Origin.parse(URL)), Found(None, EngineFacts(in_flight_limit=4)), 0.0
    )
    facts = Found(None, EngineFacts(running=4, waiting=0))
    for _ in range(2):
        found.apply(0, ReplicaEndpoint("r0", "p", url, Origin.parse(url)), facts, 1.0)
        fleet.add(ReplicaSpec("r0", "p"))  # a reload
    assert fleet.limit_of(0) == limit


def test_the_limit_that_was_learned_of_an_engine_is_learned_anew_of_another_one_with_its_name() -> None:
    fleet, told = Fleet(lambda: 0.5), Told()
    found = findings(told, fleet)
    full, idle = EngineFacts(running=40, waiting=3), EngineFacts(running=0, waiting=0)
    limits = []
    for url, facts in ((URL, full), (OTHER_URL, idle), (OTHER_URL, full)):
        found.apply(0, ReplicaEndpoint("r0", "p", url, Origin.parse(url)), Found(None, facts), 0.0)
        limits.append(fleet.limit_of(0))
    assert limits == [40, None, 40]
